// Routing of tokens to experts on a GPU; see arguments.h for what functions take.
#pragma once

#include "arguments.h"

namespace contrastive_ops {

// Choices, gates and sums; all that contrastive_ops/reference/expert_routing.py returns from `scores`.
//   logits, noise, allowed (T, E), bias (E,), given (T, k), segment, valid (T,): those of the router
//   experts, gates (T, k), priority (T,), sums (3, S, E), totals (2, S), choices (S, E), tokens, margin (S,)
//   kept (S, E) or null becomes 0; values, total (1,): losses in a row and their weighted total, or null
//   state: memory of this and of the functions that follow, of which plan says how much becomes 0
//   part_sums (parts, kinds S E + 3 S), part_counts (parts, S E + S), tables: memory for sums of parts; `tables` is
//     null if shared memory has room for them, else (parts, warps of a block, S, kinds lanes items + 3)
//   spec: ScoreSpec of contrastive_ops/core/routing.py
//   plan: threads of a token, experts of each, parts, kinds: how many sums of probabilities are asked for, and the size
//     of `state` that becomes 0
//   losses, numbers: LossSpec of contrastive_ops/ops/router_losses.py
void expert_routing_scores(Stream stream, Input logits, const float* noise, const float* bias, const bool* allowed,
                           const int64_t* given, const int64_t* segment, const bool* valid, int64_t* experts,
                           float* gates, float* priority, float* sums, float* totals, int64_t* choices, int64_t* tokens,
                           float* margin, int64_t* kept, float* values, float* total, int32_t* state, double* part_sums,
                           int32_t* part_counts, float* tables, Integers spec, Integers plan, Integers losses,
                           Doubles numbers, int64_t T, int64_t E, double sigma);

// Gradient by the logits of what is linear in the outputs of the scores, rounded once.
//   experts (T, k) as chosen, d_gates (T, k) or null, d_logits (T, E)
//   either d_sums (3, S, E) and d_totals (2, S), or, where these are null, what they are made of: sums (3, S, E),
//   totals (2, S), choices (S, E), tokens (S,), and the gradients d_values of losses and d_total, or null
void expert_routing_scores_backward(Stream stream, Input logits, const float* noise, const bool* allowed,
                                    const int64_t* segment, const bool* valid, const int64_t* experts,
                                    const float* d_gates, const float* d_sums, const float* d_totals, const float* sums,
                                    const float* totals, const int64_t* choices, const int64_t* tokens,
                                    const float* d_values, const float* d_total, Output d_logits, Integers spec,
                                    Integers plan, Integers losses, Doubles numbers, int64_t T, int64_t E,
                                    double sigma);

// Places of choices, in one launch.
//   experts, slots (T, k), priority (T,) or null: by position, segment (T,) or null, order (R,), offsets (E + 1,),
//   kept (S, E) to which the choices with a row are added
//   memory: the sum of T k with a capacity, T k in the padded layout, 2 groups E, and E for each block of choices of a
//     group, or of all; state (2,): 0 before
//   spec: SlotSpec of contrastive_ops/core/routing.py; sizes: groups, T, k, R, warps of a block, each of 256 choices
void expert_routing_slots(Stream stream, const int64_t* experts, const float* priority, const int64_t* segment,
                          int64_t* slots, int64_t* order, int64_t* offsets, int64_t* kept, int32_t* memory,
                          int32_t* state, Integers spec, Integers sizes);

// rows_r = gate * tokens_t for the choice (t, j) in row r, zeros for a row of no choice.
//   tokens (T, D), gates (T, k) or null, order (R,), rows (R, D)
void expert_routing_dispatch(Stream stream, Input tokens, const float* gates, const int64_t* order, Output rows,
                             int64_t k, int64_t R, int64_t D);

// tokens_t = sum_j gate_tj * rows_(slot tj), in the order of the choices.
//   rows (R, D), gates (T, k) or null, slots (T, k), tokens (T, D)
void expert_routing_combine(Stream stream, Input rows, const float* gates, const int64_t* slots, Output tokens,
                            int64_t T, int64_t k, int64_t D);

// dots_tj = <tokens_t, rows_(slot tj)>, 0 for a choice without a row.
//   tokens (T, D), rows (R, D), slots (T, k), dots (T, k)
void expert_routing_dots(Stream stream, Input tokens, Input rows, const int64_t* slots, float* dots, int64_t T,
                         int64_t k, int64_t D);

}  // namespace contrastive_ops
