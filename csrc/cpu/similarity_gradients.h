// Gradients of a chunk of rows, once the upstream gradients of its folds are known.
//
// Blocks of columns own dy and the sums along their columns; then, behind a barrier, tasks own rows and dimensions of
// dx. Weights g = dtotal/d(inner product) of the chunk are kept packed for kSuperBlock columns in between.
#pragma once

#include "similarity_sweep.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// lse and upstream gradient of one fold, made safe for exp(l - lse) (see FoldWeights).
template <class A>
struct Upstream {
  Buffer<A> lse, weight;
  bool used = false;

  void allocate(int64_t size) {
    used = true;
    lse.allocate(size);
    weight.allocate(size);
  }
  void set(int64_t i, A value, A gradient) {
    const bool empty = value == -infinity<A>();
    lse.get()[i] = empty ? infinity<A>() : value;
    weight.get()[i] = empty ? 0 : gradient;
  }
  void set_all(int64_t size, const void* values, const void* gradients) {
    if (!gradients) return;
    allocate(size);
    for (int64_t i = 0; i < size; ++i) set(i, static_cast<const A*>(values)[i], static_cast<const A*>(gradients)[i]);
  }
};

// Forms the gradients of a chunk once the upstream gradients of its folds are known.
template <class C, class S>
class Gradients {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;
  using Scratch = typename Sweep<C, S>::Scratch;

  Gradients(const SimilarityProblem& problem, const SimilarityBackward& outputs, Sweep<C, S>& sweep)
      : p(problem), out(outputs), sweep_(sweep) {
    const int64_t rows = round_up(sweep.chunk_rows, kLaneGroup<C>), units = depth_units<C>(rows);
    super_units_ = depth_units<C>(minimum(round_up(maximum<int64_t>(p.M, 1), kBlock), kSuperBlock));
    if (out.dx) weight_panels_.allocate(rows * super_units_);
    if (dy()) x_columns_.allocate(round_up(p.D, kLaneGroup<C>) * units);
    if (sums()) {
      const int64_t blocks = super_units_ * C::kDepth / kBlock;
      for (Buffer<A>* part : {&direct_e_, &direct_edot_, &mirrored_e_, &mirrored_edot_}) {
        part->allocate(blocks * sweep.chunk_rows);
      }
      for (Buffer<double>* total : {&dscale_, &drow_bias_}) zero(*total, p.N);
      zero(dcol_bias_, p.M);
    }
    if (kRounds && p.target) {
      residual_.allocate(super_units_ * C::kDepth / kBlock * sweep.chunk_rows);
      zero(residual_rows_, p.N);
      zero(residual_columns_, p.M);
    }
  }

  // `stored`: the chunk's inner products, or null to compute them again.
  void add_chunk(const Chunk& chunk, A* stored) {
    pack_x_columns(chunk);
    const int64_t step = kSuperBlock / kBlock;
    for (int64_t first = 0; first < chunk.blocks(); first += step) {
      const int64_t last = minimum(first + step, chunk.blocks());
      sweep_.for_each_block(chunk, first, last, [&](const Block& block, Scratch& s) {
        A* dots = stored ? sweep_.stored_block(stored, chunk, block) : sweep_.block_buffer(s.dots);
        if (!stored) sweep_.multiply_block(chunk, block, s, dots);
        add_block(chunk, block, first, s, dots);
      });
      if (out.dx) add_dx(chunk, first, last);
      if (sums() || compensates()) add_sums(chunk, first, last);
    }
  }

  void finish() {
    if constexpr (kRounds) {
      if (compensates()) compensate();
    }
    if (out.dscale) copy(out.dscale, dscale_, p.N);
    if (out.drow_bias) copy(out.drow_bias, drow_bias_, p.N);
    if (out.dcol_bias) copy(out.dcol_bias, dcol_bias_, p.M);
  }

  Upstream<A> rows, cols;
  const A* d_target = nullptr;

 private:
  static constexpr bool kRounds = C::kDepth == 2;
  bool compensates() const { return kRounds && p.target && d_target; }
  bool sums() const { return out.dscale || out.drow_bias || out.dcol_bias; }
  A* dy() const { return static_cast<A*>(p.self ? out.dx : out.dy); }
  static void zero(Buffer<double>& buffer, int64_t size) {
    buffer.allocate(size);
    memset(buffer.get(), 0, size * sizeof(double));
  }
  static void copy(void* to, const Buffer<double>& from, int64_t size) {
    for (int64_t i = 0; i < size; ++i) static_cast<A*>(to)[i] = static_cast<A>(from.get()[i]);
  }

  // e = dtotal/dl of one view, or, scaled, g = dtotal/d(inner product).
  void weigh(const Chunk& chunk, const Block& block, bool mirrored, bool scaled, const A* dots, A* e, Scratch& s) {
    sweep_.set_view(chunk, block, mirrored, s.view);
    Upstream<A>&on_i = mirrored ? cols : rows, &on_j = mirrored ? rows : cols;
    FoldWeights<A> side_i{}, side_j{};
    if (on_i.used) side_i = {on_i.lse.get() + chunk.begin, on_i.weight.get() + chunk.begin};
    if (on_j.used) {
      for (int64_t j = 0; j < kBlock; ++j) {
        const bool inside = j < block.cols;
        s.lse_j[j] = inside ? on_j.lse.get()[block.j + j] : infinity<A>();
        s.weight_j[j] = inside ? on_j.weight.get()[block.j + j] : 0;
      }
      side_j = {s.lse_j, s.weight_j};
    }
    weights(s.view, side_i, side_j, scaled, dots, e, mirrored ? block.mirrored : block.rows, block.cols);
    const auto drop = [&](int64_t i, int64_t j) { e[i * kBlock + j] = 0; };
    sweep_.for_each_special(chunk, block, mirrored, drop, [&](int64_t i, int64_t j, int64_t owner) {
      const A scale = scaled ? s.view.scale_i[i] * s.view.scale_j[j] : 1;
      e[i * kBlock + j] = d_target ? d_target[owner] * scale : 0;
    });
  }

  void add_block(const Chunk& chunk, const Block& block, int64_t first, Scratch& s, const A* dots) {
    A* e = sweep_.block_buffer(s.e);
    A* g = p.self ? sweep_.block_buffer(s.g) : e;
    const int64_t part = (block.index - first) * sweep_.chunk_rows;
    // With one view and no sums by e, e itself is of no use: its pass writes g.
    const bool scaled = !p.self && !sums();
    weigh(chunk, block, false, scaled, dots, e, s);
    if (sums()) {
      s.sums.e_i = direct_e_.get() + part;
      s.sums.edot_i = direct_edot_.get() + part;
      accumulate<A, false, true>(s.view, dots, e, g, block.rows, block.cols, &s.sums);
      add_to(dcol_bias_.get() + block.j, s.sums.e_j, block.cols);
    } else if (!scaled) {
      accumulate<A, false, false>(s.view, dots, e, g, block.rows, block.cols, nullptr);
    }
    if (p.self) add_mirrored(chunk, block, part, s, dots, e, g);
    if (compensates()) {
      residuals<C>(g, block.rows, block.cols, residual_.get() + part, s.residual_j);
      add_to(residual_columns_.get() + block.j, s.residual_j, block.cols);
    }

    const int64_t depth_offset = (block.index - first) * kBlock / C::kDepth;
    if (out.dx) {
      pack_rows<C, kRows>(weight_panels_.get() + depth_offset * kRows, kRows * super_units_, g, kBlock, block.rows,
                          chunk.rows, block.cols);
    }
    if (dy()) {
      const int64_t units = depth_units<C>(block.rows);
      U* panels = s.weights_panels.once(kBlock * depth_units<C>(round_up(sweep_.chunk_rows, kLaneGroup<C>)));
      pack_columns<C, kRows>(panels, kRows * units, g, kBlock, block.cols, block.rows);
      multiply<C>(block.cols, p.D, units, panels, kRows * units, x_columns_.get(),
                  kCols<C> * depth_units<C>(chunk.rows), dy() + block.j * p.D, p.D, true);
    }
  }

  void add_mirrored(const Chunk& chunk, const Block& block, int64_t part, Scratch& s, const A* dots, A* e, A* g) {
    weigh(chunk, block, true, false, dots, e, s);
    if (!sums()) {
      accumulate<A, true, false>(s.view, dots, e, g, block.mirrored, block.cols, nullptr);
      return;
    }
    s.sums.e_i = mirrored_e_.get() + part;
    s.sums.edot_i = mirrored_edot_.get() + part;
    accumulate<A, true, true>(s.view, dots, e, g, block.mirrored, block.cols, &s.sums);
    add_to(drow_bias_.get() + block.j, s.sums.e_j, block.cols);
    add_to(dscale_.get() + block.j, s.sums.edot_j, block.cols);
  }

  static void add_to(double* to, const A* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j) to[j] += from[j];
  }

  // The i-side sums of blocks [first, last), in block order.
  void add_sums(const Chunk& chunk, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t part = (b - first) * sweep_.chunk_rows, j_end = chunk.j_begin + b * kBlock + kBlock;
      const int64_t used = p.self ? minimum(chunk.rows, minimum(j_end, chunk.j_end) - chunk.begin) : chunk.rows;
      if (compensates()) add_to(residual_rows_.get() + chunk.begin, residual_.get() + part, used);
      if (!sums()) continue;
      add_to(drow_bias_.get() + chunk.begin, direct_e_.get() + part, used);
      add_to(dscale_.get() + chunk.begin, direct_edot_.get() + part, used);
      if (p.self) add_to(dcol_bias_.get() + chunk.begin, mirrored_e_.get() + part, minimum(chunk.rows, b * kBlock));
    }
  }

  // Weights are rounded to bfloat16 before they are multiplied. Near convergence a row's gradient is the difference of
  // its target and of negatives that lie close to it, and independent rounding errors of 2^-9 do not cancel there. What
  // rounding took from a row (or column) is given back along its partner, so that only differences of embeddings are
  // weighted by errors: measured 1e-3 instead of up to 1e-2 relative gradient error.
  void compensate() {
    Buffer<int64_t> partner(p.M);
    for (int64_t j = 0; j < p.M; ++j) partner.get()[j] = p.self ? p.target[j] : -1;
    for (int64_t i = 0; i < p.N && !p.self; ++i) {
      if (p.target[i] >= 0 && p.target[i] < p.M) partner.get()[p.target[i]] = i;
    }
    give_back(static_cast<A*>(out.dx), p.N, p.target, static_cast<const S*>(p.y), p.y_stride, p.M, residual_rows_);
    give_back(dy(), p.M, partner.get(), static_cast<const S*>(p.x), p.x_stride, p.N, residual_columns_);
  }

  void give_back(A* to, int64_t count, const int64_t* partner, const S* from, int64_t stride, int64_t from_count,
                 const Buffer<double>& residual) {
    constexpr int W = kLanes<A>;
    sweep_.run(to ? (count + kBlock - 1) / kBlock : 0, [&](int64_t group, int) {
      for (int64_t i = group * kBlock; i < minimum(count, (group + 1) * kBlock); ++i) {
        if (partner[i] < 0 || partner[i] >= from_count) continue;
        const S* row = from + partner[i] * stride;
        const A weight = static_cast<A>(residual.get()[i]);
        int64_t d = 0;
        for (; d + W <= p.D; d += W) store(to + i * p.D + d, load(to + i * p.D + d) + weight * to_float(row + d));
        if (d == p.D) continue;
        S tail[W] = {};
        for (int64_t q = d; q < p.D; ++q) tail[q - d] = row[q];
        const Vec<A> last = to_float(tail);
        for (int64_t q = d; q < p.D; ++q) to[i * p.D + q] += weight * last[q - d];
      }
    });
  }

  // The chunk's rows packed as B panels: depth runs over rows, lanes over the embedding dimension.
  void pack_x_columns(const Chunk& chunk) {
    if (!dy()) return;
    const int64_t units = depth_units<C>(chunk.rows);
    sweep_.run((p.D + kLaneGroup<C> - 1) / kLaneGroup<C>, [&](int64_t group, int) {
      const int64_t d = group * kLaneGroup<C>;
      pack_columns<C, kCols<C>>(x_columns_.get() + d * units, kCols<C> * units,
                                static_cast<const S*>(p.x) + chunk.begin * p.x_stride + d, p.x_stride,
                                minimum<int64_t>(kLaneGroup<C>, p.D - d), chunk.rows);
    });
  }

  // dx of the chunk's rows += weights x columns of y, over blocks [first, last). A task owns some rows and dimensions.
  void add_dx(const Chunk& chunk, int64_t first, int64_t last) {
    constexpr int64_t kDepthStep = 512;
    const int64_t begin = chunk.j_begin + first * kBlock, end = minimum(chunk.j_begin + last * kBlock, chunk.j_end);
    const int64_t panels = (p.D + kCols<C> - 1) / kCols<C>, tasks = 2 * sweep_.parallel_.threads;
    const int64_t group = maximum<int64_t>(1, minimum<int64_t>(4, panels / tasks));
    const int64_t groups = (panels + group - 1) / group;
    // Splitting rows packs the same columns of y once more, so only as far as dimensions leave threads idle.
    const int64_t splits = (tasks + groups - 1) / groups;
    const int64_t segment = round_up((chunk.rows + splits - 1) / splits, kRows);
    const int64_t segments = (chunk.rows + segment - 1) / segment;
    sweep_.run(groups * segments, [&](int64_t index, int thread) {
      const int64_t d = index % groups * group * kCols<C>, lanes = minimum(group * kCols<C>, p.D - d);
      const int64_t i = index / groups * segment, rows = minimum(segment, chunk.rows - i);
      const int64_t step_units = depth_units<C>(kDepthStep);
      U* y_columns = sweep_.scratch(thread).y_columns.once(4 * kCols<C> * step_units);
      for (int64_t j = begin; j < end; j += kDepthStep) {
        const int64_t depth = minimum(kDepthStep, end - j);
        pack_columns<C, kCols<C>>(y_columns, kCols<C> * step_units, static_cast<const S*>(p.y) + j * p.y_stride + d,
                                  p.y_stride, lanes, depth);
        multiply<C>(rows, lanes, depth_units<C>(depth),
                    weight_panels_.get() + i * super_units_ + (j - begin) / C::kDepth * kRows, kRows * super_units_,
                    y_columns, kCols<C> * step_units, static_cast<A*>(out.dx) + (chunk.begin + i) * p.D + d, p.D, true);
      }
    });
  }

  const SimilarityProblem& p;
  const SimilarityBackward& out;
  Sweep<C, S>& sweep_;
  int64_t super_units_ = 0;
  Buffer<U> weight_panels_, x_columns_;
  Buffer<A> direct_e_, direct_edot_, mirrored_e_, mirrored_edot_;
  Buffer<A> residual_;
  Buffer<double> dscale_, drow_bias_, dcol_bias_, residual_rows_, residual_columns_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
