// Part of eager.cpp: nodes of autograd's graph, and calls of Python from them.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>

#include "eager_problem.h"

namespace contrastive_ops {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// A node behind the pointer that this torch has for them: std::shared_ptr, and c10::intrusive_ptr in newer ones.
template <class Pointer>
struct NodeOwner;
template <class Node>
struct NodeOwner<std::shared_ptr<Node>> {
  template <class Derived>
  static std::shared_ptr<Derived> own(Derived* node) {
    return std::shared_ptr<Derived>(node, [](auto* each) { deleteNode(each); });
  }
};
template <class Node>
struct NodeOwner<c10::intrusive_ptr<Node>> {
  template <class Derived>
  static c10::intrusive_ptr<Derived> own(Derived* node) {
    return c10::intrusive_ptr<Derived>::unsafe_steal_from_new(node);
  }
};
using Owner = NodeOwner<decltype(torch::autograd::Edge::function)>;
template <class Node>
using Owned = decltype(Owner::own(std::declval<Node*>()));

void save(SavedVariable& to, const Tensor& t) {
  if (t.defined()) to = SavedVariable(t, false);
}

PyObject* or_none(const Tensor& t) { return t.defined() ? THPVariable_Wrap(t) : Py_NewRef(Py_None); }

// What a function of Python returns; takes `arguments`, a tuple or null after an error.
pybind11::object call_python(PyObject* function, PyObject* arguments) {
  PyObject* result = arguments ? PyObject_CallObject(function, arguments) : nullptr;
  Py_XDECREF(arguments);
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

}  // namespace
}  // namespace contrastive_ops
