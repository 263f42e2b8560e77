// Late interaction: the best document token of every query token, and their sums; shared by cpu/ and cuda/.
//
//   score(Q, D) = sum over the tokens i of Q of the k largest <q_i, d_j> over the tokens j of D
//
// Tokens of all sets lie in one matrix; set s is the tokens offsets[s] to offsets[s + 1]. A query without tokens has
// score 0 with every document, any other one -inf with a document without tokens. Largest first, then the smallest
// token; NaN is larger than all numbers.
#pragma once

#include "similarity_problem.h"

namespace contrastive_ops {

struct TokenSets {
  const void* tokens;      // (T, D), unit column stride
  int64_t T, stride;       // between rows, in elements
  const int64_t* offsets;  // (sets + 1,), ascending, within [0, T]
  int64_t sets;
  const bool* mask;  // (T,) which tokens take part; null for all
};

struct MaxSimProblem {
  DType dtype;
  TokenSets queries, documents;
  int64_t D, k;
  bool paired;                                   // listed pairs, not every query with every document
  const int64_t *pair_queries, *pair_documents;  // (pairs,)
  int64_t pairs;
  int64_t longest_query;  // of listed pairs: the tokens that each has room for in `winners`
};

// A winner is the place of a token within its document, in order, -1 where there are fewer than k. They are laid out
// (documents, T of the queries, k), or (pairs, longest_query, k) for listed pairs.
struct MaxSimForward {
  void* scores;      // (queries, documents) or (pairs,), accumulation type, 0 on entry
  int32_t* winners;  // all of them are written; or null
};

// Outputs that are null are not needed; all are of the accumulation type, and every row is written.
struct MaxSimBackward {
  const int32_t* winners;
  const void* d_scores;
  void *dqueries, *ddocuments;
};

struct MaxSim {
  void (*forward)(const MaxSimProblem&, const MaxSimForward&, const Parallel&);
  void (*backward)(const MaxSimProblem&, const MaxSimBackward&, const Parallel&);
};

CONTRASTIVE_OPS_PRIMITIVE(MaxSim, maxsim)

}  // namespace contrastive_ops
