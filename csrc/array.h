// A tensor as an address and sizes, and how one that does not fit is refused; shared by cpu/ and cuda/. No torch
// header.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace contrastive_ops {

constexpr int kMostDims = 4;
constexpr int kOnCpu = -1;

// Sizes to ask for.
struct Shape {
  int dims = 0;
  int64_t sizes[kMostDims] = {};
  Shape(std::initializer_list<int64_t> from) {
    for (const int64_t size : from) sizes[dims++] = size;
  }
};

struct Array {
  void* data = nullptr;
  Type type = Type::other;
  int dims = -1;                                           // -1 where there is no tensor
  int device = kOnCpu;                                     // or the number of a GPU
  int64_t sizes[kMostDims] = {}, strides[kMostDims] = {};  // strides in elements

  bool defined() const { return dims >= 0; }
  explicit operator bool() const { return defined(); }
  int64_t size(int dim) const { return sizes[dim < 0 ? dim + dims : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? dim + dims : dim]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int d = 0; d < dims; ++d) count *= sizes[d];
    return count;
  }
  // A stride along a dimension of one number, or of none, is never used and may be any number.
  bool contiguous_along(int dim) const { return size(dim) <= 1 || stride(dim) == 1; }
  Shape shape() const {
    Shape shape{};
    shape.dims = dims;
    for (int d = 0; d < dims; ++d) shape.sizes[d] = sizes[d];
    return shape;
  }
  bool has_shape(const Shape& shape) const {
    bool same = dims == shape.dims;
    for (int d = 0; same && d < dims; ++d) same = sizes[d] == shape.sizes[d];
    return same;
  }
  bool is_contiguous() const {
    int64_t stride = 1;
    for (int d = dims - 1; d >= 0; --d) {
      if (sizes[d] == 0) return true;
      if (sizes[d] != 1 && strides[d] != stride) return false;
      stride *= sizes[d];
    }
    return true;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

struct Arrays {
  const Array* data;
  int64_t size;
};
struct Integers {
  const int64_t* data;
  int64_t size;
};
struct Doubles {
  const double* data;
  int64_t size;
};

inline int64_t bytes_of(Type type) {
  constexpr int64_t bytes[] = {4, 8, 2, 2, 8, 4, 1, 1, 0};
  return bytes[static_cast<int>(type)];
}
inline const char* name_of(Type type) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16",      "int64",
                                   "int32",   "bool",    "int8",     "another dtype"};
  return names[static_cast<int>(type)];
}
// The type of sums over numbers of another type.
inline Type accumulator(Type type) { return type == Type::float64 ? Type::float64 : Type::float32; }
inline bool is_floating(Type type) { return type <= Type::float16; }

// ---- What is refused ------------------------------------------------------------------------------------------------

// Becomes a TypeError, as std::invalid_argument becomes a ValueError.
struct WrongType : std::logic_error {
  using std::logic_error::logic_error;
};

inline std::string text_of(const char* text) { return text; }
inline std::string text_of(const std::string& text) { return text; }
inline std::string text_of(int64_t number) { return std::to_string(number); }
inline std::string text_of(int number) { return std::to_string(number); }
inline std::string text_of(Type type) { return name_of(type); }
inline std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (int d = 0; d < shape.dims; ++d) text += (d ? ", " : "") + std::to_string(shape.sizes[d]);
  return text + (shape.dims == 1 ? ",)" : ")");
}
inline std::string text_of(const Array& array) { return text_of(array.shape()); }
template <class... Parts>
std::string text_from(const Parts&... parts) {
  return (std::string() + ... + text_of(parts));
}

// The message is made where the condition does not hold only.
#define CHECK_VALUE(condition, ...) \
  if (!(condition)) throw std::invalid_argument(::contrastive_ops::text_from(__VA_ARGS__))
#define CHECK_TYPE(condition, ...) \
  if (!(condition)) throw ::contrastive_ops::WrongType(::contrastive_ops::text_from(__VA_ARGS__))

inline DType dtype_of(const Array& x) {
  CHECK_TYPE(is_floating(x.type), "x must be a floating tensor, got ", x.type);
  return static_cast<DType>(x.type);
}

inline void check_array(const Array& array, const Shape& shape, Type type, const char* name) {
  CHECK_VALUE(array.has_shape(shape), name, " must have shape ", shape, ", got ", array);
  CHECK_TYPE(array.type == type, name, " must have dtype ", type, ", got ", array.type);
}

inline void check_on_cpu(const Array& array, const char* name) {
  CHECK_VALUE(array.device == kOnCpu, name, " must be on the CPU, got one on GPU ", array.device);
}

// A tensor of this shape and dtype, contiguous; none where there is none.
template <class Tensor>
auto shaped(const Tensor& tensor, const Shape& shape, Type type, const char* name) {
  if (!tensor) return tensor.contiguous();
  check_array(tensor, shape, type, name);
  check_on_cpu(tensor, name);
  return tensor.contiguous();
}

}  // namespace contrastive_ops
