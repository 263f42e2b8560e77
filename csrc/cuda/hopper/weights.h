// What the kernels that make weights share: what they are told, the sums beside weights, and what adds them up.
#pragma once

#include <vector>

#include "../similarity_sums.h"
#include "rules.h"

namespace contrastive_ops::hopper {

// What pairs add: those of logsumexp of rows and of columns, or those of sum_softplus of rows.
enum class Slopes { softmax, sigmoid };

struct WeighTask {
  const float *row_value, *row_gain, *col_value, *col_gain, *d_target, *norm;  // null for none
  // (tiles across, rows), and of columns (tiles down, cols); null for none.
  float *row_residuals, *row_bias, *scale, *col_residuals, *losses;
  float* target_logit;
  bool stores, of_cols;  // of_cols: of a matrix that is compared with itself, whether its folds are of columns
  int first_col;         // of the weights
};

// Whether a kernel has nothing to do: one of two does, by whether a pair of row tiles is wide (kept.h).
struct Guard {
  const int64_t* wide;  // null for a kernel that always runs
  int pairs;
  bool runs_if_wide;

  __device__ bool off() const {
    bool any = false;
    for (int pair = 0; wide != nullptr && pair < pairs; ++pair) any |= wide[pair] != 0;
    return wide != nullptr && any != runs_if_wide;
  }
};

template <class T>
__device__ float widened(uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  T number;
  memcpy(&number, &half, sizeof(number));
  return to_float(number);
}

// 1 / x of a power of two, without a division, which is a call.
__device__ inline float inverse_of_power(float x) { return __uint_as_float((254u << 23) - __float_as_uint(x)); }

namespace {

// Adds the parts of all tiles to totals that are `step` apart, tile after tile, in float64.
__global__ void add_tiles_kernel(const float* parts, const Plan plan, const Guard guard, bool cols, int64_t count,
                                 double* totals, int step) {
  const int64_t place = int64_t{blockIdx.x} * kGroup + threadIdx.x;
  if (place >= count || guard.off()) return;
  double total = totals[place * step];
  const Span tiles(plan, cols, static_cast<int>(place));
  for (int t = tiles.begin; t < tiles.end; ++t) total += static_cast<double>(parts[t * count + place]);
  totals[place * step] = total;
}

}  // namespace

// The sums that a kernel leaves as one part for each tile, and where they are added up.
class TileSums {
 public:
  TileSums(const Plan& plan, int64_t first_row, int64_t rows, int64_t cols, float* parts)
      : plan_(plan), first_row_(first_row), rows_(rows), cols_(cols), parts_(parts) {}

  float* take(bool of_cols, double* to, int step) {
    float* own = parts_;
    found_.push_back({own, of_cols, of_cols ? cols_ : rows_, of_cols ? to : to + step * first_row_, step});
    parts_ += of_cols ? plan_.row_tiles() * cols_ : plan_.col_tiles * rows_;
    return own;
  }

  // `sums` as hopper_weigh takes them.
  void take(const Integers& sums, double* totals, bool itself, WeighTask& task) {
    for (int64_t at = 0; at + 3 < sums.size; at += 4) {
      const int64_t* sum = sums.data + at;
      const auto what = static_cast<SumOf>(sum[0]);
      const bool of_cols = sum[2] != 0;
      if (of_cols && what != SumOf::residual) throw std::invalid_argument("sums: of columns there is the residual");
      if (itself && what == SumOf::residual) task.col_residuals = take(true, totals + sum[3], 1);
      float*& own = what == SumOf::scale  ? task.scale
                    : what == SumOf::bias ? task.row_bias
                    : of_cols             ? task.col_residuals
                                          : task.row_residuals;
      own = take(of_cols, totals + sum[3], 1);
    }
  }

  void add(Stream stream, const Guard& guard) const {
    for (const Part& each : found_) {
      launch(add_tiles_kernel, ceil_divide(each.count, kGroup), kGroup, 0, stream, each.from, plan_, guard, each.cols,
             each.count, each.to, each.step);
    }
  }

 private:
  struct Part {
    const float* from;
    bool cols;
    int64_t count;
    double* to;
    int step;
  };
  Plan plan_;
  int64_t first_row_, rows_, cols_;
  float* parts_;
  std::vector<Part> found_;
};

// The folds, and what arrives at them.
inline Slopes read_folds(const PairArguments& p, const float* values, const float* d_values, bool folds,
                         WeighTask& task) {
  Slopes slopes = Slopes::softmax;
  int64_t begin = 0;
  for (int f = 0; f < p.fold_count; ++f) {
    const PairFold& fold = p.folds[f];
    const bool sigmoid = fold.kind == FoldKind::sum_softplus && !fold.cols && p.fold_count == 1;
    const float*& gain = fold.cols ? task.col_gain : task.row_gain;
    if ((fold.kind != FoldKind::logsumexp && !sigmoid) || gain != nullptr || (folds && !sigmoid)) {
      throw std::invalid_argument("spec: folds must be logsumexp of rows and of columns, or sum_softplus of rows");
    }
    if (sigmoid) slopes = Slopes::sigmoid;
    if (d_values != nullptr) {
      gain = d_values + begin;
      if (!folds) (fold.cols ? task.col_value : task.row_value) = values + begin;
    }
    begin += fold.cols ? p.M : p.N;
  }
  return slopes;
}

}  // namespace contrastive_ops::hopper
