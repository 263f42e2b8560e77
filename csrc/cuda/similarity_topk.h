// The k best columns of every row, and logits of listed pairs, on a GPU; see arguments.h for what functions take.
//
// Inner products come from a library, a tile at a time. A *list* holds the best columns so far of one row, of every
// part-th strip of columns:
//   keys (lists, capacity)   what is in each list, in no order; see similarity_selection.h
//   counts (lists,)          how many there are
//   thresholds (lists,)      what a score must exceed to be of interest
// The lists of a row follow one another, `parts` of them.
#pragma once

#include "arguments.h"

namespace contrastive_ops {

// Adds to the lists what a tile has for them. Tiles must come in ascending order of columns.
//   dots (rows, stride) the inner products of rows first_row.. with columns first_col.., of which there are cols; rows
//   begin at multiples of 16 bytes
//   guide (rows, stride) those of the guide, or null
//   strip columns of the tile belong to each list, the first ones to the first; the first set of `spec` selects
void similarity_topk_filter(Stream stream, const float* dots, const float* guide, const float* scale,
                            const float* row_bias, const float* col_bias, Arrays pair_data, Integers spec,
                            int64_t* keys, int32_t* counts, float* thresholds, int64_t N, int64_t M, int64_t first_row,
                            int64_t rows, int64_t first_col, int64_t cols, int64_t stride, int64_t parts, int64_t strip,
                            int64_t capacity, int64_t k);

// Adds to the statistics, (7, rows * parts), what a tile has for them, under the rules of the last set of `spec`.
//   level (N,) what a logit must exceed to be counted as higher
void similarity_topk_count(Stream stream, const float* dots, const float* guide, const float* scale,
                           const float* row_bias, const float* col_bias, Arrays pair_data, Integers spec,
                           const float* level, int64_t* statistics, int64_t N, int64_t M, int64_t first_row,
                           int64_t rows, int64_t first_col, int64_t cols, int64_t stride, int64_t parts, int64_t strip);

// The k best of all lists of each row, -inf and -1 behind the last.
//   values (rows, k), indices (rows, k), found (rows,) how many there are
//   size: the power of two that has room for all that are found; 0 leaves them in no order
void similarity_topk_select(Stream stream, const int64_t* keys, const int32_t* counts, float* values, int64_t* indices,
                            int64_t* found, int64_t rows, int64_t parts, int64_t capacity, int64_t k, int64_t size);

// The k best of (rows, listed), which are in no order; an index of -1, or a value of -inf or NaN, is none.
//   out_values (rows, k), out_indices (rows, k); size: a power of two that is not below `listed`
void similarity_topk_order(Stream stream, const float* values, const int64_t* indices, float* out_values,
                           int64_t* out_indices, int64_t rows, int64_t listed, int64_t k, int64_t size);

// The logits of listed pairs, whatever the rules say and -inf for an index of -1; or, with `raw`, inner products and 0.
//   x (N, D), y (M, D), indices (N, listed), values (N, listed)
void similarity_topk_at(Stream stream, Input x, Input y, const float* scale, const float* row_bias,
                        const float* col_bias, Arrays pair_data, Integers spec, const int64_t* indices, float* values,
                        int64_t N, int64_t M, int64_t D, int64_t listed, bool raw);

// sums_o = sum of weights_e * rows_(partner e) over the entries e of owner o, indptr_o to indptr_(o + 1).
//   rows (.., D), partners of each entry, -1 for none, sums (owners, D)
void similarity_topk_sum_rows(Stream stream, Input rows, const int64_t* indptr, const int64_t* partners,
                              const float* weights, float* sums, int64_t owners, int64_t D);

// sums_o = sum of weights_e over the entries of owner o.
void similarity_topk_sum(Stream stream, const int64_t* indptr, const float* weights, float* sums, int64_t owners);

}  // namespace contrastive_ops
