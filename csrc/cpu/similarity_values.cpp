// similarity_values on the CPU: a chunk of rows holds its inner products until its softmax is known, then weighs.
//
// Compiled once per SIMD level. Schedule, tile and rules are those of
// similarity_reduce. Products with the weights are those of Gradients: sums of values are what dx is where the values
// stand for y, and their gradient is what dy is where the upstream gradient stands for x.
#include "../similarity_values.h"

#include "similarity_gradients.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// The values' own problem: the logits are never asked of it.
SimilarityProblem of_values(const ValuesProblem& p, const void* d_sums) {
  SimilarityProblem values{};
  values.dtype = p.logits.dtype;
  values.x = d_sums;
  values.y = p.values;
  values.N = p.logits.N;
  values.M = p.logits.M;
  values.D = values.x_stride = p.depth;
  values.y_stride = p.stride;
  values.sets = p.logits.sets;
  values.set_count = 1;
  return values;
}

// The chunks of the logits: inner products, kept for backward or held while the chunk lasts, and the softmax of rows.
template <class C>
class Softmax {
 public:
  using A = typename C::Acc;
  using Scratch = typename Sweep<C>::Scratch;

  Softmax(const SimilarityProblem& problem, const Parallel& parallel) : sweep(problem, parallel, Use::softmax) {
    lines_.allocate(FoldKind::logsumexp, problem.N);
  }

  void logits(const Block& block, const A* dots, const A* guide, A* l, Scratch& s) {
    sweep.logits_block(block, 0, false, false, dots, guide, l, s.view, [](A*) {});
  }
  void know(int64_t begin, int64_t end, const A* lse) {
    for (int64_t i = begin; i < end; ++i) lines_.set(i, lse[i], 1);
  }
  // Probabilities of a block to `e`; 0 in rows where no pair takes part.
  void probabilities(const Block& block, const A* dots, const A* guide, A* e, Scratch& s) {
    logits(block, dots, guide, e, s);
    const FoldWeights<A> rows{lines_.lse.get() + block.i, lines_.weight.get() + block.i, nullptr, nullptr};
    weights(FoldKind::logsumexp, s.view, rows, false, false, e, e, block.rows, block.cols);
  }

  Sweep<C> sweep;

 private:
  Upstream<A> lines_;
};

// Sums of the weights of each row of a block, as they are multiplied.
template <class C, class A>
void sum_rows(const A* e, int64_t rows, int64_t cols, A* sums) {
  for (int64_t i = 0; i < rows; ++i, e += kBlock) {
    Vec<A> sum = {};
    for (int64_t j = 0; j < cols; j += kLanes<A>) sum += rounded<C>(load(e + j));
    sums[i] = lane_sum<A>(sum);
  }
}
template <class A>
double sum_parts(const A* parts, int64_t step, int64_t count, int64_t i) {
  double total = 0;
  for (int64_t b = 0; b < count; ++b) total += parts[b * step + i];
  return total;
}
// Divides by the sum of the weights, which is 1 but for the rounding of the logsumexp: at a logit of 1,000 that is
// 3e-5.
template <class A>
void normalize(const A* parts, int64_t step, const Chunk& chunk, int64_t depth, A* sums) {
  for (int64_t i = 0; i < chunk.rows; ++i, sums += depth) {
    const double total = sum_parts(parts, step, chunk.blocks(), i);
    if (!(total > 0)) continue;
    const A factor = static_cast<A>(1 / total);
    for (int64_t k = 0; k < depth; ++k) sums[k] *= factor;
  }
}

template <class C>
void values_forward(const ValuesProblem& p, const ValuesForward& out, const Parallel& parallel) {
  using A = typename C::Acc;
  using Scratch = typename Sweep<C>::Scratch;
  Softmax<C> softmax(p.logits, parallel);
  Sweep<C>& sweep = softmax.sweep;
  const SimilarityProblem values = of_values(p, nullptr);
  SimilarityBackward sums{};
  sums.dx = out.sums;
  Gradients<C> weighted(values, sums, sweep);
  FoldState<A> fold;
  sweep.start_fold(fold, p.logits.folds[0], out.lse, nullptr);
  Buffer<A> parts(sweep.most_blocks() * sweep.chunk_rows);
  sweep.for_each_chunk(false, [&](const Chunk& chunk) {
    sweep.for_each_tile(chunk, [&](const Block& block, Scratch& s) {
      A *own = sweep.place(chunk, block), *l = sweep.block_buffer(s.e);
      sweep.multiply_block(chunk, block, s, own);
      softmax.logits(block, own, sweep.guide_block(chunk, block, s), l, s);
      sweep.add_to_fold(fold, false, block, false, l);
    });
    sweep.finish_chunk(&fold, 1, chunk, [](int64_t, int64_t) {});
    softmax.know(chunk.begin, chunk.begin + chunk.rows, static_cast<const A*>(out.lse));
    weighted.add_chunk(chunk,
                       [&](const Block& block, int, bool, bool, const A* block_dots, const A* guide, A* e, Scratch& s) {
                         softmax.probabilities(block, block_dots, guide, e, s);
                         sum_rows<C>(e, block.rows, block.cols, parts.get() + block.index * sweep.chunk_rows);
                       });
    normalize(parts.get(), sweep.chunk_rows, chunk, p.depth, static_cast<A*>(out.sums) + chunk.begin * p.depth);
  });
  weighted.finish();
}

// ---- Backward ----------------------------------------------------------------------------------------------

// Columns with nearly all the probability of their row. There p (t - mean) is what rounding leaves of two equal
// numbers, and grows with the scale; but the derivatives of a row sum to 0, so theirs is minus the sum of the others.
template <class A>
class Decided {
 public:
  static constexpr A kLeast = static_cast<A>(0.75);  // DECIDED of contrastive_ops/core/numerics.py

  Decided(int64_t most_blocks, int64_t chunk_rows) : step_(chunk_rows) {
    const int64_t parts = most_blocks * chunk_rows;
    for (Buffer<A>* part : {&e_parts_, &weight_parts_}) part->allocate(parts);
    for (Buffer<A>* own : {&dots_, &e_, &weight_}) own->allocate(chunk_rows);
    for (Buffer<int64_t>* own : {&rows_, &columns_}) own->allocate(chunk_rows);
  }
  void begin(const Chunk& chunk) {
    for (int64_t i = 0; i < chunk.rows; ++i) {
      rows_.get()[i] = chunk.begin + i;
      columns_.get()[i] = -1;
    }
  }
  // e = p (t - mean), the derivative by the logits, but 0 for a decided column; `scaled`: times dlogit/d(inner
  // product). e has p.
  template <class C>
  void deviate(const Block& block, const View<A>& view, bool scaled, const A* dots, const A* t, const A* means, A* e) {
    constexpr int W = kLanes<A>;
    const Vec<A> zero = {}, least = broadcast(kLeast);
    for (int64_t i = 0; i < block.rows; ++i, dots += kBlock, t += kBlock, e += kBlock) {
      Vec<A> sum = {}, weights = {};
      for (int64_t j = 0; j < block.cols; j += W) {
        const Vec<A> p = load(e + j);
        Vec<A> slope = p == zero ? zero : p * (load(t + j) - means[i]);
        if (const unsigned bits = above_bits<A>(p, least)) {
          const int64_t own = j + __builtin_ctz(bits);
          columns_.get()[i] = block.j + own;
          dots_.get()[i] = dots[own];
          slope[own - j] = 0;
        }
        const Vec<A> weight = slope * (view.scale_i[i] * load(view.scale_j + j));
        sum += slope;
        weights += rounded<C>(weight);
        store(e + j, scaled ? weight : slope);
      }
      e_parts_.get()[block.index * step_ + i] = lane_sum<A>(sum);
      weight_parts_.get()[block.index * step_ + i] = lane_sum<A>(weights);
    }
  }
  template <class Gradients>
  void finish(const Chunk& chunk, Gradients& gradients) {
    for (int64_t i = 0; i < chunk.rows; ++i) {
      if (columns_.get()[i] < 0) continue;
      e_.get()[i] = static_cast<A>(-sum_parts(e_parts_.get(), step_, chunk.blocks(), i));
      weight_.get()[i] = static_cast<A>(-sum_parts(weight_parts_.get(), step_, chunk.blocks(), i));
    }
    gradients.add_pairs({chunk.rows, rows_.get(), columns_.get(), dots_.get(), e_.get(), weight_.get()});
  }

 private:
  const int64_t step_;
  Buffer<int64_t> rows_, columns_;  // of each row of the chunk its own number, and its column or -1
  Buffer<A> dots_, e_, weight_, e_parts_, weight_parts_;
};

// What each row's values deviate from: <d_sums_i, sums_i>, the mean of <d_sums_i, values_j> over the row.
template <class A>
void find_means(const ValuesProblem& p, const ValuesBackward& b, A* means) {
  const A *d_sums = static_cast<const A*>(b.d_sums_wide), *sums = static_cast<const A*>(b.sums);
  for (int64_t i = 0; i < p.logits.N; ++i) {
    double mean = 0;
    for (int64_t k = i * p.depth; k < (i + 1) * p.depth; ++k) {
      mean += static_cast<double>(d_sums[k]) * static_cast<double>(sums[k]);
    }
    means[i] = static_cast<A>(mean);
  }
}

template <class C>
void values_backward(const ValuesProblem& p, const ValuesBackward& b, const Parallel& parallel) {
  using A = typename C::Acc;
  using Scratch = typename Sweep<C>::Scratch;
  const SimilarityProblem values = of_values(p, b.d_sums);
  Softmax<C> softmax(p.logits, parallel);
  softmax.know(0, p.logits.N, static_cast<const A*>(b.lse));
  Sweep<C> upstream(values, parallel, Use::softmax);
  Gradients<C> gradients(p.logits, b.gradients, softmax.sweep);
  SimilarityBackward outputs{};
  outputs.dy = b.d_values;
  Gradients<C> by_values(values, outputs, softmax.sweep);
  Buffer<A> means(p.logits.N + kBlock);
  find_means<A>(p, b, means.get());
  const SimilarityBackward& g = b.gradients;
  Decided<A> decided(softmax.sweep.most_blocks(), softmax.sweep.chunk_rows);
  const bool any = g.dx || g.dy || g.dscale || g.drow_bias || g.dcol_bias;
  softmax.sweep.for_each_chunk(true, [&](const Chunk& chunk) {
    if (!softmax.sweep.keeps(chunk)) {
      softmax.sweep.for_each_tile(chunk, [&](const Block& block, Scratch& s) {
        softmax.sweep.multiply_block(chunk, block, s, softmax.sweep.place(chunk, block));
      });
    }
    if (b.d_values) {
      by_values.add_chunk(chunk, [&](const Block& block, int, bool, bool, const A* block_dots, const A* guide, A* e,
                                     Scratch& s) { softmax.probabilities(block, block_dots, guide, e, s); });
    }
    if (!any) return;
    upstream.begin(chunk, false);
    decided.begin(chunk);
    gradients.add_chunk(
        chunk, [&](const Block& block, int, bool, bool scaled, const A* block_dots, const A* guide, A* e, Scratch& s) {
          softmax.probabilities(block, block_dots, guide, e, s);
          Scratch& own = upstream.scratch(s.thread);
          A* t = upstream.block_buffer(own.dots);
          upstream.multiply_block(chunk, block, own, t);
          decided.template deviate<C>(block, s.view, scaled, block_dots, t, means.get() + chunk.begin, e);
        });
    decided.finish(chunk, gradients);
  });
  by_values.finish();
  gradients.finish();
}

// ---- Types -------------------------------------------------------------------------------------------------

void values_forward_any(const ValuesProblem& p, const ValuesForward& out, const Parallel& parallel) {
  for_compute(
      p.logits.dtype, [&](auto c) { values_forward<decltype(c)>(p, out, parallel); },
      [&] { LEVEL_BELOW::similarity_values().forward(p, out, parallel); });
}
void values_backward_any(const ValuesProblem& p, const ValuesBackward& gradients, const Parallel& parallel) {
  for_compute(
      p.logits.dtype, [&](auto c) { values_backward<decltype(c)>(p, gradients, parallel); },
      [&] { LEVEL_BELOW::similarity_values().backward(p, gradients, parallel); });
}

}  // namespace

SimilarityValues similarity_values() { return {values_forward_any, values_backward_any}; }

}  // namespace LEVEL
}  // namespace contrastive_ops
