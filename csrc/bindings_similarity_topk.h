// Part of bindings.cpp: the functions of similarity_topk.
#pragma once

#include "bindings_similarity_problem.h"
#include "similarity_topk.h"

namespace contrastive_ops {
namespace {

Problem topk_problem(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& row_bias,
                     const Tensor& col_bias, const TensorList& pair_data, const Integers& spec) {
  Problem p(x, y, scale, row_bias, col_bias, Tensor(), pair_data, spec);
  CHECK_VALUE(!p.sets.empty() && p.folds.empty(), "similarity_topk takes sets and no folds");
  return p;
}

// Columns address memory, so every one is checked once more.
Tensor listed_columns(const Tensor& indices, const Problem& p) {
  const Tensor columns = shaped(indices, {p.raw.N, indices.dims == 2 ? indices.size(1) : 0}, Type::int64, "indices");
  const int64_t *column = columns.as<int64_t>(), count = columns.numel();
  for (int64_t e = 0; e < count; ++e) {
    CHECK_VALUE(column[e] >= -1 && column[e] < p.raw.M, "similarity_topk: indices must be in [-1, ", p.raw.M, "), got ",
                column[e]);
  }
  return columns;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_topk_forward(
    const Tensor& x, const Tensor& y, const Tensor& scale, const Optional& row_bias, const Optional& col_bias,
    const TensorList& pair_data, const Integers& spec, int64_t k, const Optional& floor, const Optional& count_above) {
  const Problem p = topk_problem(x, y, scale, row_bias, col_bias, pair_data, spec);
  CHECK_VALUE(k >= 1, "k must be at least 1, got ", k);
  const int64_t N = p.raw.N;
  const Tensor low = shaped(floor, {N}, p.type(), "floor"), high = shaped(count_above, {N}, p.type(), "count_above");
  const Tensor values = empty({N, k}, p.type()), indices = empty({N, k}, Type::int64);
  const Tensor counts = empty({N}, Type::int64);
  const Tensor statistics = zeros({count_above ? static_cast<int64_t>(Statistic::size) : 0, N}, Type::int64);
  run(similarity_topk_cpu().forward, p.raw,
      TopKForward{k, low.data, high.data, values.data, indices.as<int64_t>(), counts.as<int64_t>(),
                  count_above ? statistics.as<int64_t>() : nullptr});
  return {values, indices, counts, statistics};
}

Tensor similarity_topk_at(const Tensor& x, const Tensor& y, const Tensor& scale, const Optional& row_bias,
                          const Optional& col_bias, const TensorList& pair_data, const Integers& spec,
                          const Tensor& indices) {
  const Problem p = topk_problem(x, y, scale, row_bias, col_bias, pair_data, spec);
  const Tensor columns = listed_columns(indices, p), values = empty(columns.shape(), p.type());
  run(similarity_topk_cpu().at, p.raw, TopKAt{columns.as<int64_t>(), columns.size(1), values.data});
  return values;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_topk_backward(
    const Tensor& x, const Tensor& y, const Tensor& scale, const Optional& row_bias, const Optional& col_bias,
    const TensorList& pair_data, const Integers& spec, const Tensor& indices, const Tensor& d_values, int64_t needs) {
  const Problem p = topk_problem(x, y, scale, row_bias, col_bias, pair_data, spec);
  const Tensor columns = listed_columns(indices, p);
  const Tensor upstream = shaped(d_values, columns.shape(), p.type(), "d_values");
  const auto part = [&](int bit, int64_t size) { return wants(needs, bit) ? size : 0; };
  const auto data = [&](int bit, const Tensor& tensor) { return wants(needs, bit) ? tensor.data : nullptr; };
  const Tensor dx = zeros({part(0, p.raw.N), p.raw.D}, p.type()), dy = zeros({part(1, p.raw.M), p.raw.D}, p.type());
  const Tensor dscale = zeros({part(2, p.scale.numel())}, p.type());
  const Tensor drow_bias = zeros({part(3, p.raw.N)}, p.type()), dcol_bias = zeros({part(4, p.raw.M)}, p.type());
  run(similarity_topk_cpu().backward, p.raw,
      TopKBackward{columns.as<int64_t>(), columns.size(1), upstream.data, data(0, dx), data(1, dy), data(2, dscale),
                   data(3, drow_bias), data(4, dcol_bias)});
  return {dx, dy, dscale, drow_bias, dcol_bias};
}

std::tuple<Tensor, Tensor> similarity_topk_merge(const Tensor& values, const Tensor& indices,
                                                 const Tensor& other_values, const Tensor& other_indices) {
  CHECK_VALUE(values.dims == 2 && other_values.dims == 2 && values.size(0) == other_values.size(0),
              "lists must be (N, k) each");
  const Type type = accumulator(values.type);
  const Tensor v = shaped(values, values.shape(), type, "values");
  const Tensor i = shaped(indices, values.shape(), Type::int64, "indices");
  const Tensor ov = shaped(other_values, other_values.shape(), type, "other values");
  const Tensor oi = shaped(other_indices, other_values.shape(), Type::int64, "other indices");
  const Tensor out_values = empty(v.shape(), type), out_indices = empty(v.shape(), Type::int64);
  run(similarity_topk_cpu().merge,
      TopKMerge{dtype_of(v), v.size(0), v.size(1), ov.size(1), v.data, ov.data, i.as<int64_t>(), oi.as<int64_t>(),
                out_values.data, out_indices.as<int64_t>()});
  return {out_values, out_indices};
}

std::tuple<Tensor, Tensor> similarity_topk_order(const Tensor& values, const Tensor& indices, int64_t k) {
  CHECK_VALUE(values.dims == 2 && k >= 0, "lists must be (N, P) each");
  const Tensor v = shaped(values, values.shape(), accumulator(values.type), "values");
  const Tensor i = shaped(indices, values.shape(), Type::int64, "indices");
  const Tensor out_values = empty({v.size(0), k}, v.type), out_indices = empty({v.size(0), k}, Type::int64);
  run(similarity_topk_cpu().order, TopKOrder{dtype_of(v), v.size(0), v.size(1), k, v.data, i.as<int64_t>(),
                                             out_values.data, out_indices.as<int64_t>()});
  return {out_values, out_indices};
}

}  // namespace
}  // namespace contrastive_ops
