// A panel of a search: some rows of x against a block of columns, their inner products, and what may stay of them.
#pragma once

#include "topk_cuts.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Up to so many rows, columns are multiplied without being packed.
constexpr int64_t kFewRows = 4;

// Rows [begin, begin + rows) against the blocks [from, to) in the order that they are taken in.
struct TopKTask {
  int64_t begin, rows, from, to, part;
};
// A block of such a task: `local` is the number of its first column within the task.
struct TopKBlock {
  int64_t j, cols, local;
};

// What is known of a panel of kRows rows and one block of columns, all in the level-1 cache.
template <class C>
struct TopKPanel {
  using A = typename C::Acc;
  alignas(64) A dots[kRows<C> * kBlock];
  alignas(64) A l[kRows<C> * kBlock];
  alignas(64) A guide[kRows<C> * kBlock];
};

template <class K, class Numbers>
void pack_task(const TopKTask& t, int64_t most_rows, Numbers from, int64_t stride, int64_t depth,
               Buffer<typename K::Unit>& panels) {
  const int64_t units = depth_units<K>(depth);
  auto* to = panels.once(round_up(most_rows, kLaneGroup<K>) * units);
  pack_rows<K, Side::a>(to, kRows<K> * units, from + t.begin * stride, stride, t.rows, t.rows, depth);
}
template <class K, class Numbers>
void pack_block(Numbers from, int64_t stride, int64_t cols, int64_t depth, Buffer<typename K::Unit>& panels) {
  const int64_t units = depth_units<K>(depth);
  auto* to = panels.once(kBlock * units);
  for (int64_t j = 0; j < cols; j += kCols<K>) {
    pack_rows<K, Side::b>(to + j * units, 0, from + j * stride, stride, minimum<int64_t>(kCols<K>, cols - j), kCols<K>,
                          depth);
  }
}
template <class C, class K>
void panel_products(int64_t i, int64_t cols, int64_t depth, const Buffer<typename K::Unit>& x,
                    const Buffer<typename K::Unit>& y, typename C::Acc* to) {
  const int64_t units = depth_units<K>(depth);
  multiply<K>(kRows<C>, round_up(cols, kCols<K>), units, x.get() + i * units, kRows<K> * units, y.get(),
              kCols<K> * units, to, kBlock, false);
}
template <class C, class Y>
void products_of_few(const SimilarityProblem& p, int64_t rows, const Y* y, int64_t cols, const typename C::Unit* panel,
                     typename C::Acc* to) {
  constexpr int W = kLanes<typename C::Acc>;
  for (int64_t j = 0; j < cols; j += W) {
    const Y *from[W], *next[W];
    for (int64_t q = 0; q < W; ++q) {
      from[q] = y + minimum(j + q, cols - 1) * p.y_stride;  // past the end any row will do
      next[q] = from[q] + W * p.y_stride;                   // never read
    }
    if (rows == 1) {
      products_with<C, 1>(panel, from, next, p.D, to + j, kBlock);
    } else if (rows == 2) {
      products_with<C, 2>(panel, from, next, p.D, to + j, kBlock);
    } else {
      products_with<C, kFewRows>(panel, from, next, p.D, to + j, kBlock);
    }
  }
}
template <class A>
void apply_code_scale(const SimilarityProblem& p, A* dots, int64_t j, int64_t rows, int64_t cols) {
  constexpr int W = kLanes<A>;
  alignas(64) A factor[kBlock] = {};
  memcpy(factor, static_cast<const A*>(p.code_scale) + j, static_cast<size_t>(cols) * sizeof(A));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < cols; k += W) store(dots + i * kBlock + k, load(dots + i * kBlock + k) * load(factor + k));
  }
}

// ---- What may stay ----------------------------------------------------------------------------------------------

// Whether columns of a block are named or exist: a bit for each.
template <class A>
unsigned lanes_of(const uint64_t* bits, int64_t j) {
  return static_cast<unsigned>(bits[j / 64] >> j % 64) & ((1u << kLanes<A>)-1);
}
template <class A>
unsigned inside(int64_t j, int64_t cols) {
  constexpr int W = kLanes<A>;
  return cols - j >= W ? (1u << W) - 1 : (1u << (cols - j)) - 1;
}

// Parts of a block whose maxima begin a row's threshold, at most.
template <class A>
constexpr int64_t kMostParts = 4 * kLanes<A>;

// A number that `enough` of a block's columns reach: the maxima of that many parts or more, in order.
template <class A>
A reached_by(int64_t enough, const A* row) {
  constexpr int W = kLanes<A>;
  alignas(64) A best[kMostParts<A>];
  int vectors = 1;
  while (vectors * W < enough) vectors *= 2;
  const int64_t width = kBlock / W / vectors;
  for (int v = 0; v < vectors; ++v) {
    Vec<A> top = broadcast(-infinity<A>());  // first, because NaN is passed over only beside a number
    for (int64_t u = v * width; u < (v + 1) * width; ++u) top = greater<A>(load(row + u * W), top);
    store(best + v * W, top);
  }
  A* last = best + enough - 1;
  std::nth_element(best, last, best + vectors * W, [](A a, A b) { return a > b; });
  return *last;
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
