// The numbers by which `pair_data` and `spec` say what they hold: those of contrastive_ops/core/problem.py, which a
// test compares. One table for the CPU, for CUDA, and for whoever decodes a spec (similarity_decode.h).
#pragma once

#include <cstdint>

namespace contrastive_ops {

enum class FoldKind : int { logsumexp = 0, max = 1, sum_softplus = 2, sum_relu = 3, sum = 4, count = 5 };
constexpr int64_t kFoldKinds = 6;
enum class ScaleOf : int { all = 0, rows = 1, columns = 2 };
constexpr int64_t kScaleKinds = 3;

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

}  // namespace contrastive_ops
