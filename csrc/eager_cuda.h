// Part of eager.cpp: a loss whose inner products are one chunk, on a GPU. The launches are started from here, eight of
// them for a step in float32 and nine in 16 bits; what they are is in cuda/similarity_loss.h.
//
// Larger matrices take so long that nobody waits for the host: Python cuts them into chunks, as it does wherever
// `loss` returns None.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <torch/version.h>

#include "eager_problem.h"
#include "kernels.h"

namespace contrastive_ops {
namespace {

const Kernels* kernels = nullptr;
// Of tests: the kernels on the processor, for tensors on it.
const CudaKernels* host_kernels = nullptr;

// ---- Which calls ----------------------------------------------------------------------------------------------------

// As contrastive_ops/cuda/_chunks.py and _products.py, with the numbers of cuda/similarity_chunk.h.
constexpr int64_t kChunkRows = 4096, kChunkBytes = int64_t{256} << 20, kTileColumns = 256, kMostTileRows = 256,
                  kLeastTileRows = 8, kBlocks = 512, kPad = 8;
// Rows of a block of the kernel that forms rows' losses.
constexpr int64_t kBlockRows = 256;

int64_t tiles_of(int64_t size, int64_t step) { return (size + step - 1) / step; }
int64_t padded(int64_t size, int64_t step) { return tiles_of(size, step) * step; }

bool is_one_chunk(int64_t N, int64_t M) {
  if (N > kChunkRows) return false;
  return M <= std::max<int64_t>(1, kChunkBytes / (4 * N) / kTileColumns) * kTileColumns;
}

// The library's product of 16 bits with float32 results, which torch has from 2.8 on.
using WideProduct = Tensor&(const Tensor&, const Tensor&, at::ScalarType, Tensor&);
const std::optional<c10::TypedOperatorHandle<WideProduct>>& wide_product() {
  static const auto found = [] {
    const auto handle = c10::Dispatcher::singleton().findSchema({"aten::mm", "dtype_out"});
    return handle ? std::make_optional(handle->typed<WideProduct>()) : std::nullopt;
  }();
  return found;
}

// Whether products of this type are as exact as Python makes them, without switching anything.
bool has_exact_products(at::ScalarType type) {
  try {
    if (type == at::kFloat) return !at::globalContext().allowTF32CuBLAS();
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 7
    if (type == at::kHalf && at::globalContext().allowFP16AccumulationCuBLAS()) return false;
#endif
    return wide_product().has_value();
  } catch (const c10::Error&) {  // switches that were set in two ways
    return false;
  }
}

// Asks Python once for each GPU.
bool runs_on(const c10::Device& device) {
  static std::vector<int> known;
  const size_t index = static_cast<size_t>(device.index());
  if (known.size() <= index) known.resize(index + 1, -1);
  if (known[index] < 0) {
    const auto module = pybind11::module_::import("contrastive_ops.core.cuda_kernels");
    known[index] = module.attr("runs_on")(static_cast<int>(index)).cast<bool>();
  }
  return known[index] == 1;
}

bool fits_on_cuda(const Options& o, const Inputs& in) {
  const Tensor &x = in[kX], &y = in[kY];
  if (!y.defined() || (o.form != Form::columns && o.form != Form::partners) || in[kWeight].defined()) return false;
  if (x.scalar_type() == at::kDouble || o.reduction == Reduction::none) return false;
  const int64_t N = x.size(0), M = y.size(0);
  if (!is_one_chunk(N, M) || 4 * N * padded(M, kPad) > o.memory_budget) return false;
  if (!x.is_cuda()) return host_kernels != nullptr;
  return kernels->cuda != nullptr && runs_on(x.device()) && has_exact_products(x.scalar_type());
}

// ---- The chunk ------------------------------------------------------------------------------------------------------

// What one launch after another is told, and the memory that they share. Numbers stand one behind the other in few
// tensors, as asking for memory takes the host as long as starting a kernel.
struct CudaLoss {
  Options o;
  bool one_pass = false;
  int64_t N, M, D, pitch, across, down;
  std::array<int64_t, 7> chunk;
  std::vector<int64_t> spec;
  int fold_count;
  Tensor target, partner, dots, numbers, inverse_x, inverse_y;
  // Those of gradients, where forward forms them.
  Tensor dx, dy, parts, totals;
  int64_t row_residuals = -1, col_residuals = -1;

  CudaLoss(const Options& options, const Inputs& in)
      : o(options), N(in[kX].size(0)), M(in[kY].size(0)), D(in[kX].size(1)), pitch(padded(M, kPad)) {
    across = tiles_of(M, kTileColumns);
    const int64_t wanted = padded(tiles_of(N * across, kBlocks), kLeastTileRows);
    const int64_t tile_rows = std::min(std::max(wanted, kLeastTileRows), kMostTileRows);
    down = tiles_of(N, tile_rows);
    chunk = {pitch, 0, N, 0, M, tile_rows, 0};
    SimilarityFold folds[kRowFolds];
    fold_count = folds_of(o.kind, folds);
    spec = {1, fold_count, static_cast<int64_t>(ScaleOf::all), 0, 0, 0, 0};
    for (int f = 0; f < fold_count; ++f)
      spec.insert(spec.end(), {folds[f].set, static_cast<int>(folds[f].kind), folds[f].cols});
  }

  // In `numbers`: scale, norm, row_bias, the folds, their slopes, those of the targets' logits.
  float* at(int64_t place) const { return numbers.mutable_data_ptr<float>() + place; }
  float* scale() const { return at(0); }
  float* norm() const { return at(1); }
  float* row_bias() const { return o.has_bias ? at(2) : nullptr; }
  float* values() const { return at(2 + (o.has_bias ? N : 0)); }
  float* slopes() const { return values() + fold_count * N; }

  Integers chunk_numbers() const { return {chunk.data(), 7}; }
  Integers spec_numbers() const { return {spec.data(), static_cast<int64_t>(spec.size())}; }
};

struct CudaCall {
  const CudaKernels& run;
  c10::DeviceGuard guard;
  Stream stream = nullptr;
  bool on_host;

  explicit CudaCall(const Tensor& x)
      : run(x.is_cuda() ? *kernels->cuda : *host_kernels), guard(x.device()), on_host(!x.is_cuda()) {
    if (on_host) return;
    const pybind11::gil_scoped_acquire gil;
    stream = reinterpret_cast<Stream>(kernels->current_stream(x.device().index()));
  }

  // out = a @ b in float32, operands as they are; the processor, where tests run, has no products that widen.
  void multiply(Tensor out, const Tensor& a, const Tensor& b) const {
    if (a.scalar_type() == at::kFloat) {
      at::mm_out(out, a, b);
    } else if (on_host) {
      at::mm_out(out, a.to(at::kFloat), b.to(at::kFloat));
    } else {
      wide_product()->call(a, b, at::kFloat, out);
    }
  }
};

Tensor cuda_rows(const Options& o, const Tensor& x, Tensor& inverse) {
  if (!o.normalize) return x.contiguous();
  if (!inverse.defined()) inverse = inverse_lengths(x);
  return at::mul(x, inverse);
}

template <class T>
const T* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}
Input input_of(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t)}; }
Output output_of(const Tensor& t) {
  return t.defined() ? Output{t.data_ptr(), dtype_of(t)} : Output{nullptr, DType::float32};
}

// ---- Forward and backward -------------------------------------------------------------------------------------------

// The products of the weights, and the sums for scale and bias: complete, or, where gradients are rounded and where
// `factor` is null because nothing has arrived yet, for `leave`.
void form_gradients(const CudaCall& call, CudaLoss& l, const Tensor& x, const Tensor& y,
                    const std::array<bool, kDifferentiable>& wants, const float* factor) {
  const bool narrow = x.scalar_type() != at::kFloat;
  const auto options = x.options().dtype(at::kFloat);
  enum : int64_t { residual = 0, bias = 1, scale = 2 };  // as SumOf in cuda/similarity_sums.h
  std::vector<int64_t> sums, begins;
  int64_t row_sums = 0, col_sums = 0;
  const auto add = [&](int64_t what, int64_t set, bool cols) {
    sums.insert(sums.end(), {what, set, cols, 0});
    return cols ? col_sums++ * l.down * l.M : row_sums++ * l.across * l.N;
  };
  l.row_residuals = narrow && wants[kX] ? add(residual, -1, false) : -1;
  l.col_residuals = narrow && wants[kY] ? add(residual, -1, true) : -1;
  if (wants[kScale]) begins.push_back(add(scale, 0, false));
  if (wants[kBias]) begins.push_back(add(bias, -1, false));
  const int64_t of_rows = row_sums * l.across * l.N;
  if (l.col_residuals >= 0) l.col_residuals += of_rows;
  l.parts = at::empty({of_rows + col_sums * l.down * l.M}, options);
  Tensor weights;
  if (wants[kX] || wants[kY]) weights = at::empty({l.N * l.pitch}, x.options());
  const float* up_by = x.scalar_type() == at::kHalf ? l.norm() : narrow ? nullptr : factor;
  call.run.similarity_reduce_weigh(
      call.stream, l.dots.const_data_ptr<float>(), nullptr, l.chunk_numbers(), {nullptr, 0}, l.spec_numbers(),
      l.scale(), l.row_bias(), nullptr, l.target.const_data_ptr<int64_t>(), l.N, l.M, l.values(), nullptr, l.slopes(),
      l.slopes() + l.fold_count * l.N, nullptr, up_by, output_of(weights),
      {sums.data(), static_cast<int64_t>(sums.size())}, l.parts.data_ptr<float>(), nullptr);
  if (weights.defined()) {
    const Tensor matrix = weights.as_strided({l.N, l.M}, {l.pitch, 1});
    if (wants[kX]) call.multiply(l.dx = at::empty({l.N, l.D}, options), matrix, y);
    if (wants[kY]) call.multiply(l.dy = at::empty({l.M, l.D}, options), matrix.t(), x);
  }
  if (begins.empty()) return;
  l.totals = at::empty({static_cast<int64_t>(begins.size())}, options);
  call.run.similarity_loss_totals(call.stream, l.parts.const_data_ptr<float>(),
                                  {begins.data(), static_cast<int64_t>(begins.size())}, l.across * l.N,
                                  narrow ? nullptr : factor, wants[kScale] && l.o.inverted ? l.scale() : nullptr,
                                  l.totals.data_ptr<float>());
}

// Gradients of x, y and the sums as they leave, from those that were formed.
struct Leaving {
  Tensor dx, dy, totals;
};
Leaving leave(const CudaCall& call, const CudaLoss& l, const Tensor& x, const Tensor& y, const float* factor) {
  const auto like = [&](const Tensor& t, at::ScalarType type) {
    return t.defined() ? at::empty(t.sizes(), t.options().dtype(type)) : Tensor();
  };
  Leaving out{like(l.dx, x.scalar_type()), like(l.dy, x.scalar_type()), like(l.totals, at::kFloat)};
  call.run.similarity_loss_finish(
      call.stream, data_or_null<float>(l.dx), data_or_null<float>(l.dy), input_of(x), input_of(y), l.N, l.M, l.D,
      x.scalar_type() == at::kHalf ? l.norm() : nullptr, factor, l.parts.const_data_ptr<float>(), l.row_residuals,
      l.col_residuals, l.across, l.down, l.target.const_data_ptr<int64_t>(), data_or_null<int64_t>(l.partner),
      output_of(out.dx), output_of(out.dy), data_or_null<float>(l.totals), l.totals.defined() ? l.totals.numel() : 0,
      l.totals.defined() ? out.totals.data_ptr<float>() : nullptr);
  return out;
}

// The loss, and in `l` what backward needs.
Tensor cuda_forward(CudaLoss& l, const Inputs& in, const std::array<bool, kDifferentiable>& wants, bool swept) {
  const CudaCall call(in[kX]);
  const Tensor x = cuda_rows(l.o, in[kX], l.inverse_x), y = cuda_rows(l.o, in[kY], l.inverse_y);
  const auto options = x.options().dtype(at::kFloat);
  const bool own_target = !in[kTarget].defined();
  l.target = own_target ? at::empty({l.N}, options.dtype(at::kLong)) : in[kTarget].contiguous();
  l.numbers = at::empty({2 + (l.o.has_bias ? l.N : 0) + (2 * l.fold_count + 1) * l.N}, options);
  l.dots = at::empty({l.N * l.pitch}, options);
  Tensor result = at::empty({}, options);
  const Tensor parts = at::empty({2 * (l.across * l.N + l.down * l.M)}, options);
  const int64_t blocks = tiles_of(l.N, kBlockRows);
  const Tensor sums = at::empty({2 * blocks + 1}, options.dtype(at::kDouble));
  double* of_blocks = sums.data_ptr<double>();
  int32_t* ticket = reinterpret_cast<int32_t*>(of_blocks + 2 * blocks);

  call.run.similarity_loss_prepare(call.stream, data_or_null<float>(in[kScale]), l.o.number, l.o.inverted,
                                   data_or_null<float>(in[kBias]), l.o.bias_number, l.N, l.scale(), l.row_bias(),
                                   own_target ? l.target.data_ptr<int64_t>() : nullptr, ticket);
  call.multiply(l.dots.as_strided({l.N, l.M}, {l.pitch, 1}), x, y.t());
  call.run.similarity_reduce_fold(call.stream, l.dots.const_data_ptr<float>(), nullptr, l.chunk_numbers(), {nullptr, 0},
                                  l.spec_numbers(), l.scale(), l.row_bias(), nullptr,
                                  l.target.const_data_ptr<int64_t>(), l.N, l.M, parts.data_ptr<float>(), nullptr);
  call.run.similarity_loss_rows(
      call.stream, l.dots.const_data_ptr<float>(), l.chunk_numbers(), {nullptr, 0}, l.spec_numbers(), l.scale(),
      l.row_bias(), nullptr, l.target.const_data_ptr<int64_t>(), l.N, l.M, parts.const_data_ptr<float>(),
      static_cast<int64_t>(l.o.kind), l.o.reduction == Reduction::mean ? static_cast<double>(l.N) : 1.0, ticket,
      of_blocks, l.values(), l.slopes(), result.data_ptr<float>(), x.scalar_type() == at::kHalf ? l.norm() : nullptr);
  if (!swept) return result;
  if (!own_target && wants[kY] && x.scalar_type() != at::kFloat) {
    l.partner = at::full({l.M}, -1, options.dtype(at::kLong));
    call.run.similarity_reduce_partners(call.stream, l.target.const_data_ptr<int64_t>(), l.N, l.M,
                                        l.partner.data_ptr<int64_t>());
  }
  l.one_pass = in_one_pass(l.o.kind, l.o.reduction, false);
  if (!l.one_pass) return result;
  form_gradients(call, l, x, y, wants, nullptr);
  l.dots.reset();
  return result;
}

// The gradients by what the sweep saw.
Leaving cuda_backward(const CudaLoss& kept, const Inputs& in, const std::array<bool, kDifferentiable>& wants,
                      const Tensor& d_loss) {
  const CudaCall call(in[kX]);
  CudaLoss l = kept;  // which a graph that is kept needs again
  const Tensor x = cuda_rows(l.o, in[kX], l.inverse_x), y = cuda_rows(l.o, in[kY], l.inverse_y);
  const float* factor = d_loss.const_data_ptr<float>();
  if (!l.one_pass) form_gradients(call, l, x, y, wants, factor);
  if (!l.one_pass && x.scalar_type() == at::kFloat) return {l.dx, l.dy, l.totals};
  return leave(call, l, x, y, factor);
}

}  // namespace
}  // namespace contrastive_ops
