// A rectangle of the similarity matrix whose inner products a library has written, and how blocks of threads read it.
//
// A block has a tile: each of its warps reads every kWarps-th row of the tile, 16 bytes per lane and load, and lanes
// keep their columns from row to row. So what is summed along a column stays in registers until the tile ends, and
// what is summed along a row takes one exchange between the lanes for 8 or 16 pairs.
//
// Of a matrix that is compared with itself there is what lies on the diagonal and above it. Each pair (i, j) is then
// read both ways, the second time mirrored, as (j, i).
#pragma once

#include "launch.h"
#include "similarity_pairs.h"

namespace contrastive_ops {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
// Columns of a tile, and of a lane; contrastive_ops/cuda/_chunks.py has the same number.
constexpr int kTileColumns = 256, kColumns = kTileColumns / kWarp;
// Columns that a lane reads at once.
constexpr int kLoad = kPack<float>;
// Numbers of the columns of a lane.
using Columns = float[kColumns];
static_assert(kThreads == kTileColumns, "what is along a column is merged by one thread for each");

struct PairChunk {
  const float *dots, *guide;  // (rows, pitch); no guide is null
  int64_t pitch;              // a multiple of kLoad
  int first_row, rows, first_col, cols;
  int tile_rows;  // a multiple of kWarps
  bool itself;

  __host__ __device__ int tiles_down() const { return static_cast<int>(ceil_divide(rows, tile_rows)); }
  __host__ __device__ int tiles_across() const { return static_cast<int>(ceil_divide(cols, kTileColumns)); }
  __host__ int64_t tiles() const { return int64_t{tiles_down()} * tiles_across(); }
};

// `numbers`: pitch, first_row, rows, first_col, cols, tile_rows, itself.
inline PairChunk chunk_of(const float* dots, const float* guide, const Integers& numbers) {
  if (numbers.size != 7) throw std::invalid_argument("chunk: it must be seven numbers");
  const int64_t* n = numbers.data;
  const auto narrow = [](int64_t x) {
    if (x < 0 || x > 0x7ffff000) throw std::invalid_argument("chunk: rows and columns must be below 2^31");
    return static_cast<int>(x);
  };
  if (n[0] % kLoad != 0 || n[0] < n[4]) throw std::invalid_argument("chunk: pitch must be a multiple of 4 columns");
  if (n[5] <= 0 || n[5] % kWarps != 0) throw std::invalid_argument("chunk: tile_rows must be a multiple of 8");
  narrow(n[1] + n[2]), narrow(n[3] + n[4]);
  return {dots, guide, n[0], narrow(n[1]), narrow(n[2]), narrow(n[3]), narrow(n[4]), narrow(n[5]), n[6] != 0};
}

// The tile of a block, and the columns of a lane: kLoad neighbours per step of a warp's width. All within the chunk.
struct Tile {
  int across, down, first_row, last_row, warp, lane;

  __device__ explicit Tile(const PairChunk& chunk) {
    const int count = chunk.tiles_across();
    across = static_cast<int>(blockIdx.x % count), down = static_cast<int>(blockIdx.x / count);
    first_row = down * chunk.tile_rows;
    last_row = min(first_row + chunk.tile_rows, chunk.rows);
    warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  }

  // Column k of the lane.
  __device__ int column(int k) const { return across * kTileColumns + (k / kLoad * kWarp + lane) * kLoad + k % kLoad; }

  // Whether no pair of the tile is on or above the diagonal.
  __device__ bool below_diagonal(const PairChunk& chunk) const {
    return chunk.itself && chunk.first_col + (across + 1) * kTileColumns <= chunk.first_row + first_row;
  }

  // Numbers of a row; what they are outside the chunk is not defined.
  __device__ void load(const PairChunk& chunk, const float* from, int row, Columns& to) const {
    const float* line = from + row * chunk.pitch;
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kColumns; k += kLoad) {
      Pack16<float> pack{};
      if (column(k) < chunk.cols) pack = *reinterpret_cast<const Pack16<float>*>(line + column(k));
      CONTRASTIVE_OPS_UNROLL
      for (int q = 0; q < kLoad; ++q) to[k + q] = pack.at[q];
    }
  }
};

// What belongs to thread `at` of as many as there are rows and columns: a row of the chunk, a column of it, or, where
// the matrix is compared with itself, the same item as both; -1 for none. So every item has one thread.
struct OwnedPlaces {
  int row, col;
  __device__ OwnedPlaces(const PairChunk& chunk, int64_t at) : row(-1), col(-1) {
    if (at < chunk.rows) {
      row = static_cast<int>(at);
      const int other = chunk.first_row + row - chunk.first_col;
      if (chunk.itself && other >= 0 && other < chunk.cols) col = other;
    } else if (at < int64_t{chunk.rows} + chunk.cols) {
      const int other = static_cast<int>(at - chunk.rows) + chunk.first_col - chunk.first_row;
      if (!chunk.itself || other < 0 || other >= chunk.rows) col = static_cast<int>(at - chunk.rows);
    }
  }
};

// Where the inner product of the pair (i, j) stands, which may be that of (j, i), or -1 where the chunk has neither.
__device__ inline int64_t place_of(const PairChunk& chunk, int64_t i, int64_t j) {
  const int64_t row = (chunk.itself ? min(i, j) : i) - chunk.first_row;
  const int64_t col = (chunk.itself ? max(i, j) : j) - chunk.first_col;
  return row < 0 || row >= chunk.rows || col < 0 || col >= chunk.cols ? -1 : row * chunk.pitch + col;
}

// ---- Logits that one multiplication gives ---------------------------------------------------------------------------
//
// Most losses have one set, with a scale of all pairs or of rows, and at most the diagonal and a target to leave out.

enum class Path { plain, plain_itself, general };

inline bool is_plain(const PairArguments& p, const PairSet& set, bool itself) {
  if (set.has_rules() || set.log_weight || set.fill || p.col_bias || set.scale_of == ScaleOf::columns) return false;
  return !itself || (set.scale_of == ScaleOf::all && !p.row_bias);  // so that a pair has one logit both ways
}

// The target of a row, -1 for none, also where it is no column.
__device__ inline int target_of(const PairArguments& p, int64_t i) {
  const int64_t j = p.target ? p.target[i] : -1;
  return j < 0 || j >= p.M ? -1 : static_cast<int>(j);
}

// The same for all pairs of a row: l = factor * dot + bias, and which columns are left out.
struct PlainRow {
  float factor, bias;
  int row, target, diagonal;

  __device__ PlainRow(const PairArguments& p, const PairSet& set, int i) : row(i) {
    factor = scale_factor(set, i, 0);
    bias = p.row_bias ? (set.negate ? -p.row_bias[i] : p.row_bias[i]) : 0.0f;
    target = target_of(p, i);
    diagonal = set.has_diagonal ? static_cast<int>(min(max(i + set.diagonal, int64_t{-1}), p.M)) : -1;
  }
  __device__ float logit(float dot) const { return fmaf(dot, factor, bias); }
  __device__ bool leaves_out(int j) const { return j == target || j == diagonal; }
};

// The logit of a pair as folds see it.
__device__ inline float shown_logit(const PairArguments& p, const PairSet& set, float dot, float guide, int64_t i,
                                    int64_t j) {
  if (p.target && p.target[i] == j) return -__builtin_huge_valf();
  if (set.drops && dropped(set, dot, guide, i, j)) return set.fill ? *set.fill : -__builtin_huge_valf();
  return logit_of(p, set, dot, i, j);
}

}  // namespace contrastive_ops
