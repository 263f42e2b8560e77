// Products of the weights of a step with both sides: dx += g y and dy += g^T x.
//
// A step is a chunk of rows and some blocks of its columns. The tasks that form its weights pack them for both
// products, others pack the rows of y and x; behind a barrier, tasks own some rows of dx, or columns of dy, and some
// dimensions. What comes first writes, and what comes later adds.
#pragma once

#include "../similarity_reduce.h"
#include "similarity_sweep.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Packed weights of a step, of each of two orders: 8 MiB of float32.
constexpr int64_t kStepWeights = int64_t{2} << 20;
// Packed columns of y of a step: 16 MiB of float32.
constexpr int64_t kStepColumns = int64_t{4} << 20;
// Depth of a product of which one panel stays in the level-1 cache.
constexpr int64_t kMostDepth = 512;

// Dimensions of a product that one task forms, at most, and how many such tasks are enough.
constexpr int64_t kMostDimensions = 128, kEnoughTasks = 128;

// Blocks [first, last) of a chunk.
struct Step {
  const Chunk& chunk;
  int64_t first, last;
  int64_t begin() const { return chunk.j_begin + first * chunk.block_columns; }
  int64_t end() const { return minimum(chunk.j_begin + last * chunk.block_columns, chunk.j_end); }
};

template <class C>
class WeightProducts {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;

  WeightProducts(const SimilarityProblem& problem, const SimilarityBackward& out, Sweep<C>& sweep)
      : p(problem),
        sweep_(sweep),
        dx_(static_cast<A*>(out.dx)),
        dy_(static_cast<A*>(problem.self ? out.dx : out.dy)),
        row_width_(problem.self ? sweep.block_columns : columns_of_a_block(problem.N)),
        row_units_(depth_units<C>(round_up(sweep.chunk_rows, kLaneGroup<C>))) {
    const int64_t rows = round_up(sweep.chunk_rows, kLaneGroup<C>), lanes = round_up(p.D, kLaneGroup<C>);
    const int64_t fits = minimum(kStepWeights / rows, kStepColumns / maximum<int64_t>(lanes, 1)) / kBlock * kBlock;
    const int64_t all = round_up(maximum<int64_t>(p.M, 1), kBlock);
    // The rows of a chunk of self-similarity are among the columns of its first step.
    const int64_t columns = minimum(all, maximum(fits, round_up(rows, kBlock)));
    step_blocks_ = columns / sweep.block_columns;
    column_units_ = depth_units<C>(columns);
    if (dx_) {
      by_rows_.allocate(rows * column_units_);
      y_columns_.allocate(lanes * column_units_);
    }
    if (dy_) {
      by_columns_.allocate(columns * row_units_);
      x_columns_.allocate(lanes * row_units_);
    }
    products_.reset(new Buffer<A>[sweep.parallel_.threads]);
    if (wide(p.N, p.M) && dx_) zero(wide_dx_, p.N * p.D);
    if (wide(p.M, p.N) && dy_) zero(wide_dy_, p.M * p.D);
  }

  int64_t step_blocks() const { return step_blocks_; }
  // Calls body(step) for the steps of a chunk.
  template <class Body>
  void for_each_step(const Chunk& chunk, Body body) {
    for (int64_t first = 0; first < chunk.blocks(); first += step_blocks_) {
      body(Step{chunk, first, minimum(first + step_blocks_, chunk.blocks())});
    }
  }

  // ---- Beside the weights of a step: packing the rows that they are multiplied with ----

  int64_t packs(const Step& step) const { return packs_of_x(step) + (dx_ ? step.last - step.first : 0); }
  int64_t work_of_packs(const Step& step) const {
    const int64_t rows = (packs_of_x(step) ? step.chunk.rows : 0) + (dx_ ? step.end() - step.begin() : 0);
    return rows * p.D * kWorkOfMove;
  }
  void pack(const Step& step, int64_t index) {
    if (index < packs_of_x(step)) return pack_x(step.chunk, index);
    const int64_t depth = (index - packs_of_x(step)) * sweep_.block_columns, j = step.begin() + depth;
    pack_columns<C, Side::b>(y_columns_.get() + depth / C::kDepth * kCols<C>, kCols<C> * column_units_,
                             StoredNumbers<C>(p.y, p.dtype) + j * p.y_stride, p.y_stride, p.D,
                             minimum(sweep_.block_columns, step.end() - j));
  }
  // The weights of a tile.
  void put(const Step& step, const Block& block, const A* g) {
    const int64_t column = (block.index - step.first) * sweep_.block_columns;
    if (dx_) {
      pack_rows<C, Side::a>(by_rows_.get() + block.row * column_units_ + column / C::kDepth * kRows<C>,
                            kRows<C> * column_units_, g, kBlock, block.rows, block.rows, block.cols);
    }
    if (dy_) {
      pack_columns<C, Side::a>(by_columns_.get() + column * row_units_ + block.row / C::kDepth * kRows<C>,
                               kRows<C> * row_units_, g, kBlock, block.cols, block.rows);
    }
  }

  // ---- Products ----

  // Adds the products of a step, and runs more(index) for `count` other tasks of `more_work`.
  template <class More>
  void multiply_step(const Step& step, int64_t count, int64_t more_work, More more) {
    const Chunk& chunk = step.chunk;
    const int64_t rows = dx_ ? (chunk.rows + row_width_ - 1) / row_width_ : 0;
    // Rows that are columns of this step, too, have one owner.
    const int64_t shared = p.self && step.first == 0 ? rows : 0, columns = dy_ ? step.last - step.first - shared : 0;
    const int64_t products = (dx_ ? 1 : 0) + (dy_ ? 1 : 0), pairs = chunk.rows * (step.end() - step.begin());
    const int64_t row_lanes = dimensions_of_a_task(row_width_, products * chunk.rows);
    const int64_t column_lanes = dimensions_of_a_task(sweep_.block_columns, products * (step.end() - step.begin()));
    const int64_t row_tasks = rows * ((p.D + row_lanes - 1) / row_lanes);
    const int64_t column_tasks = columns * ((p.D + column_lanes - 1) / column_lanes);
    sweep_.run(row_tasks + column_tasks + count, pairs * p.D * products + more_work, [&](int64_t index, int thread) {
      if (index >= row_tasks + column_tasks) return more(index - row_tasks - column_tasks);
      // Units of rows come first, which are deeper.
      const bool of_rows = index < row_tasks;
      const int64_t at = of_rows ? index : index - row_tasks, here = of_rows ? rows : columns;
      const int64_t lanes = of_rows ? row_lanes : column_lanes;
      const int64_t unit = at % here, d = at / here * lanes, width = minimum(lanes, p.D - d);
      if (!of_rows || unit < shared) {
        add_dy(step, step.first + (of_rows ? unit : shared + unit), d, width, thread);
      }
      if (of_rows) add_dx(step, unit, d, width, thread);
    });
  }

  // Wide tasks read the weights less often, and narrow ones keep many cores busy: as wide as leaves a task of `width`
  // of all rows, or columns, one part in kEnoughTasks of the work; `all` is counted once for each side that has a
  // product.
  int64_t dimensions_of_a_task(int64_t width, int64_t all) const {
    const int64_t least = maximum<int64_t>(kCols<C>, 32);
    int64_t lanes = kMostDimensions;
    while (lanes > least && kEnoughTasks * width * lanes > all * p.D) lanes /= 2;
    return lanes;
  }

  // to += weight * row of the other side, for a range of dimensions.
  template <class Add>
  void add_to_dx(int64_t i, int64_t d, Add add) {
    wide_dx_.get() ? add(wide_dx_.get() + i * p.D + d) : dx_ ? add(dx_ + i * p.D + d) : void();
  }
  template <class Add>
  void add_to_dy(int64_t j, int64_t d, Add add) {
    wide_dy_.get() ? add(wide_dy_.get() + j * p.D + d) : dy_ ? add(dy_ + j * p.D + d) : void();
  }
  void finish() {
    copy(dx_, wide_dx_, p.N);
    copy(dy_, wide_dy_, p.M);
  }

 private:
  // Few rows have the sums of many others' chunks: in double, because millions of them drift in float.
  bool wide(int64_t rows, int64_t others) const { return !p.self && rows * p.D <= kWideElements && others > kWideFrom; }
  static constexpr int64_t kWideElements = int64_t{1} << 20, kWideFrom = int64_t{1} << 18;
  static constexpr int64_t kWideDepth = 64;  // of the products that are added up in double

  static void zero(Buffer<double>& buffer, int64_t size) {
    buffer.allocate(size);
    memset(buffer.get(), 0, size * sizeof(double));
  }
  void copy(A* to, const Buffer<double>& from, int64_t rows) {
    if (!from.get()) return;
    sweep_.run((rows + kBlock - 1) / kBlock, rows * p.D * kWorkOfMove, [&](int64_t group, int) {
      const int64_t end = minimum(rows, (group + 1) * kBlock) * p.D;
      for (int64_t k = group * kBlock * p.D; k < end; ++k) to[k] = static_cast<A>(from.get()[k]);
    });
  }

  int64_t packs_of_x(const Step& step) const {
    return dy_ && step.first == 0 ? (p.D + kLaneGroup<C> - 1) / kLaneGroup<C> : 0;
  }
  // The chunk's rows as B panels: depth runs over rows, lanes over the embedding dimension.
  void pack_x(const Chunk& chunk, int64_t group) {
    const int64_t d = group * kLaneGroup<C>;
    pack_columns<C, Side::b>(x_columns_.get() + d * row_units_, kCols<C> * row_units_,
                             StoredNumbers<C>(p.x, p.dtype) + (chunk.begin * p.x_stride + d), p.x_stride,
                             minimum<int64_t>(kLaneGroup<C>, p.D - d), chunk.rows);
  }

  // dx of a unit of rows and some dimensions += weights x y, over the columns of the step that the rows have.
  void add_dx(const Step& step, int64_t unit, int64_t d, int64_t width, int thread) {
    const int64_t row = unit * row_width_, rows = minimum(row_width_, step.chunk.rows - row);
    const int64_t begin = p.self ? maximum(step.begin(), step.chunk.begin + row) : step.begin();
    const U *weights = by_rows_.get() + row * column_units_, *columns = y_columns_.get() + d * column_units_;
    const int64_t i = step.chunk.begin + row;
    // Of self-similarity the first chunk has written all rows as columns.
    add_product(begin - step.begin(), step.end() - step.begin(), rows, width, weights, column_units_, columns,
                dx_ + i * p.D + d, wide_dx_.get() ? wide_dx_.get() + i * p.D + d : nullptr, p.self || step.first > 0,
                thread);
  }
  // dy of a block of columns and some dimensions += weights^T x.
  void add_dy(const Step& step, int64_t block, int64_t d, int64_t width, int thread) {
    const Chunk& chunk = step.chunk;
    const int64_t column = (block - step.first) * sweep_.block_columns, j = step.begin() + column;
    const int64_t count = minimum(sweep_.block_columns, chunk.j_end - j);
    const int64_t depth = p.self ? minimum(chunk.rows, j + count - chunk.begin) : chunk.rows;
    const U *weights = by_columns_.get() + column * row_units_, *rows = x_columns_.get() + d * row_units_;
    add_product(0, depth, count, width, weights, row_units_, rows, dy_ + j * p.D + d,
                wide_dy_.get() ? wide_dy_.get() + j * p.D + d : nullptr, chunk.begin > 0, thread);
  }
  // to (+)= weights x columns over the depth [begin, end), both packed; in double where `wide` is given.
  void add_product(int64_t begin, int64_t end, int64_t rows, int64_t width, const U* weights, int64_t weight_units,
                   const U* columns, A* to, double* wide, bool add, int thread) {
    const int64_t step = wide ? kWideDepth : kMostDepth, column_units = weight_units;
    A* own = wide ? products_[thread].once(kBlock * kMostDimensions) : nullptr;
    for (int64_t k = begin; k < end; k += step) {
      const int64_t unit = k / C::kDepth;
      multiply<C>(rows, width, depth_units<C>(minimum(step, end - k)), weights + unit * kRows<C>,
                  kRows<C> * weight_units, columns + unit * kCols<C>, kCols<C> * column_units, wide ? own : to,
                  wide ? width : p.D, !wide && (add || k > begin));
      for (int64_t i = 0; wide && i < rows; ++i) {
        for (int64_t q = 0; q < width; ++q) wide[i * p.D + q] += own[i * width + q];
      }
    }
  }

  const SimilarityProblem& p;
  Sweep<C>& sweep_;
  A *const dx_, *const dy_;
  const int64_t row_width_, row_units_;  // rows of a task of dx; the depth of weights by columns
  int64_t step_blocks_ = 0, column_units_ = 0;
  Buffer<U> by_rows_, by_columns_, x_columns_, y_columns_;
  Buffer<double> wide_dx_, wide_dy_;       // where sums are long
  std::unique_ptr<Buffer<A>[]> products_;  // per thread, what is added to them
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
