// Sums along rows and columns that gradients of biases and scales are made of, and what rounding takes from weights.
//
// Each tile writes its parts; behind a barrier they are added up in their order, by tasks that own rows or columns.
#pragma once

#include "similarity_epilogue.h"
#include "similarity_products.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Sums of numbers of a tile along both sides: parts of tiles, and complete ones of rows and columns.
template <class A>
class TileSums {
 public:
  void allocate(int64_t blocks, int64_t chunk_rows, int64_t tiles, int64_t columns) {
    chunk_rows_ = chunk_rows;
    columns_ = columns;
    by_rows_.allocate(blocks * chunk_rows);
    by_columns_.allocate(tiles * columns);
  }
  A* rows(int64_t block, int64_t row) { return by_rows_.get() + block * chunk_rows_ + row; }
  template <class T>
  void put_columns(const Block& block, int64_t column, const T* from) {
    A* to = by_columns_.get() + block.tile * columns_ + column;
    for (int64_t j = 0; j < block.cols; ++j) to[j] = static_cast<A>(from[j]);
  }
  // to += sign * the parts of blocks [first, last) of rows from `row` on.
  void add_rows(int64_t first, int64_t last, int64_t row, int64_t count, double sign, double* to) const {
    for (int64_t b = first; b < last; ++b) add(by_rows_.get() + b * chunk_rows_ + row, count, sign, to);
  }
  // to += sign * the parts of the first tiles of columns from `column` on.
  void add_columns(int64_t tiles, int64_t column, int64_t count, double sign, double* to) const {
    for (int64_t t = 0; t < tiles; ++t) add(by_columns_.get() + t * columns_ + column, count, sign, to);
  }

 private:
  static void add(const A* from, int64_t count, double sign, double* to) {
    for (int64_t k = 0; k < count; ++k) to[k] += sign * from[k];
  }
  int64_t chunk_rows_ = 0, columns_ = 0;
  Buffer<A> by_rows_, by_columns_;
};

inline void zero(Buffer<double>& buffer, int64_t size) {
  buffer.allocate(size);
  memset(buffer.get(), 0, size * sizeof(double));
}

// All sums of a backward pass.
template <class C>
class GradientSums {
 public:
  using A = typename C::Acc;
  static constexpr bool kRounds = C::kDepth == 2;

  GradientSums(const SimilarityProblem& problem, const SimilarityBackward& outputs, Sweep<C>& sweep,
               int64_t step_blocks)
      : p(problem), out(outputs), sweep_(sweep) {
    sets_.reset(new SetSums[p.set_count]);
    const int64_t tiles = (sweep.chunk_rows + sweep.tile_rows - 1) / sweep.tile_rows;
    const auto allocate = [&](TileSums<A>& sums) {
      sums.allocate(step_blocks, sweep.chunk_rows, tiles, step_blocks * sweep.block_columns);
    };
    for (int set = 0; set < p.set_count; ++set) {
      SetSums& s = sets_[set];
      s.used = out.drow_bias || out.dcol_bias || dscale(set);
      if (!s.used) continue;
      for (int view = 0; view < (p.self ? 2 : 1); ++view) {
        allocate(s.e[view]);
        allocate(s.edot[view]);
      }
      zero(s.dscale, scale_of(set) == ScaleOf::columns ? p.M : p.N);
      any = true;
    }
    if (any) {
      zero(drow_bias_, p.N);
      zero(dcol_bias_, p.M);
    }
    if (compensates()) {
      allocate(residuals_);
      zero(residual_rows, p.N);
      zero(residual_columns, p.M);
    }
  }

  bool compensates() const { return kRounds && p.target; }
  double sign_of(int set) const { return p.sets[set].negate ? -1 : 1; }

  // g (+)= what one view of a set says, and its sums.
  void add_view(const Step& step, const Block& block, int set, bool mirrored, bool add, const View<A>& view,
                const A* dots, const A* e, A* g) {
    SetSums& own = sets_[set];
    const int64_t at = block.index - step.first, column = at * sweep_.block_columns;
    Sums<A> sums;
    if (own.used) {
      sums.e_i = own.e[mirrored].rows(at, block.row);
      sums.edot_i = own.edot[mirrored].rows(at, block.row);
    }
    accumulate<A>(add, own.used, view, dots, e, g, mirrored ? block.mirrored : block.rows, block.cols, &sums);
    if (!own.used) return;
    own.e[mirrored].put_columns(block, column, sums.e_j);
    own.edot[mirrored].put_columns(block, column, sums.edot_j);
  }
  // What rounding takes from the weights of a tile.
  void add_residuals(const Step& step, const Block& block, const A* g) {
    const int64_t at = block.index - step.first;
    const A *of_rows = static_cast<const A*>(p.row_factor), *of_columns = static_cast<const A*>(p.col_factor);
    A residual_j[kBlock];
    residuals<C>(g, block.rows, block.cols, of_rows ? of_rows + block.i : nullptr,
                 of_columns ? of_columns + block.j : nullptr, residuals_.rows(at, block.row), residual_j);
    residuals_.put_columns(block, at * sweep_.block_columns, residual_j);
  }

  // ---- Adding up a step ----

  int64_t tasks(const Step& step) const {
    if (!any && !compensates()) return 0;
    return step.last - step.first + (merges(step) ? 0 : row_ranges(step));
  }
  int64_t work(const Step& step) const {
    return tasks(step) ? (step.chunk.rows * (step.last - step.first) + step.end() - step.begin()) * kWorkOfMove : 0;
  }
  void run(const Step& step, int64_t index) {
    const int64_t rows = row_ranges(step);
    if (index < rows) add_rows(step, index);
    if (merges(step)) return add_columns(step, index);
    if (index >= rows) add_columns(step, index - rows);
  }

  // A pair more of the first set.
  void add_pair(int64_t i, int64_t j, A e, A dot) {
    if (!sets_[0].used) return;
    const double own = sign_of(0) * e;
    drow_bias_.get()[i] += own;
    dcol_bias_.get()[j] += own;
    sets_[0].dscale.get()[scale_of(0) == ScaleOf::columns ? j : i] += own * dot;
  }

  void finish() {
    for (int set = 0; set < p.set_count; ++set) write_dscale(set);
    if (out.drow_bias) copy(out.drow_bias, drow_bias_, p.N);
    if (out.dcol_bias) copy(out.dcol_bias, dcol_bias_, p.M);
  }

  bool any = false;  // whether any set has sums
  Buffer<double> residual_rows, residual_columns;

 private:
  // Sums by the dtotal/dl of one set, direct and mirrored.
  struct SetSums {
    bool used = false;
    TileSums<A> e[2], edot[2];
    Buffer<double> dscale;
  };

  void* dscale(int set) const { return out.dscale ? out.dscale[set] : nullptr; }
  ScaleOf scale_of(int set) const { return p.sets[set].scale_of; }
  // Ranges of rows are as wide as blocks of columns. Those of self-similarity that are both have one owner.
  int64_t row_ranges(const Step& step) const {
    return (step.chunk.rows + sweep_.block_columns - 1) / sweep_.block_columns;
  }
  bool merges(const Step& step) const { return p.self && step.first == 0; }

  void add_rows(const Step& step, int64_t range) {
    const int64_t row = range * sweep_.block_columns, i = step.chunk.begin + row;
    const int64_t count = minimum(sweep_.block_columns, step.chunk.rows - row), last = step.last - step.first;
    // Blocks on the diagonal have all pairs of their rows, those behind it the mirrored ones, too.
    const auto from = [&](int64_t block) {
      return p.self ? minimum(maximum(block - step.first, int64_t{0}), last) : int64_t{0};
    };
    const int64_t direct = from(range), mirrored = from(range + 1);
    if (compensates()) residuals_.add_rows(direct, last, row, count, 1, residual_rows.get() + i);
    for (int set = 0; set < p.set_count; ++set) {
      const SetSums& own = sets_[set];
      if (!own.used) continue;
      const bool of_columns = scale_of(set) == ScaleOf::columns;
      own.e[0].add_rows(direct, last, row, count, sign_of(set), drow_bias_.get() + i);
      if (p.self) own.e[1].add_rows(mirrored, last, row, count, sign_of(set), dcol_bias_.get() + i);
      if (!of_columns) own.edot[0].add_rows(direct, last, row, count, sign_of(set), own.dscale.get() + i);
      if (of_columns && p.self) {
        own.edot[1].add_rows(mirrored, last, row, count, sign_of(set), own.dscale.get() + i);
      }
    }
  }
  void add_columns(const Step& step, int64_t index) {
    const int64_t column = index * sweep_.block_columns, j = step.begin() + column, block = step.first + index;
    const int64_t count = minimum(sweep_.block_columns, step.end() - j), tiles = sweep_.tiles_of(step.chunk, block);
    if (compensates()) residuals_.add_columns(tiles, column, count, 1, residual_columns.get() + j);
    for (int set = 0; set < p.set_count; ++set) {
      const SetSums& own = sets_[set];
      if (!own.used) continue;
      const bool of_columns = scale_of(set) == ScaleOf::columns;
      own.e[0].add_columns(tiles, column, count, sign_of(set), dcol_bias_.get() + j);
      if (p.self) own.e[1].add_columns(tiles, column, count, sign_of(set), drow_bias_.get() + j);
      if (of_columns) own.edot[0].add_columns(tiles, column, count, sign_of(set), own.dscale.get() + j);
      if (!of_columns && p.self) own.edot[1].add_columns(tiles, column, count, sign_of(set), own.dscale.get() + j);
    }
  }

  static void copy(void* to, const Buffer<double>& from, int64_t size) {
    for (int64_t i = 0; i < size; ++i) static_cast<A*>(to)[i] = static_cast<A>(from.get()[i]);
  }
  void write_dscale(int set) {
    if (!dscale(set)) return;
    if (scale_of(set) != ScaleOf::all) {
      return copy(dscale(set), sets_[set].dscale, scale_of(set) == ScaleOf::rows ? p.N : p.M);
    }
    double total = 0;
    for (int64_t i = 0; i < p.N; ++i) total += sets_[set].dscale.get()[i];
    *static_cast<A*>(dscale(set)) = static_cast<A>(total);
  }

  const SimilarityProblem& p;
  const SimilarityBackward& out;
  Sweep<C>& sweep_;
  std::unique_ptr<SetSums[]> sets_;
  TileSums<A> residuals_;
  Buffer<double> drow_bias_, dcol_bias_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
