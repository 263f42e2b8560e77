// Part of bindings.cpp, the only file that includes it: the functions of similarity_values.
#pragma once

#include <tuple>
#include <vector>

#include "bindings_similarity_gradients.h"
#include "similarity_values.h"

namespace contrastive_ops {
namespace {

// A ValuesProblem with the tensors that its pointers point into.
struct WeightedValues {
  Problem logits;
  Tensor values;
  ValuesProblem raw{};

  WeightedValues(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& row_bias,
                 const OptionalTensor& col_bias, const Tensor& values_in, const std::vector<Tensor>& pair_data,
                 const std::vector<int64_t>& spec, const Tensor& kept)
      : logits(x, y, scale, row_bias, col_bias, std::nullopt, pair_data, spec) {
    TORCH_CHECK_VALUE(values_in.dim() == 2 && values_in.size(0) == logits.raw.M, "values must have the rows of y");
    TORCH_CHECK_TYPE(values_in.scalar_type() == x.scalar_type(), "values must have the dtype of x");
    TORCH_CHECK_VALUE(values_in.device().is_cpu(), "values must be on the CPU");
    const bool lse = logits.folds.size() == 1 && logits.folds[0].kind == FoldKind::logsumexp && !logits.folds[0].cols;
    TORCH_CHECK_VALUE(logits.sets.size() == 1 && lse, "similarity_values takes one set and its logsumexp of rows");
    logits.keep(kept);
    values = rows_contiguous(values_in);
    raw.logits = logits.raw;
    raw.values = values.data_ptr();
    raw.depth = values.size(1);
    raw.stride = values.stride(0);
  }
};

std::tuple<Tensor, Tensor, Tensor> similarity_values_forward(const Tensor& x, const Tensor& y, const Tensor& scale,
                                                             const OptionalTensor& row_bias,
                                                             const OptionalTensor& col_bias, const Tensor& values,
                                                             const std::vector<Tensor>& pair_data,
                                                             const std::vector<int64_t>& spec, int64_t kept_size) {
  const Tensor kept = at::empty({kept_size}, x.options().dtype(accumulator(x)));
  const WeightedValues p(x, y, scale, row_bias, col_bias, values, pair_data, spec, kept);
  Tensor sums = p.logits.sums({p.raw.logits.N, p.raw.depth}), lse = p.logits.empty(p.raw.logits.N);
  const ValuesForward out{lse.data_ptr(), sums.data_ptr()};
  {
    pybind11::gil_scoped_release release;
    similarity_values_cpu().forward(p.raw, out, parallel());
  }
  return {sums, lse, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_values_backward(
    const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const Tensor& values, const std::vector<Tensor>& pair_data,
    const std::vector<int64_t>& spec, const Tensor& sums, const Tensor& lse, const Tensor& d_sums, const Tensor& kept,
    int64_t needs) {
  const WeightedValues p(x, y, scale, row_bias, col_bias, values, pair_data, spec, kept);
  const int64_t N = p.raw.logits.N, M = p.raw.logits.M, depth = p.raw.depth;
  TORCH_CHECK_VALUE(sums.sizes() == at::IntArrayRef({N, depth}) && sums.scalar_type() == p.logits.type() &&
                        sums.sizes() == d_sums.sizes(),
                    "sums and d_sums must be those of forward");
  const Tensor known = vector_of(lse, N, p.logits.type(), "lse"), found = sums.contiguous();
  const Tensor upstream = d_sums.to(values.scalar_type()).contiguous(), wide = upstream.to(p.logits.type());
  Gradients gradients(p.logits, needs & 31);
  Tensor d_values = p.logits.sums({needs & 32 ? M : 0, depth});
  const ValuesBackward raw{known.data_ptr(), found.data_ptr(), upstream.data_ptr(),
                           wide.data_ptr(),  gradients.raw,    needs & 32 ? d_values.data_ptr() : nullptr};
  {
    pybind11::gil_scoped_release release;
    similarity_values_cpu().backward(p.raw, raw, parallel());
  }
  return {gradients.dx, gradients.dy, gradients.dscale, gradients.drow_bias, gradients.dcol_bias, d_values};
}

}  // namespace
}  // namespace contrastive_ops
