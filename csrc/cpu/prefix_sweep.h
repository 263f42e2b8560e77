// Tiles of the similarity matrices of all prefixes: chunk of rows -> blocks of columns in parallel -> tiles of few
// rows, whose products of all prefixes stay in the level-2 cache.
//
// The products of a tile are accumulated along the depth segment by segment; running sums over segments are the inner
// products of prefixes. Chunks, blocks and tiles depend on the problem alone.
#pragma once

#include "../similarity_prefix.h"
#include "similarity_sweep.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Rows of a tile: those of five prefixes take 160 KiB.
constexpr int64_t kTileRows = 64;

template <class A, class S>
double sum_of_squares(const S* row, int64_t size) {
  constexpr int W = kLanes<A>;
  Vec<A> sum = {};
  int64_t k = 0;
  for (; k + W <= size; k += W) {
    const Vec<A> v = to_accumulator<A>(row + k);
    sum += v * v;
  }
  if (k < size) {
    S tail[W] = {};
    for (int64_t q = 0; k + q < size; ++q) tail[q] = row[k + q];
    const Vec<A> v = to_accumulator<A>(static_cast<const S*>(tail));
    sum += v * v;
  }
  return lane_sum<A>(sum);
}

// Of each prefix and row: the factor that makes its length 1, and factor^2 where the factor depends on the length.
template <class A>
class Lengths {
 public:
  template <class C>
  void measure(const SimilarityPrefixProblem& p, StoredNumbers<C> rows, int64_t row_stride, int64_t count,
               const Parallel& parallel) {
    stride_ = count + kBlock;  // blocks are read in whole vectors
    inverse_.allocate(p.prefixes * stride_);
    slope_.allocate(p.normalize ? p.prefixes * stride_ : 0);
    for (int64_t k = 0; k < p.prefixes * stride_; ++k) inverse_.get()[k] = 1;
    if (!p.normalize) return;
    constexpr A shortest = static_cast<A>(1e-12);  // as torch.nn.functional.normalize
    auto task = [&](int64_t group, int) {
      for (int64_t i = group * kBlock; i < minimum(count, (group + 1) * kBlock); ++i) {
        double squared = 0;
        for (int64_t s = 0, begin = 0; s < p.prefixes; begin = p.dims[s++]) {
          (rows + (i * row_stride + begin)).visit([&](const auto* part) {
            squared += sum_of_squares<A>(part, p.dims[s] - begin);
          });
          const A length = static_cast<A>(sqrt(squared));
          const A inverse = 1 / (length > shortest ? length : shortest);
          inverse_.get()[s * stride_ + i] = inverse;
          slope_.get()[s * stride_ + i] = length > shortest ? inverse * inverse : 0;
        }
      }
    };
    run_parallel(parallel.run, (count + kBlock - 1) / kBlock, task, count * p.dims[p.prefixes - 1]);
  }
  const A* inverse(int64_t prefix) const { return inverse_.get() + prefix * stride_; }
  const A* slope(int64_t prefix) const { return slope_.get() + prefix * stride_; }

 private:
  int64_t stride_ = 0;
  Buffer<A> inverse_, slope_;
};

// A few rows of a chunk and the columns of a block.
struct PrefixTile {
  int64_t i, rows;  // of x
  int64_t j, cols;
  bool mirrored;  // also stands for the elements below the diagonal
};

template <class C>
class PrefixSweep {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;
  using I = Id<A>;

  PrefixSweep(const SimilarityPrefixProblem& problem, const Parallel& parallel)
      : p(problem),
        parallel_(parallel),
        chunk_rows(minimum(problem.self ? kChunkRows / 2 : kChunkRows, round_up(problem.N, kTileRows))) {
    x_lengths.measure(p, x(), p.x_stride, p.N, parallel);
    if (!p.self) y_lengths_.measure(p, y(), p.y_stride, p.M, parallel);
    units_.allocate(p.prefixes + 1);
    units_.get()[0] = 0;
    for (int64_t s = 0; s < p.prefixes; ++s) units_.get()[s + 1] = units_.get()[s] + depth_units<C>(width(s));
    x_panels_.allocate(round_up(chunk_rows, kTileRows) * units_.get()[p.prefixes]);
    if (p.differ_rows) ids_.assign(p.differ_rows, p.N, p.differ_cols, p.M);
    scaled_.allocate(p.prefixes * (p.N + kBlock));
    for (int64_t s = 0; s < p.prefixes; ++s) {
      for (int64_t i = 0; i < p.N; ++i) {
        scaled_.get()[s * (p.N + kBlock) + i] = x_lengths.inverse(s)[i] * *static_cast<const A*>(p.scale);
      }
    }
    scratch_.reset(new Scratch[parallel.threads]);
  }

  struct Scratch {
    Buffer<U> y_panels;
    Buffer<A> dots, l;
  };

  // ---- Segments of the depth ----

  int64_t begin(int64_t segment) const { return segment == 0 ? 0 : p.dims[segment - 1]; }
  int64_t width(int64_t segment) const { return p.dims[segment] - begin(segment); }
  const Lengths<A>& y_lengths() const { return p.self ? x_lengths : y_lengths_; }
  StoredNumbers<C> x() const { return {p.x, p.dtype}; }
  StoredNumbers<C> y() const { return {p.y, p.dtype}; }
  // What an inner product is multiplied with: scaled(prefix)[i] * y_lengths().inverse(prefix)[j].
  const A* scaled(int64_t prefix) const { return scaled_.get() + prefix * (p.N + kBlock); }
  const I* row_ids() const { return ids_.rows(); }
  const I* col_ids() const { return ids_.cols(); }

  // ---- The schedule ----

  template <class Body>
  void for_each_chunk(Body body) {
    for (int64_t begin = 0; begin < p.N; begin += chunk_rows) {
      const Chunk chunk{begin, minimum(chunk_rows, p.N - begin), p.self ? begin : 0, p.M};
      pack_rows_of(chunk);
      body(chunk);
    }
  }
  template <class Body>
  void for_each_block(const Chunk& chunk, int64_t first, int64_t last, Body body) {
    const int64_t columns = minimum(chunk.j_begin + last * kBlock, chunk.j_end) - (chunk.j_begin + first * kBlock);
    run(last - first, chunk.rows * columns * (p.D + p.prefixes * kWorkOfFold), [&](int64_t index, int thread) {
      Block block;
      block.index = first + index;
      block.j = chunk.j_begin + block.index * kBlock;
      block.cols = minimum(kBlock, chunk.j_end - block.j);
      block.rows = p.self ? minimum(chunk.rows, block.j + block.cols - chunk.begin) : chunk.rows;
      block.mirrored = p.self ? minimum(chunk.rows, block.j - chunk.begin) : 0;
      body(block, thread);
    });
  }
  // Calls body(tile, sums) with the inner products of all prefixes.
  template <class Body>
  void for_each_tile(const Chunk& chunk, const Block& block, int thread, Body body) {
    Scratch& s = scratch_[thread];
    A* sums = s.dots.once(p.prefixes * kTileRows * kBlock);
    pack_block(block, s);
    for (int64_t r = 0; r < block.rows; r += kTileRows) {
      const PrefixTile tile{chunk.begin + r, minimum(kTileRows, block.rows - r), block.j, block.cols,
                            r < block.mirrored};
      multiply_tile(r, tile.rows, s, sums);
      add_up(sums, round_up(tile.rows, kRows<C>));
      body(tile, sums);
    }
  }

  // ---- Logits of one prefix of a tile ----

  // Columns past the end become -inf.
  void logits(const PrefixTile& tile, int64_t prefix, const A* sums, A* l) const {
    constexpr int W = kLanes<A>;
    const A *by_row = scaled(prefix) + tile.i, *by_col = y_lengths().inverse(prefix) + tile.j;
    const A* dots = sums + prefix * kTileRows * kBlock;
    const int64_t padded = round_up(tile.cols, W);
    for (int64_t i = 0; i < tile.rows; ++i) {
      for (int64_t j = 0; j < padded; j += W) {
        store(l + i * kBlock + j, load(dots + i * kBlock + j) * (by_row[i] * load(by_col + j)));
      }
      for (int64_t j = tile.cols; j < padded; ++j) l[i * kBlock + j] = -infinity<A>();
    }
  }
  void drop_equal_ids(const PrefixTile& tile, bool mirrored, A* l) const {
    if (!p.differ_rows) return;
    constexpr int W = kLanes<A>;
    const I *of_rows = (mirrored ? col_ids() : row_ids()) + tile.i,
            *of_cols = (mirrored ? row_ids() : col_ids()) + tile.j;
    const Vec<A> nothing = broadcast(-infinity<A>());
    for (int64_t i = 0; i < tile.rows; ++i) {
      A* row = l + i * kBlock;
      int64_t j = 0;
      for (; j + W <= tile.cols; j += W) {
        store(row + j, load(of_cols + j) == broadcast(of_rows[i]) ? nothing : load(row + j));
      }
      for (; j < tile.cols; ++j) row[j] = of_cols[j] == of_rows[i] ? -infinity<A>() : row[j];
    }
  }
  // Calls body(i, j, row) where `column(row)` is a pair of the tile; mirrored: a pair below the diagonal.
  template <class Column, class Body>
  static void for_each_named(const PrefixTile& tile, bool mirrored, Column column, Body body) {
    const int64_t owner_begin = mirrored ? tile.j : tile.i, owners = mirrored ? tile.cols : tile.rows;
    const int64_t begin = mirrored ? tile.i : tile.j, count = mirrored ? tile.rows : tile.cols;
    for (int64_t o = 0; o < owners; ++o) {
      const int64_t k = column(owner_begin + o) - begin;
      if (k < 0 || k >= count) continue;
      mirrored ? body(k, o, owner_begin + o) : body(o, k, owner_begin + o);
    }
  }
  template <class Body>
  void for_each_target(const PrefixTile& tile, bool mirrored, Body body) const {
    if (p.target) for_each_named(tile, mirrored, [&](int64_t row) { return p.target[row]; }, body);
  }
  template <class Body>
  void for_each_diagonal(const PrefixTile& tile, bool mirrored, Body body) const {
    if (p.has_diagonal) for_each_named(tile, mirrored, [&](int64_t row) { return row + p.diagonal; }, body);
  }

  A* logits_buffer(int thread) { return scratch_[thread].l.once(kTileRows * kBlock); }
  // `work`: of all tasks, in multiply-adds.
  template <class Body>
  void run(int64_t count, int64_t work, Body body) {
    run_parallel(parallel_.run, count, body, work);
  }

  const SimilarityPrefixProblem& p;
  const Parallel& parallel_;
  const int64_t chunk_rows;
  Lengths<A> x_lengths;

 private:
  void pack_rows_of(const Chunk& chunk) {
    run((chunk.rows + kLaneGroup<C> - 1) / kLaneGroup<C>, chunk.rows * p.D * kWorkOfMove, [&](int64_t group, int) {
      const int64_t i = group * kLaneGroup<C>, lanes = minimum<int64_t>(kLaneGroup<C>, chunk.rows - i);
      for (int64_t s = 0; s < p.prefixes; ++s) {
        const int64_t units = units_.get()[s + 1] - units_.get()[s];
        pack_rows<C, Side::a>(x_panels(s) + i * units, kRows<C> * units,
                              x() + ((chunk.begin + i) * p.x_stride + begin(s)), p.x_stride, lanes, lanes, width(s));
      }
    });
  }
  U* x_panels(int64_t segment) { return x_panels_.get() + units_.get()[segment] * round_up(chunk_rows, kTileRows); }

  void pack_block(const Block& block, Scratch& s) {
    U* panels = s.y_panels.once(kBlock * units_.get()[p.prefixes]);
    const StoredNumbers<C> rows = y() + block.j * p.y_stride;
    for (int64_t segment = 0; segment < p.prefixes; ++segment) {
      const int64_t at = units_.get()[segment], units = units_.get()[segment + 1] - at;
      pack_rows<C, Side::b>(panels + kBlock * at, kCols<C> * units, rows + begin(segment), p.y_stride, block.cols,
                            kBlock, width(segment));
    }
  }
  // Segments outside: a panel of columns of one of them stays in the level-1 cache while the tile's rows pass by.
  void multiply_tile(int64_t row, int64_t rows, Scratch& s, A* products) {
    for (int64_t segment = 0; segment < p.prefixes; ++segment) {
      const int64_t at = units_.get()[segment], units = units_.get()[segment + 1] - at;
      const U *left = x_panels(segment) + row * units, *right = s.y_panels.get() + kBlock * at;
      multiply<C>(round_up(rows, kRows<C>), kBlock, units, left, kRows<C> * units, right, kCols<C> * units,
                  products + segment * kTileRows * kBlock, kBlock, false);
    }
  }
  void add_up(A* sums, int64_t rows) const {
    constexpr int W = kLanes<A>;
    const int64_t size = rows * kBlock, stride = kTileRows * kBlock;
    for (int64_t s = 1; s < p.prefixes; ++s) {
      A *before = sums + (s - 1) * stride, *own = before + stride;
      for (int64_t k = 0; k < size; k += W) store(own + k, load(before + k) + load(own + k));
    }
  }

  Lengths<A> y_lengths_;
  Buffer<int64_t> units_;  // where each segment begins in a packed row
  Buffer<U> x_panels_;     // the chunk's rows, packed as A panels, segment by segment
  Buffer<A> scaled_;
  Codes<I> ids_;
  std::unique_ptr<Scratch[]> scratch_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
