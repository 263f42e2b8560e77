// The pybind11 module contrastive_ops._C: checks what protects memory, allocates outputs, calls the SIMD level in
// use. With its headers and bindings_cuda.cpp the only file that includes headers of torch. Arguments for users are
// checked in Python.
#include <torch/extension.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_expert_routing.h"
#include "bindings_grouped_matmul.h"
#include "bindings_maxsim.h"
#include "bindings_similarity_distill.h"
#include "bindings_similarity_gradients.h"
#include "bindings_similarity_prefix.h"
#include "bindings_similarity_problem.h"
#include "bindings_similarity_topk.h"
#include "bindings_similarity_values.h"
#include "cpu/capability.h"
#include "cpu/scratch.h"
#include "similarity_reduce.h"

namespace contrastive_ops {

void define_cuda_functions(pybind11::module_& m);  // of bindings_cuda.cpp

namespace {

constexpr FoldKind kMax = FoldKind::max;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_reduce_forward(
    const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const OptionalTensor& target, const std::vector<Tensor>& pair_data,
    const std::vector<int64_t>& spec, int64_t kept_size) {
  Problem p(x, y, scale, row_bias, col_bias, target, pair_data, spec);
  Tensor folds = p.empty(p.total_size()), target_logit = p.empty(target ? p.raw.N : 0), kept = p.empty(kept_size);
  Tensor argmax = at::empty({p.argmax_size()}, x.options().dtype(at::kLong));
  Tensor linear = p.empty(p.raw.linear_indptr ? p.raw.N : 0);
  p.keep(kept);
  const auto values = p.parts<void>(folds);
  const auto winners = p.parts<int64_t>(argmax, &kMax);
  SimilarityForward out{};
  out.values = values.data();
  out.argmax = winners.data();
  if (target) out.target_logit = target_logit.data_ptr();
  if (p.raw.linear_indptr) out.linear = linear.data_ptr();
  {
    pybind11::gil_scoped_release release;
    similarity_reduce_cpu().forward(p.raw, out, parallel());
  }
  return {folds, argmax, target_logit, linear, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_reduce_backward(
    const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const OptionalTensor& target, const std::vector<Tensor>& pair_data,
    const std::vector<int64_t>& spec, const Tensor& folds, const Tensor& argmax, const OptionalTensor& d_folds,
    const OptionalTensor& d_target, const OptionalTensor& d_linear, const Tensor& kept, int64_t needs) {
  Problem p(x, y, scale, row_bias, col_bias, target, pair_data, spec);
  p.keep(kept);
  Gradients gradients(p, needs);
  const Tensor value = vector_of(folds, p.total_size(), p.type(), "folds");
  const Tensor winner = vector_of(argmax, p.argmax_size(), at::kLong, "argmax");
  const Tensor d_value = vector_of(d_folds, p.total_size(), p.type(), "d_folds");
  const Tensor d_tgt = vector_of(d_target, p.raw.N, p.type(), "d_target");
  const Tensor d_lin = vector_of(d_linear, p.raw.N, p.type(), "d_linear");
  const auto values = p.parts<const void>(value), d_values = p.parts<const void>(d_value);
  const auto winners = p.parts<const int64_t>(winner, &kMax);
  gradients.raw.values = values.data();
  gradients.raw.d_values = d_values.data();
  gradients.raw.argmax = winners.data();
  gradients.raw.d_target = data_or_null(d_tgt);
  gradients.raw.d_linear = p.raw.linear_indptr ? data_or_null(d_lin) : nullptr;
  {
    pybind11::gil_scoped_release release;
    similarity_reduce_cpu().backward(p.raw, gradients.raw, parallel());
  }
  return {gradients.dx, gradients.dy, gradients.dscale, gradients.drow_bias, gradients.dcol_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_reduce_total(
    const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const Tensor& target, const std::vector<Tensor>& pair_data,
    const std::vector<int64_t>& spec, const Tensor& weight, const OptionalTensor& extra,
    const OptionalTensor& target_weight, int64_t needs) {
  TORCH_CHECK_VALUE(y.has_value(), "the total needs y: self-similarity has no row statistics before its last tile");
  Problem p(x, y, scale, row_bias, col_bias, target, pair_data, spec);
  TORCH_CHECK_VALUE(p.folds.size() == 1 && !p.folds[0].cols && p.sets.size() == 1, "the total is of one fold of rows");
  Gradients gradients(p, needs);
  const Tensor w = vector_of(weight, p.raw.N, p.type(), "weight"), e = vector_of(extra, p.raw.N, p.type(), "extra");
  const Tensor tw = vector_of(target_weight, p.raw.N, p.type(), "target_weight");
  Tensor losses = p.empty(p.raw.N), target_logit = p.empty(p.raw.N), dextra = p.empty(extra ? p.raw.N : 0);
  SimilarityTotal out{};
  out.weight = w.data_ptr();
  out.extra = data_or_null(e);
  out.target_weight = data_or_null(tw);
  out.losses = losses.data_ptr();
  out.target_logit = target_logit.data_ptr();
  if (extra) out.dextra = dextra.data_ptr();
  out.gradients = gradients.raw;
  {
    pybind11::gil_scoped_release release;
    similarity_reduce_cpu().total(p.raw, out, parallel());
  }
  return {losses,           target_logit,        gradients.dx,        gradients.dy,
          gradients.dscale, gradients.drow_bias, gradients.dcol_bias, dextra};
}

std::map<std::string, std::string> build_config() {
  return {{"torch", CONTRASTIVE_OPS_TORCH_VERSION},
          {"compiler", __VERSION__},
#ifdef CONTRASTIVE_OPS_AMX
          {"cpu_levels", "default avx2 avx512 avx512_bf16 amx"},
#elif defined(CONTRASTIVE_OPS_X86)
          {"cpu_levels", "default avx2 avx512 avx512_bf16"},
#else
          {"cpu_levels", "default"},
#endif
#ifdef _OPENMP
          {"openmp", "yes"},
#else
          {"openmp", "no"},
#endif
#ifdef CONTRASTIVE_OPS_CUDA
          {"cuda", CONTRASTIVE_OPS_CUDA}};
#else
          {"cuda", "no"}};
#endif
}

}  // namespace
}  // namespace contrastive_ops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace contrastive_ops;  // NOLINT: the module is this namespace
  m.def("similarity_reduce_forward", &similarity_reduce_forward);
  m.def("similarity_reduce_backward", &similarity_reduce_backward);
  m.def("similarity_reduce_total", &similarity_reduce_total);
  m.def("similarity_distill_forward", &similarity_distill_forward);
  m.def("similarity_distill_backward", &similarity_distill_backward);
  m.def("similarity_prefix_forward", &similarity_prefix_forward);
  m.def("similarity_prefix_backward", &similarity_prefix_backward);
  m.def("similarity_topk_forward", &similarity_topk_forward);
  m.def("similarity_topk_at", &similarity_topk_at);
  m.def("similarity_topk_backward", &similarity_topk_backward);
  m.def("similarity_topk_merge", &similarity_topk_merge);
  m.def("similarity_values_forward", &similarity_values_forward);
  m.def("similarity_values_backward", &similarity_values_backward);
  m.def("similarity_topk_order", &similarity_topk_order);
  m.def("expert_routing_route", &expert_routing_route);
  m.def("expert_routing_route_backward", &expert_routing_route_backward);
  m.def("expert_routing_scores", &expert_routing_scores);
  m.def("expert_routing_scores_backward", &expert_routing_scores_backward);
  m.def("expert_routing_slots", &expert_routing_slots);
  m.def("expert_routing_dispatch", &expert_routing_dispatch);
  m.def("expert_routing_combine", &expert_routing_combine);
  m.def("expert_routing_dots", &expert_routing_dots);
  m.def("grouped_matmul_forward", &grouped_matmul_forward);
  m.def("grouped_matmul_outer", &grouped_matmul_outer);
  m.def("maxsim_forward", &maxsim_forward);
  m.def("maxsim_backward", &maxsim_backward);
#ifdef CONTRASTIVE_OPS_CUDA
  define_cuda_functions(m);
#endif
  m.def("build_config", &build_config, "Versions and options at build time.");
  m.def("cpu_capability", [] { return std::string(capability_name(capability())); }, "The SIMD level in use.");
  m.def("release_scratch", &release_scratch,
        "Returns the kernels' memory to the allocator, and how many bytes it was.");
  m.def("cpu_capability_detected", [] { return std::string(capability_name(detected_capability())); });
}
