// The schedule: chunk of rows -> blocks of columns in parallel -> barrier -> what needs the whole chunk.
//
// Chunk and block sizes depend on the problem alone and every output has one owner per phase, so results are
// bitwise the same for any number of threads, and no thread keeps a private copy of dy.
#pragma once

#include "../similarity_reduce.h"
#include "similarity_epilogue.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

constexpr int64_t kChunkRows = 512;
// Packed gradient weights of a chunk are kept for this many columns at a time (4 MiB of float32).
constexpr int64_t kSuperBlock = 2048;
// Inner products that a chunk keeps between its fold and its gradients: bounds the rows of a chunk.
constexpr int64_t kChunkElements = int64_t{16} << 20;

struct Chunk {
  int64_t begin, rows;     // rows of x
  int64_t j_begin, j_end;  // columns: from the diagonal on for self-similarity
  int64_t blocks() const { return (j_end - j_begin + kBlock - 1) / kBlock; }
};

struct Block {
  int64_t index, j, cols;
  int64_t rows;      // rows of the chunk that this block needs
  int64_t mirrored;  // of them, those that also stand for the element below the diagonal
};

// One fold of the matrix: partial results of the chunk per block on the i-side, running results on the j-side.
template <class A>
struct Fold {
  A* lse = nullptr;
  bool i_side = false, j_side = false;
  Buffer<A> partial_max, partial_sum;  // (blocks, chunk rows)
  Buffer<A> running_max, running_sum;  // (M)
};

template <class C, class S>
class Sweep {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;

  Sweep(const SimilarityProblem& problem, const Parallel& parallel, bool holds_chunk)
      : p(problem), parallel_(parallel), chunk_rows(rows_of_a_chunk(problem, holds_chunk)) {
    padded_columns = round_up(p.M, kBlock) + kBlock;
    zeros.allocate(chunk_rows);
    ones.allocate(chunk_rows);
    for (int64_t i = 0; i < chunk_rows; ++i) {
      zeros.get()[i] = 0;
      ones.get()[i] = 1;
    }
    x_panels.allocate(round_up(chunk_rows, kLaneGroup<C>) * depth_units<C>(p.D));
    scratch_ = new Scratch[parallel.threads];
  }
  ~Sweep() { delete[] scratch_; }
  Sweep(const Sweep&) = delete;
  Sweep& operator=(const Sweep&) = delete;

  struct Scratch {
    Buffer<A> dots, e, g;
    Buffer<U> y_panel, weights_panels, y_columns;
    View<A> view;
    Sums<A> sums;
    A lse_j[kBlock], weight_j[kBlock], residual_j[kBlock];
  };

  // Calls body(chunk) for the chunks in order.
  template <class Body>
  void for_each_chunk(Body body) {
    for (int64_t begin = 0; begin < p.N; begin += chunk_rows) {
      Chunk chunk{begin, minimum(chunk_rows, p.N - begin), p.self ? begin : 0, p.M};
      kept = p.kept && kept_used + stored_size(chunk) <= p.kept_size ? static_cast<A*>(p.kept) + kept_used : nullptr;
      if (kept) kept_used += stored_size(chunk);
      pack_x(chunk);
      body(chunk);
    }
  }

  // Calls body(block, scratch) for blocks [first, last) of a chunk, in parallel.
  template <class Body>
  void for_each_block(const Chunk& chunk, int64_t first, int64_t last, Body body) {
    auto task = [&](int64_t index, int thread) {
      Block block;
      block.index = first + index;
      block.j = chunk.j_begin + block.index * kBlock;
      block.cols = minimum(kBlock, chunk.j_end - block.j);
      block.rows = p.self ? minimum(chunk.rows, block.j + block.cols - chunk.begin) : chunk.rows;
      block.mirrored = p.self ? minimum(chunk.rows, block.j - chunk.begin) : 0;
      body(block, scratch_[thread]);
    };
    run_parallel(parallel_.run, last - first, task);
  }

  // Where the inner products of a block stand when the chunk is stored (kept for backward, or held by total).
  static A* stored_block(A* chunk_data, const Chunk& chunk, const Block& block) {
    return chunk_data + block.index * kBlock * padded_rows(chunk);
  }
  static int64_t padded_rows(const Chunk& chunk) { return round_up(chunk.rows, kLaneGroup<C>); }
  static int64_t stored_size(const Chunk& chunk) { return chunk.blocks() * kBlock * padded_rows(chunk); }

  // Inner products of the block's columns with the chunk's rows, complete in depth.
  void multiply_block(const Chunk& chunk, const Block& block, Scratch& s, A* dots) {
    const int64_t units = depth_units<C>(p.D);
    U* y_panel = s.y_panel.once(kCols<C> * units);
    const int64_t rows = minimum(round_up(block.rows, kRows), padded_rows(chunk));
    for (int64_t j = 0; j < kBlock; j += kCols<C>) {
      const int64_t lanes = maximum<int64_t>(0, minimum<int64_t>(kCols<C>, block.cols - j));
      const S* from = static_cast<const S*>(p.y) + (block.j + (lanes ? j : 0)) * p.y_stride;
      pack_rows<C, kCols<C>>(y_panel, 0, from, p.y_stride, lanes, kCols<C>, p.D);
      multiply<C>(rows, kCols<C>, units, x_panels.get(), kRows * units, y_panel, 0, dots + j, kBlock, false);
    }
  }

  // The matrix elements (i, j), or, mirrored, (j, i) of self-similarity.
  void set_view(const Chunk& chunk, const Block& block, bool mirrored, View<A>& view) {
    const A* scale = static_cast<const A*>(p.scale);
    const A* row_bias = static_cast<const A*>(p.row_bias);
    const A* col_bias = static_cast<const A*>(p.col_bias);
    const A* bias_i = mirrored ? col_bias : row_bias;
    const A* bias_j = mirrored ? row_bias : col_bias;
    view.scale_i = mirrored ? ones.get() : scale + chunk.begin;
    view.bias_i = bias_i ? bias_i + chunk.begin : zeros.get();
    for (int64_t j = 0; j < kBlock; ++j) {
      const bool inside = j < block.cols;
      view.scale_j[j] = mirrored && inside ? scale[block.j + j] : 1;
      view.bias_j[j] = bias_j && inside ? bias_j[block.j + j] : 0;
    }
  }

  // Calls dropped(i, j) for pairs that no fold sees, then target(i, j, owner) for the targets, in block coordinates.
  template <class Dropped, class Target>
  void for_each_special(const Chunk& chunk, const Block& block, bool mirrored, Dropped dropped, Target target) {
    const int64_t i_count = mirrored ? block.mirrored : block.rows, j_count = block.cols;
    const int64_t owners = mirrored ? j_count : i_count, others = mirrored ? i_count : j_count;
    const int64_t owner_begin = mirrored ? block.j : chunk.begin, other_begin = mirrored ? chunk.begin : block.j;
    for (int64_t o = 0; p.has_diagonal && o < owners; ++o) {
      const int64_t q = owner_begin + o + p.diagonal - other_begin;
      if (q >= 0 && q < others) mirrored ? dropped(q, o) : dropped(o, q);
    }
    for (int64_t o = 0; p.target && o < owners; ++o) {
      const int64_t q = p.target[owner_begin + o] - other_begin;
      if (q >= 0 && q < others) mirrored ? target(q, o, owner_begin + o) : target(o, q, owner_begin + o);
    }
  }

  // Logits of a view into `l`, special pairs at -inf, the targets' logits written out.
  void logits_block(const Chunk& chunk, const Block& block, bool mirrored, const A* dots, A* l, View<A>& view,
                    A* target_logit) {
    set_view(chunk, block, mirrored, view);
    logits(view, dots, l, mirrored ? block.mirrored : block.rows, block.cols);
    if (target_logit) {
      for_each_special(
          chunk, block, mirrored, [](int64_t, int64_t) {},
          [&](int64_t i, int64_t j, int64_t owner) { target_logit[owner] = l[i * kBlock + j]; });
    }
    const auto drop = [&](int64_t i, int64_t j) { l[i * kBlock + j] = -infinity<A>(); };
    for_each_special(chunk, block, mirrored, drop, [&](int64_t i, int64_t j, int64_t) { drop(i, j); });
  }

  // ---- Folds ----------------------------------------------------------------------------------------------

  void start_fold(Fold<A>& fold, A* lse, bool i_side, bool j_side) {
    fold.lse = lse;
    fold.i_side = i_side;
    fold.j_side = j_side;
    if (i_side) {
      const int64_t size = (p.M + kBlock - 1) / kBlock * chunk_rows;
      fold.partial_max.allocate(size);
      fold.partial_sum.allocate(size);
    }
    if (j_side) {
      fold.running_max.allocate(padded_columns);
      fold.running_sum.allocate(padded_columns);
      for (int64_t j = 0; j < padded_columns; ++j) {
        fold.running_max.get()[j] = -infinity<A>();
        fold.running_sum.get()[j] = 0;
      }
    }
  }

  void fold_i_side(Fold<A>& fold, const Block& block, const A* l, int64_t rows) {
    A* max = fold.partial_max.get() + block.index * chunk_rows;
    A* sum = fold.partial_sum.get() + block.index * chunk_rows;
    fold_rows(l, rows, block.cols, max, sum);
    for (int64_t i = rows; i < chunk_rows; ++i) {
      max[i] = -infinity<A>();
      sum[i] = 0;
    }
  }
  void fold_j_side(Fold<A>& fold, const Block& block, const A* l, int64_t rows) {
    fold_columns(l, rows, block.cols, fold.running_max.get() + block.j, fold.running_sum.get() + block.j);
  }

  // Merges the chunk's partial folds, in block order, and writes the lse of its rows.
  void finish_i_side(Fold<A>& fold, const Chunk& chunk) {
    constexpr int W = kLanes<A>;
    auto task = [&](int64_t index, int) {
      const int64_t i = index * W;
      Vec<A> max = broadcast(-infinity<A>()), sum = {};
      if (fold.j_side) {
        max = load(fold.running_max.get() + chunk.begin + i);
        sum = load(fold.running_sum.get() + chunk.begin + i);
      }
      for (int64_t b = 0; b < chunk.blocks(); ++b) {
        merge<A>(max, sum, load(fold.partial_max.get() + b * chunk_rows + i),
                 load(fold.partial_sum.get() + b * chunk_rows + i));
      }
      for (int q = 0; q < W && i + q < chunk.rows; ++q) fold.lse[chunk.begin + i + q] = finish<A>(max[q], sum[q]);
    };
    run_parallel(parallel_.run, (chunk.rows + W - 1) / W, task);
  }
  void finish_j_side(Fold<A>& fold) {
    for (int64_t j = 0; j < p.M; ++j) fold.lse[j] = finish<A>(fold.running_max.get()[j], fold.running_sum.get()[j]);
  }

  A* block_buffer(Buffer<A>& buffer) { return buffer.once(kBlock * round_up(chunk_rows, kLaneGroup<C>)); }
  template <class Body>
  void run(int64_t count, Body body) {
    run_parallel(parallel_.run, count, body);
  }

  Scratch& scratch(int thread) { return scratch_[thread]; }

  const SimilarityProblem& p;
  const Parallel& parallel_;
  const int64_t chunk_rows;
  int64_t padded_columns = 0;
  Buffer<A> zeros, ones;
  Buffer<U> x_panels;  // the chunk's rows, packed as A panels
  A* kept = nullptr;   // where this chunk's inner products are kept, or null
  int64_t kept_used = 0;

 private:
  static int64_t rows_of_a_chunk(const SimilarityProblem& p, bool holds_chunk) {
    int64_t rows = p.self ? kChunkRows / 2 : kChunkRows;  // rows below the diagonal block are wasted work
    if (holds_chunk) rows = minimum(rows, maximum(kBlock, kChunkElements / maximum<int64_t>(p.M, 1) / kBlock * kBlock));
    return minimum(rows, round_up(maximum<int64_t>(p.N, 1), kLaneGroup<C>));
  }

  void pack_x(const Chunk& chunk) {
    const int64_t units = depth_units<C>(p.D);
    run((chunk.rows + kLaneGroup<C> - 1) / kLaneGroup<C>, [&](int64_t group, int) {
      const int64_t i = group * kLaneGroup<C>, lanes = minimum<int64_t>(kLaneGroup<C>, chunk.rows - i);
      pack_rows<C, kRows>(x_panels.get() + i * units, kRows * units,
                          static_cast<const S*>(p.x) + (chunk.begin + i) * p.x_stride, p.x_stride, lanes, lanes, p.D);
    });
  }

  Scratch* scratch_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
