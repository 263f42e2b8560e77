// Rows and columns of two matrices that are compared: lines of a block, how parts of them merge, and derivatives.
//
// A line that lies in several blocks is merged by the chain rule: its divergence is that of the blocks' probabilities,
// by the same terms, and the mean of the divergences within the blocks. So kl, reverse_kl and ce need one sweep.
#pragma once

#include "similarity_divergence.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// ---- Lines -----------------------------------------------------------------------------------------------

// Numbers of some lines, one after another.
template <class A>
struct Lines {
  A *top_s, *log_s, *top_t, *log_t, *mean, *value;
  Lines at(int64_t k) const { return {top_s + k, log_s + k, top_t + k, log_t + k, mean + k, value + k}; }
};
template <class A>
INLINE void clear_lines(Lines<A> lines, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    lines.top_s[k] = lines.top_t[k] = -infinity<A>();
    lines.log_s[k] = lines.log_t[k] = lines.mean[k] = lines.value[k] = 0;
  }
}
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
  void clear() { clear_lines(at(0), size_); }

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

// The same where parts are sums alone.
template <class A>
void add_lines(int64_t count, Lines<A> first, int64_t step, Lines<A> out) {
  for (int q = 0; q < kLanes<A>; ++q) {
    double value = 0, mean = 0;
    for (int64_t k = 0; k < count; ++k) value += first.value[k * step + q], mean += first.mean[k * step + q];
    out.value[q] = static_cast<A>(value);
    out.mean[q] = static_cast<A>(mean);
  }
}

// What a line adds up to: softmaxes whose logsumexps are being found, or sums.
template <class A, DistillKind K>
INLINE void merge_parts_of_lines(const Folding& f, int64_t count, Lines<A> first, int64_t step, Lines<A> out) {
  if (is_softmax(K) && f.lines) {
    merge_lines<A, K>(count, first, step, out);
  } else {
    add_lines<A>(count, first, step, out);
  }
}

// Lines of columns, whose parts come one after another. A part merges with one of as many rows, as a binary counter
// counts: each is rounded as often as their number has digits, where one running line would be once for every part.
template <class A>
class CountedLines {
 public:
  void allocate(int64_t columns, int64_t parts) {
    columns_ = columns;
    for (levels_ = 1; parts >> levels_; ++levels_) {
    }
    buffer_.allocate(levels_ * columns);
    buffer_.clear();
  }

  // Adds part `number` of a vector of columns, the parts before it being there.
  template <DistillKind K>
  void add(const Folding& f, int64_t number, int64_t column, Lines<A> part) {
    constexpr int W = kLanes<A>;
    alignas(64) A numbers[6][2 * W];
    const Lines<A> two{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
    copy_lines(two.at(W), part);
    store(two.mean + W, load(part.mean));
    int level = 0;
    for (; number >> level & 1; ++level) {
      const Lines<A> before = at(level, column);
      copy_lines(two, before);
      store(two.mean, load(before.mean));
      clear_lines(before, W);
      merge_parts_of_lines<A, K>(f, 2, two, W, two.at(W));
    }
    const Lines<A> to = at(level, column);
    copy_lines(to, two.at(W));
    store(to.mean, load(two.mean + W));
  }

  int levels() const { return levels_; }

  // All parts of a vector of columns; they are not there any more.
  template <DistillKind K>
  void finish(const Folding& f, int64_t column, Lines<A> out) {
    merge_parts_of_lines<A, K>(f, levels_, at(0, column), columns_, out);
    for (int level = 0; level < levels_; ++level) clear_lines(at(level, column), kLanes<A>);
  }

 private:
  Lines<A> at(int64_t level, int64_t column) const { return buffer_.at(level * columns_ + column); }

  LineBuffer<A> buffer_;
  int64_t columns_ = 0;
  int levels_ = 1;
};

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

// Folds down some rows, which are part `number` of the lines of the columns from `first` on; `known`: complete lines.
template <class A, DistillKind K>
void compare_columns(const A* s, const A* t, int64_t rows, int64_t cols, Folding f, Lines<A> known, int64_t number,
                     int64_t first, CountedLines<A>& parts) {
  constexpr int W = kLanes<A>;
  alignas(64) A numbers[6][kBlock];
  const Lines<A> own{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
  const auto each = [&](auto body) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += W) body(load(s + i * kBlock + j), load(t + i * kBlock + j), j);
    }
  };
  const auto add = [](A* to, Vec<A> value) { store(to, load(to) + value); };
  memset(numbers, 0, sizeof(numbers));
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
    const Lines<A> of = f.lines ? own : known;
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
    parts.template add<K>(f, number, first + j, own.at(j));
  }
}

// The entries with nearly all the probability of their lines, whose derivatives are minus the sums of the others.
template <class A>
struct DecidedLines {
  static constexpr A kLeast = static_cast<A>(0.75);  // DECIDED of contrastive_ops/core/numerics.py

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
