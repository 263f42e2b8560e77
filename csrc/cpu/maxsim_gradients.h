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

// Sums of rows that are added one by one. A long chain of float32 sums of much the same numbers loses digits in one
// direction: after kChain rows what was added goes into sums of float64.
template <class A>
class RowSums {
 public:
  // `sums` are the rows of all tokens; those of tokens [first, first + rows) are zero.
  RowSums(A* sums, int64_t first, int64_t rows, int64_t depth)
      : sums_(sums + first * depth), first_(first), rows_(rows), depth_(depth), added_(rows) {
    memset(added_.get(), 0, static_cast<size_t>(rows) * sizeof(Added));
  }

  template <class S>
  void add(int64_t token, A weight, const S* from) {
    const int64_t row = token - first_;
    add_row(weight, from, depth_, sums_ + row * depth_);
    if (++added_.get()[row].latest == kChain) move(row);
  }

  void finish() {
    for (int64_t row = 0; row < rows_; ++row) {
      if (!added_.get()[row].moved) continue;
      move(row);
      const double* total = totals_.get() + row * depth_;
      for (int64_t k = 0; k < depth_; ++k) sums_[row * depth_ + k] = static_cast<A>(total[k]);
    }
  }

 private:
  static constexpr int32_t kChain = 32;
  struct Added {
    int32_t latest, moved;
  };

  void move(int64_t row) {
    A* latest = sums_ + row * depth_;
    double* total = totals_.once(rows_ * depth_) + row * depth_;
    if (!added_.get()[row].moved) memset(total, 0, static_cast<size_t>(depth_) * sizeof(double));
    add_long_row(A(1), static_cast<const A*>(latest), depth_, total);
    memset(latest, 0, static_cast<size_t>(depth_) * sizeof(A));
    added_.get()[row] = {0, 1};
  }

  A* sums_;
  int64_t first_, rows_, depth_;
  Buffer<Added> added_;
  Buffer<double> totals_;
};

// Queries own their gradients; tokens of a task are few enough that these stay in a cache while documents pass by.
template <class A, class S>
void backward_queries(const MaxSimProblem& p, const MaxSimBackward& b, const Parallel& parallel) {
  const A* d_scores = static_cast<const A*>(b.d_scores);
  // Of queries [begin, end), whose sums `fill` is given a function for, which adds the row of a winner.
  const auto sum = [&](int64_t begin, int64_t end, auto fill) {
    clear_gradients(p.queries, begin, end, p.D, static_cast<A*>(b.dqueries));
    const int64_t first = p.queries.offsets[begin];
    RowSums<A> sums(static_cast<A*>(b.dqueries), first, p.queries.offsets[end] - first, p.D);
    fill([&](int64_t i, int64_t j, int64_t score) {
      sums.add(i, d_scores[score], static_cast<const S*>(p.documents.tokens) + j * p.documents.stride);
    });
    sums.finish();
  };
  if (p.paired) {
    const ByColumn of_query(p.pair_queries, p.pairs, p.queries.sets);
    auto task = [&](int64_t i, int) {
      sum(i, i + 1, [&](auto add) {
        of_query.for_each(i, [&](int64_t e) { for_each_winner(p, b.winners, i, p.pair_documents[e], e, add); });
      });
    };
    return run_parallel(parallel.run, p.queries.sets, task);
  }
  Buffer<int64_t> cuts;
  const auto tokens_of = [&](int64_t i) { return p.queries.offsets[i + 1] - p.queries.offsets[i]; };
  const int64_t tasks = cut(p.queries.sets, tokens_of_a_task(p.queries.T, parallel.threads), cuts, tokens_of,
                            [](int64_t) { return false; });
  auto task = [&](int64_t index, int) {
    const int64_t begin = cuts.get()[index], end = cuts.get()[index + 1];
    sum(begin, end, [&](auto add) {
      for (int64_t j = 0; j < p.documents.sets; ++j) {
        for (int64_t i = begin; i < end; ++i) for_each_winner(p, b.winners, i, j, i * p.documents.sets + j, add);
      }
    });
  };
  run_parallel(parallel.run, tasks, task);
}

template <class A, class S>
void backward_documents(const MaxSimProblem& p, const MaxSimBackward& b, const Parallel& parallel) {
  const A* d_scores = static_cast<const A*>(b.d_scores);
  const std::unique_ptr<const ByColumn> of_document(p.paired ? new ByColumn(p.pair_documents, p.pairs, p.documents.sets)
                                                             : nullptr);
  auto task = [&](int64_t j, int) {
    clear_gradients(p.documents, j, j + 1, p.D, static_cast<A*>(b.ddocuments));
    const int64_t first = p.documents.offsets[j];
    RowSums<A> sums(static_cast<A*>(b.ddocuments), first, p.documents.offsets[j + 1] - first, p.D);
    const auto add = [&](int64_t i, int64_t token, int64_t score) {
      sums.add(token, d_scores[score], static_cast<const S*>(p.queries.tokens) + i * p.queries.stride);
    };
    if (of_document) {
      of_document->for_each(j, [&](int64_t e) { for_each_winner(p, b.winners, p.pair_queries[e], j, e, add); });
    } else {
      for (int64_t i = 0; i < p.queries.sets; ++i) {
        for_each_winner(p, b.winners, i, j, i * p.documents.sets + j, add);
      }
    }
    sums.finish();
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
