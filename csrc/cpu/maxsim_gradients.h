// Gradients of MaxSim scores: each winner adds a row of the other side, in a fixed order.
//
// Queries own their rows and documents theirs, so that no two tasks write to one row.
#pragma once

#include "../maxsim.h"
#include "similarity_lists.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Most tokens of a task; results do not depend on it.
constexpr int64_t kTaskTokens = 1024;
// As many that there is work for so many threads.
int64_t tokens_of_a_task(int64_t tokens, int64_t threads) {
  return maximum<int64_t>(minimum(kTaskTokens, tokens / threads), 1);
}

// Cuts [0, count) into tasks: calls size(index) for each, and ends a task where they add up to `enough` or where
// `apart(index)` says that the next one must not follow. Returns the number of tasks; task t is [cuts[t], cuts[t + 1]).
template <class Size, class Apart>
int64_t cut(int64_t count, int64_t enough, Buffer<int64_t>& cuts, Size size, Apart apart) {
  cuts.allocate(count + 1);
  int64_t tasks = 0, sum = 0;
  cuts.get()[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += size(i);
    if (sum < enough && i + 1 < count && !apart(i)) continue;
    cuts.get()[++tasks] = i + 1;
    sum = 0;
  }
  return tasks;
}

// Calls body(query token, document token, score) for the winners of one query in one document, in order.
// Winners address memory, so every one is checked.
template <class Body>
INLINE void for_each_winner(const MaxSimProblem& p, const int32_t* winners, int64_t query, int64_t document,
                            int64_t score, Body body) {
  const int64_t first = p.queries.offsets[query], tokens = p.queries.offsets[query + 1] - first;
  const int64_t of_document = p.documents.offsets[document];
  const int64_t length = p.documents.offsets[document + 1] - of_document;
  const int64_t at = p.paired ? score * p.longest_query : document * p.queries.T + first;
  const int32_t* winner = winners + at * p.k;
  for (int64_t e = 0; e < tokens * p.k; ++e) {
    if (winner[e] >= 0 && winner[e] < length) body(first + (p.k == 1 ? e : e / p.k), of_document + winner[e], score);
  }
}

// Zeros for the tokens of sets [first, last), and with the first and the last of all for those beside all sets.
template <class A>
void clear_gradients(const TokenSets& sets, int64_t first, int64_t last, int64_t depth, A* gradients) {
  const int64_t begin = first == 0 ? 0 : sets.offsets[first], end = last == sets.sets ? sets.T : sets.offsets[last];
  memset(gradients + begin * depth, 0, static_cast<size_t>((end - begin) * depth) * sizeof(A));
}

// Queries own their gradients; tokens of a task are few enough that these stay in a cache while documents pass by.
template <class A, class S>
void backward_queries(const MaxSimProblem& p, const MaxSimBackward& b, const Parallel& parallel) {
  const A* d_scores = static_cast<const A*>(b.d_scores);
  const auto add = [&](int64_t i, int64_t j, int64_t score) {
    add_row(d_scores[score], static_cast<const S*>(p.documents.tokens) + j * p.documents.stride, p.D,
            static_cast<A*>(b.dqueries) + i * p.D);
  };
  if (p.paired) {
    const ByColumn of_query(p.pair_queries, p.pairs, p.queries.sets);
    auto task = [&](int64_t i, int) {
      clear_gradients(p.queries, i, i + 1, p.D, static_cast<A*>(b.dqueries));
      of_query.for_each(i, [&](int64_t e) { for_each_winner(p, b.winners, i, p.pair_documents[e], e, add); });
    };
    return run_parallel(parallel.run, p.queries.sets, task);
  }
  Buffer<int64_t> cuts;
  const auto tokens_of = [&](int64_t i) { return p.queries.offsets[i + 1] - p.queries.offsets[i]; };
  const int64_t tasks = cut(p.queries.sets, tokens_of_a_task(p.queries.T, parallel.threads), cuts, tokens_of,
                            [](int64_t) { return false; });
  auto task = [&](int64_t index, int) {
    clear_gradients(p.queries, cuts.get()[index], cuts.get()[index + 1], p.D, static_cast<A*>(b.dqueries));
    for (int64_t j = 0; j < p.documents.sets; ++j) {
      for (int64_t i = cuts.get()[index]; i < cuts.get()[index + 1]; ++i) {
        for_each_winner(p, b.winners, i, j, i * p.documents.sets + j, add);
      }
    }
  };
  run_parallel(parallel.run, tasks, task);
}

template <class A, class S>
void backward_documents(const MaxSimProblem& p, const MaxSimBackward& b, const Parallel& parallel) {
  const A* d_scores = static_cast<const A*>(b.d_scores);
  const auto add = [&](int64_t i, int64_t j, int64_t score) {
    add_row(d_scores[score], static_cast<const S*>(p.queries.tokens) + i * p.queries.stride, p.D,
            static_cast<A*>(b.ddocuments) + j * p.D);
  };
  const std::unique_ptr<const ByColumn> of_document(p.paired ? new ByColumn(p.pair_documents, p.pairs, p.documents.sets)
                                                             : nullptr);
  auto task = [&](int64_t j, int) {
    clear_gradients(p.documents, j, j + 1, p.D, static_cast<A*>(b.ddocuments));
    if (of_document) {
      return of_document->for_each(j, [&](int64_t e) { for_each_winner(p, b.winners, p.pair_queries[e], j, e, add); });
    }
    for (int64_t i = 0; i < p.queries.sets; ++i) {
      for_each_winner(p, b.winners, i, j, i * p.documents.sets + j, add);
    }
  };
  run_parallel(parallel.run, p.documents.sets, task);
}

template <class C, class S>
void maxsim_backward(const MaxSimProblem& p, const MaxSimBackward& b, const Parallel& parallel) {
  // Without sets all tokens are beside them.
  if (b.dqueries && p.queries.sets == 0)
    clear_gradients(p.queries, 0, 0, p.D, static_cast<typename C::Acc*>(b.dqueries));
  if (b.ddocuments && p.documents.sets == 0) {
    clear_gradients(p.documents, 0, 0, p.D, static_cast<typename C::Acc*>(b.ddocuments));
  }
  if (b.dqueries) backward_queries<typename C::Acc, S>(p, b, parallel);
  if (b.ddocuments) backward_documents<typename C::Acc, S>(p, b, parallel);
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
