// similarity_distill on the CPU: both similarity matrices block by block, compared while they are there.
//
// Compiled once per SIMD level. Schedule, tile, rules and gradients
// are those of similarity_reduce; two sweeps go over the same chunks and blocks, one of the student and one of the
// teacher, and what both say about a pair is in similarity_divergence.h.
#include "../similarity_distill.h"

#include "similarity_gradients.h"
#include "similarity_lines.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Student and teacher on the same chunks and blocks.
template <class C>
class TwoSweeps {
 public:
  using A = typename C::Acc;
  using Scratch = typename Sweep<C>::Scratch;

  TwoSweeps(const DistillProblem& problem, const Parallel& parallel)
      : p(problem), student(problem.student, parallel, Use::chunk), teacher_(problem.teacher, parallel, Use::chunk) {}

  // `known`: kept inner products are there already.
  template <class Body>
  void for_each_chunk(bool known, Body body) {
    student.for_each_chunk(known, [&](const Chunk& chunk) {
      teacher_.begin(chunk, known);
      body(chunk);
    });
  }

  struct Logits {
    A *student, *teacher;
  };
  // Logits of a block, -inf in both where a pair takes no part. `known`: kept inner products are there already;
  // `mirrored`: of the pairs below the diagonal, after those above it.
  Logits logits(const Chunk& chunk, const Block& block, bool known, bool mirrored, Scratch& s) {
    A* dots = products(student, chunk, block, known, mirrored, s);
    // Bounds on the similarity look at inner products after the logits are formed, and mirrored logits once more.
    const bool again = student.place(chunk, block) || student.rules[0].looks() || p.student.self;
    A* l = again ? student.block_buffer(s.e) : dots;
    return {l, logits(chunk, block, known, mirrored, dots, student.guide_block(chunk, block, s), l, s)};
  }
  // The same where the student's inner products are given, its logits go to `l`, and the teacher's are returned.
  A* logits(const Chunk& chunk, const Block& block, bool known, bool mirrored, const A* dots, const A* guide, A* l,
            Scratch& s) {
    Scratch& own = teacher_.scratch(s.thread);
    A* teacher_dots = products(teacher_, chunk, block, known, mirrored, own);
    A* t = teacher_.place(chunk, block) || p.student.self ? teacher_.block_buffer(own.e) : teacher_dots;
    student.logits_block(block, 0, mirrored, false, dots, guide, l, s.view, [](A*) {});
    teacher_.logits_block(block, 0, mirrored, false, teacher_dots, nullptr, t, own.view, [](A*) {});
    exclude(l, t, mirrored ? block.mirrored : block.rows, block.cols);
    return t;
  }

  const DistillProblem& p;
  Sweep<C> student;

 private:
  // `there`: those of the block that this thread had last.
  static A* products(Sweep<C>& sweep, const Chunk& chunk, const Block& block, bool known, bool there, Scratch& s) {
    A *place = sweep.place(chunk, block), *dots = place ? place : sweep.block_buffer(s.dots);
    if (!there && !(known && place)) sweep.multiply_block(chunk, block, s, dots);
    return dots;
  }
  static void exclude(const A* s, A* t, int64_t rows, int64_t cols) {
    constexpr int W = kLanes<A>;
    const Vec<A> none = broadcast(-infinity<A>());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = i * kBlock; j < i * kBlock + cols; j += W)
        store(t + j, load(s + j) == none ? none : load(t + j));
    }
  }

  Sweep<C> teacher_;
};

// ---- Forward ---------------------------------------------------------------------------------------------

// Where the numbers of the lines of a direction are in the outputs.
template <class A>
Lines<A> outputs_of(const DistillForward& out, int64_t lines, int64_t begin) {
  A *statistics = static_cast<A*>(out.statistics), *values = static_cast<A*>(out.values);
  const auto row = [&](int64_t k) { return statistics + k * lines; };
  if (!statistics) return {nullptr, nullptr, nullptr, nullptr, nullptr, values + begin};
  return Lines<A>{row(0), row(1), row(2), row(3), row(4), values}.at(begin);
}

template <class C>
class Comparer {
 public:
  using A = typename C::Acc;

  Comparer(const DistillProblem& problem, const DistillForward& out, const Parallel& parallel)
      : p(problem), both_(problem, parallel) {
    const int64_t N = p.student.N, M = p.student.M, lines = N * p.rows + M * p.cols;
    const int64_t blocks = both_.student.most_blocks(), chunk_rows = both_.student.chunk_rows;
    if (p.rows) {
      rows_ = outputs_of<A>(out, lines, 0);
      parts_.allocate(blocks * chunk_rows + kLanes<A>);
    }
    if (p.cols || p.student.self) {
      parts_of_chunk_ = (chunk_rows + kFoldRows - 1) / kFoldRows;
      counted_.allocate(both_.student.padded_columns, (N + chunk_rows - 1) / chunk_rows * parts_of_chunk_);
    }
    if (p.cols) {
      cols_ = outputs_of<A>(out, lines, N * p.rows);
      lines_.allocate(both_.student.padded_columns);
      lines_.clear();
    }
  }

  void run() {
    if (p.kind == DistillKind::js) {  // a mixture needs both complete lines, so parts of it do not merge
      sweep({true, false, p.delta});
      sweep({false, true, p.delta});
    } else {
      sweep({is_softmax(p.kind), true, p.delta});
    }
    for (int64_t j = 0; p.cols && j < p.student.M; ++j) write(lines_.at(j), cols_, j, {true, true, p.delta});
  }

 private:
  bool softmax() const { return is_softmax(p.kind); }

  void sweep(const Folding& f) {
    const int64_t chunk_rows = both_.student.chunk_rows;
    const bool known = softmax() && !f.lines;
    both_.for_each_chunk(known, [&](const Chunk& chunk) {
      both_.student.for_each_tile(chunk, [&](const Block& block, auto& s) {
        const auto l = both_.logits(chunk, block, known, false, s);
        if (p.rows) {
          with_comparison(p.kind, [&](auto k) {
            constexpr DistillKind K = decltype(k)::value;
            compare_rows<A, K>(l.student, l.teacher, block.rows, block.cols, f,
                               is_softmax(K) ? rows_.at(chunk.begin) : rows_, parts_.at(block.index * chunk_rows));
          });
        }
        if (p.cols) fold_columns(chunk, block, block.rows, l, f);
        if (!p.student.self) return;
        // Rows below the block's diagonal have these columns in blocks before.
        clear_lines(parts_.at(block.index * chunk_rows + block.rows), chunk.rows - block.rows);
        if (block.mirrored > 0) {
          fold_columns(chunk, block, block.mirrored, both_.logits(chunk, block, known, true, s), f);
        }
      });
      if (p.rows) finish_rows(chunk, f);
    });
    if (p.cols) finish_columns(f);
  }

  // Adds the first rows of a block to the lines of its columns.
  void fold_columns(const Chunk& chunk, const Block& block, int64_t rows, typename TwoSweeps<C>::Logits l,
                    const Folding& f) {
    const int64_t first = chunk.begin / both_.student.chunk_rows * parts_of_chunk_;
    with_comparison(p.kind, [&](auto k) {
      for (int64_t i = 0; i < rows; i += kFoldRows) {
        compare_columns<A, decltype(k)::value>(
            l.student + i * kBlock, l.teacher + i * kBlock, minimum(kFoldRows, rows - i), block.cols, f,
            p.cols ? lines_.at(block.j) : Lines<A>{}, first + i / kFoldRows, block.j, counted_);
      }
    });
  }

  // Merges the parts of all columns.
  void finish_columns(const Folding& f) {
    constexpr int W = kLanes<A>;
    const int64_t work = p.student.M * counted_.levels() * kWorkOfFold;
    both_.student.run((p.student.M + W - 1) / W, work, [&](int64_t group, int) {
      alignas(64) A numbers[6][W] = {};
      const Lines<A> line{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
      const Lines<A> to = lines_.at(group * W);
      with_comparison(p.kind, [&](auto k) { counted_.template finish<decltype(k)::value>(f, group * W, line); });
      if (softmax() && f.lines) copy_lines(to, line);
      store(to.value, load(line.value));
      store(to.mean, load(line.mean));
    });
  }

  // Merges the parts of the chunk's rows, in the order of the blocks, and what blocks before had of them as columns.
  void finish_rows(const Chunk& chunk, const Folding& f) {
    constexpr int W = kLanes<A>;
    const int64_t chunk_rows = both_.student.chunk_rows;
    both_.student.run((chunk.rows + W - 1) / W, chunk.rows * chunk.blocks() * kWorkOfFold, [&](int64_t group, int) {
      alignas(64) A numbers[6][2 * W] = {};
      const Lines<A> line{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
      with_comparison(p.kind, [&](auto k) {
        constexpr DistillKind K = decltype(k)::value;
        merge_parts_of_lines<A, K>(f, chunk.blocks(), parts_.at(group * W), chunk_rows, line);
        if (!p.student.self) return;
        counted_.template finish<K>(f, chunk.begin + group * W, line.at(W));
        merge_parts_of_lines<A, K>(f, 2, line, W, line);
      });
      for (int64_t q = 0; q < minimum<int64_t>(W, chunk.rows - group * W); ++q) {
        write(line.at(q), rows_, chunk.begin + group * W + q, f);
      }
    });
  }

  // The numbers of a complete line to the outputs, as far as a sweep has found them.
  void write(const Lines<A>& line, const Lines<A>& outputs, int64_t at, const Folding& f) const {
    outputs.value[at] = *line.value;
    if (!softmax()) return;
    const Lines<A> to = outputs.at(at);
    if (f.lines) {
      *to.top_s = *line.top_s;
      *to.log_s = *line.log_s;
      *to.top_t = *line.top_t;
      *to.log_t = *line.log_t;
    }
    if (is_empty(to)) *to.value = 0;  // no pair takes part, or the teacher excludes them all
    *to.mean = p.kind == DistillKind::reverse_kl ? *to.value : *line.mean;
  }

  const DistillProblem& p;
  TwoSweeps<C> both_;
  Lines<A> rows_{}, cols_{};
  LineBuffer<A> parts_, lines_;  // parts: of each block and row of the chunk; lines: of all columns
  CountedLines<A> counted_;
  int64_t parts_of_chunk_ = 0;
};

template <class C>
void distill_forward(const DistillProblem& p, const DistillForward& out, const Parallel& parallel) {
  Comparer<C>(p, out, parallel).run();
}

// ---- Backward --------------------------------------------------------------------------------------------

// The lines of one direction as the inner loop reads them: tops are finite, and `value` is the upstream gradient, which
// is 0 for lines without a pair.
template <class A>
void prepare_lines(const DistillBackward& b, int64_t lines, int64_t begin, int64_t count, LineBuffer<A>& to) {
  to.allocate(count + kBlock);
  to.clear();
  const A *statistics = static_cast<const A*>(b.statistics), *upstream = static_cast<const A*>(b.d_values);
  for (int64_t k = 0; k < count + kBlock; ++k) {
    const Lines<A> line = to.at(k);
    if (k < count && statistics) {
      const A* own = statistics + begin + k;
      *line.top_s = own[0];
      *line.log_s = own[lines];
      *line.top_t = own[2 * lines];
      *line.log_t = own[3 * lines];
      *line.mean = own[4 * lines];
    }
    const bool empty = k >= count || (statistics && is_empty(line));
    *line.value = empty ? 0 : upstream[begin + k];
    *line.top_s = finite_or_zero(*line.top_s);
    *line.top_t = finite_or_zero(*line.top_t);
  }
}

// The decided entries of lines, until their derivatives are known and added.
template <class A>
class DecidedEntries {
 public:
  // `parts`: sums of each line that are made side by side.
  void allocate(int64_t lines, int64_t parts, int64_t step) {
    step_ = step;
    own_.allocate(lines);
    other_.allocate(lines);
    for (Buffer<A>* each : {&dots_, &e_}) each->allocate(lines);
    parts_.allocate(parts * step);
    memset(parts_.get(), 0, parts * step * sizeof(A));
    totals_.allocate(lines);
    memset(totals_.get(), 0, lines * sizeof(double));
  }
  void begin(int64_t first, int64_t lines) {
    for (int64_t k = 0; k < lines; ++k) {
      own_.get()[k] = first + k;
      other_.get()[k] = -1;
    }
  }
  DecidedLines<A> part(int64_t at, int64_t line) const {
    return {other_.get() + line, dots_.get() + line, parts_.get() + at * step_ + line};
  }
  // Moves what was summed so far to totals in double, so that no sum in A is long.
  void settle(int64_t lines, int64_t parts) {
    for (int64_t at = 0; at < parts; ++at) {
      for (int64_t k = 0; k < lines; ++k) {
        totals_.get()[k] += parts_.get()[at * step_ + k];
        parts_.get()[at * step_ + k] = 0;
      }
    }
  }
  template <class Gradients>
  void finish(int64_t lines, int64_t parts, bool of_columns, Gradients& gradients) {
    settle(lines, parts);
    for (int64_t k = 0; k < lines; ++k) {
      e_.get()[k] = static_cast<A>(-totals_.get()[k]);
      totals_.get()[k] = 0;
    }
    // A pair's column is -1 where there is none, so that a column without one is said by itself.
    for (int64_t k = 0; of_columns && k < lines; ++k) {
      if (other_.get()[k] < 0) own_.get()[k] = -1;
    }
    const int64_t *rows = of_columns ? other_.get() : own_.get(), *columns = of_columns ? own_.get() : other_.get();
    gradients.add_pairs({lines, rows, columns, dots_.get(), e_.get(), nullptr});
  }

 private:
  int64_t step_ = 0;
  Buffer<int64_t> own_, other_;
  Buffer<A> dots_, e_, parts_;
  Buffer<double> totals_;
};

template <class C>
void distill_backward(const DistillProblem& p, const DistillBackward& b, const Parallel& parallel) {
  using A = typename C::Acc;
  using Scratch = typename Sweep<C>::Scratch;
  TwoSweeps<C> both(p, parallel);
  Gradients<C> gradients(p.student, b.gradients, both.student);
  const int64_t N = p.student.N, M = p.student.M, lines = N * p.rows + M * p.cols;
  LineBuffer<A> rows, cols;
  if (p.rows) prepare_lines<A>(b, lines, 0, N, rows);
  if (p.cols) prepare_lines<A>(b, lines, N * p.rows, M, cols);
  const A delta = static_cast<A>(p.delta);
  DecidedEntries<A> decided_rows, decided_cols;
  const int64_t chunk_rows = both.student.chunk_rows, blocks = both.student.most_blocks();
  const bool has_rows = p.rows && decides(p.kind), has_cols = p.cols && decides(p.kind);
  if (has_rows) decided_rows.allocate(chunk_rows, blocks, chunk_rows);
  if (has_cols) {
    decided_cols.allocate(both.student.padded_columns, 1, both.student.padded_columns);
    decided_cols.begin(0, both.student.padded_columns);
  }
  both.for_each_chunk(true, [&](const Chunk& chunk) {
    if (has_rows) decided_rows.begin(chunk.begin, chunk.rows);
    const auto weigh = [&](const Block& block, int, bool mirrored, bool scaled, const A* dots, const A* guide, A* e,
                           Scratch& s) {
      const A* t = both.logits(chunk, block, true, mirrored, dots, guide, e, s);
      const A *scale_i = scaled ? s.view.scale_i : nullptr, *scale_j = s.view.scale_j;
      // Columns of a mirrored view are rows.
      const bool by_rows = p.rows && !mirrored, by_cols = p.cols || mirrored;
      const Lines<A> of_rows = rows.at(by_rows ? chunk.begin : 0);
      const Lines<A> of_cols = by_cols ? (mirrored ? rows : cols).at(block.j) : Lines<A>{};
      with_comparison(p.kind, [&](auto k) {
        constexpr DistillKind K = decltype(k)::value;
        const auto run = [&](auto function) {
          function(e, t, dots, chunk.begin, block.j, mirrored ? block.mirrored : block.rows, block.cols, delta, of_rows,
                   of_cols, decided_rows.part(block.index, 0), decided_cols.part(0, block.j), scale_i, scale_j, e);
        };
        if (by_rows && by_cols) return run(slopes<A, K, true, true>);
        by_rows ? run(slopes<A, K, true, false>) : run(slopes<A, K, false, true>);
      });
    };
    gradients.add_chunk(chunk, weigh);
    if (has_rows) decided_rows.finish(chunk.rows, chunk.blocks(), false, gradients);
    if (has_cols) decided_cols.settle(M, 1);
  });
  if (has_cols) decided_cols.finish(M, 1, true, gradients);
  gradients.finish();
}

// ---- Types -----------------------------------------------------------------------------------------------

void distill_forward_any(const DistillProblem& p, const DistillForward& out, const Parallel& parallel) {
  for_compute(
      p.student.dtype, [&](auto c) { distill_forward<decltype(c)>(p, out, parallel); },
      [&] { LEVEL_BELOW::similarity_distill().forward(p, out, parallel); });
}
void distill_backward_any(const DistillProblem& p, const DistillBackward& gradients, const Parallel& parallel) {
  for_compute(
      p.student.dtype, [&](auto c) { distill_backward<decltype(c)>(p, gradients, parallel); },
      [&] { LEVEL_BELOW::similarity_distill().backward(p, gradients, parallel); });
}

}  // namespace

SimilarityDistill similarity_distill() { return {distill_forward_any, distill_backward_any}; }

}  // namespace LEVEL
}  // namespace contrastive_ops
