// Listed pairs: their logits, in the arithmetic of the tile loop, and the gradients of these.
#pragma once

#include "../similarity_topk.h"
#include "similarity_pairs.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// The rows of x, and those of y, which may be int8 codes.
template <class C>
StoredNumbers<C> x_of(const SimilarityProblem& p) {
  return {p.x, p.dtype};
}
template <class C>
StoredNumbers<C, true> y_of(const SimilarityProblem& p) {
  return {p.y, p.dtype, p.code_scale != nullptr};
}

// Inner products and logits of the columns that single rows list.
template <class C>
class Lists {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;
  static constexpr int W = kLanes<A>;

  Lists(const SimilarityProblem& problem, int threads) : p(problem), scratch_(new Buffer<U>[threads]) {
    rules_.prepare(p, p.sets[0]);
  }

  // Calls body(e, lanes, dots) for groups of the list's entries; what belongs to a column of -1 has no meaning.
  template <class Body>
  void for_each_group(int64_t i, const int64_t* columns, int64_t count, int thread, Body body) {
    const int64_t units = depth_units<C>(p.D);
    U* panel = scratch_[thread].once(round_up(kRows<C>, kLaneGroup<C>) * units);
    pack_rows<C, Side::a>(panel, kRows<C> * units, x_of<C>(p) + i * p.x_stride, p.x_stride, 1, 1, p.D);
    for (int64_t e = 0; e < count; e += W) {
      const int64_t lanes = minimum<int64_t>(W, count - e);
      alignas(64) A dots[W] = {};
      if (!any_listed(columns + e, lanes)) {
        body(e, lanes, dots);
        continue;
      }
      y_of<C>(p).visit([&](const auto* y) {
        const auto row = [&](int64_t at) {
          return y + (at < count ? maximum<int64_t>(columns[at], 0) : 0) * p.y_stride;
        };
        decltype(y) from[W], next[W];
        for (int64_t q = 0; q < W; ++q) {
          from[q] = row(e + q);
          next[q] = row(e + W + q);
        }
        products_with<C, 1>(panel, from, next, p.D, dots, W);
      });
      for (int64_t q = 0; p.code_scale && q < lanes; ++q) {
        dots[q] *= static_cast<const A*>(p.code_scale)[maximum<int64_t>(columns[e + q], 0)];
      }
      body(e, lanes, dots);
    }
  }

  A scale(int64_t i, int64_t column) const {
    const SimilaritySet& set = p.sets[0];
    const A* of = static_cast<const A*>(set.scale);
    return set.scale_of == ScaleOf::rows ? of[i] : set.scale_of == ScaleOf::columns ? of[column] : of[0];
  }

  // The logits of a group, by the expression of `logits` in similarity_pairs.h.
  void logits_of(int64_t i, const int64_t* columns, int64_t lanes, const A* dots, A* l) const {
    alignas(64) A factor[W] = {}, bias_j[W] = {};
    for (int64_t q = 0; q < lanes; ++q) {
      const int64_t column = maximum<int64_t>(columns[q], 0);
      factor[q] = scale(i, column);
      bias_j[q] = p.col_bias ? static_cast<const A*>(p.col_bias)[column] : 0;
    }
    const A one = 1, bias = p.row_bias ? static_cast<const A*>(p.row_bias)[i] : 0;
    alignas(64) A value[W];
    store(value, load(dots) * (one * load(factor)) + (bias + load(bias_j)));
    for (int64_t q = 0; q < lanes; ++q) {
      if (rules_.log_weight.get()) {
        value[q] += rules_.log_weight
                        .get()[rules_.class_rows.get()[i] + rules_.class_cols.get()[maximum<int64_t>(columns[q], 0)]];
      }
      l[q] = columns[q] < 0 ? -infinity<A>() : value[q];
    }
  }

 private:
  static bool any_listed(const int64_t* columns, int64_t count) {
    bool any = false;
    for (int64_t q = 0; q < count; ++q) any |= columns[q] >= 0;
    return any;
  }

  const SimilarityProblem& p;
  Rules<A> rules_;
  std::unique_ptr<Buffer<U>[]> scratch_;
};

template <class C>
void topk_at(const SimilarityProblem& p, const TopKAt& out, const Parallel& parallel) {
  using A = typename C::Acc;
  if (p.M == 0) {
    for (int64_t e = 0; e < p.N * out.listed; ++e) static_cast<A*>(out.values)[e] = -infinity<A>();
    return;
  }
  Lists<C> lists(p, parallel.threads);
  auto task = [&](int64_t i, int thread) {
    const int64_t* columns = out.indices + i * out.listed;
    A* values = static_cast<A*>(out.values) + i * out.listed;
    lists.for_each_group(i, columns, out.listed, thread, [&](int64_t e, int64_t lanes, const A* dots) {
      lists.logits_of(i, columns + e, lanes, dots, values + e);
    });
  };
  run_parallel(parallel.run, p.N, task, p.N * out.listed * p.D);
}

// to += weight * from
template <class A, class S>
void add_long_row(A weight, const S* from, int64_t depth, double* to) {
  constexpr int W = kLanes<A>;
  for (int64_t k = 0; k < depth; k += W) {
    S some[W] = {};
    for (int64_t q = 0; q < minimum<int64_t>(W, depth - k); ++q) some[q] = from[k + q];
    const Vec<A> product = weight * to_accumulator<A>(static_cast<const S*>(some));
    for (int64_t q = 0; q < minimum<int64_t>(W, depth - k); ++q) to[k + q] += product[q];
  }
}
template <class A, class S>
void add_row(A weight, const S* from, int64_t depth, A* to) {
  constexpr int W = kLanes<A>;
  int64_t k = 0;
  for (; k + W <= depth; k += W) store(to + k, load(to + k) + weight * to_accumulator<A>(from + k));
  if (k == depth) return;
  S tail[W] = {};
  for (int64_t q = 0; k + q < depth; ++q) tail[q] = from[k + q];
  const Vec<A> last = weight * to_accumulator<A>(static_cast<const S*>(tail));
  for (int64_t q = 0; k + q < depth; ++q) to[k + q] += last[q];
}

template <class A, class C, bool codes>
void add_row(A weight, StoredNumbers<C, codes> from, int64_t depth, A* to) {
  from.visit([&](const auto* numbers) { add_row(weight, numbers, depth, to); });
}

// Entries of all lists by column, in the order of rows within a column: who adds to a row of dy, in a fixed order.
class ByColumn {
 public:
  ByColumn(const int64_t* indices, int64_t count, int64_t columns) : begin_(columns + 1), entries_(count) {
    int64_t* begin = begin_.get();
    memset(begin, 0, static_cast<size_t>(columns + 1) * sizeof(int64_t));
    for (int64_t e = 0; e < count; ++e) begin[indices[e] + 1] += indices[e] >= 0;
    begin[0] = 0;
    for (int64_t j = 0; j < columns; ++j) begin[j + 1] += begin[j];
    for (int64_t e = 0; e < count; ++e) {
      if (indices[e] >= 0) entries_.get()[begin[indices[e]]++] = e;
    }
    // Each column's position has moved to its end, which is the next one's beginning.
    for (int64_t j = columns; j > 0; --j) begin[j] = begin[j - 1];
    begin[0] = 0;
  }
  int64_t count(int64_t column) const { return begin_.get()[column + 1] - begin_.get()[column]; }
  template <class Body>
  void for_each(int64_t column, Body body) const {
    for (int64_t at = begin_.get()[column]; at < begin_.get()[column + 1]; ++at) body(entries_.get()[at]);
  }

 private:
  Buffer<int64_t> begin_, entries_;
};

template <class C>
void topk_backward(const SimilarityProblem& p, const TopKBackward& b, const Parallel& parallel) {
  using A = typename C::Acc;
  const SimilaritySet& set = p.sets[0];
  if (p.M == 0) return;
  Lists<C> lists(p, parallel.threads);
  const A* d_values = static_cast<const A*>(b.d_values);
  const bool by_column = b.dy || b.dcol_bias || (b.dscale && set.scale_of == ScaleOf::columns);
  Buffer<A> edots(b.dscale ? p.N * b.listed : 0);  // derivative by the logit times the inner product
  Buffer<A> scale_sums(b.dscale ? p.N : 0);
  const auto inner_scale = [&](int64_t i, int64_t column) {
    const A code = p.code_scale ? static_cast<const A*>(p.code_scale)[column] : 1;
    return lists.scale(i, column) * code;
  };
  auto of_row = [&](int64_t i, int thread) {
    const int64_t* columns = b.indices + i * b.listed;
    const A* d = d_values + i * b.listed;
    A sum = 0, edot_sum = 0;
    for (int64_t e = 0; e < b.listed; ++e) {
      if (columns[e] < 0) continue;
      sum += d[e];
      if (!b.dx) continue;
      add_row(d[e] * inner_scale(i, columns[e]), y_of<C>(p) + columns[e] * p.y_stride, p.D,
              static_cast<A*>(b.dx) + i * p.D);
    }
    if (b.drow_bias) static_cast<A*>(b.drow_bias)[i] = sum;
    if (!b.dscale) return;
    lists.for_each_group(i, columns, b.listed, thread, [&](int64_t e, int64_t lanes, const A* dots) {
      for (int64_t q = 0; q < lanes; ++q) {
        const A edot = columns[e + q] < 0 || d[e + q] == 0 ? 0 : d[e + q] * dots[q];
        edots.get()[i * b.listed + e + q] = edot;
        edot_sum += edot;
      }
    });
    scale_sums.get()[i] = edot_sum;
  };
  run_parallel(parallel.run, p.N, of_row, p.N * b.listed * p.D);
  if (b.dscale && set.scale_of != ScaleOf::columns) {
    double total = 0;
    for (int64_t i = 0; i < p.N; ++i) {
      if (set.scale_of == ScaleOf::rows) static_cast<A*>(b.dscale)[i] = scale_sums.get()[i];
      total += scale_sums.get()[i];
    }
    if (set.scale_of == ScaleOf::all) static_cast<A*>(b.dscale)[0] = static_cast<A>(total);
  }
  if (!by_column) return;
  const ByColumn entries(b.indices, p.N * b.listed, p.M);
  constexpr int64_t kColumnsOfATask = 64;
  // A column that many rows list is summed in double, which a sum of millions needs.
  constexpr int64_t kLongList = 256;
  std::unique_ptr<Buffer<double>[]> long_sums(new Buffer<double>[parallel.threads]);
  auto of_columns = [&](int64_t index, int thread) {
    for (int64_t j = index * kColumnsOfATask; j < minimum((index + 1) * kColumnsOfATask, p.M); ++j) {
      double bias = 0, scale = 0, *sums = nullptr;
      A* dy = b.dy ? static_cast<A*>(b.dy) + j * p.D : nullptr;
      if (dy && entries.count(j) > kLongList) {
        sums = long_sums[thread].once(p.D);
        std::fill(sums, sums + p.D, 0.0);
      }
      entries.for_each(j, [&](int64_t entry) {
        const int64_t i = entry / b.listed;
        const A e = d_values[entry];
        bias += e;
        if (b.dscale && set.scale_of == ScaleOf::columns) scale += edots.get()[entry];
        if (!dy) return;
        const A weight = e * inner_scale(i, j);
        (x_of<C>(p) + i * p.x_stride).visit([&](const auto* row) {
          sums ? add_long_row(weight, row, p.D, sums) : add_row(weight, row, p.D, dy);
        });
      });
      for (int64_t k = 0; sums && k < p.D; ++k) dy[k] = static_cast<A>(sums[k]);
      if (b.dcol_bias) static_cast<A*>(b.dcol_bias)[j] = static_cast<A>(bias);
      if (b.dscale && set.scale_of == ScaleOf::columns) static_cast<A*>(b.dscale)[j] = static_cast<A>(scale);
    }
  };
  run_parallel(parallel.run, (p.M + kColumnsOfATask - 1) / kColumnsOfATask, of_columns, p.N * b.listed * p.D + p.M);
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
