// The schedule: chunk of rows -> blocks of columns in parallel -> barrier -> what needs the whole chunk.
//
// Chunk and block sizes depend on the problem alone and every output has one owner per phase, so results are
// bitwise the same for any number of threads, and no thread keeps a private copy of dy.
#pragma once

#include "similarity_folds.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

constexpr int64_t kChunkRows = 512;
// Packed gradient weights of a chunk are kept for this many columns at a time (4 MiB of float32).
constexpr int64_t kSuperBlock = 2048;
// Inner products that a chunk keeps between its fold and its gradients: bounds the rows of a chunk.
constexpr int64_t kChunkElements = int64_t{16} << 20;

struct Chunk {
  int64_t begin, rows;             // rows of x
  int64_t j_begin, j_end;          // columns: from the diagonal on for self-similarity
  int64_t block_columns = kBlock;  // of each block but the last
  int64_t blocks() const { return (j_end - j_begin + block_columns - 1) / block_columns; }
};

// Few columns make narrow blocks, so that there are enough for more than a few threads.
inline int64_t columns_of_a_block(int64_t columns) { return columns <= 128 ? 32 : columns <= 256 ? 64 : kBlock; }

struct Block {
  int64_t index, j, cols;
  int64_t rows;      // rows of the chunk that this block needs
  int64_t mirrored;  // of them, those that also stand for the element below the diagonal
};

template <class C, class S>
class Sweep : public Views<typename C::Acc> {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;
  using G = std::conditional_t<sizeof(A) == 4, ComputeFloat, ComputeDouble>;  // what the guide is computed in

  Sweep(const SimilarityProblem& problem, const Parallel& parallel, bool holds_chunk)
      : Views<A>(problem, rows_of_a_chunk(problem, holds_chunk)),
        p(problem),
        parallel_(parallel),
        chunk_rows(rows_of_a_chunk(problem, holds_chunk)),
        block_columns(columns_of_a_block(problem.M)) {
    padded_columns = round_up(p.M, kBlock) + kBlock;
    x_panels.allocate(round_up(chunk_rows, kLaneGroup<C>) * depth_units<C>(p.D));
    if (this->guided) guide_panels_.allocate(round_up(chunk_rows, kLaneGroup<G>) * depth_units<G>(p.guide_depth));
    scratch_.reset(new Scratch[parallel.threads]);
    for (int thread = 0; thread < parallel.threads; ++thread) scratch_[thread].thread = thread;
  }

  struct Scratch {
    Buffer<A> dots, l, e, g, guide;
    Buffer<U> y_panel, weights_panels, y_columns;
    Buffer<typename G::Unit> guide_panel;
    View<A> view;
    int thread = 0;
  };

  // Calls body(chunk) for the chunks in order.
  template <class Body>
  void for_each_chunk(Body body) {
    kept_used = 0;
    for (int64_t first = 0; first < p.N; first += chunk_rows) {
      Chunk chunk{first, minimum(chunk_rows, p.N - first), p.self ? first : 0, p.M, block_columns};
      begin(chunk);
      body(chunk);
    }
  }
  // Packs the rows of a chunk and finds out where its inner products are kept. Chunks begin in order.
  void begin(const Chunk& chunk) {
    kept = p.kept && kept_used + stored_size(chunk) <= p.kept_size ? static_cast<A*>(p.kept) + kept_used : nullptr;
    if (kept) kept_used += stored_size(chunk);
    pack<C, S>(chunk, p.x, p.x_stride, p.D, x_panels);
    if (this->guided) pack<G, A>(chunk, p.guide_x, p.guide_depth, p.guide_depth, guide_panels_);
  }

  // Calls body(block, scratch) for blocks [first, last) of a chunk, in parallel. `more_depth`: of products with the
  // weights of pairs that the body makes besides.
  template <class Body>
  void for_each_block(const Chunk& chunk, int64_t first, int64_t last, Body body, int64_t more_depth = 0) {
    auto task = [&](int64_t index, int thread) {
      Block block;
      block.index = first + index;
      block.j = chunk.j_begin + block.index * block_columns;
      block.cols = minimum(block_columns, chunk.j_end - block.j);
      block.rows = p.self ? minimum(chunk.rows, block.j + block.cols - chunk.begin) : chunk.rows;
      block.mirrored = p.self ? minimum(chunk.rows, block.j - chunk.begin) : 0;
      body(block, scratch_[thread]);
    };
    const int64_t columns = minimum(last * block_columns, chunk.j_end - chunk.j_begin) - first * block_columns;
    run_parallel(parallel_.run, last - first, task, chunk.rows * columns * (p.D + more_depth + kWorkOfFold));
  }

  // Where the inner products of a block stand when the chunk is stored (kept for backward, or held by total): narrow
  // blocks side by side, as parts of one of kBlock columns.
  A* stored_block(A* chunk_data, const Chunk& chunk, const Block& block) const {
    const int64_t column = block.index * block_columns;
    return chunk_data + column / kBlock * kBlock * padded_rows(chunk) + column % kBlock;
  }
  static int64_t padded_rows(const Chunk& chunk) { return round_up(chunk.rows, kLaneGroup<C>); }
  static int64_t stored_size(const Chunk& chunk) {
    return round_up(chunk.j_end - chunk.j_begin, kBlock) * padded_rows(chunk);
  }

  // Inner products of the block's columns with the chunk's rows, complete in depth.
  void multiply_block(const Chunk& chunk, const Block& block, Scratch& s, A* dots) {
    products<C, S>(chunk, block, x_panels, p.y, p.y_stride, p.D, s.y_panel, dots);
    if (p.row_factor) multiply_by_factors(chunk, block, dots);
  }
  // What the inner products of a block, and so their derivatives, are multiplied by.
  A factor_i(int64_t i) const { return static_cast<const A*>(p.row_factor)[i]; }
  A factor_j(int64_t j) const { return static_cast<const A*>(p.col_factor)[j]; }
  void multiply_by_factors(const Chunk& chunk, const Block& block, A* numbers) const {
    constexpr int W = kLanes<A>;
    alignas(64) A of_columns[kBlock] = {};
    for (int64_t j = 0; j < block.cols; ++j) of_columns[j] = factor_j(block.j + j);
    for (int64_t i = 0; i < block.rows; ++i, numbers += kBlock) {
      const A own = factor_i(chunk.begin + i);
      for (int64_t j = 0; j < block.cols; j += W) store(numbers + j, load(numbers + j) * (own * load(of_columns + j)));
    }
  }
  // The guide's similarities of a block, or null where no set has a guide.
  const A* guide_block(const Chunk& chunk, const Block& block, Scratch& s) {
    if (!this->guided) return nullptr;
    A* guide = block_buffer(s.guide);
    products<G, A>(chunk, block, guide_panels_, p.guide_y, p.guide_depth, p.guide_depth, s.guide_panel, guide);
    return guide;
  }

  void set_view(const Chunk& chunk, const Block& block, int set, bool mirrored, View<A>& view) {
    Views<A>::set_view(chunk.begin, block.j, block.cols, set, mirrored, view);
  }

  // Calls body(i, j, position) for each pair of a block that a row names, in block coordinates: `others(owner, from,
  // to, call)` calls call(column, position) for the columns in [from, to) that row `owner` names.
  template <class Others, class Body>
  void for_each_named(const Chunk& chunk, const Block& block, bool mirrored, Others others, Body body) {
    const int64_t owners = mirrored ? block.cols : block.rows, count = mirrored ? block.mirrored : block.cols;
    const int64_t owner_begin = mirrored ? block.j : chunk.begin, begin = mirrored ? chunk.begin : block.j;
    for (int64_t o = 0; o < owners; ++o) {
      others(owner_begin + o, begin, begin + count, [&](int64_t column, int64_t position) {
        mirrored ? body(column - begin, o, position) : body(o, column - begin, position);
      });
    }
  }
  template <class Body>
  void for_each_target(const Chunk& chunk, const Block& block, bool mirrored, Body body) {
    if (!p.target) return;
    const auto own = [&](int64_t owner, int64_t from, int64_t to, auto call) {
      if (p.target[owner] >= from && p.target[owner] < to) call(p.target[owner], owner);
    };
    for_each_named(chunk, block, mirrored, own, body);
  }
  template <class Body>
  void for_each_linear(const Chunk& chunk, const Block& block, bool mirrored, Body body) {
    if (!p.linear_indptr) return;
    const auto own = [&](int64_t owner, int64_t from, int64_t to, auto call) {
      for_each_listed(p.linear_indptr, p.linear_indices, owner, from, to, call);
    };
    for_each_named(chunk, block, mirrored, own, body);
  }

  // Logits of a view into `l`, with -inf where a pair is in no fold. `filled`: dropped pairs have the set's constant
  // instead, as folds see them. `named(l)` is called while `l` still has the logits of all pairs.
  template <class Named>
  void logits_block(const Chunk& chunk, const Block& block, int set, bool mirrored, bool filled, const A* dots,
                    const A* guide, A* l, View<A>& view, Named named) {
    const SimilaritySet& from = p.sets[set];
    const int64_t rows = mirrored ? block.mirrored : block.rows;
    const A dropped = filled && from.fill ? *static_cast<const A*>(from.fill) : -infinity<A>();
    set_view(chunk, block, set, mirrored, view);
    logits(view, dots, l, rows, block.cols);
    named(l);
    if (this->rules[set].looks()) apply_rules(view, dots, guide, l, rows, block.cols, dropped);
    const auto drop = [&](int64_t i, int64_t j, int64_t) { l[i * kBlock + j] = dropped; };
    if (from.has_diagonal) {
      const auto own = [&](int64_t owner, int64_t begin, int64_t end, auto call) {
        const int64_t column = owner + from.diagonal;
        if (column >= begin && column < end) call(column, owner);
      };
      for_each_named(chunk, block, mirrored, own, drop);
    }
    if (from.exclude_indptr) {
      const auto own = [&](int64_t owner, int64_t begin, int64_t end, auto call) {
        for_each_listed(from.exclude_indptr, from.exclude_indices, owner, begin, end, call);
      };
      for_each_named(chunk, block, mirrored, own, drop);
    }
    for_each_target(chunk, block, mirrored, [&](int64_t i, int64_t j, int64_t) { l[i * kBlock + j] = -infinity<A>(); });
  }

  // ---- Folds ----------------------------------------------------------------------------------------------

  void start_fold(FoldState<A>& fold, const SimilarityFold& of, void* value, int64_t* argmax) {
    fold.start(of.kind, static_cast<A*>(value), argmax, p.self || !of.cols, p.self || of.cols, most_blocks(),
               chunk_rows, padded_columns);
  }
  // Adds a block of logits; a row of the matrix is the i-side of a direct and the j-side of a mirrored view.
  void add_to_fold(FoldState<A>& fold, bool cols, const Chunk& chunk, const Block& block, bool mirrored, const A* l) {
    const int64_t rows = mirrored ? block.mirrored : block.rows;
    if (cols != mirrored) return fold.fold_j(block.j, chunk.begin, l, rows, block.cols);
    fold.fold_i(block.index, 0, block.j, l, rows, block.cols);
    fold.clear_i(block.index, rows);
  }
  // Writes the results of the chunk's rows where the i-side is complete.
  void finish_chunk(FoldState<A>& fold, const Chunk& chunk) {
    constexpr int64_t W = kLanes<A>;
    if (!fold.i_side) return;
    run((chunk.rows + W - 1) / W, chunk.rows * chunk.blocks() * kWorkOfFold,
        [&](int64_t group, int) { fold.finish_i(chunk.blocks(), chunk.begin, group * W, chunk.rows); });
  }

  int64_t most_blocks() const { return (p.M + block_columns - 1) / block_columns; }  // of a chunk
  A* block_buffer(Buffer<A>& buffer) { return buffer.once(kBlock * round_up(chunk_rows, kLaneGroup<C>)); }
  // `work`: of all tasks, in multiply-adds.
  template <class Body>
  void run(int64_t count, int64_t work, Body body) {
    run_parallel(parallel_.run, count, body, work);
  }

  Scratch& scratch(int thread) { return scratch_[thread]; }

  const SimilarityProblem& p;
  const Parallel& parallel_;
  const int64_t chunk_rows, block_columns;
  int64_t padded_columns = 0;
  Buffer<U> x_panels;  // the chunk's rows, packed as A panels
  A* kept = nullptr;   // where this chunk's inner products are kept, or null
  int64_t kept_used = 0;

 private:
  static int64_t rows_of_a_chunk(const SimilarityProblem& p, bool holds_chunk) {
    int64_t rows = p.self ? kChunkRows / 2 : kChunkRows;  // rows below the diagonal block are wasted work
    if (holds_chunk) rows = minimum(rows, maximum(kBlock, kChunkElements / maximum<int64_t>(p.M, 1) / kBlock * kBlock));
    return minimum(rows, round_up(maximum<int64_t>(p.N, 1), kLaneGroup<C>));
  }

  // The chunk's rows of a matrix, packed as A panels.
  template <class K, class T>
  void pack(const Chunk& chunk, const void* from, int64_t stride, int64_t depth, Buffer<typename K::Unit>& panels) {
    const int64_t units = depth_units<K>(depth);
    run((chunk.rows + kLaneGroup<K> - 1) / kLaneGroup<K>, chunk.rows * depth * kWorkOfMove, [&](int64_t group, int) {
      const int64_t i = group * kLaneGroup<K>, lanes = minimum<int64_t>(kLaneGroup<K>, chunk.rows - i);
      pack_rows<K, Side::a>(panels.get() + i * units, kRows<K> * units,
                            static_cast<const T*>(from) + (chunk.begin + i) * stride, stride, lanes, lanes, depth);
    });
  }
  template <class K, class T>
  void products(const Chunk& chunk, const Block& block, const Buffer<typename K::Unit>& x, const void* y,
                int64_t stride, int64_t depth, Buffer<typename K::Unit>& scratch, A* dots) {
    const int64_t units = depth_units<K>(depth);
    auto* panel = scratch.once(kCols<K> * units);
    const int64_t rows = minimum(round_up(block.rows, kRows<C>), padded_rows(chunk));
    // Vectors past the block's last column are read by nobody.
    for (int64_t j = 0; j < block.cols; j += kCols<K>) {
      const int64_t lanes = minimum<int64_t>(kCols<K>, block.cols - j);
      const T* from = static_cast<const T*>(y) + (block.j + j) * stride;
      pack_rows<K, Side::b>(panel, 0, from, stride, lanes, kCols<K>, depth);
      multiply<K>(rows, kCols<K>, units, x.get(), kRows<K> * units, panel, 0, dots + j, kBlock, false);
    }
  }

  Buffer<typename G::Unit> guide_panels_;
  std::unique_ptr<Scratch[]> scratch_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
