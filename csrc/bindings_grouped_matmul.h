// Part of bindings.cpp, the only file that includes it: the functions of grouped_matmul.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <tuple>

#include "bindings_similarity_problem.h"
#include "grouped_matmul.h"

namespace contrastive_ops {
namespace {

// A stride along a dimension of one number, or of none, is never used and may be any number.
bool contiguous_along(const Tensor& x, int64_t dim) { return x.size(dim) <= 1 || x.stride(dim) == 1; }

// The last two dimensions with one of them contiguous; only a tensor where neither is (expanded, every other column)
// is copied.
Tensor either_contiguous(const Tensor& x) {
  return contiguous_along(x, -1) || contiguous_along(x, -2) ? x : x.contiguous();
}
StridedMatrix matrix_of(const Tensor& x) {
  const bool rows = contiguous_along(x, -1);
  return {x.data_ptr(), rows ? x.stride(-2) : 1, rows ? 1 : x.stride(-1), nullptr};
}

// The rows of a product with the tensors that `raw` points into: those of a matrix, or with an order, each row the
// token of a choice (csrc/expert_routing.h), zeros where it has none.
struct ProductRows {
  Tensor x, list;
  StridedMatrix raw;
  int64_t count;

  ProductRows(const Tensor& x_in, const OptionalTensor& slots, const OptionalTensor& order_in) {
    TORCH_CHECK_VALUE(slots.has_value() == order_in.has_value(), "slots and order must be given together");
    if (!order_in) {
      x = either_contiguous(x_in);
      raw = matrix_of(x);
      count = x.size(0);
      return;
    }
    TORCH_CHECK_VALUE(slots->dim() == 2 && slots->size(0) == x_in.size(0), "slots must have shape (", x_in.size(0),
                      ", k), got ", slots->sizes());
    TORCH_CHECK_VALUE(order_in->dim() == 1, "order must have one dimension, got ", order_in->sizes());
    const Tensor order = vector_of(order_in, order_in->size(0), at::kLong, "order");
    count = order.size(0);
    list = at::empty_like(order);
    const int64_t k = slots->size(1), choices = x_in.size(0) * k;
    const int64_t* choice = order.const_data_ptr<int64_t>();
    int64_t* token = list.data_ptr<int64_t>();
    for (int64_t r = 0; r < count; ++r) {  // they address memory
      TORCH_CHECK_VALUE(choice[r] >= -1 && choice[r] < choices, "order must be in [-1, ", choices, "), got ",
                        choice[r]);
      token[r] = choice[r] < 0 ? -1 : choice[r] / k;
    }
    x = rows_contiguous(x_in);
    raw = {x.data_ptr(), x.stride(0), 1, token};
  }
};

// An output that is written once. One of many MiB comes from the system page by page, and the first touch of a page of
// 4 KiB takes longer than its products do; pages of 2 MiB take a third of the time in total.
Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor out = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLarge = uintptr_t{4} << 20;
  if (out.nbytes() >= kLarge) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(out.data_ptr());
    const uintptr_t begin = (at + kPage - 1) / kPage * kPage, end = (at + out.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish, which may be refused
  }
#endif
  return out;
}

// Offsets address memory, so every one is checked once more.
RowGroups groups_of(const ProductRows& a, const Tensor& offsets, int64_t groups) {
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  for (int64_t e = 0; e <= groups; ++e) {
    TORCH_CHECK_VALUE(o[e] >= (e == 0 ? 0 : o[e - 1]) && o[e] <= a.count,
                      "grouped_matmul: offsets must ascend within [0, ", a.count, "], got ", o[e], " at ", e);
  }
  return {dtype_of(a.x), o, groups, a.count};
}

void check_grouped(const Tensor& t, const Tensor& a, int64_t dims, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == dims, name, " must have ", dims, " dimensions, got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == a.scalar_type(), name, " must have dtype ", a.scalar_type(), ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
}

Tensor grouped_matmul_forward(const Tensor& a_in, const Tensor& b_in, const Tensor& offsets_in,
                              const OptionalTensor& bias_in, const OptionalTensor& slots, const OptionalTensor& order) {
  check_grouped(a_in, a_in, 2, "a");
  check_grouped(b_in, a_in, 3, "b");
  const int64_t groups = b_in.size(0), D = b_in.size(1), F = b_in.size(2);
  TORCH_CHECK_VALUE(a_in.size(1) == D, "b must have shape (E, ", a_in.size(1), ", F), got ", b_in.sizes());
  const ProductRows a(a_in, slots, order);
  const Tensor b = either_contiguous(b_in);
  const Tensor offsets = vector_of(offsets_in, groups + 1, at::kLong, "offsets");
  Tensor bias;
  if (bias_in) {
    check_grouped(*bias_in, a_in, 2, "bias");
    TORCH_CHECK_VALUE(bias_in->size(0) == groups && bias_in->size(1) == F, "bias must have shape (", groups, ", ", F,
                      "), got ", bias_in->sizes());
    bias = bias_in->contiguous();
  }
  Tensor out = empty_output({a.count, F}, a_in.options());
  GroupedForward raw{};
  raw.rows = groups_of(a, offsets, groups);
  raw.D = D;
  raw.F = F;
  raw.a = a.raw;
  raw.b = matrix_of(b);
  raw.b_group_stride = b.stride(0);
  raw.bias = data_or_null(bias);
  raw.out = out.data_ptr();
  {
    pybind11::gil_scoped_release release;
    grouped_matmul_cpu().forward(raw, parallel());
  }
  return out;
}

std::tuple<Tensor, Tensor> grouped_matmul_outer(const Tensor& a_in, const Tensor& g_in, const Tensor& offsets_in,
                                                const OptionalTensor& slots, const OptionalTensor& order,
                                                bool transposed, bool wants_b, bool wants_bias) {
  check_grouped(a_in, a_in, 2, "a");
  check_grouped(g_in, a_in, 2, "g");
  const ProductRows a(a_in, slots, order), g(g_in, std::nullopt, std::nullopt);
  TORCH_CHECK_VALUE(a.count == g.count, "a and g must have as many rows, got ", a.count, " and ", g.count);
  TORCH_CHECK_VALUE(offsets_in.dim() == 1 && offsets_in.size(0) >= 1, "offsets must have shape (E + 1,), got ",
                    offsets_in.sizes());
  const int64_t groups = offsets_in.size(0) - 1, D = a_in.size(1), F = g_in.size(1);
  const Tensor offsets = vector_of(offsets_in, groups + 1, at::kLong, "offsets");
  const int64_t matrices = wants_b ? groups : 0;
  Tensor db = transposed ? empty_output({matrices, F, D}, a_in.options()).transpose(1, 2)
                         : empty_output({matrices, D, F}, a_in.options());
  Tensor dbias = at::empty({wants_bias ? groups : 0, F}, a_in.options());
  const RowGroups rows = groups_of(a, offsets, groups);
  void *const to_b = wants_b ? db.data_ptr() : nullptr, *const to_bias = wants_bias ? dbias.data_ptr() : nullptr;
  {
    pybind11::gil_scoped_release release;
    const GroupedMatmul functions = grouped_matmul_cpu();
    if (transposed && wants_b) {
      // db^T is the sum of g_r^T a_r, beside which there are only sums of a.
      functions.outer({rows, F, D, g.raw, a.raw, to_b, nullptr}, parallel());
      if (wants_bias) functions.outer({rows, D, F, a.raw, g.raw, nullptr, to_bias}, parallel());
    } else {
      functions.outer({rows, D, F, a.raw, g.raw, to_b, to_bias}, parallel());
    }
  }
  return {db, dbias};
}

}  // namespace
}  // namespace contrastive_ops
