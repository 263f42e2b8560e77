// Part of eager.cpp: which calls are for it, and what they give. Functions return false for what Python must look at,
// be it to refuse it.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "eager_problem.h"

namespace contrastive_ops {
namespace {

// A SIMD level that is asked for and does not exist is for Python to refuse.
bool level_is_known() {
  if (kernels == nullptr) return false;
  try {
    kernels->similarity_reduce();
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

// Where the matrices of a call are, and what runs it.
struct Place {
  c10::Device device = c10::Device(at::kCPU);
  bool by_cuda = false;
};

// Whether nobody but autograd would see a call with this tensor: no mode, no transform, no subclass, no other layout.
// That of one backend is that of another, but for the bits of the backend.
bool is_plain(const Tensor& t) {
  static const c10::DispatchKeySet allowed =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU}) |
      c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CPUBit) |
      c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CUDABit) | c10::default_included_set;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const auto keys = (t.key_set() | local.included_) - local.excluded_;
  return (t.device().is_cpu() || t.device().is_cuda()) &&
         ((keys - allowed).raw_repr() & ~c10::full_backend_mask) == 0 && !t._fw_grad(0).defined();
}

bool is_eager(const Place& place) {
  return !at::autocast::is_autocast_enabled(place.device.type()) && !at::impl::torch_function_mode_enabled() &&
         !at::hasCallbacks();
}

// Reads a tensor or None; false if it is neither, or one that Python must look at, or elsewhere than the matrices.
bool read_tensor(PyObject* object, const Place& place, Tensor& out) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  out = THPVariable_Unpack(object);
  return is_plain(out) && out.device() == place.device;
}

bool read_first(PyObject* object, Place& place, Tensor& out) {
  if (!THPVariable_CheckExact(object)) return false;
  place.device = THPVariable_Unpack(object).device();
  return read_tensor(object, place, out);
}

bool is_vector(const Tensor& t, int64_t size, at::ScalarType type) {
  return t.dim() == 1 && t.size(0) == size && t.scalar_type() == type;
}

// A number of Python or a tensor with one element of the accumulation type.
bool read_number(PyObject* object, const Place& place, at::ScalarType type, double& number, Tensor& tensor) {
  if (PyFloat_CheckExact(object)) {
    number = PyFloat_AS_DOUBLE(object);
    return true;
  }
  return read_tensor(object, place, tensor) && tensor.defined() && tensor.numel() == 1 && tensor.dim() <= 1 &&
         tensor.scalar_type() == type;
}

template <class A>
bool all_positive(const Tensor& weight) {
  const Tensor values = weight.contiguous();
  const A* at = values.const_data_ptr<A>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    if (!(at[i] > 0)) return false;
  }
  return true;
}

bool all_below(const Tensor& target, int64_t columns) {
  const Tensor values = target.contiguous();
  const int64_t* at = values.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    if (at[i] < 0 || at[i] >= columns) return false;
  }
  return true;
}

bool matrices_fit(const Options& o, const Tensor& x, const Tensor& y) {
  if (!x.defined() || x.dim() != 2 || x.size(0) == 0) return false;
  const auto type = x.scalar_type();
  if (!(type == at::kFloat || type == at::kDouble || is_narrow(x))) return false;
  if (!y.defined()) return o.form == Form::labelled;
  if (y.dim() != 2 || y.size(1) != x.size(1) || y.scalar_type() != type || y.size(0) == 0) return false;
  return o.form == Form::columns || o.form == Form::labelled || y.size(0) == x.size(0);
}

// Numbers on a GPU are not looked at.
bool rows_fit(const Options& o, const Inputs& in) {
  const Tensor &x = in[kX], &y = in[kY], &weight = in[kWeight], &target = in[kTarget], &labels = in[kLabels];
  const int64_t rows = x.size(0), columns = y.defined() ? y.size(0) : rows;
  if (weight.defined()) {
    if (!is_vector(weight, rows, accumulator(x)) || o.form == Form::stacked || !weight.device().is_cpu()) return false;
    const bool positive =
        weight.scalar_type() == at::kDouble ? all_positive<double>(weight) : all_positive<float>(weight);
    if (!positive) return false;
  }
  if (target.defined() && !is_vector(target, rows, at::kLong)) return false;
  if (target.defined() && target.device().is_cpu() && !all_below(target, columns)) return false;
  if (o.form == Form::columns && !target.defined() && columns < rows) return false;
  if (o.form != Form::labelled) return true;
  const Tensor& col_labels = in[kColLabels];
  if (!labels.defined() || !is_vector(labels, rows, at::kLong) || col_labels.defined() != y.defined()) return false;
  return !col_labels.defined() || is_vector(col_labels, columns, at::kLong);
}

// The CPU's, and that of CUDA where it is named: it has kernels that have not run on a GPU yet.
bool read_backend(PyObject* object, Place& place) {
  const char* name = PyUnicode_Check(object) ? PyUnicode_AsUTF8(object) : nullptr;
  if (name == nullptr) return false;
  if (std::strcmp(name, "auto") == 0) {
    const char* chosen = std::getenv("CONTRASTIVE_OPS_BACKEND");
    if (chosen != nullptr && *chosen != 0) name = chosen;
  }
  place.by_cuda = std::strcmp(name, "cuda") == 0;
  return place.by_cuda || (place.device.is_cpu() && (std::strcmp(name, "cpu") == 0 || std::strcmp(name, "auto") == 0));
}

bool read_reduction(PyObject* object, Reduction& reduction) {
  const char* name = PyUnicode_Check(object) ? PyUnicode_AsUTF8(object) : nullptr;
  const char* const names[] = {"mean", "sum", "none"};
  for (int number = 0; name != nullptr && number < 3; ++number) {
    if (std::strcmp(name, names[number]) == 0) {
      reduction = static_cast<Reduction>(number);
      return true;
    }
  }
  return false;
}

bool read_budget(PyObject* object, const Place& place, int64_t& budget) {
  budget = int64_t{place.by_cuda ? 1024 : 128} << 20;
  if (object == Py_None) return true;
  if (!PyLong_CheckExact(object)) return false;
  budget = PyLong_AsLongLong(object);
  if (budget == -1 && PyErr_Occurred()) PyErr_Clear();
  return budget >= 0;
}

// scale, or 1 / temperature, or 1 / the default: at most one of the first two is given.
bool read_scale(PyObject* scale, PyObject* temperature, PyObject* usual, const Place& place, at::ScalarType type,
                Options& o, Tensor& out) {
  if (scale != Py_None) return temperature == Py_None && read_number(scale, place, type, o.number, out);
  if (!read_number(temperature == Py_None ? usual : temperature, place, type, o.number, out)) return false;
  o.inverted = out.defined();
  if (o.inverted) {
    if (!out.device().is_cpu()) return true;
    const double value = type == at::kDouble ? *out.const_data_ptr<double>() : *out.const_data_ptr<float>();
    return value > 0;
  }
  const bool positive = o.number > 0;
  o.number = 1 / o.number;
  return positive;
}

}  // namespace
}  // namespace contrastive_ops
