// What a sweep is told of pairs, and which of its pairs a thread leaves out.
//
// One set whose logits are scale * dot + row_bias + col_bias, with one scale or one for each row; left out may be the
// target, the diagonal, pairs of equal or of other ids, and those beyond a bound of their row or column. Inner
// products may have factors of their row and their column, which make them cosines. What else a call has is the matter
// of other kernels.
#pragma once

#include <utility>

#include "../similarity_pairs.h"
#include "sweep.h"

namespace contrastive_ops::hopper {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
// Of pairs that are left out.
constexpr float kNoLogit = -__builtin_huge_valf();

struct SweepPairs {
  int first_row, rows, cols;  // rows of the sweep, and all columns
  const float *scale, *row_bias, *col_bias;
  const int64_t* target;
  bool scale_of_rows, has_diagonal, has_ids, has_bounds;
  float sign;
  int64_t diagonal;
  const int64_t *differ_rows, *differ_cols, *same_rows, *same_cols;
  const float *below_rows, *below_cols, *above_rows, *above_cols;
  const float *row_factor, *col_factor;  // of inner products, both or none
  // Of a matrix that is compared with itself: how far behind the diagonal the columns begin that a row has; -1 for all.
  int behind;

  // dlogit / d(inner product) of a row of the sweep, and what is added to its logits.
  __device__ float factor(int row) const { return sign * scale[scale_of_rows ? first_row + min(row, rows - 1) : 0]; }
  __device__ float bias(int row) const {
    return row_bias == nullptr ? 0.0f : sign * row_bias[first_row + min(row, rows - 1)];
  }
  __device__ float unit_of_row(int row) const {
    return row_factor == nullptr ? 1.0f : row_factor[first_row + min(row, rows - 1)];
  }
  __device__ float unit_of_col(int col) const { return col_factor == nullptr || col >= cols ? 1.0f : col_factor[col]; }
  __device__ float bias_of_col(int col) const {
    return col_bias == nullptr || col >= cols ? 0.0f : sign * col_bias[col];
  }
};

// Why a sweep cannot do what is told, or null.
inline const char* why_not(const PairArguments& p) {
  if (p.set_count != 1) return "there must be one set";
  const PairSet& set = p.sets[0];
  if (set.exclude_indptr || set.guide_below_rows || set.guide_below_cols || set.log_weight || set.fill) {
    return "rules must be a diagonal, ids and bounds";
  }
  if (set.scale_of == ScaleOf::columns) return "there must be one scale, or one for each row";
  if (p.linear_indptr || p.code_scale) return "there must be no lists and codes";
  return nullptr;
}

inline SweepPairs sweep_pairs(const PairArguments& p, int64_t first_row, int64_t rows) {
  if (const char* why = why_not(p)) throw std::invalid_argument(std::string("spec: ") + why);
  if (first_row < 0 || rows < 0 || first_row + rows > p.N || p.N > kMostBlocks || p.M > kMostBlocks) {
    throw std::invalid_argument("rows: they must be those of x, and fewer than 2^31");
  }
  const PairSet& set = p.sets[0];
  SweepPairs to{};
  to.first_row = static_cast<int>(first_row), to.rows = static_cast<int>(rows), to.cols = static_cast<int>(p.M);
  to.scale = set.scale, to.row_bias = p.row_bias, to.col_bias = p.col_bias, to.target = p.target;
  to.scale_of_rows = set.scale_of == ScaleOf::rows, to.sign = set.negate ? -1.0f : 1.0f;
  to.has_diagonal = set.has_diagonal, to.diagonal = set.diagonal;
  to.differ_rows = set.differ_rows, to.differ_cols = set.differ_cols;
  to.same_rows = set.same_rows, to.same_cols = set.same_cols;
  to.below_rows = set.below_rows, to.below_cols = set.below_cols;
  to.above_rows = set.above_rows, to.above_cols = set.above_cols;
  to.row_factor = p.row_factor, to.col_factor = p.col_factor;
  to.has_ids = set.differ_rows || set.same_rows;
  to.has_bounds = set.below_rows || set.below_cols || set.above_rows || set.above_cols;
  to.behind = -1;
  return to;
}

// Of a matrix that is compared with itself: the pairs (i, j) on the diagonal and above it, and what (j, i) would be of
// those above it, without targets. Logits of the two are one number, as there are no scales of rows and no biases.
template <bool itself>
struct Views {
  SweepPairs at[1 + itself];
};

inline Views<true> both_views(const PairArguments& p, SweepPairs pairs) {
  if (p.N != p.M || pairs.scale_of_rows || pairs.row_bias || pairs.col_bias) {
    throw std::invalid_argument("itself: a matrix compared with itself must have one scale, and no biases");
  }
  pairs.behind = 0;
  SweepPairs other = pairs;
  other.behind = 1, other.target = nullptr, other.diagonal = -pairs.diagonal;
  std::swap(other.differ_rows, other.differ_cols), std::swap(other.same_rows, other.same_cols);
  std::swap(other.below_rows, other.below_cols), std::swap(other.above_rows, other.above_cols);
  return {{pairs, other}};
}

// Inner products with their factors.
template <int kCols>
__device__ void multiply_factors(const SweepPairs& p, const Own<kCols>& own, float (&dots)[2][kCols / 2]) {
  if (p.row_factor == nullptr) return;
  float of_rows[4];
  CONTRASTIVE_OPS_UNROLL
  for (int r = 0; r < 4; ++r) of_rows[r] = p.unit_of_row(own.row_of(r));
  CONTRASTIVE_OPS_UNROLL
  for (int c = 0; c < Own<kCols>::kColumns; ++c) {
    const float of_col = p.unit_of_col(own.col_of(c));
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) own.number(dots, r, c) *= of_rows[r] * of_col;
  }
}

// Which pairs of a thread no fold sees.
template <int kCols>
struct Drops {
  static constexpr int kColumns = Own<kCols>::kColumns;
  static_assert(kColumns <= 64, "one bit for each column");
  uint64_t rows[4] = {};
  int wanted[4] = {-1, -1, -1, -1};  // which of its columns is the row's target
  bool any = false;                  // for any lane of the warp

  __device__ bool has(int r, int c) const { return rows[r] >> c & 1; }
  // The inner product of a row with its target, where the thread has it.
  __device__ float target_dot(float (&dots)[2][kCols / 2], int r) const {
    float found = 0.0f;
    CONTRASTIVE_OPS_UNROLL
    for (int c = 0; c < kColumns; ++c) found = c == wanted[r] ? Own<kCols>::number(dots, r, c) : found;
    return found;
  }

  Drops() = default;
  __device__ Drops(const SweepPairs& p, const Own<kCols>& own, float (&dots)[2][kCols / 2]) {
    const int inside = own.below(p.cols);
    const uint64_t beyond = inside == kColumns ? 0 : ~uint64_t{0} << inside;
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = own.row_of(r);
      const bool real = row < p.rows;
      const int64_t i = int64_t{p.first_row} + row;
      wanted[r] = real && p.target != nullptr ? own.find(p.target[i]) : -1;
      if (wanted[r] >= inside) wanted[r] = -1;
      const int diagonal = real && p.has_diagonal ? own.find(i + p.diagonal) : -1;
      rows[r] = real ? beyond : ~uint64_t{0};
      if (wanted[r] >= 0) rows[r] |= uint64_t{1} << wanted[r];
      if (diagonal >= 0) rows[r] |= uint64_t{1} << diagonal;
      if (p.behind < 0) continue;
      const int before = own.below(static_cast<int>(i) + p.behind);
      rows[r] |= (uint64_t{1} << before) - 1;
      if (wanted[r] < before) wanted[r] = -1;
    }
    if (p.has_ids) look_at_ids(p, own, inside);
    if (p.has_bounds) look_at_bounds(p, own, inside, dots);
    any = __any_sync(kFullWarp, (rows[0] | rows[1] | rows[2] | rows[3]) != 0);
  }

 private:
  __device__ void look_at_ids(const SweepPairs& p, const Own<kCols>& own, int inside) {
    int64_t differ[4], same[4];
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int64_t i = int64_t{p.first_row} + min(own.row_of(r), p.rows - 1);
      differ[r] = p.differ_rows == nullptr ? -1 : p.differ_rows[i];
      same[r] = p.same_rows == nullptr ? -1 : p.same_rows[i];
    }
#pragma unroll 1
    for (int c = 0; c < inside; ++c) {
      const int64_t j = own.col_of(c);
      const int64_t other = p.differ_rows == nullptr ? -1 : p.differ_cols[j];
      const int64_t alike = p.same_rows == nullptr ? -1 : p.same_cols[j];
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < 4; ++r) {
        const bool equal = differ[r] == other && other != -1;
        const bool unlike = p.same_rows != nullptr && (same[r] != alike || alike == -1);
        if (equal || unlike) rows[r] |= uint64_t{1} << c;
      }
    }
  }

  // NaN exceeds no bound.
  __device__ void look_at_bounds(const SweepPairs& p, const Own<kCols>& own, int inside, float (&dots)[2][kCols / 2]) {
    float least[4], most[4];
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int64_t i = int64_t{p.first_row} + min(own.row_of(r), p.rows - 1);
      least[r] = p.above_rows == nullptr ? -__builtin_huge_valf() : p.above_rows[i];
      most[r] = p.below_rows == nullptr ? __builtin_huge_valf() : p.below_rows[i];
    }
    CONTRASTIVE_OPS_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int64_t j = own.col_of(c);
      const float low = p.above_cols == nullptr || c >= inside ? -__builtin_huge_valf() : p.above_cols[j];
      const float high = p.below_cols == nullptr || c >= inside ? __builtin_huge_valf() : p.below_cols[j];
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float dot = Own<kCols>::number(dots, r, c);
        if (dot < least[r] || dot < low || dot > most[r] || dot > high) rows[r] |= uint64_t{1} << c;
      }
    }
  }
};

// What no fold sees of a pair (i, j) and of (j, i); the second only of a matrix that is compared with itself.
template <int kCols, bool itself>
struct BothDrops {
  static constexpr int kColumns = Own<kCols>::kColumns;
  Drops<kCols> direct;
  uint64_t mirrored[4] = {}, targets[4] = {};  // and which of these have the row as the target of the column
  // For any lane of the warp; differ: what is left out of the two is not the same; has_targets: a row of the tile is
  // the target of one of its columns.
  bool any = false, differ = false, has_targets = false;

  // What is left out of (j, i) is found first, and waits in `memory` for the other.
  __device__ BothDrops(const Views<itself>& views, const Own<kCols>& own, const TilePlace& tile,
                       float (&dots)[2][kCols / 2], uint64_t (&memory)[4]) {
    if constexpr (!itself) {
      direct = Drops<kCols>(views.at[0], own, dots), any = direct.any;
    } else {
#pragma unroll 1
      for (int view = 1; view >= 0; --view) {  // a loop, so that rules are compiled once
        const Drops<kCols> found(views.at[view], own, dots);
        any |= found.any;
        CONTRASTIVE_OPS_UNROLL
        for (int r = 0; r < 4; ++r) {
          if (view == 1) memory[r] = found.rows[r];
        }
        direct = found;
      }
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < 4; ++r) mirrored[r] = memory[r];
      look_at_targets(views.at[0], own, tile);
      bool other = false;
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < 4; ++r) other |= mirrored[r] != direct.rows[r];
      differ = __any_sync(kFullWarp, other), any |= differ;
    }
  }

  __device__ bool has(int r, int c) const {
    if constexpr (itself) return direct.has(r, c) && (mirrored[r] >> c & 1);
    return direct.has(r, c);
  }
  // Whether a row is the target of a column behind it, of a tile that has such rows.
  static __device__ bool is_target_of(const SweepPairs& p, int row, int col) {
    return col < p.cols && row < p.rows && p.first_row + row < col && p.target[col] == p.first_row + row;
  }

 private:
  __device__ void look_at_targets(const SweepPairs& p, const Own<kCols>& own, const TilePlace& tile) {
    if (p.target == nullptr) return;
    const int64_t first = int64_t{p.first_row} + tile.row_tile * kRows;
    for (int c = static_cast<int>(threadIdx.x) % kWarp; c < kCols; c += kWarp) {
      const int col = tile.col_tile * kCols + c;
      const int64_t row = col < p.cols ? p.target[col] - first : -1;
      has_targets |= row >= 0 && row < kRows;
    }
    has_targets = __any_sync(kFullWarp, has_targets);
#pragma unroll 1
    for (int c = 0; has_targets && c < kColumns; ++c) {
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < 4; ++r) {
        const bool found = is_target_of(p, own.row_of(r), own.col_of(c));
        targets[r] |= uint64_t{found} << c, mirrored[r] |= uint64_t{found} << c;
      }
    }
  }
};

// Logits times `unit` in the place of inner products.
template <int kCols, class Left>
__device__ void make_logits(const SweepPairs& p, const Own<kCols>& own, const Left& drops, float unit,
                            float (&sums)[2][kCols / 2]) {
  constexpr int kColumns = Own<kCols>::kColumns;
  float factor[4], bias[4];
  CONTRASTIVE_OPS_UNROLL
  for (int r = 0; r < 4; ++r) factor[r] = unit * p.factor(own.row_of(r)), bias[r] = unit * p.bias(own.row_of(r));
  CONTRASTIVE_OPS_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) own.number(sums, r, c) = fmaf(own.number(sums, r, c), factor[r], bias[r]);
  }
  if (p.col_bias != nullptr) {
    CONTRASTIVE_OPS_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const float added = unit * p.bias_of_col(own.col_of(c));
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < 4; ++r) own.number(sums, r, c) += added;
    }
  }
  if (!drops.any) return;
  CONTRASTIVE_OPS_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      if (drops.has(r, c)) own.number(sums, r, c) = kNoLogit;
    }
  }
}

}  // namespace contrastive_ops::hopper
