// Rows in groups, each group times a matrix of its own; shared by cpu/ and cuda/.
//
// Group e is the rows offsets[e] to offsets[e + 1]. Two products are enough for all derivatives of both:
//
//   forward   out_r = a_r b_e + bias_e                    of every row r of group e
//   outer     db_e = sum_r a_r^T g_r, dbias_e = sum_r g_r
//
// Rows may be listed: those of tokens that were given to groups are read where the tokens are.
#pragma once

#include "similarity_problem.h"

namespace contrastive_ops {

// A matrix of which the rows or the columns are contiguous: one of the strides, in elements, is 1.
struct StridedMatrix {
  const void* data;
  int64_t row_stride, col_stride;
  const int64_t* list;  // null; or row r is row list[r] of the data, zeros for -1, and the columns are contiguous
};

struct RowGroups {
  DType dtype;             // that of every matrix
  const int64_t* offsets;  // (groups + 1,), ascending, within [0, rows]
  int64_t groups, rows;
};

struct GroupedForward {
  RowGroups rows;
  int64_t D, F;
  StridedMatrix a;         // (rows, D)
  StridedMatrix b;         // (D, F), that of the first group
  int64_t b_group_stride;  // from one group to the next
  const void* bias;        // (groups, F) contiguous, or null
  void* out;               // (rows, F) contiguous; zero where a row belongs to no group
};

// Outputs that are null are not needed.
struct GroupedOuter {
  RowGroups rows;
  int64_t D, F;
  StridedMatrix a;  // (rows, D)
  StridedMatrix g;  // (rows, F)
  void* db;         // (groups, D, F) contiguous
  void* dbias;      // (groups, F) contiguous
};

// Between two layers. In the order of contrastive_ops/reference/grouped_matmul.py.
enum class Activation : int { gelu, relu, silu };

// Rows are contiguous. Gated ones are twice as wide, activation(left half) * right half.
struct ActivatedRows {
  DType dtype;
  int64_t rows, F;  // of the result
  Activation activation;
  bool gated;
  const void* hidden;  // (rows, F), or (rows, 2 F)
  const void* g;       // (rows, F): what arrives at the result, for backward
  void* out;           // (rows, F); backward: as hidden
};

struct GroupedMatmul {
  void (*forward)(const GroupedForward&, const Parallel&);
  void (*outer)(const GroupedOuter&, const Parallel&);
  void (*activate)(const ActivatedRows&, const Parallel&);
  void (*activate_backward)(const ActivatedRows&, const Parallel&);
};

CONTRASTIVE_OPS_PRIMITIVE(GroupedMatmul, grouped_matmul)

}  // namespace contrastive_ops
