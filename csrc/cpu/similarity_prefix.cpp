// similarity_prefix on the CPU: logsumexp of the similarity matrices of all prefixes, and their gradients.
//
// Compiled once per SIMD level. Tiles are in prefix_sweep.h, gradients
// in prefix_gradients.h, folds in similarity_folds.h, the matmul in similarity_tile.h.
#include "../similarity_prefix.h"

#include "prefix_gradients.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class C>
class PrefixFolds {
 public:
  using A = typename C::Acc;

  PrefixFolds(const SimilarityPrefixProblem& problem, const SimilarityPrefixForward& outputs, PrefixSweep<C>& sweep)
      : p(problem), out(outputs), sweep_(sweep) {
    rows_.reset(new FoldState<A>[p.prefixes]);
    cols_.reset(new FoldState<A>[p.prefixes]);
    const int64_t blocks = (p.M + kBlock - 1) / kBlock, padded_columns = round_up(p.M, kBlock) + kBlock;
    for (int64_t s = 0; s < p.prefixes; ++s) {
      if (out.rows) start(rows_[s], values(out.rows, s, p.N), true, p.self, blocks, padded_columns);
      if (out.cols) start(cols_[s], values(out.cols, s, p.M), false, true, blocks, padded_columns);
    }
  }

  void add_chunk(const Chunk& chunk) {
    sweep_.for_each_block(chunk, 0, chunk.blocks(), [&](const Block& block, int thread) {
      A* l = sweep_.logits_buffer(thread);
      sweep_.for_each_tile(chunk, block, thread, [&](const PrefixTile& tile, const A* sums) {
        for (int64_t s = 0; s < p.prefixes; ++s) {
          view(tile, s, false, sums, l);
          if (out.rows) rows_[s].fold_i(block.index, tile.i - chunk.begin, tile.j, l, tile.rows, tile.cols);
          if (out.cols) cols_[s].fold_j(tile.j, tile.i, l, tile.rows, tile.cols);
          if (!tile.mirrored) continue;
          view(tile, s, true, sums, l);
          rows_[s].fold_j(tile.j, tile.i, l, tile.rows, tile.cols);
        }
      });
      for (int64_t s = 0; s < p.prefixes && out.rows; ++s) rows_[s].clear_i(block.index, block.rows);
    });
    constexpr int64_t W = kLanes<A>;
    const int64_t groups = out.rows ? (chunk.rows + W - 1) / W : 0;
    sweep_.run(groups * p.prefixes, chunk.rows * chunk.blocks() * p.prefixes * kWorkOfFold, [&](int64_t index, int) {
      rows_[index / groups].finish_i(0, chunk.blocks(), chunk.begin, index % groups * W, chunk.rows);
    });
  }
  void finish() {
    for (int64_t s = 0; s < p.prefixes && out.cols; ++s) cols_[s].finish_j(0, p.M);
  }

 private:
  static A* values(void* all, int64_t prefix, int64_t size) { return static_cast<A*>(all) + prefix * size; }
  void start(FoldState<A>& fold, A* value, bool on_i, bool on_j, int64_t blocks, int64_t padded_columns) {
    fold.start(FoldKind::logsumexp, value, nullptr, on_i, on_j, blocks, round_up(sweep_.chunk_rows, kTileRows), 0,
               padded_columns);
  }

  // The logits that folds see; those of targets are read before anything is dropped.
  void view(const PrefixTile& tile, int64_t prefix, bool mirrored, const A* sums, A* l) {
    sweep_.logits(tile, prefix, sums, l);
    A* own = values(out.target_logit, prefix, p.N);
    sweep_.for_each_target(tile, mirrored, [&](int64_t i, int64_t j, int64_t row) { own[row] = l[i * kBlock + j]; });
    const auto drop = [&](int64_t i, int64_t j, int64_t) { l[i * kBlock + j] = -infinity<A>(); };
    sweep_.drop_equal_ids(tile, mirrored, l);
    sweep_.for_each_diagonal(tile, mirrored, drop);
    sweep_.for_each_target(tile, mirrored, drop);
  }

  const SimilarityPrefixProblem& p;
  const SimilarityPrefixForward& out;
  PrefixSweep<C>& sweep_;
  std::unique_ptr<FoldState<A>[]> rows_, cols_;  // per prefix
};

template <class C>
void prefix_forward(const SimilarityPrefixProblem& p, const SimilarityPrefixForward& out, const Parallel& parallel) {
  PrefixSweep<C> sweep(p, parallel);
  PrefixFolds<C> folds(p, out, sweep);
  sweep.for_each_chunk([&](const Chunk& chunk) { folds.add_chunk(chunk); });
  folds.finish();
}

template <class C>
void prefix_backward(const SimilarityPrefixProblem& p, const SimilarityPrefixBackward& b, const Parallel& parallel) {
  PrefixSweep<C> sweep(p, parallel);
  PrefixGradients<C> gradients(p, b, sweep);
  sweep.for_each_chunk([&](const Chunk& chunk) { gradients.add_chunk(chunk); });
  gradients.finish();
}

void prefix_forward_any(const SimilarityPrefixProblem& p, const SimilarityPrefixForward& out,
                        const Parallel& parallel) {
  for_compute(
      p.dtype, [&](auto c) { prefix_forward<decltype(c)>(p, out, parallel); },
      [&] { LEVEL_BELOW::similarity_prefix().forward(p, out, parallel); });
}
void prefix_backward_any(const SimilarityPrefixProblem& p, const SimilarityPrefixBackward& gradients,
                         const Parallel& parallel) {
  for_compute(
      p.dtype, [&](auto c) { prefix_backward<decltype(c)>(p, gradients, parallel); },
      [&] { LEVEL_BELOW::similarity_prefix().backward(p, gradients, parallel); });
}

}  // namespace

SimilarityPrefix similarity_prefix() { return {prefix_forward_any, prefix_backward_any}; }

}  // namespace LEVEL
}  // namespace contrastive_ops
