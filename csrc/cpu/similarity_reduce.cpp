// similarity_reduce on the CPU: forward, backward, and the weighted total that forms its gradients in one pass.
//
// Compiled once per SIMD level. The schedule is in
// similarity_sweep.h, gradients of a chunk in similarity_gradients.h, the arithmetic on a block in
// similarity_epilogue.h, folds in similarity_folds.h, rules for pairs in similarity_pairs.h, the matmul in
// similarity_tile.h.
#include "../similarity_reduce.h"

#include "similarity_gradients.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class C>
void forward(const SimilarityProblem& p, const SimilarityForward& out, const Parallel& parallel) {
  using A = typename C::Acc;
  using Scratch = typename Sweep<C>::Scratch;
  Sweep<C> sweep(p, parallel, Use::folds);
  std::unique_ptr<FoldState<A>[]> folds(new FoldState<A>[p.fold_count]);
  for (int f = 0; f < p.fold_count; ++f) sweep.start_fold(folds[f], p.folds[f], out.values[f], out.argmax[f]);
  A* target_logit = static_cast<A*>(out.target_logit);
  Buffer<A> listed(out.linear ? p.linear_indptr[p.N] : 0);  // the logit of each list entry

  // Folds a view of a set; the first set's targets and lists are read before rules hide any pair.
  const auto fold_view = [&](const Block& block, int set, bool mirrored, const A* dots, const A* guide, Scratch& s) {
    A* l = sweep.block_buffer(s.e);
    sweep.logits_block(block, set, mirrored, true, dots, guide, l, s.view, [&](const A* all) {
      if (set != 0) return;
      const auto read = [&](A* to) {
        return [=](int64_t i, int64_t j, int64_t position) { to[position] = all[i * kBlock + j]; };
      };
      if (target_logit) sweep.for_each_target(block, mirrored, read(target_logit));
      if (out.linear) sweep.for_each_linear(block, mirrored, read(listed.get()));
    });
    for (int f = 0; f < p.fold_count; ++f) {
      if (p.folds[f].set == set) sweep.add_to_fold(folds[f], p.folds[f].cols, block, mirrored, l);
    }
  };

  sweep.for_each_chunk(false, [&](const Chunk& chunk) {
    sweep.for_each_tile(chunk, [&](const Block& block, Scratch& s) {
      A* dots = sweep.place(chunk, block);
      sweep.multiply_block(chunk, block, s, dots = dots ? dots : sweep.block_buffer(s.dots));
      const A* guide = sweep.guide_block(chunk, block, s);
      for (int set = 0; set < p.set_count; ++set) {
        fold_view(block, set, false, dots, guide, s);
        if (p.self) fold_view(block, set, true, dots, guide, s);
      }
    });
    sweep.finish_chunk(folds.get(), p.fold_count, chunk, [](int64_t, int64_t) {});
  });
  for (int f = 0; p.N == 0 && f < p.fold_count; ++f) {
    if (!folds[f].i_side) folds[f].finish_j(0, p.M);
  }
  for (int64_t i = 0; out.linear && i < p.N; ++i) {
    double sum = 0;
    for (int64_t e = p.linear_indptr[i]; e < p.linear_indptr[i + 1]; ++e) {
      sum += static_cast<double>(static_cast<const A*>(p.linear_weight)[e]) * listed.get()[e];
    }
    static_cast<A*>(out.linear)[i] = static_cast<A>(sum);
  }
}

// ---- Backward ----------------------------------------------------------------------------------------------------

template <class C>
void backward(const SimilarityProblem& p, const SimilarityBackward& b, const Parallel& parallel) {
  using A = typename C::Acc;
  Sweep<C> sweep(p, parallel, Use::gradients);
  Gradients<C> gradients(p, b, sweep);
  for (int f = 0; f < p.fold_count; ++f) {
    const SimilarityFold& fold = p.folds[f];
    gradients.upstream[f].set_all(fold.kind, fold.cols ? p.M : p.N, b.values[f], b.d_values[f], b.argmax[f]);
  }
  gradients.d_target = static_cast<const A*>(b.d_target);
  gradients.d_linear = static_cast<const A*>(b.d_linear);
  sweep.for_each_chunk(true, [&](const Chunk& chunk) { gradients.add_chunk(chunk); });
  gradients.finish();
}

// ---- The weighted total ------------------------------------------------------------------------------------

// Loss of row i and its derivatives by the fold, extra_i and the target's logit.
template <class A>
void add_row(const SimilarityTotal& t, int64_t i, A fold, Upstream<A>& upstream, A* d_target) {
  const A *extra = static_cast<const A*>(t.extra), *weight = static_cast<const A*>(t.weight);
  const A* target_weight = static_cast<const A*>(t.target_weight);
  const double logit = static_cast<const A*>(t.target_logit)[i], factor = (weight ? weight[i] : 1.0) / t.size;
  const RowSlopes row = row_loss(t.kind, {{fold, 0, 0}, logit, extra ? extra[i] : -infinity<double>(), 1});
  t.losses[i] = row.loss;
  upstream.set(i, fold, static_cast<A>(factor * row.folds[0]));
  d_target[i] = static_cast<A>(factor * row.target + (target_weight ? target_weight[i] / t.size : 0));
  if (t.dextra) static_cast<A*>(t.dextra)[i] = static_cast<A>(factor * row.extra);
}

template <class C>
void total(const SimilarityProblem& p, const SimilarityTotal& t, const Parallel& parallel) {
  using A = typename C::Acc;
  using Scratch = typename Sweep<C>::Scratch;
  Sweep<C> sweep(p, parallel, Use::total);
  Gradients<C> gradients(p, t.gradients, sweep);
  const FoldKind kind = p.folds[0].kind;
  gradients.upstream[0].allocate(kind, p.N);
  Buffer<A> values(p.N), d_target(p.N);
  gradients.d_target = d_target.get();
  FoldState<A> fold;
  sweep.start_fold(fold, p.folds[0], values.get(), nullptr);
  sweep.for_each_chunk(false, [&](const Chunk& chunk) {
    sweep.for_each_tile(chunk, [&](const Block& block, Scratch& s) {
      A *dots = sweep.place(chunk, block), *l = sweep.block_buffer(s.e);
      sweep.multiply_block(chunk, block, s, dots);
      const A* guide = sweep.guide_block(chunk, block, s);
      sweep.logits_block(block, 0, false, true, dots, guide, l, s.view, [&](const A* all) {
        sweep.for_each_target(block, false, [&](int64_t i, int64_t j, int64_t owner) {
          static_cast<A*>(t.target_logit)[owner] = all[i * kBlock + j];
        });
      });
      sweep.add_to_fold(fold, false, block, false, l);
    });
    sweep.finish_chunk(&fold, 1, chunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) add_row<A>(t, i, values.get()[i], gradients.upstream[0], d_target.get());
    });
    gradients.add_chunk(chunk);
  });
  gradients.finish();
}

// ---- Types -------------------------------------------------------------------------------------------------

void forward_any(const SimilarityProblem& p, const SimilarityForward& out, const Parallel& parallel) {
  for_compute(
      p.dtype, [&](auto c) { forward<decltype(c)>(p, out, parallel); },
      [&] { LEVEL_BELOW::similarity_reduce().forward(p, out, parallel); });
}
void backward_any(const SimilarityProblem& p, const SimilarityBackward& gradients, const Parallel& parallel) {
  for_compute(
      p.dtype, [&](auto c) { backward<decltype(c)>(p, gradients, parallel); },
      [&] { LEVEL_BELOW::similarity_reduce().backward(p, gradients, parallel); });
}
void total_any(const SimilarityProblem& p, const SimilarityTotal& out, const Parallel& parallel) {
  for_compute(
      p.dtype, [&](auto c) { total<decltype(c)>(p, out, parallel); },
      [&] { LEVEL_BELOW::similarity_reduce().total(p, out, parallel); });
}

}  // namespace

SimilarityReduce similarity_reduce() { return {forward_any, backward_any, total_any}; }

}  // namespace LEVEL
}  // namespace contrastive_ops
