// Folds and weights of plain calls: one set, one scale for all pairs or for each row, and at most the diagonal and the
// target left out.
//
// A fold reads 4 bytes per pair and a weight reads 4 and writes 2, at some 12 and 20 instructions: both are bound by
// memory as long as nothing else is done for each pair. So what belongs to a row is read once for a tile, into shared
// memory; a warp takes several rows at a time, which share the exchanges between lanes; and which columns are left out
// is asked once for a row, as a tile seldom has one of them.
#include "launch.h"
#include "similarity_chunk.h"
#include "similarity_plain.h"

namespace contrastive_ops {
namespace {

// Rows that a warp folds, and weighs, at a time; powers of two.
constexpr int kFoldRows = 4, kWeighRows = 2;

// What belongs to a row. l = factor * dot + bias.
struct alignas(16) Row {
  float factor, bias;
  int target, diagonal;  // columns that are left out; -1 or beyond M for none
};
// What arrives at it.
struct alignas(16) RowUpstream {
  float value, d_value, d_target;
  float gain;  // weight / (dtotal/dl)
};

__device__ inline Row row_of(const PairArguments& p, const PairSet& set, int i) {
  const PlainRow own(p, set, i);
  return {own.factor, own.bias, own.target, own.diagonal};
}

// Row r of as many as a warp takes at a time: its rows are kWarps apart.
__device__ inline int row_at(int first, int r) { return first + r * kWarps; }

// Folds `count` numbers of each lane over all lanes, a power of two of them: lane l gets the result of number l %
// count. It takes an exchange for half of the numbers, then for half of those, and so on; one for each would take
// `count` times as many.
template <int count, class Function>
__device__ float fold_warps(const float (&values)[count], int lane, const Function& function) {
  float left[count];
  CONTRASTIVE_OPS_UNROLL
  for (int r = 0; r < count; ++r) left[r] = values[r];
  CONTRASTIVE_OPS_UNROLL
  for (int step = 1; step < count; step *= 2) {
    const bool upper = (lane & step) != 0;
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < count; r += 2 * step) {
      const float mine = upper ? left[r + step] : left[r], other = upper ? left[r] : left[r + step];
      left[r] = function(mine, __shfl_xor_sync(kFullWarp, other, step));
    }
  }
  float result = left[0];
  CONTRASTIVE_OPS_UNROLL
  for (int step = count; step < kWarp; step *= 2) {
    result = function(result, __shfl_xor_sync(kFullWarp, result, step));
  }
  return result;
}

__device__ inline float add(float a, float b) { return a + b; }

// What is common to all threads of a block.
struct Block {
  Tile tile;
  int first_col;  // of the matrix
  bool whole;     // whether all columns of the tile are within the chunk

  __device__ explicit Block(const PairChunk& chunk)
      : tile(chunk),
        first_col(chunk.first_col + tile.across * kTileColumns),
        whole((tile.across + 1) * kTileColumns <= chunk.cols) {}

  __device__ bool has(int column) const { return static_cast<unsigned>(column - first_col) < unsigned{kTileColumns}; }
  // Whether columns have to be looked at one by one.
  __device__ bool is_plain(const Row& row) const { return whole && !has(row.target) && !has(row.diagonal); }

  // Inner products of the rows of a warp; rows beyond the tile are those of its last.
  template <int rows>
  __device__ void load(const PairChunk& chunk, int first, Columns (&dots)[rows]) const {
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < rows; ++r) tile.load(chunk, chunk.dots, min(row_at(first, r), tile.last_row - 1), dots[r]);
  }
};

// What was read ahead, while the rows before were worked on.
template <int rows>
__device__ void take(const Columns (&ahead)[rows], Columns (&now)[rows]) {
  CONTRASTIVE_OPS_UNROLL
  for (int r = 0; r < rows; ++r) {
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kColumns; ++k) now[r][k] = ahead[r][k];
  }
}

// ---- Folds ----------------------------------------------------------------------------------------------------------

template <FoldKind kind>
__global__ void __launch_bounds__(kThreads, 2)
    fold_plain_kernel(const __grid_constant__ PairArguments p, const int set, const bool along_rows,
                      const bool along_cols, const PairChunk chunk, Part* row_parts, Part* col_parts) {
  const Block block(chunk);
  const Tile& tile = block.tile;
  Part* shared = shared_memory<Part>();
  Row* rows = reinterpret_cast<Row*>(shared + (along_cols ? kWarps * kTileColumns : 0));
  for (int at = threadIdx.x; at < tile.last_row - tile.first_row; at += kThreads) {
    rows[at] = row_of(p, p.sets[set], chunk.first_row + tile.first_row + at);
  }
  __syncthreads();
  // Of the columns. A maximum is never infinite: it is what logits, which may be, are compared with.
  Columns tops, sums;
  CONTRASTIVE_OPS_UNROLL
  for (int k = 0; k < kColumns; ++k) tops[k] = -kLargest, sums[k] = 0.0f;
  constexpr int step = kFoldRows * kWarps;
  Columns ahead[kFoldRows];
  block.load(chunk, tile.first_row + tile.warp, ahead);
  for (int first = tile.first_row + tile.warp; first < tile.last_row; first += step) {
    Columns z[kFoldRows];
    take(ahead, z);
    block.load(chunk, first + step, ahead);
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < kFoldRows; ++r) {
      const bool inside = row_at(first, r) < tile.last_row;
      const Row own = rows[inside ? row_at(first, r) - tile.first_row : 0];
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) z[r][k] = fmaf(z[r][k], own.factor, own.bias);
      if (inside && block.is_plain(own)) continue;
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        const int j = chunk.first_col + tile.column(k);
        if (!inside || tile.column(k) >= chunk.cols || j == own.target || j == own.diagonal) z[r][k] = -kInfinity;
      }
    }
    float top = 0.0f, row_sums[kFoldRows] = {};
    if constexpr (kind == FoldKind::logsumexp) {
      if (along_rows) {
        float row_tops[kFoldRows];
        CONTRASTIVE_OPS_UNROLL
        for (int r = 0; r < kFoldRows; ++r) {
          row_tops[r] = z[r][0];
          CONTRASTIVE_OPS_UNROLL
          for (int k = 1; k < kColumns; ++k) row_tops[r] = fmaxf(row_tops[r], z[r][k]);
        }
        top = fold_warps(row_tops, tile.lane, [](float a, float b) { return fmaxf(a, b); });
        CONTRASTIVE_OPS_UNROLL
        for (int r = 0; r < kFoldRows; ++r) {
          const float reference = finite_or_zero(__shfl_sync(kFullWarp, top, r));
          CONTRASTIVE_OPS_UNROLL
          for (int k = 0; k < kColumns; ++k) row_sums[r] += __expf(z[r][k] - reference);
        }
      }
      if (along_cols) {
        CONTRASTIVE_OPS_UNROLL
        for (int k = 0; k < kColumns; ++k) {
          float reference = tops[k];
          CONTRASTIVE_OPS_UNROLL
          for (int r = 0; r < kFoldRows; ++r) reference = fmaxf(reference, z[r][k]);
          reference = fminf(reference, kLargest);
          sums[k] *= __expf(tops[k] - reference);
          CONTRASTIVE_OPS_UNROLL
          for (int r = 0; r < kFoldRows; ++r) sums[k] += __expf(z[r][k] - reference);
          tops[k] = reference;
        }
      }
    } else {
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < kFoldRows; ++r) {
        CONTRASTIVE_OPS_UNROLL
        for (int k = 0; k < kColumns; ++k) {
          const float added = softplus(z[r][k]);  // 0 of -inf
          row_sums[r] += added, sums[k] += added;
        }
      }
    }
    if (!along_rows) continue;
    const float sum = fold_warps(row_sums, tile.lane, add);
    const int row = row_at(first, tile.lane);
    if (tile.lane < kFoldRows && row < tile.last_row) {
      row_parts[int64_t{tile.across} * chunk.rows + row] =
          kind == FoldKind::logsumexp ? Part{{top, sum}} : Part{{sum, 0.0f}};
    }
  }
  if (!along_cols) return;
  // Of every warp, one after another.
  CONTRASTIVE_OPS_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    const bool none = kind == FoldKind::logsumexp && sums[k] == 0.0f;
    shared[tile.warp * kTileColumns + tile.column(k) - tile.across * kTileColumns] =
        kind == FoldKind::logsumexp ? Part{{none ? 0.0f : tops[k], sums[k]}} : Part{{sums[k], 0.0f}};
  }
  __syncthreads();
  const int column = tile.across * kTileColumns + threadIdx.x;
  if (column >= chunk.cols) return;
  Part part = shared[threadIdx.x];
  for (int w = 1; w < kWarps; ++w) part = merged(kind, part, shared[w * kTileColumns + threadIdx.x]);
  col_parts[int64_t{tile.down} * chunk.cols + column] = part;
}

// ---- Weights --------------------------------------------------------------------------------------------------------

// What a kernel is made for: the kinds of the folds of rows and of columns, kNone where there is none, or kAny for
// kinds that are looked at when it runs. Integers, as nvcc cannot name a value that an enumeration does not list.
constexpr int kAny = -1, kNone = static_cast<int>(FoldKind::count);

// Where the parts of each sum begin; -1 for a sum that is not carried.
struct PlainSums {
  int64_t row_residual, row_bias, scale, col_residual, col_bias;
};

// Adds d_value(k) * dfold/dl to e[k] for the pairs of a lane; logits and values are times log2(e). No pair is tested
// for taking part: an exponential of -inf is 0.
template <int made_for, class Value, class Derivative>
__device__ void add_slopes(FoldKind told, const Columns& z, const Value& value, const Derivative& d_value, Columns& e) {
  const FoldKind kind = made_for == kAny ? told : static_cast<FoldKind>(made_for);
  if (kind == FoldKind::logsumexp) {
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kColumns; ++k) e[k] = fmaf(d_value(k), exp2f(z[k] - value(k)), e[k]);
  } else if (kind == FoldKind::sum_softplus) {
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kColumns; ++k) e[k] = fmaf(d_value(k), __fdividef(1.0f, 1.0f + exp2f(-z[k])), e[k]);
  } else if (kind != FoldKind::count) {
    const float least = slopes_begin_above(kind);
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kColumns; ++k) e[k] += z[k] > least ? d_value(k) : 0.0f;
  }
}

// The sum of products in which 0 times anything is 0.
__device__ inline float sum_of_products(const Columns& e, const Columns& dots) {
  float sum = 0.0f;
  CONTRASTIVE_OPS_UNROLL
  for (int k = 0; k < kColumns; ++k) sum = fmaf(e[k], dots[k], sum);
  if (!isnan(sum)) return sum;
  sum = 0.0f;
  CONTRASTIVE_OPS_UNROLL
  for (int k = 0; k < kColumns; ++k) sum += e[k] == 0.0f ? 0.0f : e[k] * dots[k];
  return sum;
}

__device__ inline float sum_of(const Columns& e) {
  float sum = 0.0f;
  CONTRASTIVE_OPS_UNROLL
  for (int k = 0; k < kColumns; ++k) sum += e[k];
  return sum;
}

template <class T, int row_kind, int col_kind>
__global__ void __launch_bounds__(kThreads, 2)
    weigh_plain_kernel(const __grid_constant__ PairArguments p, const __grid_constant__ Upstreams up,
                       const PlainFolds folds, const PairChunk chunk, const PlainSums sums, const float* norm,
                       T* weights, float* parts) {
  constexpr float kLog2E = 1.44269504f;
  const Block block(chunk);
  const Tile& tile = block.tile;
  const PairSet& set = p.sets[0];
  const float up_by = norm == nullptr ? 1.0f : *norm, down_by = 1.0f / up_by, sign = set.negate ? -1.0f : 1.0f;
  const bool sums_cols = sums.col_residual >= 0 || sums.col_bias >= 0;
  float* shared = shared_memory<float>();
  Row* rows = reinterpret_cast<Row*>(shared + (sums_cols ? kWarps * kTileColumns : 0));
  RowUpstream* arriving = reinterpret_cast<RowUpstream*>(rows + chunk.tile_rows);
  for (int at = threadIdx.x; at < tile.last_row - tile.first_row; at += kThreads) {
    const int i = chunk.first_row + tile.first_row + at;
    const Side side(p, up, folds.rows, i, true);
    const Row own = row_of(p, set, i);
    rows[at] = {own.factor * kLog2E, own.bias * kLog2E, own.target, own.diagonal};
    arriving[at] = {side.value * kLog2E, side.d_value, up.d_target ? up.d_target[i] : 0.0f, own.factor * up_by};
  }
  __syncthreads();
  const FoldKind of_rows = folds.rows < 0 ? FoldKind::count : p.folds[folds.rows].kind;
  const FoldKind of_cols = folds.cols < 0 ? FoldKind::count : p.folds[folds.cols].kind;
  Columns values = {}, d_values = {}, col_residuals = {}, col_biases = {};
  if (col_kind != kNone && folds.cols >= 0) {
    const Upstream& from = up.folds[folds.cols];
    int64_t columns[kColumns];
    // All loads are under way at once; what is beyond the chunk has no weight.
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kColumns; ++k) columns[k] = min(int64_t{chunk.first_col + tile.column(k)}, p.M - 1);
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kColumns; ++k) values[k] = from.value[columns[k]], d_values[k] = from.d_value[columns[k]];
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kColumns; ++k) values[k] = subtrahend(values[k]) * kLog2E;
  }
  constexpr int step = kWeighRows * kWarps;
  Columns ahead[kWeighRows];
  block.load(chunk, tile.first_row + tile.warp, ahead);
  for (int first = tile.first_row + tile.warp; first < tile.last_row; first += step) {
    Columns dots[kWeighRows];
    take(ahead, dots);
    block.load(chunk, first + step, ahead);
    float residuals[kWeighRows] = {}, biases[kWeighRows] = {}, scales[kWeighRows] = {};
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < kWeighRows; ++r) {
      const int row = row_at(first, r);
      if (row >= tile.last_row) break;
      const Row own = rows[row - tile.first_row];
      const RowUpstream at = arriving[row - tile.first_row];
      Columns z, e = {};
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) z[k] = fmaf(dots[r][k], own.factor, own.bias);
      add_slopes<row_kind>(of_rows, z, [&](int) { return at.value; }, [&](int) { return at.d_value; }, e);
      add_slopes<col_kind>(of_cols, z, [&](int k) { return values[k]; }, [&](int k) { return d_values[k]; }, e);
      if (!block.is_plain(own)) {
        CONTRASTIVE_OPS_UNROLL
        for (int k = 0; k < kColumns; ++k) {
          const int column = tile.column(k), j = chunk.first_col + column;
          if (column >= chunk.cols || j == own.diagonal) e[k] = 0.0f;
          if (column < chunk.cols && j == own.target) e[k] = at.d_target;
        }
      }
      if (sums.scale >= 0) scales[r] = sum_of_products(e, dots[r]);
      if (sums.row_bias >= 0) biases[r] = sum_of(e);
      if (sums.col_bias >= 0) {
        CONTRASTIVE_OPS_UNROLL
        for (int k = 0; k < kColumns; ++k) col_biases[k] += e[k];
      }
      if (weights == nullptr) continue;
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) e[k] *= at.gain;
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; k += kLoad) {
        round_and_store(e + k, weights + row * chunk.pitch + tile.column(k), tile.column(k) < chunk.cols);
      }
      if (sums.row_residual >= 0) residuals[r] = sum_of(e);
      if (sums.col_residual >= 0) {
        CONTRASTIVE_OPS_UNROLL
        for (int k = 0; k < kColumns; ++k) col_residuals[k] += e[k];
      }
    }
    const auto store = [&](int64_t begin, const float (&of_rows_of_lane)[kWeighRows], float factor) {
      if (begin < 0) return;
      const float sum = fold_warps(of_rows_of_lane, tile.lane, add);
      const int row = row_at(first, tile.lane);
      if (tile.lane < kWeighRows && row < tile.last_row) {
        parts[begin + int64_t{tile.across} * chunk.rows + row] = sum * factor;
      }
    };
    store(sums.row_residual, residuals, down_by);
    store(sums.row_bias, biases, sign);
    store(sums.scale, scales, sign);
  }
  const auto store = [&](int64_t begin, Columns& of_columns, float factor) {
    if (begin < 0) return;
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kColumns; ++k) of_columns[k] *= factor;
    store_column_sums(chunk, tile, of_columns, shared, parts + begin);
  };
  store(sums.col_residual, col_residuals, down_by);
  store(sums.col_bias, col_biases, sign);
}

}  // namespace

// ---- Host -----------------------------------------------------------------------------------------------------------

bool fold_plain(Stream stream, const PairArguments& p, int set, FoldKind kind, bool along_rows, bool along_cols,
                const PairChunk& chunk, Part* row_parts, Part* col_parts) {
  if (kind != FoldKind::logsumexp && kind != FoldKind::sum_softplus) return false;
  const auto kernel =
      kind == FoldKind::logsumexp ? fold_plain_kernel<FoldKind::logsumexp> : fold_plain_kernel<FoldKind::sum_softplus>;
  const size_t shared = sizeof(Row) * chunk.tile_rows + (along_cols ? sizeof(Part) * kWarps * kTileColumns : 0);
  launch(kernel, chunk.tiles(), kThreads, shared, stream, p, set, along_rows, along_cols, chunk, row_parts, col_parts);
  return true;
}

namespace {

PlainSums plain_sums(const Slots& slots, const PairChunk& chunk) {
  PlainSums sums{-1, -1, -1, -1, -1};
  int64_t begin = 0;
  for (int n = 0; n < slots.row_count; ++n, begin += int64_t{chunk.tiles_across()} * chunk.rows) {
    const SumOf what = slots.rows[n].what;
    (what == SumOf::residual ? sums.row_residual : what == SumOf::bias ? sums.row_bias : sums.scale) = begin;
  }
  for (int n = 0; n < slots.col_count; ++n, begin += int64_t{chunk.tiles_down()} * chunk.cols) {
    (slots.cols[n].what == SumOf::residual ? sums.col_residual : sums.col_bias) = begin;
  }
  return sums;
}

// The kernel for the folds of a call: those of the common losses are made for them.
template <class T>
auto weigh_kernel_of(int rows, int cols) {
  constexpr int lse = static_cast<int>(FoldKind::logsumexp), softplus = static_cast<int>(FoldKind::sum_softplus);
  if (rows == lse && cols == lse) return weigh_plain_kernel<T, lse, lse>;
  if (rows == lse && cols == kNone) return weigh_plain_kernel<T, lse, kNone>;
  if (rows == softplus && cols == kNone) return weigh_plain_kernel<T, softplus, kNone>;
  return weigh_plain_kernel<T, kAny, kAny>;
}

}  // namespace

void weigh_plain(Stream stream, const PairArguments& p, const Upstreams& up, const PlainFolds& folds,
                 const PairChunk& chunk, const Slots& slots, const float* norm, const Output& weights, float* parts) {
  const size_t of_rows = (sizeof(Row) + sizeof(RowUpstream)) * chunk.tile_rows;
  const size_t shared = of_rows + (slots.col_count > 0 ? sizeof(float) * kWarps * kTileColumns : 0);
  const auto kind_of = [&](int fold) { return fold < 0 ? kNone : static_cast<int>(p.folds[fold].kind); };
  with_type(weights.dtype, [&](auto type) {
    using T = decltype(type);
    launch(weigh_kernel_of<T>(kind_of(folds.rows), kind_of(folds.cols)), chunk.tiles(), kThreads, shared, stream, p, up,
           folds, chunk, plain_sums(slots, chunk), norm, static_cast<T*>(weights.data), parts);
  });
}

}  // namespace contrastive_ops
