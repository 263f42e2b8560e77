// Part of bindings.cpp: the functions of similarity_prefix.
#pragma once

#include "bindings_similarity_problem.h"
#include "similarity_prefix.h"

namespace contrastive_ops {
namespace {

// A SimilarityPrefixProblem with the tensors that its pointers point into. What addresses memory is checked once more.
struct PrefixTensors {
  Tensor x, y, scale, target, differ_rows, differ_cols;
  SimilarityPrefixProblem raw{};

  PrefixTensors(const Tensor& x_in, const Tensor& y_in, const Tensor& scale_in, const Tensor& target_in,
                const Tensor& differ_rows_in, const Tensor& differ_cols_in, const Integers& dims,
                std::optional<int64_t> diagonal, bool normalize) {
    const Tensor& y_or_x = y_in ? y_in : x_in;
    CHECK_VALUE(x_in.dims == 2 && y_or_x.dims == 2, "x and y must be matrices");
    CHECK_VALUE(x_in.size(1) == y_or_x.size(1), "x and y must have the same last dimension");
    CHECK_TYPE(x_in.type == y_or_x.type, "x and y must have the same dtype");
    CHECK_VALUE(x_in.device == kOnCpu && y_or_x.device == kOnCpu, "x and y must be on the CPU");
    x = x_in.rows_contiguous();
    y = y_in ? y_in.rows_contiguous() : x;
    CHECK_VALUE(scale_in.numel() == 1, "scale must be one number, got ", scale_in);
    scale = shaped(scale_in, scale_in.shape(), type(), "scale");
    target = shaped(target_in, {x.size(0)}, Type::int64, "target");
    differ_rows = shaped(differ_rows_in, {x.size(0)}, Type::int64, "differ_rows");
    differ_cols = shaped(differ_cols_in, {y.size(0)}, Type::int64, "differ_cols");
    CHECK_VALUE(differ_rows.defined() == differ_cols.defined(), "differ must name both sides");
    CHECK_VALUE(dims.size > 0, "dims must not be empty");
    for (int64_t s = 0; s < dims.size; ++s) {
      CHECK_VALUE(dims.data[s] > (s == 0 ? 0 : dims.data[s - 1]) && dims.data[s] <= x.size(1),
                  "dims must ascend within [1, ", x.size(1), "], got ", dims.data[s]);
    }
    raw.dtype = dtype_of(x);
    raw.x = x.data;
    raw.y = y.data;
    raw.N = x.size(0);
    raw.M = y.size(0);
    raw.D = x.size(1);
    raw.x_stride = x.stride(0);
    raw.y_stride = y.stride(0);
    raw.self = !y_in;
    raw.dims = dims.data;
    raw.prefixes = dims.size;
    raw.scale = scale.data;
    raw.normalize = normalize;
    raw.target = target.as<int64_t>();
    raw.has_diagonal = diagonal.has_value();
    raw.diagonal = std::clamp(diagonal.value_or(0), -kNoColumn, kNoColumn);
    raw.differ_rows = differ_rows.as<int64_t>();
    raw.differ_cols = differ_cols.as<int64_t>();
  }
  Type type() const { return accumulator(x.type); }
  Tensor by_prefix(const Tensor& tensor, int64_t size, const char* name) const {
    return shaped(tensor, {raw.prefixes, size}, type(), name);
  }
};

std::tuple<Tensor, Tensor, Tensor> similarity_prefix_forward(const Tensor& x, const Optional& y, const Tensor& scale,
                                                             const Optional& target, const Optional& differ_rows,
                                                             const Optional& differ_cols, const Integers& dims,
                                                             std::optional<int64_t> diagonal, bool normalize,
                                                             int64_t directions) {
  const PrefixTensors p(x, y, scale, target, differ_rows, differ_cols, dims, diagonal, normalize);
  const bool by_rows = wants(directions, 0), by_cols = wants(directions, 1);
  CHECK_VALUE(!p.raw.self || !by_cols, "self-similarity is folded by rows");
  const Tensor rows = empty({p.raw.prefixes, by_rows ? p.raw.N : 0}, p.type());
  const Tensor cols = empty({p.raw.prefixes, by_cols ? p.raw.M : 0}, p.type());
  const Tensor target_logit = empty({p.raw.prefixes, target ? p.raw.N : 0}, p.type());
  run(similarity_prefix_cpu().forward, p.raw,
      SimilarityPrefixForward{by_rows ? rows.data : nullptr, by_cols ? cols.data : nullptr,
                              target ? target_logit.data : nullptr});
  return {rows, cols, target_logit};
}

std::tuple<Tensor, Tensor, Tensor> similarity_prefix_backward(const Tensor& x, const Optional& y, const Tensor& scale,
                                                              const Optional& target, const Optional& differ_rows,
                                                              const Optional& differ_cols, const Integers& dims,
                                                              std::optional<int64_t> diagonal, bool normalize,
                                                              const Tensor& rows, const Tensor& cols,
                                                              const Optional& d_rows, const Optional& d_cols,
                                                              const Optional& d_target, int64_t needs) {
  const PrefixTensors p(x, y, scale, target, differ_rows, differ_cols, dims, diagonal, normalize);
  const int64_t N = p.raw.N, M = p.raw.M;
  // Only folds that have a gradient are read.
  const Tensor row_values = d_rows ? p.by_prefix(rows, N, "rows") : Tensor();
  const Tensor col_values = d_cols ? p.by_prefix(cols, M, "cols") : Tensor();
  const Tensor of_rows = p.by_prefix(d_rows, N, "d_rows"), of_cols = p.by_prefix(d_cols, M, "d_cols");
  const Tensor of_target = p.by_prefix(d_target, N, "d_target");
  const bool has_dx = wants(needs, 0), has_dy = wants(needs, 1) && !p.raw.self, has_dscale = wants(needs, 2);
  const Tensor dx = zeros({has_dx ? N : 0, p.raw.D}, p.type()), dy = zeros({has_dy ? M : 0, p.raw.D}, p.type());
  const Tensor dscale = has_dscale ? zeros({}, p.type()) : empty({0}, p.type());
  run(similarity_prefix_cpu().backward, p.raw,
      SimilarityPrefixBackward{row_values.data, col_values.data, of_rows.data, of_cols.data, of_target.data,
                               has_dx ? dx.data : nullptr, has_dy ? dy.data : nullptr,
                               has_dscale ? dscale.data : nullptr});
  return {dx, dy, dscale};
}

}  // namespace
}  // namespace contrastive_ops
