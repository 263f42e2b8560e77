// A few tokens of a router, one in each lane of a vector: their logits, their distributions, their choices.
#pragma once

#include <algorithm>

#include "../expert_routing.h"
#include "logistic.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class A>
constexpr A kNever = -std::numeric_limits<A>::infinity();

// One array of a block is E vectors, in which lane q belongs to the q-th token: what is done to one token is done to
// all of them without a step across lanes, and equal tokens have equal results. Experts that a token must not choose
// have the logit -inf and probability 0. Lanes that are not live hold anything.
template <class A, class S>
class RouterTokens {
 public:
  using V = Vec<A>;
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Mask = Vec<Index>;
  static constexpr int kTokens = kLanes<A>;

  bool live(int q) const { return live_[q] != 0; }
  int64_t segment(int q) const { return segment_[q]; }
  // The j-th choice of a token, -1 for none.
  int64_t choice(int64_t j, int q) const { return chosen_.get()[j * kTokens + q]; }

  // The tokens from `first` on that are below `end`; false where none of them is routed.
  bool read(int64_t first, int64_t end) {
    Mask some = {};
    read_rows(static_cast<const S*>(p_.logits), p_.logits_stride, first, end, [&](int64_t e, V z) {
      some |= z != kNever<A>;
      store_at(z_, e, z);
    });
    if (p_.allowed) some = forbid(first, end);
    Index routed[kTokens], segment[kTokens];
    for (int q = 0; q < kTokens; ++q) {
      const int64_t i = first + q;
      routed[q] = i < end && (!p_.valid || p_.valid[i]) ? -1 : 0;
      segment[q] = i < end && p_.segment ? static_cast<Index>(p_.segment[i]) : 0;
    }
    live_ = some & load(static_cast<const Index*>(routed));
    segment_ = load(static_cast<const Index*>(segment));
    if (bits_of<Index>(live_) == 0) return false;
    if (p_.noise) {
      const V sigma = broadcast(static_cast<A>(p_.sigma));
      read_rows(static_cast<const A*>(p_.noise), p_.E, first, end,
                [&](int64_t e, V noise) { store_at(noisy_, e, load_at(z_, e) + sigma * noise); });
    }
    return true;
  }

 protected:
  // The k best experts by their gates, terms * share, or by their logits where these are in the same order: they have
  // not been rounded once more.
  void choose(const A* terms, V share) {
    const bool by_logit = !p_.bias && p_.expert_groups == 1;
    const A* logits = p_.noise ? noisy_ : z_;
    if (by_logit && p_.k <= 2) {
      p_.k == 1 ? insert<1>(logits) : insert<2>(logits);
      // Neither NaN nor -inf is above anything: who found k experts has none of them among the best.
      if (bits_of<Index>(live_ & (load(chosen_.get() + (p_.k - 1) * kTokens) < 0)) == 0) return;
    }
    by_logit ? make_keys(logits, broadcast(A(1))) : make_keys(terms, share);
    if (p_.expert_groups > 1) {
      for (int q = 0; q < kTokens; ++q) of_one(q, [this](A* keys) { drop_groups(keys); });
    }
    if (p_.k > kInsertions) {
      for (int q = 0; q < kTokens; ++q) {
        of_one(q, [this, q](A* keys) { sort_best(keys, q); });
      }
    } else {
      p_.k == 1 ? insert<1>(keys_) : p_.k == 2 ? insert<2>(keys_) : insert<0>(keys_);
    }
  }

 public:
  // The experts that tokens are given, or chose in the forward pass.
  void take(const int64_t* experts, int64_t first, int64_t end) {
    const int64_t k = p_.k;
    Index* to = chosen_.get();
    for (int q = 0; q < kTokens; ++q) {
      for (int64_t j = 0; j < k; ++j) {
        to[j * kTokens + q] = live_[q] ? static_cast<Index>(experts[(first + q) * k + j]) : -1;
      }
    }
  }

 protected:
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  // Up to so many choices are found by insertion.
  static constexpr int64_t kInsertions = 16;

  explicit RouterTokens(const RouterProblem& p)
      : p_(p), memory_(13 * p.E * kTokens), row_(p.E), group_values_(p.expert_groups), chosen_(p.k * kTokens) {
    A* at = memory_.get();
    for (A** array : {&z_, &noisy_, &logs_, &terms_, &noisy_terms_, &gate_, &keys_, &chance_, &distance_, &dz_,
                      &tables_[0], &tables_[1], &tables_[2]}) {
      *array = at;
      at += p.E * kTokens;
    }
  }

  // Softmax of q is exp(q - largest) * share.
  struct Distribution {
    V largest, second, total, share, mean_below;  // mean_below: of q - largest, which is not above 0
  };

  // Arrays are aligned; and plain vectors, unlike those of load and store, cannot be taken for pointers and sizes,
  // which would be read again after each of them.
  INLINE static V load_at(const A* array, int64_t e) { return reinterpret_cast<const V*>(array)[e]; }
  INLINE static void store_at(A* array, int64_t e, V v) { reinterpret_cast<V*>(array)[e] = v; }
  INLINE static V only(V v, Mask here) { return bit_cast<V>(bit_cast<Mask>(v) & here); }

  // Finite where a logit is -inf, so that its product with a probability is 0.
  INLINE static V below(V q, V largest) { return greater<A>(broadcast(A(-1e30)), q - largest); }

  // Writes exp(q - largest); the second largest and the mean distance are those of the clean distribution alone.
  template <bool kClean>
  Distribution distribution(const A* q, A* terms) const {
    const int64_t experts = p_.E;
    V largest = broadcast(kNever<A>), second = largest, total = {}, weighted = {};
    for (int64_t e = 0; e < experts; ++e) {
      const V each = load_at(q, e), smaller = each < largest ? each : largest;
      if (kClean) second = greater<A>(second, smaller);
      largest = greater<A>(largest, each);
    }
    for (int64_t e = 0; e < experts; ++e) {
      const V distance = kClean ? below(load_at(q, e), largest) : V(load_at(q, e) - largest);
      const V term = exponential_of_negative(distance);
      store_at(terms, e, term);
      total += term;
      if (kClean) weighted += term * distance;
    }
    const V share = 1 / total;
    return {largest, second, total, share, weighted * share};
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
  // Numbers of one segment, or of each token's own, for each expert.
  struct OfAll {
    const A* row;
    INLINE V operator[](int64_t e) const { return broadcast(row[e]); }
  };
  struct OfEach {
    const A* lanes;
    INLINE V operator[](int64_t e) const { return load_at(lanes, e); }
  };
  // Calls with three tables (3, segments, E) as the live tokens see them: neighbours are mostly of one segment.
  template <class Function>
  void with_tables(const A* tables, Function function) const {
    const int64_t experts = p_.E, cells = p_.segments * experts;
    const Index first = segment_[__builtin_ctz(bits_of<Index>(live_))];
    if (bits_of<Index>(live_ & (segment_ != first)) == 0) {
      const A* row = tables + first * experts;
      function(OfAll{row}, OfAll{row + cells}, OfAll{row + 2 * cells});
      return;
    }
    for_segments([&](int64_t segment, Mask here) {
      for (int t = 0; t < 3; ++t) {
        const A* row = tables + t * cells + segment * experts;
        A* lanes = tables_[t];
        for (int64_t e = 0; e < experts; ++e) store_at(lanes, e, here ? broadcast(row[e]) : load_at(lanes, e));
      }
    });
    function(OfEach{tables_[0]}, OfEach{tables_[1]}, OfEach{tables_[2]});
  }

  // Calls for each expert with what rows from `first` on have of it; beyond the last row it is read again.
  template <class From, class Function>
  INLINE void read_rows(const From* rows, int64_t stride, int64_t first, int64_t end, Function function) const {
    const From* row[kTokens];
    for (int q = 0; q < kTokens; ++q) row[q] = rows + minimum(first + q, end - 1) * stride;
    const int64_t experts = p_.E, whole = experts / kTokens * kTokens;
    Vec<Bits> tile[kTokens];
    for (int64_t e = 0; e < whole; e += kTokens) {
#pragma GCC unroll 16
      for (int q = 0; q < kTokens; ++q) {
        __builtin_prefetch(row[q] + kTokens * stride + e);  // by the next tokens; rows are not read one after the other
        tile[q] = bit_cast<Vec<Bits>>(to_accumulator<A>(row[q] + e));
      }
      transpose<Bits>(tile);
#pragma GCC unroll 16
      for (int c = 0; c < kTokens; ++c) function(e + c, bit_cast<V>(tile[c]));
    }
    for (int64_t e = whole; e < experts; ++e) {
      From column[kTokens];
      for (int q = 0; q < kTokens; ++q) column[q] = row[q][e];
      function(e, to_accumulator<A>(static_cast<const From*>(column)));
    }
  }
  void write_rows(const A* from, A* rows, int64_t first, int64_t end) const {
    const int64_t experts = p_.E, whole = experts / kTokens * kTokens, count = minimum<int64_t>(kTokens, end - first);
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

 private:
  // Leaves the experts that are allowed; returns which tokens have any.
  Mask forbid(int64_t first, int64_t end) {
    const int64_t experts = p_.E;
    for (int q = 0; q < minimum<int64_t>(kTokens, end - first); ++q) {
      const bool* allowed = p_.allowed + (first + q) * p_.allowed_row_stride;
      for (int64_t e = 0; e < experts; ++e) {
        if (!allowed[e * p_.allowed_stride]) z_[e * kTokens + q] = kNever<A>;
      }
    }
    Mask some = {};
    for (int64_t e = 0; e < experts; ++e) some |= load_at(z_, e) != kNever<A>;
    return some;
  }

  // The best k = K experts by insertion, or p_.k for K = 0; of equal ones the first stays.
  template <int K>
  void insert(const A* keys) {
    const int64_t k = K ? K : p_.k, experts = p_.E;
    Mask best[K ? K : kInsertions];
    V value[K ? K : kInsertions];
    for (int64_t j = 0; j < k; ++j) {
      best[j] = Mask{} - 1;
      value[j] = broadcast(kNever<A>);
    }
    for (int64_t e = 0; e < experts; ++e) {
      V key = load_at(keys, e);
      Mask expert = Mask{} + static_cast<Index>(e), moves = {};
      for (int64_t j = 0; j < k; ++j) {
        moves |= key > value[j];  // what an expert pushes out pushes out all that follow
        const V next = value[j];
        const Mask next_expert = best[j];
        value[j] = moves ? key : next;
        best[j] = moves ? expert : next_expert;
        key = moves ? next : key;
        expert = moves ? next_expert : expert;
      }
    }
    // -1 for tokens that are not live.
    for (int64_t j = 0; j < k; ++j) store(chosen_.get() + j * kTokens, best[j] | ~live_);
  }

  // What experts are chosen by: -inf for those that must not be, the lowest number for NaN.
  void make_keys(const A* from, V share) {
    const A* bias = static_cast<const A*>(p_.bias);
    const V lowest = broadcast(std::numeric_limits<A>::lowest()), never = broadcast(kNever<A>);
    for (int64_t e = 0; e < p_.E; ++e) {
      const V key = load_at(from, e) * share + (bias ? bias[e] : A(0));
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
      chosen_.get()[j * kTokens + q] = none || !live_[q] ? -1 : static_cast<Index>(places[j]);
    }
  }

 protected:
  const RouterProblem& p_;

 private:
  Buffer<A> memory_, row_, group_values_;
  Buffer<int64_t> places_;

 protected:
  Buffer<Index> chosen_;
  A *z_, *noisy_, *logs_, *terms_, *noisy_terms_, *gate_, *keys_, *chance_, *distance_, *dz_, *tables_[3];
  Mask live_ = {}, segment_ = {};
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
