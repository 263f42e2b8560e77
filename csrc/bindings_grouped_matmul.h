// Part of bindings.cpp: the functions of grouped_matmul.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings_similarity_problem.h"
#include "grouped_matmul.h"

namespace contrastive_ops {
namespace {

// The last two dimensions with one of them contiguous; only a tensor where neither is (expanded, every other column)
// is copied.
Tensor either_contiguous(const Tensor& x) {
  return x.contiguous_along(-1) || x.contiguous_along(-2) ? x : x.contiguous();
}
StridedMatrix matrix_of(const Tensor& x) {
  const bool rows = x.contiguous_along(-1);
  return {x.data, rows ? x.stride(-2) : 1, rows ? 1 : x.stride(-1), nullptr};
}

// The rows of a product with the tensors that `raw` points into: those of a matrix, or with an order, each row the
// token of a choice (csrc/expert_routing.h), zeros where it has none.
struct ProductRows {
  Tensor x;
  std::vector<int64_t> list;
  StridedMatrix raw;
  int64_t count;

  ProductRows(const Tensor& x_in, const Tensor& slots, const Tensor& order_in) {
    CHECK_VALUE(slots.defined() == order_in.defined(), "slots and order must be given together");
    if (!order_in) {
      x = either_contiguous(x_in);
      raw = matrix_of(x);
      count = x.size(0);
      return;
    }
    CHECK_VALUE(slots.dims == 2 && slots.size(0) == x_in.size(0), "slots must have shape (", x_in.size(0), ", k), got ",
                slots);
    CHECK_VALUE(order_in.dims == 1, "order must have one dimension, got ", order_in);
    const Tensor order = shaped(order_in, order_in.shape(), Type::int64, "order");
    count = order.size(0);
    list.resize(static_cast<size_t>(count));
    const int64_t k = slots.size(1), choices = x_in.size(0) * k;
    const int64_t* choice = order.as<int64_t>();
    for (int64_t r = 0; r < count; ++r) {  // they address memory
      CHECK_VALUE(choice[r] >= -1 && choice[r] < choices, "order must be in [-1, ", choices, "), got ", choice[r]);
      list[static_cast<size_t>(r)] = choice[r] < 0 ? -1 : choice[r] / k;
    }
    x = x_in.rows_contiguous();
    raw = {x.data, x.stride(0), 1, list.data()};
  }
  ProductRows(const ProductRows&) = delete;
};

// An output that is written once. One of many MiB comes from the system page by page, and the first touch of a page of
// 4 KiB takes longer than its products do; pages of 2 MiB take a third of the time in total.
Tensor empty_output(const Shape& shape, Type type) {
  Tensor out = empty(shape, type);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLarge = uintptr_t{4} << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(out.numel() * bytes_of(type));
  if (bytes >= kLarge) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(out.data);
    const uintptr_t begin = (at + kPage - 1) / kPage * kPage, end = (at + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish, which may be refused
  }
#endif
  return out;
}

// Offsets address memory, so every one is checked once more.
RowGroups groups_of(const ProductRows& a, const Tensor& offsets, int64_t groups) {
  const int64_t* o = offsets.as<int64_t>();
  for (int64_t e = 0; e <= groups; ++e) {
    CHECK_VALUE(o[e] >= (e == 0 ? 0 : o[e - 1]) && o[e] <= a.count, "grouped_matmul: offsets must ascend within [0, ",
                a.count, "], got ", o[e], " at ", e);
  }
  return {dtype_of(a.x), o, groups, a.count};
}

void check_grouped(const Tensor& t, const Tensor& a, int dims, const char* name) {
  CHECK_VALUE(t.dims == dims, name, " must have ", dims, " dimensions, got ", t);
  CHECK_TYPE(t.type == a.type, name, " must have dtype ", a.type, ", got ", t.type);
  check_on_cpu(t, name);
}

Tensor grouped_matmul_forward(const Tensor& a_in, const Tensor& b_in, const Tensor& offsets_in, const Optional& bias_in,
                              const Optional& slots, const Optional& order) {
  check_grouped(a_in, a_in, 2, "a");
  check_grouped(b_in, a_in, 3, "b");
  const int64_t groups = b_in.size(0), D = b_in.size(1), F = b_in.size(2);
  CHECK_VALUE(a_in.size(1) == D, "b must have shape (E, ", a_in.size(1), ", F), got ", b_in);
  const ProductRows a(a_in, slots, order);
  const Tensor b = either_contiguous(b_in), bias = shaped(bias_in, {groups, F}, a_in.type, "bias");
  const Tensor offsets = shaped(offsets_in, {groups + 1}, Type::int64, "offsets");
  const Tensor out = empty_output({a.count, F}, a_in.type);
  run(grouped_matmul_cpu().forward,
      GroupedForward{groups_of(a, offsets, groups), D, F, a.raw, matrix_of(b), b.stride(0), bias.data, out.data});
  return out;
}

std::tuple<Tensor, Tensor> grouped_matmul_outer(const Tensor& a_in, const Tensor& g_in, const Tensor& offsets_in,
                                                const Optional& slots, const Optional& order, bool transposed,
                                                bool wants_b, bool wants_bias) {
  check_grouped(a_in, a_in, 2, "a");
  check_grouped(g_in, a_in, 2, "g");
  const ProductRows a(a_in, slots, order), g(g_in, Tensor(), Tensor());
  CHECK_VALUE(a.count == g.count, "a and g must have as many rows, got ", a.count, " and ", g.count);
  CHECK_VALUE(offsets_in.dims == 1 && offsets_in.size(0) >= 1, "offsets must have shape (E + 1,), got ", offsets_in);
  const int64_t groups = offsets_in.size(0) - 1, D = a_in.size(1), F = g_in.size(1), matrices = wants_b ? groups : 0;
  const Tensor offsets = shaped(offsets_in, {groups + 1}, Type::int64, "offsets");
  const Tensor db = transposed ? empty_output({matrices, F, D}, a_in.type) : empty_output({matrices, D, F}, a_in.type);
  const Tensor dbias = empty({wants_bias ? groups : 0, F}, a_in.type);
  const RowGroups rows = groups_of(a, offsets, groups);
  void *const to_b = wants_b ? db.data : nullptr, *const to_bias = wants_bias ? dbias.data : nullptr;
  const auto outer = grouped_matmul_cpu().outer;
  if (transposed && wants_b) {
    // db^T is the sum of g_r^T a_r, beside which there are only sums of a.
    run(outer, GroupedOuter{rows, F, D, g.raw, a.raw, to_b, nullptr});
    if (wants_bias) run(outer, GroupedOuter{rows, D, F, a.raw, g.raw, nullptr, to_bias});
  } else {
    run(outer, GroupedOuter{rows, D, F, a.raw, g.raw, to_b, to_bias});
  }
  return {transposed ? db.transposed() : db, dbias};
}

// Rows and the result of an activation, with the tensors that it points into; `g` for backward.
struct Activations {
  Tensor hidden, g, out;
  ActivatedRows raw{};

  Activations(const Tensor& hidden_in, const Tensor& g_in, int64_t activation, bool gated) {
    CHECK_VALUE(hidden_in.dims == 2, "hidden must be a matrix, got ", hidden_in);
    CHECK_VALUE(activation >= 0 && activation <= static_cast<int64_t>(Activation::silu),
                "activation must be one of Activation, got ", activation);
    CHECK_VALUE(!gated || hidden_in.size(1) % 2 == 0, "gated rows must have halves, got ", hidden_in);
    check_on_cpu(hidden_in, "hidden");
    hidden = hidden_in.contiguous();
    raw.dtype = dtype_of(hidden);
    raw.rows = hidden.size(0);
    raw.F = gated ? hidden.size(1) / 2 : hidden.size(1);
    raw.activation = static_cast<Activation>(activation);
    raw.gated = gated;
    g = shaped(g_in, {raw.rows, raw.F}, hidden.type, "g");
    out = g ? empty(hidden.shape(), hidden.type) : empty({raw.rows, raw.F}, hidden.type);
    raw.hidden = hidden.data;
    raw.g = g.data;
    raw.out = out.data;
  }
};

Tensor grouped_matmul_activate(const Tensor& hidden, int64_t activation, bool gated) {
  const Activations rows(hidden, Tensor(), activation, gated);
  run(grouped_matmul_cpu().activate, rows.raw);
  return rows.out;
}

Tensor grouped_matmul_activate_backward(const Tensor& g, const Tensor& hidden, int64_t activation, bool gated) {
  const Activations rows(hidden, g, activation, gated);
  run(grouped_matmul_cpu().activate_backward, rows.raw);
  return rows.out;
}

}  // namespace
}  // namespace contrastive_ops
