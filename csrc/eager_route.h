// Part of eager.cpp: a router of plain tensors on the CPU with its node in autograd's graph.
//
// `route` takes what the operator expert_routing_route takes, and returns None where that must be called instead, which
// words what is wrong. The derivative is that of Python where it is differentiated itself, or gradients are no plain
// tensors.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "eager_arguments.h"
#include "eager_node.h"
#include "router_call.h"

namespace contrastive_ops {
namespace {

PyObject* route_again = nullptr;  // of Python

at::ScalarType scalar_type(Type type) {
  constexpr at::ScalarType types[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf,
                                      at::kLong,  at::kInt,    at::kBool,     at::kChar};
  return types[static_cast<int>(type)];
}

// A tensor of torch as an Array; its memory is another's where it is an input.
struct RouterTensor : Array {
  Tensor own;

  RouterTensor() = default;
  explicit RouterTensor(const Tensor& from) : own(from) {
    if (!own.defined()) return;
    data = const_cast<void*>(own.const_data_ptr());
    dims = static_cast<int>(own.dim());
    std::copy(own.sizes().begin(), own.sizes().end(), sizes);
    std::copy(own.strides().begin(), own.strides().end(), strides);
    for (int number = 0; number < static_cast<int>(Type::other); ++number) {
      if (scalar_type(static_cast<Type>(number)) == own.scalar_type()) type = static_cast<Type>(number);
    }
  }
  RouterTensor contiguous() const { return !defined() || is_contiguous() ? *this : RouterTensor(own.contiguous()); }
  RouterTensor rows_contiguous() const { return contiguous_along(1) ? *this : contiguous(); }
};

struct RouterHost {
  using Tensor = RouterTensor;
  static RouterTensor empty(const Shape& shape, Type type) {
    return RouterTensor(
        empty_of({shape.sizes, static_cast<size_t>(shape.dims)}, at::device(at::kCPU).dtype(scalar_type(type))));
  }
  static RouterTensor zeros(const Shape& shape, Type type) {
    const RouterTensor all = empty(shape, type);
    const int64_t columns = all.numel() / std::max<int64_t>(all.size(0), 1);
    for_row_ranges(all.size(0), columns, [&](auto part) { part(all.own).zero_(); });
    return all;
  }
  static ExpertRouting functions() { return kernels->expert_routing(); }
  static Parallel threads(int64_t size, int64_t few) {
    return size < few ? kernels->one_thread() : kernels->parallel();
  }
  template <class Work>
  static void run(const Work& work) {
    without_gil(work);
  }
};

struct RouterNumbers {
  std::vector<int64_t> spec, places, losses;
  std::vector<double> numbers;
  double sigma = 0;

  RouterRules rules() const { return {integers(spec), sigma, integers(losses), {numbers.data(), count(numbers)}}; }
  static Integers integers(const std::vector<int64_t>& from) { return {from.data(), count(from)}; }

 private:
  template <class T>
  static int64_t count(const std::vector<T>& from) {
    return static_cast<int64_t>(from.size());
  }
};

// The tensors that are kept for backward. Gradients go to the first.
enum { kLogits, kNoise, kExpertBias, kAllowed, kSegment, kValid, kGiven, kRouterInputs };
using RouterArguments = std::array<Tensor, kRouterInputs>;

RouterInputs<RouterTensor> inputs_of(const RouterArguments& in) {
  const auto as = [&](int i) { return RouterTensor(in[i]); };
  return {as(kLogits), as(kNoise), as(kExpertBias), as(kAllowed), as(kSegment), as(kValid)};
}

// ---- Backward -------------------------------------------------------------------------------------------------------

struct RouteBackward : torch::autograd::Node {
  RouterNumbers numbers;
  std::array<SavedVariable, kGiven> inputs;
  SavedVariable experts, sums, counts;

  std::string name() const override { return "RouteBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& each : inputs) each.reset_data();
    for (auto* each : {&experts, &sums, &counts}) each->reset_data();
  }
  variable_list apply(variable_list&& upstream) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(1);
    upstream.resize(3);  // without losses there are the gates alone
    const auto arrives = [](const Tensor& t) { return t.defined(); };
    if (std::none_of(upstream.begin(), upstream.end(), arrives) || !task_should_compute_output(0)) return out;
    RouterArguments in;
    for (int i = 0; i < kGiven; ++i) in[i] = inputs[i].unpack();
    const Tensor found[] = {experts.unpack(), sums.unpack(), counts.unpack()};
    const auto is_known = [](const Tensor& t) { return !t.defined() || (is_plain(t) && t.dim() <= kMostDims); };
    bool known = !at::GradMode::is_enabled() && std::all_of(upstream.begin(), upstream.end(), is_known);
    known = known && std::all_of(in.begin(), in.end(), is_known);  // hooks may have kept something else
    known = known && std::all_of(std::begin(found), std::end(found), is_known);
    out[0] = known ? gradient(in, found, upstream) : by_python(in, found, upstream);
    return out;
  }

 private:
  Tensor gradient(const RouterArguments& in, const Tensor* found, const variable_list& upstream) const {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto as = [](const Tensor& t) { return RouterTensor(t); };
    const Tensor wide = routed_backward<RouterHost>(inputs_of(in), numbers.rules(), as(found[0]), as(found[1]),
                                                    as(found[2]), {as(upstream[0]), as(upstream[1]), as(upstream[2])})
                            .own;
    const auto type = in[kLogits].scalar_type();
    if (wide.scalar_type() == type) return wide;
    const Tensor narrow = empty_rows(wide, wide.size(1), type);
    for_row_ranges(wide.size(0), wide.size(1), [&](auto part) { part(narrow).copy_(part(wide)); });
    return narrow;
  }

  // derivative((tensors), spec, sigma, losses, numbers, (d_gates, d_values, d_total))
  Tensor by_python(const RouterArguments& in, const Tensor* found, const variable_list& upstream) const {
    pybind11::gil_scoped_acquire gil;
    std::vector<Tensor> kept(in.begin(), in.begin() + kGiven);
    kept.insert(kept.end(), found, found + 3);
    const auto tuple_of = [](const std::vector<Tensor>& tensors) {
      PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
      for (size_t i = 0; i < tensors.size(); ++i)
        PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), or_none(tensors[i]));
      return tuple;
    };
    const auto list_of = [](const auto& values) { return pybind11::cast(values).release().ptr(); };
    const pybind11::object result =
        call_python(route_again, Py_BuildValue("(NNdNNN)", tuple_of(kept), list_of(numbers.spec), numbers.sigma,
                                               list_of(numbers.losses), list_of(numbers.numbers), tuple_of(upstream)));
    return result.is_none() ? Tensor() : THPVariable_Unpack(result.ptr());
  }
};

// ---- Forward --------------------------------------------------------------------------------------------------------

RouterResults<RouterTensor> route(const RouterNumbers& numbers, const RouterArguments& in, bool by_gate) {
  Owned<RouteBackward> node;
  if (at::GradMode::is_enabled() && in[kLogits].requires_grad()) {
    node = Owner::own(new RouteBackward());
    node->set_next_edges(torch::autograd::collect_next_edges(in[kLogits]));
  }
  const RouterResults<RouterTensor> r = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return routed<RouterHost>(inputs_of(in), RouterTensor(in[kGiven]), numbers.rules(),
                              RouterNumbers::integers(numbers.places), by_gate);
  }();
  if (node) {
    node->numbers = numbers;
    for (int i = 0; i < kGiven; ++i) save(node->inputs[i], in[i]);
    save(node->experts, r.experts.own);
    save(node->sums, r.sums.own);
    save(node->counts, r.counts.own);
    torch::autograd::set_history(r.gates.own, node);
    if (!numbers.losses.empty()) {
      torch::autograd::set_history(r.values.own, node);
      torch::autograd::set_history(r.total.own, node);
    }
  }
  return r;
}

bool read_list(PyObject* object, std::vector<int64_t>& to) {
  if (!PyList_CheckExact(object)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i) {
    PyObject* item = PyList_GET_ITEM(object, i);
    if (!PyLong_Check(item)) return false;
    to.push_back(PyLong_AsLongLong(item));
    if (to.back() == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
  }
  return true;
}
bool read_list(PyObject* object, std::vector<double>& to) {
  if (!PyList_CheckExact(object)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i) {
    PyObject* item = PyList_GET_ITEM(object, i);
    if (!PyFloat_Check(item) && !PyLong_Check(item)) return false;
    to.push_back(PyFloat_AsDouble(item));
    if (to.back() == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
  }
  return true;
}

// route(logits, noise, bias, allowed, given, segment, valid, spec, sigma, places, by_gate, losses, numbers, backend)
PyObject* py_route(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 14) {
    PyErr_SetString(PyExc_TypeError, "route takes 14 arguments");
    return nullptr;
  }
  HANDLE_TH_ERRORS
  constexpr int order[] = {kLogits, kNoise, kExpertBias, kAllowed, kGiven, kSegment, kValid};
  Place place;
  if (!read_backend(arguments[13], place) || place.by_cuda || !level_is_known()) Py_RETURN_NONE;
  RouterArguments in;
  for (int i = 0; i < kRouterInputs; ++i) {
    if (!read_tensor(arguments[i], place, in[order[i]])) Py_RETURN_NONE;
    if (in[order[i]].defined() && in[order[i]].dim() > kMostDims) Py_RETURN_NONE;
  }
  RouterNumbers numbers;
  const bool known = in[kLogits].defined() && is_eager(place) && read_list(arguments[7], numbers.spec) &&
                     PyFloat_Check(arguments[8]) && read_list(arguments[9], numbers.places) &&
                     PyBool_Check(arguments[10]) && read_list(arguments[11], numbers.losses) &&
                     read_list(arguments[12], numbers.numbers);
  if (!known) Py_RETURN_NONE;
  numbers.sigma = PyFloat_AS_DOUBLE(arguments[8]);
  try {
    const RouterResults<RouterTensor> r = route(numbers, in, arguments[10] == Py_True);
    const RouterTensor* all[] = {&r.experts, &r.gates, &r.slots, &r.order, &r.offsets,
                                 &r.values,  &r.total, &r.sums,  &r.counts};
    PyObject* tuple = PyTuple_New(std::size(all));
    for (size_t i = 0; i < std::size(all); ++i)
      PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), THPVariable_Wrap(all[i]->own));
    return tuple;
  } catch (const std::invalid_argument&) {
    Py_RETURN_NONE;
  } catch (const WrongType&) {
    Py_RETURN_NONE;
  }
  END_HANDLE_TH_ERRORS
}

}  // namespace
}  // namespace contrastive_ops
