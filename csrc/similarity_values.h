// Sums of values weighted by the softmax of each row of a similarity matrix that is never stored; shared by cpu/ and
// cuda/.
#pragma once

#include "similarity_reduce.h"

namespace contrastive_ops {

struct ValuesProblem {
  SimilarityProblem logits;  // one set; its only fold is the logsumexp of the rows
  const void* values;        // (M, depth) of the dtype of y, unit column stride
  int64_t depth, stride;
};

// Outputs are zero on entry.
struct ValuesForward {
  void* lse;   // (N,)
  void* sums;  // (N, depth)
};

struct ValuesBackward {
  const void *lse, *sums;        // of forward
  const void* d_sums;            // (N, depth) in the dtype of the values, contiguous
  const void* d_sums_wide;       // the same numbers in the accumulation type
  SimilarityBackward gradients;  // only its outputs are read
  void* d_values;                // (M, depth) or null
};

struct SimilarityValues {
  void (*forward)(const ValuesProblem&, const ValuesForward&, const Parallel&);
  void (*backward)(const ValuesProblem&, const ValuesBackward&, const Parallel&);
};

CONTRASTIVE_OPS_PRIMITIVE(SimilarityValues, similarity_values)

}  // namespace contrastive_ops
