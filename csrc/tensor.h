// TensorList of Python without a torch header, so that one build serves every torch: read and made through the C
// functions of DLPack that torch 2.10 and newer offer for their tensors, or through attributes and methods.
//
// What is used of Python is of its limited interface (Py_LIMITED_API, setup.py), so that it also serves every Python.
#pragma once

#include <Python.h>

#include <utility>
#include <vector>

#include "array.h"

namespace contrastive_ops {

// The error indicator of Python is set.
struct PythonError {};

// A reference of its own to an object of Python.
class Reference {
 public:
  Reference() = default;
  static Reference own(PyObject* object) {  // null: an error was set
    if (object == nullptr) throw PythonError();
    Reference reference;
    reference.object_ = object;
    return reference;
  }
  static Reference to(PyObject* object) {
    Py_XINCREF(object);
    return own(object);
  }
  Reference(const Reference& other) : object_(other.object_) { Py_XINCREF(object_); }
  Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Reference& operator=(Reference other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Reference() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_ = nullptr;
};

// The text of a str.
inline const char* text_of(PyObject* object) {
  const char* text = PyUnicode_AsUTF8AndSize(object, nullptr);
  if (text == nullptr) throw PythonError();
  return text;
}

// A tensor with the object that keeps its memory; without one it is none.
class Tensor : public Array {
 public:
  Tensor() = default;
  // Raises TypeError where the object is no tensor.
  explicit Tensor(Reference object);

  PyObject* object() const { return object_.get(); }
  Tensor contiguous() const;
  Tensor rows_contiguous() const { return contiguous_along(1) ? *this : contiguous(); }
  Tensor to(Type type) const;
  Tensor transposed() const;  // the last two of three dimensions

 private:
  Reference object_;
};

// Like the others of a list of tensors.
struct TensorList {
  std::vector<Tensor> tensors;
  std::vector<Array> arrays;
  void add(Tensor tensor) {
    arrays.push_back(tensor);
    tensors.push_back(std::move(tensor));
  }
  Arrays list() const { return {arrays.data(), static_cast<int64_t>(arrays.size())}; }
};

// A new tensor on the CPU. `empty` is written once by whoever asks for it.
Tensor empty(const Shape& shape, Type type);
Tensor zeros(const Shape& shape, Type type);
Tensor full(const Shape& shape, Type type, double value);
// Writes one number into a part of a contiguous tensor of float32, float64 or int32.
void fill(const Tensor& tensor, int64_t begin, int64_t count, double value);

// The address of the current stream of a GPU.
int64_t current_stream(int device);

// Takes what is needed of the module torch; `exchange` is torch.Tensor.__dlpack_c_exchange_api__, or None.
void use_torch(PyObject* torch, PyObject* exchange);

}  // namespace contrastive_ops
