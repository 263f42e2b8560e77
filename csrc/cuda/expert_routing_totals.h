// Sums over all tokens from those of blocks, and the losses of a router that are made of them.
#pragma once

#include "expert_routing_losses.h"
#include "launch.h"

namespace contrastive_ops {
namespace {

// What a block writes: `sums`, in float64, (kinds, segments, E) and (3, segments) for squared lse, entropy and margin;
// `counts` (segments, E) of choices and (segments) of tokens. `tables`: memory for tables that shared memory has no
// room for.
struct Parts {
  double* sums;
  int32_t* counts;
  float* tables;
  int64_t count;
  int kinds;
};

struct Totals {
  float* sums;          // (3, segments, E)
  float* totals;        // (2, segments)
  float* margin;        // (segments)
  int64_t* choices;     // (segments, E)
  int64_t* tokens;      // (segments)
  int64_t* kept;        // (segments, E), which becomes 0; or null
  float *values, *all;  // losses in a row, and their weighted total; null where none are asked for
  int32_t* ticket;      // 0 before
};

constexpr int kMostTotalsThreads = 1024;

// The sum of a column of `rows` rows, of which each warp has some; the first one gets the sum.
template <class To, class From>
__device__ To column_sum(const From* column, int64_t rows, int64_t width, bool wanted) {
  const int slices = static_cast<int>(blockDim.x) / kWarp;
  To* each = shared_memory<To>();
  To sum = 0;
  if (wanted) {
#pragma unroll 4
    for (int64_t row = threadIdx.x / kWarp; row < rows; row += slices) sum += column[row * width];
  }
  each[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return 0;
  for (int slice = 1; slice < slices; ++slice) sum += each[slice * kWarp + threadIdx.x];
  return sum;
}

// Whether this block is the last one to come here: what others wrote before can be read.
__device__ inline bool is_last_block(int32_t* ticket) {
  auto* last = shared_memory<int32_t>();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(ticket, 1) == static_cast<int32_t>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  const bool found = *last != 0;
  __syncthreads();
  return found;
}

// Each block adds up 32 columns, in double and in an order that depends on the number of rows alone; the last one to
// end makes the losses.
__global__ void __launch_bounds__(kMostTotalsThreads)
    totals_kernel(Parts parts, Totals out, const __grid_constant__ LossTerms losses, int64_t float_blocks) {
  const int64_t segments = losses.segments, cells = segments * losses.E;
  const bool is_first_warp = threadIdx.x < kWarp;
  if (blockIdx.x < float_blocks) {
    const int64_t column = int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
    const int64_t width = parts.kinds * cells + 3 * segments;
    // Sums that were not asked for are 0.
    const bool is_sum = column < 3 * cells,
               wanted = is_sum ? column < parts.kinds * cells : column < 3 * (cells + segments);
    const int64_t from = is_sum ? column : column - (3 - parts.kinds) * cells;
    const auto sum = static_cast<float>(column_sum<double>(parts.sums + from, parts.count, width, wanted));
    const int64_t other = column - 3 * cells;
    if (is_first_warp && is_sum) out.sums[column] = sum;
    if (is_first_warp && other >= 0 && other < 2 * segments) out.totals[other] = sum;
    if (is_first_warp && other >= 2 * segments && other < 3 * segments) out.margin[other - 2 * segments] = sum;
  } else {
    const int64_t column = (blockIdx.x - float_blocks) * kWarp + threadIdx.x % kWarp, width = cells + segments;
    const auto sum = column_sum<int64_t>(parts.counts + column, parts.count, width, column < width);
    if (is_first_warp && column < width) (column < cells ? out.choices[column] : out.tokens[column - cells]) = sum;
    if (is_first_warp && column < cells && out.kept != nullptr) out.kept[column] = 0;
  }
  if (out.all == nullptr || !is_last_block(out.ticket)) return;
  const LossSums in{out.sums, out.totals, out.choices, out.tokens};
  write_losses(losses, in, shared_memory<double>(), out.values, out.all);
}

inline void launch_totals(Stream stream, const Parts& parts, const Totals& out, const LossTerms& losses) {
  const int64_t cells = int64_t{losses.segments} * losses.E,
                float_blocks = ceil_divide(3 * (cells + losses.segments), kWarp);
  const int threads = static_cast<int>(min(max(parts.count, int64_t{1}) * kWarp, int64_t{kMostTotalsThreads}));
  launch(totals_kernel, float_blocks + ceil_divide(cells + losses.segments, kWarp), threads,
         static_cast<size_t>(max(threads, losses.size())) * sizeof(double), stream, parts, out, losses, float_blocks);
}

}  // namespace
}  // namespace contrastive_ops
