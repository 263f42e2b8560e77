// The schedule: chunk of rows -> pack -> tiles in parallel -> what needs the whole chunk.
//
// How chunks and tiles are cut is in similarity_cuts.h. Every output has one owner per region, so no thread keeps a
// private copy of a gradient.
#pragma once

#include "similarity_cuts.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class C>
class Sweep : public Views<typename C::Acc> {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;
  using G = std::conditional_t<sizeof(A) == 4, ComputeFloat, ComputeDouble>;  // what the guide is computed in

  Sweep(const SimilarityProblem& problem, const Parallel& parallel, Use use)
      : Sweep(problem, parallel, Cuts(problem, use, kLaneGroup<C>, depth_units<C>(problem.D) * sizeof(U))) {
    holds_ = use == Use::total || use == Use::softmax;
  }

  struct alignas(64) Scratch {  // those of threads on cache lines of their own
    Buffer<A> dots, l, e, g, guide;
    Buffer<U> y_panel;
    Buffer<typename G::Unit> guide_panel;
    View<A> view;
    int thread = 0;
  };

  // Calls body(chunk) for the chunks in order; `known`: kept inner products are there already.
  template <class Body>
  void for_each_chunk(bool known, Body body) {
    for (int64_t first = 0; first < p.N; first += chunk_rows) {
      Chunk chunk{first, minimum(chunk_rows, p.N - first), p.self ? first : 0, p.M, block_columns};
      begin(chunk, known);
      body(chunk);
    }
  }
  // Packs the rows of a chunk, and those of y where all tiles share them. Chunks begin in order.
  void begin(const Chunk& chunk, bool known) {
    if (holds_ && !held_.get()) held_.allocate(round_up(p.M, kBlock) * padded_rows(chunk));
    if (this->guided) {
      guide_panels_.once(round_up(chunk_rows, kLaneGroup<G>) * depth_units<G>(p.guide_depth));
      const int64_t groups = (chunk.rows + kLaneGroup<G> - 1) / kLaneGroup<G>;
      run(groups, chunk.rows * p.guide_depth * kWorkOfMove, [&](int64_t group, int) {
        pack<G, Side::a>(group, static_cast<const A*>(p.guide_x), chunk.begin, chunk.rows, p.guide_depth, p.guide_depth,
                         guide_panels_);
      });
    }
    if (known && keeps(chunk)) return;
    const int64_t units = depth_units<C>(p.D), groups = (chunk.rows + kLaneGroup<C> - 1) / kLaneGroup<C>;
    const bool packs_y = cuts_.shares_y && !y_panels_.get();
    const int64_t groups_of_y = packs_y ? (p.M + kLaneGroup<C> - 1) / kLaneGroup<C> : 0;
    x_panels_.once(round_up(chunk_rows, kLaneGroup<C>) * units);
    if (packs_y) y_panels_.allocate(round_up(p.M, kLaneGroup<C>) * units);
    const int64_t rows = chunk.rows + (packs_y ? p.M : 0);
    run(groups + groups_of_y, rows * p.D * kWorkOfMove, [&](int64_t index, int) {
      if (index < groups) {
        pack<C, Side::a>(index, StoredNumbers<C>(p.x, p.dtype), chunk.begin, chunk.rows, p.x_stride, p.D, x_panels_);
      } else {
        pack<C, Side::b>(index - groups, StoredNumbers<C>(p.y, p.dtype), 0, p.M, p.y_stride, p.D, y_panels_);
      }
    });
  }

  // Calls body(block, scratch) for the tiles of blocks [first, last) of a chunk, and more(index) for `count` other
  // tasks, in parallel. `work`: of a pair besides its inner product; `more_work`: of the other tasks.
  template <class Body, class More>
  void for_each_tile(const Chunk& chunk, int64_t first, int64_t last, Body body, int64_t work, int64_t count,
                     int64_t more_work, More more) {
    // Tiles of a band of rows come together, those of a block of columns one after another.
    const int64_t tiles = (chunk.rows + tile_rows - 1) / tile_rows, band = maximum<int64_t>(kChunkRows / tile_rows, 1);
    const int64_t width = last - first;
    const auto task = [&](int64_t index, int thread) {
      if (index >= tiles * width) return more(index - tiles * width);
      const int64_t before = index / (band * width) * band, here = minimum(band, tiles - before);
      const int64_t at = index - before * width;
      const Block block = block_at(chunk, first + at / here, before + at % here);
      if (block.rows > 0) body(block, scratch_[thread]);
    };
    const int64_t columns = minimum(last * block_columns, chunk.j_end - chunk.j_begin) - first * block_columns;
    run(tiles * width + count, chunk.rows * columns * work + more_work, task);
  }
  template <class Body>
  void for_each_tile(const Chunk& chunk, Body body) {
    for_each_tile(chunk, 0, chunk.blocks(), body, p.D + kWorkOfFold, 0, 0, [](int64_t) {});
  }
  // How many tiles of the chunk have pairs of a block of columns: those that begin above its last column.
  int64_t tiles_of(const Chunk& chunk, int64_t index) const {
    const int64_t end = minimum(chunk.j_begin + (index + 1) * block_columns, chunk.j_end);
    const int64_t rows = p.self ? minimum(chunk.rows, end - chunk.begin) : chunk.rows;
    return (rows + tile_rows - 1) / tile_rows;
  }

  // Where the inner products of a tile stand, or null where they are not kept: neither for backward nor for the rest of
  // the chunk.
  A* place(const Chunk& chunk, const Block& block) const {
    if (bands_.keep(block.i + block.rows)) return static_cast<A*>(p.kept) + bands_.offset(block);
    if (!holds_) return nullptr;
    const int64_t column = block.index * block_columns;
    return held_.get() + column / kBlock * kBlock * padded_rows(chunk) + column % kBlock + block.row * kBlock;
  }
  bool keeps(const Chunk& chunk) const { return bands_.keep(chunk.begin + chunk.rows); }
  bool places(const Chunk& chunk) const { return holds_ || keeps(chunk); }
  static int64_t padded_rows(const Chunk& chunk) { return round_up(chunk.rows, kLaneGroup<C>); }

  // Inner products of the block's columns with the chunk's rows, complete in depth.
  void multiply_block(const Chunk& chunk, const Block& block, Scratch& s, A* dots) {
    products<C>(chunk, block, x_panels_, y_panels_.get(), StoredNumbers<C>(p.y, p.dtype), p.y_stride, p.D, s.y_panel,
                dots);
    if (p.row_factor) multiply_by_factors(block, dots);
  }
  // What the inner products of a block, and so their derivatives, are multiplied by.
  A factor_i(int64_t i) const { return static_cast<const A*>(p.row_factor)[i]; }
  A factor_j(int64_t j) const { return static_cast<const A*>(p.col_factor)[j]; }
  void multiply_by_factors(const Block& block, A* numbers) const {
    constexpr int W = kLanes<A>;
    alignas(64) A of_columns[kBlock] = {};
    for (int64_t j = 0; j < block.cols; ++j) of_columns[j] = factor_j(block.j + j);
    for (int64_t i = 0; i < block.rows; ++i, numbers += kBlock) {
      const A own = factor_i(block.i + i);
      for (int64_t j = 0; j < block.cols; j += W) store(numbers + j, load(numbers + j) * (own * load(of_columns + j)));
    }
  }
  // The guide's similarities of a block, or null where no set has a guide.
  const A* guide_block(const Chunk& chunk, const Block& block, Scratch& s) {
    if (!this->guided) return nullptr;
    A* guide = block_buffer(s.guide);
    products<G>(chunk, block, guide_panels_, nullptr, static_cast<const A*>(p.guide_y), p.guide_depth, p.guide_depth,
                s.guide_panel, guide);
    return guide;
  }

  void set_view(const Block& block, int set, bool mirrored, View<A>& view) {
    Views<A>::set_view(block.i, block.j, block.cols, set, mirrored, view);
  }

  // Calls body(i, j, position) for each pair of a block that a row names, in block coordinates: `others(owner, from,
  // to, call)` calls call(column, position) for the columns in [from, to) that row `owner` names.
  template <class Others, class Body>
  void for_each_named(const Block& block, bool mirrored, Others others, Body body) {
    const int64_t owners = mirrored ? block.cols : block.rows, count = mirrored ? block.mirrored : block.cols;
    const int64_t owner_begin = mirrored ? block.j : block.i, begin = mirrored ? block.i : block.j;
    for (int64_t o = 0; o < owners; ++o) {
      others(owner_begin + o, begin, begin + count, [&](int64_t column, int64_t position) {
        mirrored ? body(column - begin, o, position) : body(o, column - begin, position);
      });
    }
  }
  template <class Body>
  void for_each_target(const Block& block, bool mirrored, Body body) {
    if (!p.target) return;
    const auto own = [&](int64_t owner, int64_t from, int64_t to, auto call) {
      if (p.target[owner] >= from && p.target[owner] < to) call(p.target[owner], owner);
    };
    for_each_named(block, mirrored, own, body);
  }
  template <class Body>
  void for_each_linear(const Block& block, bool mirrored, Body body) {
    if (!p.linear_indptr) return;
    const auto own = [&](int64_t owner, int64_t from, int64_t to, auto call) {
      for_each_listed(p.linear_indptr, p.linear_indices, owner, from, to, call);
    };
    for_each_named(block, mirrored, own, body);
  }

  // Logits of a view into `l`, with -inf where a pair is in no fold. `filled`: dropped pairs have the set's constant
  // instead, as folds see them. `named(l)` is called while `l` still has the logits of all pairs.
  template <class Named>
  void logits_block(const Block& block, int set, bool mirrored, bool filled, const A* dots, const A* guide, A* l,
                    View<A>& view, Named named) {
    const SimilaritySet& from = p.sets[set];
    const int64_t rows = mirrored ? block.mirrored : block.rows;
    const A dropped = filled && from.fill ? *static_cast<const A*>(from.fill) : -infinity<A>();
    set_view(block, set, mirrored, view);
    logits(view, dots, l, rows, block.cols);
    named(l);
    if (this->rules[set].looks()) apply_rules(view, dots, guide, l, rows, block.cols, dropped);
    const auto drop = [&](int64_t i, int64_t j, int64_t) { l[i * kBlock + j] = dropped; };
    if (from.has_diagonal) {
      const auto own = [&](int64_t owner, int64_t begin, int64_t end, auto call) {
        const int64_t column = owner + from.diagonal;
        if (column >= begin && column < end) call(column, owner);
      };
      for_each_named(block, mirrored, own, drop);
    }
    if (from.exclude_indptr) {
      const auto own = [&](int64_t owner, int64_t begin, int64_t end, auto call) {
        for_each_listed(from.exclude_indptr, from.exclude_indices, owner, begin, end, call);
      };
      for_each_named(block, mirrored, own, drop);
    }
    for_each_target(block, mirrored, [&](int64_t i, int64_t j, int64_t) { l[i * kBlock + j] = -infinity<A>(); });
  }

  // ---- Folds ----------------------------------------------------------------------------------------------

  void start_fold(FoldState<A>& fold, const SimilarityFold& from, void* value, int64_t* argmax) {
    const int64_t tiles = (chunk_rows + tile_rows - 1) / tile_rows;
    fold.start(from.kind, static_cast<A*>(value), argmax, p.self || !from.cols, p.self || from.cols, most_blocks(),
               chunk_rows, tiles, padded_columns);
  }
  // Adds a tile of logits; a row of the matrix is the i-side of a direct and the j-side of a mirrored view.
  void add_to_fold(FoldState<A>& fold, bool cols, const Block& block, bool mirrored, const A* l) {
    const int64_t rows = mirrored ? block.mirrored : block.rows;
    if (cols != mirrored) return fold.fold_part_j(block.tile, block.j, block.i, l, rows, block.cols);
    fold.fold_i(block.index, block.row, block.j, l, rows, block.cols);
    fold.clear_i(block.index, block.row + rows, block.row + tile_rows);
  }
  // Merges what the tiles of a chunk have folded and writes what is complete. Then done(begin, end) is called for
  // ranges of its rows, if the folds are of rows.
  template <class Done>
  void finish_chunk(FoldState<A>* folds, int count, const Chunk& chunk, Done done) {
    bool on_i = false, on_j = false;
    for (int f = 0; f < count; ++f) on_i |= folds[f].i_side, on_j |= folds[f].j_side;
    const int64_t width = block_columns, blocks = chunk.blocks(), row_ranges = (chunk.rows + width - 1) / width;
    const auto merge_columns = [&](int64_t block) {
      const int64_t begin = chunk.j_begin + block * width, end = minimum(begin + width, chunk.j_end);
      for (int f = 0; f < count; ++f) {
        if (!folds[f].j_side) continue;
        folds[f].merge_j(begin, end, tiles_of(chunk, block));
        if (!folds[f].i_side && chunk.begin + chunk.rows == p.N) folds[f].finish_j(begin, end);
      }
    };
    const auto merge_rows = [&](int64_t range) {
      const int64_t first = range * width, last = minimum(first + width, chunk.rows);
      for (int f = 0; f < count; ++f) {
        for (int64_t i = first; folds[f].i_side && i < last; i += kLanes<A>) {
          folds[f].finish_i(p.self ? range : 0, blocks, chunk.begin, i, chunk.rows);
        }
      }
      done(chunk.begin + first, chunk.begin + last);
    };
    // Rows of self-similarity begin with what their columns have.
    const int64_t of_rows = on_i && !p.self ? row_ranges : 0, of_columns = on_j ? blocks : 0;
    run(of_rows + of_columns, (chunk.rows * blocks + p.M) * kWorkOfFold * count, [&](int64_t index, int) {
      if (index < of_rows) return merge_rows(index);
      merge_columns(index - of_rows);
      if (p.self && index < row_ranges) merge_rows(index);
    });
  }

  int64_t most_blocks() const { return (p.M + block_columns - 1) / block_columns; }  // of a chunk
  A* block_buffer(Buffer<A>& buffer) { return buffer.once(kBlock * round_up(tile_rows, kLaneGroup<C>)); }
  // `work`: of all tasks, in multiply-adds.
  template <class Body>
  void run(int64_t count, int64_t work, Body body) {
    run_parallel(parallel_.run, count, body, work);
  }

  Scratch& scratch(int thread) { return scratch_[thread]; }

  const SimilarityProblem& p;
  const Parallel& parallel_;
  const int64_t chunk_rows, tile_rows, block_columns;
  int64_t padded_columns = 0;

 private:
  Sweep(const SimilarityProblem& problem, const Parallel& parallel, const Cuts& cuts)
      : Views<A>(problem, cuts.tile_rows),
        p(problem),
        parallel_(parallel),
        chunk_rows(cuts.chunk_rows),
        tile_rows(cuts.tile_rows),
        block_columns(cuts.block_columns),
        cuts_(cuts),
        bands_(problem, kLaneGroup<C>) {
    padded_columns = round_up(p.M, kBlock) + kBlock;
    scratch_.reset(new Scratch[parallel.threads]);
    for (int thread = 0; thread < parallel.threads; ++thread) scratch_[thread].thread = thread;
  }

  Block block_at(const Chunk& chunk, int64_t index, int64_t tile) const {
    Block block;
    block.index = index;
    block.tile = tile;
    block.j = chunk.j_begin + index * block_columns;
    block.cols = minimum(block_columns, chunk.j_end - block.j);
    block.row = tile * tile_rows;
    block.i = chunk.begin + block.row;
    const int64_t rows = minimum(tile_rows, chunk.rows - block.row);
    block.rows = p.self ? minimum(rows, block.j + block.cols - block.i) : rows;
    block.mirrored = p.self ? maximum(minimum(rows, block.j - block.i), int64_t{0}) : 0;
    return block;
  }

  // Group `group` of kLaneGroup rows out of `count` of a matrix, packed as panels.
  template <class K, Side side, class Numbers>
  static void pack(int64_t group, Numbers from, int64_t begin, int64_t count, int64_t stride, int64_t depth,
                   Buffer<typename K::Unit>& panels) {
    constexpr int lanes_of_a_panel = kPanelLanes<K, side>;
    const int64_t units = depth_units<K>(depth), i = group * kLaneGroup<K>;
    const int64_t lanes = minimum<int64_t>(kLaneGroup<K>, count - i);
    pack_rows<K, side>(panels.get() + i * units, lanes_of_a_panel * units, from + (begin + i) * stride, stride, lanes,
                       kLaneGroup<K>, depth);
  }
  // `packed`: all rows of y as panels, or null.
  template <class K, class Numbers>
  void products(const Chunk& chunk, const Block& block, const Buffer<typename K::Unit>& x,
                const typename K::Unit* packed, Numbers y, int64_t stride, int64_t depth,
                Buffer<typename K::Unit>& scratch, A* dots) {
    const int64_t units = depth_units<K>(depth);
    const int64_t rows = minimum(round_up(block.rows, kRows<C>), padded_rows(chunk) - block.row);
    const auto* rows_of_x = x.get() + block.row * units;
    // Vectors past the block's last column are read by nobody.
    for (int64_t j = 0; j < block.cols; j += kCols<K>) {
      const auto* panel = packed + (block.j + j) * units;
      if (!packed) {
        auto* own = scratch.once(kCols<K> * units);
        pack_rows<K, Side::b>(own, 0, y + (block.j + j) * stride, stride, minimum<int64_t>(kCols<K>, block.cols - j),
                              kCols<K>, depth);
        panel = own;
      }
      multiply<K>(rows, kCols<K>, units, rows_of_x, kRows<K> * units, panel, 0, dots + j, kBlock, false);
    }
  }

  const Cuts cuts_;
  const Bands bands_;
  bool holds_ = false;
  Buffer<U> x_panels_, y_panels_;  // the chunk's rows, and all of y where tiles share them
  Buffer<A> held_;                 // the chunk's inner products
  Buffer<typename G::Unit> guide_panels_;
  std::unique_ptr<Scratch[]> scratch_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
