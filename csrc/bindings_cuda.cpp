// The functions of the CUDA kernels, by their types alone; compiled where there are kernels. A file of its own, because
// functions of bindings.cpp have the same names for the CPU.
//
// A function of cuda/functions.h gets its tensors as pointers, None as null, a tuple of tensors as Arrays, a list of
// integers as Integers, one of numbers as Doubles, and the current stream of the tensors' device.
#include <cuda_runtime_api.h>

#include <vector>

#include "cuda/functions.h"
#include "door.h"
#include "kernels.h"

namespace contrastive_ops {
namespace {

// What all tensors of a call have in common.
struct CudaCall {
  std::string name;
  int device = kOnCpu;

  void* data(const Tensor& tensor) {
    const bool dense = tensor.is_contiguous();
    CHECK_VALUE(tensor.device != kOnCpu && dense, name, ": tensors must be contiguous and on a GPU, got one that is ",
                dense ? "" : "not ", "contiguous on ", text_of_device(tensor.device));
    CHECK_VALUE(device == kOnCpu || device == tensor.device, name, ": tensors must be on one device, got ",
                text_of_device(device), " and ", text_of_device(tensor.device));
    device = tensor.device;
    return tensor.data;
  }
  static std::string text_of_device(int device) { return device == kOnCpu ? "cpu" : "cuda:" + std::to_string(device); }
};

template <class T>
constexpr Type kTypeOf = std::is_same_v<T, float>     ? Type::float32
                         : std::is_same_v<T, double>  ? Type::float64
                         : std::is_same_v<T, int64_t> ? Type::int64
                         : std::is_same_v<T, int32_t> ? Type::int32
                         : std::is_same_v<T, bool>    ? Type::boolean
                                                      : Type::other;

// A number, or one of the others.
template <class P>
struct CudaArgument {
  P get(CudaCall&, PyObject* object) {
    if constexpr (std::is_floating_point_v<P>) return static_cast<P>(Argument<double>(object).value);
    if constexpr (std::is_same_v<P, bool>) return Argument<bool>(object).value;
    return static_cast<P>(integer_of(object));
  }
};
template <class T>
struct CudaArgument<T*> {
  Optional tensor;
  T* get(CudaCall& call, PyObject* object) {
    tensor = Argument<Optional>(object).value;
    if (!tensor) return nullptr;
    constexpr Type type = kTypeOf<std::remove_const_t<T>>;
    CHECK_TYPE(tensor.type == type, call.name, ": a tensor must have dtype ", type, ", got ", tensor.type);
    return static_cast<T*>(call.data(tensor));
  }
};
template <class Floating>
struct FloatingArgument {
  Optional tensor;
  Floating get(CudaCall& call, PyObject* object) {
    tensor = Argument<Optional>(object).value;
    if (!tensor) return {nullptr, DType::float32};
    CHECK_TYPE(is_floating(tensor.type) && tensor.type != Type::float64, call.name,
               ": a tensor must be of float32, bfloat16 or float16, got ", tensor.type);
    return {call.data(tensor), dtype_of(tensor)};
  }
};
template <>
struct CudaArgument<Input> : FloatingArgument<Input> {};
template <>
struct CudaArgument<Output> : FloatingArgument<Output> {};
template <>
struct CudaArgument<Arrays> {
  TensorList list;
  Arrays get(CudaCall& call, PyObject* object) {
    list = Argument<TensorList>(object).value;
    for (const Tensor& tensor : list.tensors) call.data(tensor);
    return list.list();
  }
};
template <>
struct CudaArgument<Integers> {
  std::vector<int64_t> numbers;
  Integers get(CudaCall&, PyObject* object) {
    numbers = Argument<Integers>(object).numbers;
    return {numbers.data(), static_cast<int64_t>(numbers.size())};
  }
};

template <>
struct CudaArgument<Doubles> {
  std::vector<double> numbers;
  Doubles get(CudaCall&, PyObject* object) {
    numbers = Argument<Doubles>(object).numbers;
    return {numbers.data(), static_cast<int64_t>(numbers.size())};
  }
};

// Makes a device the current one as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class... P, size_t... index>
PyObject* call_cuda(const char* name, void (*function)(Stream, P...), PyObject* const* objects, Py_ssize_t count,
                    std::index_sequence<index...>) {
  try {
    CudaCall call{name};
    CHECK_VALUE(count == sizeof...(P), name, " must get ", static_cast<int64_t>(sizeof...(P)), " arguments, got ",
                static_cast<int64_t>(count));
    std::tuple<CudaArgument<P>...> arguments;
    std::tuple<P...> raw{std::get<index>(arguments).get(call, objects[index])...};
    CHECK_VALUE(call.device != kOnCpu, name, " must get a tensor");
    const OnDevice guard(call.device);
    function(reinterpret_cast<Stream>(current_stream(call.device)), std::get<index>(raw)...);
    Py_RETURN_NONE;
  } catch (...) {
    return raise_caught();
  }
}

template <class... P>
PyObject* call_cuda(const char* name, void (*function)(Stream, P...), PyObject* const* objects, Py_ssize_t count) {
  return call_cuda(name, function, objects, count, std::index_sequence_for<P...>());
}

#define CONTRASTIVE_OPS_DEFINE(name)                                             \
  PyObject* call_##name(PyObject*, PyObject* const* objects, Py_ssize_t count) { \
    return call_cuda(#name, &name, objects, count);                              \
  }
CONTRASTIVE_OPS_CUDA_FUNCTIONS(CONTRASTIVE_OPS_DEFINE)
#undef CONTRASTIVE_OPS_DEFINE

}  // namespace

const CudaKernels* cuda_kernels() {
#define CONTRASTIVE_OPS_ADDRESS(name) &name,
  static const CudaKernels table{CONTRASTIVE_OPS_LOSS_FUNCTIONS(CONTRASTIVE_OPS_ADDRESS)};
#undef CONTRASTIVE_OPS_ADDRESS
  return &table;
}

void add_cuda_functions(std::vector<PyMethodDef>& methods) {
#define CONTRASTIVE_OPS_METHOD(name) methods.push_back(fast_method("cuda_" #name, &call_##name));
  CONTRASTIVE_OPS_CUDA_FUNCTIONS(CONTRASTIVE_OPS_METHOD)
#undef CONTRASTIVE_OPS_METHOD
}

}  // namespace contrastive_ops
