// Weights of the products that gradients are, from inner products that never reach memory (K2); see fold.h.
#pragma once

#include "../arguments.h"

namespace contrastive_ops {

// weights = dtotal/d(inner product) of `rows` rows from `first_row` on with all columns, and sums of dtotal/dl, for
// folds of rows and columns that are logsumexp, or one of rows that is sum_softplus.
//   x, y, D, first_row, rows, pair_data, spec, scale, row_bias, col_bias, target, N, M: as for hopper_fold
//   itself: as for hopper_fold; folds then have one direction, first_row is a multiple of 128, a weight is that of both
//   (i, j) and (j, i), and weights begin with column first_row. Tiles below the diagonal are not written
//   values, d_values: of all folds, one after another; d_values null for none
//   d_target (N,) or null: what arrives at the targets' logits
//   norm: a power of two that weights are multiplied with before they are rounded, or null
//   wide: null; or of each pair of row tiles whether it is wide (kept.h): then nothing is done if none is
//   weights (rows, M rounded up to 8), or null
//   sums: per sum what (of SumOf), set, cols, and where it begins in `totals`, which is added to; of columns only the
//   residual
//   parts: 5 * tiles across * rows + tiles down * M numbers to work with; tiles across are ceil(M / 128)
//   state, target_logit: null; or, for sum_softplus, what this sweep folds beside: then d_values are weights of the
//   rows' losses, which are the fold and softplus(-the target's logit), values are not read, and d_target comes on top
void hopper_weigh(Stream stream, Input x, Input y, int64_t D, int64_t first_row, int64_t rows, Arrays pair_data,
                  Integers spec, const float* scale, const float* row_bias, const float* col_bias,
                  const int64_t* target, int64_t N, int64_t M, int64_t itself, const float* values,
                  const float* d_values, const float* d_target, const float* norm, const int64_t* wide, Output weights,
                  Integers sums, float* parts, float* target_logit, double* totals, double* state);

}  // namespace contrastive_ops
