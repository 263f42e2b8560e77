// Part of eager.cpp: the tensors and options of a call as a SimilarityProblem, and where its gradients go.
#pragma once

#include <ATen/ATen.h>
#include <Python.h>

#include <algorithm>
#include <array>
#include <memory>

#include "similarity_loss.h"

namespace contrastive_ops {
namespace {

using at::Tensor;

// How the rows of a loss meet: contrastive_ops/losses/_calls.py has the same numbers.
enum class Form : int { columns = 0, partners = 1, stacked = 2, labelled = 3 };

struct Options {
  RowLoss kind;
  Form form;
  Reduction reduction;
  bool normalize, inverted;  // inverted: the tensor is a temperature
  double number;             // scale, where it is no tensor
  double bias_number;
  bool has_bias;
  int64_t memory_budget;
};

// The tensors of a call. Gradients go to the first five.
enum { kX, kY, kScale, kBias, kWeight, kTarget, kLabels, kColLabels, kInputs };
constexpr int kDifferentiable = 5;
using Inputs = std::array<Tensor, kInputs>;

at::ScalarType accumulator(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor inverse_lengths(const Tensor& x) {
  // As core/unit_rows.py, operation by operation.
  return at::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, true).clamp_min_(1e-12).reciprocal_();
}

Tensor through_lengths(const Tensor& gradient, const Tensor& x, const Tensor& inverse) {
  const Tensor unit = at::mul(x, inverse), along = at::mul(unit, gradient).sum(at::IntArrayRef{-1}, true);
  return at::addcmul(gradient, unit, along, -1).mul_(inverse);
}

bool is_narrow(const Tensor& x) { return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf; }

// 16-bit rows of any length as unit rows, without rounding them again: as core/unit_lengths.py, operation by operation.
struct Lengths {
  Tensor rows, factor, shift, unit;

  Lengths() = default;
  explicit Lengths(const Tensor& x) {
    const Tensor wide = x.to(at::kFloat);
    const Tensor length = at::linalg_vector_norm(wide, 2, at::IntArrayRef{1}, true).clamp_min_(1e-12);
    const auto [mantissa, exponent] = at::frexp(length);
    shift = at::ldexp(at::ones_like(length), exponent.neg().add_(1).clamp_(-126, 126));
    unit = at::mul(wide, shift);
    rows = unit.to(x.scalar_type());
    factor = at::mul(mantissa, 2).reciprocal_();
    unit.mul_(factor);
  }
  Tensor through(const Tensor& gradient) const {
    const Tensor along = at::mul(unit, gradient).sum(at::IntArrayRef{1}, true);
    return at::addcmul(gradient, unit, along, -1).mul_(shift);
  }
};

Tensor rows_contiguous(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous(); }

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      return DType::float32;
  }
}

// A SimilarityProblem with what its pointers point into.
struct Problem {
  Tensor x, y, inverse_x, inverse_y, row_bias, target, count;
  Lengths lengths_x, lengths_y;  // of 16-bit rows that count as unit rows
  at::ScalarType type;
  double scale_as_double;
  float scale_as_float;
  SimilaritySet sets[2]{};
  SimilarityFold folds[kRowFolds];
  SimilarityProblem raw{};

  // `inverses`: of the lengths, where they are known.
  Problem(const Options& o, const Inputs& in, const Tensor& known_x = {}, const Tensor& known_y = {})
      : type(accumulator(in[kX])) {
    inverse_x = known_x;
    inverse_y = known_y;
    const bool stacked = o.form == Form::stacked, by_factors = o.normalize && is_narrow(in[kX]);
    raw.self = stacked || !in[kY].defined();
    const auto as_unit = [&](const Tensor& rows, Tensor& inverse) {
      return by_factors || !rows.defined() ? rows : unit_of(o, rows, inverse);
    };
    const Tensor first = as_unit(in[kX], inverse_x), second = as_unit(in[kY], inverse_y);
    x = stacked ? at::cat({first, second}) : first;
    if (by_factors) x = (lengths_x = Lengths(x)).rows;
    if (by_factors && !raw.self) lengths_y = Lengths(second);
    x = rows_contiguous(x);
    y = raw.self ? x : rows_contiguous(by_factors ? lengths_y.rows : second);
    raw.dtype = dtype_of(x);
    raw.x = x.data_ptr();
    raw.y = y.data_ptr();
    raw.N = x.size(0);
    raw.M = y.size(0);
    raw.D = x.size(1);
    raw.x_stride = x.stride(0);
    raw.y_stride = y.stride(0);
    read_scale(o, in[kScale]);
    if (o.has_bias) {
      row_bias = at::empty({raw.N}, x.options().dtype(type));
      in[kBias].defined() ? row_bias.fill_(in[kBias].reshape({})) : row_bias.fill_(o.bias_number);
      raw.row_bias = row_bias.data_ptr();
    }
    read_target(o, in);
    read_sets(o, in);
  }

  Tensor empty(int64_t size) const { return at::empty({size}, x.options().dtype(type)); }

 private:
  static Tensor unit_of(const Options& o, const Tensor& rows, Tensor& inverse) {
    if (!o.normalize) return rows;
    if (!inverse.defined()) inverse = inverse_lengths(rows);
    return at::mul(rows, inverse);
  }
  void read_scale(const Options& o, const Tensor& tensor) {
    scale_as_double = o.number;
    if (tensor.defined()) {
      scale_as_double = type == at::kDouble ? *tensor.const_data_ptr<double>() : *tensor.const_data_ptr<float>();
    }
    scale_as_float = static_cast<float>(scale_as_double);
    if (o.inverted) {
      scale_as_double = 1 / scale_as_double;
      scale_as_float = 1 / scale_as_float;
    }
  }
  void read_target(const Options& o, const Inputs& in) {
    if (in[kTarget].defined()) {
      target = in[kTarget].contiguous();
      raw.target = target.const_data_ptr<int64_t>();
      return;
    }
    target = at::empty({raw.N}, x.options().dtype(at::kLong));
    int64_t* to = target.data_ptr<int64_t>();
    raw.target = to;
    if (o.form != Form::labelled) return usual_target(raw.self, raw.N, to);
    const Tensor labels = in[kLabels].contiguous(), col_labels = raw.self ? labels : in[kColLabels].contiguous();
    std::unique_ptr<int64_t[]> counts(new int64_t[raw.N]);
    positives_of(labels.const_data_ptr<int64_t>(), raw.N, raw.self ? nullptr : col_labels.const_data_ptr<int64_t>(),
                 raw.M, to, counts.get());
    count = empty(raw.N);
    for (int64_t i = 0; i < raw.N; ++i) {
      type == at::kDouble ? count.data_ptr<double>()[i] = static_cast<double>(counts[i])
                          : count.data_ptr<float>()[i] = static_cast<float>(counts[i]);
    }
  }
  void read_sets(const Options& o, const Inputs& in) {
    const bool labelled = o.form == Form::labelled;
    raw.set_count = labelled ? 2 : 1;
    for (int set = 0; set < raw.set_count; ++set) {
      sets[set].scale = type == at::kDouble ? static_cast<const void*>(&scale_as_double) : &scale_as_float;
      sets[set].scale_of = ScaleOf::all;
      sets[set].has_diagonal = raw.self;
    }
    if (labelled) {
      row_labels_ = in[kLabels].contiguous();
      col_labels_ = in[kColLabels].defined() ? in[kColLabels].contiguous() : row_labels_;
      sets[0].differ_rows = sets[1].same_rows = row_labels_.const_data_ptr<int64_t>();
      sets[0].differ_cols = sets[1].same_cols = col_labels_.const_data_ptr<int64_t>();
    }
    if (lengths_x.factor.defined()) {
      raw.row_factor = lengths_x.factor.data_ptr();
      raw.col_factor = (raw.self ? lengths_x : lengths_y).factor.data_ptr();
    }
    raw.sets = sets;
    raw.fold_count = folds_of(o.kind, folds);
    raw.folds = folds;
  }
  Tensor row_labels_, col_labels_;
};

// Inner products that forward may keep: as ops/similarity_reduce.py.
int64_t kept_size_of(const Options& o, const SimilarityProblem& p, int64_t item_size) {
  constexpr int64_t kFromDimension = 64;
  if (o.memory_budget == 0 || p.D < kFromDimension) return 0;
  const int64_t whole = p.self ? (p.N + 512) * (p.N + 512) / 2 : (p.N + 32) * (p.M + 128);
  return std::min(o.memory_budget / item_size, whole);
}

// Outputs of a sweep: gradients of x, y, scale (one number for each set) and row_bias, where they are wanted.
struct Gradients {
  Tensor dx, dy, dscale, drow_bias;
  void* dscale_parts[2]{};
  SimilarityBackward raw{};

  Gradients(const Problem& p, bool x, bool y, bool scale, bool bias) {
    const auto options = p.x.options().dtype(p.type);
    if (x) raw.dx = (dx = at::empty({p.raw.N, p.raw.D}, options)).data_ptr();
    if (y && !p.raw.self) raw.dy = (dy = at::empty({p.raw.M, p.raw.D}, options)).data_ptr();
    if (scale) {
      dscale = at::empty({p.raw.set_count}, options);
      for (int set = 0; set < p.raw.set_count; ++set) {
        dscale_parts[set] = static_cast<char*>(dscale.data_ptr()) + set * dscale.element_size();
      }
      raw.dscale = dscale_parts;
    }
    if (bias) raw.drow_bias = (drow_bias = at::empty({p.raw.N}, options)).data_ptr();
  }

  // Once they are there: from gradients by unit rows to those by 16-bit rows of any length.
  void through_lengths(const Problem& p) {
    if (dx.defined() && p.lengths_x.unit.defined()) dx = p.lengths_x.through(dx);
    if (dy.defined() && p.lengths_y.unit.defined()) dy = p.lengths_y.through(dy);
  }
};

struct NoGil {  // kernels run for as long as they like
  PyThreadState* state = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  ~NoGil() {
    if (state) PyEval_RestoreThread(state);
  }
};

}  // namespace
}  // namespace contrastive_ops
