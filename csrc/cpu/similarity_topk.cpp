// similarity_topk on the CPU: select, logits of listed pairs, their gradients, merge.
//
// Compiled once per SIMD level. How the work is cut is in topk_cuts.h, which entries stay in
// similarity_selection.h, panels of rows and columns in topk_panels.h, listed pairs in similarity_lists.h, rules for
// pairs in similarity_pairs.h, the matmul in similarity_tile.h.
#include "../similarity_topk.h"

#include "similarity_lists.h"
#include "similarity_selection.h"
#include "topk_merge.h"
#include "topk_panels.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Most rows of a task: packing the columns is cheap (1.6% of the tiles), and so many rows' lists fit into the memory of
// all threads, or of one.
constexpr int64_t kTopKRows = 512, kFewestListedRows = 64;
constexpr int64_t kListBytes = int64_t{64} << 20, kListBytesOfAThread = int64_t{32} << 20;
// Most rows whose lists one task closes.
constexpr int64_t kClosedRows = 16;

template <class C>
class TopK {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;
  using G = std::conditional_t<sizeof(A) == 4, ComputeFloat, ComputeDouble>;  // what the guide is computed in

  TopK(const SimilarityProblem& problem, const TopKForward& forward, const Parallel& parallel)
      : p(problem),
        out(forward),
        parallel_(parallel),
        kept_(minimum(forward.k, maximum<int64_t>(problem.M, 1))),
        cuts_(sizes()),
        views_(problem, kTopKRows) {
    const SimilaritySet& set = p.sets[0];
    plain_ = set.scale_of == ScaleOf::all && static_cast<const A*>(set.scale)[0] == 1 && !set.negate && !p.row_bias &&
             !p.col_bias && !set.log_weight;
  }

  void run() {
    parts_ = cuts_.parts();
    scratch_.reset(new Scratch[parallel_.threads]);
    if (parts_ > 1) {
      part_values_.allocate(parts_ * p.N * kept_);
      part_columns_.allocate(parts_ * p.N * kept_);
      part_counts_.allocate(parts_ * p.N);
      reached_.allocate(p.N);
    }
    if (out.statistics) {
      part_statistics_.allocate(parts_ * kStatistics * p.N);
      memset(part_statistics_.get(), 0, static_cast<size_t>(parts_ * kStatistics * p.N) * sizeof(int64_t));
    }
    // After each pass its lists are closed: thresholds are raised, or after the last one results written.
    closed_rows_ = minimum(maximum<int64_t>(p.N / (4 * parallel_.threads), 1), kClosedRows);
    const int64_t closing = (p.N + closed_rows_ - 1) / closed_rows_;
    Stage stages[2 * TopKCuts::kMostPasses];
    int before[2 * TopKCuts::kMostPasses], count = 0;
    for (int n = 0; n < cuts_.passes(); ++n) {
      for (const int64_t tasks : {cuts_.pass(n).tasks(), closing}) {
        before[count] = count - 1;
        stages[count] = {tasks, &before[count], count > 0};
        ++count;
      }
    }
    auto task = [&](int64_t index, int thread) {
      int stage = 0;
      for (; index >= stages[stage].tasks; ++stage) index -= stages[stage].tasks;
      stage % 2 == 0 ? run_task(stage / 2, index, scratch_[thread]) : close(stage / 2, index, scratch_[thread]);
    };
    run_stages(parallel_, count, stages, task, p.N * p.M * (p.D + kWorkOfMove));
  }

 private:
  static constexpr int kStatistics = static_cast<int>(Statistic::size);

  // Those of threads are on cache lines of their own.
  struct alignas(64) Scratch {
    Buffer<U> x_panels, y_panels;
    Buffer<typename G::Unit> guide_x_panels, guide_y_panels;
    Selection<A> selection;
    View<A> view, counted_view;
    Gathered<A> gathered;
  };
  TopKSizes sizes() const {
    const int64_t threads = parallel_.threads, bytes = minimum(kListBytes / threads, kListBytesOfAThread);
    const int64_t affordable = maximum(bytes / Selection<A>::bytes_of_a_row(out.k), kFewestListedRows);
    const int64_t of_part = kept_ * static_cast<int64_t>(sizeof(A) + sizeof(Id<A>)) +
                            static_cast<int64_t>(sizeof(int64_t)) * (1 + (out.statistics ? kStatistics : 0));
    const int64_t most_rows = minimum(kTopKRows, affordable) / kRows<C> * kRows<C>;
    return {p.N, p.M, out.k, threads, kRows<C>, kBlock, most_rows, of_part};
  }
  TopKTask task_of(const TopKPass& pass, int64_t index) const {
    TopKTask t;
    t.part = pass.first_part + index % pass.parts;
    t.begin = index / pass.parts * pass.rows;
    t.rows = minimum(pass.rows, p.N - t.begin);
    t.from = minimum(pass.from + index % pass.parts * pass.blocks_of_a_part(), pass.to);
    t.to = minimum(t.from + pass.blocks_of_a_part(), pass.to);
    return t;
  }
  TopKBlock block_of(const TopKTask& t, int64_t at) const {
    const int64_t j = cuts_.order()(at) * kBlock;
    return {j, minimum(kBlock, p.M - j), (at - t.from) * kBlock};
  }

  void run_task(int pass, int64_t index, Scratch& s) {
    const TopKTask t = task_of(cuts_.pass(pass), index);
    const bool few = t.rows <= kFewRows;
    s.selection.start(t.rows, out.k, out.floor ? static_cast<const A*>(out.floor) + t.begin : nullptr);
    for (int64_t i = 0; pass > 0 && i < t.rows; ++i) s.selection.begin_at(i, reached_.get()[t.begin + i]);
    pack_task<C>(t, cuts_.most_rows(), x_of<C>(p), p.x_stride, p.D, s.x_panels);
    if (views_.guided) {
      const A* guide = static_cast<const A*>(p.guide_x);
      pack_task<G>(t, cuts_.most_rows(), guide, p.guide_depth, p.guide_depth, s.guide_x_panels);
    }
    for (int64_t at = t.from; at < t.to; ++at) {
      const TopKBlock b = block_of(t, at);
      const int64_t j = b.j, cols = b.cols;
      const auto y = y_of<C>(p) + j * p.y_stride;
      if (!few) pack_block<C>(y, p.y_stride, cols, p.D, s.y_panels);
      if (views_.guided) {
        const A* guide = static_cast<const A*>(p.guide_y) + j * p.guide_depth;
        pack_block<G>(guide, p.guide_depth, cols, p.guide_depth, s.guide_y_panels);
      }
      views_.set_view(t.begin, j, cols, 0, false, s.view);
      const bool counts_other = out.statistics && p.set_count > 1;
      if (counts_other) views_.set_view(t.begin, j, cols, p.set_count - 1, false, s.counted_view);
      for (int64_t i = 0; i < t.rows; i += kRows<C>) {
        TopKPanel<C> panel;
        const int64_t rows = minimum<int64_t>(kRows<C>, t.rows - i);
        for (int64_t r = 0; r < rows; ++r) s.selection.prefetch(i + r);
        if (few) {
          y.visit([&](const auto* rows_of_y) {
            products_of_few<C>(p, t.rows, rows_of_y, cols, s.x_panels.get(), panel.dots);
          });
        } else {
          panel_products<C, C>(i, cols, p.D, s.x_panels, s.y_panels, panel.dots);
        }
        if (p.code_scale) apply_code_scale(p, panel.dots, j, rows, cols);
        if (views_.guided) {
          panel_products<C, G>(i, cols, p.guide_depth, s.guide_x_panels, s.guide_y_panels, panel.guide);
        }
        select_panel(t, i, b, rows, panel, s);
        if (out.statistics) {
          View<A>& view = counts_other ? s.counted_view : s.view;
          count_panel(t, i, j, rows, cols, panel, view, counts_other);
          if (counts_other) view.advance(rows);
        }
        s.view.advance(rows);
      }
    }
    finish_task(t, s);
  }

  // ---- Selection --------------------------------------------------------------------------------------------------

  // Columns of a block that row `owner` names: a bit for each.
  void named_columns(const SimilaritySet& set, int64_t owner, int64_t j, int64_t cols, uint64_t* bits) const {
    memset(bits, 0, kBlock / 8);
    const auto name = [&](int64_t column) { bits[(column - j) / 64] |= uint64_t{1} << (column - j) % 64; };
    if (set.has_diagonal && owner + set.diagonal >= j && owner + set.diagonal < j + cols) name(owner + set.diagonal);
    if (set.exclude_indptr) {
      for_each_listed(set.exclude_indptr, set.exclude_indices, owner, j, j + cols,
                      [&](int64_t column, int64_t) { name(column); });
    }
  }
  void select_panel(const TopKTask& t, int64_t i, const TopKBlock& b, int64_t rows, TopKPanel<C>& panel, Scratch& s) {
    const A* l = panel.dots;
    if (!plain_) {
      logits(s.view, panel.dots, panel.l, rows, b.cols);
      l = panel.l;
    }
    const bool bounded = s.view.below.i != nullptr;
    // A row would take in the first columns as they come, and drop most of them again.
    if (b.local == 0 && b.cols == kBlock && first_block_decides()) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t enough = enough_of(t.begin + i + r);
        if (enough <= kMostParts<A>) s.selection.begin_at(i + r, reached_by(enough, l + r * kBlock));
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      bounded ? select_row<true>(t, i + r, r, b, l + r * kBlock, panel, s)
              : select_row<false>(t, i + r, r, b, l + r * kBlock, panel, s);
    }
  }

  // The k best of a row, and as many columns as it may name and drop.
  int64_t enough_of(int64_t owner) const {
    const SimilaritySet& set = p.sets[0];
    const int64_t* lists = set.exclude_indptr;
    return out.k + set.has_diagonal + (lists ? lists[owner + 1] - lists[owner] : 0);
  }
  // Whether what a block's logits say of the threshold is true: only columns that a row names are dropped.
  bool first_block_decides() const { return !out.floor && !views_.rules[0].looks(); }
  // Rules are looked at where a logit exceeds the threshold. Bounds from above exclude the largest ones, which exceed
  // every threshold again and again, so they come at once.
  template <bool kBounded>
  INLINE void select_row(const TopKTask& t, int64_t i, int64_t r, const TopKBlock& b, const A* l,
                         const TopKPanel<C>& panel, Scratch& s) {
    constexpr int W = kLanes<A>;
    const int64_t j = b.j, cols = b.cols;
    const SimilaritySet& set = p.sets[0];
    const A* dots = panel.dots + r * kBlock;
    const bool names = set.has_diagonal || set.exclude_indptr;
    const Vec<A> bound = broadcast(kBounded ? s.view.below.i[r] : A(0));
    Vec<A> threshold = broadcast(s.selection.threshold(i));
    uint64_t named[kBlock / 64];
    bool know_named = false;
    for (int64_t k = 0; k < cols; k += W) {
      const Vec<A> value = load(l + k);
      unsigned bits = above_bits<A>(value, threshold);
      if (kBounded) bits &= ~above_bits<A>(load(dots + k), bound);
      if (__builtin_expect(bits == 0, 1)) continue;
      bits &= inside<A>(k, cols);
      if (views_.rules[0].looks()) {
        for_each_rule(s.view, dots, views_.guided ? panel.guide + r * kBlock : nullptr, r,
                      [&](Rule, auto drops) { bits &= ~bits_of<Id<A>>(drops(k)); });
      }
      if (bits && names) {
        if (!know_named) named_columns(set, t.begin + i, j, cols, named);
        know_named = true;
        bits &= ~lanes_of<A>(named, k);
      }
      if (!bits) continue;
      s.selection.add(i, value, static_cast<Id<A>>(b.local + k), bits);
      threshold = broadcast(s.selection.threshold(i));
    }
  }

  // ---- Statistics -------------------------------------------------------------------------------------------------

  void count_panel(const TopKTask& t, int64_t i, int64_t j, int64_t rows, int64_t cols, TopKPanel<C>& panel,
                   const View<A>& view, bool other) {
    constexpr int W = kLanes<A>;
    const SimilaritySet& set = p.sets[p.set_count - 1];
    const A* l = panel.dots;
    if (!plain_ || (other && set.log_weight)) {
      logits(view, panel.dots, panel.l, rows, cols);
      l = panel.l;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t owner = t.begin + i + r;
      int64_t counts[kStatistics] = {};
      uint64_t named[kBlock / 64];
      named_columns(set, owner, j, cols, named);
      const Vec<A> high = broadcast(static_cast<const A*>(out.count_above)[owner]);
      const A *row = l + r * kBlock, *guide = views_.guided ? panel.guide + r * kBlock : nullptr;
      for (int64_t k = 0; k < cols; k += W) {
        const unsigned here = inside<A>(k, cols);
        unsigned dropped[kStatistics] = {}, any = lanes_of<A>(named, k);
        for_each_rule(view, panel.dots + r * kBlock, guide, r,
                      [&](Rule rule, auto drops) { dropped[statistic_of(rule)] |= bits_of<Id<A>>(drops(k)); });
        for (int rule = static_cast<int>(Statistic::rules); rule < kStatistics; ++rule) {
          counts[rule] += __builtin_popcount(dropped[rule] & here);
          any |= dropped[rule];
        }
        const unsigned scores = above_bits<A>(load(row + k), broadcast(-infinity<A>())) & here;
        counts[static_cast<int>(Statistic::eligible)] += __builtin_popcount(scores & ~any);
        counts[static_cast<int>(Statistic::higher)] += __builtin_popcount(above_bits<A>(load(row + k), high) & here);
      }
      for (int rule = 0; rule < kStatistics; ++rule) {
        part_statistics_.get()[(t.part * kStatistics + rule) * p.N + owner] += counts[rule];
      }
    }
  }

  // ---- Results ----------------------------------------------------------------------------------------------------

  int64_t part_row(int64_t part, int64_t i) const { return part * p.N + i; }

  void finish_task(const TopKTask& t, Scratch& s) {
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t row = t.begin + i, at = part_row(t.part, row);
      if (parts_ == 1) {
        s.selection.finish(i, static_cast<A*>(out.values) + row * out.k, out.indices + row * out.k, 0);
      } else {
        part_counts_.get()[at] = s.selection.take(i, part_values_.get() + at * kept_, part_columns_.get() + at * kept_);
      }
    }
  }

  // What parts have found of some rows: after the last pass the result, before that how much the k-th best is.
  void close(int pass, int64_t index, Scratch& s) {
    const bool last = pass + 1 == cuts_.passes();
    const int64_t parts = cuts_.pass(pass).first_part + cuts_.pass(pass).parts, begin = index * closed_rows_;
    for (int64_t i = begin; i < minimum(begin + closed_rows_, p.N); ++i) {
      if (parts_ > 1) gather(i, parts, last, s.gathered);
      if (!last) {
        reached_.get()[i] = s.gathered.reached(out.k);
        continue;
      }
      finish_row(i, s.gathered);
    }
  }

  void gather(int64_t i, int64_t parts, bool with_columns, Gathered<A>& to) const {
    to.start(parts_ * kept_);
    for (int n = 0; n < cuts_.passes(); ++n) {
      const TopKPass& pass = cuts_.pass(n);
      for (int64_t part = 0; part < pass.parts && pass.first_part + part < parts; ++part) {
        const int64_t at = part_row(pass.first_part + part, i), first = pass.from + part * pass.blocks_of_a_part();
        const Id<A>* columns = part_columns_.get() + at * kept_;
        to.add(part_values_.get() + at * kept_, part_counts_.get()[at]);
        for (int64_t e = 0; with_columns && e < part_counts_.get()[at]; ++e) {
          to.add_column(cuts_.order()(first + columns[e] / kBlock) * kBlock + columns[e] % kBlock);
        }
      }
    }
  }

  void finish_row(int64_t i, Gathered<A>& gathered) {
    int64_t* indices = out.indices + i * out.k;
    if (parts_ > 1) gathered.finish(out.k, static_cast<A*>(out.values) + i * out.k, indices);
    int64_t found = 0;
    while (found < out.k && indices[found] >= 0) ++found;
    out.counts[i] = found;
    for (int rule = 0; out.statistics && rule < kStatistics; ++rule) {
      for (int64_t n = 0; n < parts_; ++n) {
        out.statistics[rule * p.N + i] += part_statistics_.get()[(n * kStatistics + rule) * p.N + i];
      }
    }
  }

  const SimilarityProblem& p;
  const TopKForward& out;
  const Parallel& parallel_;
  const int64_t kept_;  // entries that a part keeps of a row
  const TopKCuts cuts_;
  Views<A> views_;
  bool plain_ = false;  // logits are the inner products
  int64_t parts_ = 1, closed_rows_ = 1;
  std::unique_ptr<Scratch[]> scratch_;
  Buffer<A> part_values_, reached_;  // what k columns reach that have been seen so far
  Buffer<Id<A>> part_columns_;
  Buffer<int64_t> part_counts_, part_statistics_;
};

template <class C>
void topk_forward(const SimilarityProblem& p, const TopKForward& out, const Parallel& parallel) {
  TopK<C>(p, out, parallel).run();
}

// ---- Types -------------------------------------------------------------------------------------------------------

void topk_forward_any(const SimilarityProblem& p, const TopKForward& out, const Parallel& parallel) {
  for_compute(
      p.dtype, [&](auto c) { topk_forward<decltype(c)>(p, out, parallel); },
      [&] { LEVEL_BELOW::similarity_topk().forward(p, out, parallel); });
}
void topk_at_any(const SimilarityProblem& p, const TopKAt& out, const Parallel& parallel) {
  for_compute(
      p.dtype, [&](auto c) { topk_at<decltype(c)>(p, out, parallel); },
      [&] { LEVEL_BELOW::similarity_topk().at(p, out, parallel); });
}
void topk_backward_any(const SimilarityProblem& p, const TopKBackward& gradients, const Parallel& parallel) {
  for_compute(
      p.dtype, [&](auto c) { topk_backward<decltype(c)>(p, gradients, parallel); },
      [&] { LEVEL_BELOW::similarity_topk().backward(p, gradients, parallel); });
}

void topk_merge_any(const TopKMerge& m, const Parallel& parallel) {
  m.dtype == DType::float64 ? topk_merge<double>(m, parallel) : topk_merge<float>(m, parallel);
}

void topk_order_any(const TopKOrder& o, const Parallel& parallel) {
  o.dtype == DType::float64 ? topk_order<double>(o, parallel) : topk_order<float>(o, parallel);
}

}  // namespace

SimilarityTopK similarity_topk() {
  return {topk_forward_any, topk_at_any, topk_backward_any, topk_merge_any, topk_order_any};
}

}  // namespace LEVEL
}  // namespace contrastive_ops
