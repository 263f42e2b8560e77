// What a router makes of a few tokens: scores, sums over them for losses and metrics, and the derivative of both.
#pragma once

#include "expert_tokens.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Distribution function of the normal distribution; for float the product of the density and a polynomial in
// 1 / (1 + 0.3 |u|), fitted to a relative error of 3e-7.
INLINE Vec<float> normal_cdf(Vec<float> u) {
  const Vec<float> t = u < 0.0f ? -u : u, w = 1.0f / (1.0f + 0.3f * t);
  Vec<float> tail = w * -0.021055348f + 0.11473752f;
  for (const float c :
       {-0.2335104f, 0.19867313f, -0.08498841f, 0.099044755f, 0.077429526f, 0.110432126f, 0.11954933f, 0.11968778f}) {
    tail = tail * w + c;
  }
  tail = tail * w * exponential_of_negative(Vec<float>(-0.5f * t * t));
  return u > 0.0f ? 1.0f - tail : tail;
}
INLINE Vec<double> normal_cdf(Vec<double> u) {
  for (int i = 0; i < kLanes<double>; ++i) u[i] = 0.5 * erfc(-u[i] * 0.70710678118654752440);
  return u;
}

// From this distance on it is 0 or 1, and its density 0, in the type.
template <class A>
constexpr A kFar = sizeof(A) == 4 ? A(13.25) : A(39);

template <class A, class S>
class RouterBlock : public RouterTokens<A, S> {
  using Tokens = RouterTokens<A, S>;

 public:
  using Tokens::kTokens;
  using typename Tokens::Index;
  using typename Tokens::Mask;
  using typename Tokens::V;

  explicit RouterBlock(const RouterProblem& p) : Tokens(p), near_(p.E), lanes_(2 * p.k * kTokens) {}

  // Probabilities and gates.
  void score() {
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    clean_ = this->template distribution<true>(z_, terms_);
    lse_ = logsumexp();
    scored_ = z_;
    if (of_sigmoid) {
      if (p_.noise) {
        log_sigmoids(noisy_);
        noisy_share_ = this->template distribution<false>(logs_, noisy_terms_).share;
      }
      log_sigmoids(z_);
      clean_ = this->template distribution<true>(logs_, terms_);
      scored_ = logs_;
      const A* chosen_by = p_.noise ? noisy_ : z_;
      for (int64_t e = 0; e < p_.E; ++e) store_at(gate_, e, sigmoid<A>(load_at(chosen_by, e)));
      gate_terms_ = gate_;
      gate_share_ = broadcast(A(1));
    } else {
      if (p_.noise) noisy_share_ = this->template distribution<false>(noisy_, noisy_terms_).share;
      gate_terms_ = p_.noise ? noisy_terms_ : terms_;
      gate_share_ = p_.noise ? noisy_share_ : clean_.share;
    }
  }

  // A token with +inf has a logsumexp, but no probabilities.
  V logsumexp() const {
    constexpr A kInfinity = -kNever<A>;
    const V lse = clean_.largest + logarithm(clean_.total);
    Mask infinite = clean_.largest == kInfinity;
    if (bits_of<Index>(infinite) == 0) return lse;
    for (int64_t e = 0; e < p_.E; ++e) infinite &= load_at(z_, e) == load_at(z_, e);
    return infinite ? broadcast(kInfinity) : lse;
  }

  void choose() { Tokens::choose(gate_terms_, gate_share_); }

  // Chance of each expert to be above the last choice when its own noise is drawn again.
  void make_chances() {
    const Mask certain = last_choices() < 0;
    const int64_t count =
        measure_distances([this](int64_t e, V u) { store_at(chance_, e, u > V{} ? broadcast(A(1)) : V{}); });
    for (int64_t n = 0; n < count; ++n) {
      const int64_t e = near_.get()[n];
      const V chance = normal_cdf(load_at(distance_, e));
      // With fewer experts than choices each is chosen for certain.
      store_at(chance_, e, load_at(z_, e) == kNever<A> ? V{} : V(certain ? broadcast(A(1)) : chance));
    }
  }

  // Adds to sums (3, segments, E) of p, p with noise and chances, then (3, segments) of the squared logsumexp, entropy
  // and margin; an entry is a vector.
  void add_to(A* sums) const {
    // The largest probability is exp(0) times the share. NaN comes out.
    const V margin = (1 - exponential_of_negative(V(clean_.second - clean_.largest))) * clean_.share;
    const V values[] = {lse_ * lse_, logarithm(clean_.total) - clean_.mean_below, margin};
    for_segments([&](int64_t segment, Mask here) {
      const int64_t cells = p_.segments * p_.E;
      A *cell = sums + segment * p_.E * kTokens, *total = sums + (3 * cells + segment) * kTokens;
      add_array(cell, terms_, clean_.share, here);
      if (p_.noise) add_array(cell + cells * kTokens, noisy_terms_, noisy_share_, here);
      if (p_.load) add_array(cell + 2 * cells * kTokens, chance_, broadcast(A(1)), here);
      for (int64_t t = 0; t < 3; ++t) {
        A* to = total + t * p_.segments * kTokens;
        store_at(to, 0, load_at(to, 0) + only(values[t], here));
      }
    });
  }

  // Writes the choices and gates of tokens from `first` on, and counts the choices (segments, E) and tokens (segments).
  void write(const RouterScores& out, int64_t first, int64_t end, int64_t* counts) {
    const int64_t k = p_.k, experts = p_.E, count = minimum<int64_t>(kTokens, end - first);
    int64_t *to = out.experts + first * k, *of_segment[kTokens];
    A *gates = static_cast<A*>(out.gates) + first * k, *priority = static_cast<A*>(out.priority) + first;
    for (int q = 0; q < count; ++q) {
      of_segment[q] = counts + segment_[q] * experts;
      counts[p_.segments * experts + segment_[q]] -= live_[q];  // -1 where it is
    }
    V total = {};
    for (int64_t j = 0; j < k; ++j) {
      const V gate = gates_of(j);
      store_at(lanes_.get(), j, gate);
      total += gate;
    }
    for (int q = 0; q < count; ++q) priority[q] = lanes_.get()[q];
    for (int64_t j = 0; j < k; ++j) {
      A* gate = lanes_.get() + j * kTokens;
      if (p_.renormalize) store_at(gate, 0, total == V{} ? V{} : V(load_at(gate, 0) / total));
      const Index* chosen = chosen_.get() + j * kTokens;
      for (int q = 0; q < count; ++q) {
        const int64_t expert = chosen[q];
        to[q * k + j] = expert;
        gates[q * k + j] = gate[q];
        if (expert >= 0) ++of_segment[q][expert];
      }
    }
  }

  // Writes the gradient by the logits from `first` on; upstream gradients are laid out like the outputs. `finite`:
  // those of the chances are.
  void backward(const RouterGradients& g, int64_t first, int64_t end, bool finite) {
    const A* d_totals = static_cast<const A*>(g.d_totals);
    V factor = {}, share = {};
    for_segments([&](int64_t segment, Mask here) {
      factor = here ? broadcast(2 * d_totals[segment]) * lse_ : factor;
      share = here ? broadcast(d_totals[p_.segments + segment]) : share;
    });
    const V weighted = gates_backward(static_cast<const A*>(g.d_gates), first, end);
    V of_last = {};
    with_tables(static_cast<const A*>(g.d_sums), [&](auto d_p, auto d_noisy, auto d_chance) {
      clean_backward(d_p, factor, share, p_.noise ? V{} : weighted);
      if (p_.noise) noise_backward(d_noisy, weighted);
      if (p_.load) of_last = chances_backward(d_chance, finite);
    });
    for (int64_t e = 0; e < p_.E; ++e) {
      store_at(dz_, e, only(load_at(dz_, e), live_ & (load_at(z_, e) != kNever<A>)));
    }
    A* rows = static_cast<A*>(g.dlogits);
    write_rows(dz_, rows, first, end);
    // What belongs to single experts is added to the rows: not to dz, which is being read by vectors.
    const A* parts = lanes_.get();
    for (int64_t j = 0; j < p_.k; ++j) {
      const bool last = j == p_.k - 1;
      for (int q = 0; q < minimum<int64_t>(kTokens, end - first); ++q) {
        const int64_t expert = choice(j, q);
        if (expert < 0 || z_[expert * kTokens + q] == kNever<A>) continue;
        // The threshold of the chances is a logit itself.
        rows[(first + q) * p_.E + expert] += parts[j * kTokens + q] - (last ? of_last[q] : A(0));
      }
    }
  }

 private:
  using Tokens::below, Tokens::for_segments, Tokens::with_tables, Tokens::write_rows;
  using Tokens::chance_, Tokens::chosen_, Tokens::distance_, Tokens::dz_, Tokens::gate_, Tokens::live_, Tokens::logs_;
  using Tokens::choice, Tokens::load_at, Tokens::only, Tokens::store_at;
  using Tokens::noisy_, Tokens::noisy_terms_, Tokens::p_, Tokens::segment_, Tokens::terms_, Tokens::z_;

  void add_array(A* to, const A* terms, V share, Mask here) const {
    const int64_t experts = p_.E;
    for (int64_t e = 0; e < experts; ++e) store_at(to, e, load_at(to, e) + only(load_at(terms, e) * share, here));
  }

  // Sigmoids scaled to sum to 1 are a softmax of their logarithms, which does not divide 0 by 0.
  void log_sigmoids(const A* z) {
    for (int64_t e = 0; e < p_.E; ++e) store_at(logs_, e, -softplus<A>(-load_at(z, e)));
  }

  Mask last_choices() const { return load(chosen_.get() + (p_.k - 1) * kTokens); }
  // Of the j-th choices, not renormalised; 0 for none.
  V gates_of(int64_t j) const {
    const Index* chosen = chosen_.get() + j * kTokens;
    A gates[kTokens];
    for (int q = 0; q < kTokens; ++q) gates[q] = chosen[q] < 0 ? A(0) : gate_terms_[chosen[q] * kTokens + q];
    return only(load(static_cast<const A*>(gates)) * gate_share_, load(chosen) >= 0);  // a share may be NaN
  }

  // Calls for each expert with the distances of its logits from the noisy logits of the last choices, in units of the
  // noise; they stay in distance_. Returns how many experts are in near_: those with a distance that is not far, or
  // NaN.
  template <class Function>
  int64_t measure_distances(Function function) {
    const Mask last = last_choices();
    A thresholds[kTokens];
    // Every logit is far above none.
    for (int q = 0; q < kTokens; ++q) thresholds[q] = last[q] < 0 ? kNever<A> : noisy_[last[q] * kTokens + q];
    const V threshold = load(static_cast<const A*>(thresholds)), per_sigma = broadcast(inverse_sigma());
    const int64_t experts = p_.E;
    int64_t count = 0, *near = near_.get();
    for (int64_t e = 0; e < experts; ++e) {
      const V u = (load_at(z_, e) - threshold) * per_sigma;
      store_at(distance_, e, u);
      function(e, u);
      near[count] = e;
      count += bits_of<Index>(absolute<A>(u) >= kFar<A>) != (1u << kTokens) - 1;
    }
    return count;
  }
  // Finite, so that the last choice itself is at distance 0.
  A inverse_sigma() const { return minimum(1 / static_cast<A>(p_.sigma), A(1e30)); }

  // Leaves in lanes_ what goes to each choice; returns what all logits of a token share, times their gates.
  V gates_backward(const A* d_gates, int64_t first, int64_t end) {
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    const int64_t k = p_.k, count = minimum<int64_t>(kTokens, end - first);
    A *parts = lanes_.get(), *gates = parts + k * kTokens;
    V total = {}, mean = {}, weighted = {};
    for (int64_t j = 0; j < k; ++j) {
      A d[kTokens] = {};
      for (int q = 0; q < count; ++q) d[q] = choice(j, q) < 0 ? A(0) : d_gates[(first + q) * k + j];
      const V gate = gates_of(j);
      store_at(parts, j, load(static_cast<const A*>(d)));
      store_at(gates, j, gate);
      total += gate;
    }
    const auto empty = total == V{};
    for (int64_t j = 0; p_.renormalize && j < k; ++j) mean += load_at(parts, j) * load_at(gates, j) / total;
    for (int64_t j = 0; j < k; ++j) {
      const V gate = load_at(gates, j);
      V part = load_at(parts, j) * gate;
      if (p_.renormalize) part = empty ? V{} : V((load_at(parts, j) - mean) / total * gate);
      store_at(parts, j, of_sigmoid ? V(part * (1 - gate)) : part);
      weighted += part;
    }
    return of_sigmoid ? V{} : weighted;
  }

  template <class Table>
  void clean_backward(Table d_p, V factor, V share, V weighted) {
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    const int64_t experts = p_.E;
    const Distribution clean = clean_;
    const A* scored = scored_;
    V mean = {};
    for (int64_t e = 0; e < experts; ++e) mean += load_at(terms_, e) * d_p[e];
    V constant = share * clean.mean_below - mean * clean.share;
    if (!of_sigmoid) constant += factor - weighted;
    for (int64_t e = 0; e < experts; ++e) {
      const V slope = d_p[e] + constant - share * below(load_at(scored, e), clean.largest);
      store_at(dz_, e, load_at(terms_, e) * (slope * clean.share));
    }
    for (int64_t e = 0; of_sigmoid && e < experts; ++e) {
      const V z = load_at(z_, e);
      store_at(dz_, e, load_at(dz_, e) * (1 - sigmoid<A>(z)) + factor * exponential(V(z - lse_)));
    }
  }

  template <class Table>
  void noise_backward(Table d_p, V weighted) {
    const bool of_sigmoid = p_.score == RouterScore::sigmoid;
    const int64_t experts = p_.E;
    V mean = {};
    for (int64_t e = 0; e < experts; ++e) mean += load_at(noisy_terms_, e) * d_p[e];
    const V constant = -(mean * noisy_share_ + weighted), share = noisy_share_;
    for (int64_t e = 0; e < experts; ++e) {
      V d = load_at(noisy_terms_, e) * ((d_p[e] + constant) * share);
      if (of_sigmoid) d = d * (1 - sigmoid<A>(load_at(noisy_, e)));
      store_at(dz_, e, load_at(dz_, e) + d);
    }
  }

  // Returns what the logit of the last choice loses.
  template <class Table>
  V chances_backward(Table d_chance, bool finite) {
    const A height = static_cast<A>(0.39894228040143267794) * inverse_sigma();
    const Mask certain = last_choices() < 0;
    const int64_t near = measure_distances([](int64_t, V) {}), count = finite ? near : p_.E;
    V sum = {};
    for (int64_t n = 0; n < count; ++n) {
      const int64_t e = finite ? near_.get()[n] : n;
      const V u = load_at(distance_, e), density = exponential_of_negative(V(-u * u / 2)) * height;
      const V part = only(d_chance[e] * density, (load_at(z_, e) != kNever<A>)&~certain);
      store_at(dz_, e, load_at(dz_, e) + part);
      sum += part;
    }
    return sum;
  }

  using typename Tokens::Distribution;
  Buffer<int64_t> near_;
  Buffer<A> lanes_;  // two vectors for each choice
  const A *gate_terms_ = nullptr, *scored_ = nullptr;
  Distribution clean_ = {};
  V lse_ = {}, noisy_share_ = {}, gate_share_ = {};
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
