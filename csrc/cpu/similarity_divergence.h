// How a student's logits differ from a teacher's: what one pair adds.
//
// Divergences are sums of terms that are never negative, so nothing cancels where student and teacher agree.
#pragma once

#include "../similarity_distill.h"
#include "similarity_folds.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <DistillKind K>
using Comparison = std::integral_constant<DistillKind, K>;

// Calls body with the kind as a constant.
template <class Body>
INLINE void with_comparison(DistillKind kind, Body body) {
  switch (kind) {
    case DistillKind::kl:
      return body(Comparison<DistillKind::kl>{});
    case DistillKind::reverse_kl:
      return body(Comparison<DistillKind::reverse_kl>{});
    case DistillKind::ce:
      return body(Comparison<DistillKind::ce>{});
    case DistillKind::js:
      return body(Comparison<DistillKind::js>{});
    case DistillKind::huber:
      return body(Comparison<DistillKind::huber>{});
    case DistillKind::distance:
      return body(Comparison<DistillKind::distance>{});
  }
}

// Lines are softmaxes, not sums over pairs.
constexpr bool is_softmax(DistillKind kind) { return kind != DistillKind::huber && kind != DistillKind::distance; }
// The derivative is q (t - mean): where q is nearly 1, that is what rounding leaves of two equal numbers.
constexpr bool decides(DistillKind kind) { return kind == DistillKind::reverse_kl || kind == DistillKind::js; }

// What folds of a block do: find the logsumexps of their lines, or take those that are known, and find their values.
struct Folding {
  bool lines, values;
  double delta;
};

// ---- Numbers ---------------------------------------------------------------------------------------------

// (exp(d) - 1 - d) / d^2 for |d| < 1/2.
constexpr double kExcess[] = {
    1.0 / 2,         1.0 / 6,          1.0 / 24,          1.0 / 120,          1.0 / 720,
    1.0 / 5040,      1.0 / 40320,      1.0 / 362880,      1.0 / 3628800,      1.0 / 39916800,
    1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200, 1.0 / 1307674368e3, 1.0 / 20922789888e3};
// ((1 + r) log(1 + r) + (1 - r) log(1 - r)) / 2 r^2 in r^2, for |r| < 1/4.
constexpr double kMixture[] = {1.0 / 2,   1.0 / 12,  1.0 / 30,  1.0 / 56,  1.0 / 90,  1.0 / 132,
                               1.0 / 182, 1.0 / 240, 1.0 / 306, 1.0 / 380, 1.0 / 462, 1.0 / 552};
template <class A>
constexpr int kExcessTerms = sizeof(A) == 4 ? 7 : 15;
template <class A>
constexpr int kMixtureTerms = sizeof(A) == 4 ? 6 : 12;

template <class A, int kTerms>
INLINE Vec<A> series(const double* coefficients, Vec<A> x) {
  Vec<A> total = broadcast(static_cast<A>(coefficients[kTerms - 1]));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) total = total * x + static_cast<A>(coefficients[k]);
  return total;
}

template <class A>
INLINE Vec<A> square_root(Vec<A> v) {
  for (int q = 0; q < kLanes<A>; ++q) v[q] = sizeof(A) == 4 ? sqrtf(v[q]) : sqrt(v[q]);
  return v;
}

template <class A>
INLINE Vec<A> logarithm_or_zero(Vec<A> sum) {
  return sum == Vec<A>{} ? Vec<A>{} : logarithm(sum);
}

// exp(d) - 1 for |d| < 1/2, to the last digits of small d.
template <class A>
INLINE Vec<A> excess(Vec<A> d) {
  return d + d * d * series<A, kExcessTerms<A>>(kExcess, d);
}
// The logarithm of a sum of ratios to the largest: `others` of those that are not it, and how many are. Where one
// column has nearly all the probability, the digits of what is left to 1 are in `others`.
template <class A>
INLINE Vec<A> log_of_ratios(Vec<A> others, Vec<A> count) {
  const Vec<A> u = others + (count - A(1));
  return ((u < broadcast(A(1))) & (count > Vec<A>{})) ? log_one_plus(u) : logarithm_or_zero<A>(u + A(1));
}

// ---- One pair --------------------------------------------------------------------------------------------

// p (exp(d) - 1 - d) with d = log q - log p: never negative, and sums to KL(p || q) as p and q sum to 1.
template <class A>
INLINE Vec<A> relative_entropy(Vec<A> p, Vec<A> q, Vec<A> log_p, Vec<A> log_q) {
  const Vec<A> d = log_q - log_p, zero = {};
  const Vec<A> near = p * (d * d) * series<A, kExcessTerms<A>>(kExcess, d);
  const Vec<A> far = q - (p + (p == zero ? zero : p * d));
  return absolute<A>(d) < A(0.5) ? near : far;
}

// q - p and (q - p) / (q + p), which lies in [-1, 1] and is NaN for 0 / 0. Two numbers near 1 differ by what their
// logarithms do.
template <class A>
INLINE Vec<A> difference(Vec<A> p, Vec<A> q, Vec<A> log_p, Vec<A> log_q) {
  const Vec<A> d = log_q - log_p;
  return absolute<A>(d) < A(0.5) ? p * excess<A>(d) : q - p;
}
template <class A>
INLINE Vec<A> relative_difference(Vec<A> p, Vec<A> q) {
  return (q - p) / (q + p);
}

// (p log(p / m) + q log(q / m)) / 2 with m = (p + q) / 2; never negative.
template <class A>
INLINE Vec<A> shared_divergence(Vec<A> p, Vec<A> q) {
  const Vec<A> r = relative_difference<A>(p, q), a = absolute<A>(r), total = p + q;
  const Vec<A> near = r * r * series<A, kMixtureTerms<A>>(kMixture, r * r);
  const Vec<A> high = a + A(1), low = A(1) - a;
  const Vec<A> far = A(0.5) * (high * logarithm(high) + low * logarithm_or_zero<A>(low));
  const Vec<A> value = A(0.5) * total * (a < A(0.25) ? near : far);
  return total == Vec<A>{} ? total : value;
}
// log(q / m) / 2, 0 where q is 0.
template <class A>
INLINE Vec<A> half_log_of_mixture(Vec<A> p, Vec<A> q, Vec<A> log_p, Vec<A> log_q) {
  const Vec<A> r = difference<A>(p, q, log_p, log_q) / (q + p), zero = {};
  const Vec<A> value = A(0.5) * (absolute<A>(r) < A(0.5) ? log_one_plus(r) : logarithm_or_zero<A>((q + q) / (q + p)));
  return q == zero ? zero : value;
}

// What one pair adds to its line, and to the mean of its line.
template <class A>
struct Terms {
  Vec<A> value, mean;
};
template <class A, DistillKind K>
INLINE Terms<A> divergence_terms(Vec<A> log_p, Vec<A> log_q) {
  const Vec<A> p = exponential_of_negative(log_p), zero = {};
  if constexpr (K == DistillKind::ce) return {p == zero ? zero : -(p * log_q), zero};
  const Vec<A> q = exponential_of_negative(log_q);
  if constexpr (K == DistillKind::kl) return {relative_entropy<A>(p, q, log_p, log_q), zero};
  if constexpr (K == DistillKind::reverse_kl) return {relative_entropy<A>(q, p, log_q, log_p), zero};
  return {shared_divergence<A>(p, q), q * half_log_of_mixture<A>(p, q, log_p, log_q)};
}

// The derivative of a line's divergence by the student's logit.
template <class A, DistillKind K>
INLINE Vec<A> divergence_slope(Vec<A> log_p, Vec<A> log_q, Vec<A> mean) {
  const Vec<A> q = exponential_of_negative(log_q), zero = {};
  if constexpr (K == DistillKind::reverse_kl) return q == zero ? zero : q * (log_q - log_p - mean);
  const Vec<A> p = exponential_of_negative(log_p);
  if constexpr (K == DistillKind::js) return q == zero ? zero : q * (half_log_of_mixture<A>(p, q, log_p, log_q) - mean);
  return difference<A>(p, q, log_p, log_q);
}

// From squared distances, which rounding may have made negative; -inf takes no part.
template <class A, DistillKind K>
INLINE Vec<A> distance_term(Vec<A> s, Vec<A> t, A delta) {
  const Vec<A> student = square_root<A>(positive_part<A>(s));
  if constexpr (K == DistillKind::distance) return student;
  const Vec<A> gap = absolute<A>(student - square_root<A>(positive_part<A>(t)));
  return gap > broadcast(delta) ? delta * (gap - delta / 2) : A(0.5) * gap * gap;
}
template <class A, DistillKind K>
INLINE Vec<A> distance_slope(Vec<A> s, Vec<A> t, A delta) {
  const Vec<A> student = square_root<A>(positive_part<A>(s)), zero = {};
  Vec<A> slope = broadcast(A(1));
  if constexpr (K == DistillKind::huber) {
    const Vec<A> gap = student - square_root<A>(positive_part<A>(t));
    slope = gap > broadcast(delta) ? broadcast(delta) : gap < broadcast(-delta) ? broadcast(-delta) : gap;
  }
  return student == zero ? zero : slope / (student + student);
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
