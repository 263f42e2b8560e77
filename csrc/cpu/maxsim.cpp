// maxsim on the CPU: late interaction of token sets, and the gradients of its scores.
//
// Compiled once per SIMD level. Query tokens are packed once for all
// documents; a task packs the tokens of its documents, those of short ones together, chunk by chunk, and multiplies
// each chunk with one panel of query tokens at a time, so that a tile's products are folded while they are in the
// level-1 cache. Inner products are sums along the depth, the best token does not depend on the order in which it is
// found, and a score is the sum over the tokens of a query in their order: neither tasks nor threads change a bit.
#include "../maxsim.h"

#include <algorithm>

#include "maxsim_fold.h"
#include "maxsim_gradients.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Document tokens that are multiplied at a time, as far as they are packed into this much of a level-2 cache.
constexpr int64_t kChunkTokens = 128, kChunkBytes = int64_t{256} << 10;
// Query tokens of a task, and how many of such blocks are packed at a time.
constexpr int64_t kQueryTokens = 2048, kQueryBlocks = 8;
// Query tokens that one task packs.
constexpr int64_t kPackedTokens = 256;

bool live(const TokenSets& sets, int64_t token) { return !sets.mask || sets.mask[token]; }
int64_t live_tokens(const TokenSets& sets, int64_t set) {
  if (!sets.mask) return sets.offsets[set + 1] - sets.offsets[set];
  int64_t count = 0;
  for (int64_t t = sets.offsets[set]; t < sets.offsets[set + 1]; ++t) count += sets.mask[t];
  return count;
}

// Packs the listed rows of a matrix; rows in succession are read where they are.
template <class C, Side side, class S>
void pack_listed(typename C::Unit* to, int64_t panel_stride, const TokenSets& from, const int64_t* rows, int64_t count,
                 int64_t depth, Growing<S>& gathered) {
  constexpr int64_t group = kLaneGroup<C>;
  const S* data = static_cast<const S*>(from.tokens);
  for (int64_t lane = 0; lane < count; lane += group) {
    const int64_t lanes = minimum(group, count - lane);
    bool in_succession = true;
    for (int64_t q = 1; q < lanes; ++q) in_succession &= rows[lane + q] == rows[lane + q - 1] + 1;
    const S* source = data + rows[lane] * from.stride;
    int64_t stride = from.stride;
    if (!in_succession) {
      S* copy = gathered.at_least(group * depth);
      for (int64_t q = 0; q < lanes; ++q) {
        memcpy(copy + q * depth, data + rows[lane + q] * from.stride, static_cast<size_t>(depth) * sizeof(S));
      }
      source = copy;
      stride = depth;
    }
    pack_rows<C, side>(to + lane / kPanelLanes<C, side> * panel_stride, panel_stride, source, stride, lanes, lanes,
                       depth);
  }
}

// Tokens of whole queries, packed.
template <class C, class S>
class QueryBlock {
 public:
  using U = typename C::Unit;

  struct Lane {
    int64_t place;  // of the token's winners among those of a document or pair
    int64_t ends;   // the query of which it is the last token, or -1
  };
  int64_t first = 0, last = 0, count = 0;  // queries, and their tokens

  // Takes queries from `begin` on: one at least, and as many more as there is room for.
  void take(const MaxSimProblem& p, int64_t begin, int64_t end) {
    first = last = begin;
    count = 0;
    for (; last < end; ++last) {
      const int64_t more = live_tokens(p.queries, last);
      if (last > first && count + more > kQueryTokens) break;
      count += more;
    }
  }
  // Lists them, and makes room for them.
  void list(const MaxSimProblem& p) {
    int64_t* rows = rows_.at_least(count);
    Lane* lanes = lanes_.at_least(count);
    int64_t lane = 0;
    for (int64_t q = first; q < last; ++q) {
      const int64_t begin = p.queries.offsets[q], before = lane;
      for (int64_t t = begin; t < p.queries.offsets[q + 1]; ++t) {
        if (!live(p.queries, t)) continue;
        rows[lane] = t;
        lanes[lane++] = {p.paired ? t - begin : t, -1};
      }
      if (lane > before) lanes[lane - 1].ends = q;
    }
    const int64_t units = depth_units<C>(p.D);
    panel_stride_ = kCols<C> * units;
    panels_.at_least(round_up(count, kLaneGroup<C>) * units);
  }
  int64_t packings() const { return (count + kPackedTokens - 1) / kPackedTokens; }
  void pack(const MaxSimProblem& p, int64_t index) {
    static_assert(kPackedTokens % kLaneGroup<C> == 0 && kPackedTokens % kCols<C> == 0, "whole panels are packed");
    const int64_t lane = index * kPackedTokens;
    Growing<S> gathered;
    pack_listed<C, Side::b, S>(panels_.get() + lane / kCols<C> * panel_stride_, panel_stride_, p.queries,
                               rows_.get() + lane, minimum(kPackedTokens, count - lane), p.D, gathered);
  }
  int64_t panels() const { return (count + kCols<C> - 1) / kCols<C>; }
  const U* panel(int64_t index) const { return panels_.get() + index * panel_stride_; }
  const Lane* lanes(int64_t panel) const { return lanes_.get() + panel * kCols<C>; }

 private:
  Growing<U> panels_;
  Growing<int64_t> rows_;
  Growing<Lane> lanes_;
  int64_t panel_stride_ = 0;
};

// Multiplies documents with a block of query tokens, in the memory of one thread.
template <class C, class S>
class alignas(64) DocumentSweep {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;
  using Place = PlaceOf<A>;

  void begin(const MaxSimProblem& problem, const MaxSimForward& outputs, const QueryBlock<C, S>& block) {
    p = &problem;
    out = outputs;
    query_ = &block;
    units_ = depth_units<C>(problem.D);
    const int64_t group = kLaneGroup<C>,
                  fits = kChunkBytes / static_cast<int64_t>(sizeof(U)) / maximum<int64_t>(units_, 1);
    chunk_tokens_ = maximum(minimum(kChunkTokens, fits) / group * group, group);
    panels_.at_least(chunk_tokens_ * units_);
    dots_.at_least(chunk_tokens_ * kCols<C>);
    rows_.at_least(chunk_tokens_);
    places_.at_least(chunk_tokens_);
    segments_.at_least(chunk_tokens_);
    sums_.at_least(chunk_tokens_);
    const int64_t lanes = round_up(maximum<int64_t>(block.count, 1), kCols<C>);
    values_.at_least(lanes * problem.k);
    if (problem.k == 1) {
      winners_.at_least(lanes);
    } else {
      listed_.at_least(lanes * problem.k);
    }
  }

  // `score` and `winner`: where those of the first query and of the first token go.
  void add(int64_t document, int64_t score, int64_t winner) {
    const TokenSets& d = p->documents;
    const int64_t begin = d.offsets[document];
    int64_t end = d.offsets[document + 1], before = 0;
    while (end > begin && !live(d, end - 1)) --end;
    if (end == begin) return write_empty(score);
    int64_t first = count_;
    for (int64_t t = begin; t < end; ++t) {
      if (!live(d, t)) continue;
      rows_.get()[count_] = t;
      places_.get()[count_++] = static_cast<int32_t>(t - begin);
      if (count_ < chunk_tokens_ && t + 1 < end) continue;
      segments_.get()[segment_count_++] = {score, winner, first, count_, before, t + 1 == end};
      before += count_ - first;
      if (count_ == chunk_tokens_) flush();
      first = count_;
    }
  }

  void flush() {
    if (count_ == 0) return;
    pack_listed<C, Side::a, S>(panels_.get(), kRows<C> * units_, p->documents, rows_.get(), count_, p->D, gathered_);
    for (int64_t e = 0; e < segment_count_; ++e) sums_.get()[e] = 0;
    for (int64_t panel = 0; panel < query_->panels(); ++panel) {
      for (int64_t r = 0; r < count_; r += kRows<C>) {
        tile<C>(units_, panels_.get() + r * units_, query_->panel(panel), dots_.get() + r * kCols<C>, kCols<C>, false);
      }
      for (int64_t e = 0; e < segment_count_; ++e) {
        if (p->k == 1) {
          fold(segments_.get()[e], panel, sums_.get()[e]);
        } else {
          fold_lists(segments_.get()[e], panel, sums_.get()[e]);
        }
      }
    }
    count_ = segment_count_ = 0;
  }

 private:
  int64_t score_stride() const { return p->paired ? 0 : p->documents.sets; }
  A& score_of(int64_t score, int64_t query) const {
    return static_cast<A*>(out.scores)[score + query * score_stride()];
  }
  int64_t lanes_of(int64_t panel) const { return minimum<int64_t>(kCols<C>, query_->count - panel * kCols<C>); }

  void write_empty(int64_t score) const {
    for (int64_t panel = 0; panel < query_->panels(); ++panel) {
      const auto* lanes = query_->lanes(panel);
      for (int64_t q = 0; q < lanes_of(panel); ++q) {
        if (lanes[q].ends >= 0) score_of(score, lanes[q].ends) = kMinusInfinity<A>;
      }
    }
  }

  // Scores are summed up in double: a query may have thousands of tokens.
  void fold(const Segment& s, int64_t panel, double& sum) {
    A* values = values_.get() + panel * kCols<C>;
    Place* winners = winners_.get() + panel * kCols<C>;
    Best<A> best;
    if (s.before) best.load_from(values, winners);
    best.add(dots_.get() + s.begin * kCols<C>, places_.get() + s.begin, s.end - s.begin, s.before == 0);
    best.store_to(values, winners);
    if (!s.last) return;
    const auto* lanes = query_->lanes(panel);
    const int64_t count = lanes_of(panel);
    int32_t* to = out.winners ? out.winners + s.winner : nullptr;
    for (int64_t q = 0; to && q < count; ++q) to[lanes[q].place] = static_cast<int32_t>(winners[q]);
    for (int64_t q = 0; q < count; ++q) {
      sum += values[q];
      if (lanes[q].ends >= 0) finish(s.score, lanes[q].ends, sum);
    }
  }
  void fold_lists(const Segment& s, int64_t panel, double& sum) {
    const int64_t k = p->k;
    A* values = values_.get() + panel * kCols<C> * k;
    int32_t* listed = listed_.get() + panel * kCols<C> * k;
    add_to_lists<A, kCols<C>>(dots_.get() + s.begin * kCols<C>, places_.get() + s.begin, s.end - s.begin, s.before,
                              values, listed, k);
    if (!s.last) return;
    const int64_t held = minimum(k, s.before + s.end - s.begin);
    const auto* lanes = query_->lanes(panel);
    for (int64_t q = 0; q < lanes_of(panel); ++q) {
      for (int64_t e = 0; e < held; ++e) {
        if (out.winners) out.winners[(s.winner + lanes[q].place) * k + e] = listed[q * k + e];
        sum += values[q * k + e];
      }
      if (lanes[q].ends >= 0) finish(s.score, lanes[q].ends, sum);
    }
  }
  void finish(int64_t score, int64_t query, double& sum) const {
    score_of(score, query) = static_cast<A>(sum);
    sum = 0;
  }

  const MaxSimProblem* p = nullptr;
  MaxSimForward out{};
  const QueryBlock<C, S>* query_ = nullptr;
  int64_t units_ = 0, chunk_tokens_ = 0;
  // The chunk: its tokens, and whose they are.
  int64_t count_ = 0, segment_count_ = 0;
  Growing<U> panels_;
  Growing<A> dots_;
  Growing<int64_t> rows_;
  Growing<int32_t> places_;
  Growing<Segment> segments_;
  Growing<double> sums_;  // of each segment: over the tokens so far of the query that the last panel has left open
  Growing<S> gathered_;
  // Of each query token: what the document of the segment has shown so far.
  Growing<A> values_;
  Growing<Place> winners_;
  Growing<int32_t> listed_;
};

// -1 for the tokens of a block of queries, and for those beside all queries, in one document.
template <class C, class S>
void clear_winners(const MaxSimProblem& p, const MaxSimForward& out, const QueryBlock<C, S>& block, int64_t document) {
  const int64_t first = block.first == 0 ? 0 : p.queries.offsets[block.first];
  const int64_t last = block.last == p.queries.sets ? p.queries.T : p.queries.offsets[block.last];
  int32_t* winners = out.winners + document * p.queries.T * p.k;
  std::fill(winners + first * p.k, winners + last * p.k, -1);
}

template <class C, class S>
void forward_all(const MaxSimProblem& p, const MaxSimForward& out, const Parallel& parallel) {
  const auto tokens_of = [&](int64_t j) { return p.documents.offsets[j + 1] - p.documents.offsets[j]; };
  Buffer<int64_t> cuts;
  const int64_t ranges = cut(p.documents.sets, tokens_of_a_task(p.documents.T, 4 * parallel.threads), cuts, tokens_of,
                             [](int64_t) { return false; });
  if (out.winners && p.queries.sets == 0)
    std::fill(out.winners, out.winners + p.documents.sets * p.queries.T * p.k, -1);
  const std::unique_ptr<QueryBlock<C, S>[]> blocks(new QueryBlock<C, S>[kQueryBlocks]);
  const std::unique_ptr<DocumentSweep<C, S>[]> sweeps(new DocumentSweep<C, S>[parallel.threads]);
  for (int64_t query = 0; query < p.queries.sets;) {
    int64_t count = 0;
    for (; count < kQueryBlocks && query < p.queries.sets; ++count) {
      blocks[count].take(p, query, p.queries.sets);
      query = blocks[count].last;
    }
    int64_t packings = 0;
    for (int64_t b = 0; b < count; ++b) {
      blocks[b].list(p);
      packings += blocks[b].packings();
    }
    // Whoever multiplies needs all query tokens.
    const int packed[] = {0};
    const Stage stages[] = {{packings}, {ranges * count, packed, 1}};
    auto task = [&](int64_t index, int thread) {
      for (int64_t b = 0; b < count; index -= blocks[b++].packings()) {
        if (index < blocks[b].packings()) return blocks[b].pack(p, index);
      }
      DocumentSweep<C, S>& sweep = sweeps[thread];
      const QueryBlock<C, S>& block = blocks[index % count];
      sweep.begin(p, out, block);
      const int64_t range = index / count;
      for (int64_t j = cuts.get()[range]; out.winners && j < cuts.get()[range + 1]; ++j)
        clear_winners(p, out, block, j);
      for (int64_t j = cuts.get()[range]; j < cuts.get()[range + 1]; ++j) sweep.add(j, j, j * p.queries.T);
      sweep.flush();
    };
    run_stages(parallel, 2, stages, task);
  }
}

template <class C, class S>
void forward_pairs(const MaxSimProblem& p, const MaxSimForward& out, const Parallel& parallel) {
  const auto tokens_of = [&](int64_t e) {
    const int64_t j = p.pair_documents[e];
    return p.documents.offsets[j + 1] - p.documents.offsets[j];
  };
  const auto another_query = [&](int64_t e) { return p.pair_queries[e] != p.pair_queries[e + 1]; };
  Buffer<int64_t> cuts;
  const int64_t tasks = cut(p.pairs, kTaskTokens, cuts, tokens_of, another_query);
  const std::unique_ptr<QueryBlock<C, S>[]> blocks(new QueryBlock<C, S>[parallel.threads]);
  const std::unique_ptr<DocumentSweep<C, S>[]> sweeps(new DocumentSweep<C, S>[parallel.threads]);
  auto task = [&](int64_t index, int thread) {
    const int64_t begin = cuts.get()[index], query = p.pair_queries[begin];
    blocks[thread].take(p, query, query + 1);
    blocks[thread].list(p);
    for (int64_t k = 0; k < blocks[thread].packings(); ++k) blocks[thread].pack(p, k);
    sweeps[thread].begin(p, out, blocks[thread]);
    const int64_t row = p.longest_query * p.k;
    if (out.winners) std::fill(out.winners + begin * row, out.winners + cuts.get()[index + 1] * row, -1);
    for (int64_t e = begin; e < cuts.get()[index + 1]; ++e) {
      sweeps[thread].add(p.pair_documents[e], e, e * p.longest_query);
    }
    sweeps[thread].flush();
  };
  run_parallel(parallel.run, tasks, task);
}

template <class C, class S>
void maxsim_forward(const MaxSimProblem& p, const MaxSimForward& out, const Parallel& parallel) {
  return p.paired ? forward_pairs<C, S>(p, out, parallel) : forward_all<C, S>(p, out, parallel);
}

void maxsim_forward_any(const MaxSimProblem& p, const MaxSimForward& out, const Parallel& parallel) {
  for_type(
      p.dtype, [&](auto c, auto s) { maxsim_forward<decltype(c), decltype(s)>(p, out, parallel); },
      [&] { LEVEL_BELOW::maxsim().forward(p, out, parallel); });
}
void maxsim_backward_any(const MaxSimProblem& p, const MaxSimBackward& gradients, const Parallel& parallel) {
  for_type(
      p.dtype, [&](auto c, auto s) { maxsim_backward<decltype(c), decltype(s)>(p, gradients, parallel); },
      [&] { LEVEL_BELOW::maxsim().backward(p, gradients, parallel); });
}

}  // namespace

MaxSim maxsim() { return {maxsim_forward_any, maxsim_backward_any}; }

}  // namespace LEVEL
}  // namespace contrastive_ops
