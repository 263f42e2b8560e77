// The functions of the CUDA kernels, by their types alone; compiled where there are kernels. A file of its own, because
// functions of bindings.cpp have the same names for the CPU.
//
// A function of cuda/functions.h gets its tensors as pointers, None as null, a tuple of tensors as Tensors, a list of
// integers as Integers, and the current stream of the tensors' device.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/functions.h"

namespace contrastive_ops {
namespace {

using at::Tensor;

// Messages are strings when they get to TORCH_CHECK, which would write numbers by a stream: that crashes in an
// extension whose toolchain has linked libstdc++ into it while torch has another one.

// What all tensors of a call have in common.
struct CudaCall {
  std::string name;
  std::optional<at::Device> device;

  void* data(const Tensor& tensor) {
    const std::string where = tensor.device().str();
    TORCH_CHECK_VALUE(tensor.is_cuda() && tensor.is_contiguous(),
                      name + ": tensors must be contiguous and on a GPU, got one that is " +
                          (tensor.is_contiguous() ? "" : "not ") + "contiguous on " + where);
    TORCH_CHECK_VALUE(!device || *device == tensor.device(),
                      name + ": tensors must be on one device, got " + device->str() + " and " + where);
    device = tensor.device();
    return tensor.data_ptr();
  }
};

template <class P>
struct CudaArgument {
  P get(CudaCall&, pybind11::handle value) { return value.cast<P>(); }
};
template <class T>
struct CudaArgument<T*> {
  T* get(CudaCall& call, pybind11::handle value) {
    if (value.is_none()) return nullptr;
    const Tensor tensor = value.cast<Tensor>();
    const auto type = c10::CppTypeToScalarType<std::remove_const_t<T>>::value;
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, call.name + ": a tensor must have dtype " + c10::toString(type) +
                                                       ", got " + c10::toString(tensor.scalar_type()));
    return static_cast<T*>(call.data(tensor));
  }
};
template <class Floating>
struct FloatingArgument {
  Floating get(CudaCall& call, pybind11::handle value) {
    if (value.is_none()) return {nullptr, DType::float32};
    const Tensor tensor = value.cast<Tensor>();
    return {call.data(tensor), dtype_of(call, tensor)};
  }
  static DType dtype_of(const CudaCall& call, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case at::kFloat:
        return DType::float32;
      case at::kBFloat16:
        return DType::bfloat16;
      case at::kHalf:
        return DType::float16;
      default:
        TORCH_CHECK_TYPE(false, call.name + ": a tensor must be of float32, bfloat16 or float16, got " +
                                    c10::toString(tensor.scalar_type()));
    }
  }
};
template <>
struct CudaArgument<Input> : FloatingArgument<Input> {};
template <>
struct CudaArgument<Output> : FloatingArgument<Output> {};
template <>
struct CudaArgument<Tensors> {
  std::vector<TensorArgument> list;
  Tensors get(CudaCall& call, pybind11::handle value) {
    for (const pybind11::handle each : value.cast<pybind11::tuple>()) {
      const auto tensor = each.cast<Tensor>();
      list.push_back({call.data(tensor), tensor.dim() == 0 ? 1 : tensor.size(-1)});
    }
    return {list.data(), static_cast<int64_t>(list.size())};
  }
};
template <>
struct CudaArgument<Integers> {
  std::vector<int64_t> integers;
  Integers get(CudaCall&, pybind11::handle value) {
    integers = value.cast<std::vector<int64_t>>();
    return {integers.data(), static_cast<int64_t>(integers.size())};
  }
};

template <class... P, size_t... index>
void call_cuda(const char* name, void (*function)(Stream, P...), const pybind11::args& values,
               std::index_sequence<index...>) {
  CudaCall call{name, {}};
  TORCH_CHECK_VALUE(values.size() == sizeof...(P), call.name + " must get " + std::to_string(sizeof...(P)) +
                                                       " arguments, got " + std::to_string(values.size()));
  std::tuple<CudaArgument<P>...> arguments;
  std::tuple<P...> raw{std::get<index>(arguments).get(call, values[index])...};
  TORCH_CHECK_VALUE(call.device.has_value(), call.name + " must get a tensor");
  const c10::cuda::CUDAGuard guard(*call.device);
  function(c10::cuda::getCurrentCUDAStream().stream(), std::get<index>(raw)...);
}

template <class... P>
void define_cuda(pybind11::module_& m, const char* name, void (*function)(Stream, P...)) {
  m.def((std::string("cuda_") + name).c_str(), [name, function](const pybind11::args& values) {
    call_cuda(name, function, values, std::index_sequence_for<P...>());
  });
}

}  // namespace

void define_cuda_functions(pybind11::module_& m) {
#define CONTRASTIVE_OPS_DEFINE(name) define_cuda(m, #name, &name);
  CONTRASTIVE_OPS_CUDA_FUNCTIONS(CONTRASTIVE_OPS_DEFINE)
#undef CONTRASTIVE_OPS_DEFINE
}

}  // namespace contrastive_ops
