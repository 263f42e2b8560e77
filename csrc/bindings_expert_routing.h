// Part of bindings.cpp: the functions of expert_routing.
#pragma once

#include "bindings_similarity_problem.h"
#include "router_call.h"

namespace contrastive_ops {
namespace {

struct RouterHost {
  using Tensor = contrastive_ops::Tensor;
  static Tensor empty(const Shape& shape, Type type) { return contrastive_ops::empty(shape, type); }
  static Tensor zeros(const Shape& shape, Type type) { return contrastive_ops::zeros(shape, type); }
  static ExpertRouting functions() { return expert_routing_cpu(); }
  static Parallel threads(int64_t size, int64_t few) { return size < few ? one_thread() : parallel(); }
  template <class Work>
  static void run(const Work& work) {
    const WithoutGil without_gil;
    work();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_routing_scores(
    const Tensor& logits, const Optional& noise, const Optional& bias, const Optional& allowed, const Optional& given,
    const Optional& segment, const Optional& valid, const Integers& spec, double sigma) {
  const Router<RouterHost> p({logits, noise, bias, allowed, segment, valid}, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments;
  const Tensor listed = experts_of<RouterHost>(given, T, k, E);
  const Tensor experts = empty({T, k}, Type::int64), choices = empty({S, E}, Type::int64);
  const Tensor tokens = empty({S}, Type::int64), gates = empty({T, k}, p.type()), priority = empty({T}, p.type());
  const Tensor sums = empty({3, S, E}, p.type()), totals = empty({2, S}, p.type()), margin = empty({S}, p.type());
  run_on(RouterHost::threads(T * E, kFewLogits), expert_routing_cpu().scores, p.raw,
         RouterScores{listed.as<int64_t>(), experts.as<int64_t>(), gates.data, priority.data, sums.data, totals.data,
                      choices.as<int64_t>(), tokens.as<int64_t>(), margin.data});
  return {experts, gates, priority, sums, totals, choices, tokens, margin};
}

Tensor expert_routing_scores_backward(const Tensor& logits, const Optional& noise, const Optional& bias,
                                      const Optional& allowed, const Optional& segment, const Optional& valid,
                                      const Integers& spec, double sigma, const Tensor& experts, const Tensor& d_gates,
                                      const Tensor& d_sums, const Tensor& d_totals) {
  const Router<RouterHost> p({logits, noise, bias, allowed, segment, valid}, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments;
  const Tensor listed = experts_of<RouterHost>(experts, T, k, E), gates = shaped(d_gates, {T, k}, p.type(), "d_gates");
  const Tensor sums = shaped(d_sums, {3, S, E}, p.type(), "d_sums");
  const Tensor totals = shaped(d_totals, {2, S}, p.type(), "d_totals"), dlogits = empty({T, E}, p.type());
  run_on(RouterHost::threads(T * E, kFewLogits), expert_routing_cpu().scores_backward, p.raw,
         RouterGradients{listed.as<int64_t>(), gates.data, sums.data, totals.data, dlogits.data});
  return dlogits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_routing_slots(const Tensor& experts, const Optional& priority,
                                                                const Optional& segment, const Integers& spec) {
  CHECK_VALUE(experts.dims == 2 && spec.size == 5, "experts must be a matrix, and spec five integers");
  const int64_t T = experts.size(0), E = spec.data[0], S = spec.data[4];
  const Tensor listed = experts_of<RouterHost>(experts, T, experts.size(1), E);
  const Tensor first = shaped(priority, {T}, accumulator(priority.type), "priority");
  const Tensor label = shaped(segment, {T}, Type::int64, "segments");
  if (label) check_range<RouterHost>(label, 0, S, "segments");
  Slots<RouterHost> s(listed, first, label, spec);
  const Tensor kept = empty({S, E}, Type::int64);
  s.raw.kept = kept.as<int64_t>();
  run_on(RouterHost::threads(T * E, kFewLogits), expert_routing_cpu().slots, s.raw);
  return {s.slots, s.order, s.offsets, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_routing_route(
    const Tensor& logits, const Optional& noise, const Optional& bias, const Optional& allowed, const Optional& given,
    const Optional& segment, const Optional& valid, const Integers& spec, double sigma, const Integers& places,
    bool by_gate, const Integers& losses, const Doubles& numbers) {
  const auto r = routed<RouterHost>({logits, noise, bias, allowed, segment, valid}, given,
                                    {spec, sigma, losses, numbers}, places, by_gate);
  return {r.experts, r.gates, r.slots, r.order, r.offsets, r.values, r.total, r.sums, r.counts};
}

Tensor expert_routing_route_backward(const Tensor& logits, const Optional& noise, const Optional& bias,
                                     const Optional& allowed, const Optional& segment, const Optional& valid,
                                     const Integers& spec, double sigma, const Integers& losses, const Doubles& numbers,
                                     const Tensor& experts, const Tensor& sums, const Tensor& counts,
                                     const Optional& d_gates, const Optional& d_values, const Optional& d_total) {
  return routed_backward<RouterHost>({logits, noise, bias, allowed, segment, valid}, {spec, sigma, losses, numbers},
                                     experts, sums, counts, {d_gates, d_values, d_total});
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
    check_range<RouterHost>(slots, -1, raw.R, "slots");
    check_range<RouterHost>(order, -1, raw.T * raw.k, "order");
    gates = shaped(gates_in, {raw.T, raw.k}, accumulator(from.type), "gates");
    raw.from = from.data;
    raw.gates = gates.data;
    raw.slots = slots.as<int64_t>();
    raw.order = order.as<int64_t>();
  }

  Tensor into(void (*function)(const RouterRows&, const Parallel&), const Shape& shape, Type type) {
    const Tensor to = empty(shape, type);
    raw.to = to.data;
    run_on(RouterHost::threads(std::max(raw.R, raw.T * raw.k) * raw.D, kFewNumbers), function, raw);
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
