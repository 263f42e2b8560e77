// Losses of a router from its sums, and their slopes, by warps; csrc/cpu/expert_losses.h has the same for CPUs.
//
// In double, a lane for every 32nd expert: sums have an order that the number of experts alone decides.
#pragma once

#include "../expert_routing.h"
#include "launch.h"

namespace contrastive_ops {
namespace {

// Each name pooled and by segment.
constexpr int kMostLosses = 12;
// Weights and thresholds: what a launch takes beside its other arguments.
constexpr int kMostLossNumbers = 256;

struct LossTerm {
  RouterLoss loss;
  bool pooled;
  int weights, thresholds, first;  // how many numbers, and where they begin
};

// `LossSpec` of contrastive_ops/ops/router_losses.py, as kernels take it.
struct LossTerms {
  int count = 0, segments, E;
  bool noise;
  LossTerm term[kMostLosses];
  double numbers[kMostLossNumbers];

  LossTerms(Integers losses, Doubles values, int64_t segments, int64_t E, bool noise)
      : segments(static_cast<int>(segments)), E(static_cast<int>(E)), noise(noise) {
    if (losses.size > 4 * kMostLosses || values.size > kMostLossNumbers) {
      throw std::invalid_argument("losses: there must be at most 12, with at most 256 numbers");
    }
    int first = 0;
    for (; 4 * count < losses.size; ++count) {
      const int64_t* spec = losses.data + 4 * count;
      const int weights = static_cast<int>(spec[2]), thresholds = static_cast<int>(spec[3]);
      term[count] = {static_cast<RouterLoss>(spec[0]), spec[1] != 0, weights, thresholds, first};
      first += weights + thresholds;
    }
    for (int64_t at = 0; at < values.size; ++at) numbers[at] = values.data[at];
  }
  // How many values a loss has.
  __host__ __device__ int size_of(const LossTerm& t) const { return t.pooled ? 1 : segments; }
  __host__ __device__ int size() const {
    int all = 0;
    for (int n = 0; n < count; ++n) all += size_of(term[n]);
    return all;
  }
  __device__ double weight(const LossTerm& t, int s) const {
    return numbers[t.first + (t.weights == 1 || t.pooled ? 0 : s)];
  }
  __device__ double threshold(const LossTerm& t, int s) const {
    return numbers[t.first + t.weights + (t.thresholds == 1 || t.pooled ? 0 : s)];
  }
};

// What losses are made of.
struct LossSums {
  const float* sums;       // (3, segments, E)
  const float* totals;     // (2, segments)
  const int64_t* choices;  // (segments, E)
  const int64_t* tokens;   // (segments)
};

// One loss of a segment, or of all of them. Every lane of a warp calls each function.
class WarpLoss {
 public:
  __device__ WarpLoss(const LossTerms& l, const LossSums& in, const LossTerm& term, int s)
      : l_(l),
        in_(in),
        term_(term),
        segment_(s),
        begin_(term.pooled ? 0 : s),
        end_(term.pooled ? l.segments : s + 1),
        tokens_(number(in.tokens)),
        divisor_(tokens_ < 1 ? 1 : tokens_) {}

  __device__ double value() const {
    if (is_total()) return number(in_.totals + (term_.loss == RouterLoss::z ? 0 : l_.segments)) / divisor_;
    if (term_.loss == RouterLoss::switched) {
      const double factor = share();
      return sum_of([&](int e) { return factor * cell(in_.choices, e) * row(e); });
    }
    if (term_.loss == RouterLoss::global_entropy) {
      const double found = negative_entropy();
      if (term_.thresholds == 0) return found;
      const double left = found + l_.threshold(term_, segment_);
      return tokens_ > 0 && !(left < 0) ? left : 0.0;
    }
    const Spread spread = spread_of();
    return spread.variance / (spread.mean * spread.mean == 0 ? 1 : spread.mean * spread.mean);
  }

  // Whether it is made of a number of each token, not of each expert; that of tables that it is made of otherwise.
  __device__ bool is_total() const { return term_.loss == RouterLoss::z || term_.loss == RouterLoss::local_entropy; }
  __device__ int table() const {
    return term_.loss == RouterLoss::load ? 2 : term_.loss == RouterLoss::switched && l_.noise ? 1 : 0;
  }
  __device__ double slope() const { return 1.0 / divisor_; }  // of a total

  // Adds d times the slopes by the table to a row of it.
  __device__ void add_slopes(double d, float* to) const {
    if (term_.loss == RouterLoss::switched) {
      const double factor = share();
      for_experts([&](int e) { to[e] += static_cast<float>(d * factor * cell(in_.choices, e)); });
    } else if (term_.loss == RouterLoss::global_entropy) {
      const bool paid =
          term_.thresholds == 0 || (tokens_ > 0 && negative_entropy() + l_.threshold(term_, segment_) >= 0);
      for_experts([&](int e) {
        const double p = row(e) / divisor_;
        to[e] += static_cast<float>(paid ? d * (logarithm(p) + (p >= kLeast ? 1.0 : 0.0)) / divisor_ : 0.0);
      });
    } else {
      const Spread spread = spread_of();
      const bool none = spread.mean * spread.mean == 0;
      const double factor = 2 / (l_.E * (none ? 1 : spread.mean * spread.mean));
      const double shift = spread.mean + (none ? 0 : spread.variance / spread.mean);
      for_experts([&](int e) { to[e] += static_cast<float>(d * factor * (row(e) - shift)); });
    }
  }

 private:
  struct Spread {
    double mean, variance;
  };
  static constexpr double kLeast = 1.1754943508222875e-38;  // of float32

  template <class Function>
  __device__ void for_experts(const Function& function) const {
    for (int e = static_cast<int>(threadIdx.x) % kWarp; e < l_.E; e += kWarp) function(e);
  }
  template <class Function>
  __device__ double sum_of(const Function& function) const {
    double sum = 0;
    for_experts([&](int e) { sum += function(e); });
    return fold_warp(sum, [](double a, double b) { return a + b; });
  }
  template <class T>
  __device__ double number(const T* numbers) const {
    double sum = 0;
    for (int i = begin_; i < end_; ++i) sum += static_cast<double>(numbers[i]);
    return sum;
  }
  template <class T>
  __device__ double cell(const T* table, int e) const {
    double sum = 0;
    for (int i = begin_; i < end_; ++i) sum += static_cast<double>(table[int64_t{i} * l_.E + e]);
    return sum;
  }
  __device__ double row(int e) const { return cell(in_.sums + int64_t{table()} * l_.segments * l_.E, e); }

  __device__ Spread spread_of() const {
    const double mean = sum_of([&](int e) { return row(e); }) / l_.E;
    return {mean, sum_of([&](int e) { return (row(e) - mean) * (row(e) - mean); }) / l_.E};
  }
  // What choices of an expert become its share times E, divided by the tokens, with.
  __device__ double share() const {
    const double all = sum_of([&](int e) { return cell(in_.choices, e); });
    return l_.E / ((all < 1 ? 1 : all) * divisor_);
  }
  // Of the mean probabilities. 0 log 0 is 0; NaN comes out.
  __device__ double negative_entropy() const {
    return sum_of([&](int e) {
      const double p = row(e) / divisor_;
      return p * logarithm(p);
    });
  }
  static __device__ double logarithm(double p) { return log(p < kLeast ? kLeast : p); }

  const LossTerms& l_;
  const LossSums& in_;
  const LossTerm& term_;
  int segment_, begin_, end_;
  double tokens_, divisor_;
};

// Writes all losses and their weighted total; `values` has room for each loss. All threads of a block call it.
__device__ inline void write_losses(const LossTerms& l, const LossSums& in, double* values, float* losses,
                                    float* total) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int at = 0;
  for (int n = 0; n < l.count; ++n) {
    for (int s = 0; s < l.size_of(l.term[n]); ++s, ++at) {
      if (at % warps != warp) continue;
      const double value = WarpLoss(l, in, l.term[n], s).value(), weight = l.weight(l.term[n], s);
      if (threadIdx.x % kWarp != 0) continue;
      losses[at] = static_cast<float>(value);
      values[at] = weight == 0 ? 0.0 : weight * value;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int i = 0; i < at; ++i) sum += values[i];
  *total = static_cast<float>(sum);
}

// Gradients of losses and of their total, of which one may be null.
struct LossGradients {
  const float *values, *total;
};

// Writes the derivatives by the tables of sums (kinds, segments, E) and by the totals (2, segments). All threads of a
// block call it; a warp has a segment.
// A function of its own, as it is needed once and would take registers from the tokens.
CONTRASTIVE_OPS_NOINLINE __device__ inline void write_slopes(const LossTerms& l, const LossSums& in,
                                                             const LossGradients& d, int kinds, float* d_sums,
                                                             float* d_totals) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int s = static_cast<int>(threadIdx.x) / kWarp; s < l.segments; s += warps) {
    for (int kind = 0; kind < kinds; ++kind) {
      for (int e = lane; e < l.E; e += kWarp) d_sums[(int64_t{kind} * l.segments + s) * l.E + e] = 0.0f;
    }
    if (lane == 0) d_totals[s] = d_totals[l.segments + s] = 0.0f;
    for (int n = 0, at = 0; n < l.count; at += l.size_of(l.term[n++])) {
      const LossTerm& term = l.term[n];
      const double weight = l.weight(term, s);
      // What nobody asked for reaches nothing, not even where it is NaN.
      if (d.values == nullptr && (d.total == nullptr || weight == 0)) continue;
      const double from_value = d.values == nullptr ? 0.0 : double{d.values[at + (term.pooled ? 0 : s)]};
      const double upstream = from_value + (d.total == nullptr || weight == 0 ? 0.0 : weight * double{*d.total});
      const WarpLoss loss(l, in, term, s);
      if (!loss.is_total()) {
        loss.add_slopes(upstream, d_sums + (int64_t{loss.table()} * l.segments + s) * l.E);
      } else if (lane == 0) {
        d_totals[(term.loss == RouterLoss::z ? 0 : l.segments) + s] += static_cast<float>(upstream * loss.slope());
      }
    }
  }
  __syncthreads();
}

}  // namespace
}  // namespace contrastive_ops
