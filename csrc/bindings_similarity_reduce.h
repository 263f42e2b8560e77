// Part of bindings.cpp: the functions of similarity_reduce.
#pragma once

#include "bindings_similarity_problem.h"

namespace contrastive_ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_reduce_forward(
    const Tensor& x, const Optional& y, const Tensor& scale, const Optional& row_bias, const Optional& col_bias,
    const Optional& target, const TensorList& pair_data, const Integers& spec, int64_t kept_size) {
  Problem p(x, y, scale, row_bias, col_bias, target, pair_data, spec);
  const int64_t N = p.raw.N;
  const Tensor folds = empty({p.total_size()}, p.type()), argmax = empty({p.argmax_size()}, Type::int64);
  const Tensor target_logit = empty({target ? N : 0}, p.type()), kept = empty({kept_size}, p.type());
  const Tensor linear = empty({p.raw.linear_indptr ? N : 0}, p.type());
  p.keep(kept);
  const auto values = p.parts<void>(folds);
  const auto winners = p.parts<int64_t>(argmax, true);
  run(similarity_reduce_cpu().forward, p.raw,
      SimilarityForward{values.data(), winners.data(), target ? target_logit.data : nullptr,
                        p.raw.linear_indptr ? linear.data : nullptr});
  return {folds, argmax, target_logit, linear, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_reduce_backward(
    const Tensor& x, const Optional& y, const Tensor& scale, const Optional& row_bias, const Optional& col_bias,
    const Optional& target, const TensorList& pair_data, const Integers& spec, const Tensor& folds,
    const Tensor& argmax, const Optional& d_folds, const Optional& d_target, const Optional& d_linear,
    const Tensor& kept, int64_t needs) {
  Problem p(x, y, scale, row_bias, col_bias, target, pair_data, spec);
  p.keep(kept);
  Gradients gradients(p, needs);
  const Tensor value = shaped(folds, {p.total_size()}, p.type(), "folds");
  const Tensor winner = shaped(argmax, {p.argmax_size()}, Type::int64, "argmax");
  const Tensor d_value = shaped(d_folds, {p.total_size()}, p.type(), "d_folds");
  const Tensor d_tgt = shaped(d_target, {p.raw.N}, p.type(), "d_target");
  const Tensor d_lin = shaped(d_linear, {p.raw.N}, p.type(), "d_linear");
  const auto values = p.parts<const void>(value), d_values = p.parts<const void>(d_value);
  const auto winners = p.parts<const int64_t>(winner, true);
  gradients.raw.values = values.data();
  gradients.raw.d_values = d_values.data();
  gradients.raw.argmax = winners.data();
  gradients.raw.d_target = d_tgt.data;
  gradients.raw.d_linear = p.raw.linear_indptr ? d_lin.data : nullptr;
  run(similarity_reduce_cpu().backward, p.raw, gradients.raw);
  return gradients.all();
}

}  // namespace
}  // namespace contrastive_ops
