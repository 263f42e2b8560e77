// The loss of one row from its folds, and the slopes of that: every kind of similarity_loss, once for all processors.
//
// Formulas and numbers of kinds are those of contrastive_ops/reference/row_losses.py, which says what they mean. They
// are computed in double: a row has one loss, and the differences that decide it must not be rounded again.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define CONTRASTIVE_OPS_ROW __host__ __device__ inline
#else
#define CONTRASTIVE_OPS_ROW inline
#endif

namespace contrastive_ops {

enum class RowLoss : int { softmax = 0, softmax_both = 1, sigmoid = 2, mean_log = 3, log_mean = 4 };
enum class Reduction : int { mean = 0, sum = 1, none = 2 };

// The most folds that a kind has.
constexpr int kRowFolds = 3;

// What the loss of a row is made of. `extra` is -inf where the row has none, `count` is the number of its positives.
struct RowTerms {
  double folds[kRowFolds];
  double target, extra, count;
};

// A row's loss and its derivatives by its folds, its target's logit and `extra`.
struct RowSlopes {
  double loss;
  double folds[kRowFolds];
  double target, extra;
};

// Everything in it is local to the file that includes it: files are compiled for several SIMD levels.
namespace {

CONTRASTIVE_OPS_ROW double row_softplus(double z) { return (z > 0 ? z : 0) + log1p(exp(-fabs(z))); }
CONTRASTIVE_OPS_ROW double row_sigmoid(double z) { return z >= 0 ? 1 / (1 + exp(-z)) : exp(z) / (1 + exp(z)); }

// softplus(fold and extra together - target)
CONTRASTIVE_OPS_ROW RowSlopes softmax_row(const RowTerms& row) {
  const double fold = row.folds[0], empty = -std::numeric_limits<double>::infinity();
  RowSlopes out{};
  double all = fold, share = 1;
  if (row.extra != empty) {
    const double top = fold > row.extra ? fold : row.extra, low = fold > row.extra ? row.extra : fold;
    all = fold != fold ? fold : top + log1p(exp(low - top));
    share = exp(fold - all);
    out.extra = exp(row.extra - all);
  }
  const double slope = row_sigmoid(all - row.target);
  out.loss = row_softplus(all - row.target);
  out.folds[0] = slope * share;
  out.extra *= slope;
  out.target = -slope;
  return out;
}

// One positive is the target and the others are in folds[1]: spread is how much larger all of them are together.
CONTRASTIVE_OPS_ROW RowSlopes positives_row(RowLoss kind, const RowTerms& row) {
  RowSlopes out{};
  if (!(row.count > 0)) return out;
  const double spread = row_softplus(row.folds[1] - row.target), share = row_sigmoid(row.folds[1] - row.target);
  const double beyond = row.folds[0] - row.target - spread, outer = row_sigmoid(beyond);
  out.loss = row_softplus(beyond);
  out.folds[0] = outer;
  if (kind == RowLoss::mean_log) {
    out.loss += spread - (row.folds[2] - (row.count - 1) * row.target) / row.count;
    out.folds[1] = share * (1 - outer);
    out.folds[2] = -1 / row.count;
    out.target = (row.count - 1) / row.count - share - outer * (1 - share);
  } else {
    out.loss += log(row.count);
    out.folds[1] = -outer * share;
    out.target = -outer * (1 - share);
  }
  return out;
}

CONTRASTIVE_OPS_ROW RowSlopes row_loss(RowLoss kind, const RowTerms& row) {
  switch (kind) {
    case RowLoss::softmax:
      return softmax_row(row);
    case RowLoss::softmax_both: {
      const double rows = row.folds[0] - row.target, cols = row.folds[1] - row.target;
      const double by_rows = row_sigmoid(rows) / 2, by_cols = row_sigmoid(cols) / 2;
      return {(row_softplus(rows) + row_softplus(cols)) / 2, {by_rows, by_cols, 0}, -(by_rows + by_cols), 0};
    }
    case RowLoss::sigmoid:
      return {row.folds[0] + row_softplus(-row.target), {1, 0, 0}, -row_sigmoid(-row.target), 0};
    default:
      return positives_row(kind, row);
  }
}

}  // namespace
}  // namespace contrastive_ops
