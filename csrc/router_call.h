// A call of a router: what its tensors must be, and where the results go; shared by contrastive_ops._C and ._eager.
//
// `Host` is of either: Tensor, an Array that keeps its memory, with contiguous() and rows_contiguous(); empty and zeros
// of them; the functions of the CPU; threads(size, few), which are one where there are fewer than so many numbers; and
// run(work), which calls without the interpreter's lock.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "array.h"
#include "cpu/expert_losses.h"
#include "expert_routing.h"

namespace contrastive_ops {
namespace {

// Products and sums of a few sizes below it do not overflow.
constexpr int64_t kMostCells = INT64_MAX / 16;
// Less than so many take less time than it takes to wake another thread; who works changes no result.
constexpr int64_t kFewLogits = 1 << 15, kFewNumbers = 1 << 18;

template <class Host>
using TensorOf = typename Host::Tensor;

// Numbers that address memory.
template <class Host>
void check_range(const Array& index, int64_t low, int64_t high, const char* name) {
  constexpr int64_t kPart = 1 << 13;
  struct Numbers {
    const int64_t* at;
    int64_t count, low, high;
    std::atomic<bool> outside{false};
  } numbers{index.as<int64_t>(), index.numel(), low, high};
  const auto look = [](void* context, int64_t part, int) {
    Numbers& n = *static_cast<Numbers*>(context);
    bool outside = false;  // found without a branch, and only then told
    for (int64_t e = part * kPart; e < std::min(n.count, (part + 1) * kPart); ++e)
      outside |= static_cast<uint64_t>(n.at[e]) - static_cast<uint64_t>(n.low) >= static_cast<uint64_t>(n.high - n.low);
    if (outside) n.outside = true;
  };
  Host::threads(numbers.count, kFewLogits).run((numbers.count + kPart - 1) / kPart, look, &numbers);
  for (int64_t e = 0; numbers.outside && e < numbers.count; ++e) {
    const int64_t number = numbers.at[e];
    CHECK_VALUE(number >= low && number < high, name, " must be in [", low, ", ", high, "), got ", number);
  }
}

template <class Host>
TensorOf<Host> experts_of(const TensorOf<Host>& experts, int64_t T, int64_t k, int64_t E) {
  TensorOf<Host> contiguous = shaped(experts, {T, k}, Type::int64, "experts");
  if (contiguous) check_range<Host>(contiguous, -1, E, "experts");
  return contiguous;
}

template <class Tensor>
struct RouterInputs {
  Tensor logits, noise, bias, allowed, segment, valid;
};

// Tensors that a RouterProblem points into live as long as this.
template <class Host>
struct Router {
  using Tensor = TensorOf<Host>;
  Tensor logits, noise, bias, allowed, segment, valid;
  RouterProblem raw{};

  Router(const RouterInputs<Tensor>& in, const Integers& spec, double sigma) {
    CHECK_VALUE(in.logits.dims == 2 && spec.size == 8, "logits must be a matrix, and spec eight integers");
    check_on_cpu(in.logits, "logits");
    logits = in.logits.rows_contiguous();
    const int64_t T = logits.size(0), E = logits.size(1);
    noise = shaped(in.noise, {T, E}, type(), "noise");
    bias = shaped(in.bias, {E}, type(), "bias");
    segment = shaped(in.segment, {T}, Type::int64, "segment");
    valid = shaped(in.valid, {T}, Type::boolean, "valid");
    if (in.allowed) {
      check_array(in.allowed, {T, E}, Type::boolean, "allowed");
      check_on_cpu(in.allowed, "allowed");
      allowed = in.allowed;
      raw.allowed = allowed.template as<bool>();
      raw.allowed_row_stride = allowed.stride(0);
      raw.allowed_stride = allowed.stride(1);
    }
    raw.dtype = dtype_of(logits);
    raw.T = T;
    raw.E = E;
    raw.logits = logits.data;
    raw.logits_stride = logits.stride(0);
    raw.noise = noise.data;
    raw.sigma = sigma;
    raw.bias = bias.data;
    raw.k = spec.data[0];
    raw.score = static_cast<RouterScore>(spec.data[1]);
    raw.renormalize = spec.data[2] != 0;
    raw.expert_groups = spec.data[3];
    raw.kept_groups = spec.data[4];
    raw.group_score = static_cast<GroupScore>(spec.data[5]);
    raw.segments = spec.data[6];
    raw.load = spec.data[7] != 0;
    CHECK_VALUE(raw.k >= 1 && raw.k <= E && raw.segments >= 1, "k must be in [1, ", E, "], got ", raw.k);
    CHECK_VALUE(raw.segments <= kMostCells / std::max<int64_t>(E, 1), "segments must be fewer, got ", raw.segments);
    CHECK_VALUE(raw.expert_groups >= 1 && E % raw.expert_groups == 0, "groups must divide the experts");
    CHECK_VALUE(raw.kept_groups >= 1 && raw.kept_groups <= raw.expert_groups, "kept groups must be in [1, ",
                raw.expert_groups, "], got ", raw.kept_groups);
    CHECK_VALUE((spec.data[1] & ~int64_t{1}) == 0 && (spec.data[5] & ~int64_t{1}) == 0, "scores must be 0 or 1, got ",
                spec.data[1], " and ", spec.data[5]);
    CHECK_VALUE(!raw.load || (noise.defined() && sigma > 0), "the load needs noise");
    raw.segment = segment.template as<int64_t>();
    raw.valid = valid.template as<bool>();
    if (segment) check_range<Host>(segment, 0, raw.segments, "segments");  // labels address memory
  }
  Type type() const { return accumulator(logits.type); }
  // Calls with a number of the accumulation type.
  template <class Function>
  void with_accumulator(Function function) const {
    raw.dtype == DType::float64 ? function(0.0) : function(0.0f);
  }
};

// Allocates what RouterSlots points to but for `kept`; experts and labels address memory and have been checked.
template <class Host>
struct Slots {
  using Tensor = TensorOf<Host>;
  Tensor slots, order, offsets;
  RouterSlots raw{};

  Slots(const Tensor& experts, const Tensor& priority, const Tensor& segment, const Integers& spec) {
    CHECK_VALUE(spec.size == 5, "spec must be five integers");
    raw.T = experts.size(0);
    raw.k = experts.size(1);
    raw.E = spec.data[0];
    raw.group_size = spec.data[1];
    raw.capacity = spec.data[2];
    raw.padded = spec.data[3] != 0;
    raw.segments = spec.data[4];
    const int64_t T = raw.T, group = raw.group_size;
    CHECK_VALUE(group >= 0 && (group ? T % group == 0 : T == 0) && raw.segments >= 1, "groups must divide the tokens");
    CHECK_VALUE(!raw.padded || raw.capacity >= 0, "the padded layout needs a capacity");
    const int64_t groups = group ? T / group : 1, few = kMostCells / std::max<int64_t>({groups, raw.segments, 1});
    CHECK_VALUE(raw.E >= 0 && raw.E <= few, "experts, groups and segments must be fewer, got ", raw.E, " experts");
    if (!raw.padded) raw.capacity = std::min(raw.capacity, T);  // no expert has more
    CHECK_VALUE(raw.capacity <= few / std::max<int64_t>(raw.E, 1), "capacity must be less, got ", raw.capacity);
    const int64_t places = raw.E * groups * std::max<int64_t>(raw.capacity, 0);  // without one below 0
    raw.rows = raw.capacity < 0 ? T * raw.k : raw.padded ? places : std::min(T * raw.k, places);
    slots = Host::empty({T, raw.k}, Type::int64);
    order = Host::empty({raw.rows}, Type::int64);
    offsets = Host::empty({raw.E + 1}, Type::int64);
    raw.dtype = priority ? dtype_of(priority) : DType::float32;
    raw.experts = experts.template as<int64_t>();
    raw.priority = priority.data;
    raw.segment = segment.template as<int64_t>();
    raw.slots = slots.template as<int64_t>();
    raw.order = order.template as<int64_t>();
    raw.offsets = offsets.template as<int64_t>();
  }
};

// How many values losses of four integers each have.
int64_t size_of_losses(const Integers& losses, int64_t segments) {
  int64_t size = 0;
  for (int64_t at = 1; at < losses.size; at += 4) size += losses.data[at] ? 1 : segments;
  return size;
}

template <class Host>
RouterLosses losses_of(const Router<Host>& p, const Array& sums, const Array& counts, const Integers& losses,
                       const Doubles& numbers) {
  const int64_t E = p.raw.E, S = p.raw.segments;
  CHECK_VALUE(sums.is_contiguous() && sums.type == p.type() && counts.is_contiguous() && counts.type == Type::int64 &&
                  sums.device == kOnCpu && counts.device == kOnCpu && sums.numel() == 3 * S * (E + 1) &&
                  counts.numel() == S * (2 * E + 1),
              "sums and counts must be those of the scores");
  int64_t given = 0;
  for (int64_t at = 0; at + 3 < losses.size; at += 4) {
    const int64_t* loss = losses.data + at;
    const int64_t n = loss[1] ? 1 : S, weights = loss[2], thresholds = loss[3];
    CHECK_VALUE(loss[0] >= 0 && loss[0] < 6 && (weights == 1 || weights == n) &&
                    (thresholds == 0 || thresholds == 1 || thresholds == n),
                "each loss must be four integers");
    given += weights + thresholds;
  }
  CHECK_VALUE(losses.size % 4 == 0 && given == numbers.size, "losses must be described");
  return {E, S, losses.size / 4, p.raw.noise != nullptr, sums.data, counts.as<int64_t>(), losses.data, numbers.data};
}

template <class Tensor>
struct RouterResults {
  Tensor experts, gates, slots, order, offsets, values, total, sums, counts;
};

// What of a call is no tensor.
struct RouterRules {
  Integers spec;
  double sigma;
  Integers losses;
  Doubles numbers;
};

template <class Host>
RouterResults<TensorOf<Host>> routed(const RouterInputs<TensorOf<Host>>& in, const TensorOf<Host>& given,
                                     const RouterRules& rules, const Integers& places, bool by_gate) {
  using Tensor = TensorOf<Host>;
  const Router<Host> p(in, rules.spec, rules.sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments, cells = S * E;
  CHECK_VALUE(places.size == 5 && places.data[0] == E && places.data[4] == S, "places must be those of the scores");
  const Tensor listed = experts_of<Host>(given, T, k, E);
  const Tensor experts = Host::empty({T, k}, Type::int64), counts = Host::empty({2 * cells + S}, Type::int64);
  const Tensor gates = Host::empty({T, k}, p.type()), priority = Host::empty({T}, p.type());
  const Tensor sums = Host::empty({3 * (cells + S)}, p.type()), total = Host::empty({}, p.type());
  const Tensor values = Host::empty({size_of_losses(rules.losses, S)}, p.type());
  Slots<Host> s(experts, by_gate ? priority : Tensor(), p.segment, places);
  const RouterLosses l = losses_of(p, sums, counts, rules.losses, rules.numbers);
  const ExpertRouting functions = Host::functions();
  p.with_accumulator([&](auto zero) {
    using A = decltype(zero);
    A* to = sums.template as<A>();
    int64_t* count = counts.template as<int64_t>();
    s.raw.kept = count + cells;
    const RouterScores out{listed.template as<int64_t>(),
                           experts.template as<int64_t>(),
                           gates.data,
                           priority.data,
                           to,
                           to + 3 * cells,
                           count,
                           count + 2 * cells,
                           to + 3 * cells + 2 * S};
    Host::run([&] {
      const Parallel threads = Host::threads(T * E, kFewLogits);
      functions.scores(p.raw, out, threads);
      functions.slots(s.raw, threads);
      RouterBalance<A>(l).forward(values.template as<A>(), total.template as<A>());
    });
  });
  return {experts, gates, s.slots, s.order, s.offsets, values, total, sums, counts};
}

// What arrives at gates, values and total; each may be none.
template <class Tensor>
struct RouterUpstream {
  Tensor gates, values, total;
};

// The gradient by the logits, in the accumulation type.
template <class Host>
TensorOf<Host> routed_backward(const RouterInputs<TensorOf<Host>>& in, const RouterRules& rules,
                               const TensorOf<Host>& experts, const Array& sums, const Array& counts,
                               const RouterUpstream<TensorOf<Host>>& upstream) {
  using Tensor = TensorOf<Host>;
  const Router<Host> p(in, rules.spec, rules.sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments, cells = S * E;
  const Tensor listed = experts_of<Host>(experts, T, k, E);
  const RouterLosses l = losses_of(p, sums, counts, rules.losses, rules.numbers);
  const Tensor gates =
      upstream.gates ? shaped(upstream.gates, {T, k}, p.type(), "d_gates") : Host::zeros({T, k}, p.type());
  const Tensor values = shaped(upstream.values, {size_of_losses(rules.losses, S)}, p.type(), "d_values");
  const Tensor total = shaped(upstream.total, {}, p.type(), "d_total"), dlogits = Host::empty({T, E}, p.type());
  const ExpertRouting functions = Host::functions();
  p.with_accumulator([&](auto zero) {
    using A = decltype(zero);
    std::vector<A> slopes(3 * cells + 2 * S);
    A* of_totals = slopes.data() + 3 * cells;
    const RouterGradients g{listed.template as<int64_t>(), gates.data, slopes.data(), of_totals, dlogits.data};
    Host::run([&] {
      RouterBalance<A>(l).backward(values.template as<A>(), total.template as<A>(), slopes.data(), of_totals);
      functions.scores_backward(p.raw, g, Host::threads(T * E, kFewLogits));
    });
  });
  return dlogits;
}

}  // namespace
}  // namespace contrastive_ops
