// Logits, and which pairs take part: logit sets and folds as kernels take them, and the rules for one pair.
//
// `pair_data` and `spec` are those of contrastive_ops/core/problem.py, which says what they mean; pairs_of turns them
// into a value that is small enough to be an argument of a kernel. Rules are switches at run time: the kernels here are
// bound by the memory that inner products pass through, and a switch is the same for all threads.
#pragma once

#include "../similarity_decode.h"
#include "arguments.h"
#include "launch.h"

namespace contrastive_ops {

// More of them than any loss has; contrastive_ops/cuda/_pairs.py has the same numbers.
constexpr int kMostSets = 6, kMostFolds = 12;

// One reading of the inner products; null where a rule does not apply. `_rows` are (N,), `_cols` (M,).
struct PairSet {
  const float* scale;  // 1, N or M numbers
  ScaleOf scale_of;
  bool negate, has_diagonal;
  bool drops;  // whether any rule drops pairs
  int64_t diagonal;
  const int64_t *differ_rows, *differ_cols, *same_rows, *same_cols;
  const int64_t *exclude_indptr, *exclude_indices;
  const float *below_rows, *below_cols, *above_rows, *above_cols;
  const float *guide_below_rows, *guide_below_cols;
  const int64_t *class_rows, *class_cols;
  const float* log_weight;
  int64_t log_weight_cols;
  const float* fill;
};

struct PairFold {
  int set;
  FoldKind kind;
  bool cols;
};

// All sets and folds of a call. The first set is that of the targets and of the linear lists.
struct PairArguments {
  int64_t N, M;
  int set_count, fold_count;
  PairSet sets[kMostSets];
  PairFold folds[kMostFolds];
  const float *row_bias, *col_bias;
  const int64_t* target;  // (N,) the column of each row that no fold sees
  const int64_t *linear_indptr, *linear_indices;
  const float* linear_weight;
  const float *guide_x, *guide_y;        // multiplied by a library
  const float* code_scale;               // (M,) what one unit of the int8 codes in a column is worth
  const float *row_factor, *col_factor;  // (N,), (M,): of derivatives by inner products; products have them already
};

// ---- Host -----------------------------------------------------------------------------------------------------------

// What the decoder leaves of one set and of the problem, in the types of kernels.
inline void copy_slots(const SimilaritySet& set_from, PairSet& set_to, const SimilarityProblem& problem_from,
                       PairArguments& problem_to) {
#define CONTRASTIVE_OPS_COPY(name, owner, type, extent) \
  owner##_to.name = static_cast<decltype(owner##_to.name)>(owner##_from.name);
  CONTRASTIVE_OPS_SLOTS(CONTRASTIVE_OPS_COPY)
#undef CONTRASTIVE_OPS_COPY
}

inline PairArguments pairs_of(const Arrays& pair_data, const Integers& spec, const float* scale, const float* row_bias,
                              const float* col_bias, const int64_t* target, int64_t N, int64_t M) {
  DecodedProblem from;
  from.raw.dtype = DType::float32;  // of logits, whatever is multiplied
  from.raw.N = N, from.raw.M = M;
  from.decode(pair_data, spec, false);
  from.set_scales(scale);
  if (from.sets.size() > kMostSets || from.folds.size() > kMostFolds) {
    throw std::invalid_argument("spec: there are too many sets or folds");
  }
  PairArguments p{};
  p.N = N, p.M = M, p.row_bias = row_bias, p.col_bias = col_bias, p.target = target;
  p.set_count = from.raw.set_count, p.fold_count = from.raw.fold_count;
  for (int k = 0; k < p.set_count; ++k) {
    const SimilaritySet& own = from.sets[k];
    PairSet& set = p.sets[k];
    copy_slots(own, set, from.raw, p);
    set.scale = static_cast<const float*>(own.scale);
    set.scale_of = own.scale_of, set.negate = own.negate;
    set.has_diagonal = own.has_diagonal, set.diagonal = own.diagonal;
    set.log_weight_cols = own.log_weight_cols;
    set.drops = set.has_diagonal || set.differ_rows || set.same_rows || set.exclude_indptr || set.below_rows ||
                set.below_cols || set.above_rows || set.above_cols || set.guide_below_rows || set.guide_below_cols;
  }
  for (int k = 0; k < p.fold_count; ++k) p.folds[k] = {from.folds[k].set, from.folds[k].kind, from.folds[k].cols};
  return p;
}

// ---- One pair -------------------------------------------------------------------------------------------------------

// Whether an ascending list from `begin` to `end` has the column.
__device__ inline bool listed(const int64_t* indices, int64_t begin, int64_t end, int64_t column) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    const int64_t found = indices[middle];
    if (found == column) return true;
    if (found < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return false;
}

__device__ inline bool equal_ids(const int64_t* rows, const int64_t* cols, int64_t i, int64_t j) {
  return rows[i] == cols[j] && rows[i] != -1;
}

// dlogit / d(inner product).
__device__ inline float scale_factor(const PairSet& set, int64_t i, int64_t j) {
  const float factor = set.scale[set.scale_of == ScaleOf::all ? 0 : set.scale_of == ScaleOf::rows ? i : j];
  return set.negate ? -factor : factor;
}

// The logit of a pair, whatever the rules say.
__device__ inline float logit_of(const PairArguments& p, const PairSet& set, float dot, int64_t i, int64_t j) {
  float logit = dot * scale_factor(set, i, j), bias = 0.0f;
  if (p.row_bias) bias += p.row_bias[i];
  if (p.col_bias) bias += p.col_bias[j];
  if (set.log_weight && set.class_rows[i] >= 0 && set.class_cols[j] >= 0) {
    bias += set.log_weight[set.class_rows[i] * set.log_weight_cols + set.class_cols[j]];
  }
  return set.negate ? logit - bias : logit + bias;
}

// Whether a rule drops the pair; `guide` is its guide's inner product. NaN passes bounds.
__device__ inline bool dropped(const PairSet& set, float dot, float guide, int64_t i, int64_t j) {
  if (set.has_diagonal && i + set.diagonal == j) return true;
  if (set.differ_rows && equal_ids(set.differ_rows, set.differ_cols, i, j)) return true;
  if (set.same_rows && !equal_ids(set.same_rows, set.same_cols, i, j)) return true;
  if (set.below_rows && dot > set.below_rows[i]) return true;
  if (set.below_cols && dot > set.below_cols[j]) return true;
  if (set.above_rows && dot < set.above_rows[i]) return true;
  if (set.above_cols && dot < set.above_cols[j]) return true;
  if (set.guide_below_rows && guide > set.guide_below_rows[i]) return true;
  if (set.guide_below_cols && guide > set.guide_below_cols[j]) return true;
  // Last, as it reads the most.
  return set.exclude_indptr && listed(set.exclude_indices, set.exclude_indptr[i], set.exclude_indptr[i + 1], j);
}

}  // namespace contrastive_ops
