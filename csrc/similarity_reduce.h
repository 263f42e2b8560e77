// Folds the rows and columns of a similarity matrix that is never stored; shared by cpu/ and cuda/.
//
//   l_ij = scale_i * <x_i, y_j> + row_bias_i + col_bias_j        for the pairs (i, j) that take part
//
// Raw pointers only: files that are compiled for one SIMD level must not include a torch header, whose
// inline functions the linker could then pick for the whole library.
#pragma once

#include <cstdint>

namespace contrastive_ops {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Runs `task(context, index, thread)` for every index in [0, count); `thread` is below Parallel::threads.
struct Parallel {
  using Task = void (*)(void* context, int64_t index, int thread);
  void (*run)(int64_t count, Task task, void* context);
  int threads;
};

// Every `void*` below points to the accumulation type: double for float64 inputs, float otherwise.
struct SimilarityProblem {
  DType dtype;
  const void* x;  // (N, D), unit column stride
  const void* y;  // (M, D), unit column stride; equal to x for self-similarity
  int64_t N, M, D;
  int64_t x_stride, y_stride;  // between rows, in elements
  bool self;                   // y is x: only the tiles on and above the diagonal are computed
  const void* scale;           // (N,)
  const void* row_bias;        // (N,) or null
  const void* col_bias;        // (M,) or null
  const int64_t* target;       // (N,) or null: the column of each row that no fold sees
  bool has_diagonal;           // drop column i + diagonal of row i
  int64_t diagonal;
  void* kept;         // inner products kept from forward for backward, or null
  int64_t kept_size;  // in elements of the accumulation type
};

struct SimilarityForward {
  void* row_lse;       // (N,) or null
  void* col_lse;       // (M,) or null
  void* target_logit;  // (N,) or null
};

// Gradients of a total whose derivative by row_lse, col_lse and target_logit is given. Outputs that are
// null are not needed. dx and dy have row stride D and are overwritten.
struct SimilarityBackward {
  const void* row_lse;   // (N,) or null
  const void* col_lse;   // (M,) or null
  const void* d_rows;    // (N,) or null
  const void* d_cols;    // (M,) or null
  const void* d_target;  // (N,) or null
  void* dx;
  void* dy;  // null for self-similarity
  void* dscale;
  void* drow_bias;
  void* dcol_bias;
};

// sum_i weight_i * softplus(lse_i - t_i), lse_i over the other columns and extra_i, t_i the target's logit,
// plus sum_i target_weight_i * t_i. The gradients are formed in the same pass: 6 N M D.
struct SimilarityTotal {
  const void* weight;            // (N,)
  const void* extra;             // (N,) or null
  const void* target_weight;     // (N,) or null
  void* losses;                  // (N,) softplus(lse_i - t_i)
  void* target_logit;            // (N,)
  void* dextra;                  // (N,) or null
  SimilarityBackward gradients;  // only its outputs are read
};

struct SimilarityReduce {
  void (*forward)(const SimilarityProblem&, const SimilarityForward&, const Parallel&);
  void (*backward)(const SimilarityProblem&, const SimilarityBackward&, const Parallel&);
  void (*total)(const SimilarityProblem&, const SimilarityTotal&, const Parallel&);
};

namespace level_default {
SimilarityReduce similarity_reduce();
}
namespace level_avx2 {
SimilarityReduce similarity_reduce();
}
namespace level_avx512 {
SimilarityReduce similarity_reduce();
}
namespace level_avx512_bf16 {
SimilarityReduce similarity_reduce();
}

// The functions for the SIMD level in use (cpu/capability.cpp).
SimilarityReduce similarity_reduce_cpu();

}  // namespace contrastive_ops
