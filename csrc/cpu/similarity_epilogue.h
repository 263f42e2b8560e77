// Arithmetic on one block in backward: derivatives by logits, by inner products, and their sums.
#pragma once

#include "similarity_folds.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Upstream gradients of one fold, made safe for exp(l - lse): an lse of -inf (no pair took part) is stored as +inf with
// weight 0, which makes every exp(l - lse) of that row 0 without a test in the loop.
template <class A>
struct Upstream {
  FoldKind kind = FoldKind::logsumexp;
  bool used = false;
  Buffer<A> lse, weight;
  const int64_t* argmax = nullptr;

  void allocate(FoldKind of, int64_t size) {
    kind = of;
    used = true;
    // A block past the end is read in whole vectors.
    weight.allocate(size + kBlock);
    lse.allocate(kind == FoldKind::logsumexp ? size + kBlock : 0);
    for (int64_t i = size; i < size + kBlock; ++i) set(i, -infinity<A>(), 0);
  }
  void set(int64_t i, A value, A gradient) {
    weight.get()[i] = gradient;
    if (kind != FoldKind::logsumexp) return;
    const bool empty = value == -infinity<A>();
    lse.get()[i] = empty ? infinity<A>() : value;
    if (empty) weight.get()[i] = 0;
  }
  // A gradient of zeros is no gradient: a result that the caller did not use costs nothing.
  void set_all(FoldKind of, int64_t size, const void* values, const void* gradients, const int64_t* winners) {
    const A* d = static_cast<const A*>(gradients);
    bool any = false;
    for (int64_t i = 0; d && i < size; ++i) any |= !(d[i] == 0);
    if (!any || of == FoldKind::count) return;
    allocate(of, size);
    argmax = winners;
    for (int64_t i = 0; i < size; ++i) set(i, static_cast<const A*>(values)[i], d[i]);
  }
};

// One fold of a block's rows and one of its columns that share a kind; null where there is none.
template <class A>
struct FoldWeights {
  const A *lse_i, *weight_i, *lse_j, *weight_j;
};

// e (+)= dtotal/dl through two folds of one kind; scaled: times dl/d(inner product). `l` may be `e`.
template <class A, FoldKind K, bool kSideI, bool kSideJ>
void weights(const View<A>& view, FoldWeights<A> w, bool add, bool scaled, const A* l, A* e, int64_t rows,
             int64_t cols) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i < rows; ++i) {
    const A* from = l + i * kBlock;
    A* to = e + i * kBlock;
    const A weight_i = kSideI ? w.weight_i[i] : 0, scale = scaled ? view.scale_i[i] : 1;
    const A lse_i = kSideI && K == FoldKind::logsumexp ? w.lse_i[i] : 0;
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<A> logit = load(from + j);
      Vec<A> value = {};
      if constexpr (K == FoldKind::logsumexp) {
        if (kSideI) value = weight_i * exponential(logit - lse_i);
        if (kSideJ) value += load(w.weight_j + j) * exponential(logit - load(w.lse_j + j));
      } else {
        Vec<A> weight = broadcast(weight_i);
        if (kSideJ) weight += load(w.weight_j + j);
        value = weighted_slope<A, K>(weight, logit);
      }
      if (scaled) value *= scale * load(view.scale_j + j);
      store(to + j, add ? load(to + j) + value : value);
    }
  }
}

template <class A>
void weights(FoldKind kind, const View<A>& view, FoldWeights<A> w, bool add, bool scaled, const A* l, A* e,
             int64_t rows, int64_t cols) {
  with_kind(kind, [&](auto k) {
    constexpr FoldKind K = decltype(k)::value;
    if constexpr (K != FoldKind::max && K != FoldKind::count) {
      if (w.weight_i && w.weight_j) return weights<A, K, true, true>(view, w, add, scaled, l, e, rows, cols);
      if (w.weight_i) return weights<A, K, true, false>(view, w, add, scaled, l, e, rows, cols);
      weights<A, K, false, true>(view, w, add, scaled, l, e, rows, cols);
    }
  });
}

// Sums of e and e * dot along both sides: the gradients of biases and scales, from float32 values.
template <class A>
struct Sums {
  A* e_i;  // (rows)
  A* edot_i;
  double e_j[kBlock];
  double edot_j[kBlock];
};
// Rows whose sums along columns are added up before they go on in double.
constexpr int64_t kSumRows = 32;

// g (+)= e * scale: the gradient by the inner product. g may be e.
template <class A, bool kAdd, bool kSums>
void accumulate(const View<A>& view, const A* dots, const A* e, A* g, int64_t rows, int64_t cols, Sums<A>* sums) {
  constexpr int W = kLanes<A>;
  alignas(64) A few_e[kBlock] = {}, few_edot[kBlock] = {};
  if (kSums) {
    memset(sums->e_j, 0, sizeof(sums->e_j));
    memset(sums->edot_j, 0, sizeof(sums->edot_j));
  }
  const auto move = [cols](A* from, double* to) {
    for (int64_t j = 0; j < cols; ++j) {
      to[j] += from[j];
      from[j] = 0;
    }
  };
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
        store(few_e + j, load(few_e + j) + value);
        store(few_edot + j, load(few_edot + j) + edot);
      }
      const Vec<A> weight = value * (scale * load(view.scale_j + j));
      store(g + at, kAdd ? load(g + at) + weight : weight);
    }
    if (kSums) {
      sums->e_i[i] = lane_sum<A>(e_sum);
      sums->edot_i[i] = lane_sum<A>(edot_sum);
      if ((i + 1) % kSumRows == 0 || i + 1 == rows) {
        move(few_e, sums->e_j);
        move(few_edot, sums->edot_j);
      }
    }
  }
}

template <class A>
void accumulate(bool add, bool with_sums, const View<A>& view, const A* dots, const A* e, A* g, int64_t rows,
                int64_t cols, Sums<A>* sums) {
  if (add) {
    with_sums ? accumulate<A, true, true>(view, dots, e, g, rows, cols, sums)
              : accumulate<A, true, false>(view, dots, e, g, rows, cols, sums);
  } else {
    with_sums ? accumulate<A, false, true>(view, dots, e, g, rows, cols, sums)
              : accumulate<A, false, false>(view, dots, e, g, rows, cols, sums);
  }
}

// What rounding takes from the weights: sums of g - rounded(g) along both sides, over the factors of both where g was
// multiplied by them.
template <class C>
void residuals(const typename C::Acc* g, int64_t rows, int64_t cols, const typename C::Acc* factor_i,
               const typename C::Acc* factor_j, typename C::Acc* residual_i, typename C::Acc* residual_j) {
  using A = typename C::Acc;
  constexpr int W = kLanes<A>;
  memset(residual_j, 0, kBlock * sizeof(A));
  alignas(64) A over_j[kBlock] = {};
  for (int64_t j = 0; j < cols; ++j) over_j[j] = factor_j ? 1 / factor_j[j] : 1;
  for (int64_t i = 0; i < rows; ++i) {
    Vec<A> sum = {};
    const A over_i = factor_i ? 1 / factor_i[i] : 1;
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<A> v = load(g + i * kBlock + j), lost = (v - rounded<C>(v)) * (over_i * load(over_j + j));
      sum += lost;
      store(residual_j + j, load(residual_j + j) + lost);
    }
    residual_i[i] = lane_sum<A>(sum);
  }
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
