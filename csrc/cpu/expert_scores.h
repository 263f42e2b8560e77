// A few tokens at a time through a router, one in each lane of a vector: scores, choices, and their derivative.
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

// One array of a block is E vectors, in which lane q belongs to the q-th token: what is done to one token is done to
// all of them without a step across lanes, and equal tokens have equal results. Experts that a token must not choose
// have the logit -inf and probability 0. Lanes that are not live hold anything.
template <class A, class S>
class RouterBlock {
 public:
  using V = Vec<A>;
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Mask = Vec<Index>;
  static constexpr int kTokens = kLanes<A>;

  explicit RouterBlock(const RouterProblem& p)
      : p_(p), memory_(10 * p.E * kTokens), row_(p.E), group_values_(p.expert_groups), chosen_(p.k * kTokens) {
    A* at = memory_.get();
    for (A** array : {&z_, &noisy_, &logs_, &prob_, &noisy_prob_, &gate_, &keys_, &chance_, &d_sums_, &dz_}) {
      *array = at;
      at += p.E * kTokens;
    }
  }

  bool live(int q) const { return live_[q] != 0; }
  int64_t segment(int q) const { return segment_[q]; }
  // The j-th choice of a token, -1 for none, and its gate.
  int64_t choice(int64_t j, int q) const { return chosen_.get()[j * kTokens + q]; }
  A gate(int64_t expert, int q) const { return expert < 0 ? A(0) : gate_at_[expert * kTokens + q]; }

  // The tokens from `first` on that are below `end`; false where none of them is routed.
  bool read(int64_t first, int64_t end) {
    read_rows(static_cast<const S*>(p_.logits), p_.logits_stride, first, end, z_);
    if (p_.allowed) {
      for (int q = 0; q < minimum<int64_t>(kTokens, end - first); ++q) {
        const bool* allowed = p_.allowed + (first + q) * p_.allowed_row_stride;
        for (int64_t e = 0; e < p_.E; ++e) {
          if (!allowed[e * p_.allowed_stride]) z_[e * kTokens + q] = kNever<A>;
        }
      }
    }
    Mask some = {};
    const int64_t experts = p_.E;
    for (int64_t e = 0; e < experts; ++e) some |= load_at(z_, e) != kNever<A>;
    Index routed[kTokens], segment[kTokens];
    for (int q = 0; q < kTokens; ++q) {
      const int64_t i = first + q;
      routed[q] = i < end && (!p_.valid || p_.valid[i]) ? -1 : 0;
      segment[q] = i < end && p_.segment ? static_cast<Index>(p_.segment[i]) : 0;
    }
    live_ = some & load(routed);
    segment_ = load(segment);
    if (p_.noise) read_rows(static_cast<const A*>(p_.noise), p_.E, first, end, noisy_);
    return bits_of<Index>(live_) != 0;
  }

  // Probabilities and gates.
  void score() {
    const V sigma = broadcast(static_cast<A>(p_.sigma));
    for (int64_t e = 0; p_.noise && e < p_.E; ++e) store_at(noisy_, e, load_at(z_, e) + sigma * load_at(noisy_, e));
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    const A* chosen_by = p_.noise ? noisy_ : z_;
    clean_ = distribution(z_, prob_);
    lse_ = clean_.largest + clean_.log_total;
    logs_at_ = z_;
    gate_at_ = p_.noise ? noisy_prob_ : prob_;
    if (of_sigmoid) {
      if (p_.noise) {
        log_sigmoids(noisy_);
        distribution(logs_, noisy_prob_);
      }
      log_sigmoids(z_);
      clean_ = distribution(logs_, prob_);
      logs_at_ = logs_;
      for (int64_t e = 0; e < p_.E; ++e) store_at(gate_, e, sigmoid<A>(load_at(chosen_by, e)));
      gate_at_ = gate_;
    } else if (p_.noise) {
      distribution(noisy_, noisy_prob_);
    }
  }

  // The k best experts.
  void choose() {
    make_keys();
    if (p_.expert_groups > 1) {
      for (int q = 0; q < kTokens; ++q) of_one(q, [this](A* keys) { drop_groups(keys); });
    }
    if (p_.k > kInsertions) {
      for (int q = 0; q < kTokens; ++q) {
        of_one(q, [this, q](A* keys) { sort_best(keys, q); });
      }
      return;
    }
    Mask best[kInsertions];
    V value[kInsertions];
    for (int64_t j = 0; j < p_.k; ++j) {
      best[j] = Mask{} - 1;
      value[j] = broadcast(kNever<A>);
    }
    for (int64_t e = 0; e < p_.E; ++e) {
      V key = load_at(keys_, e);
      Mask expert = Mask{} + static_cast<Index>(e), moves = {};
      for (int64_t j = 0; j < p_.k; ++j) {
        moves |= key > value[j];  // of equal ones the first stays, and what it pushes out pushes out all that follow
        const V next = value[j];
        const Mask next_expert = best[j];
        value[j] = moves ? key : next;
        best[j] = moves ? expert : next_expert;
        key = moves ? next : key;
        expert = moves ? next_expert : expert;
      }
    }
    for (int64_t j = 0; j < p_.k; ++j) store(chosen_.get() + j * kTokens, best[j]);
  }
  // The experts that tokens are given, or chose in the forward pass.
  void take(const int64_t* experts, int64_t first, int64_t end) {
    for (int q = 0; q < kTokens; ++q) {
      for (int64_t j = 0; j < p_.k; ++j) {
        chosen_.get()[j * kTokens + q] = first + q < end ? static_cast<Index>(experts[(first + q) * p_.k + j]) : -1;
      }
    }
  }

  // Chance of each expert to be above the last choice when its own noise is drawn again.
  void make_chances() {
    const V per_sigma = broadcast(inverse_sigma());
    const auto [threshold, certain] = last_choices();
    for (int64_t e = 0; e < p_.E; ++e) {
      const V z = load_at(z_, e), chance = normal_cdf(V((z - threshold) * per_sigma));
      // With fewer experts than choices each is chosen for certain.
      store_at(chance_, e, z == kNever<A> ? V{} : V(certain ? broadcast(A(1)) : chance));
    }
  }

  // Adds to sums (3, segments, E) of p, p with noise and chances, then (3, segments) of the squared logsumexp, entropy
  // and margin; an entry is a vector.
  void add_to(A* sums) const {
    V entropy = {};
    for (int64_t e = 0; e < p_.E; ++e) entropy -= load_at(prob_, e) * log_probability(e);
    // The largest probability is exp(0) / total. NaN comes out.
    const V margin = (1 - exponential(V(clean_.second - clean_.largest))) / clean_.total;
    for_segments([&](int64_t segment, Mask here) {
      const int64_t cells = p_.segments * p_.E;
      A *cell = sums + segment * p_.E * kTokens, *total = sums + (3 * cells + segment) * kTokens;
      add_array(cell, prob_, here);
      if (p_.noise) add_array(cell + cells * kTokens, noisy_prob_, here);
      if (p_.load) add_array(cell + 2 * cells * kTokens, chance_, here);
      const V values[] = {lse_ * lse_, entropy, margin};
      for (int64_t t = 0; t < 3; ++t) {
        A* to = total + t * p_.segments * kTokens;
        store_at(to, 0, load_at(to, 0) + only(values[t], here));
      }
    });
  }

  // Writes the gradient by the logits from `first` on; upstream gradients are laid out like the outputs.
  void backward(const RouterGradients& g, int64_t first, int64_t end) {
    const A *d_sums = static_cast<const A*>(g.d_sums), *d_totals = static_cast<const A*>(g.d_totals);
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    V share = {}, factor = {};
    for_segments([&](int64_t segment, Mask here) {
      factor = here ? broadcast(2 * d_totals[segment]) * lse_ : factor;
      share = here ? broadcast(d_totals[p_.segments + segment]) : share;
    });
    V mean = {}, mean_log = {};
    const OfSegments d_p = of_segments(d_sums);
    for (int64_t e = 0; e < p_.E; ++e) {
      mean += load_at(prob_, e) * d_p[e];
      mean_log += load_at(prob_, e) * log_probability(e);
    }
    for (int64_t e = 0; e < p_.E; ++e) {
      const V p = load_at(prob_, e), z = load_at(z_, e);
      V d = p * (d_p[e] - mean) - share * p * (log_probability(e) - mean_log);
      if (of_sigmoid) d = d * (1 - sigmoid<A>(z)) + factor * exponential(V(z - lse_));
      store_at(dz_, e, of_sigmoid ? d : V(d + factor * p));
    }
    gates_backward(static_cast<const A*>(g.d_gates), first, end);
    if (p_.noise) noise_backward(d_sums + p_.segments * p_.E);
    if (p_.load) chances_backward(d_sums + 2 * p_.segments * p_.E);
    for (int64_t e = 0; e < p_.E; ++e) {
      store_at(dz_, e, only(load_at(dz_, e), live_ & (load_at(z_, e) != kNever<A>)));
    }
    write_rows(static_cast<A*>(g.dlogits), first, end);
  }

 private:
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  // Up to so many choices are found by insertion.
  static constexpr int64_t kInsertions = 16;

  struct Distribution {
    V largest, second, total, log_total;
  };

  // Arrays are aligned; and plain vectors, unlike those of load and store, cannot be taken for pointers and sizes,
  // which would be read again after each of them.
  INLINE static V load_at(const A* array, int64_t e) { return reinterpret_cast<const V*>(array)[e]; }
  INLINE static void store_at(A* array, int64_t e, V v) { reinterpret_cast<V*>(array)[e] = v; }
  INLINE static V only(V v, Mask here) { return bit_cast<V>(bit_cast<Mask>(v) & here); }

  // Rows from `first` on as vectors of tokens; beyond the last row it is read again.
  template <class From>
  void read_rows(const From* rows, int64_t stride, int64_t first, int64_t end, A* to) const {
    const From* row[kTokens];
    for (int q = 0; q < kTokens; ++q) row[q] = rows + minimum(first + q, end - 1) * stride;
    const int64_t experts = p_.E, whole = experts / kTokens * kTokens;
    Vec<Bits> tile[kTokens];
    for (int64_t e = 0; e < whole; e += kTokens) {
#pragma GCC unroll 16
      for (int q = 0; q < kTokens; ++q) tile[q] = bit_cast<Vec<Bits>>(to_accumulator<A>(row[q] + e));
      transpose<Bits>(tile);
#pragma GCC unroll 16
      for (int c = 0; c < kTokens; ++c) store_at(to, e + c, bit_cast<V>(tile[c]));
    }
    for (int64_t e = whole; e < experts; ++e) {
      From column[kTokens];
      for (int q = 0; q < kTokens; ++q) column[q] = row[q][e];
      store_at(to, e, to_accumulator<A>(static_cast<const From*>(column)));
    }
  }
  void write_rows(A* rows, int64_t first, int64_t end) const {
    const int64_t experts = p_.E, whole = experts / kTokens * kTokens, count = minimum<int64_t>(kTokens, end - first);
    const A* from = dz_;
    Vec<Bits> tile[kTokens];
    for (int64_t e = 0; e < whole; e += kTokens) {
#pragma GCC unroll 16
      for (int c = 0; c < kTokens; ++c) tile[c] = bit_cast<Vec<Bits>>(load_at(from, e + c));
      transpose<Bits>(tile);
      for (int q = 0; q < count; ++q) store(rows + (first + q) * experts + e, bit_cast<V>(tile[q]));
    }
    for (int64_t e = whole; e < experts; ++e) {
      for (int q = 0; q < count; ++q) rows[(first + q) * experts + e] = from[e * kTokens + q];
    }
  }

  // Calls for each segment of live tokens with the mask of its tokens.
  template <class Function>
  void for_segments(Function function) const {
    unsigned left = bits_of<Index>(live_);
    while (left) {
      const Index segment = segment_[__builtin_ctz(left)];
      const Mask here = live_ & (segment_ == segment);
      left &= ~bits_of<Index>(here);
      function(segment, here);
    }
  }

  void add_array(A* to, const A* array, Mask here) const {
    for (int64_t e = 0; e < p_.E; ++e) store_at(to, e, load_at(to, e) + only(load_at(array, e), here));
  }
  // Numbers (segments, E), of each token those of its segment: one row for all where they agree, as neighbours do.
  struct OfSegments {
    const A *row, *lanes;
    INLINE V operator[](int64_t e) const { return row ? broadcast(row[e]) : load_at(lanes, e); }
  };
  OfSegments of_segments(const A* table) {
    const Index first = segment_[__builtin_ctz(bits_of<Index>(live_))];
    if (bits_of<Index>(live_ & (segment_ != first)) == 0) return {table + first * p_.E, nullptr};
    for_segments([&](int64_t segment, Mask here) {
      const int64_t experts = p_.E;
      for (int64_t e = 0; e < experts; ++e) {
        store_at(d_sums_, e, here ? broadcast(table[segment * experts + e]) : load_at(d_sums_, e));
      }
    });
    return {nullptr, d_sums_};
  }

  // Softmax of q, and what is known of it.
  Distribution distribution(const A* q, A* prob) const {
    V largest = broadcast(kNever<A>), second = largest, total = {};
    for (int64_t e = 0; e < p_.E; ++e) {
      const V each = load_at(q, e), smaller = each < largest ? each : largest;
      second = greater<A>(second, smaller);
      largest = greater<A>(largest, each);
    }
    for (int64_t e = 0; e < p_.E; ++e) {
      const V term = exponential(V(load_at(q, e) - largest));
      store_at(prob, e, term);
      total += term;
    }
    const V share = 1 / total;
    for (int64_t e = 0; e < p_.E; ++e) store_at(prob, e, load_at(prob, e) * share);
    return {largest, second, total, logarithm(total)};
  }
  // Of p; finite where p is 0, so that their product is 0.
  V log_probability(int64_t e) const {
    const V below = load_at(logs_at_, e) - clean_.largest;
    return greater<A>(broadcast(A(-1e30)), below) - clean_.log_total;
  }
  // Sigmoids scaled to sum to 1 are a softmax of their logarithms, which does not divide 0 by 0.
  void log_sigmoids(const A* z) {
    for (int64_t e = 0; e < p_.E; ++e) store_at(logs_, e, -softplus<A>(-load_at(z, e)));
  }

  // What experts are chosen by: -inf for those that must not be, the lowest number for NaN.
  void make_keys() {
    // Logits are in the order of their scores, and have not been rounded once more.
    const bool by_logit = !p_.bias && p_.expert_groups == 1;
    const A *from = by_logit ? (p_.noise ? noisy_ : z_) : gate_at_, *bias = static_cast<const A*>(p_.bias);
    const V lowest = broadcast(std::numeric_limits<A>::lowest()), never = broadcast(kNever<A>);
    for (int64_t e = 0; e < p_.E; ++e) {
      const V key = load_at(from, e) + (bias ? bias[e] : A(0));
      store_at(keys_, e, load_at(z_, e) == never ? never : V(key == key ? key : lowest));
    }
  }

  // The keys of one token, contiguous while `function` works on them.
  template <class Function>
  void of_one(int q, Function function) {
    A* row = row_.get();
    for (int64_t e = 0; e < p_.E; ++e) row[e] = keys_[e * kTokens + q];
    function(row);
    for (int64_t e = 0; e < p_.E; ++e) keys_[e * kTokens + q] = row[e];
  }

  // Leaves the experts of the best groups.
  void drop_groups(A* keys) {
    const int64_t members = p_.E / p_.expert_groups;
    A* values = group_values_.get();
    for (int64_t g = 0; g < p_.expert_groups; ++g) {
      A first = kNever<A>, second = kNever<A>;
      for (int64_t e = g * members; e < (g + 1) * members; ++e) {
        if (keys[e] > first) {
          second = first;
          first = keys[e];
        } else if (keys[e] > second) {
          second = keys[e];
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
      for (int64_t e = worst * members; e < (worst + 1) * members; ++e) keys[e] = kNever<A>;
    }
  }

  void sort_best(const A* keys, int q) {
    if (!places_.get()) places_.allocate(p_.E);
    int64_t* places = places_.get();
    for (int64_t e = 0; e < p_.E; ++e) places[e] = e;
    std::partial_sort(places, places + p_.k, places + p_.E,
                      [keys](int64_t a, int64_t b) { return keys[a] > keys[b] || (keys[a] == keys[b] && a < b); });
    for (int64_t j = 0; j < p_.k; ++j) {
      const bool none = keys[places[j]] == kNever<A>;
      chosen_.get()[j * kTokens + q] = none ? -1 : static_cast<Index>(places[j]);
    }
  }

  // Finite, so that the last choice itself is at distance 0.
  A inverse_sigma() const { return minimum(1 / static_cast<A>(p_.sigma), A(1e30)); }
  // The noisy logit of each token's last choice, and where there is none.
  std::pair<V, Mask> last_choices() const {
    V threshold = {};
    const Mask last = load(chosen_.get() + (p_.k - 1) * kTokens);
    for (int q = 0; q < kTokens; ++q) {
      if (last[q] >= 0) threshold[q] = noisy_[last[q] * kTokens + q];
    }
    return {threshold, last < 0};
  }

  void gates_backward(const A* d_gates, int64_t first, int64_t end) {
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    V weighted = {};
    for (int q = 0; q < minimum<int64_t>(kTokens, end - first); ++q) {
      if (!live(q)) continue;
      const A* d = d_gates + (first + q) * p_.k;
      A total = 1, mean = 0;
      if (p_.renormalize) {
        total = 0;
        for (int64_t j = 0; j < p_.k; ++j) total += gate(choice(j, q), q);
        if (total == 0) continue;
        for (int64_t j = 0; j < p_.k; ++j) {
          const A g = gate(choice(j, q), q);
          if (choice(j, q) >= 0) mean += d[j] * g / total;
        }
      }
      A sum = 0;
      for (int64_t j = 0; j < p_.k; ++j) {
        const int64_t expert = choice(j, q);
        if (expert < 0) continue;
        const A g = gate(expert, q), part = (d[j] - mean) / total * g;
        dz_[expert * kTokens + q] += of_sigmoid ? part * (1 - g) : part;
        sum += part;
      }
      weighted[q] = sum;
    }
    if (of_sigmoid) return;
    for (int64_t e = 0; e < p_.E; ++e) store_at(dz_, e, load_at(dz_, e) - load_at(gate_at_, e) * weighted);
  }

  void noise_backward(const A* d_noisy) {
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    V mean = {};
    const OfSegments d_p = of_segments(d_noisy);
    for (int64_t e = 0; e < p_.E; ++e) mean += load_at(noisy_prob_, e) * d_p[e];
    for (int64_t e = 0; e < p_.E; ++e) {
      V d = load_at(noisy_prob_, e) * (d_p[e] - mean);
      if (of_sigmoid) d = d * (1 - sigmoid<A>(load_at(noisy_, e)));
      store_at(dz_, e, load_at(dz_, e) + d);
    }
  }

  void chances_backward(const A* d_chance) {
    const A per_sigma = inverse_sigma(), height = static_cast<A>(0.39894228040143267794) * per_sigma;
    const auto [threshold, certain] = last_choices();
    V sum = {};
    const OfSegments d_p = of_segments(d_chance);
    for (int64_t e = 0; e < p_.E; ++e) {
      const V z = load_at(z_, e), u = (z - threshold) * per_sigma, density = exponential(V(-u * u / 2)) * height;
      const V part = only(d_p[e] * density, (z != kNever<A>)&~certain);
      store_at(dz_, e, load_at(dz_, e) + part);
      sum += part;
    }
    for (int q = 0; q < kTokens; ++q) {
      const int64_t last = choice(p_.k - 1, q);
      if (last >= 0) dz_[last * kTokens + q] -= sum[q];  // the threshold is a logit itself
    }
  }

  const RouterProblem& p_;
  Buffer<A> memory_, row_, group_values_;
  Buffer<Index> chosen_;
  Buffer<int64_t> places_;
  A *z_, *noisy_, *logs_, *prob_, *noisy_prob_, *gate_, *keys_, *chance_, *d_sums_, *dz_;
  const A *gate_at_ = nullptr, *logs_at_ = nullptr;
  Mask live_ = {}, segment_ = {};
  Distribution clean_ = {};
  V lse_ = {};
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
