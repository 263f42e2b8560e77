// A whole loss of one chunk on a GPU, in few launches; see arguments.h for what functions take.
//
// Where the matrix is one chunk a step is, beside the products of the library: `prepare`, similarity_reduce_fold
// without a state, `rows`, similarity_reduce_weigh without totals, `totals`, and, where gradients are rounded or what
// arrives is not known in time, `finish`. Chunks are told as to similarity_reduce (similarity_reduce.h).
#pragma once

#include "arguments.h"

namespace contrastive_ops {

// What the functions below share: written at the beginning of a step, as a host that writes numbers one by one starts
// a launch for each.
//   given_scale, given_bias: one number each, or null for `scale_number` and `bias_number`
//   inverted: what is given is a temperature, and the scale is 1 over it
//   scale (1,); row_bias (N,) or null; target (N,) or null: column i of row i; ticket (1,): 0, for `rows`
void similarity_loss_prepare(Stream stream, const float* given_scale, double scale_number, bool inverted,
                             const float* given_bias, double bias_number, int64_t N, float* scale, float* row_bias,
                             int64_t* target, int32_t* ticket);

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

// Sums over all rows of what similarity_reduce_weigh wrote to `parts`, times `factor` (1,) or null.
//   begins: where the parts of a sum begin, for each; size: how many there are of one
//   scale (1,) or null: the first sum is then turned into that by 1 / scale
//   totals: one number for each sum
void similarity_loss_totals(Stream stream, const float* parts, Integers begins, int64_t size, const float* factor,
                            const float* scale, float* totals);

// Gradients as they leave: factor * (gradient / norm + residual * other_partner), rounded once.
//   dx (N, D), dy (M, D): products of weights, or null; x, y: the matrices
//   norm (1,) or null; factor (1,)
//   parts, row_residuals, col_residuals: what similarity_reduce_weigh wrote, and where the parts of the residuals
//   begin, -1 for none; across, down: how many tiles there are target (N,): a row's partner; partner (M,): a column's,
//   or null for row j of column j totals, other_totals (count,): numbers that are multiplied by the factor alone
void similarity_loss_finish(Stream stream, const float* dx, const float* dy, Input x, Input y, int64_t N, int64_t M,
                            int64_t D, const float* norm, const float* factor, const float* parts,
                            int64_t row_residuals, int64_t col_residuals, int64_t across, int64_t down,
                            const int64_t* target, const int64_t* partner, Output x_gradient, Output y_gradient,
                            const float* totals, int64_t count, float* other_totals);

}  // namespace contrastive_ops
