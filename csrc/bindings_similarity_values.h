// Part of bindings.cpp: the functions of similarity_values.
#pragma once

#include "bindings_similarity_problem.h"
#include "similarity_values.h"

namespace contrastive_ops {
namespace {

// A ValuesProblem with the tensors that its pointers point into.
struct WeightedValues {
  Problem logits;
  Tensor values;
  ValuesProblem raw{};

  WeightedValues(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& row_bias, const Tensor& col_bias,
                 const Tensor& values_in, const TensorList& pair_data, const Integers& spec, const Tensor& kept)
      : logits(x, y, scale, row_bias, col_bias, Tensor(), pair_data, spec) {
    CHECK_VALUE(values_in.dims == 2 && values_in.size(0) == logits.raw.M, "values must have the rows of y");
    CHECK_TYPE(values_in.type == x.type, "values must have the dtype of x");
    check_on_cpu(values_in, "values");
    const bool lse = logits.folds.size() == 1 && logits.folds[0].kind == FoldKind::logsumexp && !logits.folds[0].cols;
    CHECK_VALUE(logits.sets.size() == 1 && lse, "similarity_values takes one set and its logsumexp of rows");
    logits.keep(kept);
    values = values_in.rows_contiguous();
    raw = {logits.raw, values.data, values.size(1), values.stride(0)};
  }
};

std::tuple<Tensor, Tensor, Tensor> similarity_values_forward(const Tensor& x, const Tensor& y, const Tensor& scale,
                                                             const Optional& row_bias, const Optional& col_bias,
                                                             const Tensor& values, const TensorList& pair_data,
                                                             const Integers& spec, int64_t kept_size) {
  const Tensor kept = empty({kept_size}, accumulator(x.type));
  const WeightedValues p(x, y, scale, row_bias, col_bias, values, pair_data, spec, kept);
  const Type type = p.logits.type();
  const Tensor sums = sums_over_pairs(p.logits, {p.raw.logits.N, p.raw.depth}), lse = empty({p.raw.logits.N}, type);
  run(similarity_values_cpu().forward, p.raw, ValuesForward{lse.data, sums.data});
  return {sums, lse, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_values_backward(
    const Tensor& x, const Tensor& y, const Tensor& scale, const Optional& row_bias, const Optional& col_bias,
    const Tensor& values, const TensorList& pair_data, const Integers& spec, const Tensor& sums, const Tensor& lse,
    const Tensor& d_sums, const Tensor& kept, int64_t needs) {
  const WeightedValues p(x, y, scale, row_bias, col_bias, values, pair_data, spec, kept);
  const int64_t N = p.raw.logits.N, M = p.raw.logits.M, depth = p.raw.depth;
  const Type type = p.logits.type();
  const Tensor found = shaped(sums, {N, depth}, type, "sums"), known = shaped(lse, {N}, type, "lse");
  const Tensor upstream = shaped(d_sums, {N, depth}, d_sums.type, "d_sums").to(values.type), wide = upstream.to(type);
  const Gradients gradients(p.logits, needs & 31);
  const Tensor d_values = sums_over_pairs(p.logits, {needs & 32 ? M : 0, depth});
  run(similarity_values_cpu().backward, p.raw,
      ValuesBackward{known.data, found.data, upstream.data, wide.data, gradients.raw,
                     needs & 32 ? d_values.data : nullptr});
  return std::tuple_cat(gradients.all(), std::tuple(d_values));
}

}  // namespace
}  // namespace contrastive_ops
