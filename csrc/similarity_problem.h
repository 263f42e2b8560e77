// A similarity matrix that is never stored: what the primitives on it are given; shared by cpu/ and cuda/.
//
//   l_ij = +-(scale * <x_i, y_j> + row_bias_i + col_bias_j + log_weight_ij)      for the pairs (i, j) that take part
//
// A set is one reading of the inner products: scale, sign, and which pairs take part. A fold reduces one set along one
// direction. Numbers of kinds and slots are in slots.h.
//
// Raw pointers only: files that are compiled for one SIMD level must not include a torch header, whose
// inline functions the linker could then pick for the whole library.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "levels.h"
#include "slots.h"

namespace contrastive_ops {

// Consecutive tasks that begin after all tasks of some earlier stages have ended.
struct Stage {
  int64_t tasks;
  const int* after = nullptr;  // numbers of earlier stages
  int after_count = 0;
};

// Runs `task(context, index, thread)` for every index in [0, count); `thread` is below Parallel::threads.
struct Parallel {
  using Task = void (*)(void* context, int64_t index, int thread);
  void (*run)(int64_t count, Task task, void* context);
  int threads;
  // The same for the tasks of all stages, numbered through: one region in place of one a stage. Threads take tasks in
  // this order and wait where one may not begin yet, so what others wait for comes well before them.
  void (*run_stages)(int count, const Stage* stages, Task task, void* context);
};

// Every `void*` below points to the accumulation type: double for float64 inputs, float otherwise. A rule whose
// pointers are null does not apply: those of the slots of a set, by their names. Lists ascend in each row, ids of -1
// equal nothing, and pairs that other rules drop have the logit `fill`, and no gradient.
struct SimilaritySet {
  using ids = const int64_t*;
  using numbers = const void*;
  const void* scale;  // 1, N or M numbers
  ScaleOf scale_of;
  bool negate;
  bool has_diagonal;  // drop column i + diagonal of row i
  int64_t diagonal;
  CONTRASTIVE_OPS_SLOTS(CONTRASTIVE_OPS_SET_FIELD)
  int64_t log_weight_rows, log_weight_cols;
};

struct SimilarityFold {
  int set;
  FoldKind kind;
  bool cols;  // fold each column, not each row
};

struct SimilarityProblem {
  DType dtype;
  const void* x;  // (N, D), unit column stride
  const void* y;  // (M, D), unit column stride; equal to x for self-similarity
  int64_t N, M, D;
  int64_t x_stride, y_stride;  // between rows, in elements
  bool self;                   // y is x: only the tiles on and above the diagonal are computed
  const void* row_bias;        // (N,) or null
  const void* col_bias;        // (M,) or null
  const int64_t* target;       // (N,) or null: the column of each row that no fold sees
  const SimilaritySet* sets;   // the first is that of the targets and of the lists
  int set_count;
  const SimilarityFold* folds;
  int fold_count;
  const void* code_scale;         // (M,): y holds int8 codes of which one unit is worth this; or null
  const void *guide_x, *guide_y;  // (N, guide_depth), (M, guide_depth), accumulation type, contiguous; or null
  int64_t guide_depth;
  const int64_t *linear_indptr, *linear_indices;  // lists of columns per row, ascending; or null
  const void* linear_weight;
  void* kept;                           // inner products kept from forward for backward, or null
  int64_t kept_size;                    // in elements of the accumulation type
  const void *row_factor, *col_factor;  // (N,), (M,): inner products are multiplied by both; or null
};

}  // namespace contrastive_ops
