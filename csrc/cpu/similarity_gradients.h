// Gradients of a chunk of rows, once the upstream gradients of its folds are known.
//
// Tiles form weights g = dtotal/d(inner product) and pack them; products with them are in similarity_products.h, sums
// of them in similarity_sums.h.
#pragma once

#include "similarity_sums.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Forms the gradients of a chunk once the upstream gradients of its folds are known.
template <class C>
class Gradients {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;
  using Scratch = typename Sweep<C>::Scratch;

  Gradients(const SimilarityProblem& problem, const SimilarityBackward& outputs, Sweep<C>& sweep)
      : p(problem),
        out(outputs),
        sweep_(sweep),
        products_(problem, outputs, sweep),
        sums_(problem, outputs, sweep, products_.step_blocks()) {
    upstream.reset(new Upstream<A>[p.fold_count]);
  }
  void add_chunk(const Chunk& chunk) {
    add_chunk(chunk, [&](const Block& block, int set, bool mirrored, bool scaled, const A* dots, const A* guide, A* e,
                         Scratch& s) { weigh(block, set, mirrored, scaled, dots, guide, e, s); });
  }
  // The same for other derivatives than those of the folds: `weigh`, called as the function below.
  template <class Weigh>
  void add_chunk(const Chunk& chunk, Weigh weigh) {
    const bool kept = sweep_.places(chunk);
    products_.for_each_step(chunk, [&](const Step& step) {
      sweep_.for_each_tile(
          chunk, step.first, step.last,
          [&](const Block& block, Scratch& s) {
            A* dots = sweep_.place(chunk, block);
            if (!dots) sweep_.multiply_block(chunk, block, s, dots = sweep_.block_buffer(s.dots));
            add_tile(step, block, s, dots, weigh);
          },
          (kept ? 0 : p.D) + kWorkOfFold, products_.packs(step), products_.work_of_packs(step),
          [&](int64_t index) { products_.pack(step, index); });
      products_.multiply_step(step, sums_.tasks(step), sums_.work(step),
                              [&](int64_t index) { sums_.run(step, index); });
    });
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
        const auto x = StoredNumbers<C>(p.x, p.dtype) + (i * p.x_stride + d);
        const auto y = StoredNumbers<C>(p.y, p.dtype) + (j * p.y_stride + d);
        products_.add_to_dx(i, d, [&](auto* to) { add_row(to, y, weight, depth); });
        products_.add_to_dy(j, d, [&](auto* to) { add_row(to, x, weight, depth); });
      }
    });
    for (int64_t k = 0; k < pairs.count; ++k) {
      if (pairs.columns[k] >= 0) sums_.add_pair(pairs.rows[k], pairs.columns[k], pairs.e[k], pairs.dots[k]);
    }
  }

  void finish() {
    products_.finish();
    if constexpr (kRounds) {
      if (sums_.compensates()) compensate();
    }
    sums_.finish();
  }

  std::unique_ptr<Upstream<A>[]> upstream;  // per fold
  const A *d_target = nullptr, *d_linear = nullptr;

 private:
  static constexpr bool kRounds = C::kDepth == 2;

  A* dy() const { return static_cast<A*>(p.self ? out.dx : out.dy); }
  double sign_of(int set) const { return sums_.sign_of(set); }

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
  void weigh(const Block& block, int set, bool mirrored, bool scaled, const A* dots, const A* guide, A* e, Scratch& s) {
    const int64_t rows = mirrored ? block.mirrored : block.rows;
    int passes = 0;
    bool has_max = false;
    for_each_group(set, [&](FoldKind kind, auto*, auto*) { kind == FoldKind::max ? has_max = true : ++passes; });
    // Logits are turned into e in place where nothing else looks at them afterwards.
    A* l = passes > 1 || has_max ? sweep_.block_buffer(s.l) : e;
    sweep_.logits_block(block, set, mirrored, false, dots, guide, l, s.view, [](A*) {});
    const bool scaled_in_pass = scaled && passes == 1;
    bool add = false;
    for_each_group(set, [&](FoldKind kind, const Upstream<A>* of_rows, const Upstream<A>* of_cols) {
      if (kind == FoldKind::max) return;
      const Upstream<A>*on_i = mirrored ? of_cols : of_rows, *on_j = mirrored ? of_rows : of_cols;
      const bool lse = kind == FoldKind::logsumexp;
      const FoldWeights<A> w{
          on_i && lse ? on_i->lse.get() + block.i : nullptr, on_i ? on_i->weight.get() + block.i : nullptr,
          on_j && lse ? on_j->lse.get() + block.j : nullptr, on_j ? on_j->weight.get() + block.j : nullptr};
      weights(kind, s.view, w, add, scaled_in_pass, l, e, rows, block.cols);
      add = true;
    });
    if (!add) memset(e, 0, rows * kBlock * sizeof(A));
    const auto put = [&](int64_t i, int64_t j, A value) {
      e[i * kBlock + j] += scaled_in_pass ? value * (s.view.scale_i[i] * s.view.scale_j[j]) : value;
    };
    if (has_max) add_winners(block, set, mirrored, l, put);
    if (set == 0) add_named(block, mirrored, put);
    if (scaled && !scaled_in_pass) accumulate<A>(false, false, s.view, dots, e, e, rows, block.cols, nullptr);
  }

  // The maxima of rows and columns. One that `fill` made is at -inf here and has no gradient.
  template <class Put>
  void add_winners(const Block& block, int set, bool mirrored, const A* l, Put put) {
    const int64_t rows = mirrored ? block.mirrored : block.rows;
    const auto add = [&](int64_t i, int64_t j, A weight) {
      if (i >= 0 && i < rows && j >= 0 && j < block.cols && l[i * kBlock + j] != -infinity<A>()) put(i, j, weight);
    };
    for_each_group(set, [&](FoldKind kind, const Upstream<A>* of_rows, const Upstream<A>* of_cols) {
      if (kind != FoldKind::max) return;
      const Upstream<A>*on_i = mirrored ? of_cols : of_rows, *on_j = mirrored ? of_rows : of_cols;
      for (int64_t i = 0; on_i && i < rows; ++i) {
        add(i, on_i->argmax[block.i + i] - block.j, on_i->weight.get()[block.i + i]);
      }
      for (int64_t j = 0; on_j && j < block.cols; ++j) {
        add(on_j->argmax[block.j + j] - block.i, j, on_j->weight.get()[block.j + j]);
      }
    });
  }

  // The targets' logits and the linear lists belong to the first set; folds see neither.
  template <class Put>
  void add_named(const Block& block, bool mirrored, Put put) {
    if (d_target) {
      sweep_.for_each_target(block, mirrored, [&](int64_t i, int64_t j, int64_t owner) { put(i, j, d_target[owner]); });
    }
    if (d_linear) {
      sweep_.for_each_linear(block, mirrored, [&](int64_t i, int64_t j, int64_t entry) {
        const int64_t owner = mirrored ? block.j + j : block.i + i;
        put(i, j, d_linear[owner] * static_cast<const A*>(p.linear_weight)[entry]);
      });
    }
  }

  template <class Weigh>
  void add_tile(const Step& step, const Block& block, Scratch& s, const A* dots, Weigh weigh) {
    const A* guide = sweep_.guide_block(step.chunk, block, s);
    A* e = sweep_.block_buffer(s.e);
    // With one view and no sums by e, e itself is of no use: its pass writes g.
    const bool one_view = p.set_count == 1 && !p.self && !sums_.any;
    A* g = one_view ? e : sweep_.block_buffer(s.g);
    if (one_view) {
      weigh(block, 0, false, true, dots, guide, e, s);
    } else {
      for (int set = 0; set < p.set_count; ++set) {
        for (const bool mirrored : {false, true}) {
          if (mirrored && !p.self) continue;
          weigh(block, set, mirrored, false, dots, guide, e, s);
          sums_.add_view(step, block, set, mirrored, set > 0 || mirrored, s.view, dots, e, g);
        }
      }
    }
    if (p.row_factor) sweep_.multiply_by_factors(block, g);
    if (sums_.compensates()) sums_.add_residuals(step, block, g);
    products_.put(step, block, g);
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
    weigh(sums_.residual_rows, p.row_factor, p.col_factor, p.target, p.N, p.M);
    weigh(sums_.residual_columns, p.col_factor, p.row_factor, partner.get(), p.M, p.N);
    give_back(static_cast<A*>(out.dx), p.N, p.target, StoredNumbers<C>(p.y, p.dtype), p.y_stride, p.M,
              sums_.residual_rows);
    give_back(dy(), p.M, partner.get(), StoredNumbers<C>(p.x, p.dtype), p.x_stride, p.N, sums_.residual_columns);
  }

  void give_back(A* to, int64_t count, const int64_t* partner, StoredNumbers<C> from, int64_t stride,
                 int64_t from_count, const Buffer<double>& residual) {
    sweep_.run(to ? (count + kBlock - 1) / kBlock : 0, count * p.D * kWorkOfMove, [&](int64_t group, int) {
      for (int64_t i = group * kBlock; i < minimum(count, (group + 1) * kBlock); ++i) {
        if (partner[i] < 0 || partner[i] >= from_count) continue;
        add_row(to + i * p.D, from + partner[i] * stride, static_cast<A>(residual.get()[i]), p.D);
      }
    });
  }
  // to += weight * row
  template <class T>
  static void add_row(T* to, StoredNumbers<C> row, A weight, int64_t count) {
    row.visit([&](const auto* numbers) { add_row(to, numbers, weight, count); });
  }
  template <class T, class S>
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

  const SimilarityProblem& p;
  const SimilarityBackward& out;
  Sweep<C>& sweep_;
  WeightProducts<C> products_;
  GradientSums<C> sums_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
