// Folds of a similarity matrix on a GPU, and their gradients; see arguments.h for what functions take.
//
// A library writes inner products of some rows with some columns, a chunk, and functions here turn them into folds or
// into the weights of the products that gradients are. All of them take, in this order,
//   dots (rows, pitch) float32, guide (rows, pitch) float32 or null: inner products, and those of the guide
//   chunk: pitch, first_row, rows, first_col, cols, tile_rows, itself (similarity_chunk.h)
//   pair_data, spec, scale, row_bias, col_bias, target, N, M: those of the operator
#pragma once

#include "arguments.h"

namespace contrastive_ops {

// Adds a chunk to all folds.
//   parts: 2 * (tiles across * rows + tiles down * cols) numbers to work with
//   state: 2 numbers per result (a State), of one fold after another, zeros at first; or null: then what each tile
//   found stays in `parts`, first of rows and then of columns, of the last pass alone
void similarity_reduce_fold(Stream stream, const float* dots, const float* guide, Integers chunk, Arrays pair_data,
                            Integers spec, const float* scale, const float* row_bias, const float* col_bias,
                            const int64_t* target, int64_t N, int64_t M, float* parts, double* state);

// The values of `count` results of one fold, and for a maximum where they are.
//   kind: of FoldKind
void similarity_reduce_finish(Stream stream, const double* state, int64_t kind, int64_t count, float* values,
                              int64_t* argmax);

// What the first set's targets and lists name in a chunk: target_logit (N,) or null, linear (N,) or null, which is
// added to. No guide.
void similarity_reduce_named(Stream stream, const float* dots, Integers chunk, Arrays pair_data, Integers spec,
                             const float* scale, const float* row_bias, const float* col_bias, const int64_t* target,
                             int64_t N, int64_t M, float* target_logit, double* linear);

// weights = dtotal/d(inner product), and sums of dtotal/dl, for a chunk. What lies below the diagonal of a matrix that
// is compared with itself is 0.
//   values, argmax, d_values: of all folds, one after another; d_values null for none
//   d_target (N,) or null; d_linear: (1 or 2, rows, pitch), as similarity_reduce_spread writes it, or null
//   norm: a power of two that weights are multiplied with before they are rounded, or null
//   weights (rows, pitch) or null
//   sums: per sum what (of SumOf), set, cols, and where it begins in `totals`, which is added to; or null: then what
//   each tile found stays in `parts`, of sums along rows and then of those along columns, of the last pass alone
//   parts: 3 * tiles across * rows + 2 * tiles down * cols numbers to work with
void similarity_reduce_weigh(Stream stream, const float* dots, const float* guide, Integers chunk, Arrays pair_data,
                             Integers spec, const float* scale, const float* row_bias, const float* col_bias,
                             const int64_t* target, int64_t N, int64_t M, const float* values, const int64_t* argmax,
                             const float* d_values, const float* d_target, const float* d_linear, const float* norm,
                             Output weights, Integers sums, float* parts, double* totals);

// Puts the derivatives by the logits in each row's list where their pairs are: spread, zeros at first, (rows, pitch),
// and as much again for mirrored pairs where the matrix is compared with itself.
void similarity_reduce_spread(Stream stream, Integers chunk, Arrays pair_data, Integers spec, const float* d_linear,
                              int64_t N, int64_t M, float* spread);

// The row of each column that is a target, of several the last: partner (M,), -1 at first. Targets that are no column
// are passed over, here and below.
void similarity_reduce_partners(Stream stream, const int64_t* target, int64_t N, int64_t M, int64_t* partner);

// gradient_i += residual_i * other_(partner i), where there is a partner.
//   gradient (size, D), residual (size,), partner (size,), other (others, D)
void similarity_reduce_give_back(Stream stream, float* gradient, const double* residual, const int64_t* partner,
                                 Input other, int64_t size, int64_t D, int64_t others);

}  // namespace contrastive_ops
