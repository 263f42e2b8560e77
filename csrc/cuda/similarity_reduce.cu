// similarity_reduce on a GPU: folds of chunks of inner products. Gradients are in similarity_gradients.cu.
//
// A fold reads each inner product once, where the library has left it, and folds rows and columns at once: 4 bytes and
// two exponentials per pair, which an H100 can do in about a fifth of the time of the 2 D operations before it at D of
// 1024. Folds of several kinds or sets read a chunk once each.
#include "similarity_reduce.h"

#include "launch.h"
#include "similarity_chunk.h"
#include "similarity_folds.h"
#include "similarity_pairs.h"
#include "similarity_plain.h"

namespace contrastive_ops {
namespace {

// One kind of fold of one set along the rows of a chunk, along its columns, or along both.
struct Pass {
  int set;
  FoldKind kind;
  bool along_rows, along_cols;
  bool rows_mirrored;  // with itself: rows take mirrored pairs and columns direct ones, not the other way around
};

// ---- Folding a tile -------------------------------------------------------------------------------------------------

// The logits of two views of the pairs of a row of a tile, as folds see them, one pair after another. Without itself
// the second view is the first.
template <Path path>
struct Views {
  const PairArguments& p;
  const PairSet& set;
  const PairChunk& chunk;
  int targets[path == Path::plain_itself ? kColumns : 1];  // of the columns, as rows

  __device__ Views(const PairArguments& arguments, const PairSet& own, const PairChunk& rectangle, const Tile& tile)
      : p(arguments), set(own), chunk(rectangle), targets{} {
    if constexpr (path == Path::plain_itself) {
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        const int column = tile.column(k);
        targets[k] = column < chunk.cols ? target_of(p, chunk.first_col + column) : -1;
      }
    }
  }

  // For pair k of the row: `use(k, direct, mirrored)`.
  template <class Use>
  __device__ void each(const Tile& tile, int row, const Columns& dots, const Columns& guide, const Use& use) const {
    const int i = chunk.first_row + row;
    if constexpr (path == Path::general) {
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        const int j = chunk.first_col + tile.column(k);
        const bool inside = tile.column(k) < chunk.cols;
        float views[2] = {-kInfinity, -kInfinity};
        // A loop, so that the rules are compiled once for both.
        for (int mirrored = 0; mirrored < 1 + chunk.itself; ++mirrored) {
          if (!inside || (chunk.itself && j < i + mirrored)) continue;
          const float z = shown_logit(p, set, dots[k], guide[k], mirrored ? j : i, mirrored ? i : j);
          views[0] = mirrored ? views[0] : z, views[1] = mirrored ? z : views[1];
        }
        use(k, views[0], chunk.itself ? views[1] : views[0]);
      }
    } else {
      const PlainRow own(p, set, i);
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        const int column = tile.column(k), j = chunk.first_col + column;
        const float logit = own.logit(dots[k]);
        const bool inside = column < chunk.cols;
        const bool other_leaves_out = targets[k] == i || (set.has_diagonal && j + set.diagonal == i);
        use(k, inside && j >= i && !own.leaves_out(j) ? logit : -kInfinity,
            inside && j > i && !other_leaves_out ? logit : -kInfinity);
      }
    }
  }
};

template <FoldKind kind, Path path>
__global__ void __launch_bounds__(kThreads, 2) fold_kernel(const __grid_constant__ PairArguments p, const Pass pass,
                                                           const PairChunk chunk, Part* row_parts, Part* col_parts) {
  const Tile tile(chunk);
  const bool empty = tile.below_diagonal(chunk);
  const Views<path> views(p, p.sets[pass.set], chunk, tile);
  Running<kind> running[kColumns];
  CONTRASTIVE_OPS_UNROLL
  for (int k = 0; k < kColumns; ++k) running[k].start();
  Columns guide = {};
  for (int row = tile.first_row + tile.warp; row < tile.last_row; row += kWarps) {
    Part part{};
    if (!empty) {
      const int i = chunk.first_row + row;
      Columns dots, along;
      tile.load(chunk, chunk.dots, row, dots);
      if (path == Path::general && chunk.guide) tile.load(chunk, chunk.guide, row, guide);
      views.each(tile, row, dots, guide, [&](int k, float direct, float mirrored) {
        along[k] = pass.rows_mirrored ? mirrored : direct;
        if (pass.along_cols) running[k].add(pass.rows_mirrored ? direct : mirrored, i);
      });
      if (pass.along_rows) {
        part = fold_row<kind>(along, [&](int k) { return chunk.first_col + tile.column(k); });
      }
    }
    if (pass.along_rows && tile.lane == 0) row_parts[int64_t{tile.across} * chunk.rows + row] = part;
  }
  if (!pass.along_cols) return;
  // Of every warp, one after another.
  Part* shared = shared_memory<Part>();
  CONTRASTIVE_OPS_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    shared[tile.warp * kTileColumns + tile.column(k) - tile.across * kTileColumns] = running[k].part();
  }
  __syncthreads();
  const int column = tile.across * kTileColumns + threadIdx.x;
  if (column >= chunk.cols) return;
  Part part = shared[threadIdx.x];
  for (int w = 1; w < kWarps; ++w) part = merged(kind, part, shared[w * kTileColumns + threadIdx.x]);
  col_parts[int64_t{tile.down} * chunk.cols + column] = part;
}

// Merges the parts of a chunk with what earlier chunks found, tile after tile; one thread per row and column.
__global__ void merge_kernel(const Pass pass, const PairChunk chunk, const Part* row_parts, const Part* col_parts,
                             State* row_state, State* col_state) {
  const OwnedPlaces own(chunk, int64_t{blockIdx.x} * kThreads + threadIdx.x);
  const auto merge = [&](const Part* parts, int tiles, int64_t stride, int place, State* state) {
    // Several loads are under way at a time; nothing merges with what is beyond.
    constexpr int kAtOnce = 8;
    State total = *state;
    Part next[kAtOnce];
    for (int t = 0; t < tiles; t += kAtOnce) {
      CONTRASTIVE_OPS_UNROLL
      for (int q = 0; q < kAtOnce; ++q) next[q] = t + q < tiles ? parts[(t + q) * stride + place] : Part{};
      CONTRASTIVE_OPS_UNROLL
      for (int q = 0; q < kAtOnce; ++q) merge_into(total, pass.kind, next[q]);
    }
    *state = total;
  };
  if (own.row >= 0 && pass.along_rows) {
    merge(row_parts, chunk.tiles_across(), chunk.rows, own.row, row_state + chunk.first_row + own.row);
  }
  if (own.col >= 0 && pass.along_cols) {
    merge(col_parts, chunk.tiles_down(), chunk.cols, own.col, col_state + chunk.first_col + own.col);
  }
}

__global__ void finish_kernel(const State* state, FoldKind kind, int64_t count, float* values, int64_t* argmax) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= count) return;
  values[at] = finished(kind, state[at]);
  if (argmax != nullptr) argmax[at] = int64_t{state[at].winner} - 1;
}

// ---- What rows name -------------------------------------------------------------------------------------------------

// One warp per row that may name a pair of the chunk: its own rows, or all that follow where pairs are read both ways.
__global__ void named_kernel(const __grid_constant__ PairArguments p, const PairChunk chunk, int64_t owners,
                             float* target_logit, double* linear) {
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (at >= owners) return;
  const int64_t owner = chunk.first_row + at;
  const PairSet& set = p.sets[0];
  if (target_logit != nullptr && lane == 0) {
    const int64_t j = p.target[owner], place = place_of(chunk, owner, j);
    if (place >= 0) target_logit[owner] = logit_of(p, set, chunk.dots[place], owner, j);
  }
  if (linear == nullptr) return;
  double sum = 0.0;  // a list may be millions long
  for (int64_t e = p.linear_indptr[owner] + lane; e < p.linear_indptr[owner + 1]; e += kWarp) {
    const int64_t j = p.linear_indices[e], place = place_of(chunk, owner, j);
    if (place >= 0) sum += p.linear_weight[e] * logit_of(p, set, chunk.dots[place], owner, j);
  }
  sum = fold_warp(sum, [](double a, double b) { return a + b; });
  if (lane == 0) linear[owner] += sum;
}

// ---- Host -----------------------------------------------------------------------------------------------------------

using FoldKernel = void (*)(PairArguments, Pass, PairChunk, Part*, Part*);

template <FoldKind kind>
FoldKernel kernel_of(Path path) {
  if constexpr (kind == FoldKind::logsumexp || kind == FoldKind::sum_softplus) {
    if (path == Path::plain_itself) return fold_kernel<kind, Path::plain_itself>;
  }
  return fold_kernel<kind, Path::general>;
}

FoldKernel kernel_of(FoldKind kind, Path path) {
  switch (kind) {
#define CONTRASTIVE_OPS_CASE(name) \
  case FoldKind::name:             \
    return kernel_of<FoldKind::name>(path);
    CONTRASTIVE_OPS_FOLDS(CONTRASTIVE_OPS_CASE)
#undef CONTRASTIVE_OPS_CASE
    default:
      return nullptr;
  }
}

// Where the results of a fold begin among those of all folds.
int64_t begin_of(const PairArguments& p, int fold) {
  int64_t begin = 0;
  for (int f = 0; f < fold; ++f) begin += p.folds[f].cols ? p.M : p.N;
  return begin;
}

}  // namespace

void similarity_reduce_fold(Stream stream, const float* dots, const float* guide, Integers chunk_numbers,
                            Arrays pair_data, Integers spec, const float* scale, const float* row_bias,
                            const float* col_bias, const int64_t* target, int64_t N, int64_t M, float* parts,
                            double* state) {
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, target, N, M);
  const PairChunk chunk = chunk_of(dots, guide, chunk_numbers);
  Part* row_parts = reinterpret_cast<Part*>(parts);
  Part* col_parts = row_parts + int64_t{chunk.tiles_across()} * chunk.rows;
  State* states = reinterpret_cast<State*>(state);
  bool done[kMostFolds] = {};
  for (int f = 0; f < p.fold_count; ++f) {
    if (done[f]) continue;
    const PairFold& fold = p.folds[f];
    Pass pass{fold.set, fold.kind, chunk.itself || !fold.cols, chunk.itself || fold.cols, fold.cols};
    int by_rows = f, by_cols = f;
    if (!chunk.itself) {
      // A fold of rows and one of columns share a pass; rows_mirrored has no meaning, as there is one view.
      pass.rows_mirrored = false;
      for (int g = f + 1; g < p.fold_count; ++g) {
        if (done[g] || p.folds[g].set != fold.set || p.folds[g].kind != fold.kind || p.folds[g].cols == fold.cols) {
          continue;
        }
        (fold.cols ? by_rows : by_cols) = g;
        pass.along_rows = pass.along_cols = done[g] = true;
        break;
      }
    }
    const Path path = !is_plain(p, p.sets[fold.set], chunk.itself) ? Path::general
                      : chunk.itself                               ? Path::plain_itself
                                                                   : Path::plain;
    const size_t shared = pass.along_cols ? sizeof(Part) * kWarps * kTileColumns : 0;
    if (path != Path::plain ||
        !fold_plain(stream, p, fold.set, fold.kind, pass.along_rows, pass.along_cols, chunk, row_parts, col_parts)) {
      launch(kernel_of(fold.kind, path), chunk.tiles(), kThreads, shared, stream, p, pass, chunk, row_parts, col_parts);
    }
    if (state == nullptr) continue;
    launch(merge_kernel, ceil_divide(int64_t{chunk.rows} + chunk.cols, kThreads), kThreads, 0, stream, pass, chunk,
           row_parts, col_parts, states + begin_of(p, by_rows), states + begin_of(p, by_cols));
  }
}

void similarity_reduce_finish(Stream stream, const double* state, int64_t kind, int64_t count, float* values,
                              int64_t* argmax) {
  launch(finish_kernel, ceil_divide(count, kThreads), kThreads, 0, stream, reinterpret_cast<const State*>(state),
         static_cast<FoldKind>(kind), count, values, argmax);
}

void similarity_reduce_named(Stream stream, const float* dots, Integers chunk_numbers, Arrays pair_data, Integers spec,
                             const float* scale, const float* row_bias, const float* col_bias, const int64_t* target,
                             int64_t N, int64_t M, float* target_logit, double* linear) {
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, target, N, M);
  const PairChunk chunk = chunk_of(dots, nullptr, chunk_numbers);
  const int64_t owners = chunk.itself ? N - chunk.first_row : chunk.rows;
  launch(named_kernel, ceil_divide(owners, kWarps), kThreads, 0, stream, p, chunk, owners, target_logit, linear);
}

}  // namespace contrastive_ops
