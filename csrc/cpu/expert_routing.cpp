// expert_routing on one SIMD level.
//
// Compiled once per SIMD level. What happens to one token is in
// expert_scores.h.
//
// Sums over tokens are made in parts whose length does not depend on the number of threads, and added up in order.
#include "../expert_routing.h"

#ifdef HAS_BF16_DOT
namespace contrastive_ops {
namespace LEVEL {
// Nothing here is a product of bfloat16 numbers.
ExpertRouting expert_routing() { return LEVEL_BELOW::expert_routing(); }
}  // namespace LEVEL
}  // namespace contrastive_ops
#else
#include "expert_scores.h"
#include "expert_slots.h"
#include "similarity_tile.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// ---- Scores ------------------------------------------------------------------------------------------------------

// Blocks whose sums are added up in the type of the logits before they go on in double.
constexpr int64_t kBlocksOfStrip = 32;

// Adds the lanes of `from` to `to` and clears them.
template <class A>
void move_sums(A* from, double* to, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    to[c] += static_cast<double>(lane_sum<A>(load(from + c * kLanes<A>)));
    store(from + c * kLanes<A>, Vec<A>{});
  }
}

template <class A, class S>
void router_scores(const RouterProblem& p, const RouterScores& out, const Parallel& parallel) {
  using Block = RouterBlock<A, S>;
  const int64_t step = tokens_of_part(p.T), parts = (p.T + step - 1) / step, cells = p.segments * p.E;
  // Lanes have three sums of each cell, then two totals and the margin of each segment; sums that nobody makes are not
  // touched: with very many experts they would be most of the memory. Parts have those that are made.
  const int64_t made = (p.load ? 3 : p.noise ? 2 : 1) * cells, of_totals = 3 * cells, totals = 3 * p.segments;
  const int64_t width = made + totals, lanes = of_totals + totals, count_width = cells + p.segments;
  Buffer<double> sums(parts * width);
  Buffer<int64_t> counts(parts * count_width);
  A *gates = static_cast<A*>(out.gates), *priority = static_cast<A*>(out.priority);
  auto task = [&](int64_t part, int) {
    double* sum = sums.get() + part * width;
    int64_t* count = counts.get() + part * count_width;
    std::fill(sum, sum + width, 0.0);
    std::fill(count, count + count_width, 0);
    Block block(p);
    Buffer<A> strip(lanes * kLanes<A>);
    std::fill(strip.get(), strip.get() + made * kLanes<A>, A(0));
    std::fill(strip.get() + of_totals * kLanes<A>, strip.get() + lanes * kLanes<A>, A(0));
    const auto move = [&] {
      move_sums(strip.get(), sum, made);
      move_sums(strip.get() + of_totals * kLanes<A>, sum + made, totals);
    };
    const int64_t end = minimum(p.T, (part + 1) * step);
    int64_t blocks = 0;
    for (int64_t first = part * step; first < end; first += Block::kTokens) {
      if (!block.read(first, end)) {
        const int64_t from = first * p.k, to = minimum<int64_t>(end, first + Block::kTokens) * p.k;
        std::fill(out.experts + from, out.experts + to, -1);
        std::fill(gates + from, gates + to, A(0));
        std::fill(priority + first, priority + to / p.k, A(0));
        continue;
      }
      block.score();
      out.given ? block.take(out.given, first, end) : block.choose();
      if (p.load) block.make_chances();
      block.add_to(strip.get());
      block.write(out, first, end, count);
      if (++blocks % kBlocksOfStrip == 0) move();
    }
    move();
  };
  run_parallel(parallel.run, parts, task);
  const auto add_up = [parts](auto* all, int64_t size) {
    if (parts == 0) std::fill(all, all + size, 0);
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t c = 0; c < size; ++c) all[c] += all[part * size + c];
    }
  };
  if (parts == 0) sums.allocate(width), counts.allocate(count_width);
  add_up(sums.get(), width);
  add_up(counts.get(), count_width);
  A *to_sums = static_cast<A*>(out.sums), *to_totals = static_cast<A*>(out.totals);
  const double* found = sums.get();
  for (int64_t c = 0; c < 3 * cells; ++c) to_sums[c] = c < made ? static_cast<A>(found[c]) : A(0);
  found += made;
  for (int64_t c = 0; c < 2 * p.segments; ++c) to_totals[c] = static_cast<A>(found[c]);
  for (int64_t s = 0; s < p.segments; ++s) static_cast<A*>(out.margin)[s] = static_cast<A>(found[2 * p.segments + s]);
  std::copy(counts.get(), counts.get() + cells, out.choices);
  std::copy(counts.get() + cells, counts.get() + count_width, out.tokens);
}

template <class A, class S>
void router_scores_backward(const RouterProblem& p, const RouterGradients& g, const Parallel& parallel) {
  using Block = RouterBlock<A, S>;
  constexpr int64_t step = 1024;
  const int64_t cells = p.segments * p.E;
  const A* d_chance = static_cast<const A*>(g.d_sums) + 2 * cells;
  const bool finite = std::all_of(d_chance, d_chance + cells, [](A d) { return d - d == 0; });
  auto task = [&](int64_t part, int) {
    Block block(p);
    const int64_t end = minimum(p.T, (part + 1) * step);
    for (int64_t first = part * step; first < end; first += Block::kTokens) {
      if (!block.read(first, end)) {
        const int64_t last = minimum<int64_t>(end, first + Block::kTokens);
        std::fill(static_cast<A*>(g.dlogits) + first * p.E, static_cast<A*>(g.dlogits) + last * p.E, A(0));
        continue;
      }
      block.score();
      block.take(g.experts, first, end);
      block.backward(g, first, end, finite);
    }
  };
  run_parallel(parallel.run, (p.T + step - 1) / step, task);
}

// ---- Moving rows -------------------------------------------------------------------------------------------------

// Rows of a task: enough bytes to be worth one.
INLINE int64_t rows_of_task(int64_t depth) { return maximum<int64_t>(1, 16384 / maximum<int64_t>(depth, 1)); }

template <class A, class S>
INLINE void scale_row(S* to, const S* from, A factor, int64_t depth) {
  constexpr int width = kLanes<A>;
  const int64_t whole = depth / width * width;
  for (int64_t d = 0; d < whole; d += width) store_as(to + d, Vec<A>(to_accumulator<A>(from + d) * factor));
  if (whole == depth) return;
  S tail[width] = {};
  memcpy(tail, from + whole, static_cast<size_t>(depth - whole) * sizeof(S));
  store_as(tail, Vec<A>(to_accumulator<A>(static_cast<const S*>(tail)) * factor));
  memcpy(to + whole, tail, static_cast<size_t>(depth - whole) * sizeof(S));
}

template <class A, class S>
void router_dispatch(const RouterRows& r, const Parallel& parallel) {
  const int64_t step = rows_of_task(r.D);
  auto task = [&](int64_t part, int) {
    for (int64_t row = part * step; row < minimum(r.R, (part + 1) * step); ++row) {
      S* to = static_cast<S*>(r.to) + row * r.D;
      const int64_t choice = r.order[row];
      if (choice < 0) {
        memset(to, 0, static_cast<size_t>(r.D) * sizeof(S));
        continue;
      }
      const S* from = static_cast<const S*>(r.from) + choice / r.k * r.D;
      if (r.gates) {
        scale_row<A>(to, from, static_cast<const A*>(r.gates)[choice], r.D);
      } else {
        memcpy(to, from, static_cast<size_t>(r.D) * sizeof(S));
      }
    }
  };
  run_parallel(parallel.run, (r.R + step - 1) / step, task);
}

template <class A, class S>
void router_combine(const RouterRows& r, const Parallel& parallel) {
  const int64_t step = rows_of_task(r.D);
  constexpr int width = kLanes<A>;
  auto task = [&](int64_t part, int) {
    Buffer<A> sums(round_up(r.D, width));
    for (int64_t t = part * step; t < minimum(r.T, (part + 1) * step); ++t) {
      A* sum = sums.get();
      std::fill(sum, sum + round_up(r.D, width), A(0));
      const int64_t whole = r.D / width * width;
      for (int64_t j = 0; j < r.k; ++j) {
        const int64_t slot = r.slots[t * r.k + j];
        if (slot < 0) continue;
        const S* from = static_cast<const S*>(r.from) + slot * r.D;
        const Vec<A> gate = broadcast(r.gates ? static_cast<const A*>(r.gates)[t * r.k + j] : A(1));
        for (int64_t d = 0; d < whole; d += width) store(sum + d, load(sum + d) + gate * to_accumulator<A>(from + d));
        if (whole < r.D) {
          S tail[width] = {};
          memcpy(tail, from + whole, static_cast<size_t>(r.D - whole) * sizeof(S));
          store(sum + whole, load(sum + whole) + gate * to_accumulator<A>(static_cast<const S*>(tail)));
        }
      }
      S* to = static_cast<S*>(r.to) + t * r.D;
      for (int64_t d = 0; d < whole; d += width) store_as(to + d, load(sum + d));
      if (whole < r.D) {
        S tail[width];
        store_as(tail, load(sum + whole));
        memcpy(to + whole, tail, static_cast<size_t>(r.D - whole) * sizeof(S));
      }
    }
  };
  run_parallel(parallel.run, (r.T + step - 1) / step, task);
}

template <class A, class S>
void router_dots(const RouterRows& r, const Parallel& parallel) {
  const int64_t step = rows_of_task(r.D);
  constexpr int width = kLanes<A>;
  auto task = [&](int64_t part, int) {
    for (int64_t t = part * step; t < minimum(r.T, (part + 1) * step); ++t) {
      const S* token = static_cast<const S*>(r.from) + t * r.D;
      for (int64_t j = 0; j < r.k; ++j) {
        const int64_t slot = r.slots[t * r.k + j], whole = r.D / width * width;
        A* to = static_cast<A*>(r.to) + t * r.k + j;
        *to = 0;
        if (slot < 0) continue;
        const S* row = static_cast<const S*>(r.other) + slot * r.D;
        Vec<A> sum = {};
        for (int64_t d = 0; d < whole; d += width) sum += to_accumulator<A>(token + d) * to_accumulator<A>(row + d);
        if (whole < r.D) {
          S a[width] = {}, b[width] = {};
          memcpy(a, token + whole, static_cast<size_t>(r.D - whole) * sizeof(S));
          memcpy(b, row + whole, static_cast<size_t>(r.D - whole) * sizeof(S));
          sum += to_accumulator<A>(static_cast<const S*>(a)) * to_accumulator<A>(static_cast<const S*>(b));
        }
        *to = lane_sum<A>(sum);
      }
    }
  };
  run_parallel(parallel.run, (r.T + step - 1) / step, task);
}

// ---- Types -------------------------------------------------------------------------------------------------------

#define CONTRASTIVE_OPS_ROUTING_FOR_TYPE(function, ...)        \
  switch (dtype) {                                             \
    case DType::float32:                                       \
      return function<float, float>(__VA_ARGS__, parallel);    \
    case DType::float64:                                       \
      return function<double, double>(__VA_ARGS__, parallel);  \
    case DType::bfloat16:                                      \
      return function<float, BFloat16>(__VA_ARGS__, parallel); \
    case DType::float16:                                       \
      return function<float, Half>(__VA_ARGS__, parallel);     \
  }

void router_scores_any(const RouterProblem& p, const RouterScores& out, const Parallel& parallel) {
  const DType dtype = p.dtype;
  CONTRASTIVE_OPS_ROUTING_FOR_TYPE(router_scores, p, out)
}
void router_scores_backward_any(const RouterProblem& p, const RouterGradients& g, const Parallel& parallel) {
  const DType dtype = p.dtype;
  CONTRASTIVE_OPS_ROUTING_FOR_TYPE(router_scores_backward, p, g)
}
void router_dispatch_any(const RouterRows& r, const Parallel& parallel) {
  const DType dtype = r.dtype;
  CONTRASTIVE_OPS_ROUTING_FOR_TYPE(router_dispatch, r)
}
void router_combine_any(const RouterRows& r, const Parallel& parallel) {
  const DType dtype = r.dtype;
  CONTRASTIVE_OPS_ROUTING_FOR_TYPE(router_combine, r)
}
void router_dots_any(const RouterRows& r, const Parallel& parallel) {
  const DType dtype = r.dtype;
  CONTRASTIVE_OPS_ROUTING_FOR_TYPE(router_dots, r)
}

}  // namespace

ExpertRouting expert_routing() {
  return {router_scores_any,   router_scores_backward_any, router_slots,
          router_dispatch_any, router_combine_any,         router_dots_any};
}

}  // namespace LEVEL
}  // namespace contrastive_ops
#endif
