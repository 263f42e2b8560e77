// A whole loss of one chunk on a GPU, in few launches; see arguments.h for what functions take.
//
// Where the matrix is one chunk a step is, beside the products of the library: `prepare`, `multiply` for unit rows of
// 16 bits, similarity_reduce_fold without a state, `rows`, similarity_reduce_weigh without totals, and `finish`. Chunks
// are told as to similarity_reduce (similarity_reduce.h).
#pragma once

#include "arguments.h"

namespace contrastive_ops {

// What the functions below share: written at the beginning of a step, as a host that writes numbers one by one starts
// a launch for each.
//   given_scale, given_bias: one number each, or null for `scale_number` and `bias_number`
//   inverted: what is given is a temperature, and the scale is 1 over it
//   scale (1,); row_bias (N,) or null; target (N,) or null: column i of row i; ticket (1,): 0, for `rows`
//   x (N, D), y (M, D), x_rows, y_rows, lengths (2 N + 2 M,): where rows count as if they had length 1, what is
//   multiplied in their place. In float32 that is unit rows; in 16 bits rows that a power of two brings near length 1,
//   whose inner products `multiply` completes. `lengths` has, of x and then of y, that power (or the inverse length) of
//   each row, and then what is left to multiply. Null where rows count as they are
void similarity_loss_prepare(Stream stream, const float* given_scale, double scale_number, bool inverted,
                             const float* given_bias, double bias_number, int64_t N, float* scale, float* row_bias,
                             int64_t* target, int32_t* ticket, Input x, Input y, int64_t M, int64_t D, Output x_rows,
                             Output y_rows, float* lengths);

// dots_ij *= row_factor_i * col_factor_j, for (N, pitch) inner products
void similarity_loss_multiply(Stream stream, float* dots, int64_t N, int64_t M, int64_t pitch, const float* row_factor,
                              const float* col_factor);

// From the parts of a fold to the loss: folds and targets' logits of rows, their losses, and the slopes of those.
//   dots, chunk, pair_data, spec, scale, row_bias, col_bias, target, N, M: as for similarity_reduce_fold
//   parts: what similarity_reduce_fold wrote
//   kind: of RowLoss, of a kind with one set; divisor: of the sum of the rows' losses
//   values: the folds, one after another; slopes: by the folds in the same order, then by the targets' logits
//   sums: 2 numbers for each block of 256 rows to work with
//   loss (1,)
//   norm (1,) or null: a power of two that brings the largest weight just below what float16 holds
void similarity_loss_rows(Stream stream, const float* dots, Integers chunk, Arrays pair_data, Integers spec,
                          const float* scale, const float* row_bias, const float* col_bias, const int64_t* target,
                          int64_t N, int64_t M, const float* parts, int64_t kind, double divisor, int32_t* ticket,
                          double* sums, float* values, float* slopes, float* loss, float* norm);

// Gradients as they leave, rounded once: factor * (gradient / norm + residual * other_partner), and of that, for unit
// rows, what lies across the row, over its length. Sums for scale and bias, times the factor.
//   dx (N, D), dy (M, D): products of weights, or null for those that have left
//   x, y: the rows that were multiplied; lengths: as `prepare` wrote them, or null
//   norm (1,) or null; factor (1,)
//   parts: what similarity_reduce_weigh wrote; row_residuals, col_residuals: where the parts of the residuals begin, -1
//   for none; across, down: how many tiles there are
//   target (N,): a row's partner; partner (M,): a column's, or null for row j of column j
//   begins: where the parts of each sum begin; scale (1,) or null: the first sum is turned into that by 1 / scale
//   totals: one number for each sum
void similarity_loss_finish(Stream stream, const float* dx, const float* dy, Input x, Input y, const float* lengths,
                            int64_t N, int64_t M, int64_t D, const float* norm, const float* factor, const float* parts,
                            int64_t row_residuals, int64_t col_residuals, int64_t across, int64_t down,
                            const int64_t* target, const int64_t* partner, Output x_gradient, Output y_gradient,
                            Integers begins, const float* scale, float* totals);

}  // namespace contrastive_ops
