// The pybind11 module contrastive_ops._C: checks what protects memory, allocates outputs, calls the SIMD level in
// use. The only file that includes torch/extension.h. Arguments for users are checked in Python.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <atomic>
#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/capability.h"
#include "similarity_reduce.h"

namespace contrastive_ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Indices are handed out one by one: tasks differ in length, and every task owns its outputs, so who runs which
// task does not change a result.
void run_tasks(int64_t count, Parallel::Task task, void* context) {
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  if (workers <= 1 || at::in_parallel_region()) {
    for (int64_t index = 0; index < count; ++index) task(context, index, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t index = next++; index < count; index = next++) task(context, index, static_cast<int>(worker));
    }
  });
}

Parallel parallel() { return {run_tasks, at::get_num_threads()}; }

at::ScalarType accumulator(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      TORCH_CHECK_TYPE(false, "x must be a floating tensor, got ", x.scalar_type());
  }
}

Tensor rows_contiguous(const Tensor& x) {
  // An empty stride check: a matrix of one column may carry any column stride.
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

Tensor vector_of(const OptionalTensor& v, int64_t size, at::ScalarType type, const char* name) {
  if (!v) return Tensor();
  TORCH_CHECK_VALUE(v->dim() == 1 && v->size(0) == size, name, " must have shape (", size, "), got ", v->sizes());
  TORCH_CHECK_TYPE(v->scalar_type() == type, name, " must have dtype ", type, ", got ", v->scalar_type());
  TORCH_CHECK_VALUE(v->device().is_cpu(), name, " must be on the CPU, got ", v->device());
  return v->contiguous();
}

void* data_or_null(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

// A SimilarityProblem with the tensors that its pointers point into.
struct Problem {
  Tensor x, y, scale, row_bias, col_bias, target;
  SimilarityProblem raw{};

  Problem(const Tensor& x_in, const OptionalTensor& y_in, const Tensor& scale_in, const OptionalTensor& row_bias_in,
          const OptionalTensor& col_bias_in, const OptionalTensor& target_in, std::optional<int64_t> diagonal) {
    const Tensor y_or_x = y_in ? *y_in : x_in;
    TORCH_CHECK_VALUE(x_in.dim() == 2 && y_or_x.dim() == 2, "x and y must be matrices");
    TORCH_CHECK_VALUE(x_in.size(1) == y_or_x.size(1), "x and y must have the same last dimension");
    TORCH_CHECK_TYPE(x_in.scalar_type() == y_or_x.scalar_type(), "x and y must have the same dtype");
    TORCH_CHECK_VALUE(x_in.device().is_cpu() && y_or_x.device().is_cpu(), "x and y must be on the CPU");
    x = rows_contiguous(x_in);
    y = y_in ? rows_contiguous(*y_in) : x;
    const auto type = accumulator(x);
    scale = vector_of(scale_in.dim() == 0 ? scale_in.expand({x.size(0)}) : scale_in, x.size(0), type, "scale");
    row_bias = vector_of(row_bias_in, x.size(0), type, "row_bias");
    col_bias = vector_of(col_bias_in, y.size(0), type, "col_bias");
    target = vector_of(target_in, x.size(0), at::kLong, "target");
    raw.dtype = dtype_of(x);
    raw.x = x.data_ptr();
    raw.y = y.data_ptr();
    raw.N = x.size(0);
    raw.M = y.size(0);
    raw.D = x.size(1);
    raw.x_stride = x.stride(0);
    raw.y_stride = y.stride(0);
    raw.self = !y_in;
    raw.scale = scale.data_ptr();
    raw.row_bias = data_or_null(row_bias);
    raw.col_bias = data_or_null(col_bias);
    raw.target = static_cast<const int64_t*>(data_or_null(target));
    raw.has_diagonal = diagonal.has_value();
    raw.diagonal = diagonal.value_or(0);
  }

  void keep(const Tensor& kept) {
    if (kept.numel() == 0) return;
    TORCH_CHECK_VALUE(kept.is_contiguous() && kept.scalar_type() == accumulator(x), "kept must come from forward");
    raw.kept = kept.data_ptr();
    raw.kept_size = kept.numel();
  }
  Tensor empty(int64_t size) const { return at::empty({size}, x.options().dtype(accumulator(x))); }
  Tensor zeros(at::IntArrayRef shape) const { return at::zeros(shape, x.options().dtype(accumulator(x))); }
};

struct Gradients {
  Tensor dx, dy, dscale, drow_bias, dcol_bias;
  SimilarityBackward raw{};

  // `needs`: which of x, y, scale, row_bias, col_bias need a gradient, one bit each.
  Gradients(const Problem& p, int64_t needs) {
    const auto wants = [&](int bit) { return (needs >> bit & 1) != 0; };
    dx = p.zeros({wants(0) ? p.raw.N : 0, p.raw.D});
    dy = p.zeros({wants(1) && !p.raw.self ? p.raw.M : 0, p.raw.D});
    dscale = p.zeros({wants(2) ? p.raw.N : 0});
    drow_bias = p.zeros({wants(3) ? p.raw.N : 0});
    dcol_bias = p.zeros({wants(4) ? p.raw.M : 0});
    if (wants(0)) raw.dx = dx.data_ptr();
    if (wants(1) && !p.raw.self) raw.dy = dy.data_ptr();
    if (wants(2)) raw.dscale = dscale.data_ptr();
    if (wants(3)) raw.drow_bias = drow_bias.data_ptr();
    if (wants(4)) raw.dcol_bias = dcol_bias.data_ptr();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_reduce_forward(
    const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const OptionalTensor& target, std::optional<int64_t> diagonal, bool rows, bool cols,
    int64_t kept_size) {
  Problem p(x, y, scale, row_bias, col_bias, target, diagonal);
  Tensor row_lse = p.empty(rows ? p.raw.N : 0), col_lse = p.empty(cols ? p.raw.M : 0);
  Tensor target_logit = p.empty(target ? p.raw.N : 0), kept = p.empty(kept_size);
  p.keep(kept);
  SimilarityForward out{};
  if (rows) out.row_lse = row_lse.data_ptr();
  if (cols) out.col_lse = col_lse.data_ptr();
  if (target) out.target_logit = target_logit.data_ptr();
  {
    pybind11::gil_scoped_release release;
    similarity_reduce_cpu().forward(p.raw, out, parallel());
  }
  return {row_lse, col_lse, target_logit, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_reduce_backward(
    const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const OptionalTensor& target, std::optional<int64_t> diagonal,
    const OptionalTensor& row_lse, const OptionalTensor& col_lse, const OptionalTensor& d_rows,
    const OptionalTensor& d_cols, const OptionalTensor& d_target, const Tensor& kept, int64_t needs) {
  Problem p(x, y, scale, row_bias, col_bias, target, diagonal);
  p.keep(kept);
  Gradients gradients(p, needs);
  const auto type = accumulator(x);
  const Tensor row = vector_of(row_lse, p.raw.N, type, "row_lse"), col = vector_of(col_lse, p.raw.M, type, "col_lse");
  const Tensor d_row = vector_of(d_rows, p.raw.N, type, "d_rows"), d_col = vector_of(d_cols, p.raw.M, type, "d_cols");
  const Tensor d_tgt = vector_of(d_target, p.raw.N, type, "d_target");
  TORCH_CHECK_VALUE(!d_row.defined() || row.defined(), "d_rows needs row_lse");
  TORCH_CHECK_VALUE(!d_col.defined() || col.defined(), "d_cols needs col_lse");
  gradients.raw.row_lse = data_or_null(row);
  gradients.raw.col_lse = data_or_null(col);
  gradients.raw.d_rows = data_or_null(d_row);
  gradients.raw.d_cols = data_or_null(d_col);
  gradients.raw.d_target = data_or_null(d_tgt);
  {
    pybind11::gil_scoped_release release;
    similarity_reduce_cpu().backward(p.raw, gradients.raw, parallel());
  }
  return {gradients.dx, gradients.dy, gradients.dscale, gradients.drow_bias, gradients.dcol_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_reduce_total(
    const Tensor& x, const OptionalTensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const Tensor& target, std::optional<int64_t> diagonal, const Tensor& weight,
    const OptionalTensor& extra, const OptionalTensor& target_weight, int64_t needs) {
  TORCH_CHECK_VALUE(y.has_value(), "the total needs y: self-similarity has no row statistics before its last tile");
  Problem p(x, y, scale, row_bias, col_bias, target, diagonal);
  Gradients gradients(p, needs);
  const auto type = accumulator(x);
  const Tensor w = vector_of(weight, p.raw.N, type, "weight"), e = vector_of(extra, p.raw.N, type, "extra");
  const Tensor tw = vector_of(target_weight, p.raw.N, type, "target_weight");
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
#ifdef CONTRASTIVE_OPS_X86
          {"cpu_levels", "default avx2 avx512 avx512_bf16"},
#else
          {"cpu_levels", "default"},
#endif
#ifdef _OPENMP
          {"openmp", "yes"},
#else
          {"openmp", "no"},
#endif
          {"cuda", "no"}};
}

}  // namespace
}  // namespace contrastive_ops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace contrastive_ops;  // NOLINT: the module is this namespace
  m.def("similarity_reduce_forward", &similarity_reduce_forward);
  m.def("similarity_reduce_backward", &similarity_reduce_backward);
  m.def("similarity_reduce_total", &similarity_reduce_total);
  m.def("build_config", &build_config, "Versions and options at build time.");
  m.def("cpu_capability", [] { return std::string(capability_name(capability())); }, "The SIMD level in use.");
  m.def("cpu_capability_detected", [] { return std::string(capability_name(detected_capability())); });
}
