// Part of bindings.cpp: the functions of expert_routing.
#pragma once

#include "bindings_similarity_problem.h"
#include "cpu/expert_losses.h"
#include "expert_routing.h"

namespace contrastive_ops {
namespace {

// Products and sums of a few sizes below it do not overflow.
constexpr int64_t kMostCells = INT64_MAX / 16;

void check_range(const Tensor& index, int64_t low, int64_t high, const char* name) {
  const int64_t *at = index.as<int64_t>(), count = index.numel();
  bool outside = false;  // found without a branch, and only then told
  for (int64_t e = 0; e < count; ++e)
    outside |= static_cast<uint64_t>(at[e]) - static_cast<uint64_t>(low) >= static_cast<uint64_t>(high - low);
  for (int64_t e = 0; outside && e < count; ++e) {
    CHECK_VALUE(at[e] >= low && at[e] < high, name, " must be in [", low, ", ", high, "), got ", at[e]);
  }
}

// TensorList that a RouterProblem points into live as long as this.
struct Router {
  Tensor logits, noise, bias, allowed, segment, valid;
  RouterProblem raw{};

  Router(const Tensor& logits_in, const Tensor& noise_in, const Tensor& bias_in, const Tensor& allowed_in,
         const Tensor& segment_in, const Tensor& valid_in, const Integers& spec, double sigma) {
    CHECK_VALUE(logits_in.dims == 2 && spec.size == 8, "logits must be a matrix, and spec eight integers");
    check_on_cpu(logits_in, "logits");
    logits = logits_in.rows_contiguous();
    const int64_t T = logits.size(0), E = logits.size(1);
    noise = shaped(noise_in, {T, E}, type(), "noise");
    bias = shaped(bias_in, {E}, type(), "bias");
    segment = shaped(segment_in, {T}, Type::int64, "segment");
    valid = shaped(valid_in, {T}, Type::boolean, "valid");
    if (allowed_in) {
      check_array(allowed_in, {T, E}, Type::boolean, "allowed");
      check_on_cpu(allowed_in, "allowed");
      allowed = allowed_in;
      raw.allowed = allowed.as<bool>();
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
    raw.segment = segment.as<int64_t>();
    raw.valid = valid.as<bool>();
    if (segment) check_range(segment, 0, raw.segments, "segments");  // labels address memory
  }
  Type type() const { return accumulator(logits.type); }
  // Calls with a number of the accumulation type.
  template <class Function>
  void with_accumulator(Function function) const {
    raw.dtype == DType::float64 ? function(0.0) : function(0.0f);
  }
};

// Less than so many take less time than it takes to wake another thread; who works changes no result.
constexpr int64_t kFewLogits = 1 << 15, kFewNumbers = 1 << 18;
Parallel parallel_for(int64_t size, int64_t few) { return size < few ? one_thread() : parallel(); }

Tensor experts_of(const Tensor& experts, int64_t T, int64_t k, int64_t E) {
  Tensor contiguous = shaped(experts, {T, k}, Type::int64, "experts");
  if (contiguous) check_range(contiguous, -1, E, "experts");
  return contiguous;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_routing_scores(
    const Tensor& logits, const Optional& noise, const Optional& bias, const Optional& allowed, const Optional& given,
    const Optional& segment, const Optional& valid, const Integers& spec, double sigma) {
  const Router p(logits, noise, bias, allowed, segment, valid, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments;
  const Tensor listed = experts_of(given, T, k, E);
  const Tensor experts = empty({T, k}, Type::int64), choices = empty({S, E}, Type::int64);
  const Tensor tokens = empty({S}, Type::int64), gates = empty({T, k}, p.type()), priority = empty({T}, p.type());
  const Tensor sums = empty({3, S, E}, p.type()), totals = empty({2, S}, p.type()), margin = empty({S}, p.type());
  run_on(parallel_for(T * E, kFewLogits), expert_routing_cpu().scores, p.raw,
         RouterScores{listed.as<int64_t>(), experts.as<int64_t>(), gates.data, priority.data, sums.data, totals.data,
                      choices.as<int64_t>(), tokens.as<int64_t>(), margin.data});
  return {experts, gates, priority, sums, totals, choices, tokens, margin};
}

Tensor expert_routing_scores_backward(const Tensor& logits, const Optional& noise, const Optional& bias,
                                      const Optional& allowed, const Optional& segment, const Optional& valid,
                                      const Integers& spec, double sigma, const Tensor& experts, const Tensor& d_gates,
                                      const Tensor& d_sums, const Tensor& d_totals) {
  const Router p(logits, noise, bias, allowed, segment, valid, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments;
  const Tensor listed = experts_of(experts, T, k, E), gates = shaped(d_gates, {T, k}, p.type(), "d_gates");
  const Tensor sums = shaped(d_sums, {3, S, E}, p.type(), "d_sums");
  const Tensor totals = shaped(d_totals, {2, S}, p.type(), "d_totals"), dlogits = empty({T, E}, p.type());
  run_on(parallel_for(T * E, kFewLogits), expert_routing_cpu().scores_backward, p.raw,
         RouterGradients{listed.as<int64_t>(), gates.data, sums.data, totals.data, dlogits.data});
  return dlogits;
}

// Allocates what RouterSlots points to but for `kept`; experts and labels address memory and have been checked.
struct Slots {
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
    slots = empty({T, raw.k}, Type::int64);
    order = empty({raw.rows}, Type::int64);
    offsets = empty({raw.E + 1}, Type::int64);
    raw.dtype = priority ? dtype_of(priority) : DType::float32;
    raw.experts = experts.as<int64_t>();
    raw.priority = priority.data;
    raw.segment = segment.as<int64_t>();
    raw.slots = slots.as<int64_t>();
    raw.order = order.as<int64_t>();
    raw.offsets = offsets.as<int64_t>();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_routing_slots(const Tensor& experts, const Optional& priority,
                                                                const Optional& segment, const Integers& spec) {
  CHECK_VALUE(experts.dims == 2 && spec.size == 5, "experts must be a matrix, and spec five integers");
  const int64_t T = experts.size(0), E = spec.data[0], S = spec.data[4];
  const Tensor listed = experts_of(experts, T, experts.size(1), E);
  const Tensor first = shaped(priority, {T}, accumulator(priority.type), "priority");
  const Tensor label = shaped(segment, {T}, Type::int64, "segments");
  if (label) check_range(label, 0, S, "segments");
  Slots s(listed, first, label, spec);
  const Tensor kept = empty({S, E}, Type::int64);
  s.raw.kept = kept.as<int64_t>();
  run_on(parallel_for(T * E, kFewLogits), expert_routing_cpu().slots, s.raw);
  return {s.slots, s.order, s.offsets, kept};
}

// How many values losses of four integers each have.
int64_t size_of_losses(const Integers& losses, int64_t segments) {
  int64_t size = 0;
  for (int64_t at = 1; at < losses.size; at += 4) size += losses.data[at] ? 1 : segments;
  return size;
}

RouterLosses losses_of(const Router& p, const Tensor& sums, const Tensor& counts, const Integers& losses,
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_routing_route(
    const Tensor& logits, const Optional& noise, const Optional& bias, const Optional& allowed, const Optional& given,
    const Optional& segment, const Optional& valid, const Integers& spec, double sigma, const Integers& places,
    bool by_gate, const Integers& losses, const Doubles& numbers) {
  const Router p(logits, noise, bias, allowed, segment, valid, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments, cells = S * E;
  CHECK_VALUE(places.size == 5 && places.data[0] == E && places.data[4] == S, "places must be those of the scores");
  const Tensor listed = experts_of(given, T, k, E);
  const Tensor experts = empty({T, k}, Type::int64), counts = empty({2 * cells + S}, Type::int64);
  const Tensor gates = empty({T, k}, p.type()), priority = empty({T}, p.type());
  const Tensor sums = empty({3 * (cells + S)}, p.type());
  const Tensor values = empty({size_of_losses(losses, S)}, p.type()), total = empty({}, p.type());
  Slots s(experts, by_gate ? priority : Tensor(), p.segment, places);
  const RouterLosses l = losses_of(p, sums, counts, losses, numbers);
  const ExpertRouting functions = expert_routing_cpu();
  p.with_accumulator([&](auto zero) {
    using A = decltype(zero);
    A* to = sums.as<A>();
    int64_t* count = counts.as<int64_t>();
    s.raw.kept = count + cells;
    const RouterScores out{
        listed.as<int64_t>(), experts.as<int64_t>(), gates.data, priority.data, to, to + 3 * cells, count,
        count + 2 * cells,    to + 3 * cells + 2 * S};
    const auto all = [&](const Parallel& threads) {
      functions.scores(p.raw, out, threads);
      functions.slots(s.raw, threads);
      RouterBalance<A>(l).forward(values.as<A>(), total.as<A>());
    };
    run_on(parallel_for(T * E, kFewLogits), all);
  });
  return {experts, gates, s.slots, s.order, s.offsets, values, total, sums, counts};
}

Tensor expert_routing_route_backward(const Tensor& logits, const Optional& noise, const Optional& bias,
                                     const Optional& allowed, const Optional& segment, const Optional& valid,
                                     const Integers& spec, double sigma, const Integers& losses, const Doubles& numbers,
                                     const Tensor& experts, const Tensor& sums, const Tensor& counts,
                                     const Optional& d_gates, const Optional& d_values, const Optional& d_total) {
  const Router p(logits, noise, bias, allowed, segment, valid, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments, cells = S * E;
  const Tensor listed = experts_of(experts, T, k, E);
  const RouterLosses l = losses_of(p, sums, counts, losses, numbers);
  const Tensor gates = d_gates ? shaped(d_gates, {T, k}, p.type(), "d_gates") : zeros({T, k}, p.type());
  const Tensor values = shaped(d_values, {size_of_losses(losses, S)}, p.type(), "d_values");
  const Tensor total = shaped(d_total, {}, p.type(), "d_total"), dlogits = empty({T, E}, p.type());
  const ExpertRouting functions = expert_routing_cpu();
  p.with_accumulator([&](auto zero) {
    using A = decltype(zero);
    std::vector<A> slopes(3 * cells + 2 * S);
    A* of_totals = slopes.data() + 3 * cells;
    const RouterGradients g{listed.as<int64_t>(), gates.data, slopes.data(), of_totals, dlogits.data};
    const auto all = [&](const Parallel& threads) {
      RouterBalance<A>(l).backward(values.as<A>(), total.as<A>(), slopes.data(), of_totals);
      functions.scores_backward(p.raw, g, threads);
    };
    run_on(parallel_for(T * E, kFewLogits), all);
  });
  return dlogits;
}

// What the three functions that move rows have in common; slots and order address memory.
struct Rows {
  Tensor from, other, gates, slots, order;
  RouterRows raw{};

  Rows(const Tensor& from_in, const Tensor& gates_in, const Tensor& slots_in, const Tensor& order_in) {
    CHECK_VALUE(from_in.dims == 2 && slots_in.dims == 2 && order_in.dims == 1, "rows must be matrices");
    check_on_cpu(from_in, "rows");
    from = from_in.contiguous();
    slots = shaped(slots_in, slots_in.shape(), Type::int64, "slots");
    order = shaped(order_in, order_in.shape(), Type::int64, "order");
    raw.dtype = dtype_of(from);
    raw.T = slots.size(0);
    raw.k = slots.size(1);
    raw.R = order.size(0);
    raw.D = from.size(1);
    check_range(slots, -1, raw.R, "slots");
    check_range(order, -1, raw.T * raw.k, "order");
    gates = shaped(gates_in, {raw.T, raw.k}, accumulator(from.type), "gates");
    raw.from = from.data;
    raw.gates = gates.data;
    raw.slots = slots.as<int64_t>();
    raw.order = order.as<int64_t>();
  }

  Tensor into(void (*function)(const RouterRows&, const Parallel&), const Shape& shape, Type type) {
    const Tensor to = empty(shape, type);
    raw.to = to.data;
    run_on(parallel_for(std::max(raw.R, raw.T * raw.k) * raw.D, kFewNumbers), function, raw);
    return to;
  }
};

Tensor expert_routing_dispatch(const Tensor& tokens, const Optional& gates, const Tensor& slots, const Tensor& order) {
  Rows r(tokens, gates, slots, order);
  CHECK_VALUE(r.from.size(0) == r.raw.T, "tokens must have ", r.raw.T, " rows, got ", r.from);
  return r.into(expert_routing_cpu().dispatch, {r.raw.R, r.raw.D}, r.from.type);
}

Tensor expert_routing_combine(const Tensor& rows, const Optional& gates, const Tensor& slots, const Tensor& order) {
  Rows r(rows, gates, slots, order);
  CHECK_VALUE(r.from.size(0) == r.raw.R, "rows must have ", r.raw.R, " rows, got ", r.from);
  return r.into(expert_routing_cpu().combine, {r.raw.T, r.raw.D}, r.from.type);
}

Tensor expert_routing_dots(const Tensor& tokens, const Tensor& rows, const Tensor& slots, const Tensor& order) {
  Rows r(tokens, Tensor(), slots, order);
  CHECK_VALUE(r.from.size(0) == r.raw.T, "tokens must have ", r.raw.T, " rows, got ", r.from);
  r.other = shaped(rows, {r.raw.R, r.raw.D}, r.from.type, "rows");
  r.raw.other = r.other.data;
  return r.into(expert_routing_cpu().dots, {r.raw.T, r.raw.k}, accumulator(r.from.type));
}

}  // namespace
}  // namespace contrastive_ops
