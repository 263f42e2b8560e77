// Folds of rows and columns in parts that merge in a fixed order.
//
// A part is two numbers, both 0 where no pair was met, so that memory full of zeros holds folds of nothing:
//
//     logsumexp   the maximum, and the sum of exp(l - maximum)
//     max         the maximum, and the bits of 1 + its index
//     others      their sum
//
// The parts of a block are short and in float32. They merge into states, whose sums are in float64: one sum over
// millions of numbers in float32 drifts, and ends where a number is less than half of its last place.
//
// Logits of -inf are pairs that take no part. Ties of a maximum go to the smaller index, and NaN beats every number,
// whoever met it first.
#pragma once

#include "launch.h"
#include "similarity_pairs.h"

namespace contrastive_ops {

using Part = Pack<float, 2>;

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLargest = 3.40282347e38f;

// What is subtracted from logits before exp: an infinity would turn into NaN.
__device__ inline float finite_or_zero(float x) { return fabsf(x) <= kLargest ? x : 0.0f; }

// log(1 + exp(z)), exact on both sides.
__device__ inline float softplus(float z) { return fmaxf(z, 0.0f) + log1pf(__expf(-fabsf(z))); }
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

// What one logit adds to a sum.
template <FoldKind kind>
__device__ float term(float z) {
  if (z == -kInfinity) return 0.0f;
  if constexpr (kind == FoldKind::sum_softplus) return softplus(z);
  if constexpr (kind == FoldKind::sum_relu) return z < 0.0f ? 0.0f : z;
  if constexpr (kind == FoldKind::sum) return z;
  return 1.0f;
}

// dfold/dl of a pair that takes part; `value` is that of its row's or column's fold.
__device__ inline float slope(FoldKind kind, float z, float value) {
  if (kind == FoldKind::logsumexp) return __expf(z - value);
  if (kind == FoldKind::sum_softplus) return sigmoid(z);
  if (kind == FoldKind::sum_relu) return z > 0.0f ? 1.0f : 0.0f;
  return 1.0f;
}
// Of folds whose slope is 0 or 1: the logits above which it is 1.
__device__ inline float slopes_begin_above(FoldKind kind) { return kind == FoldKind::sum_relu ? 0.0f : -kInfinity; }

// ---- One logit after another ----------------------------------------------------------------------------------------

template <FoldKind kind>
struct Running {
  float a, b;

  __device__ void start() {
    a = kind == FoldKind::logsumexp ? -kLargest : 0.0f;
    b = 0.0f;
  }

  __device__ void add(float z, int index) {
    if constexpr (kind == FoldKind::logsumexp) {
      // One exponential whichever of the two is larger. Neither inf nor NaN may be subtracted from itself.
      if (z < kInfinity) {
        const float e = __expf(-fabsf(z - a));
        b = z > a ? fmaf(b, e, 1.0f) : b + e;
        a = fmaxf(a, z);
      } else {
        a = kInfinity, b += z;
      }
    } else if constexpr (kind == FoldKind::max) {
      const bool none = __float_as_int(b) == 0;
      if (z != -kInfinity && (none || z > a || (isnan(z) && !isnan(a)))) a = z, b = __int_as_float(1 + index);
    } else {
      a += term<kind>(z);
    }
  }

  __device__ Part part() const { return {{b == 0.0f && kind == FoldKind::logsumexp ? 0.0f : a, b}}; }
};

// ---- Merging --------------------------------------------------------------------------------------------------------

__device__ inline float rescaled(float sum, float exponent) { return sum == 0.0f ? 0.0f : sum * __expf(exponent); }

// The fold of the pairs of both; the kind is the same for all threads.
__device__ inline Part merged(FoldKind kind, const Part& x, const Part& y) {
  const float a = x.at[0], b = x.at[1], c = y.at[0], d = y.at[1];
  if (kind == FoldKind::logsumexp) {
    if (d == 0.0f) return x;
    if (b == 0.0f) return y;
    const float top = fmaxf(a, c), reference = finite_or_zero(top);
    return {{top, rescaled(b, finite_or_zero(a) - reference) + rescaled(d, finite_or_zero(c) - reference)}};
  }
  if (kind == FoldKind::max) {
    const int i = __float_as_int(b), j = __float_as_int(d);
    if (j == 0) return x;
    if (i == 0) return y;
    const bool larger = c > a || (isnan(c) && !isnan(a)), tie = c == a || (isnan(c) && isnan(a));
    return larger || (tie && j < i) ? y : x;
  }
  return {{a + c, 0.0f}};
}

// What parts are merged into; zeros are a fold of nothing.
struct alignas(16) State {
  double sum;  // of exp(l - top), or of the terms
  float top;
  int winner;  // 1 + the index of the maximum
};

__device__ inline void merge_into(State& state, FoldKind kind, const Part& part) {
  if (kind == FoldKind::logsumexp) {
    if (part.at[1] == 0.0f) return;
    const float top = state.sum == 0.0 ? part.at[0] : fmaxf(state.top, part.at[0]), reference = finite_or_zero(top);
    const float shift = finite_or_zero(state.top) - reference;
    // Rare: the largest so far is exceeded. In float64, as it may happen with every part.
    if (shift != 0.0f && state.sum != 0.0) state.sum *= exp(static_cast<double>(shift));
    state.sum += static_cast<double>(rescaled(part.at[1], finite_or_zero(part.at[0]) - reference));
    state.top = top;
  } else if (kind == FoldKind::max) {
    const Part best = merged(kind, {{state.top, __int_as_float(state.winner)}}, part);
    state.top = best.at[0], state.winner = __float_as_int(best.at[1]);
  } else {
    state.sum += static_cast<double>(part.at[0]);
  }
}

// The value of a fold once all of its parts are merged.
__device__ inline float finished(FoldKind kind, const State& state) {
  if (kind == FoldKind::logsumexp) {
    return state.sum == 0.0 ? -kInfinity : static_cast<float>(finite_or_zero(state.top) + log(state.sum));
  }
  if (kind == FoldKind::max) return state.winner == 0 ? -kInfinity : state.top;
  return static_cast<float>(state.sum);
}

// ---- A row of a tile ------------------------------------------------------------------------------------------------

// Folds the numbers of all lanes of a warp; every lane gets the result. `index_of(k)` is the column of number k.
template <FoldKind kind, int count, class IndexOf>
__device__ Part fold_row(const float (&z)[count], const IndexOf& index_of) {
  if constexpr (kind == FoldKind::logsumexp) {
    float top = -kInfinity;
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < count; ++k) top = fmaxf(top, z[k]);
    top = fold_warp(top, [](float a, float b) { return fmaxf(a, b); });
    const float reference = finite_or_zero(top);
    float sum = 0.0f;
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < count; ++k) sum += __expf(z[k] - reference);
    return {{top, fold_warp(sum, [](float a, float b) { return a + b; })}};
  } else if constexpr (kind == FoldKind::max) {
    Running<kind> best;
    best.start();
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < count; ++k) best.add(z[k], index_of(k));
    Part part = best.part();
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const Part other = {{__shfl_xor_sync(kFullWarp, part.at[0], step), __shfl_xor_sync(kFullWarp, part.at[1], step)}};
      part = merged(kind, part, other);
    }
    return part;
  } else {
    float sum = 0.0f;
    CONTRASTIVE_OPS_UNROLL
    for (int k = 0; k < count; ++k) sum += term<kind>(z[k]);
    return {{fold_warp(sum, [](float a, float b) { return a + b; }), 0.0f}};
  }
}

}  // namespace contrastive_ops
