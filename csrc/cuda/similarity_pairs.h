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

// One reading of the inner products; null where a rule does not apply.
struct PairSet {
  using ids = const int64_t*;
  using numbers = const float*;
  const float* scale;  // 1, N or M numbers
  ScaleOf scale_of;
  bool negate, has_diagonal;
  bool drops;  // whether any rule drops pairs
  int64_t diagonal;
  CONTRASTIVE_OPS_SLOTS(CONTRASTIVE_OPS_SET_FIELD)
  int64_t log_weight_cols;

  // Whether any rule beside the diagonal drops pairs.
  bool has_rules() const {
    return differ_rows || same_rows || exclude_indptr || below_rows || below_cols || above_rows || above_cols ||
           guide_below_rows || guide_below_cols;
  }
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
    set.drops = set.has_diagonal || set.has_rules();
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

// Whether a number exceeds the bound of its row or of its column; NaN does not.
__device__ inline bool exceeds(float number, const float* by_row, const float* by_column, int64_t i, int64_t j) {
  return (by_row && number > by_row[i]) || (by_column && number > by_column[j]);
}

// Whether one of the rules that are counted drops the pair; `guide` is its guide's inner product.
template <Rule rule>
__device__ bool dropped_by(const PairSet& set, float dot, float guide, int64_t i, int64_t j) {
  if constexpr (rule == Rule::differ) return set.differ_rows && equal_ids(set.differ_rows, set.differ_cols, i, j);
  if constexpr (rule == Rule::same) return set.same_rows && !equal_ids(set.same_rows, set.same_cols, i, j);
  if constexpr (rule == Rule::below) return exceeds(dot, set.below_rows, set.below_cols, i, j);
  if constexpr (rule == Rule::above) {
    return (set.above_rows && dot < set.above_rows[i]) || (set.above_cols && dot < set.above_cols[j]);
  }
  return exceeds(guide, set.guide_below_rows, set.guide_below_cols, i, j);
}

// Calls take(rule, whether it drops the pair) until that is true; returns whether it was.
template <int rule = 0, class Take>
__device__ bool any_rule(const PairSet& set, float dot, float guide, int64_t i, int64_t j, const Take& take) {
  if constexpr (rule == static_cast<int>(Rule::size)) {
    return false;
  } else {
    if (take(rule, dropped_by<static_cast<Rule>(rule)>(set, dot, guide, i, j))) return true;
    return any_rule<rule + 1>(set, dot, guide, i, j, take);
  }
}

// Whether a rule drops the pair.
__device__ inline bool dropped(const PairSet& set, float dot, float guide, int64_t i, int64_t j) {
  if (set.has_diagonal && i + set.diagonal == j) return true;
  if (any_rule(set, dot, guide, i, j, [](int, bool drops) { return drops; })) return true;
  // Last, as it reads the most.
  return set.exclude_indptr && listed(set.exclude_indices, set.exclude_indptr[i], set.exclude_indptr[i + 1], j);
}

}  // namespace contrastive_ops
