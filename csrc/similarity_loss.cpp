// similarity_loss on the CPU, over the functions of similarity_reduce for the SIMD level in use. Raw pointers only, as
// in cpu/, and nothing here is worth a SIMD level of its own: it is O(N).
#include "similarity_loss.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

namespace contrastive_ops {
namespace {

// Calls body(i) for all rows, in tasks where there are many: a row takes some 100 ns.
template <class Body>
void for_rows(int64_t rows, const Parallel& parallel, Body body) {
  constexpr int64_t kRange = 128, kWorthTasks = 512;
  auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  };
  if (rows < kWorthTasks) return range(0, rows);
  auto task = [&](int64_t index) { range(index * kRange, std::min(rows, (index + 1) * kRange)); };
  using Task = decltype(task);
  parallel.run((rows + kRange - 1) / kRange, [](void* own, int64_t index, int) { (*static_cast<Task*>(own))(index); },
               &task);
}

// What each row's loss is multiplied by.
template <class A>
struct RowWeights {
  const A *weight, *count;
  double size;  // what the result is divided by

  RowWeights(const SimilarityLoss& loss, int64_t rows)
      : weight(static_cast<const A*>(loss.weight)), count(static_cast<const A*>(loss.count)), size(1) {
    if (loss.reduction != Reduction::mean) return;
    size = rows == 0 ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(rows);
    if (weight == nullptr && count == nullptr) return;
    size = 0;
    for (int64_t i = 0; i < rows; ++i) size += counts(i) ? of(i) : 0;
    if (size == 0) size = 1;
  }
  double of(int64_t i) const { return weight ? weight[i] : 1; }
  bool counts(int64_t i) const { return of(i) != 0 && (count == nullptr || count[i] > 0); }
};

// Results of rows from their losses and targets' logits, and the derivatives by weight and target_weight.
template <class A>
void reduce(const SimilarityLoss& out, const RowWeights<A>& weights, const double* losses, const A* logits,
            int64_t rows) {
  const A* target_weight = static_cast<const A*>(out.target_weight);
  A* result = static_cast<A*>(out.loss);
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double row = weights.weight && weights.of(i) == 0 ? 0 : weights.of(i) * losses[i];
    if (target_weight) row += static_cast<double>(target_weight[i]) * logits[i];
    if (out.reduction == Reduction::none) result[i] = static_cast<A>(row);
    total += row;
  }
  total /= weights.size;
  if (out.reduction != Reduction::none) *result = static_cast<A>(total);
  A *d_weight = static_cast<A*>(out.d_weight), *d_target_weight = static_cast<A*>(out.d_target_weight);
  const double mean = out.reduction == Reduction::mean ? total : 0;
  for (int64_t i = 0; d_weight && i < rows; ++i) {
    d_weight[i] = weights.counts(i) ? static_cast<A>((losses[i] - mean) / weights.size) : 0;
  }
  for (int64_t i = 0; d_target_weight && i < rows; ++i) {
    d_target_weight[i] = static_cast<A>(logits[i] / weights.size);
  }
}

template <class A>
void one_pass_forward(const SimilarityProblem& p, const SimilarityLoss& out, const SimilarityReduce& table,
                      const Parallel& parallel) {
  const RowWeights<A> weights(out, p.N);
  std::unique_ptr<double[]> losses(new double[p.N]);
  std::unique_ptr<A[]> logits(new A[p.N]);
  SimilarityTotal total{};
  total.kind = out.kind;
  total.weight = out.weight;
  total.extra = out.extra;
  total.target_weight = out.target_weight;
  total.size = weights.size;
  total.losses = losses.get();
  total.target_logit = logits.get();
  total.dextra = out.d_extra;
  total.gradients = out.gradients;
  table.total(p, total, parallel);
  reduce<A>(out, weights, losses.get(), logits.get(), p.N);
}

template <class A>
void two_pass_forward(const SimilarityProblem& p, const SimilarityLoss& out, const SimilarityReduce& table,
                      const Parallel& parallel) {
  const double empty = -std::numeric_limits<double>::infinity();
  std::unique_ptr<double[]> losses(new double[p.N]);
  std::unique_ptr<A[]> logits(new A[p.N]);
  A* folds = static_cast<A*>(out.folds);
  void* values[kRowFolds] = {folds, folds + p.N, folds + 2 * p.N};
  int64_t* no_winners[kRowFolds] = {};
  SimilarityForward forward{};
  forward.values = values;
  forward.argmax = no_winners;
  forward.target_logit = logits.get();
  table.forward(p, forward, parallel);

  const RowWeights<A> weights(out, p.N);
  const A *extra = static_cast<const A*>(out.extra), *target_weight = static_cast<const A*>(out.target_weight);
  A *d_folds = static_cast<A*>(out.d_folds), *d_target = static_cast<A*>(out.d_target);
  A* d_extra = static_cast<A*>(out.d_extra);
  for_rows(p.N, parallel, [&](int64_t i) {
    RowTerms row{{}, logits[i], extra ? extra[i] : empty, weights.count ? weights.count[i] : 1.0};
    for (int f = 0; f < p.fold_count; ++f) row.folds[f] = folds[f * p.N + i];
    const RowSlopes slopes = row_loss(out.kind, row);
    const double factor = weights.of(i) / weights.size;
    losses[i] = slopes.loss;
    for (int f = 0; d_folds && f < p.fold_count; ++f) d_folds[f * p.N + i] = static_cast<A>(factor * slopes.folds[f]);
    if (d_target) {
      d_target[i] = static_cast<A>(factor * slopes.target + (target_weight ? target_weight[i] / weights.size : 0));
    }
    if (d_extra) d_extra[i] = static_cast<A>(factor * slopes.extra);
  });
  reduce<A>(out, weights, losses.get(), logits.get(), p.N);
}

}  // namespace

bool in_one_pass(RowLoss kind, Reduction reduction, bool self) {
  return (kind == RowLoss::softmax || kind == RowLoss::sigmoid) && reduction != Reduction::none && !self;
}

int folds_of(RowLoss kind, SimilarityFold folds[kRowFolds]) {
  const FoldKind first = kind == RowLoss::sigmoid ? FoldKind::sum_softplus : FoldKind::logsumexp;
  folds[0] = {0, first, false};
  if (kind == RowLoss::softmax || kind == RowLoss::sigmoid) return 1;
  folds[1] = {kind == RowLoss::softmax_both ? 0 : 1, FoldKind::logsumexp, kind == RowLoss::softmax_both};
  if (kind != RowLoss::mean_log) return 2;
  folds[2] = {1, FoldKind::sum, false};
  return 3;
}

void usual_target(bool self, int64_t rows, int64_t* target) {
  const int64_t step = self ? rows / 2 : 0;
  for (int64_t i = 0; i < rows; ++i) target[i] = i < step ? i + rows - step : i - step;
}

void positives_of(const int64_t* labels, int64_t rows, const int64_t* col_labels, int64_t cols, int64_t* target,
                  int64_t* count) {
  const int64_t* known = col_labels ? col_labels : labels;
  std::vector<int64_t> order(cols);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return known[a] != known[b] ? known[a] < known[b] : a < b; });
  if (col_labels == nullptr) {
    for (int64_t begin = 0; begin < rows;) {
      const int64_t label = labels[order[begin]];
      int64_t end = begin + 1;
      while (end < rows && labels[order[end]] == label) ++end;
      for (int64_t at = begin; at < end; ++at) {
        target[order[at]] = order[at + 1 < end ? at + 1 : begin];
        count[order[at]] = label == -1 ? 0 : end - begin - 1;
      }
      begin = end;
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const auto less = [&](int64_t column, int64_t label) { return known[column] < label; };
    const auto more = [&](int64_t label, int64_t column) { return label < known[column]; };
    const auto begin = std::lower_bound(order.begin(), order.end(), labels[i], less);
    const auto end = std::upper_bound(begin, order.end(), labels[i], more);
    target[i] = cols == 0 ? 0 : *(begin == order.end() ? order.begin() : begin);
    count[i] = labels[i] == -1 ? 0 : end - begin;
  }
}

void similarity_loss_cpu(const SimilarityProblem& p, const SimilarityLoss& loss, bool one_pass,
                         const SimilarityReduce& table, const Parallel& parallel) {
  const bool wide = p.dtype == DType::float64;
  if (one_pass) {
    return wide ? one_pass_forward<double>(p, loss, table, parallel)
                : one_pass_forward<float>(p, loss, table, parallel);
  }
  wide ? two_pass_forward<double>(p, loss, table, parallel) : two_pass_forward<float>(p, loss, table, parallel);
}

}  // namespace contrastive_ops
