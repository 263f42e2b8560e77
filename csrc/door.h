// From a C++ function to a function of Python, by its types alone.
//
// A function takes, in any order: const Tensor& and const Optional& (None: no tensor), const TensorList& (a list, made
// contiguous), Integers and Doubles (lists), int64_t, double, bool, std::string and std::optional<int64_t>. It returns
// a Tensor, a tuple of them, or nothing. std::invalid_argument becomes a ValueError, WrongType a TypeError.
#pragma once

#include <exception>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tensor.h"

namespace contrastive_ops {

// A tensor that may be none.
struct Optional : Tensor {
  Optional() = default;
  explicit Optional(Reference object) {
    if (object.get() != Py_None) static_cast<Tensor&>(*this) = Tensor(std::move(object));
  }
};

// ---- Arguments ------------------------------------------------------------------------------------------------------

inline int64_t integer_of(PyObject* object) {
  const int64_t number = PyLong_AsLongLong(object);
  if (number == -1 && PyErr_Occurred()) throw PythonError();
  return number;
}

inline std::vector<Reference> items_of(PyObject* object) {
  const Reference tuple = Reference::own(PySequence_Tuple(object));
  std::vector<Reference> items(static_cast<size_t>(PyTuple_Size(tuple.get())));
  for (size_t k = 0; k < items.size(); ++k) {
    items[k] = Reference::to(PyTuple_GetItem(tuple.get(), static_cast<Py_ssize_t>(k)));
  }
  return items;
}

// Holds an argument while the function runs.
template <class T>
struct Argument;
template <>
struct Argument<Tensor> {
  Tensor value;
  explicit Argument(PyObject* object) : value(Reference::to(object)) {}
};
template <>
struct Argument<Optional> {
  Optional value;
  explicit Argument(PyObject* object) : value(Reference::to(object)) {}
};
template <>
struct Argument<TensorList> {
  TensorList value;
  explicit Argument(PyObject* object) {
    for (const Reference& item : items_of(object)) value.add(Tensor(item).contiguous());
  }
};
template <>
struct Argument<Integers> {
  std::vector<int64_t> numbers;
  Integers value;
  explicit Argument(PyObject* object) {
    for (const Reference& item : items_of(object)) numbers.push_back(integer_of(item.get()));
    value = {numbers.data(), static_cast<int64_t>(numbers.size())};
  }
};
template <>
struct Argument<Doubles> {
  std::vector<double> numbers;
  Doubles value;
  explicit Argument(PyObject* object) {
    for (const Reference& item : items_of(object)) {
      numbers.push_back(PyFloat_AsDouble(item.get()));
      if (numbers.back() == -1.0 && PyErr_Occurred()) throw PythonError();
    }
    value = {numbers.data(), static_cast<int64_t>(numbers.size())};
  }
};
template <>
struct Argument<int64_t> {
  int64_t value;
  explicit Argument(PyObject* object) : value(integer_of(object)) {}
};
template <>
struct Argument<std::optional<int64_t>> {
  std::optional<int64_t> value;
  explicit Argument(PyObject* object) {
    if (object != Py_None) value = integer_of(object);
  }
};
template <>
struct Argument<double> {
  double value;
  explicit Argument(PyObject* object) : value(PyFloat_AsDouble(object)) {
    if (value == -1.0 && PyErr_Occurred()) throw PythonError();
  }
};
template <>
struct Argument<bool> {
  bool value;
  explicit Argument(PyObject* object) {
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) throw PythonError();  // of a tensor of several numbers, say
    value = truth == 1;
  }
};
template <>
struct Argument<std::string> {
  std::string value;
  explicit Argument(PyObject* object) : value(text_of(object)) {}
};

// ---- Results --------------------------------------------------------------------------------------------------------

inline PyObject* object_of(const Tensor& tensor) { return Reference::to(tensor.object()).release(); }
template <class... T>
PyObject* object_of(const std::tuple<T...>& tensors) {
  return std::apply([](const auto&... tensor) { return PyTuple_Pack(sizeof...(tensor), tensor.object()...); }, tensors);
}

// ---- Calls ----------------------------------------------------------------------------------------------------------

// Sets Python's error for the exception that is being handled; returns null.
inline PyObject* raise_caught() {
  try {
    throw;
  } catch (const PythonError&) {
  } catch (const WrongType& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());  // that of a signal's handler is there
  }
  return nullptr;
}

template <auto function>
struct Door;
template <class Result, class... P, Result (*function)(P...)>
struct Door<function> {
  static PyObject* call(PyObject*, PyObject* const* objects, Py_ssize_t count) {
    try {
      if (count != sizeof...(P)) {
        throw WrongType(text_from("it takes ", static_cast<int64_t>(sizeof...(P)), " arguments, got ", int64_t{count}));
      }
      return unpack(objects, std::index_sequence_for<P...>());
    } catch (...) {
      return raise_caught();
    }
  }

 private:
  template <size_t... index>
  static PyObject* unpack(PyObject* const* objects, std::index_sequence<index...>) {
    // Braces: from left to right.
    const std::tuple<Argument<std::decay_t<P>>...> arguments{Argument<std::decay_t<P>>(objects[index])...};
    if constexpr (std::is_void_v<Result>) {
      function(std::get<index>(arguments).value...);
      Py_RETURN_NONE;
    } else {
      return object_of(function(std::get<index>(arguments).value...));
    }
  }
};

// The entry of a module's table for a function that gets an array of objects.
inline PyMethodDef fast_method(const char* name, PyObject* (*call)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};
}

// Other threads of Python run while one of these lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace contrastive_ops
