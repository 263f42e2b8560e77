// What kernels that make gradients are told: what arrives at folds, and which sums of derivatives they carry.
#pragma once

#include "launch.h"
#include "similarity_chunk.h"
#include "similarity_folds.h"
#include "similarity_pairs.h"

namespace contrastive_ops {

// What is summed along rows and columns: rounding errors of the weights, dtotal/dl, dtotal/dl * inner product.
enum class SumOf : int { residual = 0, bias = 1, scale = 2 };

// A sum along the rows of a chunk, or along its columns, which a kernel carries.
struct Slot {
  SumOf what;
  int set;  // -1 for all
  bool direct, mirrored;
  int64_t begin;  // of its results in `totals`
};
constexpr int kRowSlots = 3, kColSlots = 2;
struct Slots {
  int row_count, col_count;
  Slot rows[kRowSlots], cols[kColSlots];
};

// What arrives from the total through one fold; d_value is null where nothing does.
struct Upstream {
  const float *value, *d_value;
  const int64_t* argmax;
};
struct Upstreams {
  Upstream folds[kMostFolds];
  const float *d_target, *d_linear;
};

// The fold of rows and the fold of columns of the one set of a plain call; -1 for none.
struct PlainFolds {
  int rows, cols;
};

// What is subtracted from logits: the value of a fold of no pair is -inf, as all of its logits are.
__device__ inline float subtrahend(float value) { return value == -kInfinity ? 0.0f : value; }

// One side of a plain call: the value of its fold and what arrives, for a row or a column.
struct Side {
  float value, d_value;
  FoldKind kind;

  __device__ Side(const PairArguments& p, const Upstreams& up, int fold, int64_t at, bool inside)
      : value(0.0f), d_value(0.0f), kind(FoldKind::count) {
    if (fold < 0 || !inside) return;
    kind = p.folds[fold].kind;
    value = subtrahend(up.folds[fold].value[at]), d_value = up.folds[fold].d_value[at];
  }
  // What the fold adds to dtotal/dl.
  __device__ float operator()(float z) const {
    return kind == FoldKind::count ? 0.0f : d_value * slope(kind, z, value);
  }
};

// Writes neighbouring weights in the dtype that they are multiplied in, and turns them into what rounding took.
template <class T>
__device__ void round_and_store(float* g, T* to, bool inside) {
  Pack<T, kLoad> rounded;
  CONTRASTIVE_OPS_UNROLL
  for (int q = 0; q < kLoad; ++q) {
    rounded.at[q] = from_float<T>(g[q]);
    g[q] -= to_float(rounded.at[q]);
  }
  if (inside) *reinterpret_cast<Pack<T, kLoad>*>(to) = rounded;
}

// Adds `sums` of the columns of all warps to `to`, one number per column of the tile; `shared` has kThreads numbers for
// each warp. All threads of a block must call it.
__device__ inline void store_column_sums(const PairChunk& chunk, const Tile& tile, const Columns& sums, float* shared,
                                         float* to) {
  CONTRASTIVE_OPS_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    shared[tile.warp * kTileColumns + tile.column(k) - tile.across * kTileColumns] = sums[k];
  }
  __syncthreads();
  const int column = tile.across * kTileColumns + threadIdx.x;
  if (column < chunk.cols) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += shared[w * kTileColumns + threadIdx.x];
    to[int64_t{tile.down} * chunk.cols + column] = sum;
  }
  __syncthreads();
}

}  // namespace contrastive_ops
