// Routing of tokens to experts on a GPU; see arguments.h for what functions take.
#pragma once

#include "arguments.h"

namespace contrastive_ops {

// Choices, gates and sums; all that contrastive_ops/reference/expert_routing.py returns from `scores`.
//   logits, noise, allowed (T, E), bias (E,), given (T, k), segment, valid (T,): those of the router
//   experts, gates (T, k), priority (T,), sums (3, S, E), totals (2, S), choices (S, E), tokens, margin (S,)
//   part_sums (parts, kinds S E + 3 S), part_counts (parts, S E + S), tables: memory for sums of parts; `tables` is
//     null if shared memory has room for them, else (parts, warps of a block, S, kinds lanes items + 3)
//   spec: ScoreSpec of contrastive_ops/core/routing.py
//   plan: threads of a token, experts of each, parts, kinds: how many sums of probabilities are asked for
void expert_routing_scores(Stream stream, Input logits, const float* noise, const float* bias, const bool* allowed,
                           const int64_t* given, const int64_t* segment, const bool* valid, int64_t* experts,
                           float* gates, float* priority, float* sums, float* totals, int64_t* choices, int64_t* tokens,
                           float* margin, double* part_sums, int32_t* part_counts, float* tables, Integers spec,
                           Integers plan, int64_t T, int64_t E, double sigma);

// Gradient by the logits of what is linear in the outputs of the scores.
//   experts (T, k) as chosen, d_gates (T, k), d_sums (3, S, E), d_totals (2, S), d_logits (T, E)
void expert_routing_scores_backward(Stream stream, Input logits, const float* noise, const bool* allowed,
                                    const int64_t* segment, const bool* valid, const int64_t* experts,
                                    const float* d_gates, const float* d_sums, const float* d_totals, float* d_logits,
                                    Integers spec, Integers plan, int64_t T, int64_t E, double sigma);

// One counting sort of choices by expert.
//   by_turn: all first choices of a group before all second ones, tokens in their turn, into positions of which those
//     from the capacity on are -1; with order, into the padded rows that these are
//   otherwise: choices in their own order into rows without gaps; only_kept: of those whose slot is not -1
//   experts, slots (T, k), turn (groups, T / groups) or null, segment (T,) or null, order (R,), -1 before if by_turn,
//   offsets (E + 1,) written unless by_turn, kept (S, E) to which the choices with a row are added,
//   counts (groups, blocks, E) and totals (groups, E): memory, for blocks of at least 256 choices
//   spec: SlotSpec of contrastive_ops/core/routing.py; sizes: groups, T, k, R
void expert_routing_slots(Stream stream, const int64_t* experts, const int64_t* turn, const int64_t* segment,
                          int64_t* slots, int64_t* order, int64_t* offsets, int64_t* kept, int32_t* counts,
                          int32_t* totals, Integers spec, Integers sizes, bool by_turn, bool only_kept);

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
