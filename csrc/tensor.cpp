#include "tensor.h"

#include <algorithm>
#include <cstring>

#include "huge_pages.h"
#include "threads.h"

namespace contrastive_ops {
namespace {

// ---- DLPack 1.x (https://github.com/dmlc/dlpack, Apache 2.0): the part of its C interface that is used here
// ----------

struct DLDevice {
  int32_t type, index;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensorVersioned;
struct DLPackExchange {
  uint32_t major, minor;
  void* previous;
  int (*allocate)(DLTensor* like, DLManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, DLManagedTensorVersioned** out);
  int (*to_object)(DLManagedTensorVersioned* tensor, void** object);
  int (*read)(void* object, DLTensor* out);
};
constexpr int32_t kCpuDevice = 1, kCudaDevice = 2;
constexpr uint8_t kInteger = 0, kFloat = 2, kBFloat = 4, kBoolean = 6;
// By the numbers of Type.
constexpr DLDataType kDataTypes[] = {{kFloat, 32, 1},   {kFloat, 64, 1},   {kBFloat, 16, 1}, {kFloat, 16, 1},
                                     {kInteger, 64, 1}, {kInteger, 32, 1}, {kBoolean, 8, 1}, {kInteger, 8, 1}};
constexpr int kTypes = static_cast<int>(Type::other);

// ---- What is known of the torch that is running
// ----------------------------------------------------------------------

// Objects that live as long as the process.
struct Torch {
  PyTypeObject* tensor = nullptr;
  const DLPackExchange* exchange = nullptr;
  PyObject* dtypes[kTypes] = {};
  PyObject* empty = nullptr;
  PyObject* cpu = nullptr;
  PyObject *name, *data_ptr, *shape, *stride, *dtype, *is_cpu, *is_cuda, *get_device, *contiguous, *to, *transpose;
} torch;

Reference attribute(PyObject* object, PyObject* name) { return Reference::own(PyObject_GetAttr(object, name)); }
template <class... T>
Reference call(PyObject* object, PyObject* name, T... arguments) {
  return Reference::own(PyObject_CallMethodObjArgs(object, name, arguments..., nullptr));
}

int64_t integer(PyObject* object) {
  const int64_t number = PyLong_AsLongLong(object);
  if (number == -1 && PyErr_Occurred()) throw PythonError();
  return number;
}

std::string type_name(PyObject* object) {
  const Reference name = attribute(reinterpret_cast<PyObject*>(Py_TYPE(object)), torch.name);
  return text_of(name.get());
}

void check_dims(int64_t dims) {
  CHECK_VALUE(dims <= kMostDims, "a tensor must have at most ", kMostDims, " dimensions, got ", dims);
}

void read_attributes(PyObject* object, Array& array) {
  const Reference shape = attribute(object, torch.shape), strides = call(object, torch.stride);
  const Py_ssize_t dims = PyTuple_Size(shape.get());
  check_dims(dims);
  array.dims = static_cast<int>(dims);
  for (Py_ssize_t d = 0; d < dims; ++d) {
    array.sizes[d] = integer(PyTuple_GetItem(shape.get(), d));
    array.strides[d] = integer(PyTuple_GetItem(strides.get(), d));
  }
  const Reference dtype = attribute(object, torch.dtype);
  for (int type = 0; type < kTypes; ++type) {
    if (dtype.get() == torch.dtypes[type]) array.type = static_cast<Type>(type);
  }
  if (attribute(object, torch.is_cpu).get() != Py_True) {
    CHECK_VALUE(attribute(object, torch.is_cuda).get() == Py_True, "a tensor must be on a CPU or a GPU");
    array.device = static_cast<int>(integer(call(object, torch.get_device).get()));
  }
  array.data = reinterpret_cast<void*>(integer(call(object, torch.data_ptr).get()));
}

void read_exchanged(PyObject* object, Array& array) {
  DLTensor found;
  if (torch.exchange->read(object, &found) != 0) {  // a device or a dtype that DLPack has no number for
    PyErr_Clear();
    return read_attributes(object, array);
  }
  check_dims(found.ndim);
  array.data = static_cast<char*>(found.data) + found.byte_offset;
  array.dims = found.ndim;
  array.device = found.device.type == kCudaDevice ? found.device.index : kOnCpu;
  CHECK_VALUE(found.device.type == kCudaDevice || found.device.type == kCpuDevice,
              "a tensor must be on a CPU or a GPU");
  int64_t dense = 1;
  for (int d = found.ndim - 1; d >= 0; --d) {
    array.sizes[d] = found.shape[d];
    array.strides[d] = found.strides ? found.strides[d] : dense;
    dense *= found.shape[d];
  }
  for (int type = 0; type < kTypes; ++type) {
    if (std::memcmp(&kDataTypes[type], &found.dtype, sizeof(DLDataType)) == 0) array.type = static_cast<Type>(type);
  }
}

void raise_memory_error(void*, const char* kind, const char* message) {
  const bool memory = std::strcmp(kind, "MemoryError") == 0;
  PyErr_SetString(memory ? PyExc_MemoryError : PyExc_RuntimeError, message);
}

Reference exchanged_empty(const Shape& shape, Type type) {
  DLTensor like{};
  like.device = {kCpuDevice, 0};
  like.ndim = shape.dims;
  like.dtype = kDataTypes[static_cast<int>(type)];
  like.shape = const_cast<int64_t*>(shape.sizes);
  DLManagedTensorVersioned* managed = nullptr;
  void* object = nullptr;
  if (torch.exchange->allocate(&like, &managed, nullptr, raise_memory_error) != 0) throw PythonError();
  if (torch.exchange->to_object(managed, &object) != 0) throw PythonError();
  return Reference::own(static_cast<PyObject*>(object));
}

Reference called_empty(const Shape& shape, Type type) {
  const Reference sizes = Reference::own(PyTuple_New(shape.dims));
  for (int d = 0; d < shape.dims; ++d) PyTuple_SetItem(sizes.get(), d, PyLong_FromLongLong(shape.sizes[d]));
  // The device is named because torch.set_default_device may have named another.
  PyObject* dtype = torch.dtypes[static_cast<int>(type)];
  const Reference keywords = Reference::own(Py_BuildValue("{s:O,s:O}", "dtype", dtype, "device", torch.cpu));
  const Reference arguments = Reference::own(PyTuple_Pack(1, sizes.get()));
  return Reference::own(PyObject_Call(torch.empty, arguments.get(), keywords.get()));
}

}  // namespace

Tensor::Tensor(Reference object) : object_(std::move(object)) {
  CHECK_TYPE(PyObject_TypeCheck(object_.get(), torch.tensor), "an argument must be a tensor, got ",
             type_name(object_.get()));
  if (torch.exchange) {
    read_exchanged(object_.get(), *this);
  } else {
    read_attributes(object_.get(), *this);
  }
}

Tensor Tensor::contiguous() const {
  return !defined() || is_contiguous() ? *this : Tensor(call(object(), torch.contiguous));
}

Tensor Tensor::to(Type wanted) const {
  if (type == wanted) return *this;
  return Tensor(call(object(), torch.to, torch.dtypes[static_cast<int>(wanted)]));
}

Tensor Tensor::transposed() const {
  const Reference one = Reference::own(PyLong_FromLong(1)), two = Reference::own(PyLong_FromLong(2));
  return Tensor(call(object(), torch.transpose, one.get(), two.get()));
}

Tensor empty(const Shape& shape, Type type) {
  Tensor tensor(torch.exchange ? exchanged_empty(shape, type) : called_empty(shape, type));
  use_huge_pages(tensor.data, static_cast<size_t>(tensor.numel() * bytes_of(type)));
  return tensor;
}

Tensor zeros(const Shape& shape, Type type) {
  Tensor tensor = empty(shape, type);
  const int64_t bytes = tensor.numel() * bytes_of(type);
  static constexpr int64_t kPart = int64_t{1} << 20;  // the first touch of a page takes longer than writing it
  struct Zeros {
    char* data;
    int64_t bytes;
  } whole{tensor.as<char>(), bytes};
  const auto clear = [](void* context, int64_t part, int) {
    const Zeros& zeros = *static_cast<Zeros*>(context);
    std::memset(zeros.data + part * kPart, 0, static_cast<size_t>(std::min(kPart, zeros.bytes - part * kPart)));
  };
  if (bytes > 0) parallel().run((bytes + kPart - 1) / kPart, clear, &whole);
  return tensor;
}

void fill(const Tensor& tensor, int64_t begin, int64_t count, double value) {
  if (tensor.type == Type::float64) std::fill_n(tensor.as<double>() + begin, count, value);
  if (tensor.type == Type::float32) std::fill_n(tensor.as<float>() + begin, count, static_cast<float>(value));
  if (tensor.type == Type::int32) std::fill_n(tensor.as<int32_t>() + begin, count, static_cast<int32_t>(value));
}

Tensor full(const Shape& shape, Type type, double value) {
  Tensor tensor = empty(shape, type);
  fill(tensor, 0, tensor.numel(), value);
  return tensor;
}

int64_t current_stream(int device) {
  static PyObject* const find = [] {
    const Reference module = Reference::own(PyImport_ImportModule("torch._C"));
    return Reference::own(PyObject_GetAttrString(module.get(), "_cuda_getCurrentRawStream")).release();
  }();
  const Reference number = Reference::own(PyLong_FromLong(device));
  return integer(Reference::own(PyObject_CallFunctionObjArgs(find, number.get(), nullptr)).get());
}

void use_torch(PyObject* module, PyObject* exchange) {
  const auto named = [](PyObject* of, const char* name) {
    return Reference::own(PyObject_GetAttrString(of, name)).release();
  };
  const auto interned = [](const char* name) { return Reference::own(PyUnicode_InternFromString(name)).release(); };
  Torch found;
  found.tensor = reinterpret_cast<PyTypeObject*>(named(module, "Tensor"));
  for (int type = 0; type < kTypes; ++type) found.dtypes[type] = named(module, name_of(static_cast<Type>(type)));
  found.empty = named(module, "empty");
  found.cpu = Reference::own(PyObject_CallMethod(module, "device", "s", "cpu")).release();
  found.name = interned("__name__");
  found.data_ptr = interned("data_ptr"), found.shape = interned("shape"), found.stride = interned("stride");
  found.dtype = interned("dtype"), found.is_cpu = interned("is_cpu"), found.is_cuda = interned("is_cuda");
  found.get_device = interned("get_device"), found.contiguous = interned("contiguous"), found.to = interned("to");
  found.transpose = interned("transpose");
  if (PyCapsule_IsValid(exchange, "dlpack_exchange_api")) {
    const auto* api = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(exchange, "dlpack_exchange_api"));
    if (api->major == 1) found.exchange = api;
  }
  torch = found;
}

}  // namespace contrastive_ops
