// All inner products of some rows with all columns, tile by tile, for an epilogue that makes something smaller of them.
//
// A block has three groups of 128 threads. One thread of the first brings tiles of x and y, 64 numbers deep, to a ring
// of stages. The two others take turns (ping-pong): while one multiplies the tile of which it holds all 128 x kCols
// sums in registers, the other is in its epilogue. Two blocks, a cluster, work on two tiles of rows and the same
// columns; each brings half of those to both. Blocks go on from tile to tile, so that the next stages are on their way
// while a tile ends. What is beyond a matrix is 0.
#pragma once

#include "clusters.h"
#include "primitives.h"

namespace contrastive_ops::hopper {

constexpr int kRows = 128, kDepth = 64, kGroup = 128, kBlockThreads = 3 * kGroup;
// Registers of a thread that brings tiles and of one that multiplies, of 504 for three.
constexpr int kFewRegisters = 24, kManyRegisters = 240;
// Named barriers of the two groups: for their turns, and for their own threads.
constexpr int kTurns = 1, kGroups = 3;
// Pairs of row tiles whose columns are gone through together, so that both operands are found in the cache.
constexpr int kRaster = 8;

// How tiles are gone through: all of them, or, of a matrix that is compared with itself, what two tiles of rows have on
// and above the diagonal. Tiles that the diagonal crosses are multiplied whole, and rules leave out what is below it.
struct Plan {
  int row_pairs, col_tiles, steps, tile_cols, count;
  int diagonal;  // its column in the first row; -1 where all tiles are gone through

  __host__ Plan(int64_t rows, int64_t cols, int64_t D, int columns, int64_t from = -1) {
    const int64_t pairs = ceil_divide(rows, kCluster * kRows), across = ceil_divide(cols, columns);
    if (pairs * across > kMostBlocks) throw std::invalid_argument("rows and columns: there must be fewer tiles");
    row_pairs = static_cast<int>(pairs), col_tiles = static_cast<int>(across);
    steps = static_cast<int>(ceil_divide(D, kDepth)), tile_cols = columns, diagonal = static_cast<int>(from);
    count = row_pairs * col_tiles;
    for (int pair = 0; diagonal >= 0 && pair < row_pairs; ++pair) count -= first_tile(pair);
  }
  __host__ __device__ int tiles() const { return count; }
  __host__ __device__ int row_tiles() const { return row_pairs * kCluster; }
  // The first tile of columns that a pair of row tiles has, and how many tiles of rows have a tile of columns.
  __host__ __device__ int first_tile(int pair) const {
    return diagonal < 0 ? 0 : (diagonal + pair * kCluster * kRows) / tile_cols;
  }
  __host__ __device__ int row_tiles_of(int col_tile) const {
    const int rows = (col_tile + 1) * tile_cols - diagonal, pairs = (rows + kCluster * kRows - 1) / (kCluster * kRows);
    return diagonal < 0 || pairs > row_pairs ? row_tiles() : rows <= 0 ? 0 : pairs * kCluster;
  }
};

// The tiles that have a part of a row, or of a column.
struct Span {
  int begin, end;
  __device__ Span(const Plan& plan, bool cols, int place)
      : begin(cols ? 0 : plan.first_tile(place / (kCluster * kRows))),
        end(cols ? plan.row_tiles_of(place / plan.tile_cols) : plan.col_tiles) {}
};

struct TilePlace {
  int row_tile, col_tile;

  // Tile `at` of those that clusters go through, and the block of the cluster.
  __device__ TilePlace(const Plan& plan, int at, int rank) {
    const bool cut = plan.diagonal >= 0;
    int first = cut ? 0 : at / (kRaster * plan.col_tiles) * kRaster;
    at -= first * plan.col_tiles;
    for (;; first += kRaster) {
      const int height = min(kRaster, plan.row_pairs - first), begin = plan.first_tile(first + height - 1);
      // Tiles that not all pairs of the band have, one pair after another, and then those of all.
      for (int pair = first; cut && pair < first + height; ++pair) {
        const int before = begin - plan.first_tile(pair);
        if (at < before) {
          row_tile = pair * kCluster + rank, col_tile = begin - before + at;
          return;
        }
        at -= before;
      }
      const int count = height * (plan.col_tiles - begin);
      if (at < count) {
        row_tile = (first + at % height) * kCluster + rank, col_tile = begin + at / height;
        return;
      }
      at -= count;
    }
  }
};

template <class T, int kCols, int kStages>
struct Stages {
  T x[kStages][kRows * kDepth];
  T y[kStages][kCols * kDepth];
  uint64_t full[kStages], empty[kStages];

  // By one thread.
  __device__ void make() {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], kCluster * kGroup / kWarp);  // whoever writes to both blocks waits for both
    }
    fence_barrier_init();
  }
};

// Which stage is next, and in which round of the ring.
template <int kStages>
struct Turn {
  int stage, parity;
  // After so many stages.
  __device__ explicit Turn(int before) : stage(before % kStages), parity(before / kStages % 2) {}
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <class T, int kCols, int kStages>
__device__ void bring_tiles(const TensorMap* x, const TensorMap* y, const Plan& plan, Stages<T, kCols, kStages>& s,
                            int rank) {
  constexpr int kShare = kCols / kCluster, kBytes = (kRows + kCols) * kDepth * static_cast<int>(sizeof(T));
  constexpr uint16_t kBoth = (1u << kCluster) - 1;
  Turn<kStages> turn(0);
  for (int at = static_cast<int>(blockIdx.x) / kCluster; at < plan.tiles();
       at += static_cast<int>(gridDim.x) / kCluster) {
    const TilePlace tile(plan, at, rank);
    for (int step = 0; step < plan.steps; ++step) {
      barrier_wait(&s.empty[turn.stage], turn.parity ^ 1);
      barrier_expect(&s.full[turn.stage], kBytes);
      load_tile(x, s.x[turn.stage], &s.full[turn.stage], step * kDepth, tile.row_tile * kRows);
      load_tile_to(y, s.y[turn.stage] + rank * kShare * kDepth, &s.full[turn.stage], step * kDepth,
                   tile.col_tile * kCols + rank * kShare, kBoth);
      turn.advance();
    }
  }
}

// Calls epilogue(sums, tile, group) for every tile of the block, by the 128 threads of a group; sums[m] has rows 64 m
// to 64 m + 63 of the tile as mma leaves them. All threads of a block must call it.
template <class T, int kCols, int kStages, class Epilogue>
__device__ void sweep(const TensorMap* x, const TensorMap* y, const Plan& plan, Stages<T, kCols, kStages>& s,
                      const Epilogue& epilogue) {
  const int rank = cluster_rank(), thread = static_cast<int>(threadIdx.x);
  // The same for a warp, and known to be.
  const int group = __shfl_sync(kFullWarp, thread / kGroup, 0) - 1;
  if (thread == 0) s.make();
  cluster_sync();
  if (group < 0) {
    give_registers<kFewRegisters>();
    if (thread == 0) bring_tiles(x, y, plan, s, rank);
    __syncwarp();
  } else {
    take_registers<kManyRegisters>();
    if (group == 1) named_arrive(kTurns, 2 * kGroup);  // the first group begins
    int before = group * plan.steps;                   // stages of this tile are behind so many
    const int clusters = static_cast<int>(gridDim.x) / kCluster;
#pragma unroll 1
    for (int at = static_cast<int>(blockIdx.x) / kCluster + group * clusters; at < plan.tiles(); at += 2 * clusters) {
      float sums[2][kCols / 2];
      Turn<kStages> turn(before);
      named_sync(kTurns + group, 2 * kGroup);
      const auto multiply = [&](auto first) {
        barrier_wait(&s.full[turn.stage], turn.parity);
        mma_fence();
        CONTRASTIVE_OPS_UNROLL
        for (int k = 0; k < kDepth / 16; ++k) {
          const uint64_t cols = tile_descriptor(s.y[turn.stage] + 16 * k);
          CONTRASTIVE_OPS_UNROLL
          for (int m = 0; m < 2; ++m) {
            const uint64_t rows = tile_descriptor(s.x[turn.stage] + m * 64 * kDepth + 16 * k);
            mma<T, kCols>(sums[m], rows, cols, !first.value || k > 0);
          }
        }
        mma_commit();
      };
      // A stage is free for both blocks once the products before have been made in both.
      const auto release = [&](int stage) {
        if (thread % kWarp < kCluster) barrier_arrive_at(&s.empty[stage], thread % kWarp);
      };
      multiply(std::true_type());
#pragma unroll 1
      for (int step = 1; step < plan.steps; ++step) {
        const int last = turn.stage;
        turn.advance();
        multiply(std::false_type());
        mma_wait<1>();
        release(last);
      }
      mma_wait<0>();
      release(turn.stage);
      named_arrive(kTurns + 1 - group, 2 * kGroup);
      before += 2 * plan.steps;
      epilogue(sums, TilePlace(plan, at, rank), group);
    }
    epilogue.finish();
  }
  cluster_sync();  // nobody leaves while another block may write to it
}

// ---- Which numbers a thread has -------------------------------------------------------------------------------------

// A thread has rows 0 to 3 and columns 0 to kCols / 4 - 1 of its own.
template <int kCols>
struct Own {
  static constexpr int kColumns = kCols / 4;
  int row, col;  // of its first number, among the rows of the sweep and all columns

  __device__ explicit Own(const TilePlace& tile) {
    const int thread = hidden(static_cast<int>(threadIdx.x)) % kGroup, lane = thread % kWarp;
    row = tile.row_tile * kRows + thread / kWarp * 16 + lane / 4;
    col = tile.col_tile * kCols + lane % 4 * 2;
  }
  __device__ int row_of(int r) const { return row + r / 2 * 64 + r % 2 * 8; }
  __device__ int col_of(int c) const { return col + c / 2 * 8 + c % 2; }
  // Which of its columns a column of the matrix is, or -1.
  __device__ int find(int64_t column) const {
    const int64_t beyond = column - col;
    return beyond < 0 || beyond >= kCols || beyond % 8 > 1 ? -1 : static_cast<int>(beyond / 8 * 2 + beyond % 8);
  }
  // How many of its columns are below `count`.
  __device__ int below(int count) const {
    const int beyond = min(max(count - col, 0), kCols);
    return beyond / 8 * 2 + min(beyond % 8, 2);
  }
  static __device__ float& number(float (&sums)[2][kCols / 2], int r, int c) {
    return sums[r / 2][c / 2 * 4 + r % 2 * 2 + c % 2];
  }
};

__device__ inline float sum_of(float a, float b) { return a + b; }

// Folds a number of each of four lanes, which share a row.
template <class Function>
__device__ float fold_row_lanes(float value, const Function& function) {
  value = function(value, __shfl_xor_sync(kFullWarp, value, 1));
  return function(value, __shfl_xor_sync(kFullWarp, value, 2));
}

// Adds 16 numbers of each of the eight lanes that share columns: a lane is left with numbers first and first + 1 of the
// sums, in values[0] and values[1]. Half of them are exchanged, then half of those, and so on.
constexpr int kShared = 16;
__device__ inline int add_columns(float (&values)[kShared]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  CONTRASTIVE_OPS_UNROLL
  for (int level = 0; level < 3; ++level) {
    const int half = kShared / 2 >> level, step = kWarp / 2 >> level;
    const bool upper = (lane & step) != 0;
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kShared / 2; ++k) {
      if (k >= half) break;
      const float mine = upper ? values[k + half] : values[k], other = upper ? values[k] : values[k + half];
      values[k] = mine + __shfl_xor_sync(kFullWarp, other, step);
    }
  }
  return (lane >> 4 & 1) * 8 + (lane >> 3 & 1) * 4 + (lane >> 2 & 1) * 2;
}

}  // namespace contrastive_ops::hopper
