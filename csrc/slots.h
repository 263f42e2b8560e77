// The numbers by which `pair_data` and `spec` say what they hold: those of contrastive_ops/core/rules.py, which a
// test compares. One table for the CPU, for CUDA, and for whoever decodes a spec (similarity_decode.h).
#pragma once

#include <cstdint>

namespace contrastive_ops {

#define CONTRASTIVE_OPS_NAME(name) name,

// Kinds of folds, in the order of FOLDS of contrastive_ops/core/fold_kinds.py.
#define CONTRASTIVE_OPS_FOLDS(use) use(logsumexp) use(max) use(sum_softplus) use(sum_relu) use(sum) use(count)
enum class FoldKind : int { CONTRASTIVE_OPS_FOLDS(CONTRASTIVE_OPS_NAME) size };
constexpr int64_t kFoldKinds = static_cast<int64_t>(FoldKind::size);
enum class ScaleOf : int { all = 0, rows = 1, columns = 2 };
constexpr int64_t kScaleKinds = 3;

// Rules that similarity_topk counts, in the order of STATISTICS of contrastive_ops/core/rules.py.
enum class Rule : int { differ, same, below, above, guide, size };

// What a tensor in `pair_data` is, in the order of its numbers. Calls use(name, owner, type, extent):
//
//   owner    set or problem: whether SimilaritySet or SimilarityProblem has a pointer of that name
//   type     ids (int64) or numbers (of the accumulation type)
//   extent   rows, cols: one for each; row_ends: N + 1; row_matrix, col_matrix: a matrix with a line for each;
//            matrix; list: as many as there are; one: a single number
// clang-format off
#define CONTRASTIVE_OPS_SLOTS(use)                                    \
  use(differ_rows, set, ids, rows)                                    \
  use(differ_cols, set, ids, cols)                                    \
  use(same_rows, set, ids, rows)                                      \
  use(same_cols, set, ids, cols)                                      \
  use(exclude_indptr, set, ids, row_ends)                             \
  use(exclude_indices, set, ids, list)                                \
  use(below_rows, set, numbers, rows)                                 \
  use(below_cols, set, numbers, cols)                                 \
  use(above_rows, set, numbers, rows)                                 \
  use(above_cols, set, numbers, cols)                                 \
  use(guide_x, problem, numbers, row_matrix)                          \
  use(guide_y, problem, numbers, col_matrix)                          \
  use(guide_below_rows, set, numbers, rows)                           \
  use(guide_below_cols, set, numbers, cols)                           \
  use(class_rows, set, ids, rows)                                     \
  use(class_cols, set, ids, cols)                                     \
  use(log_weight, set, numbers, matrix)                               \
  use(fill, set, numbers, one)                                        \
  use(linear_indptr, problem, ids, row_ends)                          \
  use(linear_indices, problem, ids, list)                             \
  use(linear_weight, problem, numbers, list)                          \
  use(code_scale, problem, numbers, cols)                             \
  use(row_factor, problem, numbers, rows)                             \
  use(col_factor, problem, numbers, cols)
// clang-format on

enum class PairSlot : int64_t {
#define CONTRASTIVE_OPS_SLOT(name, owner, type, extent) name,
  CONTRASTIVE_OPS_SLOTS(CONTRASTIVE_OPS_SLOT)
#undef CONTRASTIVE_OPS_SLOT
      unit  // asked of operators, never of kernels
};
constexpr int64_t kSlots = static_cast<int64_t>(PairSlot::unit);

// A field of a struct that says what `ids` and `numbers` are, for each slot of a set.
#define CONTRASTIVE_OPS_SET_FIELD(name, owner, type, extent) CONTRASTIVE_OPS_FIELD_OF_##owner(type, name)
#define CONTRASTIVE_OPS_FIELD_OF_set(type, name) type name;
#define CONTRASTIVE_OPS_FIELD_OF_problem(type, name)

}  // namespace contrastive_ops
