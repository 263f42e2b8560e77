// Routing of tokens to experts on a GPU; see arguments.h for what functions take.
#pragma once

#include "arguments.h"

namespace contrastive_ops {

// rows_r = gate * tokens_t for the choice (t, j) in row r, zeros for a row of no choice.
//   tokens (T, D), gates (T, k) or null, order (R,), rows (R, D)
void expert_routing_dispatch(Stream stream, Input tokens, const float* gates, const int64_t* order, Output rows,
                             int64_t T, int64_t k, int64_t R, int64_t D);

// tokens_t = sum_j gate_tj * rows_(slot tj), in the order of the choices.
//   rows (R, D), gates (T, k) or null, slots (T, k), tokens (T, D)
void expert_routing_combine(Stream stream, Input rows, const float* gates, const int64_t* slots, Output tokens,
                            int64_t T, int64_t k, int64_t R, int64_t D);

}  // namespace contrastive_ops
