// See kept.h. A block has the rows and columns of a tile that was folded; a lane reads 8 neighbours of a row, so that
// eight lanes have 128 bytes of it, and four rows are on their way at once.
#include "kept.h"

#include "weights.h"

namespace contrastive_ops {
namespace hopper {
namespace {

constexpr int kCols = 192, kGroupWarps = kGroup / kWarp;
constexpr int kPiece = 8, kAcross = 8, kDown = kWarp / kAcross;  // of a lane; lanes of a row; rows at once
constexpr int kTurnsAcross = kCols / (kPiece * kAcross), kTurnsDown = kWarp / kDown;
constexpr uint16_t kLeftOut = 65535;
using Head = Pack<float, 2>;

struct Kept {
  const uint16_t* logits;  // (rows, pitch)
  const Head* heads;       // (row tiles, tiles across, warps)
  const float* target_logit;
  int64_t pitch;
};

// What belongs to a row; logits are times log2(e).
struct KeptRow {
  float factor, value, gain, unit, inverse, of_target, target_logit;
  int target;  // its column, or -1

  __device__ KeptRow(const SweepPairs& p, const WeighTask& task, const Kept& kept, int row) {
    const int64_t i = int64_t{p.first_row} + min(row, p.rows - 1);
    factor = kLog2E * p.factor(row);
    value = task.row_value == nullptr ? kInfinity : kLog2E * subtrahend(task.row_value[i]);
    gain = task.row_gain == nullptr ? 0.0f : task.row_gain[i];
    unit = p.unit_of_row(row), inverse = fast_inverse(factor);
    const int64_t column = p.target == nullptr ? -1 : p.target[i];
    target = column >= 0 && column < p.cols && row < p.rows ? static_cast<int>(column) : -1;
    of_target = target < 0 || task.d_target == nullptr ? 0.0f : task.d_target[i];
    target_logit = target < 0 || kept.target_logit == nullptr ? 0.0f : kLog2E * kept.target_logit[i];
  }
};

template <class T>
__global__ void __launch_bounds__(kGroup)
    weigh_kept_kernel(const __grid_constant__ SweepPairs p, const __grid_constant__ WeighTask task,
                      const __grid_constant__ Kept kept, const Guard guard, int col_tiles, T* weights) {
  if (guard.off()) return;
  const int row_tile = static_cast<int>(blockIdx.x) / col_tiles, col_tile = static_cast<int>(blockIdx.x) % col_tiles;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Head head = kept.heads[int64_t{static_cast<int>(blockIdx.x)} * kGroupWarps + warp];
  const float up = task.norm == nullptr ? 1.0f : *task.norm, down = inverse_of_power(up);
  const auto row_of = [&](int turn) {
    const int of_warp = turn * kDown + lane / kAcross;
    return row_tile * kRows + of_warp / 16 * 64 + warp * 16 + of_warp % 16;
  };
  float residual[kTurnsDown] = {}, scale[kTurnsDown] = {};
  float* shared = shared_memory<float>();  // residuals of columns, of each warp
  for (int across = 0; across < kTurnsAcross; ++across) {
    const int in_tile = (across * kAcross + lane % kAcross) * kPiece, first = col_tile * kCols + in_tile;
    float value[kPiece], gain[kPiece], unit[kPiece], rests[kPiece] = {};
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kPiece; ++k) {
      const int col = first + k;
      const bool arrives = task.col_gain != nullptr && col < p.cols;
      value[k] = arrives ? kLog2E * subtrahend(task.col_value[col]) : kInfinity;
      gain[k] = arrives ? task.col_gain[col] : 0.0f;
      unit[k] = p.unit_of_col(col);
    }
    CONTRASTIVE_OPS_UNROLL
    for (int turn = 0; turn < kTurnsDown; ++turn) {
      const int row = row_of(turn);
      if (row >= p.rows || first >= kept.pitch) continue;
      const KeptRow own(p, task, kept, row);
      const int64_t at = row * kept.pitch + first;
      const auto read = *reinterpret_cast<const Pack<uint16_t, kPiece>*>(kept.logits + at);
      Pack<T, kPiece> written;
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kPiece; ++k) {
        float z = read.at[k] == kLeftOut ? -kInfinity : fmaf(-static_cast<float>(read.at[k]), head.at[1], head.at[0]);
        float e = fmaf(gain[k], fast_exp2(z - value[k]), own.gain * fast_exp2(z - own.value));
        if (first + k == own.target) z = own.target_logit, e = own.of_target;
        scale[turn] += e == 0.0f ? 0.0f : e * z * own.inverse;
        const float units = own.unit * unit[k], weight = e == 0.0f ? 0.0f : e * own.factor * kLn2 * up * units;
        written.at[k] = from_float<T>(weight);
        const float rest = (weight - to_float(written.at[k])) * fast_inverse(units);
        residual[turn] += rest, rests[k] += rest;
      }
      if (weights != nullptr) *reinterpret_cast<Pack<T, kPiece>*>(weights + at) = written;
    }
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < kPiece; ++k) {
      rests[k] += __shfl_xor_sync(kFullWarp, rests[k], kAcross);
      rests[k] += __shfl_xor_sync(kFullWarp, rests[k], 2 * kAcross);
      if (lane < kAcross) shared[warp * kCols + in_tile + k] = rests[k];
    }
  }
  CONTRASTIVE_OPS_UNROLL
  for (int turn = 0; turn < kTurnsDown; ++turn) {
    const int row = row_of(turn);
    const auto write = [&](float* parts, float sum, float times) {
      for (int step = 1; step < kAcross; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
      if (lane % kAcross == 0 && row < p.rows) parts[int64_t{col_tile} * p.rows + row] = times * sum;
    };
    if (task.row_residuals != nullptr) write(task.row_residuals, residual[turn], down);
    if (task.scale != nullptr) write(task.scale, scale[turn], p.sign);
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); task.col_residuals != nullptr && c < kCols; c += kGroup) {
    const int col = col_tile * kCols + c;
    if (col >= p.cols) break;
    float sum = 0.0f;
    for (int w = 0; w < kGroupWarps; ++w) sum += shared[w * kCols + c];
    task.col_residuals[int64_t{row_tile} * p.cols + col] = down * sum;
  }
}

}  // namespace
}  // namespace hopper

void hopper_weigh_kept(Stream stream, int64_t first_row, int64_t rows, Arrays pair_data, Integers spec,
                       const float* scale, const float* row_bias, const float* col_bias, const int64_t* target,
                       int64_t N, int64_t M, const float* values, const float* d_values, const float* d_target,
                       const float* norm, Input logits, const float* heads, const int64_t* wide,
                       const float* target_logit, Output weights, Integers sums, float* parts, double* totals) {
  using namespace hopper;
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, target, N, M);
  const SweepPairs pairs = sweep_pairs(p, first_row, rows);
  WeighTask task{};
  if (read_folds(p, values, d_values, false, task) != Slopes::softmax) {
    throw std::invalid_argument("spec: logits are kept of logsumexp");
  }
  if (pairs.row_bias || pairs.col_bias) throw std::invalid_argument("row_bias, col_bias: logits are kept without them");
  task.d_target = d_target, task.norm = norm;
  if (rows == 0 || M == 0) return;
  const Plan plan(rows, M, 1, kCols);
  TileSums found(plan, first_row, rows, M, parts);
  found.take(sums, totals, false, task);
  const Kept kept{logits.as<uint16_t>(), reinterpret_cast<const Head*>(heads), target_logit, ceil_divide(M, 8) * 8};
  const Guard guard{wide, plan.row_pairs, false};
  const auto run = [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      launch(weigh_kept_kernel<T>, plan.tiles() * kCluster, kGroup, sizeof(float) * kGroupWarps * kCols, stream, pairs,
             task, kept, guard, plan.col_tiles, weights.as<T>());
    } else {
      throw std::invalid_argument("logits: they must be of 16 bits");
    }
  };
  with_type(logits.dtype, run);
  found.add(stream, guard);
}

}  // namespace contrastive_ops
