// One token at a time through a router: scores, choices, and their derivative, in scratch memory of its thread.
#pragma once

#include <algorithm>

#include "../expert_routing.h"
#include "logistic.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class A>
constexpr A kNever = -std::numeric_limits<A>::infinity();

// Distribution function of the normal distribution; for float the product of the density and a polynomial in
// 1 / (1 + 0.3 |u|), fitted to a relative error of 3e-7.
INLINE Vec<float> normal_cdf(Vec<float> u) {
  const Vec<float> t = u < 0.0f ? -u : u, w = 1.0f / (1.0f + 0.3f * t);
  Vec<float> tail = w * -0.021055348f + 0.11473752f;
  for (const float c :
       {-0.2335104f, 0.19867313f, -0.08498841f, 0.099044755f, 0.077429526f, 0.110432126f, 0.11954933f, 0.11968778f}) {
    tail = tail * w + c;
  }
  tail = tail * w * exponential(Vec<float>(-0.5f * t * t));
  return u > 0.0f ? 1.0f - tail : tail;
}
INLINE Vec<double> normal_cdf(Vec<double> u) {
  for (int i = 0; i < kLanes<double>; ++i) u[i] = 0.5 * erfc(-u[i] * 0.70710678118654752440);
  return u;
}

// The arrays hold E numbers and are filled up to whole vectors, logits with -inf, everything else with 0. Experts that
// the token must not choose have the logit -inf and probability 0.
template <class A, class S>
class RouterRow {
 public:
  using V = Vec<A>;
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  static constexpr int kWidth = kLanes<A>;

  explicit RouterRow(const RouterProblem& p)
      : p_(p), size_(round_up(p.E, kWidth)), memory_(8 * size_), group_values_(p.expert_groups) {
    A* at = memory_.get();
    for (A** array : {&z_, &noisy_, &log_p_, &prob_, &noisy_prob_, &gate_, &keys_, &spare_}) {
      *array = at;
      at += size_;
    }
  }

  const A* probabilities() const { return prob_; }
  const A* noisy_probabilities() const { return noisy_prob_; }
  const A* chances() const { return spare_; }
  A lse() const { return lse_; }
  A gate(int64_t expert) const { return gate_[expert]; }

  // False where the token is not routed.
  bool read(int64_t i) {
    if (p_.valid && !p_.valid[i]) return false;
    const S* from = static_cast<const S*>(p_.logits) + i * p_.logits_stride;
    const int64_t whole = p_.E / kWidth * kWidth;
    for (int64_t e = 0; e < whole; e += kWidth) store(z_ + e, to_accumulator<A>(from + e));
    if (whole < size_) {
      S tail[kWidth] = {};
      for (int64_t e = whole; e < p_.E; ++e) tail[e - whole] = from[e];
      store(z_ + whole, to_accumulator<A>(tail));
      for (int64_t e = p_.E; e < size_; ++e) z_[e] = kNever<A>;
    }
    if (p_.allowed) {
      const bool* allowed = p_.allowed + i * p_.allowed_row_stride;
      for (int64_t e = 0; e < p_.E; ++e) {
        if (!allowed[e * p_.allowed_stride]) z_[e] = kNever<A>;
      }
    }
    bool live = false;
    for (int64_t e = 0; e < size_; e += kWidth) live |= any_but_never(load(z_ + e));
    return live;
  }

  // Probabilities and gates of the token that was read.
  void score(int64_t i) {
    if (p_.noise) {
      const A* noise = static_cast<const A*>(p_.noise) + i * p_.E;
      const A sigma = static_cast<A>(p_.sigma);
      for (int64_t e = 0; e < p_.E; ++e) noisy_[e] = z_[e] + sigma * noise[e];
      for (int64_t e = p_.E; e < size_; ++e) noisy_[e] = kNever<A>;
    }
    if (p_.score == RouterScore::softmax) {
      lse_ = distribution(z_, log_p_, prob_);
      if (p_.noise) distribution(noisy_, spare_, noisy_prob_);
      gate_at_ = p_.noise ? noisy_prob_ : prob_;
    } else {
      lse_ = distribution(z_, log_p_, prob_);  // of the logits themselves: only the sum matters
      of_sigmoids(z_, log_p_, prob_);
      if (p_.noise) of_sigmoids(noisy_, spare_, noisy_prob_);
      const A* from = p_.noise ? noisy_ : z_;
      for (int64_t e = 0; e < size_; e += kWidth) store(gate_ + e, sigmoid<A>(load(from + e)));
      return;
    }
    memcpy(gate_, gate_at_, static_cast<size_t>(size_) * sizeof(A));
  }

  A entropy() const {
    V sum = {};
    for (int64_t e = 0; e < size_; e += kWidth) sum += load(prob_ + e) * load(log_p_ + e);
    return -lane_sum<A>(sum);
  }

  // The difference of the two largest probabilities.
  A margin() {
    V best = broadcast(A(-1));
    for (int64_t e = 0; e < size_; e += kWidth) best = greater<A>(best, load(prob_ + e));
    const A first = lane_max<A>(best);
    if (p_.E == 1) return first;
    V rest = broadcast(A(-1));
    int firsts = 0;
    for (int64_t e = 0; e < size_; e += kWidth) {
      const V p = load(prob_ + e);
      const auto is_first = p == first;
      firsts += __builtin_popcount(bits_of<Index>(is_first));
      rest = greater<A>(rest, is_first ? broadcast(A(-1)) : p);
    }
    const A second = firsts > 1 ? first : lane_max<A>(rest);
    return first - second + 0 * prob_[0];  // NaN where the probabilities are
  }

  // The k best experts, -1 where there are fewer.
  void choose(int64_t* experts) {
    make_keys();
    if (p_.expert_groups > 1) drop_groups();
    take_best(keys_, p_.E, size_, p_.k, experts);
  }

  // Chance of each expert to be above the last choice when its own noise is drawn again.
  void make_chances(int64_t last) {
    if (last < 0) {  // fewer experts than choices: each is chosen for certain
      for (int64_t e = 0; e < size_; ++e) spare_[e] = z_[e] == kNever<A> ? A(0) : A(1);
      return;
    }
    const V threshold = broadcast(noisy_[last]), sigma = broadcast(static_cast<A>(p_.sigma));
    for (int64_t e = 0; e < size_; e += kWidth) {
      const V z = load(z_ + e), chance = normal_cdf(V((z - threshold) / sigma));
      store(spare_ + e, z == kNever<A> ? V{} : chance);
    }
  }

  // Gradient by the logits. `d_p`, `d_noisy`, `d_chance` are filled like the arrays here; `d_gates` has k numbers.
  void backward(const int64_t* experts, const A* d_gates, const A* d_p, const A* d_noisy, const A* d_chance,
                A d_lse_squared, A d_entropy, A* out) {
    A* dz = keys_;
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    {
      const V mean = broadcast(dot(prob_, d_p)), mean_log = broadcast(-entropy()), share = broadcast(d_entropy);
      for (int64_t e = 0; e < size_; e += kWidth) {
        const V p = load(prob_ + e);
        const V dq = p * (load(d_p + e) - mean) - share * p * (load(log_p_ + e) - mean_log);
        store(dz + e, of_sigmoid ? V(dq * (1 - sigmoid<A>(load(z_ + e)))) : dq);
      }
    }
    if (d_lse_squared != 0) {
      const V factor = broadcast(2 * d_lse_squared * lse_), lse = broadcast(lse_);
      for (int64_t e = 0; e < size_; e += kWidth) {
        const V p = of_sigmoid ? exponential(V(load(z_ + e) - lse)) : load(prob_ + e);
        store(dz + e, load(dz + e) + factor * p);
      }
    }
    gates_backward(experts, d_gates, dz);
    if (p_.noise) {
      const V mean = broadcast(dot(noisy_prob_, d_noisy));
      for (int64_t e = 0; e < size_; e += kWidth) {
        const V dq = load(noisy_prob_ + e) * (load(d_noisy + e) - mean);
        store(dz + e, load(dz + e) + (of_sigmoid ? V(dq * (1 - sigmoid<A>(load(noisy_ + e)))) : dq));
      }
    }
    if (p_.load && experts[p_.k - 1] >= 0) chances_backward(experts[p_.k - 1], d_chance, dz);
    for (int64_t e = 0; e < p_.E; ++e) out[e] = z_[e] == kNever<A> ? A(0) : dz[e];
  }

 private:
  static bool any_but_never(V z) {
    for (int q = 0; q < kWidth; ++q) {
      if (z[q] != kNever<A>) return true;
    }
    return false;
  }

  A dot(const A* a, const A* b) const {
    V sum = {};
    for (int64_t e = 0; e < size_; e += kWidth) sum += load(a + e) * load(b + e);
    return lane_sum<A>(sum);
  }

  // Softmax of q and its logarithm, 0 for both where q is -inf; returns the logsumexp.
  A distribution(const A* q, A* log_p, A* prob) {
    V best = broadcast(kNever<A>);
    for (int64_t e = 0; e < size_; e += kWidth) best = greater<A>(best, load(q + e));
    const A largest = lane_max<A>(best);
    V sum = {};
    for (int64_t e = 0; e < size_; e += kWidth) {
      const V term = exponential(V(load(q + e) - largest));
      store(prob + e, term);
      sum += term;
    }
    const A total = lane_sum<A>(sum), log_total = natural_log(total);
    for (int64_t e = 0; e < size_; e += kWidth) {
      const V each = load(q + e);
      store(prob + e, load(prob + e) / total);
      store(log_p + e, each == kNever<A> ? V{} : V(each - largest - log_total));
    }
    return largest + log_total;
  }

  // Sigmoids scaled to sum to 1, as a softmax of their logarithms, which does not divide 0 by 0.
  void of_sigmoids(const A* z, A* log_p, A* prob) {
    for (int64_t e = 0; e < size_; e += kWidth) store(keys_ + e, -softplus<A>(-load(z + e)));
    distribution(keys_, log_p, prob);
  }

  // What experts are chosen by: -inf for those that must not be, the lowest number for NaN.
  void make_keys() {
    // Logits are in the order of their scores, and have not been rounded once more.
    const bool by_logit = !p_.bias && p_.expert_groups == 1;
    const A *from = by_logit ? (p_.noise ? noisy_ : z_) : gate_, *bias = static_cast<const A*>(p_.bias);
    const V lowest = broadcast(std::numeric_limits<A>::lowest()), never = broadcast(kNever<A>);
    for (int64_t e = 0; e < size_; e += kWidth) store(keys_ + e, load(from + e));
    for (int64_t e = 0; bias && e < p_.E; ++e) keys_[e] += bias[e];
    for (int64_t e = 0; e < size_; e += kWidth) {
      const V key = load(keys_ + e);
      store(keys_ + e, load(z_ + e) == never ? never : key == key ? key : lowest);
    }
  }

  // Leaves the experts of the best groups.
  void drop_groups() {
    const int64_t members = p_.E / p_.expert_groups;
    A* values = group_values_.get();
    for (int64_t g = 0; g < p_.expert_groups; ++g) {
      A first = kNever<A>, second = kNever<A>;
      for (int64_t e = g * members; e < (g + 1) * members; ++e) {
        if (keys_[e] > first) {
          second = first;
          first = keys_[e];
        } else if (keys_[e] > second) {
          second = keys_[e];
        }
      }
      const bool both = p_.group_score == GroupScore::top2 && second > kNever<A>;
      // Two experts with NaN must not make a group that has none.
      values[g] = both ? maximum(first + second, std::numeric_limits<A>::lowest()) : first;
    }
    for (int64_t dropped = p_.kept_groups; dropped < p_.expert_groups; ++dropped) {
      // The worst of those that are left, of equal ones the last; NaN is none of them.
      int64_t worst = -1;
      for (int64_t g = 0; g < p_.expert_groups; ++g) {
        if (values[g] != std::numeric_limits<A>::infinity() && (worst < 0 || values[g] <= values[worst])) worst = g;
      }
      if (worst < 0) return;
      values[worst] = std::numeric_limits<A>::infinity();
      for (int64_t e = worst * members; e < (worst + 1) * members; ++e) keys_[e] = kNever<A>;
    }
  }

  // The k largest keys, ties by place; overwrites the keys.
  void take_best(A* keys, int64_t count, int64_t filled, int64_t k, int64_t* best) {
    if (k > 16) {
      if (!places_.get()) places_.allocate(p_.E);
      int64_t* places = places_.get();
      for (int64_t e = 0; e < count; ++e) places[e] = e;
      std::partial_sort(places, places + k, places + count,
                        [keys](int64_t a, int64_t b) { return keys[a] > keys[b] || (keys[a] == keys[b] && a < b); });
      for (int64_t j = 0; j < k; ++j) best[j] = keys[places[j]] == kNever<A> ? -1 : places[j];
      return;
    }
    for (int64_t j = 0; j < k; ++j) {
      V most = load(keys);
      for (int64_t e = kWidth; e < filled; e += kWidth) most = greater<A>(most, load(keys + e));
      const A largest = lane_max<A>(most);
      if (largest == kNever<A>) {
        best[j] = -1;
        continue;
      }
      int64_t at = 0;
      unsigned bits;
      while ((bits = bits_of<Index>(load(keys + at) == largest)) == 0) at += kWidth;
      at += __builtin_ctz(bits);
      best[j] = at;
      keys[at] = kNever<A>;
    }
  }

  void gates_backward(const int64_t* experts, const A* d_gates, A* dz) {
    A total = 0, mean = 0;
    if (p_.renormalize) {
      for (int64_t j = 0; j < p_.k; ++j) total += experts[j] >= 0 ? gate_[experts[j]] : A(0);
      if (total == 0) return;
      for (int64_t j = 0; j < p_.k; ++j) mean += experts[j] >= 0 ? d_gates[j] * gate_[experts[j]] / total : A(0);
    }
    const A factor = p_.renormalize ? 1 / total : A(1);
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    A weighted = 0;
    for (int64_t j = 0; j < p_.k; ++j) {
      if (experts[j] < 0) continue;
      const A g = gate_[experts[j]], d = (d_gates[j] - mean) * factor;
      dz[experts[j]] += of_sigmoid ? d * g * (1 - g) : d * g;
      weighted += d * g;
    }
    if (of_sigmoid) return;
    for (int64_t e = 0; e < size_; e += kWidth) store(dz + e, load(dz + e) - load(gate_ + e) * weighted);
  }

  void chances_backward(int64_t last, const A* d_chance, A* dz) {
    const A sigma = static_cast<A>(p_.sigma), height = static_cast<A>(0.39894228040143267794) / sigma;
    const V threshold = broadcast(noisy_[last]);
    V sum = {};
    for (int64_t e = 0; e < size_; e += kWidth) {
      const V z = load(z_ + e), u = (z - threshold) / sigma, density = exponential(V(-u * u / 2)) * height;
      const V part = z == kNever<A> ? V{} : V(load(d_chance + e) * density);
      store(dz + e, load(dz + e) + part);
      sum += part;
    }
    dz[last] -= lane_sum<A>(sum);  // the threshold is a logit itself
  }

  const RouterProblem& p_;
  int64_t size_;
  Buffer<A> memory_, group_values_;
  Buffer<int64_t> places_;
  A *z_, *noisy_, *log_p_, *prob_, *noisy_prob_, *gate_, *keys_, *spare_;
  const A* gate_at_ = nullptr;
  A lse_ = 0;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
