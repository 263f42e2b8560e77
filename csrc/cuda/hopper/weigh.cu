// See weigh.h. Two pairs at a time become a word of two weights, which goes to shared memory by blocks of 8 x 8 and
// from there to the matrix while the next tile is multiplied. What rounding takes is summed on the way, as
// docs/design.md says.
#include "weigh.h"

#include "weights.h"

namespace contrastive_ops {
namespace hopper {
namespace {

constexpr int kCols = 128, kStages = 4, kGroupWarps = kGroup / kWarp;
constexpr int kPanels = kCols / kDepth;  // a store takes 64 columns

template <class T>
struct alignas(1024) Shared {
  Stages<T, kCols, kStages> stages;
  alignas(1024) T weights[2][kPanels][kRows * kDepth];  // of each group
  float value[2][kCols], gain[2][kCols], bias[2][kCols], unit[2][kCols], inverse[2][kCols];
  float residuals[2][kGroupWarps][kCols];
};

// log2(1 + t) for t from 0 to 1, with as many digits where it is small.
__device__ inline float log2_of_1_plus(float t) {
  return t < 0.015625f ? kLog2E * t * fmaf(t, fmaf(t, 1.0f / 3.0f, -0.5f), 1.0f) : fast_log2(1.0f + t);
}

// What belongs to the four rows of a thread; logits and values are times log2(e).
struct Rows {
  float factor[4], bias[4], value[4], gain[4], target[4], unit[4], inverse[4];
  float residual[4] = {}, slope[4] = {}, scale[4] = {}, loss[4] = {};
};

template <class T, Slopes slopes, bool itself>
struct WeighEpilogue {
  const TensorMap* map;
  const Views<itself>& views;
  const SweepPairs& p;
  const WeighTask& task;
  Shared<T>& shared;
  using Sums = float[2][kCols / 2];
  using Both = BothDrops<kCols, itself>;

  __device__ void operator()(Sums& sums, const TilePlace& tile, int group) const {
    const Own<kCols> own(tile);
    const int thread = static_cast<int>(threadIdx.x) % kGroup;
    if (thread == 0) store_wait_read();  // of the weights of the tile before
    read_columns(tile, group, thread);
    multiply_factors(p, own, sums);
    uint64_t memory[4];
    const Both drops(views, own, tile, sums, memory);
    Rows rows;
    read_rows(sums, own, drops.direct, rows);
    named_sync(kGroups + group, kGroup);
    weigh(sums, own, drops, rows, group, thread);
    write_rows(tile, own, rows);
    fence_async();
    named_sync(kGroups + group, kGroup);
    if (thread == 0 && task.stores) {
      CONTRASTIVE_OPS_UNROLL
      for (int panel = 0; panel < kPanels; ++panel) {
        const int col = tile.col_tile * kCols + panel * kDepth - task.first_col;
        store_tile(map, shared.weights[group][panel], col, tile.row_tile * kRows);
      }
      store_commit();
    }
    join_columns(tile, group, thread);
  }
  __device__ void finish() const {
    if (threadIdx.x % kGroup == 0) store_wait();
  }

 private:
  __device__ void read_columns(const TilePlace& tile, int group, int thread) const {
    for (int c = thread; c < kCols; c += kGroup) {
      const int col = tile.col_tile * kCols + c;
      const bool arrives = task.col_gain != nullptr && col < p.cols;
      shared.value[group][c] = arrives ? kLog2E * subtrahend(task.col_value[col]) : kInfinity;
      shared.gain[group][c] = arrives ? task.col_gain[col] : 0.0f;
      shared.bias[group][c] = kLog2E * p.bias_of_col(col);
      shared.unit[group][c] = p.unit_of_col(col);
      shared.inverse[group][c] = fast_inverse(shared.unit[group][c]);
    }
  }

  __device__ void read_rows(Sums& sums, const Own<kCols>& own, const Drops<kCols>& drops, Rows& rows) const {
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = own.row_of(r);
      const int64_t i = int64_t{p.first_row} + min(row, p.rows - 1);
      rows.factor[r] = kLog2E * p.factor(row), rows.bias[r] = kLog2E * p.bias(row);
      rows.value[r] = task.row_value == nullptr ? kInfinity : kLog2E * subtrahend(task.row_value[i]);
      rows.gain[r] = task.row_gain == nullptr ? 0.0f : task.row_gain[i];
      rows.target[r] = task.d_target == nullptr ? 0.0f : task.d_target[i];
      rows.unit[r] = p.unit_of_row(row), rows.inverse[r] = fast_inverse(rows.unit[r]);
    }
    if constexpr (slopes == Slopes::sigmoid) {
      if (task.target_logit != nullptr && drops.any) read_targets(sums, own, drops, rows);
    }
  }

  // The targets' logits, and what their losses add to what arrives at them.
  __device__ void read_targets(Sums& sums, const Own<kCols>& own, const Drops<kCols>& drops, Rows& rows) const {
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const float dot = drops.target_dot(sums, r);
      if (drops.wanted[r] < 0) continue;
      const int row = own.row_of(r);
      const float z = fmaf(dot, p.factor(row), p.bias(row) + p.bias_of_col(own.col_of(drops.wanted[r])));
      task.target_logit[int64_t{p.first_row} + row] = z;
      rows.target[r] -= rows.gain[r] * sigmoid(-z);
    }
  }

  // dtotal/dl of a pair that takes part.
  __device__ float slope_of(float z, float value, float gain, float col_value, float col_gain, float& loss) const {
    if constexpr (slopes == Slopes::sigmoid) {
      const float power = fast_exp2(-fabsf(z)), inverse = fast_inverse(1.0f + power);
      loss += fmaxf(z, 0.0f) + log2_of_1_plus(power);
      return gain * (z < 0.0f ? power * inverse : inverse);
    }
    return fmaf(col_gain, fast_exp2(z - col_value), gain * fast_exp2(z - value));
  }

  // The same of a pair (i, j) and of (j, i), each of which may be left out or have a target.
  __device__ float slope_of_both(float z, const Rows& rows, const Both& drops, int r, int c, float col_value,
                                 float col_gain, int col) const {
    const auto left_out = [&](bool first) {
      return drops.any && (first != task.of_cols ? drops.direct.has(r, c) : drops.mirrored[r] >> c & 1);
    };
    const bool first = left_out(true), second = left_out(false);
    float e, unused = 0.0f;
    if constexpr (slopes == Slopes::sigmoid) {
      e = slope_of(z, 0.0f, (first ? 0.0f : rows.gain[r]) + (second ? 0.0f : col_gain), 0.0f, 0.0f, unused);
    } else {
      e = slope_of(z, first ? kInfinity : rows.value[r], rows.gain[r], second ? kInfinity : col_value, col_gain,
                   unused);
    }
    if (drops.any && c == drops.direct.wanted[r]) e += rows.target[r];
    if (drops.has_targets && (drops.targets[r] >> c & 1)) e += task.d_target == nullptr ? 0.0f : task.d_target[col];
    return e;
  }

  __device__ void weigh(Sums& sums, const Own<kCols>& own, const Both& drops, Rows& rows, int group, int thread) const {
    const int lane = thread % kWarp, warp = thread / kWarp;
    const float unit = kLn2 * (task.norm == nullptr ? 1.0f : *task.norm);
    float residuals[kShared];
    CONTRASTIVE_OPS_UNROLL
    for (int n = 0; n < kCols / 8; ++n) {
      CONTRASTIVE_OPS_UNROLL
      for (int q = 0; q < 2; ++q) residuals[n % 8 * 2 + q] = 0.0f;
      const int at = n * 8 + lane % 4 * 2;
      CONTRASTIVE_OPS_UNROLL
      for (int r = 0; r < 4; ++r) {
        float weights[2];
        CONTRASTIVE_OPS_UNROLL
        for (int q = 0; q < 2; ++q) {
          const int c = 2 * n + q;
          const float dot = own.number(sums, r, c);
          float z = fmaf(dot, rows.factor[r], rows.bias[r] + shared.bias[group][at + q]);
          if (drops.any && drops.has(r, c)) z = -kInfinity;
          const float value = shared.value[group][at + q], gain = shared.gain[group][at + q];
          float e;
          if constexpr (itself) {
            e = slope_of_both(z, rows, drops, r, c, value, gain, own.col_of(c));
          } else {
            e = slope_of(z, rows.value[r], rows.gain[r], value, gain, rows.loss[r]);
            if (drops.any && c == drops.direct.wanted[r]) e = rows.target[r];
          }
          rows.slope[r] += e;
          rows.scale[r] += e == 0.0f ? 0.0f : e * dot;
          weights[q] = e == 0.0f ? 0.0f : e * rows.factor[r] * unit;
        }
        const bool has_factors = p.row_factor != nullptr;
        if (has_factors) {
          CONTRASTIVE_OPS_UNROLL
          for (int q = 0; q < 2; ++q) weights[q] *= rows.unit[r] * shared.unit[group][at + q];
        }
        const uint32_t pair = rounded_pair<T>(weights[0], weights[1]);
        float rest[2] = {weights[0] - widened<T>(pair), weights[1] - widened<T>(pair >> 16)};
        if (has_factors) {
          CONTRASTIVE_OPS_UNROLL
          for (int q = 0; q < 2; ++q) rest[q] *= rows.inverse[r] * shared.inverse[group][at + q];
        }
        rows.residual[r] += rest[0] + rest[1];
        residuals[n % 8 * 2] += rest[0], residuals[n % 8 * 2 + 1] += rest[1];
        own.number(sums, r, 2 * n) = __uint_as_float(pair);
      }
      if (n % 2 == 1) write_weights(sums, n - 1, group, lane, warp);
      if (n % 8 == 7) {
        const int first = add_columns(residuals);
        float* to = shared.residuals[group][warp] + (n / 8 * 8 + first / 2) * 8 + lane % 4 * 2;
        to[0] = residuals[0], to[1] = residuals[1];
      }
    }
  }

  // Blocks n and n + 1 of 8 columns, for all rows of a warp.
  __device__ void write_weights(Sums& sums, int n, int group, int lane, int warp) const {
    T* panel = shared.weights[group][n / 8];
    CONTRASTIVE_OPS_UNROLL
    for (int m = 0; m < 2; ++m) {
      const int row = m * 64 + warp * 16 + lane % 16, chunk = (n % 8 + lane / 16) ^ (row % 8);
      const auto word = [&](int h, int block) { return __float_as_uint(sums[m][block * 4 + h * 2]); };
      store_matrices(panel + row * kDepth + chunk * 8, word(0, n), word(1, n), word(0, n + 1), word(1, n + 1));
    }
  }

  __device__ void write_rows(const TilePlace& tile, const Own<kCols>& own, const Rows& rows) const {
    const float down = task.norm == nullptr ? 1.0f : inverse_of_power(*task.norm);
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = own.row_of(r);
      const auto write = [&](float* parts, float sum, float unit) {
        sum = unit * fold_row_lanes(sum, sum_of);
        if (threadIdx.x % 4 == 0 && row < p.rows) parts[int64_t{tile.col_tile} * p.rows + row] = sum;
      };
      if (task.row_residuals != nullptr) write(task.row_residuals, rows.residual[r], down);
      if (task.row_bias != nullptr) write(task.row_bias, rows.slope[r], p.sign);
      if (task.scale != nullptr) write(task.scale, rows.scale[r], p.sign);
      if (task.losses != nullptr) write(task.losses, rows.loss[r], kLn2);
    }
  }

  // What the four warps found, one after another.
  __device__ void join_columns(const TilePlace& tile, int group, int thread) const {
    if (task.col_residuals == nullptr) return;
    const float down = task.norm == nullptr ? 1.0f : inverse_of_power(*task.norm);
    for (int c = thread; c < kCols; c += kGroup) {
      const int col = tile.col_tile * kCols + c;
      if (col >= p.cols) break;
      float sum = 0.0f;
      for (int warp = 0; warp < kGroupWarps; ++warp) sum += shared.residuals[group][warp][c];
      task.col_residuals[int64_t{tile.row_tile} * p.cols + col] = down * sum;
    }
  }
};

template <class T, Slopes slopes, bool itself>
__global__ void __launch_bounds__(kBlockThreads, 1)
    weigh_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
                 const __grid_constant__ TensorMap weights, const __grid_constant__ Views<itself> views,
                 const __grid_constant__ WeighTask task, const Guard guard, const Plan plan) {
#ifdef CONTRASTIVE_OPS_HAS_HOPPER
  if (guard.off()) return;
  auto& shared = shared_tiles<Shared<T>>();
  const WeighEpilogue<T, slopes, itself> epilogue{&weights, views, views.at[0], task, shared};
  sweep<T, kCols, kStages>(&x, &y, plan, shared.stages, epilogue);
#endif
}

// Of a matrix that is compared with itself, whose folds have one direction: what a row has it has as a column, too.
void mirror_folds(bool has_losses, int64_t first_row, WeighTask& task) {
  if ((task.row_gain != nullptr && task.col_gain != nullptr) || has_losses || first_row % kCols != 0) {
    throw std::invalid_argument("itself: folds must have one direction, no losses, and bands whole tiles");
  }
  task.of_cols = task.col_gain != nullptr;
  (task.of_cols ? task.row_gain : task.col_gain) = task.of_cols ? task.col_gain : task.row_gain;
  (task.of_cols ? task.row_value : task.col_value) = task.of_cols ? task.col_value : task.row_value;
  task.first_col = static_cast<int>(first_row);
}

}  // namespace
}  // namespace hopper

void hopper_weigh(Stream stream, Input x, Input y, int64_t D, int64_t first_row, int64_t rows, Arrays pair_data,
                  Integers spec, const float* scale, const float* row_bias, const float* col_bias,
                  const int64_t* target, int64_t N, int64_t M, int64_t itself, const float* values,
                  const float* d_values, const float* d_target, const float* norm, const int64_t* wide, Output weights,
                  Integers sums, float* parts, float* target_logit, double* totals, double* state) {
  using namespace hopper;
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, target, N, M);
  const SweepPairs pairs = sweep_pairs(p, first_row, rows);
  const Views<true> views = itself ? both_views(p, pairs) : Views<true>{};
  WeighTask task{};
  const Slopes slopes = read_folds(p, values, d_values, state != nullptr, task);
  if (itself) mirror_folds(state != nullptr, first_row, task);
  task.d_target = d_target, task.norm = norm, task.target_logit = target_logit, task.stores = weights.data != nullptr;
  if (rows == 0 || M == 0) return;
  const Plan plan(rows, M, D, kCols, itself ? first_row : -1);
  const Guard guard{wide, plan.row_pairs, true};
  TileSums found(plan, first_row, rows, M, parts);
  found.take(sums, totals, itself != 0, task);
  if (state != nullptr) task.losses = found.take(false, state, 2);
  const auto run = [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      const TensorMap of_x = tensor_map(x.as<T>() + first_row * D, x.dtype, rows, D, D, kRows);
      const TensorMap of_y = tensor_map(y.data, y.dtype, M, D, D, kCols / kCluster);
      const int64_t cols = M - task.first_col, pitch = ceil_divide(M, 8) * 8;
      const TensorMap to = task.stores ? tensor_map(weights.data, x.dtype, rows, cols, pitch, kRows) : of_x;
      const bool sigmoid = slopes == Slopes::sigmoid;
      const auto start = [&](auto kernel, const auto& given) {
        launch_clusters(kernel, plan.tiles(), kBlockThreads, sizeof(Shared<T>), stream, of_x, of_y, to, given, task,
                        guard, plan);
      };
      if (itself) {
        start(sigmoid ? weigh_kernel<T, Slopes::sigmoid, true> : weigh_kernel<T, Slopes::softmax, true>, views);
      } else {
        const auto kernel = sigmoid ? weigh_kernel<T, Slopes::sigmoid, false> : weigh_kernel<T, Slopes::softmax, false>;
        start(kernel, Views<false>{{pairs}});
      }
    } else {
      throw std::invalid_argument("x: it must be of 16 bits");
    }
  };
  with_type(x.dtype, run);
  found.add(stream, guard);
}

}  // namespace contrastive_ops
