// similarity_values on the CPU: a chunk of rows holds its inner products until its softmax is known, then weighs.
//
// Not a translation unit of its own: level_*.cpp include it once per SIMD level. Schedule, tile and rules are those of
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
template <class C, class S>
class Softmax {
 public:
  using A = typename C::Acc;
  using Scratch = typename Sweep<C, S>::Scratch;

  Softmax(const SimilarityProblem& problem, const Parallel& parallel) : sweep(problem, parallel, true) {
    lines_.allocate(FoldKind::logsumexp, problem.N);
  }

  // Where the inner products of a chunk are.
  A* place(const Chunk& chunk) {
    if (sweep.kept) return sweep.kept;
    if (!held_.get()) held_.allocate(sweep.stored_size(chunk));
    return held_.get();
  }
  void logits(const Chunk& chunk, const Block& block, const A* dots, const A* guide, A* l, Scratch& s) {
    sweep.logits_block(chunk, block, 0, false, false, dots, guide, l, s.view, [](A*) {});
  }
  void know(int64_t begin, int64_t end, const A* lse) {
    for (int64_t i = begin; i < end; ++i) lines_.set(i, lse[i], 1);
  }
  // Probabilities of a block to `e`; 0 in rows where no pair takes part.
  void probabilities(const Chunk& chunk, const Block& block, const A* dots, const A* guide, A* e, Scratch& s) {
    logits(chunk, block, dots, guide, e, s);
    const FoldWeights<A> rows{lines_.lse.get() + chunk.begin, lines_.weight.get() + chunk.begin, nullptr, nullptr};
    weights(FoldKind::logsumexp, s.view, rows, false, false, e, e, block.rows, block.cols);
  }

  Sweep<C, S> sweep;

 private:
  Upstream<A> lines_;
  Buffer<A> held_;
};

template <class C, class S>
void values_forward(const ValuesProblem& p, const ValuesForward& out, const Parallel& parallel) {
  using A = typename C::Acc;
  using Scratch = typename Sweep<C, S>::Scratch;
  Softmax<C, S> softmax(p.logits, parallel);
  Sweep<C, S>& sweep = softmax.sweep;
  const SimilarityProblem values = of_values(p, nullptr);
  SimilarityBackward sums{};
  sums.dx = out.sums;
  Gradients<C, S> weighted(values, sums, sweep);
  FoldState<A> fold;
  sweep.start_fold(fold, p.logits.folds[0], out.lse, nullptr);
  sweep.for_each_chunk([&](const Chunk& chunk) {
    A* dots = softmax.place(chunk);
    sweep.for_each_block(chunk, 0, chunk.blocks(), [&](const Block& block, Scratch& s) {
      A *own = sweep.stored_block(dots, chunk, block), *l = sweep.block_buffer(s.e);
      sweep.multiply_block(chunk, block, s, own);
      softmax.logits(chunk, block, own, sweep.guide_block(chunk, block, s), l, s);
      sweep.add_to_fold(fold, false, chunk, block, false, l);
    });
    sweep.finish_chunk(fold, chunk);
    softmax.know(chunk.begin, chunk.begin + chunk.rows, static_cast<const A*>(out.lse));
    weighted.add_chunk(chunk, dots,
                       [&](const Block& block, int, bool, bool, const A* block_dots, const A* guide, A* e, Scratch& s) {
                         softmax.probabilities(chunk, block, block_dots, guide, e, s);
                       });
  });
  weighted.finish();
}

// ---- Backward ----------------------------------------------------------------------------------------------

// e = p (t - mean), times dlogit/d(inner product) where `view` is given: the derivative by the logits. e has p.
template <class A>
void deviations(const A* t, const A* means, const View<A>* view, A* e, int64_t rows, int64_t cols) {
  constexpr int W = kLanes<A>;
  const Vec<A> zero = {};
  for (int64_t i = 0; i < rows; ++i, t += kBlock, e += kBlock) {
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<A> p = load(e + j);
      Vec<A> slope = p * (load(t + j) - means[i]);
      if (view) slope *= view->scale_i[i] * load(view->scale_j + j);
      store(e + j, p == zero ? zero : slope);
    }
  }
}

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

template <class C, class S>
void values_backward(const ValuesProblem& p, const ValuesBackward& b, const Parallel& parallel) {
  using A = typename C::Acc;
  using Scratch = typename Sweep<C, S>::Scratch;
  const SimilarityProblem values = of_values(p, b.d_sums);
  Softmax<C, S> softmax(p.logits, parallel);
  softmax.know(0, p.logits.N, static_cast<const A*>(b.lse));
  Sweep<C, S> upstream(values, parallel, true);
  Gradients<C, S> gradients(p.logits, b.gradients, softmax.sweep);
  SimilarityBackward outputs{};
  outputs.dy = b.d_values;
  Gradients<C, S> by_values(values, outputs, softmax.sweep);
  Buffer<A> means(p.logits.N + kBlock);
  find_means<A>(p, b, means.get());
  const SimilarityBackward& g = b.gradients;
  const bool any = g.dx || g.dy || g.dscale || g.drow_bias || g.dcol_bias;
  softmax.sweep.for_each_chunk([&](const Chunk& chunk) {
    A* dots = softmax.place(chunk);
    if (!softmax.sweep.kept) {
      softmax.sweep.for_each_block(chunk, 0, chunk.blocks(), [&](const Block& block, Scratch& s) {
        softmax.sweep.multiply_block(chunk, block, s, softmax.sweep.stored_block(dots, chunk, block));
      });
    }
    if (b.d_values) {
      by_values.add_chunk(
          chunk, dots, [&](const Block& block, int, bool, bool, const A* block_dots, const A* guide, A* e, Scratch& s) {
            softmax.probabilities(chunk, block, block_dots, guide, e, s);
          });
    }
    if (!any) return;
    upstream.begin(chunk);
    gradients.add_chunk(
        chunk, dots,
        [&](const Block& block, int, bool, bool scaled, const A* block_dots, const A* guide, A* e, Scratch& s) {
          softmax.probabilities(chunk, block, block_dots, guide, e, s);
          Scratch& own = upstream.scratch(s.thread);
          A* t = upstream.block_buffer(own.dots);
          upstream.multiply_block(chunk, block, own, t);
          deviations(t, means.get() + chunk.begin, scaled ? &s.view : nullptr, e, block.rows, block.cols);
        });
  });
  by_values.finish();
  gradients.finish();
}

// ---- Types -------------------------------------------------------------------------------------------------

#define CONTRASTIVE_OPS_VALUES_FOR_TYPE(function, Argument)                                         \
  void function##_any(const ValuesProblem& p, const Argument& argument, const Parallel& parallel) { \
    switch (p.logits.dtype) {                                                                       \
      case DType::float32:                                                                          \
        return function<ComputeFloat, float>(p, argument, parallel);                                \
      case DType::float64:                                                                          \
        return function<ComputeDouble, double>(p, argument, parallel);                              \
      case DType::bfloat16:                                                                         \
        return function<ComputeForBFloat16, BFloat16>(p, argument, parallel);                       \
      case DType::float16:                                                                          \
        return function<ComputeFloat, Half>(p, argument, parallel);                                 \
    }                                                                                               \
  }
CONTRASTIVE_OPS_VALUES_FOR_TYPE(values_forward, ValuesForward)
CONTRASTIVE_OPS_VALUES_FOR_TYPE(values_backward, ValuesBackward)

}  // namespace

SimilarityValues similarity_values() { return {values_forward_any, values_backward_any}; }

}  // namespace LEVEL
}  // namespace contrastive_ops
