// expert_routing on a GPU: rows that move between tokens and experts. Scores are in expert_routing_scores*.cu, slots in
// expert_routing_slots.cu.
//
// Bound by memory: each row is read once and written once. A warp, or a part of one where rows are short, has a row and
// moves 16 bytes per thread and step where rows begin at multiples of 16 bytes. Each number has one writer.
#include "expert_routing.h"

#include "launch.h"

namespace contrastive_ops {
namespace {

constexpr int kRowThreads = 128;
// Rows of a token that are read side by side.
constexpr int kAtOnce = 4;

// Threads of a row: as many as it has packs, at most a warp.
inline int lanes_of(int64_t packs) {
  int lanes = 1;
  while (lanes < kWarp && lanes < packs) lanes *= 2;
  return lanes;
}

// The row of the calling thread, and which of its threads that is.
struct Place {
  int64_t row;
  int lane, lanes;
  __device__ explicit Place(int lanes)
      : row(int64_t{blockIdx.x} * (kRowThreads / lanes) + threadIdx.x / lanes),
        lane(static_cast<int>(threadIdx.x) % lanes),
        lanes(lanes) {}
};

template <class T, int width>
__global__ void __launch_bounds__(kRowThreads)
    dispatch_kernel(const T* tokens, const float* gates, const int64_t* order, T* rows, int64_t k, int64_t R, int64_t D,
                    int lanes) {
  using Packed = Pack<T, width>;
  const Place place(lanes);
  if (place.row >= R) return;
  const int64_t choice = order[place.row];
  const bool empty = choice < 0;
  const auto* from = reinterpret_cast<const Packed*>(tokens + (empty ? 0 : choice / k) * D);
  auto* to = reinterpret_cast<Packed*>(rows + place.row * D);
  const float gate = gates == nullptr || empty ? 1.0f : gates[choice];
#pragma unroll 4
  for (int64_t at = place.lane; at < D / width; at += lanes) {
    Packed values{};
    if (!empty) values = from[at];
    if (gates != nullptr) {
#pragma unroll
      for (int q = 0; q < width; ++q) values.at[q] = from_float<T>(gate * to_float(values.at[q]));
    }
    to[at] = values;
  }
}

// Some of the rows of a token, from its choice `first` on.
template <class T, int width>
struct TakenRows {
  int64_t slot[kAtOnce];

  __device__ TakenRows(const int64_t* slots, int64_t first, int64_t k) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) slot[j] = first + j < k ? slots[first + j] : -1;
  }
  // Pack `at` of each row; what a choice without a row would read is 0.
  __device__ void load(const T* rows, int64_t D, int64_t at, Pack<T, width> (&to)[kAtOnce]) const {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      to[j] = {};
      if (slot[j] >= 0) to[j] = reinterpret_cast<const Pack<T, width>*>(rows + slot[j] * D)[at];
    }
  }
};

template <class T, int width>
__global__ void __launch_bounds__(kRowThreads)
    combine_kernel(const T* rows, const float* gates, const int64_t* slots, T* tokens, int64_t tokens_count, int64_t k,
                   int64_t D, int lanes) {
  using Packed = Pack<T, width>;
  const Place place(lanes);
  if (place.row >= tokens_count) return;
  slots += place.row * k;
  auto* to = reinterpret_cast<Packed*>(tokens + place.row * D);
  for (int64_t at = place.lane; at < D / width; at += lanes) {
    float total[width] = {};
    for (int64_t first = 0; first < k; first += kAtOnce) {
      const TakenRows<T, width> taken(slots, first, k);
      Packed values[kAtOnce];
      taken.load(rows, D, at, values);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (taken.slot[j] < 0) continue;  // whatever its gate is
        const float gate = gates == nullptr ? 1.0f : gates[place.row * k + first + j];
#pragma unroll
        for (int q = 0; q < width; ++q) total[q] += gate * to_float(values[j].at[q]);
      }
    }
    Packed result;
#pragma unroll
    for (int q = 0; q < width; ++q) result.at[q] = from_float<T>(total[q]);
    to[at] = result;
  }
}

template <class T, int width>
__global__ void __launch_bounds__(kRowThreads)
    dots_kernel(const T* tokens, const T* rows, const int64_t* slots, float* dots, int64_t tokens_count, int64_t k,
                int64_t D, int lanes) {
  using Packed = Pack<T, width>;
  const Place place(lanes);
  const bool real = place.row < tokens_count;  // all threads of a warp take part in the sums
  const int64_t token = real ? place.row : 0;
  const auto* own = reinterpret_cast<const Packed*>(tokens + token * D);
  for (int64_t first = 0; first < k; first += kAtOnce) {
    const TakenRows<T, width> taken(slots + token * k, first, k);
    float sums[kAtOnce] = {};
    for (int64_t at = place.lane; real && at < D / width; at += lanes) {
      const Packed token_values = own[at];
      Packed values[kAtOnce];
      taken.load(rows, D, at, values);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int q = 0; q < width; ++q) sums[j] += to_float(token_values.at[q]) * to_float(values[j].at[q]);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      for (int step = lanes / 2; step > 0; step /= 2) sums[j] += __shfl_xor_sync(kFullWarp, sums[j], step);
      // NaN of the token must not come back where it has no row.
      if (real && place.lane == 0 && first + j < k) dots[token * k + first + j] = taken.slot[j] < 0 ? 0.0f : sums[j];
    }
  }
}

// Calls function(T{}, width) with the most numbers that all rows of both matrices can move at once.
template <class Function>
void with_width(const Input& a, const void* b, int64_t D, const Function& function) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_aligned16(a.data) && is_aligned16(b) && D % kPack<T> == 0) {
      function(type, std::integral_constant<int, kPack<T>>());
    } else {
      function(type, std::integral_constant<int, 1>());
    }
  });
}

// Launches a kernel for `count` rows of D numbers; its last arguments are D and the threads of a row.
template <class Kernel, class... Arguments>
void launch_rows(Kernel kernel, Stream stream, int64_t count, int64_t D, int width, const Arguments&... arguments) {
  const int lanes = lanes_of(D / width);
  launch(kernel, ceil_divide(count, kRowThreads / lanes), kRowThreads, 0, stream, arguments..., D, lanes);
}

}  // namespace

void expert_routing_dispatch(Stream stream, Input tokens, const float* gates, const int64_t* order, Output rows,
                             int64_t k, int64_t R, int64_t D) {
  with_width(tokens, rows.data, D, [&](auto type, auto width) {
    using T = decltype(type);
    launch_rows(dispatch_kernel<T, width>, stream, R, D, width, tokens.as<T>(), gates, order, rows.as<T>(), k, R);
  });
}

void expert_routing_combine(Stream stream, Input rows, const float* gates, const int64_t* slots, Output tokens,
                            int64_t T_, int64_t k, int64_t D) {
  with_width(rows, tokens.data, D, [&](auto type, auto width) {
    using T = decltype(type);
    launch_rows(combine_kernel<T, width>, stream, T_, D, width, rows.as<T>(), gates, slots, tokens.as<T>(), T_, k);
  });
}

void expert_routing_dots(Stream stream, Input tokens, Input rows, const int64_t* slots, float* dots, int64_t T_,
                         int64_t k, int64_t D) {
  with_width(tokens, rows.data, D, [&](auto type, auto width) {
    using T = decltype(type);
    launch_rows(dots_kernel<T, width>, stream, T_, D, width, tokens.as<T>(), rows.as<T>(), slots, dots, T_, k);
  });
}

}  // namespace contrastive_ops
