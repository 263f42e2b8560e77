// The logistic function and its relatives.
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
