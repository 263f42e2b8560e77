// Part of bindings.cpp, the only file that includes it: the functions of similarity_topk.
#pragma once

#include <tuple>
#include <vector>

#include "bindings_similarity_problem.h"
#include "similarity_topk.h"

namespace contrastive_ops {
namespace {

Problem topk_problem(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& row_bias,
                     const OptionalTensor& col_bias, const std::vector<Tensor>& pair_data,
                     const std::vector<int64_t>& spec) {
  Problem p(x, y, scale, row_bias, col_bias, std::nullopt, pair_data, spec);
  TORCH_CHECK_VALUE(!p.sets.empty() && p.folds.empty(), "similarity_topk takes sets and no folds");
  return p;
}

// Columns address memory, so every one is checked once more.
Tensor listed_columns(const Tensor& indices, const Problem& p) {
  TORCH_CHECK_VALUE(indices.dim() == 2 && indices.size(0) == p.raw.N, "indices must have shape (", p.raw.N,
                    ", P), got ", indices.sizes());
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, "indices must be int64, got ", indices.scalar_type());
  TORCH_CHECK_VALUE(indices.device().is_cpu(), "indices must be on the CPU, got ", indices.device());
  const Tensor columns = indices.contiguous();
  const int64_t* column = columns.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < columns.numel(); ++e) {
    TORCH_CHECK_VALUE(column[e] >= -1 && column[e] < p.raw.M, "similarity_topk: indices must be in [-1, ", p.raw.M,
                      "), got ", column[e]);
  }
  return columns;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_topk_forward(
    const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const std::vector<Tensor>& pair_data, const std::vector<int64_t>& spec, int64_t k,
    const OptionalTensor& floor, const OptionalTensor& count_above) {
  const Problem p = topk_problem(x, y, scale, row_bias, col_bias, pair_data, spec);
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1, got ", k);
  const auto integers = x.options().dtype(at::kLong);
  const Tensor low = vector_of(floor, p.raw.N, p.type(), "floor");
  const Tensor high = vector_of(count_above, p.raw.N, p.type(), "count_above");
  Tensor values = at::empty({p.raw.N, k}, x.options().dtype(p.type())), indices = at::empty({p.raw.N, k}, integers);
  Tensor counts = at::empty({p.raw.N}, integers);
  Tensor statistics = at::zeros({count_above ? static_cast<int64_t>(Statistic::size) : 0, p.raw.N}, integers);
  TopKForward out{};
  out.k = k;
  out.floor = data_or_null(low);
  out.count_above = data_or_null(high);
  out.values = values.data_ptr();
  out.indices = indices.data_ptr<int64_t>();
  out.counts = counts.data_ptr<int64_t>();
  if (count_above) out.statistics = statistics.data_ptr<int64_t>();
  {
    pybind11::gil_scoped_release release;
    similarity_topk_cpu().forward(p.raw, out, parallel());
  }
  return {values, indices, counts, statistics};
}

Tensor similarity_topk_at(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& row_bias,
                          const OptionalTensor& col_bias, const std::vector<Tensor>& pair_data,
                          const std::vector<int64_t>& spec, const Tensor& indices) {
  const Problem p = topk_problem(x, y, scale, row_bias, col_bias, pair_data, spec);
  const Tensor columns = listed_columns(indices, p);
  Tensor values = at::empty(columns.sizes(), x.options().dtype(p.type()));
  const TopKAt out{columns.const_data_ptr<int64_t>(), columns.size(1), values.data_ptr()};
  {
    pybind11::gil_scoped_release release;
    similarity_topk_cpu().at(p.raw, out, parallel());
  }
  return values;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_topk_backward(
    const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const std::vector<Tensor>& pair_data, const std::vector<int64_t>& spec,
    const Tensor& indices, const Tensor& d_values, int64_t needs) {
  const Problem p = topk_problem(x, y, scale, row_bias, col_bias, pair_data, spec);
  const Tensor columns = listed_columns(indices, p), upstream = d_values.contiguous();
  TORCH_CHECK_VALUE(upstream.sizes() == columns.sizes() && upstream.scalar_type() == p.type(),
                    "d_values must be like the values");
  const auto wants = [&](int bit) { return (needs >> bit & 1) != 0; };
  Tensor dx = p.zeros({wants(0) ? p.raw.N : 0, p.raw.D}), dy = p.zeros({wants(1) ? p.raw.M : 0, p.raw.D});
  Tensor dscale = p.zeros({wants(2) ? p.scale.numel() : 0});
  Tensor drow_bias = p.zeros({wants(3) ? p.raw.N : 0}), dcol_bias = p.zeros({wants(4) ? p.raw.M : 0});
  TopKBackward raw{};
  raw.indices = columns.const_data_ptr<int64_t>();
  raw.listed = columns.size(1);
  raw.d_values = upstream.data_ptr();
  if (wants(0)) raw.dx = dx.data_ptr();
  if (wants(1)) raw.dy = dy.data_ptr();
  if (wants(2)) raw.dscale = dscale.data_ptr();
  if (wants(3)) raw.drow_bias = drow_bias.data_ptr();
  if (wants(4)) raw.dcol_bias = dcol_bias.data_ptr();
  {
    pybind11::gil_scoped_release release;
    similarity_topk_cpu().backward(p.raw, raw, parallel());
  }
  return {dx, dy, dscale, drow_bias, dcol_bias};
}

std::tuple<Tensor, Tensor> similarity_topk_merge(const Tensor& values, const Tensor& indices,
                                                 const Tensor& other_values, const Tensor& other_indices) {
  const Tensor v = values.contiguous(), i = indices.contiguous(), ov = other_values.contiguous(),
               oi = other_indices.contiguous();
  TORCH_CHECK_VALUE(
      v.dim() == 2 && ov.dim() == 2 && v.size(0) == ov.size(0) && v.sizes() == i.sizes() && ov.sizes() == oi.sizes(),
      "lists must be (N, k) each");
  TORCH_CHECK_TYPE(v.scalar_type() == ov.scalar_type() && accumulator(v) == v.scalar_type() &&
                       i.scalar_type() == at::kLong && oi.scalar_type() == at::kLong,
                   "lists must be of scores in one dtype and of int64 columns");
  Tensor out_values = at::empty_like(v), out_indices = at::empty_like(i);
  const TopKMerge m{dtype_of(v),
                    v.size(0),
                    v.size(1),
                    ov.size(1),
                    v.data_ptr(),
                    ov.data_ptr(),
                    i.data_ptr<int64_t>(),
                    oi.data_ptr<int64_t>(),
                    out_values.data_ptr(),
                    out_indices.data_ptr<int64_t>()};
  {
    pybind11::gil_scoped_release release;
    similarity_topk_cpu().merge(m, parallel());
  }
  return {out_values, out_indices};
}

std::tuple<Tensor, Tensor> similarity_topk_order(const Tensor& values, const Tensor& indices, int64_t k) {
  const Tensor v = values.contiguous(), i = indices.contiguous();
  TORCH_CHECK_VALUE(v.dim() == 2 && v.sizes() == i.sizes() && k >= 0, "lists must be (N, P) each");
  TORCH_CHECK_TYPE(accumulator(v) == v.scalar_type() && i.scalar_type() == at::kLong,
                   "lists must be of scores and of int64 columns");
  Tensor out_values = at::empty({v.size(0), k}, v.options()), out_indices = at::empty({v.size(0), k}, i.options());
  const TopKOrder o{dtype_of(v),
                    v.size(0),
                    v.size(1),
                    k,
                    v.data_ptr(),
                    i.data_ptr<int64_t>(),
                    out_values.data_ptr(),
                    out_indices.data_ptr<int64_t>()};
  {
    pybind11::gil_scoped_release release;
    similarity_topk_cpu().order(o, parallel());
  }
  return {out_values, out_indices};
}

}  // namespace
}  // namespace contrastive_ops
