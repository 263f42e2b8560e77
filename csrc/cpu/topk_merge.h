// Lists of a search that have been found: two merged, and one of more entries put into order.
#pragma once

#include "../similarity_topk.h"
#include "similarity_selection.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class A>
void topk_merge(const TopKMerge& m, const Parallel& parallel) {
  auto task = [&](int64_t i, int) {
    merge_lists(static_cast<const A*>(m.values) + i * m.k, m.indices + i * m.k, m.k,
                static_cast<const A*>(m.other_values) + i * m.other_k, m.other_indices + i * m.other_k, m.other_k, m.k,
                static_cast<A*>(m.out_values) + i * m.k, m.out_indices + i * m.k);
  };
  run_parallel(parallel.run, m.rows, task, m.rows * m.k * kWorkOfFold);
}

template <class A>
void topk_order(const TopKOrder& o, const Parallel& parallel) {
  auto task = [&](int64_t i, int) {
    const A* values = static_cast<const A*>(o.values) + i * o.listed;
    const int64_t* indices = o.indices + i * o.listed;
    Buffer<int64_t> entries(o.listed);
    int64_t count = 0;
    for (int64_t e = 0; e < o.listed; ++e) {
      if (indices[e] >= 0 && values[e] > -infinity<A>()) entries.get()[count++] = e;
    }
    const int64_t found = minimum(count, o.k);
    std::partial_sort(entries.get(), entries.get() + found, entries.get() + count, [=](int64_t a, int64_t b) {
      return values[a] > values[b] || (values[a] == values[b] && indices[a] < indices[b]);
    });
    for (int64_t e = 0; e < o.k; ++e) {
      static_cast<A*>(o.out_values)[i * o.k + e] = e < found ? values[entries.get()[e]] : -infinity<A>();
      o.out_indices[i * o.k + e] = e < found ? indices[entries.get()[e]] : -1;
    }
  };
  run_parallel(parallel.run, o.rows, task, o.rows * o.listed * kWorkOfFold);
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
