// Which pairs of a block take part, and their logits: the rules of one set, seen from one block.
//
// A block is row-major with row stride kBlock: rows i of one chunk, columns j of one task. A View reads the same
// inner products as the elements (i, j) of the similarity matrix, or, for self-similarity, as the mirrored
// elements (j, i); "i-side" and "j-side" are rows and columns of the block, not of the matrix.
#pragma once

#include "../similarity_problem.h"
#include "similarity_tile.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Columns of a block. 512 rows of it take 256 KiB, which leaves room for packed panels in a 1 MiB cache.
constexpr int64_t kBlock = 128;

template <class A>
INLINE A infinity() {
  return static_cast<A>(__builtin_inf());
}

// Ids are compared lane by lane with logits, so they have the size of a logit.
template <class A>
using Id = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

template <class A>
INLINE Vec<Id<A>> lane_numbers() {
  Vec<Id<A>> lanes = {};
  for (int q = 0; q < kLanes<A>; ++q) lanes[q] = q;
  return lanes;
}

// Replaces ids by numbers of the size of a logit that are equal exactly where the ids are; -1 equals nothing.
template <class I>
class Codes {
 public:
  void assign(const int64_t* rows, int64_t row_count, const int64_t* cols, int64_t col_count) {
    rows_.allocate(row_count);
    cols_.allocate(col_count);
    const int64_t lowest = static_cast<int64_t>(std::numeric_limits<I>::min());
    const int64_t highest = static_cast<int64_t>(std::numeric_limits<I>::max());
    bool fits = true;
    for (int64_t i = 0; i < row_count; ++i) fits &= rows[i] > lowest && rows[i] <= highest;
    for (int64_t j = 0; j < col_count; ++j) fits &= cols[j] > lowest && cols[j] <= highest;
    if (!fits) return hash(rows, row_count, cols, col_count);
    for (int64_t i = 0; i < row_count; ++i) rows_.get()[i] = static_cast<I>(rows[i]);
    // Columns say "no id" by another number than rows do.
    for (int64_t j = 0; j < col_count; ++j) cols_.get()[j] = static_cast<I>(cols[j] == -1 ? lowest : cols[j]);
  }
  const I* rows() const { return rows_.get(); }
  const I* cols() const { return cols_.get(); }

 private:
  // Open addressing: an id becomes the number of the first column that has it.
  void hash(const int64_t* rows, int64_t row_count, const int64_t* cols, int64_t col_count) {
    uint64_t size = 16;
    while (size < 2 * static_cast<uint64_t>(col_count)) size *= 2;
    Buffer<int64_t> table(static_cast<int64_t>(size));
    for (uint64_t s = 0; s < size; ++s) table.get()[s] = -1;
    const auto place = [&](int64_t id) {
      uint64_t slot = (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u >> 20) & (size - 1);
      while (table.get()[slot] >= 0 && cols[table.get()[slot]] != id) slot = (slot + 1) & (size - 1);
      return slot;
    };
    for (int64_t j = 0; j < col_count; ++j) {
      if (cols[j] == -1) {
        cols_.get()[j] = -2;
        continue;
      }
      int64_t& first = table.get()[place(cols[j])];
      if (first < 0) first = j;
      cols_.get()[j] = static_cast<I>(first);
    }
    // An empty slot holds -1, which is the code of no column.
    for (int64_t i = 0; i < row_count; ++i) {
      rows_.get()[i] = rows[i] == -1 ? -1 : static_cast<I>(table.get()[place(rows[i])]);
    }
  }

  Buffer<I> rows_, cols_;
};

// A set with what its rules need in the types of the inner loops.
template <class A>
struct Rules {
  const SimilaritySet* set = nullptr;
  Codes<Id<A>> differ, same;
  Buffer<A> log_weight;  // one more row and column of zeros, for no class
  Buffer<Id<A>> class_rows, class_cols;

  bool uses_guide() const { return set->guide_below_rows || set->guide_below_cols; }
  // Rules that look at every pair of a block; the others name single pairs.
  bool looks() const {
    return set->differ_rows || set->same_rows || set->below_rows || set->below_cols || set->above_rows ||
           set->above_cols || uses_guide();
  }

  void prepare(const SimilarityProblem& p, const SimilaritySet& from) {
    set = &from;
    if (from.differ_rows) differ.assign(from.differ_rows, p.N, from.differ_cols, p.M);
    if (from.same_rows) same.assign(from.same_rows, p.N, from.same_cols, p.M);
    if (!from.log_weight) return;
    const int64_t rows = from.log_weight_rows, cols = from.log_weight_cols;
    log_weight.allocate((rows + 1) * (cols + 1));
    for (int64_t r = 0; r <= rows; ++r) {
      for (int64_t c = 0; c <= cols; ++c) {
        const bool inside = r < rows && c < cols;
        log_weight.get()[r * (cols + 1) + c] = inside ? static_cast<const A*>(from.log_weight)[r * cols + c] : 0;
      }
    }
    class_rows.allocate(p.N);
    class_cols.allocate(p.M);
    for (int64_t i = 0; i < p.N; ++i) {
      class_rows.get()[i] = static_cast<Id<A>>((from.class_rows[i] < 0 ? rows : from.class_rows[i]) * (cols + 1));
    }
    for (int64_t j = 0; j < p.M; ++j) {
      class_cols.get()[j] = static_cast<Id<A>>(from.class_cols[j] < 0 ? cols : from.class_cols[j]);
    }
  }
};

// One vector per side of a block: a pointer along the rows of the chunk and a copy along the columns of the block.
template <class T>
struct Sides {
  const T* i = nullptr;
  bool has_j = false;
  T j[kBlock];

  void set(const T* rows, const T* cols, bool mirrored, int64_t i_begin, int64_t j_begin, int64_t count, T past_end) {
    const T *along_i = mirrored ? cols : rows, *along_j = mirrored ? rows : cols;
    i = along_i ? along_i + i_begin : nullptr;
    has_j = along_j != nullptr;
    for (int64_t k = 0; has_j && k < kBlock; ++k) j[k] = k < count ? along_j[j_begin + k] : past_end;
  }
};

template <class A>
struct View {
  A sign;
  const A *scale_i, *bias_i;
  A scale_j[kBlock], bias_j[kBlock];  // with the sign
  Sides<Id<A>> differ, same, classes;
  Sides<A> below, above, guide_below;
  const A* log_weight;

  // The same of the rows that follow.
  void advance(int64_t rows) {
    scale_i += rows;
    bias_i += rows;
    for (auto* side : {&differ, &same, &classes}) side->i += side->i ? rows : 0;
    for (auto* side : {&below, &above, &guide_below}) side->i += side->i ? rows : 0;
  }
};

// l = +-(dot * scale + bias [+ log_weight]); columns past `cols` become -inf.
template <class A>
void logits(const View<A>& view, const A* dots, A* l, int64_t rows, int64_t cols) {
  constexpr int W = kLanes<A>;
  const int64_t padded = round_up(cols, W);
  for (int64_t i = 0; i < rows; ++i) {
    const A *from = dots + i * kBlock, scale = view.scale_i[i], bias = view.sign * view.bias_i[i];
    A* to = l + i * kBlock;
    for (int64_t j = 0; j < padded; j += W) {
      store(to + j, load(from + j) * (scale * load(view.scale_j + j)) + (bias + load(view.bias_j + j)));
    }
    if (view.log_weight) {
      const A* entry = view.log_weight + view.classes.i[i];
      for (int64_t j = 0; j < cols; ++j) to[j] += view.sign * entry[view.classes.j[j]];
    }
    for (int64_t j = cols; j < padded; ++j) to[j] = -infinity<A>();
  }
}

// Calls visit(rule, drops) for each rule of row i, where drops(j) says of the columns [j, j + kLanes) which ones it
// drops. Comparisons are false for NaN, which is not dropped. `dot`, `guide`: the row's similarities.
template <class A, class Visit>
INLINE void for_each_rule(const View<A>& view, const A* dot, const A* guide, int64_t i, Visit visit) {
  if (view.differ.i) {
    const Vec<Id<A>> own = broadcast(view.differ.i[i]);
    visit(Rule::differ, [&](int64_t j) { return load(view.differ.j + j) == own; });
  }
  if (view.same.i) {
    const Vec<Id<A>> own = broadcast(view.same.i[i]);
    visit(Rule::same, [&](int64_t j) { return load(view.same.j + j) != own; });
  }
  const auto exceeds = [&](Rule rule, const Sides<A>& bound, const A* similarity) {
    if (bound.i) visit(rule, [&](int64_t j) { return load(similarity + j) > broadcast(bound.i[i]); });
    if (bound.has_j) visit(rule, [&](int64_t j) { return load(similarity + j) > load(bound.j + j); });
  };
  exceeds(Rule::below, view.below, dot);
  if (guide) exceeds(Rule::guide, view.guide_below, guide);
  if (view.above.i) visit(Rule::above, [&](int64_t j) { return load(dot + j) < broadcast(view.above.i[i]); });
  if (view.above.has_j) visit(Rule::above, [&](int64_t j) { return load(dot + j) < load(view.above.j + j); });
}

// Gives `value` to the logits of pairs that a rule drops; NaN stays.
template <class A>
void apply_rules(const View<A>& view, const A* dots, const A* guide, A* l, int64_t rows, int64_t cols, A value) {
  constexpr int W = kLanes<A>;
  const int64_t padded = round_up(cols, W);
  const Vec<A> dropped = broadcast(value);
  for (int64_t i = 0; i < rows; ++i) {
    A* row = l + i * kBlock;
    for_each_rule(view, dots + i * kBlock, guide ? guide + i * kBlock : nullptr, i, [&](Rule, auto drops) {
      for (int64_t j = 0; j < padded; j += W) store(row + j, drops(j) ? dropped : load(row + j));
    });
    for (int64_t j = cols; j < padded; ++j) row[j] = -infinity<A>();
  }
}

// Where a view of a problem's sets is made.
template <class A>
class Views {
 public:
  Views(const SimilarityProblem& problem, int64_t rows_of_a_chunk) : problem_(problem) {
    rules.reset(new Rules<A>[problem.set_count]);
    for (int set = 0; set < problem.set_count; ++set) {
      rules[set].prepare(problem, problem.sets[set]);
      guided |= rules[set].uses_guide();
    }
    zeros.allocate(rows_of_a_chunk);
    ones.allocate(rows_of_a_chunk);
    for (int64_t i = 0; i < rows_of_a_chunk; ++i) {
      zeros.get()[i] = 0;
      ones.get()[i] = 1;
    }
  }

  // The elements (i, j) of a set for the rows from `begin` on and the columns [j, j + cols), or, mirrored, the elements
  // (j, i) of self-similarity.
  void set_view(int64_t begin, int64_t j_begin, int64_t cols, int set, bool mirrored, View<A>& view) const {
    const SimilarityProblem& p = problem_;
    const Rules<A>& rule = rules[set];
    const SimilaritySet& from = *rule.set;
    const auto numbers = [](const void* v) { return static_cast<const A*>(v); };
    const A *bias_i = numbers(mirrored ? p.col_bias : p.row_bias),
            *bias_j = numbers(mirrored ? p.row_bias : p.col_bias);
    const A* scale = numbers(from.scale);
    const bool along_i = from.scale_of == (mirrored ? ScaleOf::columns : ScaleOf::rows);
    view.sign = from.negate ? -1 : 1;
    view.scale_i = along_i ? scale + begin : ones.get();
    view.bias_i = bias_i ? bias_i + begin : zeros.get();
    for (int64_t j = 0; j < kBlock; ++j) {
      const bool inside = j < cols;
      const A own = along_i ? 1 : from.scale_of == ScaleOf::all ? scale[0] : inside ? scale[j_begin + j] : 1;
      view.scale_j[j] = view.sign * own;
      view.bias_j[j] = bias_j && inside ? view.sign * bias_j[j_begin + j] : 0;
    }
    const auto sides = [&](auto& side, auto rows, auto columns, auto past_end) {
      side.set(rows, columns, mirrored, begin, j_begin, cols, past_end);
    };
    sides(view.differ, rule.differ.rows(), rule.differ.cols(), Id<A>(0));
    sides(view.same, rule.same.rows(), rule.same.cols(), Id<A>(0));
    view.log_weight = rule.log_weight.get();
    sides(view.classes, static_cast<const Id<A>*>(rule.class_rows.get()),
          static_cast<const Id<A>*>(rule.class_cols.get()), Id<A>(0));
    sides(view.below, numbers(from.below_rows), numbers(from.below_cols), A(0));
    sides(view.above, numbers(from.above_rows), numbers(from.above_cols), A(0));
    sides(view.guide_below, numbers(from.guide_below_rows), numbers(from.guide_below_cols), A(0));
  }

  std::unique_ptr<Rules<A>[]> rules;  // per set
  bool guided = false;                // whether any set has a guide
  Buffer<A> zeros, ones;

 private:
  const SimilarityProblem& problem_;
};

// First position in [begin, end) of an ascending list whose entry is not below `value`.
INLINE int64_t lower_bound(const int64_t* list, int64_t begin, int64_t end, int64_t value) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    list[middle] < value ? begin = middle + 1 : end = middle;
  }
  return begin;
}

// Calls body(column, position) for the entries of row `owner` with columns in [begin, end).
template <class Body>
void for_each_listed(const int64_t* indptr, const int64_t* indices, int64_t owner, int64_t begin, int64_t end,
                     Body body) {
  const int64_t last = indptr[owner + 1];
  for (int64_t e = lower_bound(indices, indptr[owner], last, begin); e < last && indices[e] < end; ++e) {
    body(indices[e], e);
  }
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
