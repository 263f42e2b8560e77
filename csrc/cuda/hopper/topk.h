// Lists of the best columns of rows whose inner products never reach memory; see ../arguments.h for what functions
// take and fold.h for the rows and GPUs that kernels of this folder are for.
//
// Two sweeps. The first leaves the largest score of each group of columns: the k-th largest of a row's is a score that
// k columns reach. The second lists the columns that reach it.
#pragma once

#include "../arguments.h"

namespace contrastive_ops {

// Lists columns of `rows` rows from `first_row` on; rows of arrays below are counted from there unless said otherwise.
//   x (N, D), y (M, D)
//   pair_data, spec, scale, row_bias, col_bias, N, M: those of the operator; the one set selects
//   floor (N,) or null: what scores must exceed; -inf where there is no such number
//   groups: of a row, 1 or 4 for each tile of 192 columns, more than k; 0 where lists have room for all columns
//   maxima (rows, groups), thresholds (rows,): to work with; nobody looks at them where there are no groups
//   keys (rows, capacity): what is in each list, in no order; see ../similarity_selection.h
//   counts (rows,): 0 at first; how many a list should have. One with more than `capacity` lacks some of them.
void hopper_topk(Stream stream, Input x, Input y, int64_t D, int64_t first_row, int64_t rows, Arrays pair_data,
                 Integers spec, const float* scale, const float* row_bias, const float* col_bias, int64_t N, int64_t M,
                 int64_t k, const float* floor, int64_t groups, float* maxima, float* thresholds, int64_t* keys,
                 int32_t* counts, int64_t capacity);

}  // namespace contrastive_ops
