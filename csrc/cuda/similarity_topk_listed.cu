// Listed pairs on a GPU: their logits, and weighted sums over lists, of which gradients are made.
//
// Both are bound by the rows that they gather. As many lanes as a row has packs of 16 bytes read it together, up to a
// warp; each sum has one owner and one order.
#include "launch.h"
#include "similarity_pairs.h"
#include "similarity_topk.h"

namespace contrastive_ops {
namespace {

constexpr int kThreads = 128;

// How many lanes read a row: a power of two.
template <class T, int width>
int lanes_for(int64_t D) {
  int lanes = 1;
  while (lanes < kWarp && lanes * width < D) lanes *= 2;
  return lanes;
}

// ---- Logits ---------------------------------------------------------------------------------------------------------

template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    at_kernel(const T* x, const T* y, const __grid_constant__ PairArguments p, const int64_t* indices, float* values,
              int64_t D, int64_t listed, int lanes, bool raw) {
  using Packed = Pack<T, width>;
  const int64_t entry = int64_t{blockIdx.x} * (kThreads / lanes) + threadIdx.x / lanes;
  const int64_t row = entry / listed;
  const bool inside = row < p.N;
  const int64_t column = inside ? indices[entry] : -1;
  float dot = 0.0f;
  if (column >= 0) {
    const auto* a = reinterpret_cast<const Packed*>(x + row * D);
    const auto* b = reinterpret_cast<const Packed*>(y + column * D);
    for (int64_t at = threadIdx.x % lanes; at < D / width; at += lanes) {
      const Packed of_x = a[at], of_y = b[at];
      for (int q = 0; q < width; ++q) dot += to_float(of_x.at[q]) * to_float(of_y.at[q]);
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) dot += __shfl_xor_sync(kFullWarp, dot, step);
  if (!inside || threadIdx.x % lanes != 0) return;
  if (column < 0) {
    values[entry] = raw ? 0.0f : -INFINITY;
    return;
  }
  if (p.code_scale != nullptr) dot *= p.code_scale[column];
  values[entry] = raw ? dot : logit_of(p, p.sets[0], dot, row, column);
}

// ---- Sums -----------------------------------------------------------------------------------------------------------

// A block per owner. Groups of lanes take the entries in turn, so that a column that every row lists does not take as
// long as it is long, and the sums of the groups are added in their order.
template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const T* rows, const int64_t* indptr, const int64_t* partners, const float* weights, float* sums,
                    int64_t D, int lanes) {
  using Packed = Pack<T, width>;
  const int64_t owner = blockIdx.x, begin = indptr[owner], end = indptr[owner + 1];
  if (begin == end) {  // as with most columns of a large corpus
    for (int64_t n = threadIdx.x; n < D; n += kThreads) sums[owner * D + n] = 0.0f;
    return;
  }
  auto* of_groups = shared_memory<float>();  // (groups, span)
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes, span = lanes * width;
  for (int64_t first = 0; first < D; first += span) {
    const int64_t at = first + lane * width;
    float total[width] = {};
    if (at < D) {
#pragma unroll 4
      for (int64_t entry = begin + group; entry < end; entry += groups) {
        const int64_t partner = partners[entry];
        const float weight = weights[entry];
        const Packed values = *reinterpret_cast<const Packed*>(rows + (partner < 0 ? 0 : partner) * D + at);
        if (partner < 0) continue;
        for (int q = 0; q < width; ++q) total[q] += weight * to_float(values.at[q]);
      }
    }
    for (int q = 0; q < width; ++q) of_groups[group * span + lane * width + q] = total[q];
    __syncthreads();
    for (int n = static_cast<int>(threadIdx.x); n < span && first + n < D; n += kThreads) {
      float sum = 0.0f;
      for (int each = 0; each < groups; ++each) sum += of_groups[each * span + n];
      sums[owner * D + first + n] = sum;
    }
    __syncthreads();
  }
}

// A warp per owner.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const int64_t* indptr, const float* weights, float* sums, int64_t owners) {
  const int64_t owner = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (owner >= owners) return;
  float total = 0.0f;
  for (int64_t entry = indptr[owner] + threadIdx.x % kWarp; entry < indptr[owner + 1]; entry += kWarp) {
    total += weights[entry];
  }
  total = fold_warp(total, [](float a, float b) { return a + b; });
  if (threadIdx.x % kWarp == 0) sums[owner] = total;
}

// Calls function(T{}, width) with the most numbers that all rows can be read in at once.
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

void similarity_topk_at(Stream stream, Input x, Input y, const float* scale, const float* row_bias,
                        const float* col_bias, Arrays pair_data, Integers spec, const int64_t* indices, float* values,
                        int64_t N, int64_t M, int64_t D, int64_t listed, bool raw) {
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, nullptr, N, M);
  with_width(x, y.data, D, [&](auto type, auto width) {
    using T = decltype(type);
    const int lanes = lanes_for<T, width>(D);
    launch(at_kernel<T, width>, ceil_divide(N * listed, kThreads / lanes), kThreads, 0, stream, x.as<T>(), y.as<T>(), p,
           indices, values, D, listed, lanes, raw);
  });
}

void similarity_topk_sum_rows(Stream stream, Input rows, const int64_t* indptr, const int64_t* partners,
                              const float* weights, float* sums, int64_t owners, int64_t D) {
  with_width(rows, nullptr, D, [&](auto type, auto width) {
    using T = decltype(type);
    const int lanes = lanes_for<T, width>(D);
    launch(sum_rows_kernel<T, width>, owners, kThreads, kThreads * width * sizeof(float), stream, rows.as<T>(), indptr,
           partners, weights, sums, D, lanes);
  });
}

void similarity_topk_sum(Stream stream, const int64_t* indptr, const float* weights, float* sums, int64_t owners) {
  launch(sum_kernel, ceil_divide(owners, kThreads / kWarp), kThreads, 0, stream, indptr, weights, sums, owners);
}

}  // namespace contrastive_ops
