// Activations between the layers of experts, and their derivatives, in tasks of some rows.
#pragma once

#include "../grouped_matmul.h"
#include "logistic.h"
#include "similarity_tile.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Numbers of a task.
constexpr int64_t kActivatedNumbers = 16384;

// The distribution function of the normal distribution, and its density. Below 0 the first is the density times Mills'
// ratio, a polynomial of 1 / (1 + 0.35 |x|) with a relative error of 3.3e-8, so that small values keep their digits.
template <class A>
struct Normal {
  Vec<A> below, density;  // the share below x
};
INLINE Normal<float> normal(Vec<float> x) {
  const Vec<float> size = absolute<float>(x), t = 1.0f / (1.0f + 0.35f * size);
  const Vec<float> falling = exponential(-0.5f * x * x);
  Vec<float> p = t * -2.9145149e-2f;
  for (const float c : {1.4396816e-1f, -2.5570748e-1f, 1.5916700e-1f, -2.3105270e-2f, 1.0550622e-1f, 1.1983329e-1f,
                        1.3986182e-1f, 1.3962141e-1f}) {
    p = (p + c) * t;
  }
  const Vec<float> tail = p * falling;
  return {x < Vec<float>{} ? tail : 1.0f - tail, falling * 0.39894228f};
}
INLINE Normal<double> normal(Vec<double> x) {
  Normal<double> found;
  for (int i = 0; i < kLanes<double>; ++i) {
    found.below[i] = 0.5 * erfc(-0.70710678118654752 * x[i]);
    found.density[i] = 0.39894228040143268 * exp(-0.5 * x[i] * x[i]);
  }
  return found;
}

template <class A>
struct Activated {
  Vec<A> value, slope;
};
template <class A, Activation activation>
INLINE Activated<A> activated(Vec<A> x) {
  if constexpr (activation == Activation::relu) {
    const Vec<A> one = broadcast(A(1));
    return {positive_part<A>(x), x <= Vec<A>{} ? Vec<A>{} : one};
  } else if constexpr (activation == Activation::silu) {
    const Vec<A> share = sigmoid<A>(x);
    return {x * share, share * (A(1) + x * (A(1) - share))};
  } else {
    const Normal<A> of = normal(x);
    return {x * of.below, of.below + x * of.density};
  }
}

// Calls body(vectors of one number each...) on numbers of several rows and writes the results that it returns: to[0]
// and to[1], where the second is not null.
template <class A, class S, int kIn, int kOut, class Body>
INLINE void map_row(const S* const (&from)[kIn], S* const (&to)[kOut], int64_t count, Body body) {
  constexpr int W = kLanes<A>;
  int64_t k = 0;
  const auto step = [&](const S* const(&in)[kIn], S* const(&out)[kOut], int64_t at) {
    Vec<A> x[kIn], y[kOut];
#pragma GCC unroll 3
    for (int i = 0; i < kIn; ++i) x[i] = to_accumulator<A>(in[i] + at);
    body(x, y);
#pragma GCC unroll 2
    for (int i = 0; i < kOut; ++i) store_as(out[i] + at, y[i]);
  };
  for (; k + W <= count; k += W) step(from, to, k);
  if (k == count) return;
  S tails[kIn][W] = {}, results[kOut][W];
  const S* in[kIn];
  S* out[kOut];
  for (int i = 0; i < kIn; ++i) {
    memcpy(tails[i], from[i] + k, static_cast<size_t>(count - k) * sizeof(S));
    in[i] = tails[i];
  }
  for (int i = 0; i < kOut; ++i) out[i] = results[i];
  step(in, out, 0);
  for (int i = 0; i < kOut; ++i) memcpy(to[i] + k, results[i], static_cast<size_t>(count - k) * sizeof(S));
}

// Calls body(row) for all rows, in tasks; `work` in multiply-adds.
template <class Body>
void for_each_row(const ActivatedRows& p, const Parallel& parallel, Body body) {
  const int64_t step = maximum<int64_t>(kActivatedNumbers / maximum<int64_t>(p.F, 1), 1);
  auto task = [&](int64_t index, int) {
    for (int64_t row = index * step; row < minimum(p.rows, (index + 1) * step); ++row) body(row);
  };
  run_parallel(parallel.run, (p.rows + step - 1) / step, task, p.rows * p.F * kWorkOfFold);
}

template <class Call>
void for_activation(Activation activation, Call call) {
  switch (activation) {
    case Activation::gelu:
      return call(std::integral_constant<Activation, Activation::gelu>());
    case Activation::relu:
      return call(std::integral_constant<Activation, Activation::relu>());
    case Activation::silu:
      return call(std::integral_constant<Activation, Activation::silu>());
  }
}

template <class A, class S>
void activate_rows(const ActivatedRows& p, const Parallel& parallel) {
  const S* hidden = static_cast<const S*>(p.hidden);
  S* out = static_cast<S*>(p.out);
  for_activation(p.activation, [&](auto of) {
    constexpr Activation activation = decltype(of)::value;
    for_each_row(p, parallel, [&](int64_t row) {
      S* const to[] = {out + row * p.F};
      const S* left = hidden + row * (p.gated ? 2 * p.F : p.F);
      if (p.gated) {
        const S* const from[] = {left, left + p.F};
        return map_row<A, S>(from, to, p.F, [](const Vec<A>(&x)[2], Vec<A>(&y)[1]) {
          y[0] = activated<A, activation>(x[0]).value * x[1];
        });
      }
      const S* const from[] = {left};
      map_row<A, S>(from, to, p.F,
                    [](const Vec<A>(&x)[1], Vec<A>(&y)[1]) { y[0] = activated<A, activation>(x[0]).value; });
    });
  });
}

template <class A, class S>
void activate_rows_backward(const ActivatedRows& p, const Parallel& parallel) {
  const S *hidden = static_cast<const S*>(p.hidden), *g = static_cast<const S*>(p.g);
  S* out = static_cast<S*>(p.out);
  for_activation(p.activation, [&](auto of) {
    constexpr Activation activation = decltype(of)::value;
    for_each_row(p, parallel, [&](int64_t row) {
      const int64_t at = row * (p.gated ? 2 * p.F : p.F);
      if (p.gated) {
        const S* const from[] = {hidden + at, hidden + at + p.F, g + row * p.F};
        S* const to[] = {out + at, out + at + p.F};
        return map_row<A, S>(from, to, p.F, [](const Vec<A>(&x)[3], Vec<A>(&y)[2]) {
          const Activated<A> gate = activated<A, activation>(x[0]);
          y[0] = x[2] * x[1] * gate.slope;
          y[1] = x[2] * gate.value;
        });
      }
      const S* const from[] = {hidden + at, g + row * p.F};
      S* const to[] = {out + at};
      map_row<A, S>(from, to, p.F,
                    [](const Vec<A>(&x)[2], Vec<A>(&y)[1]) { y[0] = x[1] * activated<A, activation>(x[0]).slope; });
    });
  });
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
