// The logistic function and its relatives: logarithms, softplus.
#pragma once

#include "simd.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class A>
INLINE Vec<A> absolute(Vec<A> v) {
  return v < Vec<A>{} ? -v : v;
}
template <class A>
INLINE Vec<A> positive_part(Vec<A> v) {
  return v < Vec<A>{} ? Vec<A>{} : v;  // NaN stays
}

// The logarithm of finite numbers of at least 2^-126 to 2 units in the last place (the polynomial is that of Cephes'
// logf); NaN for NaN and inf.
INLINE Vec<float> logarithm(Vec<float> x) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  const I bits = bit_cast<I>(x), fraction = (bits & 0x007FFFFF) | 0x3F000000;
  const V half = bit_cast<V>(fraction);  // in [0.5, 1)
  const auto small = half < 0.70710678f;
  const V exponent = __builtin_convertvector(((bits >> 23) & 255) - 126 + small, V),
          m = (small ? half + half : half) - 1.0f;
  V p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  for (const float c : {1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f,
                        -2.4999993993e-1f, 3.3333331174e-1f}) {
    p = p * m + c;
  }
  const V z = m * m;
  const V low = p * m * z + exponent * -2.12194440e-4f - 0.5f * z;
  return m + low + exponent * 0.693359375f + (x - x);
}
INLINE Vec<double> logarithm(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = log(x[i]);
  return x;
}

// log(1 + u) for u in [0, 1] as 2 atanh(u / (2 + u)), whose series keeps the relative accuracy of small u.
INLINE Vec<float> log_one_plus(Vec<float> u) {
  const Vec<float> s = u / (u + 2.0f), z = s * s;
  Vec<float> p = z * 0.121447793f + 0.107153703f;
  p = p * z + 0.143082984f;
  p = p * z + 0.199994442f;
  p = p * z + 0.333333378f;
  return 2.0f * s * (p * z + 1.0f);
}
INLINE Vec<double> log_one_plus(Vec<double> u) {
  for (int i = 0; i < kLanes<double>; ++i) u[i] = log1p(u[i]);
  return u;
}
template <class A>
INLINE Vec<A> softplus(Vec<A> l) {
  return positive_part<A>(l) + log_one_plus(exponential(-absolute<A>(l)));
}
template <class A>
INLINE Vec<A> sigmoid(Vec<A> l) {
  const Vec<A> u = exponential(-absolute<A>(l));
  return (l < Vec<A>{} ? u : broadcast(A(1))) / (u + A(1));
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
