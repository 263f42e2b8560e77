// Part of eager.cpp: the tensors and options of a call as a SimilarityProblem, and where its gradients go.
#pragma once

#include <ATen/ATen.h>
#include <Python.h>

#include <algorithm>
#include <array>
#include <memory>

#include "huge_pages.h"
#include "kernels.h"
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

const Kernels* kernels = nullptr;

// Rows that one task takes of those that operations of torch are called on. An operation on a range has the bits of
// that on all rows, so ranges may follow the threads: of one thread they are as large as a level-2 cache.
int64_t rows_of_a_range(int64_t rows, int64_t columns) {
  constexpr int64_t kWorthTasks = int64_t{1} << 16, kMostNumbers = int64_t{1} << 17, kLeastNumbers = int64_t{1} << 14;
  if (rows * columns < kWorthTasks) return rows;
  const int64_t threads = kernels->parallel().threads, most = std::max<int64_t>(kMostNumbers / columns, 8);
  // Less than that takes as long as the calls of a range.
  const int64_t least = std::max<int64_t>(kLeastNumbers / columns, 8);
  return std::max(std::min(threads > 1 ? (rows + 4 * threads - 1) / (4 * threads) : rows, most), least);
}

// Calls body(part) for ranges of rows, in tasks; part(t) are those rows of a tensor.
template <class Body>
void for_row_ranges(int64_t rows, int64_t columns, Body body) {
  const int64_t step = std::max<int64_t>(rows_of_a_range(rows, columns), 1);
  auto task = [&](int64_t index) {
    at::AutoDispatchBelowADInplaceOrView guard;
    body([&](const Tensor& t) { return t.narrow(0, index * step, std::min(step, rows - index * step)); });
  };
  using Task = decltype(task);
  kernels->parallel().run((rows + step - 1) / step,
                          [](void* own, int64_t index, int) { (*static_cast<Task*>(own))(index); }, &task);
}

Tensor inverse_lengths(const Tensor& x) {
  // As core/unit_rows.py, operation by operation.
  return at::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, true).clamp_min_(1e-12).reciprocal_();
}

// Of the CPU, uninitialised.
Tensor empty_of(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor fresh = at::empty(sizes, options);
  use_huge_pages(fresh.data_ptr(), fresh.nbytes());
  return fresh;
}

Tensor empty_rows(const Tensor& like, int64_t columns, at::ScalarType type) {
  return empty_of({like.size(0), columns}, like.options().dtype(type));
}

bool is_one_range(const Tensor& x) { return rows_of_a_range(x.size(0), x.size(1)) >= x.size(0); }

// Unit rows to `unit`, and the inverse lengths, which may be known.
void write_unit_rows(const Tensor& x, const Tensor& unit, Tensor& inverse) {
  const bool known = inverse.defined();
  if (!known) inverse = empty_rows(x, 1, x.scalar_type());
  for_row_ranges(x.size(0), x.size(1), [&](auto part) {
    if (!known) part(inverse).copy_(inverse_lengths(part(x)));
    Tensor to = part(unit);
    at::mul_out(to, part(x), part(inverse));
  });
}

Tensor unit_of(const Tensor& x, Tensor& inverse) {
  if (is_one_range(x)) {
    if (!inverse.defined()) inverse = inverse_lengths(x);
    return at::mul(x, inverse);
  }
  const Tensor unit = empty_rows(x, x.size(1), x.scalar_type());
  write_unit_rows(x, unit, inverse);
  return unit;
}

// Both matrices one under the other, as unit rows if asked for.
Tensor stack(const Tensor& first, const Tensor& second, bool unit, Tensor& inverse_first, Tensor& inverse_second) {
  if (is_one_range(first) && is_one_range(second)) {
    return unit ? at::cat({unit_of(first, inverse_first), unit_of(second, inverse_second)}) : at::cat({first, second});
  }
  const int64_t rows = first.size(0), columns = first.size(1);
  const Tensor all = empty_of({rows + second.size(0), columns}, first.options());
  const auto write = [&](const Tensor& from, const Tensor& to, Tensor& inverse) {
    if (unit) return write_unit_rows(from, to, inverse);
    for_row_ranges(from.size(0), columns, [&](auto part) { part(to).copy_(part(from)); });
  };
  write(first, all.narrow(0, 0, rows), inverse_first);
  write(second, all.narrow(0, rows, second.size(0)), inverse_second);
  return all;
}

// (gradient - unit * <unit, gradient>) * factor
Tensor across(const Tensor& gradient, const Tensor& unit, const Tensor& factor) {
  const Tensor along = at::mul(unit, gradient).sum(at::IntArrayRef{-1}, true);
  return at::addcmul(gradient, unit, along, -1).mul_(factor);
}

Tensor through_lengths(const Tensor& gradient, const Tensor& x, const Tensor& inverse) {
  if (is_one_range(x)) return across(gradient, at::mul(x, inverse), inverse);
  const Tensor out = empty_rows(gradient, gradient.size(1), gradient.scalar_type());
  for_row_ranges(x.size(0), x.size(1), [&](auto part) {
    part(out).copy_(across(part(gradient), at::mul(part(x), part(inverse)), part(inverse)));
  });
  return out;
}

bool is_narrow(const Tensor& x) { return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf; }

// 16-bit rows of any length as unit rows, without rounding them again: as core/unit_lengths.py, operation by operation.
struct Lengths {
  Tensor rows, factor, shift, unit;

  Lengths() = default;
  explicit Lengths(const Tensor& x) {
    if (is_one_range(x)) {
      find(x);
      return;
    }
    rows = empty_rows(x, x.size(1), x.scalar_type());
    unit = empty_rows(x, x.size(1), at::kFloat);
    factor = empty_rows(x, 1, at::kFloat);
    shift = empty_rows(x, 1, at::kFloat);
    for_row_ranges(x.size(0), x.size(1), [&](auto part) {
      Lengths found;
      found.find(part(x));
      part(rows).copy_(found.rows);
      part(unit).copy_(found.unit);
      part(factor).copy_(found.factor);
      part(shift).copy_(found.shift);
    });
  }
  Tensor through(const Tensor& gradient) const {
    if (is_one_range(gradient)) return across(gradient, unit, shift);
    const Tensor out = empty_rows(gradient, gradient.size(1), gradient.scalar_type());
    for_row_ranges(gradient.size(0), gradient.size(1),
                   [&](auto part) { part(out).copy_(across(part(gradient), part(unit), part(shift))); });
    return out;
  }

 private:
  void find(const Tensor& x) {
    const Tensor wide = x.to(at::kFloat);
    const Tensor length = at::linalg_vector_norm(wide, 2, at::IntArrayRef{1}, true).clamp_min_(1e-12);
    const auto [mantissa, exponent] = at::frexp(length);
    shift = at::ldexp(at::ones_like(length), exponent.neg().add_(1).clamp_(-126, 126));
    unit = at::mul(wide, shift);
    rows = unit.to(x.scalar_type());
    factor = at::mul(mantissa, 2).reciprocal_();
    unit.mul_(factor);
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
    const bool by_unit = o.normalize && !by_factors;
    if (stacked) {
      x = stack(in[kX], in[kY], by_unit, inverse_x, inverse_y);
    } else {
      x = by_unit ? unit_of(in[kX], inverse_x) : in[kX];
      y = by_unit && in[kY].defined() ? unit_of(in[kY], inverse_y) : in[kY];
    }
    if (by_factors) x = (lengths_x = Lengths(x)).rows;
    if (by_factors && !raw.self) y = (lengths_y = Lengths(y)).rows;
    x = rows_contiguous(x);
    y = raw.self ? x : rows_contiguous(y);
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

  Tensor empty(int64_t size) const { return empty_of({size}, x.options().dtype(type)); }

 private:
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
    if (x) raw.dx = (dx = empty_of({p.raw.N, p.raw.D}, options)).data_ptr();
    if (y && !p.raw.self) raw.dy = (dy = empty_of({p.raw.M, p.raw.D}, options)).data_ptr();
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

// Kernels run for as long as they like, or until a signal's handler raises: then Python has an error for torch to
// raise.
template <class Work>
void without_gil(const Work& work) {
  PyThreadState* state = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  try {
    work();
  } catch (...) {
    if (state) PyEval_RestoreThread(state);
    const pybind11::gil_scoped_acquire gil;
    if (!PyErr_Occurred()) throw;
    python_error error;
    error.persist();
    throw error;
  }
  if (state) PyEval_RestoreThread(state);
}

}  // namespace
}  // namespace contrastive_ops
