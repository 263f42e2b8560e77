// Gradients of the folds of all prefixes.
//
// A prefix weighs all columns before its end, so the weights of a segment are the sum of those of the prefixes from its
// own on, and dx and dy take one product of the whole depth each. Weights stay in the accumulation type: they are never
// rounded. Inverse lengths are factors of rows and columns; their gradients need sums of weighted products alone.
//
// Blocks of columns own dy; then, behind a barrier, tasks own rows and columns of dx.
#pragma once

#include "prefix_sweep.h"
#include "similarity_epilogue.h"
#include "similarity_lists.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Weights of a chunk that are kept packed between dy and dx (8 MiB of float32).
constexpr int64_t kPrefixWeights = int64_t{2} << 20;

// Pairs of a tile that the folds leave out, as columns of each row, and, mirrored, the rows of each column.
template <class A>
struct LeftOut {
  using I = Id<A>;
  bool any[kTileRows];                                                     // of this row: single pairs
  I target[kTileRows], diagonal[kTileRows], mirrored_diagonal[kTileRows];  // columns of the tile
  I mirrored_target[kBlock];                                               // rows of the tile
  const I *row_ids = nullptr, *col_ids;                                    // of the tile's rows and columns, or null
  I mirrored_row_ids[kBlock], own_col_ids[kBlock];
};

// One prefix of a tile.
template <class A>
struct PrefixView {
  const A *scaled_i, *factor_i, *factor_j;       // logit = dot * scaled_i * factor_j
  const A *lse_i, *weight_i, *lse_j, *weight_j;  // upstream gradients of folds, safe for exp(l - lse)
  const A *own_i, *own_j;                        // upstream gradients of targets' logits
  const A* past_end;                             // (kBlock,): 0, and -inf for columns past the end
};

// Sums of dtotal/dl * dot: along rows times factor_j, along columns times factor_i.
template <class A>
struct PrefixSums {
  A *rows, *cols;
};

// g = above + dtotal/d(dot) for one row; `above` is null for the last prefix, `g` may be `dots`.
template <class A, bool kSideI, bool kSideJ, bool kSums, bool kRules>
INLINE A weigh_row(const PrefixTile& tile, const PrefixView<A>& v, const LeftOut<A>& out, int64_t i, const A* above,
                   const A* dots, A* g, A* col_sums) {
  constexpr int W = kLanes<A>;
  using I = Id<A>;
  const A scaled = v.scaled_i[i], factor = v.factor_i[i];
  const A lse = kSideI ? v.lse_i[i] : 0, weight = kSideI ? v.weight_i[i] : 0;
  const Vec<A> nothing = broadcast(-infinity<A>());
  [[maybe_unused]] Vec<I> position = lane_numbers<A>();
  Vec<A> row_sum = {};
  for (int64_t j = 0; j < tile.cols; j += W) {
    const Vec<A> dot = load(dots + j), factor_j = load(v.factor_j + j), slope = scaled * factor_j;
    const Vec<A> l = dot * slope + load(v.past_end + j);
    Vec<A> direct = l, mirrored = l, e = {};
    if constexpr (kRules) {
      const Vec<I> of_target = position == out.target[i];
      if (out.row_ids) direct = load(out.own_col_ids + j) == out.row_ids[i] ? nothing : direct;
      direct = (of_target | (position == out.diagonal[i])) != 0 ? nothing : direct;
      e = of_target != 0 ? broadcast(v.own_i[i]) : e;
      mirrored = direct;
      if (tile.mirrored) {
        const Vec<I> of_mirrored = load(out.mirrored_target + j) == static_cast<I>(i);
        mirrored = (of_mirrored | (position == out.mirrored_diagonal[i])) != 0 ? nothing : l;
        if (out.row_ids) mirrored = load(out.mirrored_row_ids + j) == out.col_ids[i] ? nothing : mirrored;
        e += of_mirrored != 0 ? load(v.own_j + j) : Vec<A>{};
      }
      position += W;
    }
    // No logit of a fold is above its logsumexp by more than rounding.
    if constexpr (kSideI) e += weight * exponential_of_negative(direct - lse);
    if constexpr (kSideJ) e += load(v.weight_j + j) * exponential_of_negative(mirrored - load(v.lse_j + j));
    if constexpr (kSums) {
      // A weight of 0 stays 0 even where the inner product is inf or NaN, as for a pair that takes no part.
      const Vec<A> along = e == Vec<A>{} ? e : e * dot;
      row_sum += along * factor_j;
      store(col_sums + j, load(col_sums + j) + along * factor);
    }
    const Vec<A> own = e * slope;
    store(g + j, above ? load(above + j) + own : own);
  }
  return kSums ? lane_sum<A>(row_sum) : 0;
}

template <class A, bool kSideI, bool kSideJ, bool kSums>
void weigh(const PrefixTile& tile, const PrefixView<A>& v, const LeftOut<A>& out, const A* above, A* dots,
           PrefixSums<A> sums) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const A* from = above ? above + i * kBlock : nullptr;
    A* at = dots + i * kBlock;
    const A sum = out.any[i] || out.row_ids
                      ? weigh_row<A, kSideI, kSideJ, kSums, true>(tile, v, out, i, from, at, at, sums.cols)
                      : weigh_row<A, kSideI, kSideJ, kSums, false>(tile, v, out, i, from, at, at, sums.cols);
    if (kSums) sums.rows[i] = sum;
  }
}

template <class C>
class PrefixGradients {
 public:
  using A = typename C::Acc;
  using I = Id<A>;
  using K = std::conditional_t<sizeof(A) == 4, ComputeFloat, ComputeDouble>;  // what weights are multiplied in
  using U = typename K::Unit;

  PrefixGradients(const SimilarityPrefixProblem& problem, const SimilarityPrefixBackward& outputs,
                  PrefixSweep<C>& sweep)
      : p(problem), out(outputs), sweep_(sweep), rows_(round_up(sweep.chunk_rows, kTileRows)) {
    const int64_t fits = kPrefixWeights / maximum<int64_t>(rows_ * p.prefixes, 1) / kBlock * kBlock;
    super_ = minimum(maximum(fits, kBlock), round_up(maximum<int64_t>(p.M, 1), kBlock));
    if (out.dx) weight_panels_.allocate(p.prefixes * rows_ * super_);
    if (dy()) x_columns_.allocate(round_up(p.D, kLaneGroup<K>) * rows_ + p.prefixes * kLaneGroup<K> * rows_);
    own_.allocate(p.prefixes * (p.N + kBlock));
    memset(own_.get(), 0, static_cast<size_t>(p.prefixes * (p.N + kBlock)) * sizeof(A));
    upstream_rows_.reset(new Upstream<A>[p.prefixes]);
    upstream_cols_.reset(new Upstream<A>[p.prefixes]);
    for (int64_t s = 0; s < p.prefixes; ++s) {
      set_upstream(upstream_rows_[s], out.rows, out.d_rows, s, p.N);
      set_upstream(upstream_cols_[s], out.cols, out.d_cols, s, p.M);
      if (out.d_target) {
        memcpy(own_.get() + s * (p.N + kBlock), static_cast<const A*>(out.d_target) + s * p.N,
               static_cast<size_t>(p.N) * sizeof(A));
      }
    }
    sums_ = p.normalize || out.dscale;
    if (sums_) {
      parts_.allocate(p.prefixes * rows_ * (super_ / kBlock));
      by_row_.allocate(p.prefixes * p.N);
      by_col_.allocate(p.prefixes * p.M);
      memset(by_row_.get(), 0, static_cast<size_t>(p.prefixes * p.N) * sizeof(double));
      memset(by_col_.get(), 0, static_cast<size_t>(p.prefixes * p.M) * sizeof(double));
    }
    scratch_.reset(new Scratch[sweep.parallel_.threads]);
  }

  void add_chunk(const Chunk& chunk) {
    pack_x_columns(chunk);
    const int64_t step = super_ / kBlock;
    for (int64_t first = 0; first < chunk.blocks(); first += step) {
      const int64_t last = minimum(first + step, chunk.blocks());
      sweep_.for_each_block(chunk, first, last,
                            [&](const Block& block, int thread) { add_block(chunk, block, first, thread); });
      if (out.dx) add_dx(chunk, first, last);
      for (int64_t b = first; b < last && sums_; ++b) add_row_sums(chunk, b, b - first);
    }
  }

  void finish() {
    if (out.dscale) {
      double total = 0;
      for (int64_t s = 0; s < p.prefixes; ++s) {
        for (int64_t i = 0; i < p.N; ++i) total += by_row_.get()[s * p.N + i] * sweep_.x_lengths.inverse(s)[i];
      }
      *static_cast<A*>(out.dscale) = static_cast<A>(total);
    }
    if (!p.normalize) return;
    if (p.self) {
      for (int64_t k = 0; k < p.prefixes * p.N; ++k) by_row_.get()[k] += by_col_.get()[k];
    }
    subtract_lengths(static_cast<A*>(out.dx), sweep_.x(), p.x_stride, p.N, sweep_.x_lengths, by_row_);
    if (!p.self) {
      subtract_lengths(static_cast<A*>(out.dy), sweep_.y(), p.y_stride, p.M, sweep_.y_lengths(), by_col_);
    }
  }

 private:
  struct Scratch {
    LeftOut<A> left_out;
    A past_end[kBlock], col_sums[kBlock];
    Buffer<A> block_sums;
    Buffer<U> panels, y_columns;
  };

  A* dy() const { return static_cast<A*>(p.self ? out.dx : out.dy); }
  static void set_upstream(Upstream<A>& upstream, const void* values, const void* gradients, int64_t prefix,
                           int64_t size) {
    if (!gradients) return;
    upstream.set_all(FoldKind::logsumexp, size, static_cast<const A*>(values) + prefix * size,
                     static_cast<const A*>(gradients) + prefix * size, nullptr);
  }

  // ---- Weights ----

  void name_left_out(const PrefixTile& tile, LeftOut<A>& left) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      left.any[i] = false;
      left.target[i] = left.diagonal[i] = left.mirrored_diagonal[i] = -1;
    }
    for (int64_t j = 0; j < kBlock; ++j) left.mirrored_target[j] = -1;
    const auto columns = [&](I* to) {
      return [&left, to](int64_t i, int64_t j, int64_t) {
        left.any[i] = true;
        to[i] = static_cast<I>(j);
      };
    };
    sweep_.for_each_target(tile, false, columns(left.target));
    sweep_.for_each_diagonal(tile, false, columns(left.diagonal));
    left.row_ids = p.differ_rows ? sweep_.row_ids() + tile.i : nullptr;
    for (int64_t j = 0; j < kBlock && p.differ_rows; ++j) {
      left.own_col_ids[j] = j < tile.cols ? sweep_.col_ids()[tile.j + j] : 0;
    }
    if (!tile.mirrored) return;
    sweep_.for_each_target(tile, true, [&](int64_t i, int64_t j, int64_t) {
      left.any[i] = true;
      left.mirrored_target[j] = static_cast<I>(i);
    });
    sweep_.for_each_diagonal(tile, true, columns(left.mirrored_diagonal));
    left.col_ids = p.differ_rows ? sweep_.col_ids() + tile.i : nullptr;
    for (int64_t j = 0; j < kBlock && p.differ_rows; ++j) {
      left.mirrored_row_ids[j] = j < tile.cols ? sweep_.row_ids()[tile.j + j] : 0;
    }
  }

  // Replaces the inner products of all prefixes by the weights of segments.
  void weigh_tile(const Chunk& chunk, const PrefixTile& tile, int64_t part, A* sums, Scratch& s) {
    name_left_out(tile, s.left_out);
    for (int64_t prefix = p.prefixes - 1; prefix >= 0; --prefix) {
      A* dots = sums + prefix * kTileRows * kBlock;
      const A* above = prefix + 1 < p.prefixes ? dots + kTileRows * kBlock : nullptr;
      const Upstream<A>&of_rows = upstream_rows_[prefix], &of_cols = p.self ? of_rows : upstream_cols_[prefix];
      const bool on_i = of_rows.used, on_j = of_cols.used && (!p.self || tile.mirrored);
      const A* own = own_.get() + prefix * (p.N + kBlock);
      const PrefixView<A> v{sweep_.scaled(prefix) + tile.i,
                            sweep_.x_lengths.inverse(prefix) + tile.i,
                            sweep_.y_lengths().inverse(prefix) + tile.j,
                            on_i ? of_rows.lse.get() + tile.i : nullptr,
                            on_i ? of_rows.weight.get() + tile.i : nullptr,
                            on_j ? of_cols.lse.get() + tile.j : nullptr,
                            on_j ? of_cols.weight.get() + tile.j : nullptr,
                            own + tile.i,
                            p.self ? own + tile.j : nullptr,
                            s.past_end};
      A* rows = sums_ ? parts_.get() + (part * p.prefixes + prefix) * rows_ + tile.i - chunk.begin : nullptr;
      const PrefixSums<A> to{rows, sums_ ? s.block_sums.get() + prefix * kBlock : nullptr};
      const auto call = [&](auto with_sums) {
        constexpr bool kSums = decltype(with_sums)::value;
        if (on_i && on_j) return weigh<A, true, true, kSums>(tile, v, s.left_out, above, dots, to);
        if (on_i) return weigh<A, true, false, kSums>(tile, v, s.left_out, above, dots, to);
        if (on_j) return weigh<A, false, true, kSums>(tile, v, s.left_out, above, dots, to);
        weigh<A, false, false, kSums>(tile, v, s.left_out, above, dots, to);
      };
      sums_ ? call(std::true_type{}) : call(std::false_type{});
    }
  }

  // ---- A block of columns ----

  void add_block(const Chunk& chunk, const Block& block, int64_t first, int thread) {
    Scratch& s = scratch_[thread];
    const int64_t part = block.index - first, units = depth_units<K>(block.rows);
    for (int64_t j = 0; j < kBlock; ++j) s.past_end[j] = j < block.cols ? 0 : -infinity<A>();
    if (sums_) memset(s.block_sums.once(p.prefixes * kBlock), 0, static_cast<size_t>(p.prefixes * kBlock) * sizeof(A));
    U* panels = dy() ? s.panels.once(p.prefixes * kBlock * rows_) : nullptr;
    sweep_.for_each_tile(chunk, block, thread, [&](const PrefixTile& tile, A* sums) {
      weigh_tile(chunk, tile, part, sums, s);
      const int64_t row = tile.i - chunk.begin;
      for (int64_t segment = 0; segment < p.prefixes; ++segment) {
        const A* g = sums + segment * kTileRows * kBlock;
        if (out.dx) pack_weights(segment, row, part * kBlock, g, tile.rows, block.cols);
        if (!panels) continue;
        pack_columns<K, Side::a>(panels + segment * kBlock * rows_ + row * kRows<K>, kRows<K> * units, g, kBlock,
                                 block.cols, tile.rows);
      }
    });
    for (int64_t row = round_up(block.rows, kTileRows); out.dx && row < chunk.rows; row += kTileRows) {
      for (int64_t segment = 0; segment < p.prefixes; ++segment) {
        pack_weights(segment, row, part * kBlock, nullptr, 0, block.cols);
      }
    }
    for (int64_t segment = 0; segment < p.prefixes && panels; ++segment) {
      multiply<K>(block.cols, sweep_.width(segment), units, panels + segment * kBlock * rows_, kRows<K> * units,
                  x_columns(segment), kCols<K> * depth_units<K>(chunk.rows),
                  dy() + block.j * p.D + sweep_.begin(segment), p.D, true);
    }
    if (!sums_) return;
    for (int64_t prefix = 0; prefix < p.prefixes; ++prefix) {
      double* to = by_col_.get() + prefix * p.M + block.j;
      for (int64_t j = 0; j < block.cols; ++j) to[j] += s.block_sums.get()[prefix * kBlock + j];
    }
  }
  // Weights of a tile's rows as A panels of dx, whose depth are the columns of the super block.
  void pack_weights(int64_t segment, int64_t row, int64_t column, const A* g, int64_t rows, int64_t cols) {
    pack_rows<K, Side::a>(weight_panels_.get() + (segment * rows_ + row) * super_ + column * kRows<K>,
                          kRows<K> * super_, g, kBlock, rows, kTileRows, cols);
  }
  void add_row_sums(const Chunk& chunk, int64_t block, int64_t part) {
    const int64_t end = chunk.j_begin + (block + 1) * kBlock;
    const int64_t rows = p.self ? minimum(chunk.rows, minimum(end, chunk.j_end) - chunk.begin) : chunk.rows;
    for (int64_t prefix = 0; prefix < p.prefixes; ++prefix) {
      const A* from = parts_.get() + (part * p.prefixes + prefix) * rows_;
      double* to = by_row_.get() + prefix * p.N + chunk.begin;
      for (int64_t i = 0; i < rows; ++i) to[i] += from[i];
    }
  }

  // ---- Products ----

  // The chunk's rows as B panels of dy: depth runs over rows, lanes over the columns of a segment.
  U* x_columns(int64_t segment) {
    int64_t lanes = 0;
    for (int64_t s = 0; s < segment; ++s) lanes += round_up(sweep_.width(s), kLaneGroup<K>);
    return x_columns_.get() + lanes * rows_;
  }
  void pack_x_columns(const Chunk& chunk) {
    if (!dy()) return;
    const int64_t units = depth_units<K>(chunk.rows);
    for (int64_t segment = 0; segment < p.prefixes; ++segment) {
      U* to = x_columns(segment);
      const int64_t width = sweep_.width(segment);
      const StoredNumbers<C> from = sweep_.x() + (chunk.begin * p.x_stride + sweep_.begin(segment));
      sweep_.run((width + kLaneGroup<K> - 1) / kLaneGroup<K>, chunk.rows * width * kWorkOfMove,
                 [&](int64_t group, int) {
                   const int64_t d = group * kLaneGroup<K>;
                   pack_columns<K, Side::b>(to + d * units, kCols<K> * units, from + d, p.x_stride,
                                            minimum<int64_t>(kLaneGroup<K>, width - d), chunk.rows);
                 });
    }
  }

  // Panels of a segment that one task of dx owns.
  struct Strip {
    int64_t segment, d, lanes;
  };
  // dx of the chunk's rows += weights x columns of y, over blocks [first, last).
  void add_dx(const Chunk& chunk, int64_t first, int64_t last) {
    constexpr int64_t kDepthStep = 512, kStripPanels = 4;
    const int64_t begin = chunk.j_begin + first * kBlock, end = minimum(chunk.j_begin + last * kBlock, chunk.j_end);
    Buffer<Strip> strips(p.D / (kStripPanels * kCols<K>)+p.prefixes);
    int64_t count = 0;
    for (int64_t segment = 0; segment < p.prefixes; ++segment) {
      for (int64_t d = 0; d < sweep_.width(segment); d += kStripPanels * kCols<K>) {
        strips.get()[count++] = {segment, d, minimum<int64_t>(kStripPanels * kCols<K>, sweep_.width(segment) - d)};
      }
    }
    // Splitting rows packs the same columns of y once more, so only as far as strips leave threads idle.
    const int64_t splits = (2 * sweep_.parallel_.threads + count - 1) / count;
    const int64_t height = round_up((chunk.rows + splits - 1) / splits, kRows<K>);
    const int64_t heights = (chunk.rows + height - 1) / height;
    sweep_.run(count * heights, chunk.rows * (end - begin) * p.D, [&](int64_t index, int thread) {
      const Strip strip = strips.get()[index % count];
      const int64_t i = index / count * height, rows = minimum(height, chunk.rows - i);
      U* y_columns = scratch_[thread].y_columns.once(kStripPanels * kCols<K> * kDepthStep);
      const int64_t at = sweep_.begin(strip.segment) + strip.d;
      for (int64_t j = begin; j < end; j += kDepthStep) {
        const int64_t depth = minimum(kDepthStep, end - j);
        pack_columns<K, Side::b>(y_columns, kCols<K> * kDepthStep, sweep_.y() + (j * p.y_stride + at), p.y_stride,
                                 strip.lanes, depth);
        multiply<K>(rows, strip.lanes, depth,
                    weight_panels_.get() + (strip.segment * rows_ + i) * super_ + (j - begin) * kRows<K>,
                    kRows<K> * super_, y_columns, kCols<K> * kDepthStep,
                    static_cast<A*>(out.dx) + (chunk.begin + i) * p.D + at, p.D, true);
      }
    });
  }

  // d -= sum over prefixes of scale * sum * factor^3 * row: what the inverse lengths say, whose sums lack one factor.
  void subtract_lengths(A* d, StoredNumbers<C> rows, int64_t stride, int64_t count, const Lengths<A>& lengths,
                        const Buffer<double>& sums) {
    const double scale = *static_cast<const A*>(p.scale);
    sweep_.run(d ? (count + kBlock - 1) / kBlock : 0, count * p.D * p.prefixes, [&](int64_t group, int) {
      for (int64_t i = group * kBlock; i < minimum(count, (group + 1) * kBlock); ++i) {
        double share = 0;
        for (int64_t s = p.prefixes - 1; s >= 0; --s) {
          share += scale * sums.get()[s * count + i] * lengths.inverse(s)[i] * lengths.slope(s)[i];
          add_row<A>(static_cast<A>(-share), rows + (i * stride + sweep_.begin(s)), sweep_.width(s),
                     d + i * p.D + sweep_.begin(s));
        }
      }
    });
  }

  const SimilarityPrefixProblem& p;
  const SimilarityPrefixBackward& out;
  PrefixSweep<C>& sweep_;
  const int64_t rows_;  // of a chunk, whole tiles
  int64_t super_ = 0;   // columns whose packed weights are kept at a time
  bool sums_ = false;
  Buffer<U> weight_panels_, x_columns_;
  Buffer<A> own_, parts_;
  Buffer<double> by_row_, by_col_;
  std::unique_ptr<Upstream<A>[]> upstream_rows_, upstream_cols_;  // per prefix
  std::unique_ptr<Scratch[]> scratch_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
