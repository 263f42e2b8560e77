// See fold.h. A tile's logits become terms of sums in the registers that they are in: for logsumexp powers of two with
// one reference for the 32 rows of a warp, so that a pair takes one exponential for its row and its column together.
// That is exact as long as no logit lies too far below the largest; otherwise rows and columns are folded apart.
#include "fold.h"

#include "keep.h"
#include "rules.h"

namespace contrastive_ops {
namespace hopper {
namespace {

constexpr int kCols = 192, kStages = 4, kColumns = kCols / 4, kGroupWarps = kGroup / kWarp;
// Below the largest logit of a warp, times log2(e): beyond it powers of two would lose digits.
constexpr float kReach = 120.0f;

template <class T, bool itself>
struct alignas(1024) Shared {
  Stages<T, kCols, kStages> stages;
  Part cols[2][kGroupWarps][kCols];  // of each group
  // Of each thread's rows and columns: which pairs their folds do not see, where the two differ.
  uint64_t left_out[itself ? 2 * kGroup : 1][2][4];
};

struct FoldTask {
  FoldKind kind;
  bool of_cols;  // of a matrix that is compared with itself, whose one fold gets the parts of rows and of columns
  Part *row_parts, *col_parts;  // (tiles across, rows), (tiles down, cols); null for none
  float* target_logit;
  KeptLogits kept;
};

template <class T, bool itself>
struct FoldEpilogue {
  const Views<itself>& views;
  const SweepPairs& p;
  const FoldTask& task;
  Shared<T, itself>& shared;
  using Sums = float[2][kCols / 2];
  using Both = BothDrops<kCols, itself>;

  __device__ void operator()(Sums& sums, const TilePlace& tile, int group) const {
    const Own<kCols> own(tile);
    multiply_factors(p, own, sums);
    const Both drops(views, own, tile, sums, left_out(group)[1]);
    make_logits(sums, own, drops);
    const bool differ = itself && drops.differ;
    if (differ) {
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < 4; ++r) {
        left_out(group)[task.of_cols][r] = drops.direct.rows[r];
        left_out(group)[!task.of_cols][r] = drops.mirrored[r];
      }
    }
    float low = kInfinity;
    const float reference = task.kind == FoldKind::logsumexp ? common_reference(sums, low) : kInfinity;
    if constexpr (!itself) {
      if (task.kept.logits != nullptr) keep_logits(p, task.kept, own, tile, sums, reference, low);
    }
    if (reference < kInfinity) {
      CONTRASTIVE_OPS_UNROLL
      for (int m = 0; m < 2; ++m) {
        CONTRASTIVE_OPS_UNROLL
        for (int k = 0; k < kCols / 2; ++k) sums[m][k] = fast_exp2(sums[m][k] - reference);
      }
      const float top = reference * kLn2;
      if (differ) {
        add_up<itself>(sums, own, tile, group, top);
      } else {
        add_up<false>(sums, own, tile, group, top);
      }
    } else {
      fold_apart(sums, own, tile, group, differ);
    }
    join_columns(tile, group);
  }
  __device__ void finish() const {}

 private:
  // The largest logit of a warp, 0 where there is no pair; infinity where it is none for all of them.
  __device__ float common_reference(const Sums& sums, float& low) const {
    float top = -kInfinity;
    CONTRASTIVE_OPS_UNROLL
    for (int m = 0; m < 2; ++m) {
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kCols / 2; ++k) {
        top = fmaxf(top, sums[m][k]);
        low = fminf(low, sums[m][k] == -kInfinity ? kInfinity : sums[m][k]);
      }
    }
    top = fold_warp(top, [](float a, float b) { return fmaxf(a, b); });
    low = fold_warp(low, [](float a, float b) { return fminf(a, b); });
    if (top == -kInfinity) return 0.0f;
    return top - low <= kReach ? top : kInfinity;
  }

  // Logits in the place of inner products, -inf for what is left out; for logsumexp times log2(e).
  __device__ void make_logits(Sums& sums, const Own<kCols>& own, const Both& drops) const {
    const float unit = task.kind == FoldKind::logsumexp ? kLog2E : 1.0f;
    if (drops.any && task.target_logit != nullptr) write_targets(sums, own, drops);
    hopper::make_logits(p, own, drops, unit, sums);
  }

  __device__ void write_targets(Sums& sums, const Own<kCols>& own, const Both& both) const {
    const Drops<kCols>& drops = both.direct;
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const float dot = drops.target_dot(sums, r);
      if (drops.wanted[r] < 0) continue;
      const int row = own.row_of(r);
      const float bias = p.bias(row) + p.bias_of_col(own.col_of(drops.wanted[r]));
      task.target_logit[int64_t{p.first_row} + row] = fmaf(dot, p.factor(row), bias);
    }
    if constexpr (itself) {
      if (!both.has_targets) return;
      CONTRASTIVE_OPS_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        CONTRASTIVE_OPS_UNROLL
        for (int r = 0; r < 4; ++r) {
          const int row = own.row_of(r), col = own.col_of(c);
          if (Both::is_target_of(p, row, col)) task.target_logit[col] = own.number(sums, r, c) * p.factor(row);
        }
      }
    }
  }

  // Of a thread: what the folds of its rows do not see, and those of its columns.
  __device__ uint64_t (&left_out(int group) const)[2][4] {
    return shared.left_out[itself ? group * kGroup + threadIdx.x % kGroup : 0];
  }

  __device__ void write_row(const TilePlace& tile, int row, const Part& part) const {
    if (threadIdx.x % 4 == 0 && row < p.rows) task.row_parts[int64_t{tile.col_tile} * p.rows + row] = part;
  }
  __device__ Part* cols_of_warp(int group) const { return shared.cols[group][threadIdx.x % kGroup / kWarp]; }

  // Sums of powers of two, which stand in the place of inner products.
  template <bool differ>
  __device__ void add_up(Sums& sums, const Own<kCols>& own, const TilePlace& tile, int group, float top) const {
    // Of a row or a column: both views of a pair have one logit.
    const auto power = [&](bool of_col, int r, int c) {
      return differ && (left_out(group)[of_col][r] >> c & 1) ? 0.0f : own.number(sums, r, c);
    };
    const auto part_of = [&](float sum) { return Part{{sum == 0.0f ? 0.0f : top, sum}}; };
    if (task.row_parts != nullptr) {
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < 4; ++r) {
        float sum = 0.0f;
        CONTRASTIVE_OPS_UNROLL
        for (int c = 0; c < kColumns; ++c) sum += power(false, r, c);
        write_row(tile, own.row_of(r), part_of(fold_row_lanes(sum, sum_of)));
      }
    }
    if (task.col_parts == nullptr) return;
    Part* to = cols_of_warp(group) + threadIdx.x % 4 * 2;
    CONTRASTIVE_OPS_UNROLL
    for (int begin = 0; begin < kColumns; begin += kShared) {
      float values[kShared];
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kShared; ++k) {
        values[k] = (power(true, 0, begin + k) + power(true, 1, begin + k)) +
                    (power(true, 2, begin + k) + power(true, 3, begin + k));
      }
      const int first = add_columns(values);
      CONTRASTIVE_OPS_UNROLL
      for (int q = 0; q < 2; ++q) to[(begin + first) / 2 * 8 + q] = part_of(values[q]);
    }
  }

  // What is in memory of the thread.
  struct Apart {
    float logits[4][kColumns];
    bool differ;
  };

  // Every row and every column by itself, whichever kind.
  __device__ void fold_apart(Sums& sums, const Own<kCols>& own, const TilePlace& tile, int group, bool differ) const {
    const float unit = task.kind == FoldKind::logsumexp ? kLn2 : 1.0f;
    Apart apart;
    apart.differ = differ;
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      CONTRASTIVE_OPS_UNROLL
      for (int c = 0; c < kColumns; ++c) apart.logits[r][c] = own.number(sums, r, c) * unit;
    }
    switch (task.kind) {
      case FoldKind::logsumexp:
        return fold_one_by_one<FoldKind::logsumexp>(apart, own, tile, group);
      case FoldKind::max:
        return fold_one_by_one<FoldKind::max>(apart, own, tile, group);
      case FoldKind::sum_softplus:
        return fold_one_by_one<FoldKind::sum_softplus>(apart, own, tile, group);
      case FoldKind::sum_relu:
        return fold_one_by_one<FoldKind::sum_relu>(apart, own, tile, group);
      case FoldKind::sum:
        return fold_one_by_one<FoldKind::sum>(apart, own, tile, group);
      default:
        return fold_one_by_one<FoldKind::count>(apart, own, tile, group);
    }
  }

  template <FoldKind kind>
  __device__ void fold_one_by_one(const Apart& apart, const Own<kCols>& own, const TilePlace& tile, int group) const {
    const auto logit = [&](bool of_col, int r, int c) {
      const bool out = itself && apart.differ && (left_out(group)[of_col][r] >> c & 1);
      return out ? -kInfinity : apart.logits[r][c];
    };
    // With those of the lanes whose number differs in bits `from` to `to`.
    const auto with_lanes = [](Part part, int from, int to) {
#pragma unroll 1
      for (int step = from; step < to; step *= 2) {
        const Part other{{__shfl_xor_sync(kFullWarp, part.at[0], step), __shfl_xor_sync(kFullWarp, part.at[1], step)}};
        part = merged(kind, part, other);
      }
      return part;
    };
    Running<kind> running;
#pragma unroll 1
    for (int r = 0; task.row_parts != nullptr && r < 4; ++r) {
      running.start();
#pragma unroll 1
      for (int c = 0; c < kColumns; ++c) running.add(logit(false, r, c), own.col_of(c));
      write_row(tile, own.row_of(r), with_lanes(running.part(), 1, 4));
    }
    Part* to = cols_of_warp(group) + threadIdx.x % 4 * 2;
#pragma unroll 1
    for (int c = 0; task.col_parts != nullptr && c < kColumns; ++c) {
      running.start();
#pragma unroll 1
      for (int r = 0; r < 4; ++r) running.add(logit(true, r, c), p.first_row + own.row_of(r));
      const Part part = with_lanes(running.part(), 4, kWarp);
      if (threadIdx.x % kWarp < 4) to[c / 2 * 8 + c % 2] = part;
    }
  }

  // One part for each column, of the four warps one after another. Those of the tile before have been read: every
  // thread of the group was at the barrier of its turn since.
  __device__ void join_columns(const TilePlace& tile, int group) const {
    if (task.col_parts == nullptr) return;
    named_sync(kGroups + group, kGroup);
    for (int c = static_cast<int>(threadIdx.x) % kGroup; c < kCols; c += kGroup) {
      const int col = tile.col_tile * kCols + c;
      if (col >= p.cols) break;
      Part part = shared.cols[group][0][c];
      for (int warp = 1; warp < kGroupWarps; ++warp) part = merged(task.kind, part, shared.cols[group][warp][c]);
      task.col_parts[int64_t{tile.row_tile} * p.cols + col] = part;
    }
  }
};

template <class T, bool itself>
__global__ void __launch_bounds__(kBlockThreads, 1)
    fold_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
                const __grid_constant__ Views<itself> views, const __grid_constant__ FoldTask task, const Plan plan) {
#ifdef CONTRASTIVE_OPS_HAS_HOPPER
  auto& shared = shared_tiles<Shared<T, itself>>();
  sweep<T, kCols, kStages>(&x, &y, plan, shared.stages, FoldEpilogue<T, itself>{views, views.at[0], task, shared});
#endif
}

// Adds the parts of all tiles to a state, tile after tile; one thread for each row and each column.
__global__ void merge_parts_kernel(FoldKind kind, const Part* parts, const Plan plan, bool cols, int64_t count,
                                   State* state) {
  const int64_t place = int64_t{blockIdx.x} * kGroup + threadIdx.x;
  if (place >= count) return;
  State total = state[place];
  const Span tiles(plan, cols, static_cast<int>(place));
  for (int t = tiles.begin; t < tiles.end; ++t) merge_into(total, kind, parts[t * count + place]);
  state[place] = total;
}

// Of folds of one kind: that of rows and that of columns, -1 for none.
struct Pass {
  int rows, cols;
};

// The first folds that are not done yet; one of them where rows and columns are both needed for each.
Pass next_pass(const PairArguments& p, bool itself, bool (&done)[kMostFolds]) {
  Pass pass{-1, -1};
  int first = -1;
  for (int f = 0; f < p.fold_count; ++f) {
    if (done[f] || (first >= 0 && p.folds[f].kind != p.folds[first].kind)) continue;
    int& own = p.folds[f].cols ? pass.cols : pass.rows;
    if (own >= 0 || (itself && first >= 0)) continue;
    own = f, done[f] = true;
    if (first < 0) first = f;
  }
  return pass;
}

}  // namespace
}  // namespace hopper

void hopper_fold(Stream stream, Input x, Input y, int64_t D, int64_t first_row, int64_t rows, Arrays pair_data,
                 Integers spec, const float* scale, const float* row_bias, const float* col_bias, const int64_t* target,
                 int64_t N, int64_t M, int64_t itself, float* parts, float* target_logit, double* state, Output logits,
                 float* heads, int64_t* wide) {
  using namespace hopper;
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, target, N, M);
  const SweepPairs pairs = sweep_pairs(p, first_row, rows);
  const Views<true> views = itself ? both_views(p, pairs) : Views<true>{};
  if (rows == 0 || M == 0 || p.fold_count == 0) return;
  const Plan plan(rows, M, D, kCols, itself ? first_row : -1);
  bool done[kMostFolds] = {};
  const auto state_of = [&](int fold) {
    auto* begin = reinterpret_cast<State*>(state);
    for (int f = 0; f < fold; ++f) begin += p.folds[f].cols ? M : N;
    return begin;
  };
  const auto next = [&] { return next_pass(p, itself != 0, done); };
  for (Pass pass = next(); pass.rows >= 0 || pass.cols >= 0; pass = next()) {
    FoldTask task{};
    const int any = pass.rows >= 0 ? pass.rows : pass.cols;
    task.kind = p.folds[any].kind, task.of_cols = p.folds[any].cols;
    if (itself) pass = {any, any};
    task.row_parts = pass.rows < 0 ? nullptr : reinterpret_cast<Part*>(parts);
    task.col_parts = pass.cols < 0 ? nullptr : reinterpret_cast<Part*>(parts) + plan.col_tiles * rows;
    task.target_logit = target_logit;
    if (logits.data != nullptr) {
      if (task.kind != FoldKind::logsumexp || itself || pairs.row_bias || pairs.col_bias) {
        throw std::invalid_argument("logits: those are kept of logsumexp of two matrices without biases");
      }
      task.kept = {logits.as<uint16_t>(), reinterpret_cast<Part*>(heads), wide, ceil_divide(M, 8) * 8, plan.col_tiles};
    }
    const auto run = [&](auto type) {
      using T = decltype(type);
      if constexpr (sizeof(T) == 2) {
        const TensorMap of_x = tensor_map(x.as<T>() + first_row * D, x.dtype, rows, D, D, kRows);
        const TensorMap of_y = tensor_map(y.data, y.dtype, M, D, D, kCols / kCluster);
        const size_t bytes = itself ? sizeof(Shared<T, true>) : sizeof(Shared<T, false>);
        const auto start = [&](auto kernel, const auto& given) {
          launch_clusters(kernel, plan.tiles(), kBlockThreads, bytes, stream, of_x, of_y, given, task, plan);
        };
        if (itself) {
          start(fold_kernel<T, true>, views);
        } else {
          start(fold_kernel<T, false>, Views<false>{{pairs}});
        }
      } else {
        throw std::invalid_argument("x: it must be of 16 bits");
      }
    };
    with_type(x.dtype, run);
    const auto merge = [&](const Part* from, bool cols, int64_t count, State* to) {
      launch(merge_parts_kernel, ceil_divide(count, kGroup), kGroup, 0, stream, task.kind, from, plan, cols, count, to);
    };
    if (pass.rows >= 0) merge(task.row_parts, false, rows, state_of(pass.rows) + first_row);
    if (pass.cols >= 0) merge(task.col_parts, true, M, state_of(pass.cols));
  }
}

}  // namespace contrastive_ops
