// The k best columns of every row of a similarity matrix that is never stored; shared by cpu/ and cuda/.
//
// Order: logit descending, then column ascending. NaN and -inf are no scores. Pointers to void are of the accumulation
// type: double for float64 inputs, float otherwise. The problem has no folds, no target and no linear lists.
#pragma once

#include "similarity_problem.h"

namespace contrastive_ops {

// Rows of the statistics; those of rules begin at `rules`.
enum class Statistic : int { eligible = 0, higher = 1, rules = 2, size = rules + static_cast<int>(Rule::size) };
constexpr int statistic_of(Rule rule) { return static_cast<int>(Statistic::rules) + static_cast<int>(rule); }

// The first set selects, the last one says which pairs the statistics count.
struct TopKForward {
  int64_t k;
  const void* floor;        // (N,): only scores above are of interest; or null
  const void* count_above;  // (N,) for `higher`; null without statistics
  void* values;             // (N, k), -inf where there are fewer
  int64_t* indices;         // (N, k), -1 where there are fewer
  int64_t* counts;          // (N,)
  int64_t* statistics;      // (Statistic::size, N), zero on entry; or null
};

// Logits of listed pairs, whether a rule drops them or not.
struct TopKAt {
  const int64_t* indices;  // (N, listed), -1 for none
  int64_t listed;
  void* values;  // (N, listed), -inf where the index is -1
};

// Gradients of a total by what TopKAt computes. Outputs that are null are not needed; all are zero on entry.
struct TopKBackward {
  const int64_t* indices;  // (N, listed)
  int64_t listed;
  const void* d_values;  // (N, listed)
  void *dx, *dy, *dscale, *drow_bias, *dcol_bias;
};

// The best of two lists per row, each in order and padded.
struct TopKMerge {
  DType dtype;  // float32 or float64: that of the values
  int64_t rows, k, other_k;
  const void *values, *other_values;
  const int64_t *indices, *other_indices;
  void* out_values;  // (rows, k)
  int64_t* out_indices;
};

// The best of a list per row that is in no order; an index of -1 or a value of -inf or NaN is none.
struct TopKOrder {
  DType dtype;  // float32 or float64: that of the values
  int64_t rows, listed, k;
  const void* values;  // (rows, listed)
  const int64_t* indices;
  void* out_values;  // (rows, k)
  int64_t* out_indices;
};

struct SimilarityTopK {
  void (*forward)(const SimilarityProblem&, const TopKForward&, const Parallel&);
  void (*at)(const SimilarityProblem&, const TopKAt&, const Parallel&);
  void (*backward)(const SimilarityProblem&, const TopKBackward&, const Parallel&);
  void (*merge)(const TopKMerge&, const Parallel&);
  void (*order)(const TopKOrder&, const Parallel&);
};

CONTRASTIVE_OPS_PRIMITIVE(SimilarityTopK, similarity_topk)

}  // namespace contrastive_ops
