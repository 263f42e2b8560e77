// What is done with one block of inner products while it is in the level-2 cache: logits, folds, gradient weights.
//
// A block is row-major with row stride kBlock: rows i of one chunk, columns j of one task. A View reads the same
// inner products as the elements (i, j) of the similarity matrix, or, for self-similarity, as the mirrored
// elements (j, i); "i-side" and "j-side" below are rows and columns of the block, not of the matrix.
#pragma once

#include "similarity_tile.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Columns of a block. 512 rows of it take 256 KiB, which leaves room for packed panels in a 1 MiB cache.
constexpr int64_t kBlock = 128;

template <class A>
struct View {
  const A* scale_i;  // per row of the chunk
  const A* bias_i;
  A scale_j[kBlock];
  A bias_j[kBlock];
};

template <class A>
INLINE A infinity() {
  return static_cast<A>(__builtin_inf());
}
template <class A>
INLINE Vec<A> finite_or_zero(Vec<A> v) {
  const Vec<A> zero = {};
  return (v - v == zero) ? v : zero;  // inf - inf and NaN - NaN are NaN, which equals nothing
}
template <class A>
INLINE A finite_or_zero(A v) {
  return v - v == 0 ? v : 0;
}

// l = dot * scale + bias; columns past `cols` become -inf.
template <class A>
void logits(const View<A>& view, const A* dots, A* l, int64_t rows, int64_t cols) {
  constexpr int W = kLanes<A>;
  const int64_t padded = round_up(cols, W);
  for (int64_t i = 0; i < rows; ++i) {
    const A *from = dots + i * kBlock, scale = view.scale_i[i], bias = view.bias_i[i];
    A* to = l + i * kBlock;
    for (int64_t j = 0; j < padded; j += W) {
      store(to + j, load(from + j) * (scale * load(view.scale_j + j)) + (bias + load(view.bias_j + j)));
    }
    for (int64_t j = cols; j < padded; ++j) to[j] = -infinity<A>();
  }
}

// A fold is a pair (max, sum of exp(l - max)); where the maximum is not finite, the sum is taken relative to 0,
// so that -inf rows give 0, and +inf and NaN propagate.
template <class A>
INLINE void merge(Vec<A>& max, Vec<A>& sum, Vec<A> other_max, Vec<A> other_sum) {
  const Vec<A> top = greater<A>(other_max, max);
  const Vec<A> reference = finite_or_zero<A>(top);
  sum = sum * exponential(finite_or_zero<A>(max) - reference) +
        other_sum * exponential(finite_or_zero<A>(other_max) - reference);
  max = top;
}

template <class A>
INLINE A finish(A max, A sum) {
  return sum == 0 ? -infinity<A>() : finite_or_zero(max) + natural_log(sum);
}

template <class A>
void fold_rows(const A* l, int64_t rows, int64_t cols, A* max_out, A* sum_out) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = l + i * kBlock;
    Vec<A> top = broadcast(-infinity<A>());
    for (int64_t j = 0; j < cols; j += W) {
      top = greater<A>(load(row + j), top);
    }
    const A max = lane_max<A>(top), reference = finite_or_zero(max);
    Vec<A> sum = {};
    for (int64_t j = 0; j < cols; j += W) sum += exponential(load(row + j) - reference);
    max_out[i] = max;
    sum_out[i] = lane_sum<A>(sum);
  }
}

// Folds down the rows and merges into the running fold of each column. Vectors past `cols` hold no column.
template <class A>
void fold_columns(const A* l, int64_t rows, int64_t cols, A* running_max, A* running_sum) {
  constexpr int W = kLanes<A>;
  for (int64_t j = 0; j < cols; j += W) {
    Vec<A> max = broadcast(-infinity<A>());
    for (int64_t i = 0; i < rows; ++i) {
      max = greater<A>(load(l + i * kBlock + j), max);
    }
    const Vec<A> reference = finite_or_zero<A>(max);
    Vec<A> sum = {};
    for (int64_t i = 0; i < rows; ++i) sum += exponential(load(l + i * kBlock + j) - reference);
    Vec<A> old_max = load(running_max + j), old_sum = load(running_sum + j);
    merge<A>(old_max, old_sum, max, sum);
    store(running_max + j, old_max);
    store(running_sum + j, old_sum);
  }
}

// Upstream gradients of the folds along one side of a block. An lse of -inf (no pair took part) is stored as +inf
// with weight 0, which makes every exp(l - lse) of that row 0 without a test in the loop.
template <class A>
struct FoldWeights {
  const A* lse;  // null: this side has no fold
  const A* weight;
};

// e = dtotal/dl: weight_i exp(l - lse_i) + weight_j exp(l - lse_j); scaled: times dl/d(inner product).
template <class A, bool kSideI, bool kSideJ, bool kScaled>
void weights(const View<A>& view, FoldWeights<A> side_i, FoldWeights<A> side_j, const A* dots, A* e, int64_t rows,
             int64_t cols) {
  constexpr int W = kLanes<A>;
  const int64_t padded = round_up(cols, W);
  for (int64_t i = 0; i < rows; ++i) {
    const A *from = dots + i * kBlock, scale = view.scale_i[i], bias = view.bias_i[i];
    A* to = e + i * kBlock;
    for (int64_t j = 0; j < padded; j += W) {
      const Vec<A> slope = scale * load(view.scale_j + j);
      const Vec<A> l = load(from + j) * slope + (bias + load(view.bias_j + j));
      Vec<A> value = {};
      if (kSideI) value = side_i.weight[i] * exponential(l - side_i.lse[i]);
      if (kSideJ) value += load(side_j.weight + j) * exponential(l - load(side_j.lse + j));
      store(to + j, kScaled ? value * slope : value);
    }
    for (int64_t j = cols; j < padded; ++j) to[j] = 0;
  }
}

template <class A>
void weights(const View<A>& view, FoldWeights<A> side_i, FoldWeights<A> side_j, bool scaled, const A* dots, A* e,
             int64_t rows, int64_t cols) {
  const auto run = [&](auto on_i, auto on_j) {
    constexpr bool i = decltype(on_i)::value, j = decltype(on_j)::value;
    scaled ? weights<A, i, j, true>(view, side_i, side_j, dots, e, rows, cols)
           : weights<A, i, j, false>(view, side_i, side_j, dots, e, rows, cols);
  };
  if (side_i.lse && side_j.lse) {
    run(std::true_type{}, std::true_type{});
  } else if (side_i.lse) {
    run(std::true_type{}, std::false_type{});
  } else if (side_j.lse) {
    run(std::false_type{}, std::true_type{});
  } else {
    run(std::false_type{}, std::false_type{});
  }
}

// Sums of e and e * dot along both sides: the gradients of biases and scales, from float32 values.
template <class A>
struct Sums {
  A* e_i;  // (rows)
  A* edot_i;
  A e_j[kBlock];
  A edot_j[kBlock];
};

// g (+)= e * scale: the gradient by the inner product. g may be e.
template <class A, bool kAdd, bool kSums>
void accumulate(const View<A>& view, const A* dots, const A* e, A* g, int64_t rows, int64_t cols, Sums<A>* sums) {
  constexpr int W = kLanes<A>;
  if (kSums) {
    memset(sums->e_j, 0, sizeof(sums->e_j));
    memset(sums->edot_j, 0, sizeof(sums->edot_j));
  }
  for (int64_t i = 0; i < rows; ++i) {
    const A scale = view.scale_i[i];
    Vec<A> e_sum = {}, edot_sum = {};
    for (int64_t j = 0; j < cols; j += W) {
      const int64_t at = i * kBlock + j;
      const Vec<A> value = load(e + at);
      if (kSums) {
        // A weight of 0 stays 0 even where the inner product is inf or NaN, as for a pair that takes no part.
        const Vec<A> edot = value == Vec<A>{} ? Vec<A>{} : value * load(dots + at);
        e_sum += value;
        edot_sum += edot;
        store(sums->e_j + j, load(sums->e_j + j) + value);
        store(sums->edot_j + j, load(sums->edot_j + j) + edot);
      }
      const Vec<A> weight = value * (scale * load(view.scale_j + j));
      store(g + at, kAdd ? load(g + at) + weight : weight);
    }
    if (kSums) {
      sums->e_i[i] = lane_sum<A>(e_sum);
      sums->edot_i[i] = lane_sum<A>(edot_sum);
    }
  }
}

// What rounding takes from the weights: sums of g - rounded(g) along both sides.
template <class C>
void residuals(const typename C::Acc* g, int64_t rows, int64_t cols, typename C::Acc* residual_i,
               typename C::Acc* residual_j) {
  using A = typename C::Acc;
  constexpr int W = kLanes<A>;
  memset(residual_j, 0, kBlock * sizeof(A));
  for (int64_t i = 0; i < rows; ++i) {
    Vec<A> sum = {};
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<A> v = load(g + i * kBlock + j), lost = v - rounded<C>(v);
      sum += lost;
      store(residual_j + j, load(residual_j + j) + lost);
    }
    residual_i[i] = lane_sum<A>(sum);
  }
}

// softplus(z) and its derivative, without overflow and exact for large negative z.
template <class A>
INLINE A softplus(A z) {
  return (z > 0 ? z : 0) + static_cast<A>(log1p(exp(-fabs(static_cast<double>(z)))));
}
template <class A>
INLINE A sigmoid(A z) {
  return z >= 0 ? 1 / (1 + static_cast<A>(exp(-static_cast<double>(z))))
                : static_cast<A>(exp(static_cast<double>(z)) / (1 + exp(static_cast<double>(z))));
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
