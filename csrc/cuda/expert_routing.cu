// expert_routing on a GPU.
#include "expert_routing.h"

#include "launch.h"

namespace contrastive_ops {
namespace {

// ---- Moving rows
// -----------------------------------------------------------------------------------------------------
//
// One warp per row, 16 bytes per lane and step where rows begin at multiples of 16 bytes. Each number has one writer.

constexpr int kWarpsPerBlock = 4;

template <class T, int width>
__global__ void dispatch_kernel(const T* tokens, const float* gates, const int64_t* order, T* rows, int64_t k,
                                int64_t R, int64_t D) {
  using Packed = Pack<T, width>;
  const int64_t row = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= R) return;
  const int64_t choice = order[row];
  const bool empty = choice < 0;
  const auto* from = reinterpret_cast<const Packed*>(tokens + (empty ? 0 : choice / k) * D);
  auto* to = reinterpret_cast<Packed*>(rows + row * D);
  const float gate = gates == nullptr || empty ? 1.0f : gates[choice];
  for (int64_t at = threadIdx.x % kWarp; at < D / width; at += kWarp) {
    Packed values{};
    if (!empty) values = from[at];
    if (gates != nullptr) {
      for (int q = 0; q < width; ++q) values.at[q] = from_float<T>(gate * to_float(values.at[q]));
    }
    to[at] = values;
  }
}

template <class T, int width>
__global__ void combine_kernel(const T* rows, const float* gates, const int64_t* slots, T* tokens, int64_t T_,
                               int64_t k, int64_t D) {
  using Packed = Pack<T, width>;
  const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
  if (token >= T_) return;
  auto* to = reinterpret_cast<Packed*>(tokens + token * D);
  for (int64_t at = threadIdx.x % kWarp; at < D / width; at += kWarp) {
    float total[width] = {};
    for (int64_t j = 0; j < k; ++j) {
      const int64_t slot = slots[token * k + j];
      if (slot < 0) continue;  // whatever its gate is
      const float gate = gates == nullptr ? 1.0f : gates[token * k + j];
      const Packed values = reinterpret_cast<const Packed*>(rows + slot * D)[at];
      for (int q = 0; q < width; ++q) total[q] += gate * to_float(values.at[q]);
    }
    Packed result;
    for (int q = 0; q < width; ++q) result.at[q] = from_float<T>(total[q]);
    to[at] = result;
  }
}

// Calls function(T{}, width) with the most numbers that all rows of a matrix can move at once.
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

}  // namespace

void expert_routing_dispatch(Stream stream, Input tokens, const float* gates, const int64_t* order, Output rows,
                             int64_t, int64_t k, int64_t R, int64_t D) {
  with_width(tokens, rows.data, D, [&](auto type, auto width) {
    using T = decltype(type);
    launch(dispatch_kernel<T, width>, ceil_divide(R, kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, stream, tokens.as<T>(),
           gates, order, rows.as<T>(), k, R, D);
  });
}

void expert_routing_combine(Stream stream, Input rows, const float* gates, const int64_t* slots, Output tokens,
                            int64_t T_, int64_t k, int64_t, int64_t D) {
  with_width(rows, tokens.data, D, [&](auto type, auto width) {
    using T = decltype(type);
    launch(combine_kernel<T, width>, ceil_divide(T_, kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, stream, rows.as<T>(),
           gates, slots, tokens.as<T>(), T_, k, D);
  });
}

}  // namespace contrastive_ops
