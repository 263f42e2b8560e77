// Losses of a router from its sums, and their derivative; contrastive_ops/ops/router_losses.py has the same in torch.
//
// Not of a SIMD level: a few numbers of each expert, in double and in order, which bindings_expert_routing.h includes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../expert_routing.h"

namespace contrastive_ops {
namespace {

template <class A>
class RouterBalance {
 public:
  explicit RouterBalance(const RouterLosses& l) : l_(l), row_(l.E), chosen_(l.E) {}

  // Writes all losses in a row, and their weighted total.
  void forward(A* values, A* total) {
    double sum = 0;
    for_each([&](const Term& term, int64_t s, int64_t at) {
      const double value = loss(term, s), weight = term.weights.of(s);
      values[at] = static_cast<A>(value);
      if (weight != 0) sum += weight * value;
    });
    *total = static_cast<A>(sum);
  }

  // Writes the gradients by the three tables of sums, and by the squared logsumexp and the entropy. Those of the losses
  // and of the total may be null.
  void backward(const A* d_values, const A* d_total, A* d_sums, A* d_totals) {
    const int64_t cells = l_.segments * l_.E;
    std::fill(d_sums, d_sums + 3 * cells, A(0));
    std::fill(d_totals, d_totals + 2 * l_.segments, A(0));
    for_each([&](const Term& term, int64_t s, int64_t at) {
      const double weight = term.weights.of(s);
      const double d = (d_values ? d_values[at] : 0.0) + (d_total && weight != 0 ? weight * *d_total : 0.0);
      if (d == 0) return;  // a slope may be NaN where nobody asks for the loss
      const int64_t begin = term.pooled ? 0 : s, end = term.pooled ? l_.segments : s + 1;
      if (term.loss == RouterLoss::z || term.loss == RouterLoss::local_entropy) {
        A* to = d_totals + (term.loss == RouterLoss::z ? 0 : l_.segments);
        for (int64_t i = begin; i < end; ++i) to[i] += static_cast<A>(d / divisor(term, s));
        return;
      }
      slopes(term, s);
      for (int64_t i = begin; i < end; ++i) {
        A* to = d_sums + table(term.loss) * cells + i * l_.E;
        for (int64_t e = 0; e < l_.E; ++e) to[e] += static_cast<A>(d * row_[e]);
      }
    });
  }

 private:
  struct Numbers {
    const double* values;
    int64_t count;
    double of(int64_t s) const { return values[count == 1 ? 0 : s]; }
  };
  struct Term {
    RouterLoss loss;
    bool pooled;
    Numbers weights, thresholds;
  };

  // Calls for each value of each loss with its segment, 0 where it is pooled, and its place among all.
  template <class Function>
  void for_each(Function function) {
    const double* numbers = l_.numbers;
    int64_t at = 0;
    for (int64_t n = 0; n < l_.count; ++n) {
      const int64_t* spec = l_.losses + 4 * n;
      const Term term{static_cast<RouterLoss>(spec[0]), spec[1] != 0, {numbers, spec[2]}, {numbers + spec[2], spec[3]}};
      numbers += spec[2] + spec[3];
      for (int64_t s = 0; s < (term.pooled ? 1 : l_.segments); ++s) function(term, s, at++);
    }
  }

  // One number of a segment, or of all of them.
  template <class T>
  double number(const Term& term, const T* numbers, int64_t s) const {
    if (!term.pooled) return static_cast<double>(numbers[s]);
    double sum = 0;
    for (int64_t i = 0; i < l_.segments; ++i) sum += static_cast<double>(numbers[i]);
    return sum;
  }
  // The same of each expert.
  template <class T>
  void read(const Term& term, const T* table, int64_t s, std::vector<double>& to) const {
    const int64_t begin = term.pooled ? 0 : s, end = term.pooled ? l_.segments : s + 1;
    std::fill(to.begin(), to.end(), 0.0);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t e = 0; e < l_.E; ++e) to[e] += static_cast<double>(table[i * l_.E + e]);
    }
  }
  // The table that a loss is made of.
  int64_t table(RouterLoss loss) const {
    return loss == RouterLoss::load ? 2 : loss == RouterLoss::switched && l_.noise ? 1 : 0;
  }
  void read_table(const Term& term, int64_t s) {
    read(term, static_cast<const A*>(l_.sums) + table(term.loss) * l_.segments * l_.E, s, row_);
  }
  double tokens(const Term& term, int64_t s) const { return number(term, l_.counts + 2 * l_.segments * l_.E, s); }
  double divisor(const Term& term, int64_t s) const { return std::max(tokens(term, s), 1.0); }

  double loss(const Term& term, int64_t s) {
    const A* totals = static_cast<const A*>(l_.sums) + 3 * l_.segments * l_.E;
    if (term.loss == RouterLoss::z) return number(term, totals, s) / divisor(term, s);
    if (term.loss == RouterLoss::local_entropy) return number(term, totals + l_.segments, s) / divisor(term, s);
    read_table(term, s);
    if (term.loss == RouterLoss::switched) {
      read_shares(term, s);
      double sum = 0;
      for (int64_t e = 0; e < l_.E; ++e) sum += chosen_[e] * row_[e];
      return sum;
    }
    if (term.loss == RouterLoss::global_entropy) {
      const double value = negative_entropy(term, s);
      if (term.thresholds.count == 0) return value;
      const double left = value + term.thresholds.of(s);
      return tokens(term, s) > 0 && !(left < 0) ? left : 0.0;
    }
    const auto [mean, variance] = spread();
    return variance / (mean * mean == 0 ? 1 : mean * mean);
  }

  // Leaves in row_ the derivative of a loss by its table.
  void slopes(const Term& term, int64_t s) {
    read_table(term, s);
    if (term.loss == RouterLoss::switched) {
      read_shares(term, s);
      std::copy(chosen_.begin(), chosen_.end(), row_.begin());
    } else if (term.loss == RouterLoss::global_entropy) {
      const double n = divisor(term, s), value = negative_entropy(term, s);
      const bool paid = term.thresholds.count == 0 || (tokens(term, s) > 0 && value + term.thresholds.of(s) >= 0);
      for (double& p : row_) p = paid ? (logarithm(p / n) + (p / n >= kLeast)) / n : 0.0;
    } else {
      const auto [mean, variance] = spread();
      const bool none = mean * mean == 0;
      const double factor = 2 / (static_cast<double>(l_.E) * (none ? 1 : mean * mean));
      for (double& x : row_) x = factor * (x - mean - (none ? 0 : variance / mean));
    }
  }

  // Mean and variance of row_.
  std::pair<double, double> spread() const {
    double mean = 0, variance = 0;
    for (const double x : row_) mean += x;
    mean /= static_cast<double>(l_.E);
    for (const double x : row_) variance += (x - mean) * (x - mean);
    return {mean, variance / static_cast<double>(l_.E)};
  }
  // Leaves in chosen_ the experts' shares of the choices times E, and divided by the tokens.
  void read_shares(const Term& term, int64_t s) {
    read(term, l_.counts, s, chosen_);
    double all = 0;
    for (const double count : chosen_) all += count;
    const double factor = static_cast<double>(l_.E) / (std::max(all, 1.0) * divisor(term, s));
    for (double& count : chosen_) count *= factor;
  }
  // Of the mean probabilities of row_. 0 log 0 is 0; NaN comes out.
  double negative_entropy(const Term& term, int64_t s) const {
    const double n = divisor(term, s);
    double sum = 0;
    for (const double p : row_) sum += p / n * logarithm(p / n);
    return sum;
  }
  static constexpr double kLeast = static_cast<double>(std::numeric_limits<A>::min());
  static double logarithm(double p) { return std::log(p < kLeast ? kLeast : p); }

  const RouterLosses& l_;
  std::vector<double> row_, chosen_;  // (E,)
};

}  // namespace
}  // namespace contrastive_ops
