// similarity_reduce on the CPU: forward, backward, and the weighted total that forms its gradients in one pass.
//
// Not a translation unit of its own: level_*.cpp include it once per SIMD level. The schedule is in
// similarity_sweep.h, gradients of a chunk in similarity_gradients.h, the arithmetic on a block in
// similarity_epilogue.h, the matmul in similarity_tile.h.
#include "similarity_gradients.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class C, class S>
void forward(const SimilarityProblem& p, const SimilarityForward& out, const Parallel& parallel) {
  using A = typename C::Acc;
  using Scratch = typename Sweep<C, S>::Scratch;
  Sweep<C, S> sweep(p, parallel, false);
  Fold<A> rows, cols;
  if (out.row_lse) sweep.start_fold(rows, static_cast<A*>(out.row_lse), true, p.self);
  if (out.col_lse) sweep.start_fold(cols, static_cast<A*>(out.col_lse), p.self, true);
  A* target_logit = static_cast<A*>(out.target_logit);

  sweep.for_each_chunk([&](const Chunk& chunk) {
    sweep.for_each_block(chunk, 0, chunk.blocks(), [&](const Block& block, Scratch& s) {
      A* dots = sweep.kept ? sweep.stored_block(sweep.kept, chunk, block) : sweep.block_buffer(s.dots);
      A* l = sweep.block_buffer(s.e);
      sweep.multiply_block(chunk, block, s, dots);
      sweep.logits_block(chunk, block, false, dots, l, s.view, target_logit);
      if (rows.lse) sweep.fold_i_side(rows, block, l, block.rows);
      if (cols.lse) sweep.fold_j_side(cols, block, l, block.rows);
      if (!p.self) return;
      sweep.logits_block(chunk, block, true, dots, l, s.view, target_logit);
      if (rows.lse) sweep.fold_j_side(rows, block, l, block.mirrored);
      if (cols.lse) sweep.fold_i_side(cols, block, l, block.mirrored);
    });
    if (rows.i_side) sweep.finish_i_side(rows, chunk);
    if (cols.i_side) sweep.finish_i_side(cols, chunk);
  });
  if (cols.lse && !cols.i_side) sweep.finish_j_side(cols);
}

// ---- Backward ----------------------------------------------------------------------------------------------------

template <class C, class S>
void backward(const SimilarityProblem& p, const SimilarityBackward& b, const Parallel& parallel) {
  using A = typename C::Acc;
  Sweep<C, S> sweep(p, parallel, false);
  Gradients<C, S> gradients(p, b, sweep);
  gradients.rows.set_all(p.N, b.row_lse, b.d_rows);
  gradients.cols.set_all(p.M, b.col_lse, b.d_cols);
  gradients.d_target = static_cast<const A*>(b.d_target);
  sweep.for_each_chunk([&](const Chunk& chunk) { gradients.add_chunk(chunk, sweep.kept); });
  gradients.finish();
}

// ---- The weighted total ------------------------------------------------------------------------------------

// Loss of row i and its derivatives by lse_i, extra_i and the target's logit.
template <class A>
void row_loss(const SimilarityTotal& t, int64_t i, A lse, Upstream<A>& rows, A* d_target) {
  const A* extra = static_cast<const A*>(t.extra);
  const A* target_weight = static_cast<const A*>(t.target_weight);
  A all = lse;
  if (extra) {
    const A top = maximum(lse, extra[i]), low = minimum(lse, extra[i]);
    all = top == -infinity<A>() ? top : top + static_cast<A>(log1p(exp(static_cast<double>(low - top))));
  }
  const A z = all - static_cast<const A*>(t.target_logit)[i];
  const A d_all = static_cast<const A*>(t.weight)[i] * sigmoid(z);
  static_cast<A*>(t.losses)[i] = softplus(z);
  const bool empty = all == -infinity<A>();
  const A share = extra && !empty ? static_cast<A>(exp(static_cast<double>(lse - all))) : 1;
  rows.set(i, lse, d_all * share);
  if (t.dextra) {
    static_cast<A*>(t.dextra)[i] = empty ? 0 : d_all * static_cast<A>(exp(static_cast<double>(extra[i] - all)));
  }
  d_target[i] = (target_weight ? target_weight[i] : 0) - d_all;
}

template <class C, class S>
void total(const SimilarityProblem& p, const SimilarityTotal& t, const Parallel& parallel) {
  using A = typename C::Acc;
  using Scratch = typename Sweep<C, S>::Scratch;
  Sweep<C, S> sweep(p, parallel, true);
  Gradients<C, S> gradients(p, t.gradients, sweep);
  gradients.rows.allocate(p.N);
  Buffer<A> lse(p.N), d_target(p.N), dots;
  gradients.d_target = d_target.get();
  Fold<A> rows;
  sweep.start_fold(rows, lse.get(), true, false);
  sweep.for_each_chunk([&](const Chunk& chunk) {
    if (!dots.get()) dots.allocate(sweep.stored_size(chunk));
    sweep.for_each_block(chunk, 0, chunk.blocks(), [&](const Block& block, Scratch& s) {
      A* block_dots = sweep.stored_block(dots.get(), chunk, block);
      A* l = sweep.block_buffer(s.e);
      sweep.multiply_block(chunk, block, s, block_dots);
      sweep.logits_block(chunk, block, false, block_dots, l, s.view, static_cast<A*>(t.target_logit));
      sweep.fold_i_side(rows, block, l, block.rows);
    });
    sweep.finish_i_side(rows, chunk);
    for (int64_t i = chunk.begin; i < chunk.begin + chunk.rows; ++i) {
      row_loss<A>(t, i, lse.get()[i], gradients.rows, d_target.get());
    }
    gradients.add_chunk(chunk, dots.get());
  });
  gradients.finish();
}

// ---- Types -------------------------------------------------------------------------------------------------

#ifdef HAS_BF16_DOT
using ComputeForBFloat16 = ComputeBFloat16;
#else
using ComputeForBFloat16 = ComputeFloat;
#endif

#define CONTRASTIVE_OPS_FOR_TYPE(function, Argument)                                                    \
  void function##_any(const SimilarityProblem& p, const Argument& argument, const Parallel& parallel) { \
    switch (p.dtype) {                                                                                  \
      case DType::float32:                                                                              \
        return function<ComputeFloat, float>(p, argument, parallel);                                    \
      case DType::float64:                                                                              \
        return function<ComputeDouble, double>(p, argument, parallel);                                  \
      case DType::bfloat16:                                                                             \
        return function<ComputeForBFloat16, BFloat16>(p, argument, parallel);                           \
      case DType::float16:                                                                              \
        return function<ComputeFloat, Half>(p, argument, parallel);                                     \
    }                                                                                                   \
  }
CONTRASTIVE_OPS_FOR_TYPE(forward, SimilarityForward)
CONTRASTIVE_OPS_FOR_TYPE(backward, SimilarityBackward)
CONTRASTIVE_OPS_FOR_TYPE(total, SimilarityTotal)

}  // namespace

SimilarityReduce similarity_reduce() { return {forward_any, backward_any, total_any}; }

}  // namespace LEVEL
}  // namespace contrastive_ops
