// Routing of tokens to experts; shared by cpu/ and cuda/.
//
// Pointers to void are of the accumulation type (double for float64 inputs, float otherwise) unless they are said to be
// of the input type. Numbers of scores are those of contrastive_ops/core/routing.py. Sums are over the tokens of a
// segment.
#pragma once

#include <cstdint>

#include "similarity_problem.h"

namespace contrastive_ops {

enum class RouterScore : int { softmax = 0, sigmoid = 1 };
enum class GroupScore : int { top2 = 0, max = 1 };
// In the order of contrastive_ops/ops/router_losses.py.
enum class RouterLoss : int { importance, load, switched, z, local_entropy, global_entropy };

struct RouterProblem {
  DType dtype;
  int64_t T, E, k, segments;
  const void* logits;                          // (T, E) of the input type, unit column stride
  int64_t logits_stride;                       // between rows, in elements
  const void* noise;                           // (T, E); or null
  double sigma;                                // what noise is multiplied by
  const void* bias;                            // (E,) added for the choice alone; or null
  const bool* allowed;                         // (T, E) by strides; or null
  int64_t allowed_row_stride, allowed_stride;  // in elements
  const int64_t* segment;                      // (T,); or null for one segment
  const bool* valid;                           // (T,); or null
  RouterScore score;
  bool renormalize;
  int64_t expert_groups, kept_groups;
  GroupScore group_score;
  bool load;  // whether the chance to be chosen again is summed
};

struct RouterScores {
  const int64_t* given;  // (T, k) experts in place of a choice, -1 for none; or null
  int64_t* experts;      // (T, k)
  void* gates;           // (T, k)
  void* priority;        // (T,) gate of the first choice, not renormalised
  void* sums;            // (3, segments, E): p, p with noise, chance to be chosen again
  void* totals;          // (2, segments): squared logsumexp, entropy
  int64_t* choices;      // (segments, E)
  int64_t* tokens;       // (segments,)
  void* margin;          // (segments,)
};

struct RouterGradients {
  const int64_t* experts;  // (T, k)
  const void* d_gates;     // (T, k)
  const void* d_sums;      // (3, segments, E)
  const void* d_totals;    // (2, segments)
  void* dlogits;           // (T, E)
};

struct RouterSlots {
  DType dtype;  // of the priority
  int64_t T, E, k, segments, group_size;
  int64_t capacity;  // of an expert in each group; -1 for no limit
  bool padded;
  int64_t rows;            // of the dispatched layout
  const int64_t* experts;  // (T, k), -1 for none
  const void* priority;    // (T,); or null: by position
  const int64_t* segment;  // (T,); or null
  int64_t* slots;          // (T, k)
  int64_t* order;          // (rows,)
  int64_t* offsets;        // (E + 1,)
  int64_t* kept;           // (segments, E)
};

// What losses are made of, and which: `Statistics` and `LossSpec` of contrastive_ops/ops/router_losses.py.
struct RouterLosses {
  int64_t E, segments, count;
  bool noise;             // whether p with noise is another sum
  const void* sums;       // (3, segments, E), then (3, segments): squared logsumexp, entropy, margin
  const int64_t* counts;  // (2, segments, E): choices and those kept, then (segments,): tokens
  const int64_t* losses;  // (count, 4): loss, pooled, numbers of weights, numbers of thresholds
  const double* numbers;  // weights, then thresholds, of each loss
};

// `tokens` (T, D) and `rows` (R, D) are of the input type, contiguous; which of them is read or written depends on the
// function. `gates` (T, k) may be null: all 1.
struct RouterRows {
  DType dtype;
  int64_t T, k, R, D;
  const void* from;
  const void* other;  // dots: the rows, where `from` are the tokens
  const void* gates;
  const int64_t* slots;  // (T, k)
  const int64_t* order;  // (R,)
  void* to;
};

struct ExpertRouting {
  void (*scores)(const RouterProblem&, const RouterScores&, const Parallel&);
  void (*scores_backward)(const RouterProblem&, const RouterGradients&, const Parallel&);
  void (*slots)(const RouterSlots&, const Parallel&);
  void (*dispatch)(const RouterRows&, const Parallel&);
  void (*combine)(const RouterRows&, const Parallel&);
  void (*dots)(const RouterRows&, const Parallel&);
};

CONTRASTIVE_OPS_PRIMITIVE(ExpertRouting, expert_routing)

}  // namespace contrastive_ops
