// Part of eager.cpp: a loss whose inner products are one chunk, on a GPU. The launches are started from here, eight of
// them for a step, and nine for unit rows of 16 bits; what they are is in cuda/similarity_loss.h.
//
// Larger matrices take so long that nobody waits for the host: Python cuts them into chunks, as it does wherever
// `loss` returns None.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <torch/version.h>

#include <array>
#include <atomic>

#include "eager_problem.h"
#include "kernels.h"

namespace contrastive_ops {
namespace {

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

// Asks Python once for each GPU, or once in each thread that comes before an answer.
bool runs_on(const c10::Device& device) {
  enum Answer : char { kUnknown, kNo, kYes };
  static std::array<std::atomic<Answer>, 128> known{};  // device.index() is an int8_t
  std::atomic<Answer>& answer = known[static_cast<size_t>(device.index())];
  if (answer == kUnknown) {
    const auto module = pybind11::module_::import("contrastive_ops.core.cuda_kernels");
    answer = module.attr("runs_on")(static_cast<int>(device.index())).cast<bool>() ? kYes : kNo;
  }
  return answer == kYes;
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
  Tensor target, partner, dots, numbers;
  Tensor x, y, lengths;  // the rows that are multiplied, where they are not those that were given
  // Those of gradients, where forward forms them.
  Tensor dx, dy, parts;
  std::vector<int64_t> begins;  // of the sums for scale and bias in `parts`
  int64_t row_residuals = -1, col_residuals = -1;
  bool has_scale_sum = false;  // as the first

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
    if (has_factors(in[kX])) {
      spec.back() = 2;
      spec.insert(spec.end(), {static_cast<int64_t>(PairSlot::row_factor), static_cast<int64_t>(PairSlot::col_factor)});
    }
    for (int f = 0; f < fold_count; ++f)
      spec.insert(spec.end(), {folds[f].set, static_cast<int>(folds[f].kind), folds[f].cols});
  }

  // Whether inner products are multiplied by what is left of lengths.
  bool has_factors(const Tensor& given) const { return o.normalize && given.scalar_type() != at::kFloat; }
  const float* row_factor() const { return lengths.const_data_ptr<float>() + N; }
  const float* col_factor() const { return lengths.const_data_ptr<float>() + 2 * N + M; }

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

// The tensors that a CudaLoss has for its sets, as kernels read them.
struct PairData {
  std::vector<Array> arrays;

  PairData(const CudaLoss& l, const Tensor& given) {
    if (!l.has_factors(given)) return;
    const auto add = [&](const float* from, int64_t size) {
      Array array;
      array.data = const_cast<float*>(from), array.type = Type::float32, array.dims = 1;
      array.sizes[0] = size, array.strides[0] = 1;
      arrays.push_back(array);
    };
    add(l.row_factor(), l.N);
    add(l.col_factor(), l.M);
  }
  Arrays list() const { return {arrays.data(), static_cast<int64_t>(arrays.size())}; }
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

template <class T>
const T* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}
Input input_of(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t)}; }
Output output_of(const Tensor& t) {
  return t.defined() ? Output{t.data_ptr(), dtype_of(t)} : Output{nullptr, DType::float32};
}

// ---- Forward and backward -------------------------------------------------------------------------------------------

// The matrices that are multiplied.
struct Sides {
  Tensor x, y;
  Sides(const CudaLoss& l, const Inputs& in)
      : x(l.x.defined() ? l.x : in[kX].contiguous()), y(l.y.defined() ? l.y : in[kY].contiguous()) {}
};

// The products of the weights, and the parts of the sums for scale and bias. `factor`, where it is known and nothing is
// left to do for each row, takes the place of the norm.
void form_gradients(const CudaCall& call, CudaLoss& l, const Sides& sides, const PairData& pair_data,
                    const std::array<bool, kDifferentiable>& wants, const float* factor) {
  const auto type = sides.x.scalar_type();
  const auto options = sides.x.options().dtype(at::kFloat);
  enum : int64_t { residual = 0, bias = 1, scale = 2 };  // as SumOf in cuda/similarity_sums.h
  std::vector<int64_t> sums;
  int64_t row_sums = 0, col_sums = 0;
  const auto add = [&](int64_t what, int64_t set, bool cols) {
    sums.insert(sums.end(), {what, set, cols, 0});
    return cols ? col_sums++ * l.down * l.M : row_sums++ * l.across * l.N;
  };
  l.row_residuals = type != at::kFloat && wants[kX] ? add(residual, -1, false) : -1;
  l.col_residuals = type != at::kFloat && wants[kY] ? add(residual, -1, true) : -1;
  if (wants[kScale]) l.begins.push_back(add(scale, 0, false));
  if (wants[kBias]) l.begins.push_back(add(bias, -1, false));
  const int64_t of_rows = row_sums * l.across * l.N;
  if (l.col_residuals >= 0) l.col_residuals += of_rows;
  l.parts = at::empty({of_rows + col_sums * l.down * l.M}, options);
  Tensor weights;
  if (wants[kX] || wants[kY]) weights = at::empty({l.N * l.pitch}, sides.x.options());
  call.run.similarity_reduce_weigh(
      call.stream, l.dots.const_data_ptr<float>(), nullptr, l.chunk_numbers(), pair_data.list(), l.spec_numbers(),
      l.scale(), l.row_bias(), nullptr, l.target.const_data_ptr<int64_t>(), l.N, l.M, l.values(), nullptr, l.slopes(),
      l.slopes() + l.fold_count * l.N, nullptr, type == at::kHalf ? l.norm() : factor, output_of(weights),
      {sums.data(), static_cast<int64_t>(sums.size())}, l.parts.data_ptr<float>(), nullptr);
  if (!weights.defined()) return;
  const Tensor matrix = weights.as_strided({l.N, l.M}, {l.pitch, 1});
  if (wants[kX]) call.multiply(l.dx = at::empty({l.N, l.D}, options), matrix, sides.y);
  if (wants[kY]) call.multiply(l.dy = at::empty({l.M, l.D}, options), matrix.t(), sides.x);
}

// Gradients of x, y and the sums as they leave, from those that were formed.
struct Leaving {
  Tensor dx, dy, totals;
};
Leaving leave(const CudaCall& call, const CudaLoss& l, const Sides& sides, const float* factor, bool direct) {
  Leaving out;
  const auto begins = static_cast<int64_t>(l.begins.size());
  if (direct) out = {l.dx, l.dy, Tensor()};
  if (direct && begins == 0) return out;
  const Tensor dx = direct ? Tensor() : l.dx, dy = direct ? Tensor() : l.dy;
  if (dx.defined()) out.dx = at::empty({l.N, l.D}, sides.x.options());
  if (dy.defined()) out.dy = at::empty({l.M, l.D}, sides.y.options());
  if (begins > 0) out.totals = at::empty({begins}, l.numbers.options());
  call.run.similarity_loss_finish(
      call.stream, data_or_null<float>(dx), data_or_null<float>(dy), input_of(sides.x), input_of(sides.y),
      data_or_null<float>(l.lengths), l.N, l.M, l.D, sides.x.scalar_type() == at::kHalf ? l.norm() : nullptr, factor,
      l.parts.const_data_ptr<float>(), l.row_residuals, l.col_residuals, l.across, l.down,
      l.target.const_data_ptr<int64_t>(), data_or_null<int64_t>(l.partner), output_of(direct ? Tensor() : out.dx),
      output_of(direct ? Tensor() : out.dy), {l.begins.data(), begins},
      begins > 0 && l.o.inverted && l.has_scale_sum ? l.scale() : nullptr,
      begins > 0 ? out.totals.data_ptr<float>() : nullptr);
  return out;
}

// Memory for a step, and its first launch.
int32_t* begin(const CudaCall& call, CudaLoss& l, const Inputs& in, double* of_blocks) {
  const auto options = in[kX].options().dtype(at::kFloat);
  const bool own_target = !in[kTarget].defined();
  const Tensor given_x = in[kX].contiguous(), given_y = in[kY].contiguous();
  l.target = own_target ? at::empty({l.N}, options.dtype(at::kLong)) : in[kTarget].contiguous();
  l.numbers = at::empty({2 + (l.o.has_bias ? l.N : 0) + (2 * l.fold_count + 1) * l.N}, options);
  l.dots = at::empty({l.N * l.pitch}, options);
  if (l.o.normalize) {
    l.x = at::empty_like(given_x), l.y = at::empty_like(given_y);
    l.lengths = at::empty({2 * (l.N + l.M)}, options);
  }
  int32_t* ticket = reinterpret_cast<int32_t*>(of_blocks + 2 * tiles_of(l.N, kBlockRows));
  call.run.similarity_loss_prepare(call.stream, data_or_null<float>(in[kScale]), l.o.number, l.o.inverted,
                                   data_or_null<float>(in[kBias]), l.o.bias_number, l.N, l.scale(), l.row_bias(),
                                   own_target ? l.target.data_ptr<int64_t>() : nullptr, ticket, input_of(given_x),
                                   input_of(given_y), l.M, l.D, output_of(l.x), output_of(l.y),
                                   l.o.normalize ? l.lengths.data_ptr<float>() : nullptr);
  return ticket;
}

// The loss, and in `l` what backward needs.
Tensor cuda_forward(CudaLoss& l, const Inputs& in, const std::array<bool, kDifferentiable>& wants, bool swept) {
  const CudaCall call(in[kX]);
  const auto options = in[kX].options().dtype(at::kFloat);
  const Tensor result = at::empty({}, options), parts = at::empty({2 * (l.across * l.N + l.down * l.M)}, options);
  const Tensor sums = at::empty({2 * tiles_of(l.N, kBlockRows) + 1}, options.dtype(at::kDouble));
  int32_t* ticket = begin(call, l, in, sums.data_ptr<double>());
  const Sides sides(l, in);
  const PairData pair_data(l, in[kX]);
  call.multiply(l.dots.as_strided({l.N, l.M}, {l.pitch, 1}), sides.x, sides.y.t());
  if (l.has_factors(in[kX])) {
    call.run.similarity_loss_multiply(call.stream, l.dots.data_ptr<float>(), l.N, l.M, l.pitch, l.row_factor(),
                                      l.col_factor());
  }
  call.run.similarity_reduce_fold(call.stream, l.dots.const_data_ptr<float>(), nullptr, l.chunk_numbers(),
                                  pair_data.list(), l.spec_numbers(), l.scale(), l.row_bias(), nullptr,
                                  l.target.const_data_ptr<int64_t>(), l.N, l.M, parts.data_ptr<float>(), nullptr);
  call.run.similarity_loss_rows(call.stream, l.dots.const_data_ptr<float>(), l.chunk_numbers(), pair_data.list(),
                                l.spec_numbers(), l.scale(), l.row_bias(), nullptr, l.target.const_data_ptr<int64_t>(),
                                l.N, l.M, parts.const_data_ptr<float>(), static_cast<int64_t>(l.o.kind),
                                l.o.reduction == Reduction::mean ? static_cast<double>(l.N) : 1.0, ticket,
                                sums.data_ptr<double>(), l.values(), l.slopes(), result.data_ptr<float>(),
                                sides.x.scalar_type() == at::kHalf ? l.norm() : nullptr);
  if (!swept) return result;
  if (in[kTarget].defined() && wants[kY] && sides.x.scalar_type() != at::kFloat) {
    l.partner = at::full({l.M}, -1, options.dtype(at::kLong));
    call.run.similarity_reduce_partners(call.stream, l.target.const_data_ptr<int64_t>(), l.N, l.M,
                                        l.partner.data_ptr<int64_t>());
  }
  l.has_scale_sum = wants[kScale];
  l.one_pass = in_one_pass(l.o.kind, l.o.reduction, false);
  if (!l.one_pass) return result;
  form_gradients(call, l, sides, pair_data, wants, nullptr);
  l.dots.reset();
  return result;
}

// The gradients by the matrices as they were given, and the sums.
Leaving cuda_backward(const CudaLoss& kept, const Inputs& in, const std::array<bool, kDifferentiable>& wants,
                      const Tensor& d_loss) {
  const CudaCall call(in[kX]);
  CudaLoss l = kept;  // which a graph that is kept needs again
  const Sides sides(l, in);
  const float* factor = d_loss.const_data_ptr<float>();
  const bool direct = !l.one_pass && !l.o.normalize && sides.x.scalar_type() == at::kFloat;
  if (!l.one_pass) {
    l.has_scale_sum = wants[kScale];
    form_gradients(call, l, sides, PairData(l, in[kX]), wants, direct ? factor : nullptr);
  }
  return leave(call, l, sides, factor, direct);
}

}  // namespace
}  // namespace contrastive_ops
