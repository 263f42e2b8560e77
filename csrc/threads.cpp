// The threads are those of the OpenMP that torch has loaded, found by name at run time: a second runtime would
// oversubscribe the cores, and what is compiled with -fopenmp asks for the runtime of its own compiler.
#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>

namespace contrastive_ops {
namespace {

// GOMP_parallel is of GCC's OpenMP and of LLVM's; the others are at::get_num_threads() and omp_in_parallel().
struct Runtime {
  void (*start)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*get_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool complete() const { return start && get_threads && in_parallel; }
} runtime;

struct Work {
  int64_t count;
  Parallel::Task task;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  // Indices are handed out one by one: tasks differ in length, and every task owns its outputs, so who runs which task
  // does not change a result.
  void run() {
    const int worker = workers++;
    try {
      for (int64_t index = next++; index < count && !failed; index = next++) task(context, index, worker);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

void run_tasks(int64_t count, Parallel::Task task, void* context) {
  const int64_t workers = std::min<int64_t>(count, parallel().threads);
  if (workers <= 1 || runtime.in_parallel()) return run_in_order(count, task, context);
  Work work{count, task, context};
  runtime.start([](void* data) { static_cast<Work*>(data)->run(); }, &work, static_cast<unsigned>(workers), 0);
  if (work.error) std::rethrow_exception(work.error);
}

}  // namespace

void run_in_order(int64_t count, Parallel::Task task, void* context) {
  for (int64_t index = 0; index < count; ++index) task(context, index, 0);
}

void find_threads(const char* library) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) handle = RTLD_DEFAULT;
  Runtime found;
  // A handle stands for the library and for what it was linked with.
  found.start = reinterpret_cast<decltype(found.start)>(dlsym(handle, "GOMP_parallel"));
  found.get_threads = reinterpret_cast<decltype(found.get_threads)>(dlsym(handle, "_ZN2at15get_num_threadsEv"));
  found.in_parallel = reinterpret_cast<decltype(found.in_parallel)>(dlsym(handle, "omp_in_parallel"));
  runtime = found.complete() ? found : Runtime();
}

bool has_threads() { return runtime.complete(); }

Parallel parallel() { return {run_tasks, runtime.complete() ? std::max(runtime.get_threads(), 1) : 1}; }

}  // namespace contrastive_ops
