// The module contrastive_ops._C: the kernels behind addresses and sizes. No torch header is included, so that one build
// serves every torch of this Python: tensors are read by tensor.h, arguments by their types (door.h), and memory is
// protected here by checks of sizes. Arguments for users are checked in Python.
#include "bindings_expert_routing.h"
#include "bindings_grouped_matmul.h"
#include "bindings_maxsim.h"
#include "bindings_similarity_distill.h"
#include "bindings_similarity_loss.h"
#include "bindings_similarity_prefix.h"
#include "bindings_similarity_problem.h"
#include "bindings_similarity_reduce.h"
#include "bindings_similarity_topk.h"
#include "bindings_similarity_values.h"
#include "cpu/capability.h"
#include "cpu/scratch.h"
#include "kernels.h"

#include <unistd.h>
#ifdef __APPLE__
#include <pthread.h>
#else
#include <sys/syscall.h>
#endif

#include <chrono>
#include <stdexcept>

namespace contrastive_ops {

#ifdef CONTRASTIVE_OPS_CUDA
void add_cuda_functions(std::vector<PyMethodDef>& methods);  // of bindings_cuda.cpp
const CudaKernels* cuda_kernels();
#else
void add_cuda_functions(std::vector<PyMethodDef>&) {}
const CudaKernels* cuda_kernels() { return nullptr; }
#define CONTRASTIVE_OPS_CUDA "no"
#endif

namespace {

constexpr int64_t kMostVirtualCores = 1024;

// ---- Signals --------------------------------------------------------------------------------------------------------

// The thread whose signals Python handles.
bool is_main_thread() {
#ifdef __APPLE__
  return pthread_main_np() != 0;
#else
  return syscall(SYS_gettid) == getpid();
#endif
}

// Ctrl-C ends a call that takes minutes: between two tasks, a few times a second, handlers of signals are run, and what
// one raises is raised by the call. Others that work for the call stop after their task.
void run_signal_handlers() {
  using Clock = std::chrono::steady_clock;
  constexpr auto kBetweenLooks = std::chrono::milliseconds(100);
  // Of a child that was forked by another thread the main thread is a new one.
  thread_local pid_t process = 0;
  thread_local bool main = false;
  thread_local Clock::time_point looked{};
  if (const pid_t now = getpid(); now != process) {
    process = now;
    main = is_main_thread();
  }
  if (!main || PyGILState_GetThisThreadState() == nullptr) return;
  if (const auto now = Clock::now(); now - looked >= kBetweenLooks) {
    looked = now;
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    // Threads hand on the words of an exception alone: the error itself stays with Python.
    if (raised) throw std::runtime_error("a handler of a signal raised an error");
  }
}

// ---- Functions ------------------------------------------------------------------------------------------------------

// Versions and options at build time, and whether torch's threads were found.
PyObject* build_config(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s}", "compiler", __VERSION__, "cpu_levels", capability_names().c_str(), "openmp",
                       has_threads() ? "yes" : "no", "cuda", CONTRASTIVE_OPS_CUDA);
}

// The SIMD level in use.
PyObject* cpu_capability(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(capability_name(capability()));
  } catch (...) {
    return raise_caught();
  }
}
PyObject* cpu_capability_detected(PyObject*, PyObject*) {
  return PyUnicode_FromString(capability_name(detected_capability()));
}

// Returns the kernels' memory to the allocator, and how many bytes it was.
PyObject* release_kept_scratch(PyObject*, PyObject*) { return PyLong_FromSize_t(release_scratch()); }

// The functions of the kernels for contrastive_ops._eager: kernels.h.
PyObject* kernels(PyObject*, PyObject*) {
  static Kernels table{kKernelsLayout, similarity_reduce_cpu, expert_routing_cpu, parallel,
                       one_thread,     cuda_kernels(),        current_stream};
  return PyCapsule_New(&table, kKernelsCapsule, nullptr);
}

template <class Items, class Make>
Reference list_of(const Items& items, Make make) {
  Reference list = Reference::own(PyList_New(0));
  for (const auto& item : items) {
    const Reference made = make(item);
    if (PyList_Append(list.get(), made.get()) != 0) throw PythonError();
  }
  return list;
}

// virtual_cores(P) -> [(elapsed, makespan, stages, [seconds of each task]), ...], in seconds; a stage is (tasks,
// [earlier stages]): see `model_cores`.
PyObject* virtual_cores(PyObject*, PyObject* cores) {
  try {
    const int64_t count = integer_of(cores);
    CHECK_VALUE(count >= 0 && count <= kMostVirtualCores, "virtual_cores: cores must be in [0, ", kMostVirtualCores,
                "], got ", count);
    const auto stage_object = [](const ModelledRegion::Tasks& stage) {
      const Reference after =
          list_of(stage.after, [](int earlier) { return Reference::own(PyLong_FromLong(earlier)); });
      return Reference::own(Py_BuildValue("(LO)", static_cast<long long>(stage.count), after.get()));
    };
    const auto region_object = [&](const ModelledRegion& r) {
      const Reference stages = list_of(r.stages, stage_object);
      const Reference times = list_of(r.seconds, [](double took) { return Reference::own(PyFloat_FromDouble(took)); });
      return Reference::own(Py_BuildValue("(ddOO)", r.elapsed, r.makespan, stages.get(), times.get()));
    };
    return list_of(model_cores(static_cast<int>(count)), region_object).release();
  } catch (...) {
    return raise_caught();
  }
}

// With None in place of torch.Tensor.__dlpack_c_exchange_api__, as with a torch that has none.
PyObject* read_tensors_by(PyObject*, PyObject* exchange) {
  try {
    const Reference torch = Reference::own(PyImport_ImportModule("torch"));
    use_torch(torch.get(), exchange);
    Py_RETURN_NONE;
  } catch (...) {
    return raise_caught();
  }
}

// clang-format off
#define CONTRASTIVE_OPS_FUNCTIONS(use) \
  use(expert_routing_combine)          \
  use(expert_routing_dispatch)         \
  use(expert_routing_dots)             \
  use(expert_routing_route)            \
  use(expert_routing_route_backward)   \
  use(expert_routing_scores)           \
  use(expert_routing_scores_backward)  \
  use(expert_routing_slots)            \
  use(grouped_matmul_activate)         \
  use(grouped_matmul_activate_backward)\
  use(grouped_matmul_forward)          \
  use(grouped_matmul_outer)            \
  use(maxsim_backward)                 \
  use(maxsim_forward)                  \
  use(similarity_distill_backward)     \
  use(similarity_distill_forward)      \
  use(similarity_loss_forward)         \
  use(similarity_loss_scale)           \
  use(similarity_prefix_backward)      \
  use(similarity_prefix_forward)       \
  use(similarity_reduce_backward)      \
  use(similarity_reduce_forward)       \
  use(similarity_topk_at)              \
  use(similarity_topk_backward)        \
  use(similarity_topk_forward)         \
  use(similarity_topk_merge)           \
  use(similarity_topk_order)           \
  use(similarity_values_backward)      \
  use(similarity_values_forward)
// clang-format on

PyMethodDef* methods() {
  static std::vector<PyMethodDef> table;
  if (!table.empty()) return table.data();
#define CONTRASTIVE_OPS_METHOD(name) table.push_back(fast_method(#name, &Door<&name>::call));
  CONTRASTIVE_OPS_FUNCTIONS(CONTRASTIVE_OPS_METHOD)
#undef CONTRASTIVE_OPS_METHOD
  add_cuda_functions(table);
  table.push_back({"build_config", build_config, METH_NOARGS, nullptr});
  table.push_back({"cpu_capability", cpu_capability, METH_NOARGS, nullptr});
  table.push_back({"cpu_capability_detected", cpu_capability_detected, METH_NOARGS, nullptr});
  table.push_back({"kernels", kernels, METH_NOARGS, nullptr});
  table.push_back({"release_scratch", release_kept_scratch, METH_NOARGS, nullptr});
  table.push_back({"read_tensors_by", read_tensors_by, METH_O, nullptr});
  table.push_back({"virtual_cores", virtual_cores, METH_O, nullptr});
  table.push_back({nullptr, nullptr, 0, nullptr});
  return table.data();
}

void use_running_torch() {
  const Reference torch = Reference::own(PyImport_ImportModule("torch"));
  const Reference tensor = Reference::own(PyObject_GetAttrString(torch.get(), "Tensor"));
  PyObject* exchange = PyObject_GetAttrString(tensor.get(), "__dlpack_c_exchange_api__");
  if (exchange == nullptr) PyErr_Clear();
  const Reference found = Reference::to(exchange ? exchange : Py_None);
  Py_XDECREF(exchange);
  use_torch(torch.get(), found.get());
  const Reference file = Reference::own(PyObject_GetAttrString(torch.get(), "__file__"));
  const std::string path(text_of(file.get()));
#ifdef __APPLE__
  const char* library = "lib/libtorch_cpu.dylib";
#else
  const char* library = "lib/libtorch_cpu.so";
#endif
  find_threads((path.substr(0, path.find_last_of('/') + 1) + library).c_str());
}

}  // namespace
}  // namespace contrastive_ops

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT,
                                "contrastive_ops._C",
                                nullptr,
                                -1,
                                contrastive_ops::methods(),
                                nullptr,
                                nullptr,
                                nullptr,
                                nullptr};
  if (PyInterpreterState_GetID(PyInterpreterState_Get()) != 0) {  // that of the main one
    PyErr_SetString(PyExc_ImportError,
                    "contrastive_ops._C: must be imported by the main interpreter of the process, got another one\n"
                    "  torch serves one interpreter; start a process in place of an interpreter");
    return nullptr;
  }
  if (const std::string why = contrastive_ops::why_not_this_processor(); !why.empty()) {
    PyErr_SetString(PyExc_ImportError, why.c_str());
    return nullptr;
  }
  try {
    contrastive_ops::use_running_torch();
    contrastive_ops::between_tasks = contrastive_ops::run_signal_handlers;
  } catch (...) {
    return contrastive_ops::raise_caught();
  }
  PyObject* module = PyModule_Create(&definition);
#ifdef Py_GIL_DISABLED
  // Memory that is kept between calls has a lock, and all else is written at import.
  if (module != nullptr) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}
