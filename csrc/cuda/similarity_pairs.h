// Logits, and which pairs take part: logit sets and folds as kernels take them, and the rules for one pair.
//
// `pair_data` and `spec` are those of contrastive_ops/core/problem.py, which says what they mean; pairs_of turns them
// into a value that is small enough to be an argument of a kernel. Rules are switches at run time: the kernels here are
// bound by the memory that inner products pass through, and a switch is the same for all threads.
#pragma once

#include "arguments.h"
#include "launch.h"

namespace contrastive_ops {

// More of them than any loss has; contrastive_ops/cuda/_pairs.py has the same numbers.
constexpr int kMostSets = 6, kMostFolds = 12;

enum class ScaleOf : int { all = 0, rows = 1, columns = 2 };
enum class FoldKind : int { logsumexp = 0, max = 1, sum_softplus = 2, sum_relu = 3, sum = 4, count = 5 };

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
  int64_t log_weight_width;
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
  const float* code_scale;               // (M,) what one unit of the int8 codes in a column is worth
  const float *row_factor, *col_factor;  // (N,), (M,): of derivatives by inner products; products have them already
};

// ---- Host -----------------------------------------------------------------------------------------------------------

// Positions in pair_data, by the numbers of Slot in contrastive_ops/core/problem.py.
inline void set_slot(PairArguments& p, PairSet& set, int64_t slot, const TensorArgument& tensor) {
  const auto ids = static_cast<const int64_t*>(tensor.data);
  const auto numbers = static_cast<const float*>(tensor.data);
  switch (slot) {
    case 0:
      set.differ_rows = ids;
      break;
    case 1:
      set.differ_cols = ids;
      break;
    case 2:
      set.same_rows = ids;
      break;
    case 3:
      set.same_cols = ids;
      break;
    case 4:
      set.exclude_indptr = ids;
      break;
    case 5:
      set.exclude_indices = ids;
      break;
    case 6:
      set.below_rows = numbers;
      break;
    case 7:
      set.below_cols = numbers;
      break;
    case 8:
      set.above_rows = numbers;
      break;
    case 9:
      set.above_cols = numbers;
      break;
    case 10:
      break;  // the guide is multiplied by a library
    case 11:
      break;
    case 12:
      set.guide_below_rows = numbers;
      break;
    case 13:
      set.guide_below_cols = numbers;
      break;
    case 14:
      set.class_rows = ids;
      break;
    case 15:
      set.class_cols = ids;
      break;
    case 16:
      set.log_weight = numbers, set.log_weight_width = tensor.width;
      break;
    case 17:
      set.fill = numbers;
      break;
    case 18:
      p.linear_indptr = ids;
      break;
    case 19:
      p.linear_indices = ids;
      break;
    case 20:
      p.linear_weight = numbers;
      break;
    case 21:
      p.code_scale = numbers;
      break;
    case 22:
      p.row_factor = numbers;
      break;
    case 23:
      p.col_factor = numbers;
      break;
    default:
      throw std::invalid_argument("spec: a slot must be below 24");
  }
}

inline PairArguments pairs_of(const Tensors& pair_data, const Integers& spec, const float* scale, const float* row_bias,
                              const float* col_bias, const int64_t* target, int64_t N, int64_t M) {
  PairArguments p{};
  p.N = N, p.M = M, p.row_bias = row_bias, p.col_bias = col_bias, p.target = target;
  int64_t at = 0, used = 0;
  const auto next = [&] {
    if (at >= spec.size) throw std::invalid_argument("spec: it must describe all sets and folds");
    return spec.data[at++];
  };
  const int64_t sets = next(), folds = next();
  if (sets > kMostSets || folds > kMostFolds) throw std::invalid_argument("spec: there are too many sets or folds");
  p.set_count = static_cast<int>(sets), p.fold_count = static_cast<int>(folds);
  for (int k = 0; k < p.set_count; ++k) {
    PairSet& set = p.sets[k];
    set.scale_of = static_cast<ScaleOf>(next());
    set.negate = next() != 0, set.has_diagonal = next() != 0, set.diagonal = next();
    for (int64_t entries = next(); entries > 0; --entries) {
      const int64_t slot = next();
      if (used >= pair_data.size) throw std::invalid_argument("spec: it must match pair_data");
      set_slot(p, set, slot, pair_data.data[used++]);
    }
    set.drops = set.has_diagonal || set.differ_rows || set.same_rows || set.exclude_indptr || set.below_rows ||
                set.below_cols || set.above_rows || set.above_cols || set.guide_below_rows || set.guide_below_cols;
    set.scale = scale;
    scale += set.scale_of == ScaleOf::all ? 1 : set.scale_of == ScaleOf::rows ? N : M;
  }
  for (int k = 0; k < p.fold_count; ++k) {
    const int64_t set = next(), kind = next(), cols = next();
    if (set < 0 || set >= sets) throw std::invalid_argument("spec: a fold must name a set");
    p.folds[k] = {static_cast<int>(set), static_cast<FoldKind>(kind), cols != 0};
  }
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
    bias += set.log_weight[set.class_rows[i] * set.log_weight_width + set.class_cols[j]];
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
