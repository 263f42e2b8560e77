// How a student's logits differ from a teacher's: what one pair adds, lines of a block, and how parts of them merge.
//
// Divergences are sums of terms that are never negative, so nothing cancels where student and teacher agree. A line
// that lies in several blocks is merged by the chain rule: its divergence is that of the blocks' probabilities, by the
// same terms, and the mean of the divergences within the blocks. So kl, reverse_kl and ce need one sweep.
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
  return (u < broadcast(A(1))) & (count > Vec<A>{}) ? log_one_plus(u) : logarithm_or_zero<A>(u + A(1));
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

// ---- Lines -----------------------------------------------------------------------------------------------

// Numbers of some lines, one after another.
template <class A>
struct Lines {
  A *top_s, *log_s, *top_t, *log_t, *mean, *value;
  Lines at(int64_t k) const { return {top_s + k, log_s + k, top_t + k, log_t + k, mean + k, value + k}; }
};
template <class A>
class LineBuffer {
 public:
  void allocate(int64_t size) {
    size_ = size;
    data_.allocate(6 * size);
  }
  Lines<A> at(int64_t k) const {
    A* data = data_.get();
    return Lines<A>{data, data + size_, data + 2 * size_, data + 3 * size_, data + 4 * size_, data + 5 * size_}.at(k);
  }
  void clear() {
    const Lines<A> all = at(0);
    for (int64_t k = 0; k < size_; ++k) {
      all.top_s[k] = all.top_t[k] = -infinity<A>();
      all.log_s[k] = all.log_t[k] = all.mean[k] = all.value[k] = 0;
    }
  }

 private:
  Buffer<A> data_;
  int64_t size_ = 0;
};

// The teacher has no pair. A maximum does not see NaN, which is in the logarithm then.
template <class A>
INLINE bool is_empty(const Lines<A>& line) {
  return *line.top_t == -infinity<A>() && *line.log_t == 0;
}

// Copies kLanes lines but for their means.
template <class A>
INLINE void copy_lines(Lines<A> to, Lines<A> from) {
  store(to.top_s, load(from.top_s));
  store(to.log_s, load(from.log_s));
  store(to.top_t, load(from.top_t));
  store(to.log_t, load(from.log_t));
  store(to.value, load(from.value));
}

// log p and log q of the pairs of a line.
template <class T>
struct Normalizer {
  T top_s, log_s, top_t, log_t;
  template <class V>
  INLINE V student(V s) const {
    return (s - top_s) - log_s;
  }
  template <class V>
  INLINE V teacher(V t) const {
    return (t - top_t) - log_t;
  }
};
template <class A>
INLINE Normalizer<A> normalizer_of(const Lines<A>& line) {
  return {finite_or_zero(*line.top_s), *line.log_s, finite_or_zero(*line.top_t), *line.log_t};
}
template <class A>
INLINE Normalizer<Vec<A>> normalizers_of(const Lines<A>& lines) {
  return {finite_or_zero<A>(load(lines.top_s)), load(lines.log_s), finite_or_zero<A>(load(lines.top_t)),
          load(lines.log_t)};
}

// Merges kLanes lines out of `count` parts, `step` numbers apart, into `out`, which may be one of them.
template <class A, DistillKind K>
void merge_lines(int64_t count, Lines<A> first, int64_t step, Lines<A> out) {
  const auto part = [&](int64_t k) { return first.at(k * step); };
  const Vec<A> zero = {};
  constexpr int W = kLanes<A>;
  Vec<A> top_s = broadcast(-infinity<A>()), top_t = top_s;
  // In double: a line of millions of pairs has tens of thousands of parts.
  double value[W] = {};
  const auto add = [](double* to, Vec<A> from) {
    for (int q = 0; q < W; ++q) to[q] += from[q];
  };
  const auto rounded_to = [](const double* from) {
    Vec<A> to = {};
    for (int q = 0; q < W; ++q) to[q] = static_cast<A>(from[q]);
    return to;
  };
  for (int64_t k = 0; k < count; ++k) {
    top_s = greater<A>(load(part(k).top_s), top_s);
    top_t = greater<A>(load(part(k).top_t), top_t);
  }
  Normalizer<Vec<A>> n{finite_or_zero<A>(top_s), zero, finite_or_zero<A>(top_t), zero};
  const auto merged = [&](A* Lines<A>::* top, A* Lines<A>::* log, Vec<A> reference) {
    double others[W] = {};
    Vec<A> largest = {};
    for (int64_t k = 0; k < count; ++k) {
      const Vec<A> own = load(part(k).*top), sum = load(part(k).*log);
      const auto is_largest = own == reference;
      const Vec<A> rest = sum < broadcast(A(0.5)) ? excess<A>(sum) : exponential(sum) - A(1);
      add(others, is_largest ? rest : exponential((own - reference) + sum));
      largest += is_largest ? broadcast(A(1)) : zero;
    }
    return log_of_ratios<A>(rounded_to(others), largest);
  };
  n.log_s = merged(&Lines<A>::top_s, &Lines<A>::log_s, n.top_s);
  n.log_t = merged(&Lines<A>::top_t, &Lines<A>::log_t, n.top_t);
  if constexpr (K != DistillKind::js) {
    for (int64_t k = 0; k < count; ++k) {
      const Vec<A> log_q = n.student(load(part(k).top_s)) + load(part(k).log_s);
      const Vec<A> log_p = n.teacher(load(part(k).top_t)) + load(part(k).log_t);
      // The divergence within a part to which the mean gives no weight may be anything.
      const Vec<A> share = exponential_of_negative(K == DistillKind::reverse_kl ? log_q : log_p);
      add(value, share == zero ? zero : share * load(part(k).value));
      add(value, divergence_terms<A, K>(log_p, log_q).value);
    }
  }
  store(out.top_s, top_s);
  store(out.log_s, n.log_s);
  store(out.top_t, top_t);
  store(out.log_t, n.log_t);
  store(out.value, rounded_to(value));
}

// ---- Blocks ----------------------------------------------------------------------------------------------

// Adds exp(l - reference) to `others`, or one to how many are the largest.
template <class A>
INLINE void add_ratio(Vec<A> l, Vec<A> reference, Vec<A>& others, Vec<A>& largest) {
  const auto is_largest = l == reference;
  others += is_largest ? Vec<A>{} : exponential_of_negative(l - reference);
  largest += is_largest ? broadcast(A(1)) : Vec<A>{};
}
// The logsumexp of one row of a block.
template <class A>
INLINE void line_of_row(const A* l, int64_t cols, A* top, A* log) {
  constexpr int W = kLanes<A>;
  Vec<A> best = broadcast(-infinity<A>()), others = {}, largest = {};
  for (int64_t j = 0; j < cols; j += W) best = greater<A>(load(l + j), best);
  *top = lane_max<A>(best);
  const Vec<A> reference = broadcast(finite_or_zero(*top));
  for (int64_t j = 0; j < cols; j += W) add_ratio<A>(load(l + j), reference, others, largest);
  *log = log_of_ratios<A>(broadcast(lane_sum<A>(others)), broadcast(lane_sum<A>(largest)))[0];
}

// Folds each row of a block.
template <class A, DistillKind K>
void compare_rows(const A* s, const A* t, int64_t rows, int64_t cols, Folding f, Lines<A> known, Lines<A> out) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i < rows; ++i, s += kBlock, t += kBlock) {
    const Lines<A> own = out.at(i);
    Vec<A> value = {}, mean = {};
    if constexpr (is_softmax(K)) {
      if (f.lines) {
        line_of_row(s, cols, own.top_s, own.log_s);
        line_of_row(t, cols, own.top_t, own.log_t);
      }
      if (!f.values) continue;
      const Normalizer<A> n = normalizer_of<A>(f.lines ? own : known.at(i));
      for (int64_t j = 0; j < cols; j += W) {
        const Terms<A> terms = divergence_terms<A, K>(n.teacher(load(t + j)), n.student(load(s + j)));
        value += terms.value;
        mean += terms.mean;
      }
    } else {
      for (int64_t j = 0; j < cols; j += W) {
        value += distance_term<A, K>(load(s + j), load(t + j), static_cast<A>(f.delta));
      }
    }
    *own.value = lane_sum<A>(value);
    *own.mean = lane_sum<A>(mean);
  }
}

// Rows of a block that columns are folded over at a time: both blocks of logits stay in a level-1 or -2 cache, and the
// numbers of the columns in a level-1 cache, as the loops go along the rows.
constexpr int64_t kFoldRows = 64;

// Folds down some rows and merges into the running lines of the columns.
template <class A, DistillKind K>
void compare_columns(const A* s, const A* t, int64_t rows, int64_t cols, Folding f, Lines<A> running) {
  constexpr int W = kLanes<A>;
  alignas(64) A numbers[6][kBlock];
  const Lines<A> own{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
  const auto each = [&](auto body) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += W) body(load(s + i * kBlock + j), load(t + i * kBlock + j), j);
    }
  };
  const auto add = [](A* to, Vec<A> value) { store(to, load(to) + value); };
  for (A* sums : {own.log_s, own.log_t, own.mean, own.value}) memset(sums, 0, kBlock * sizeof(A));
  if constexpr (is_softmax(K)) {
    if (f.lines) {
      for (int64_t j = 0; j < kBlock; ++j) own.top_s[j] = own.top_t[j] = -infinity<A>();
      each([&](Vec<A> student, Vec<A> teacher, int64_t j) {
        store(own.top_s + j, greater<A>(student, load(own.top_s + j)));
        store(own.top_t + j, greater<A>(teacher, load(own.top_t + j)));
      });
      alignas(64) A largest[2][kBlock] = {};
      const auto add_to = [&](Vec<A> l, const A* top, A* log, A* count) {
        Vec<A> others = load(log), equal = load(count);
        add_ratio<A>(l, finite_or_zero<A>(load(top)), others, equal);
        store(log, others);
        store(count, equal);
      };
      each([&](Vec<A> student, Vec<A> teacher, int64_t j) {
        add_to(student, own.top_s + j, own.log_s + j, largest[0] + j);
        add_to(teacher, own.top_t + j, own.log_t + j, largest[1] + j);
      });
      for (int64_t j = 0; j < cols; j += W) {
        store(own.log_s + j, log_of_ratios<A>(load(own.log_s + j), load(largest[0] + j)));
        store(own.log_t + j, log_of_ratios<A>(load(own.log_t + j), load(largest[1] + j)));
      }
    }
    const Lines<A> of = f.lines ? own : running;
    if (f.values) {
      each([&](Vec<A> student, Vec<A> teacher, int64_t j) {
        const Normalizer<Vec<A>> n = normalizers_of<A>(of.at(j));
        const Terms<A> terms = divergence_terms<A, K>(n.teacher(teacher), n.student(student));
        add(own.value + j, terms.value);
        if (K == DistillKind::js) add(own.mean + j, terms.mean);
      });
    }
  } else {
    each([&](Vec<A> student, Vec<A> teacher, int64_t j) {
      add(own.value + j, distance_term<A, K>(student, teacher, static_cast<A>(f.delta)));
    });
  }
  for (int64_t j = 0; j < cols; j += W) {
    const Lines<A> into = running.at(j), from = own.at(j);
    if (is_softmax(K) && f.lines) {
      alignas(64) A pair[6][2 * W];
      const Lines<A> two{pair[0], pair[1], pair[2], pair[3], pair[4], pair[5]};
      copy_lines(two, into);
      copy_lines(two.at(W), from);
      merge_lines<A, K>(2, two, W, into);
    } else {
      add(into.value, load(from.value));
      add(into.mean, load(from.mean));
    }
  }
}

// The entries with nearly all the probability of their lines, whose derivatives are minus the sums of the others.
template <class A>
struct DecidedLines {
  static constexpr A kLeast = static_cast<A>(0.75);  // DECIDED of contrastive_ops/core/softmax.py

  int64_t* other;  // of each line the number of the row or column, or -1
  A *dots, *sums;  // its inner product, and the sums of the others, which are added to
  DecidedLines at(int64_t k) const { return {other + k, dots + k, sums + k}; }

  // Of a vector of slopes those that are decided become 0; line(q) and number(q) say of lane q whose they are.
  template <class Line, class Number>
  INLINE void take(Vec<A> log_q, const A* dot, Vec<A>& slope, Line line, Number number) const {
    // exp(-0.2876...) = kLeast
    unsigned bits = above_bits<A>(log_q, broadcast(static_cast<A>(-0.28768207245178093)));
    for (; bits; bits &= bits - 1) {
      const int q = __builtin_ctz(bits);
      other[line(q)] = number(q);
      dots[line(q)] = dot[q];
      slope[q] = 0;
    }
  }
};

// e = dtotal/ds through a line of each row and column that has a weight (`value` of the lines), times `scale` of the
// row and the column where they are given. `s` may be `e`.
template <class A, DistillKind K, bool kRowLines, bool kColLines>
void slopes(const A* s, const A* t, const A* dots, int64_t i_begin, int64_t j_begin, int64_t rows, int64_t cols,
            A delta, Lines<A> of_rows, Lines<A> of_cols, DecidedLines<A> decided_rows, DecidedLines<A> decided_cols,
            const A* scale_i, const A* scale_j, A* e) {
  constexpr int W = kLanes<A>;
  const Vec<A> zero = {};
  for (int64_t i = 0; i < rows; ++i, s += kBlock, t += kBlock, e += kBlock, dots += kBlock) {
    const A weight_i = kRowLines ? *of_rows.at(i).value : 0;
    Vec<A> row_sum = {};
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<A> student = load(s + j), teacher = load(t + j);
      Vec<A> slope = {};
      if constexpr (is_softmax(K)) {
        if (kRowLines && weight_i != 0) {
          const Lines<A> line = of_rows.at(i);
          const Normalizer<A> n{*line.top_s, *line.log_s, *line.top_t, *line.log_t};
          slope = weight_i * divergence_slope<A, K>(n.teacher(teacher), n.student(student), broadcast(*line.mean));
          if (decides(K)) {
            decided_rows.take(
                n.student(student), dots + j, slope, [&](int) { return i; }, [&](int q) { return j_begin + j + q; });
            row_sum += slope;
          }
        }
        if (kColLines) {
          const Lines<A> line = of_cols.at(j);
          const Normalizer<Vec<A>> n{load(line.top_s), load(line.log_s), load(line.top_t), load(line.log_t)};
          const Vec<A> weight = load(line.value);
          Vec<A> own = weight * divergence_slope<A, K>(n.teacher(teacher), n.student(student), load(line.mean));
          own = weight == zero ? zero : own;
          if (decides(K)) {
            decided_cols.take(
                n.student(student), dots + j, own, [&](int q) { return j + q; }, [&](int) { return i_begin + i; });
            store(decided_cols.sums + j, load(decided_cols.sums + j) + own);
          }
          slope += own;
        }
      } else {
        const Vec<A> weight = kColLines ? weight_i + load(of_cols.value + j) : broadcast(weight_i);
        slope = weight * distance_slope<A, K>(student, teacher, delta);
      }
      if (scale_i) slope *= scale_i[i] * load(scale_j + j);
      store(e + j, slope);
    }
    if (kRowLines && decides(K)) decided_rows.sums[i] = lane_sum<A>(row_sum);
  }
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
