// Part of bindings.cpp, the only file that includes it: the functions of expert_routing.
#pragma once

#include <tuple>
#include <vector>

#include "bindings_similarity_problem.h"
#include "cpu/expert_losses.h"
#include "expert_routing.h"

namespace contrastive_ops {
namespace {

// Tensors that a RouterProblem points into live as long as this.
struct Router {
  Tensor logits, noise, bias, segment, valid;
  RouterProblem raw{};

  Router(const Tensor& logits_, const OptionalTensor& noise_, const OptionalTensor& bias_,
         const OptionalTensor& allowed, const OptionalTensor& segment_, const OptionalTensor& valid_,
         const std::vector<int64_t>& spec, double sigma) {
    TORCH_CHECK_VALUE(logits_.dim() == 2 && spec.size() == 8, "logits must be a matrix, and spec eight integers");
    logits = rows_contiguous(logits_);
    const int64_t T = logits.size(0), E = logits.size(1);
    const auto shaped = [&](const OptionalTensor& t, at::IntArrayRef sizes, at::ScalarType type, const char* name) {
      if (!t) return Tensor();
      TORCH_CHECK_VALUE(t->sizes() == sizes, name, " must have shape ", sizes, ", got ", t->sizes());
      TORCH_CHECK_TYPE(t->scalar_type() == type, name, " must have dtype ", type, ", got ", t->scalar_type());
      TORCH_CHECK_VALUE(t->device().is_cpu(), name, " must be on the CPU, got ", t->device());
      return t->contiguous();
    };
    noise = shaped(noise_, {T, E}, accumulator(logits), "noise");
    bias = shaped(bias_, {E}, accumulator(logits), "bias");
    segment = shaped(segment_, {T}, at::kLong, "segment");
    valid = shaped(valid_, {T}, at::kBool, "valid");
    raw.dtype = dtype_of(logits);
    raw.T = T;
    raw.E = E;
    raw.logits = logits.data_ptr();
    raw.logits_stride = logits.stride(0);
    raw.noise = data_or_null(noise);
    raw.sigma = sigma;
    raw.bias = data_or_null(bias);
    if (allowed) {
      TORCH_CHECK_VALUE(allowed->sizes() == logits.sizes() && allowed->scalar_type() == at::kBool,
                        "allowed must be a mask like the logits");
      raw.allowed = allowed->const_data_ptr<bool>();
      raw.allowed_row_stride = allowed->stride(0);
      raw.allowed_stride = allowed->stride(1);
    }
    raw.k = spec[0];
    raw.score = static_cast<RouterScore>(spec[1]);
    raw.renormalize = spec[2] != 0;
    raw.expert_groups = spec[3];
    raw.kept_groups = spec[4];
    raw.group_score = static_cast<GroupScore>(spec[5]);
    raw.segments = spec[6];
    raw.load = spec[7] != 0;
    TORCH_CHECK_VALUE(raw.k >= 1 && raw.k <= E && raw.segments >= 1, "k must be in [1, ", E, "], got ", raw.k);
    TORCH_CHECK_VALUE(raw.expert_groups >= 1 && E % raw.expert_groups == 0, "groups must divide the experts");
    TORCH_CHECK_VALUE(!raw.load || (noise.defined() && sigma > 0), "the load needs noise");
    if (segment.defined()) {  // labels address memory
      raw.segment = segment.const_data_ptr<int64_t>();
      check_range(segment, 0, raw.segments, "segments");
    }
    if (valid.defined()) raw.valid = valid.const_data_ptr<bool>();
  }

  static void check_range(const Tensor& index, int64_t low, int64_t high, const char* name) {
    const int64_t *at = index.const_data_ptr<int64_t>(), count = index.numel();
    bool outside = false;  // found without a branch, and only then told
    for (int64_t e = 0; e < count; ++e)
      outside |= static_cast<uint64_t>(at[e] - low) >= static_cast<uint64_t>(high - low);
    for (int64_t e = 0; outside && e < count; ++e) {
      TORCH_CHECK_VALUE(at[e] >= low && at[e] < high, name, " must be in [", low, ", ", high, "), got ", at[e]);
    }
  }

  Tensor numbers(at::IntArrayRef sizes) const { return at::empty(sizes, logits.options().dtype(accumulator(logits))); }
  Tensor integers(at::IntArrayRef sizes) const { return at::empty(sizes, logits.options().dtype(at::kLong)); }
  Tensor upstream(const Tensor& t, at::IntArrayRef sizes) const {
    TORCH_CHECK_VALUE(t.sizes() == sizes && t.scalar_type() == accumulator(logits), "gradients must be like outputs");
    return t.contiguous();
  }
  // Calls with a number of the accumulation type.
  template <class Function>
  void with_accumulator(Function function) const {
    raw.dtype == DType::float64 ? function(0.0) : function(0.0f);
  }
};

// Less than so many take less time than it takes to wake another thread; who works changes no result.
constexpr int64_t kFewLogits = 1 << 15, kFewNumbers = 1 << 18;
Parallel parallel_for(int64_t size, int64_t few) { return size < few ? Parallel{run_in_order, 1} : parallel(); }

Tensor experts_of(const Tensor& experts, int64_t T, int64_t k, int64_t E) {
  TORCH_CHECK_VALUE(experts.dim() == 2 && experts.size(0) == T && experts.size(1) == k, "experts must have shape (", T,
                    ", ", k, "), got ", experts.sizes());
  TORCH_CHECK_TYPE(experts.scalar_type() == at::kLong, "experts must be int64, got ", experts.scalar_type());
  Tensor contiguous = experts.contiguous();
  Router::check_range(contiguous, -1, E, "experts");
  return contiguous;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_routing_scores(
    const Tensor& logits, const OptionalTensor& noise, const OptionalTensor& bias, const OptionalTensor& allowed,
    const OptionalTensor& given, const OptionalTensor& segment, const OptionalTensor& valid,
    const std::vector<int64_t>& spec, double sigma) {
  const Router p(logits, noise, bias, allowed, segment, valid, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments;
  const Tensor listed = given ? experts_of(*given, T, k, E) : Tensor();
  Tensor experts = p.integers({T, k}), choices = p.integers({S, E}), tokens = p.integers({S});
  Tensor gates = p.numbers({T, k}), priority = p.numbers({T}), sums = p.numbers({3, S, E});
  Tensor totals = p.numbers({2, S}), margin = p.numbers({S});
  const RouterScores out{listed.defined() ? listed.const_data_ptr<int64_t>() : nullptr,
                         experts.data_ptr<int64_t>(),
                         gates.data_ptr(),
                         priority.data_ptr(),
                         sums.data_ptr(),
                         totals.data_ptr(),
                         choices.data_ptr<int64_t>(),
                         tokens.data_ptr<int64_t>(),
                         margin.data_ptr()};
  {
    pybind11::gil_scoped_release release;
    expert_routing_cpu().scores(p.raw, out, parallel_for(T * E, kFewLogits));
  }
  return {experts, gates, priority, sums, totals, choices, tokens, margin};
}

Tensor expert_routing_scores_backward(const Tensor& logits, const OptionalTensor& noise, const OptionalTensor& bias,
                                      const OptionalTensor& allowed, const OptionalTensor& segment,
                                      const OptionalTensor& valid, const std::vector<int64_t>& spec, double sigma,
                                      const Tensor& experts, const Tensor& d_gates, const Tensor& d_sums,
                                      const Tensor& d_totals) {
  const Router p(logits, noise, bias, allowed, segment, valid, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments;
  const Tensor listed = experts_of(experts, T, k, E);
  const Tensor gates = p.upstream(d_gates, {T, k}), sums = p.upstream(d_sums, {3, S, E}),
               totals = p.upstream(d_totals, {2, S});
  Tensor dlogits = p.numbers({T, E});
  const RouterGradients g{listed.const_data_ptr<int64_t>(), gates.data_ptr(), sums.data_ptr(), totals.data_ptr(),
                          dlogits.data_ptr()};
  {
    pybind11::gil_scoped_release release;
    expert_routing_cpu().scores_backward(p.raw, g, parallel_for(T * E, kFewLogits));
  }
  return dlogits;
}

// Allocates what RouterSlots points to but for `kept`; experts and labels address memory and have been checked.
struct Slots {
  Tensor slots, order, offsets;
  RouterSlots raw{};

  Slots(const Tensor& experts, const Tensor& priority, const Tensor& segment, const std::vector<int64_t>& spec) {
    TORCH_CHECK_VALUE(spec.size() == 5, "spec must be five integers");
    raw.T = experts.size(0);
    raw.k = experts.size(1);
    raw.E = spec[0];
    raw.group_size = spec[1];
    raw.capacity = spec[2];
    raw.padded = spec[3] != 0;
    raw.segments = spec[4];
    const int64_t T = raw.T, group = raw.group_size;
    TORCH_CHECK_VALUE(group >= 0 && (group ? T % group == 0 : T == 0) && raw.segments >= 1,
                      "groups must divide the tokens");
    TORCH_CHECK_VALUE(!raw.padded || raw.capacity >= 0, "the padded layout needs a capacity");
    const int64_t places = raw.E * (group ? T / group : 1) * raw.capacity;
    raw.rows = raw.capacity < 0 ? T * raw.k : raw.padded ? places : std::min(T * raw.k, places);
    slots = at::empty_like(experts);
    order = at::empty({raw.rows}, experts.options());
    offsets = at::empty({raw.E + 1}, experts.options());
    raw.dtype = priority.defined() ? dtype_of(priority) : DType::float32;
    raw.experts = experts.const_data_ptr<int64_t>();
    raw.priority = data_or_null(priority);
    raw.segment = segment.defined() ? segment.const_data_ptr<int64_t>() : nullptr;
    raw.slots = slots.data_ptr<int64_t>();
    raw.order = order.data_ptr<int64_t>();
    raw.offsets = offsets.data_ptr<int64_t>();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_routing_slots(const Tensor& experts, const OptionalTensor& priority,
                                                                const OptionalTensor& segment,
                                                                const std::vector<int64_t>& spec) {
  TORCH_CHECK_VALUE(experts.dim() == 2 && spec.size() == 5, "experts must be a matrix, and spec five integers");
  const int64_t T = experts.size(0), E = spec[0], S = spec[4];
  const Tensor listed = experts_of(experts, T, experts.size(1), E);
  Tensor first, label;
  if (priority) first = vector_of(priority, T, accumulator(*priority), "priority");
  if (segment) {
    label = vector_of(segment, T, at::kLong, "segments");
    Router::check_range(label, 0, S, "segments");
  }
  Slots s(listed, first, label, spec);
  Tensor kept = at::empty({S, E}, listed.options());
  s.raw.kept = kept.data_ptr<int64_t>();
  {
    pybind11::gil_scoped_release release;
    expert_routing_cpu().slots(s.raw, parallel_for(T * E, kFewLogits));
  }
  return {s.slots, s.order, s.offsets, kept};
}

RouterLosses losses_of(const Router& p, const Tensor& sums, const Tensor& counts, const std::vector<int64_t>& losses,
                       const std::vector<double>& numbers) {
  const int64_t E = p.raw.E, S = p.raw.segments;
  TORCH_CHECK_VALUE(sums.is_contiguous() && sums.scalar_type() == accumulator(p.logits) && counts.is_contiguous() &&
                        counts.scalar_type() == at::kLong && sums.numel() == 3 * S * (E + 1) &&
                        counts.numel() == S * (2 * E + 1),
                    "sums and counts must be those of the scores");
  int64_t given = 0;
  for (size_t at = 0; at + 3 < losses.size(); at += 4) {
    const int64_t n = losses[at + 1] ? 1 : S, weights = losses[at + 2], thresholds = losses[at + 3];
    TORCH_CHECK_VALUE(losses[at] >= 0 && losses[at] < 6 && (weights == 1 || weights == n) &&
                          (thresholds == 0 || thresholds == 1 || thresholds == n),
                      "each loss must be four integers");
    given += weights + thresholds;
  }
  TORCH_CHECK_VALUE(losses.size() % 4 == 0 && static_cast<size_t>(given) == numbers.size(), "losses must be described");
  return {E,
          S,
          static_cast<int64_t>(losses.size() / 4),
          p.raw.noise != nullptr,
          sums.const_data_ptr(),
          counts.const_data_ptr<int64_t>(),
          losses.data(),
          numbers.data()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_routing_route(
    const Tensor& logits, const OptionalTensor& noise, const OptionalTensor& bias, const OptionalTensor& allowed,
    const OptionalTensor& given, const OptionalTensor& segment, const OptionalTensor& valid,
    const std::vector<int64_t>& spec, double sigma, const std::vector<int64_t>& places, bool by_gate,
    const std::vector<int64_t>& losses, const std::vector<double>& numbers) {
  const Router p(logits, noise, bias, allowed, segment, valid, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments, cells = S * E;
  TORCH_CHECK_VALUE(places.size() == 5 && places[0] == E && places[4] == S, "places must be those of the scores");
  const Tensor listed = given ? experts_of(*given, T, k, E) : Tensor();
  Tensor experts = p.integers({T, k}), counts = p.integers({2 * cells + S});
  Tensor gates = p.numbers({T, k}), priority = p.numbers({T}), sums = p.numbers({3 * (cells + S)});
  int64_t size = 0;
  for (size_t at = 1; at < losses.size(); at += 4) size += losses[at] ? 1 : S;
  Tensor values = p.numbers({size}), total = p.numbers({});
  Slots s(experts, by_gate ? priority : Tensor(), p.segment, places);
  const RouterLosses l = losses_of(p, sums, counts, losses, numbers);
  const Parallel threads = parallel_for(T * E, kFewLogits);
  p.with_accumulator([&](auto zero) {
    using A = decltype(zero);
    A* to = sums.data_ptr<A>();
    int64_t* count = counts.data_ptr<int64_t>();
    s.raw.kept = count + cells;
    const RouterScores out{listed.defined() ? listed.const_data_ptr<int64_t>() : nullptr,
                           experts.data_ptr<int64_t>(),
                           gates.data_ptr(),
                           priority.data_ptr(),
                           to,
                           to + 3 * cells,
                           count,
                           count + 2 * cells,
                           to + 3 * cells + 2 * S};
    pybind11::gil_scoped_release release;
    expert_routing_cpu().scores(p.raw, out, threads);
    expert_routing_cpu().slots(s.raw, threads);
    RouterBalance<A>(l).forward(values.data_ptr<A>(), total.data_ptr<A>());
  });
  return {experts, gates, s.slots, s.order, s.offsets, values, total, sums, counts};
}

Tensor expert_routing_route_backward(const Tensor& logits, const OptionalTensor& noise, const OptionalTensor& bias,
                                     const OptionalTensor& allowed, const OptionalTensor& segment,
                                     const OptionalTensor& valid, const std::vector<int64_t>& spec, double sigma,
                                     const std::vector<int64_t>& losses, const std::vector<double>& numbers,
                                     const Tensor& experts, const Tensor& sums, const Tensor& counts,
                                     const OptionalTensor& d_gates, const OptionalTensor& d_values,
                                     const OptionalTensor& d_total) {
  const Router p(logits, noise, bias, allowed, segment, valid, spec, sigma);
  const int64_t T = p.raw.T, E = p.raw.E, k = p.raw.k, S = p.raw.segments, cells = S * E;
  const Tensor listed = experts_of(experts, T, k, E);
  const RouterLosses l = losses_of(p, sums, counts, losses, numbers);
  int64_t size = 0;
  for (size_t at = 1; at < losses.size(); at += 4) size += losses[at] ? 1 : S;
  const Tensor gates = d_gates ? p.upstream(*d_gates, {T, k}) : at::zeros({T, k}, sums.options());
  const Tensor values = d_values ? p.upstream(*d_values, {size}) : Tensor();
  const Tensor total = d_total ? p.upstream(*d_total, {}) : Tensor();
  Tensor dlogits = p.numbers({T, E});
  p.with_accumulator([&](auto zero) {
    using A = decltype(zero);
    std::vector<A> slopes(3 * cells + 2 * S);
    const RouterGradients g{listed.const_data_ptr<int64_t>(), gates.data_ptr(), slopes.data(),
                            slopes.data() + 3 * cells, dlogits.data_ptr()};
    pybind11::gil_scoped_release release;
    RouterBalance<A>(l).backward(static_cast<const A*>(data_or_null(values)),
                                 static_cast<const A*>(data_or_null(total)), slopes.data(), slopes.data() + 3 * cells);
    expert_routing_cpu().scores_backward(p.raw, g, parallel_for(T * E, kFewLogits));
  });
  return dlogits;
}

// What the three functions that move rows have in common; slots and order address memory.
struct Rows {
  Tensor from, other, gates, slots, order, to;
  RouterRows raw{};

  Rows(const Tensor& from_, const OptionalTensor& gates_, const Tensor& slots_, const Tensor& order_) {
    TORCH_CHECK_VALUE(from_.dim() == 2 && slots_.dim() == 2 && order_.dim() == 1, "rows must be matrices");
    TORCH_CHECK_TYPE(slots_.scalar_type() == at::kLong && order_.scalar_type() == at::kLong, "slots must be int64");
    from = from_.contiguous();
    slots = slots_.contiguous();
    order = order_.contiguous();
    raw.dtype = dtype_of(from);
    raw.T = slots.size(0);
    raw.k = slots.size(1);
    raw.R = order.size(0);
    raw.D = from.size(1);
    Router::check_range(slots, -1, raw.R, "slots");
    Router::check_range(order, -1, raw.T * raw.k, "order");
    if (gates_) {
      TORCH_CHECK_VALUE(gates_->sizes() == slots.sizes() && gates_->scalar_type() == accumulator(from),
                        "gates must be numbers like the slots");
      gates = gates_->contiguous();
    }
    raw.from = from.data_ptr();
    raw.gates = data_or_null(gates);
    raw.slots = slots.const_data_ptr<int64_t>();
    raw.order = order.const_data_ptr<int64_t>();
  }

  Tensor run(void (*function)(const RouterRows&, const Parallel&), at::IntArrayRef sizes, at::ScalarType type) {
    to = at::empty(sizes, from.options().dtype(type));
    raw.to = to.data_ptr();
    const Parallel threads = parallel_for(std::max(raw.R, raw.T * raw.k) * raw.D, kFewNumbers);
    pybind11::gil_scoped_release release;
    function(raw, threads);
    return to;
  }
};

Tensor expert_routing_dispatch(const Tensor& tokens, const OptionalTensor& gates, const Tensor& slots,
                               const Tensor& order) {
  Rows r(tokens, gates, slots, order);
  TORCH_CHECK_VALUE(r.from.size(0) == r.raw.T, "tokens must have ", r.raw.T, " rows, got ", r.from.sizes());
  return r.run(expert_routing_cpu().dispatch, {r.raw.R, r.raw.D}, r.from.scalar_type());
}

Tensor expert_routing_combine(const Tensor& rows, const OptionalTensor& gates, const Tensor& slots,
                              const Tensor& order) {
  Rows r(rows, gates, slots, order);
  TORCH_CHECK_VALUE(r.from.size(0) == r.raw.R, "rows must have ", r.raw.R, " rows, got ", r.from.sizes());
  return r.run(expert_routing_cpu().combine, {r.raw.T, r.raw.D}, r.from.scalar_type());
}

Tensor expert_routing_dots(const Tensor& tokens, const Tensor& rows, const Tensor& slots, const Tensor& order) {
  Rows r(tokens, std::nullopt, slots, order);
  TORCH_CHECK_VALUE(r.from.size(0) == r.raw.T, "tokens must have ", r.raw.T, " rows, got ", r.from.sizes());
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) == r.raw.R && rows.size(1) == r.raw.D &&
                        rows.scalar_type() == r.from.scalar_type(),
                    "rows must be like the tokens");
  r.other = rows.contiguous();
  r.raw.other = r.other.data_ptr();
  return r.run(expert_routing_cpu().dots, {r.raw.T, r.raw.k}, accumulator(r.from));
}

}  // namespace
}  // namespace contrastive_ops
