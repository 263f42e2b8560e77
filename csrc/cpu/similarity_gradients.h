// Gradients of a chunk of rows, once the upstream gradients of its folds are known.
//
// Blocks of columns own dy and the sums along their columns; then, behind a barrier, tasks own rows and dimensions of
// dx. Weights g = dtotal/d(inner product) of the chunk are kept packed for kSuperBlock columns in between. What comes
// first writes its rows, and what comes later adds to them.
#pragma once

#include "similarity_epilogue.h"
#include "similarity_sweep.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

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
    upstream.reset(new Upstream<A>[p.fold_count]);
    sums_.reset(new SetSums[p.set_count]);
    const int64_t parts = super_units_ * C::kDepth / sweep.block_columns * sweep.chunk_rows;
    for (int set = 0; set < p.set_count; ++set) {
      SetSums& s = sums_[set];
      s.used = out.drow_bias || out.dcol_bias || dscale(set);
      if (!s.used) continue;
      for (Buffer<A>* part : {&s.direct_e, &s.direct_edot, &s.mirrored_e, &s.mirrored_edot}) part->allocate(parts);
      zero(s.dscale, scale_of(set) == ScaleOf::columns ? p.M : p.N);
      any_sums_ = true;
    }
    if (any_sums_) {
      zero(drow_bias_, p.N);
      zero(dcol_bias_, p.M);
    }
    products_.reset(new Buffer<A>[sweep.parallel_.threads]);
    if (wide(p.N, p.M) && out.dx) zero(wide_dx_, p.N * p.D);
    if (wide(p.M, p.N) && out.dy) zero(wide_dy_, p.M * p.D);
    if (kRounds && p.target) {
      residual_.allocate(parts);
      zero(residual_rows_, p.N);
      zero(residual_columns_, p.M);
    }
  }
  // `stored`: the chunk's inner products, or null to compute them again.
  void add_chunk(const Chunk& chunk, A* stored) {
    add_chunk(chunk, stored,
              [&](const Block& block, int set, bool mirrored, bool scaled, const A* dots, const A* guide, A* e,
                  Scratch& s) { weigh(chunk, block, set, mirrored, scaled, dots, guide, e, s); });
  }
  // The same for other derivatives than those of the folds: `weigh`, called as the function below without the chunk.
  template <class Weigh>
  void add_chunk(const Chunk& chunk, A* stored, Weigh weigh) {
    pack_x_columns(chunk);
    const int64_t step = kSuperBlock / sweep_.block_columns;
    for (int64_t first = 0; first < chunk.blocks(); first += step) {
      const int64_t last = minimum(first + step, chunk.blocks());
      sweep_.for_each_block(
          chunk, first, last,
          [&](const Block& block, Scratch& s) {
            A* dots = stored ? sweep_.stored_block(stored, chunk, block) : sweep_.block_buffer(s.dots);
            if (!stored) sweep_.multiply_block(chunk, block, s, dots);
            add_block(chunk, block, first, s, dots, weigh);
          },
          p.D);
      if (out.dx) add_dx(chunk, first, last);
      if (any_sums_ || compensates()) add_sums(chunk, first, last);
    }
  }

  // More pairs of the first set, column -1 for none: their inner products, the derivatives by their logits, and their
  // weights, the derivatives by the inner products, where they are others than e times the scale.
  struct Pairs {
    int64_t count;
    const int64_t *rows, *columns;
    const A *dots, *e, *weight;
  };
  void add_pairs(const Pairs& pairs) {
    const SimilaritySet& set = p.sets[0];
    const A* scale = static_cast<const A*>(set.scale);
    const auto weight_of = [&](int64_t k) {
      if (pairs.weight) return pairs.weight[k];
      const int64_t own = set.scale_of == ScaleOf::rows ? pairs.rows[k] : pairs.columns[k];
      return static_cast<A>(sign_of(0)) * pairs.e[k] * scale[set.scale_of == ScaleOf::all ? 0 : own];
    };
    // Pairs may share a row or a column, so tasks own dimensions.
    sweep_.run((p.D + kBlock - 1) / kBlock, pairs.count * p.D * kWorkOfMove, [&](int64_t group, int) {
      const int64_t d = group * kBlock, depth = minimum(kBlock, p.D - d);
      for (int64_t k = 0; k < pairs.count; ++k) {
        if (pairs.columns[k] < 0) continue;
        const int64_t i = pairs.rows[k], j = pairs.columns[k];
        const A weight = weight_of(k);
        const S *x = static_cast<const S*>(p.x) + i * p.x_stride + d,
                *y = static_cast<const S*>(p.y) + j * p.y_stride + d;
        const auto add = [&](A* to, const Buffer<double>& wide, int64_t at, const S* row) {
          if (wide.get()) return add_row(wide.get() + at, row, weight, depth);
          if (to) add_row(to + at, row, weight, depth);
        };
        add(static_cast<A*>(out.dx), wide_dx_, i * p.D + d, y);
        add(dy(), wide_dy_, j * p.D + d, x);
      }
    });
    for (int64_t k = 0; sums_[0].used && k < pairs.count; ++k) {
      if (pairs.columns[k] < 0) continue;
      const double own = sign_of(0) * pairs.e[k];
      drow_bias_.get()[pairs.rows[k]] += own;
      dcol_bias_.get()[pairs.columns[k]] += own;
      const bool of_columns = scale_of(0) == ScaleOf::columns;
      sums_[0].dscale.get()[of_columns ? pairs.columns[k] : pairs.rows[k]] += own * pairs.dots[k];
    }
  }

  void finish() {
    if (wide_dx_.get()) copy(out.dx, wide_dx_, p.N * p.D);
    if (wide_dy_.get()) copy(out.dy, wide_dy_, p.M * p.D);
    if constexpr (kRounds) {
      if (compensates()) compensate();
    }
    for (int set = 0; set < p.set_count; ++set) write_dscale(set);
    if (out.drow_bias) copy(out.drow_bias, drow_bias_, p.N);
    if (out.dcol_bias) copy(out.dcol_bias, dcol_bias_, p.M);
  }

  std::unique_ptr<Upstream<A>[]> upstream;  // per fold
  const A *d_target = nullptr, *d_linear = nullptr;

 private:
  static constexpr bool kRounds = C::kDepth == 2;

  // Sums by the dtotal/dl of one set: per block and row of the chunk, and complete ones.
  struct SetSums {
    bool used = false;
    Buffer<A> direct_e, direct_edot, mirrored_e, mirrored_edot;
    Buffer<double> dscale;
  };

  // Few rows have the sums of many others' chunks: in double, because millions of them drift in float.
  bool wide(int64_t rows, int64_t others) const { return !p.self && rows * p.D <= kWideElements && others > kWideFrom; }
  static constexpr int64_t kWideElements = int64_t{1} << 20, kWideFrom = int64_t{1} << 18;
  static constexpr int64_t kWideUnits = 64 / C::kDepth;  // depth of the products that are added up in double
  int64_t product_size() const { return maximum(kBlock * p.D, sweep_.chunk_rows * 4 * kCols<C>); }
  // to += the product of a task, whose own sums are short: `from` has `width` numbers of each row.
  void add_wide(double* to, const A* from, int64_t rows, int64_t width) const {
    for (int64_t i = 0; i < rows; ++i) add_to(to + i * p.D, from + i * width, width);
  }

  bool compensates() const { return kRounds && p.target; }
  void* dscale(int set) const { return out.dscale ? out.dscale[set] : nullptr; }
  ScaleOf scale_of(int set) const { return p.sets[set].scale_of; }
  double sign_of(int set) const { return p.sets[set].negate ? -1 : 1; }
  A* dy() const { return static_cast<A*>(p.self ? out.dx : out.dy); }
  static void zero(Buffer<double>& buffer, int64_t size) {
    buffer.allocate(size);
    memset(buffer.get(), 0, size * sizeof(double));
  }
  static void copy(void* to, const Buffer<double>& from, int64_t size) {
    for (int64_t i = 0; i < size; ++i) static_cast<A*>(to)[i] = static_cast<A>(from.get()[i]);
  }
  void write_dscale(int set) {
    if (!dscale(set)) return;
    if (scale_of(set) != ScaleOf::all) {
      return copy(dscale(set), sums_[set].dscale, scale_of(set) == ScaleOf::rows ? p.N : p.M);
    }
    double total = 0;
    for (int64_t i = 0; i < p.N; ++i) total += sums_[set].dscale.get()[i];
    *static_cast<A*>(dscale(set)) = static_cast<A>(total);
  }

  // Calls body(rows, cols) for the folds of a set that have gradients, one of each direction at a time and of one kind.
  template <class Body>
  void for_each_group(int set, Body body) {
    const auto has = [&](int fold, bool cols) {
      return p.folds[fold].set == set && p.folds[fold].cols == cols && upstream[fold].used;
    };
    for (int f = 0; f < p.fold_count; ++f) {
      if (!has(f, false) && !has(f, true)) continue;
      const bool cols = p.folds[f].cols;
      // The n-th fold of a kind along rows shares a pass with the n-th along columns.
      int rank = 0, other = -1;
      for (int g = 0; g < f; ++g) rank += has(g, cols) && upstream[g].kind == upstream[f].kind;
      for (int g = 0, left = rank; g < p.fold_count && other < 0; ++g) {
        if (has(g, !cols) && upstream[g].kind == upstream[f].kind && left-- == 0) other = g;
      }
      if (other >= 0 && cols) continue;
      const Upstream<A>*own = &upstream[f], *paired = other < 0 ? nullptr : &upstream[other];
      cols ? body(own->kind, paired, own) : body(own->kind, own, paired);
    }
  }

  // e = dtotal/dl of one view of a set, or, scaled, g = dtotal/d(inner product).
  void weigh(const Chunk& chunk, const Block& block, int set, bool mirrored, bool scaled, const A* dots, const A* guide,
             A* e, Scratch& s) {
    const int64_t rows = mirrored ? block.mirrored : block.rows;
    int passes = 0;
    bool has_max = false;
    for_each_group(set, [&](FoldKind kind, auto*, auto*) { kind == FoldKind::max ? has_max = true : ++passes; });
    // Logits are turned into e in place where nothing else looks at them afterwards.
    A* l = passes > 1 || has_max ? sweep_.block_buffer(s.l) : e;
    sweep_.logits_block(chunk, block, set, mirrored, false, dots, guide, l, s.view, [](A*) {});
    const bool scaled_in_pass = scaled && passes == 1;
    bool add = false;
    for_each_group(set, [&](FoldKind kind, const Upstream<A>* of_rows, const Upstream<A>* of_cols) {
      if (kind == FoldKind::max) return;
      const Upstream<A>*on_i = mirrored ? of_cols : of_rows, *on_j = mirrored ? of_rows : of_cols;
      const bool lse = kind == FoldKind::logsumexp;
      const FoldWeights<A> w{
          on_i && lse ? on_i->lse.get() + chunk.begin : nullptr, on_i ? on_i->weight.get() + chunk.begin : nullptr,
          on_j && lse ? on_j->lse.get() + block.j : nullptr, on_j ? on_j->weight.get() + block.j : nullptr};
      weights(kind, s.view, w, add, scaled_in_pass, l, e, rows, block.cols);
      add = true;
    });
    if (!add) memset(e, 0, rows * kBlock * sizeof(A));
    const auto put = [&](int64_t i, int64_t j, A value) {
      e[i * kBlock + j] += scaled_in_pass ? value * (s.view.scale_i[i] * s.view.scale_j[j]) : value;
    };
    if (has_max) add_winners(chunk, block, set, mirrored, l, put);
    if (set == 0) add_named(chunk, block, mirrored, put);
    if (scaled && !scaled_in_pass) accumulate<A>(false, false, s.view, dots, e, e, rows, block.cols, nullptr);
  }

  // The maxima of rows and columns. One that `fill` made is at -inf here and has no gradient.
  template <class Put>
  void add_winners(const Chunk& chunk, const Block& block, int set, bool mirrored, const A* l, Put put) {
    const int64_t rows = mirrored ? block.mirrored : block.rows;
    const auto add = [&](int64_t i, int64_t j, A weight) {
      if (i >= 0 && i < rows && j >= 0 && j < block.cols && l[i * kBlock + j] != -infinity<A>()) put(i, j, weight);
    };
    for_each_group(set, [&](FoldKind kind, const Upstream<A>* of_rows, const Upstream<A>* of_cols) {
      if (kind != FoldKind::max) return;
      const Upstream<A>*on_i = mirrored ? of_cols : of_rows, *on_j = mirrored ? of_rows : of_cols;
      for (int64_t i = 0; on_i && i < rows; ++i) {
        add(i, on_i->argmax[chunk.begin + i] - block.j, on_i->weight.get()[chunk.begin + i]);
      }
      for (int64_t j = 0; on_j && j < block.cols; ++j) {
        add(on_j->argmax[block.j + j] - chunk.begin, j, on_j->weight.get()[block.j + j]);
      }
    });
  }

  // The targets' logits and the linear lists belong to the first set; folds see neither.
  template <class Put>
  void add_named(const Chunk& chunk, const Block& block, bool mirrored, Put put) {
    if (d_target) {
      sweep_.for_each_target(chunk, block, mirrored,
                             [&](int64_t i, int64_t j, int64_t owner) { put(i, j, d_target[owner]); });
    }
    if (d_linear) {
      sweep_.for_each_linear(chunk, block, mirrored, [&](int64_t i, int64_t j, int64_t entry) {
        const int64_t owner = mirrored ? block.j + j : chunk.begin + i;
        put(i, j, d_linear[owner] * static_cast<const A*>(p.linear_weight)[entry]);
      });
    }
  }

  template <class Weigh>
  void add_block(const Chunk& chunk, const Block& block, int64_t first, Scratch& s, const A* dots, Weigh weigh) {
    const A* guide = sweep_.guide_block(chunk, block, s);
    A* e = sweep_.block_buffer(s.e);
    // With one view and no sums by e, e itself is of no use: its pass writes g.
    const bool one_view = p.set_count == 1 && !p.self && !any_sums_;
    A* g = one_view ? e : sweep_.block_buffer(s.g);
    const int64_t part = (block.index - first) * sweep_.chunk_rows;
    if (one_view) {
      weigh(block, 0, false, true, dots, guide, e, s);
    } else {
      for (int set = 0; set < p.set_count; ++set) {
        weigh(block, set, false, false, dots, guide, e, s);
        add_view(block, set, false, set > 0, part, dots, e, g, s);
        if (!p.self) continue;
        weigh(block, set, true, false, dots, guide, e, s);
        add_view(block, set, true, true, part, dots, e, g, s);
      }
    }
    if (p.row_factor) sweep_.multiply_by_factors(chunk, block, g);
    if (compensates()) {
      A residual_j[kBlock];
      const A *of_rows = static_cast<const A*>(p.row_factor), *of_columns = static_cast<const A*>(p.col_factor);
      residuals<C>(g, block.rows, block.cols, of_rows ? of_rows + chunk.begin : nullptr,
                   of_columns ? of_columns + block.j : nullptr, residual_.get() + part, residual_j);
      add_to(residual_columns_.get() + block.j, residual_j, block.cols);
    }
    multiply_weights(chunk, block, first, g, s);
  }

  // g (+)= what one view of a set says, and the sums that its own block owns.
  void add_view(const Block& block, int set, bool mirrored, bool add, int64_t part, const A* dots, const A* e, A* g,
                Scratch& s) {
    SetSums& own = sums_[set];
    Sums<A> sums;
    if (own.used) {
      sums.e_i = (mirrored ? own.mirrored_e : own.direct_e).get() + part;
      sums.edot_i = (mirrored ? own.mirrored_edot : own.direct_edot).get() + part;
    }
    accumulate<A>(add, own.used, s.view, dots, e, g, mirrored ? block.mirrored : block.rows, block.cols, &sums);
    if (!own.used) return;
    add_to((mirrored ? drow_bias_ : dcol_bias_).get() + block.j, sums.e_j, block.cols, sign_of(set));
    if ((scale_of(set) == ScaleOf::columns) != mirrored) {
      add_to(own.dscale.get() + block.j, sums.edot_j, block.cols, sign_of(set));
    }
  }

  // Packs g for dx and adds this block's rows of dy.
  void multiply_weights(const Chunk& chunk, const Block& block, int64_t first, const A* g, Scratch& s) {
    const int64_t depth_offset = (block.index - first) * sweep_.block_columns / C::kDepth;
    if (out.dx) {
      pack_rows<C, Side::a>(weight_panels_.get() + depth_offset * kRows<C>, kRows<C> * super_units_, g, kBlock,
                            block.rows, chunk.rows, block.cols);
    }
    if (!dy()) return;
    const int64_t units = depth_units<C>(block.rows);
    U* panels = s.weights_panels.once(kBlock * depth_units<C>(round_up(sweep_.chunk_rows, kLaneGroup<C>)));
    pack_columns<C, Side::a>(panels, kRows<C> * units, g, kBlock, block.cols, block.rows);
    const int64_t x_units = depth_units<C>(chunk.rows);
    if (!wide_dy_.get()) {
      multiply<C>(block.cols, p.D, units, panels, kRows<C> * units, x_columns_.get(), kCols<C> * x_units,
                  dy() + block.j * p.D, p.D, chunk.begin > 0);
      return;
    }
    A* product = products_[s.thread].once(product_size());
    for (int64_t u = 0; u < units; u += kWideUnits) {
      multiply<C>(block.cols, p.D, minimum(kWideUnits, units - u), panels + u * kRows<C>, kRows<C> * units,
                  x_columns_.get() + u * kCols<C>, kCols<C> * x_units, product, p.D, false);
      add_wide(wide_dy_.get() + block.j * p.D, product, block.cols, p.D);
    }
  }

  template <class T>
  static void add_to(double* to, const T* from, int64_t count, double sign = 1) {
    for (int64_t j = 0; j < count; ++j) to[j] += sign * from[j];
  }

  // The i-side sums of blocks [first, last), in block order.
  void add_sums(const Chunk& chunk, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t part = (b - first) * sweep_.chunk_rows, before = b * sweep_.block_columns;
      const int64_t j_end = chunk.j_begin + before + sweep_.block_columns;
      const int64_t used = p.self ? minimum(chunk.rows, minimum(j_end, chunk.j_end) - chunk.begin) : chunk.rows;
      const int64_t mirrored = p.self ? minimum(chunk.rows, before) : 0;
      if (compensates()) add_to(residual_rows_.get() + chunk.begin, residual_.get() + part, used);
      for (int set = 0; set < p.set_count; ++set) {
        const SetSums& own = sums_[set];
        if (!own.used) continue;
        const bool of_columns = scale_of(set) == ScaleOf::columns;
        add_to(drow_bias_.get() + chunk.begin, own.direct_e.get() + part, used, sign_of(set));
        add_to(dcol_bias_.get() + chunk.begin, own.mirrored_e.get() + part, mirrored, sign_of(set));
        add_to(own.dscale.get() + chunk.begin, (of_columns ? own.mirrored_edot : own.direct_edot).get() + part,
               of_columns ? mirrored : used, sign_of(set));
      }
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
    const auto weigh = [&](Buffer<double>& residual, const void* own, const void* other, const int64_t* mates,
                           int64_t count, int64_t others) {
      for (int64_t i = 0; own && i < count; ++i) {
        if (mates[i] < 0 || mates[i] >= others) continue;
        residual.get()[i] *=
            static_cast<double>(static_cast<const A*>(own)[i]) * static_cast<const A*>(other)[mates[i]];
      }
    };
    weigh(residual_rows_, p.row_factor, p.col_factor, p.target, p.N, p.M);
    weigh(residual_columns_, p.col_factor, p.row_factor, partner.get(), p.M, p.N);
    give_back(static_cast<A*>(out.dx), p.N, p.target, static_cast<const S*>(p.y), p.y_stride, p.M, residual_rows_);
    give_back(dy(), p.M, partner.get(), static_cast<const S*>(p.x), p.x_stride, p.N, residual_columns_);
  }

  void give_back(A* to, int64_t count, const int64_t* partner, const S* from, int64_t stride, int64_t from_count,
                 const Buffer<double>& residual) {
    sweep_.run(to ? (count + kBlock - 1) / kBlock : 0, count * p.D * kWorkOfMove, [&](int64_t group, int) {
      for (int64_t i = group * kBlock; i < minimum(count, (group + 1) * kBlock); ++i) {
        if (partner[i] < 0 || partner[i] >= from_count) continue;
        add_row(to + i * p.D, from + partner[i] * stride, static_cast<A>(residual.get()[i]), p.D);
      }
    });
  }
  // to += weight * row
  template <class T>
  static void add_row(T* to, const S* row, A weight, int64_t count) {
    constexpr int W = kLanes<A>;
    int64_t d = 0;
    for (; d + W <= count; d += W) {
      const Vec<A> added = weight * to_accumulator<A>(row + d);
      if constexpr (std::is_same_v<T, A>) {
        store(to + d, load(to + d) + added);
      } else {
        for (int q = 0; q < W; ++q) to[d + q] += added[q];
      }
    }
    if (d == count) return;
    S tail[W] = {};
    for (int64_t q = d; q < count; ++q) tail[q - d] = row[q];
    const Vec<A> last = to_accumulator<A>(tail);
    for (int64_t q = d; q < count; ++q) to[q] += weight * last[q - d];
  }

  // The chunk's rows packed as B panels: depth runs over rows, lanes over the embedding dimension.
  void pack_x_columns(const Chunk& chunk) {
    if (!dy()) return;
    const int64_t units = depth_units<C>(chunk.rows);
    sweep_.run((p.D + kLaneGroup<C> - 1) / kLaneGroup<C>, chunk.rows * p.D * kWorkOfMove, [&](int64_t group, int) {
      const int64_t d = group * kLaneGroup<C>;
      pack_columns<C, Side::b>(x_columns_.get() + d * units, kCols<C> * units,
                               static_cast<const S*>(p.x) + chunk.begin * p.x_stride + d, p.x_stride,
                               minimum<int64_t>(kLaneGroup<C>, p.D - d), chunk.rows);
    });
  }

  // dx of the chunk's rows += weights x columns of y, over blocks [first, last). A task owns some rows and dimensions.
  void add_dx(const Chunk& chunk, int64_t first, int64_t last) {
    constexpr int64_t kMostDepth = 512;
    const bool in_place = !wide_dx_.get();
    const bool written = p.self || first > 0;  // of self-similarity the first chunk has written all rows as columns
    const int64_t depth_step = in_place ? kMostDepth : kWideUnits * C::kDepth;
    const int64_t width = sweep_.block_columns, begin = chunk.j_begin + first * width;
    const int64_t end = minimum(chunk.j_begin + last * width, chunk.j_end);
    const int64_t panels = (p.D + kCols<C> - 1) / kCols<C>, tasks = 2 * sweep_.parallel_.threads;
    const int64_t group = maximum<int64_t>(1, minimum<int64_t>(4, panels / tasks));
    const int64_t groups = (panels + group - 1) / group;
    // Splitting rows packs the same columns of y once more, so only as far as dimensions leave threads idle.
    const int64_t splits = (tasks + groups - 1) / groups;
    const int64_t segment = round_up((chunk.rows + splits - 1) / splits, kRows<C>);
    const int64_t segments = (chunk.rows + segment - 1) / segment;
    sweep_.run(groups * segments, chunk.rows * (end - begin) * p.D, [&](int64_t index, int thread) {
      const int64_t d = index % groups * group * kCols<C>, lanes = minimum(group * kCols<C>, p.D - d);
      const int64_t i = index / groups * segment, rows = minimum(segment, chunk.rows - i);
      const int64_t step_units = depth_units<C>(kMostDepth);
      U* y_columns = sweep_.scratch(thread).y_columns.once(4 * kCols<C> * step_units);
      A* to = static_cast<A*>(out.dx) + (chunk.begin + i) * p.D + d;
      if (!in_place) to = products_[thread].once(product_size());
      for (int64_t j = begin; j < end; j += depth_step) {
        const int64_t depth = minimum(depth_step, end - j);
        pack_columns<C, Side::b>(y_columns, kCols<C> * step_units, static_cast<const S*>(p.y) + j * p.y_stride + d,
                                 p.y_stride, lanes, depth);
        multiply<C>(rows, lanes, depth_units<C>(depth),
                    weight_panels_.get() + i * super_units_ + (j - begin) / C::kDepth * kRows<C>,
                    kRows<C> * super_units_, y_columns, kCols<C> * step_units, to, in_place ? p.D : lanes,
                    in_place && (written || j > begin));
        if (!in_place) add_wide(wide_dx_.get() + (chunk.begin + i) * p.D + d, to, rows, lanes);
      }
    });
  }

  const SimilarityProblem& p;
  const SimilarityBackward& out;
  Sweep<C, S>& sweep_;
  int64_t super_units_ = 0;
  Buffer<U> weight_panels_, x_columns_;
  std::unique_ptr<SetSums[]> sums_;  // per set
  bool any_sums_ = false;
  Buffer<A> residual_;
  Buffer<double> wide_dx_, wide_dy_;       // where sums are long
  std::unique_ptr<Buffer<A>[]> products_;  // per thread, what is added to them
  Buffer<double> drow_bias_, dcol_bias_, residual_rows_, residual_columns_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
