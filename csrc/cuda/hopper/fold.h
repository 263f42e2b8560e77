// Folds of rows and columns whose inner products never reach memory (K1); see ../arguments.h for what functions take.
//
// Kernels of this folder are for GPUs of compute capability 9.0, for rows of bfloat16 or float16 that are 16-byte
// aligned and a multiple of 8 numbers, and for the pairs of rules.h. Logits never leave registers: of a tile of 128
// rows and 192 columns leave one part for each row and one for each column.
#pragma once

#include "../arguments.h"

namespace contrastive_ops {

// Folds `rows` rows from `first_row` on with all columns, and adds that to a state.
//   x (N, D), y (M, D)
//   pair_data, spec, scale, row_bias, col_bias, target, N, M: those of the operator
//   itself: whether y is x, of which then only tiles on and above the diagonal are multiplied: each fold gets the pairs
//   of a row from its tiles and, mirrored, from those above them, and is complete once all rows have been folded. There
//   must be one scale, and no biases
//   parts: 2 * (tiles across * rows + tiles down * M) numbers to work with; tiles across are ceil(M / 192), and tiles
//   down twice ceil(rows / 256)
//   target_logit (N,) or null: of the rows that have a target among the columns
//   state: as for similarity_reduce_fold
//   logits, heads, wide: null, or where logits of logsumexp without biases are kept (kept.h), of rows from first_row on
//   (rows, M rounded up to 8), (tiles down, tiles across, 4, 2), and 1 of each two tiles down that are wide
void hopper_fold(Stream stream, Input x, Input y, int64_t D, int64_t first_row, int64_t rows, Arrays pair_data,
                 Integers spec, const float* scale, const float* row_bias, const float* col_bias, const int64_t* target,
                 int64_t N, int64_t M, int64_t itself, float* parts, float* target_logit, double* state, Output logits,
                 float* heads, int64_t* wide);

}  // namespace contrastive_ops
