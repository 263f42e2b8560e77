// Folds of blocks of logits: what a row or column is reduced to, in parts that merge in a fixed order.
//
// What a part holds depends on the kind:
//   logsumexp     a = max, b = sum of exp(l - max)
//   max           a = max, index = where
//   sums, count   a = sum
// Logits of -inf are pairs that take no part. Parts are short and merged in double: one sum over millions of numbers in
// float drifts, by thousandths where they are equal, and a count ends at 2^24.
#pragma once

#include "logistic.h"
#include "similarity_pairs.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class A>
struct Part {
  A *a, *b;
  int64_t* index;
  Part at(int64_t k) const { return {a + k, b ? b + k : b, index ? index + k : index}; }
};

// What parts are merged into: a = max or best, b = the sum.
template <class A>
struct Total {
  A* a;
  double* b;
  int64_t* index;
  Total at(int64_t k) const { return {a + k, b + k, index ? index + k : index}; }
};

template <FoldKind K>
using Kind = std::integral_constant<FoldKind, K>;

// Calls body with the kind as a constant.
template <class Body>
INLINE void with_kind(FoldKind kind, Body body) {
  switch (kind) {
#define CONTRASTIVE_OPS_CASE(name) \
  case FoldKind::name:             \
    return body(Kind<FoldKind::name>{});
    CONTRASTIVE_OPS_FOLDS(CONTRASTIVE_OPS_CASE)
#undef CONTRASTIVE_OPS_CASE
    case FoldKind::size:
      return;
  }
}

// ---- Numbers ---------------------------------------------------------------------------------------------

template <class A>
INLINE Vec<A> finite_or_zero(Vec<A> v) {
  const Vec<A> zero = {};
  return (v - v == zero) ? v : zero;  // inf - inf and NaN - NaN are NaN, which equals nothing
}
template <class A>
INLINE A finite_or_zero(A v) {
  return v - v == 0 ? v : 0;
}

// What one logit adds to a sum.
template <class A, FoldKind K>
INLINE Vec<A> term(Vec<A> l) {
  [[maybe_unused]] const auto nothing = l == broadcast(-infinity<A>());
  if constexpr (K == FoldKind::sum_softplus) return softplus<A>(l);
  if constexpr (K == FoldKind::sum_relu) return positive_part<A>(l);
  if constexpr (K == FoldKind::sum) return nothing ? Vec<A>{} : l;
  return nothing ? Vec<A>{} : broadcast(A(1));
}

// Its derivative times a weight.
template <class A, FoldKind K>
INLINE Vec<A> weighted_slope(Vec<A> weight, Vec<A> l) {
  const Vec<A> zero = {};
  if constexpr (K == FoldKind::sum_softplus) return weight * sigmoid<A>(l);
  if constexpr (K == FoldKind::sum_relu) return l > zero ? weight : zero;
  if constexpr (K == FoldKind::sum) return l != broadcast(-infinity<A>()) ? weight : zero;
  return zero;
}

// ---- Merging parts ---------------------------------------------------------------------------------------

// Whether a later candidate replaces the best so far: ties stay with the first, and NaN, once met, wins.
template <class A>
INLINE bool beats(A candidate, A best) {
  return candidate > best || (candidate != candidate && best == best);
}

// Merges kLanes parts. A logsumexp is a pair (max, sum of exp(l - max)); where the maximum is not finite, the sum is
// taken relative to 0, so that -inf rows give 0, and +inf and NaN propagate. A sum of 0 has no maximum.
template <class A, FoldKind K>
INLINE void merge_parts(Total<A> into, Part<A> from) {
  constexpr int W = kLanes<A>;
  if constexpr (K == FoldKind::logsumexp) {
    const Vec<A> max = load(into.a), other = load(from.a), top = greater<A>(other, max), zero = {};
    const Vec<A> reference = finite_or_zero<A>(top), part = load(from.b);
    const Vec<A> shift = finite_or_zero<A>(max) - reference;
    const Vec<A> added = part == zero ? part : part * exponential(finite_or_zero<A>(other) - reference);
    for (int q = 0; q < W; ++q) {
      // Rare: the largest so far is exceeded. In double, as it may happen with every part.
      if (shift[q] != 0 && into.b[q] != 0) into.b[q] *= exp(static_cast<double>(shift[q]));
      into.b[q] += added[q];
    }
    store(into.a, top);
  } else if constexpr (K == FoldKind::max) {
    for (int q = 0; q < W; ++q) {
      if (!beats(from.a[q], into.a[q])) continue;
      into.a[q] = from.a[q];
      into.index[q] = from.index[q];
    }
  } else {
    for (int q = 0; q < W; ++q) into.b[q] += from.a[q];
  }
}

// Copies kLanes parts.
template <class A, FoldKind K>
INLINE void copy_parts(Part<A> to, Part<A> from) {
  store(to.a, load(from.a));
  if constexpr (K == FoldKind::logsumexp) store(to.b, load(from.b));
  for (int q = 0; K == FoldKind::max && q < kLanes<A>; ++q) to.index[q] = from.index[q];
}

template <class A>
INLINE A finish(FoldKind kind, A a, double b) {
  if (kind == FoldKind::max) return a;
  if (kind != FoldKind::logsumexp) return static_cast<A>(b);
  return b == 0 ? -infinity<A>() : static_cast<A>(finite_or_zero(a) + log(b));
}

template <class A>
INLINE A empty_fold(FoldKind kind) {
  return kind == FoldKind::logsumexp || kind == FoldKind::max ? -infinity<A>() : 0;
}

// ---- Blocks ----------------------------------------------------------------------------------------------

// The sum of term(begin), term(begin + step), ... in groups of groups of 8: the same term hundreds of times is rounded
// in the same direction each time, and few additions follow one another here.
template <class A, int kGroup = 512, class Term>
INLINE Vec<A> sum_in_groups(int64_t begin, int64_t end, int64_t step, Term term) {
  Vec<A> sum = {};
  if constexpr (kGroup == 8) {
    for (int64_t k = begin; k < end; k += step) sum += term(k);
  } else {
    const int64_t size = kGroup / 8 * step;
    for (int64_t k = begin; k < end; k += size) {
      sum += sum_in_groups<A, kGroup / 8>(k, minimum(end, k + size), step, term);
    }
  }
  return sum;
}

// Lane by lane the best so far and its position along the loop.
template <class A>
INLINE void keep_best(Vec<A>& best, Vec<Id<A>>& at, Vec<A> l, Vec<Id<A>> position) {
  const auto better = (l > best) | ((l != l) & (best == best));
  best = better ? l : best;
  at = better ? position : at;
}

// Folds each row of a block; `j_begin` is the number of its first column in the matrix.
template <class A, FoldKind K>
void fold_rows(const A* l, int64_t rows, int64_t cols, int64_t j_begin, Part<A> out) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = l + i * kBlock;
    if constexpr (K == FoldKind::logsumexp) {
      Vec<A> top = broadcast(-infinity<A>());
      for (int64_t j = 0; j < cols; j += W) top = greater<A>(load(row + j), top);
      const A max = lane_max<A>(top), reference = finite_or_zero(max);
      const auto term_at = [=](int64_t j) { return exponential(load(row + j) - reference); };
      out.a[i] = max;
      out.b[i] = lane_sum<A>(sum_in_groups<A, 64>(0, cols, W, term_at));
    } else if constexpr (K == FoldKind::max) {
      Vec<A> best = broadcast(-infinity<A>());
      Vec<Id<A>> at = {}, position = lane_numbers<A>();
      for (int64_t j = 0; j < cols; j += W, position += W) keep_best<A>(best, at, load(row + j), position);
      A value = -infinity<A>();
      int64_t index = -1;
      for (int q = 0; q < W; ++q) {
        const bool tie = best[q] == value || (best[q] != best[q] && value != value);
        if (beats(A(best[q]), value) || (tie && index >= 0 && at[q] < index)) {
          value = best[q];
          index = at[q];
        }
      }
      out.a[i] = value;
      out.index[i] = index < 0 ? -1 : j_begin + index;
    } else {
      const auto term_at = [=](int64_t j) { return term<A, K>(load(row + j)); };
      out.a[i] = lane_sum<A>(sum_in_groups<A, 64>(0, cols, W, term_at));
    }
  }
}

// Folds down the rows and calls take(j, part) with what the columns from j on have. Vectors past `cols` hold no column.
template <class A, FoldKind K, class Take>
void fold_columns(const A* l, int64_t rows, int64_t cols, int64_t i_begin, Take take) {
  constexpr int W = kLanes<A>;
  for (int64_t j = 0; j < cols; j += W) {
    alignas(64) A a[W], b[W];
    int64_t index[W];
    const Part<A> part{a, b, index};
    if constexpr (K == FoldKind::logsumexp) {
      Vec<A> max = broadcast(-infinity<A>());
      for (int64_t i = 0; i < rows; ++i) max = greater<A>(load(l + i * kBlock + j), max);
      const Vec<A> reference = finite_or_zero<A>(max);
      const auto term_at = [=](int64_t i) { return exponential(load(l + i * kBlock + j) - reference); };
      store(a, max);
      store(b, sum_in_groups<A>(0, rows, 1, term_at));
    } else if constexpr (K == FoldKind::max) {
      Vec<A> best = broadcast(-infinity<A>());
      Vec<Id<A>> at = {}, position = {};
      for (int64_t i = 0; i < rows; ++i, position += 1) keep_best<A>(best, at, load(l + i * kBlock + j), position);
      store(a, best);
      for (int q = 0; q < W; ++q) index[q] = i_begin + at[q];
    } else {
      const auto term_at = [=](int64_t i) { return term<A, K>(load(l + i * kBlock + j)); };
      store(a, sum_in_groups<A>(0, rows, 1, term_at));
    }
    take(j, part);
  }
}

// ---- One fold of the matrix ------------------------------------------------------------------------------

// Partial results of the chunk per block on the i-side, running results on the j-side.
template <class A>
class FoldState {
 public:
  FoldKind kind = FoldKind::logsumexp;
  bool i_side = false, j_side = false;

  // `tiles`: of a chunk, if their columns have parts.
  void start(FoldKind of, A* value, int64_t* argmax, bool on_i, bool on_j, int64_t blocks, int64_t chunk_rows,
             int64_t tiles, int64_t padded_columns) {
    kind = of;
    value_ = value;
    argmax_ = argmax;
    i_side = on_i;
    j_side = on_j;
    chunk_rows_ = chunk_rows;
    padded_columns_ = padded_columns;
    if (on_i) partial_.allocate(kind, blocks * chunk_rows);
    if (on_j) running_.allocate(kind, padded_columns);
    if (on_j) partial_j_.allocate(kind, tiles * padded_columns);
  }

  // Rows [i, i + rows) of the chunk; those that a block does not have are cleared.
  void fold_i(int64_t block, int64_t i, int64_t j_begin, const A* l, int64_t rows, int64_t cols) {
    const Part<A> part = partial_.at(block * chunk_rows_ + i);
    with_kind(kind, [&](auto k) { fold_rows<A, decltype(k)::value>(l, rows, cols, j_begin, part); });
  }
  void clear_i(int64_t block, int64_t from, int64_t to) {
    partial_.clear(kind, block * chunk_rows_ + from, minimum(to, chunk_rows_) - from);
  }
  void clear_i(int64_t block, int64_t from) { clear_i(block, from, chunk_rows_); }
  // Columns of the only task that has rows of them.
  void fold_j(int64_t j_begin, int64_t i_begin, const A* l, int64_t rows, int64_t cols) {
    const Total<A> all = running_.at(j_begin);
    with_kind(kind, [&](auto k) {
      constexpr FoldKind K = decltype(k)::value;
      fold_columns<A, K>(l, rows, cols, i_begin, [&](int64_t j, Part<A> part) { merge_parts<A, K>(all.at(j), part); });
    });
  }
  // Columns of tile number `tile`, which are merged when all tiles of the chunk are there.
  void fold_part_j(int64_t tile, int64_t j_begin, int64_t i_begin, const A* l, int64_t rows, int64_t cols) {
    const int64_t at = tile * padded_columns_ + j_begin;
    if (rows == 0) return partial_j_.clear(kind, at, cols);
    with_kind(kind, [&](auto k) {
      constexpr FoldKind K = decltype(k)::value;
      fold_columns<A, K>(l, rows, cols, i_begin,
                         [&](int64_t j, Part<A> part) { copy_parts<A, K>(partial_j_.at(at + j), part); });
    });
  }
  void merge_j(int64_t begin, int64_t end, int64_t tiles) {
    with_kind(kind, [&](auto k) {
      for (int64_t j = begin; j < end; j += kLanes<A>) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          merge_parts<A, decltype(k)::value>(running_.at(j), partial_j_.at(tile * padded_columns_ + j));
        }
      }
    });
  }

  // Merges the chunk's parts for rows [i, i + kLanes) of it, from block `first` on and in their order, and writes their
  // results.
  void finish_i(int64_t first, int64_t blocks, int64_t chunk_begin, int64_t i, int64_t chunk_rows) {
    constexpr int W = kLanes<A>;
    alignas(64) A a[W];
    double b[W];
    int64_t index[W];
    for (int q = 0; q < W; ++q) {
      const int64_t row = chunk_begin + i + q;
      a[q] = j_side ? running_.at(row).a[0] : -infinity<A>();
      b[q] = j_side ? running_.at(row).b[0] : 0;
      index[q] = j_side && kind == FoldKind::max ? running_.at(row).index[0] : -1;
    }
    with_kind(kind, [&](auto k) {
      for (int64_t block = first; block < blocks; ++block) {
        merge_parts<A, decltype(k)::value>({a, b, index}, partial_.at(block * chunk_rows_ + i));
      }
    });
    for (int q = 0; q < W && i + q < chunk_rows; ++q) write(chunk_begin + i + q, a[q], b[q], index[q]);
  }
  void finish_j(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const Total<A> total = running_.at(j);
      write(j, total.a[0], total.b[0], kind == FoldKind::max ? total.index[0] : -1);
    }
  }

 private:
  struct Parts {
    Buffer<A> a, b;
    Buffer<int64_t> index;
    void allocate(FoldKind kind, int64_t size) {
      a.allocate(size);
      if (kind == FoldKind::logsumexp) b.allocate(size);
      if (kind == FoldKind::max) index.allocate(size);
    }
    void clear(FoldKind kind, int64_t begin, int64_t count) {
      for (int64_t k = begin; k < begin + count; ++k) {
        a.get()[k] = empty_fold<A>(kind);
        if (kind == FoldKind::logsumexp) b.get()[k] = 0;
        if (kind == FoldKind::max) index.get()[k] = -1;
      }
    }
    Part<A> at(int64_t k) const { return Part<A>{a.get(), b.get(), index.get()}.at(k); }
  };
  struct Totals {
    Buffer<A> a;
    Buffer<double> b;
    Buffer<int64_t> index;
    void allocate(FoldKind kind, int64_t size) {
      a.allocate(size);
      b.allocate(size);
      if (kind == FoldKind::max) index.allocate(size);
      for (int64_t k = 0; k < size; ++k) {
        a.get()[k] = -infinity<A>();
        b.get()[k] = 0;
        if (kind == FoldKind::max) index.get()[k] = -1;
      }
    }
    Total<A> at(int64_t k) const { return Total<A>{a.get(), b.get(), index.get()}.at(k); }
  };

  void write(int64_t at, A a, double b, int64_t index) {
    value_[at] = finish<A>(kind, a, b);
    if (argmax_) argmax_[at] = a == -infinity<A>() ? -1 : index;
  }

  A* value_ = nullptr;
  int64_t* argmax_ = nullptr;
  int64_t chunk_rows_ = 0;
  int64_t padded_columns_ = 0;
  Parts partial_, partial_j_;
  Totals running_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
