// Folds of the similarity matrices of all prefixes of embeddings (Matryoshka); shared by cpu/ and cuda/.
//
//   l_pij = scale * f(x)_pi * f(y)_pj * <x_i[:d_p], y_j[:d_p]>
//
// where f is 1, or the inverse length of the prefix of a row. Logsumexp of the pairs that take part, along rows and
// columns; a row's target is in no fold, and its logit is a result of its own.
#pragma once

#include "similarity_problem.h"

namespace contrastive_ops {

// Every `void*` but x and y points to the accumulation type. A rule whose pointers are null does not apply.
struct SimilarityPrefixProblem {
  DType dtype;
  const void* x;  // (N, D), unit column stride
  const void* y;  // (M, D), unit column stride; equal to x for self-similarity
  int64_t N, M, D;
  int64_t x_stride, y_stride;  // between rows, in elements
  bool self;                   // y is x: only the tiles on and above the diagonal are computed
  const int64_t* dims;         // ascending, at least 1, at most D
  int64_t prefixes;
  const void* scale;  // one number
  bool normalize;
  const int64_t* target;  // (N,)
  bool has_diagonal;      // drop column i + diagonal of row i
  int64_t diagonal;
  const int64_t *differ_rows, *differ_cols;  // drop equal ids; -1 equals nothing
};

// (prefixes, N) or (prefixes, M) each; null where not asked for.
struct SimilarityPrefixForward {
  void *rows, *cols, *target_logit;
};

// What has no gradient, or needs none, is null; dx and dy are 0 on entry.
struct SimilarityPrefixBackward {
  const void *rows, *cols;
  const void *d_rows, *d_cols, *d_target;
  void *dx, *dy, *dscale;
};

struct SimilarityPrefix {
  void (*forward)(const SimilarityPrefixProblem&, const SimilarityPrefixForward&, const Parallel&);
  void (*backward)(const SimilarityPrefixProblem&, const SimilarityPrefixBackward&, const Parallel&);
};

CONTRASTIVE_OPS_PRIMITIVE(SimilarityPrefix, similarity_prefix)

}  // namespace contrastive_ops
