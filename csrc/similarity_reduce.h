// Folds the rows and columns of a similarity matrix that is never stored; shared by cpu/ and cuda/.
#pragma once

#include "row_losses.h"
#include "similarity_problem.h"

namespace contrastive_ops {

struct SimilarityForward {
  void* const* values;     // per fold: (N,) or (M,)
  int64_t* const* argmax;  // per fold: (N,) or (M,) for a maximum, else null
  void* target_logit;      // (N,) or null
  void* linear;            // (N,) or null: weighted sums of the listed logits
};

// Gradients of a total whose derivative by the folds, the targets' logits and the linear sums is given. Outputs that
// are null are not needed. dx and dy have row stride D; they are zero on entry where N or M is 0, else anything.
struct SimilarityBackward {
  const void* const* values;    // per fold, from forward
  const void* const* d_values;  // per fold; null where there is none
  const int64_t* const* argmax;
  const void* d_target;  // (N,) or null
  const void* d_linear;  // (N,) or null
  void* dx;
  void* dy;             // null for self-similarity
  void* const* dscale;  // per set: 1, N or M numbers; or null
  void* drow_bias;
  void* dcol_bias;
};

// (sum_i weight_i * loss_i + target_weight_i * t_i) / size, with loss_i the row_loss of the first fold and t_i, the
// target's logit. The gradients are formed in the same pass: 6 N M D.
struct SimilarityTotal {
  RowLoss kind;               // softmax of a logsumexp, or sigmoid of a sum of softplus
  const void* weight;         // (N,) or null for 1
  const void* extra;          // (N,) or null
  const void* target_weight;  // (N,) or null
  double size;
  double* losses;                // (N,)
  void* target_logit;            // (N,)
  void* dextra;                  // (N,) or null
  SimilarityBackward gradients;  // only its outputs are read
};

struct SimilarityReduce {
  void (*forward)(const SimilarityProblem&, const SimilarityForward&, const Parallel&);
  void (*backward)(const SimilarityProblem&, const SimilarityBackward&, const Parallel&);
  void (*total)(const SimilarityProblem&, const SimilarityTotal&, const Parallel&);
};

CONTRASTIVE_OPS_PRIMITIVE(SimilarityReduce, similarity_reduce)

}  // namespace contrastive_ops
