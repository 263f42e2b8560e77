// Part of bindings.cpp, the only file that includes it: the functions of similarity_prefix.
#pragma once

#include <tuple>

#include "bindings_similarity_problem.h"
#include "similarity_prefix.h"

namespace contrastive_ops {
namespace {

// A SimilarityPrefixProblem with the tensors that its pointers point into. What addresses memory is checked once more.
struct PrefixTensors {
  Tensor x, y, scale, target, differ_rows, differ_cols;
  const std::vector<int64_t> dims;
  SimilarityPrefixProblem raw{};

  PrefixTensors(const Tensor& x_in, const OptionalTensor& y_in, const Tensor& scale_in, const OptionalTensor& target_in,
                const OptionalTensor& differ_rows_in, const OptionalTensor& differ_cols_in,
                const std::vector<int64_t>& dims_in, std::optional<int64_t> diagonal, bool normalize)
      : dims(dims_in) {
    const Tensor& y_or_x = y_in ? *y_in : x_in;
    TORCH_CHECK_VALUE(x_in.dim() == 2 && y_or_x.dim() == 2, "x and y must be matrices");
    TORCH_CHECK_VALUE(x_in.size(1) == y_or_x.size(1), "x and y must have the same last dimension");
    TORCH_CHECK_TYPE(x_in.scalar_type() == y_or_x.scalar_type(), "x and y must have the same dtype");
    TORCH_CHECK_VALUE(x_in.device().is_cpu() && y_or_x.device().is_cpu(), "x and y must be on the CPU");
    x = rows_contiguous(x_in);
    y = y_in ? rows_contiguous(*y_in) : x;
    scale = vector_of(scale_in.reshape({1}), 1, type(), "scale");
    target = vector_of(target_in, x.size(0), at::kLong, "target");
    differ_rows = vector_of(differ_rows_in, x.size(0), at::kLong, "differ_rows");
    differ_cols = vector_of(differ_cols_in, y.size(0), at::kLong, "differ_cols");
    TORCH_CHECK_VALUE(differ_rows.defined() == differ_cols.defined(), "differ must name both sides");
    TORCH_CHECK_VALUE(!dims.empty(), "dims must not be empty");
    for (size_t s = 0; s < dims.size(); ++s) {
      TORCH_CHECK_VALUE(dims[s] > (s == 0 ? 0 : dims[s - 1]) && dims[s] <= x.size(1), "dims must ascend within [1, ",
                        x.size(1), "], got ", dims[s]);
    }
    raw.dtype = dtype_of(x);
    raw.x = x.data_ptr();
    raw.y = y.data_ptr();
    raw.N = x.size(0);
    raw.M = y.size(0);
    raw.D = x.size(1);
    raw.x_stride = x.stride(0);
    raw.y_stride = y.stride(0);
    raw.self = !y_in;
    raw.dims = dims.data();
    raw.prefixes = static_cast<int64_t>(dims.size());
    raw.scale = scale.data_ptr();
    raw.normalize = normalize;
    raw.target = static_cast<const int64_t*>(data_or_null(target));
    raw.has_diagonal = diagonal.has_value();
    raw.diagonal = diagonal.value_or(0);
    raw.differ_rows = static_cast<const int64_t*>(data_or_null(differ_rows));
    raw.differ_cols = static_cast<const int64_t*>(data_or_null(differ_cols));
  }

  at::ScalarType type() const { return accumulator(x); }
  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, x.options().dtype(type())); }
  Tensor zeros(at::IntArrayRef shape) const { return at::zeros(shape, x.options().dtype(type())); }
  // (prefixes, size), or undefined.
  Tensor by_prefix(const OptionalTensor& t, int64_t size, const char* name) const {
    if (!t) return Tensor();
    TORCH_CHECK_VALUE(t->dim() == 2 && t->size(0) == raw.prefixes && t->size(1) == size, name, " must have shape (",
                      raw.prefixes, ", ", size, "), got ", t->sizes());
    TORCH_CHECK_TYPE(t->scalar_type() == type(), name, " must have dtype ", type(), ", got ", t->scalar_type());
    return t->contiguous();
  }
};

std::tuple<Tensor, Tensor, Tensor> similarity_prefix_forward(
    const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& target,
    const OptionalTensor& differ_rows, const OptionalTensor& differ_cols, const std::vector<int64_t>& dims,
    std::optional<int64_t> diagonal, bool normalize, int64_t directions) {
  const PrefixTensors p(x, y, scale, target, differ_rows, differ_cols, dims, diagonal, normalize);
  const bool by_rows = (directions & 1) != 0, by_cols = (directions & 2) != 0;
  TORCH_CHECK_VALUE(!p.raw.self || !by_cols, "self-similarity is folded by rows");
  Tensor rows = p.empty({p.raw.prefixes, by_rows ? p.raw.N : 0});
  Tensor cols = p.empty({p.raw.prefixes, by_cols ? p.raw.M : 0});
  Tensor target_logit = p.empty({p.raw.prefixes, target ? p.raw.N : 0});
  const SimilarityPrefixForward out{by_rows ? rows.data_ptr() : nullptr, by_cols ? cols.data_ptr() : nullptr,
                                    target ? target_logit.data_ptr() : nullptr};
  {
    pybind11::gil_scoped_release release;
    similarity_prefix_cpu().forward(p.raw, out, parallel());
  }
  return {rows, cols, target_logit};
}

std::tuple<Tensor, Tensor, Tensor> similarity_prefix_backward(
    const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& target,
    const OptionalTensor& differ_rows, const OptionalTensor& differ_cols, const std::vector<int64_t>& dims,
    std::optional<int64_t> diagonal, bool normalize, const Tensor& rows, const Tensor& cols,
    const OptionalTensor& d_rows, const OptionalTensor& d_cols, const OptionalTensor& d_target, int64_t needs) {
  const PrefixTensors p(x, y, scale, target, differ_rows, differ_cols, dims, diagonal, normalize);
  const auto wants = [&](int bit) { return (needs >> bit & 1) != 0; };
  // Only folds that have a gradient are read.
  const Tensor row_values = d_rows ? p.by_prefix(rows, p.raw.N, "rows") : Tensor();
  const Tensor col_values = d_cols ? p.by_prefix(cols, p.raw.M, "cols") : Tensor();
  const Tensor of_rows = p.by_prefix(d_rows, p.raw.N, "d_rows"), of_cols = p.by_prefix(d_cols, p.raw.M, "d_cols");
  const Tensor of_target = p.by_prefix(d_target, p.raw.N, "d_target");
  Tensor dx = p.zeros({wants(0) ? p.raw.N : 0, p.raw.D});
  Tensor dy = p.zeros({wants(1) && !p.raw.self ? p.raw.M : 0, p.raw.D});
  Tensor dscale = wants(2) ? p.zeros({}) : p.zeros({0});
  SimilarityPrefixBackward out{};
  out.rows = data_or_null(row_values);
  out.cols = data_or_null(col_values);
  out.d_rows = data_or_null(of_rows);
  out.d_cols = data_or_null(of_cols);
  out.d_target = data_or_null(of_target);
  if (wants(0)) out.dx = dx.data_ptr();
  if (wants(1) && !p.raw.self) out.dy = dy.data_ptr();
  if (wants(2)) out.dscale = dscale.data_ptr();
  {
    pybind11::gil_scoped_release release;
    similarity_prefix_cpu().backward(p.raw, out, parallel());
  }
  return {dx, dy, dscale};
}

}  // namespace
}  // namespace contrastive_ops
