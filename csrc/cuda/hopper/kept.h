// Logits that forward keeps as 16-bit fixed point, and weights from them; see fold.h and weigh.h.
//
// The logits of a warp's rows in a tile that is folded, 32 rows and 192 columns, are top - q * step for q of 0 to
// 65534, with a step of their own: each is off by half a step. 65535 is a pair that no fold sees. A pair of row tiles
// is called wide in which such logits lie more than 64 apart, or a number is not finite, or the scale is 0.
#pragma once

#include "../arguments.h"

namespace contrastive_ops {

// Weights as hopper_weigh makes them of folds that are logsumexp, of rows that hopper_fold has kept and none of which
// is in a wide pair of tiles; else nothing is done, and hopper_weigh is to do it.
//   first_row, rows, pair_data, ... , sums, parts, totals: as for hopper_weigh
//   logits, heads, wide: what hopper_fold kept, from first_row on
//   target_logit (N,) or null: the targets' logits
void hopper_weigh_kept(Stream stream, int64_t first_row, int64_t rows, Arrays pair_data, Integers spec,
                       const float* scale, const float* row_bias, const float* col_bias, const int64_t* target,
                       int64_t N, int64_t M, const float* values, const float* d_values, const float* d_target,
                       const float* norm, Input logits, const float* heads, const int64_t* wide,
                       const float* target_logit, Output weights, Integers sums, float* parts, double* totals);

}  // namespace contrastive_ops
