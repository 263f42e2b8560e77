// The threads are those of the OpenMP that torch has loaded, found by name at run time: a second runtime would
// oversubscribe the cores, and what is compiled with -fopenmp asks for the runtime of its own compiler.
#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace contrastive_ops {
namespace {

// GOMP_parallel is of GCC's OpenMP and of LLVM's; the others are at::get_num_threads() and omp_in_parallel().
struct Runtime {
  void (*start)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*get_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool complete() const { return start && get_threads && in_parallel; }
} runtime;

// A forked child has none of the threads that its parent's OpenMP remembers, and would wait for them for ever.
std::atomic<bool> threads_began{false};
bool threads_are_lost = false;
void after_fork() { threads_are_lost = threads_are_lost || threads_began; }

// How many tasks of a stage have not ended, on a cache line of its own.
struct alignas(64) Left {
  std::atomic<int64_t> tasks;
};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// What a thread has caught, by its kind and words: std::exception_ptr would ask for the libstdc++ of GCC 11.
class Caught {
 public:
  // Within a handler.
  void keep() {
    try {
      throw;
    } catch (const std::bad_alloc&) {
      kind_ = Kind::memory;
    } catch (const std::invalid_argument& error) {
      kind_ = Kind::value, words_ = error.what();
    } catch (const std::exception& error) {
      kind_ = Kind::other, words_ = error.what();
    }
  }
  void raise_again() const {
    if (kind_ == Kind::memory) throw std::bad_alloc();
    if (kind_ == Kind::value) throw std::invalid_argument(words_);
    if (kind_ == Kind::other) throw std::runtime_error(words_);
  }

 private:
  enum class Kind { none, memory, value, other };
  Kind kind_ = Kind::none;
  std::string words_;
};

struct Work {
  int stage_count;
  const Stage* stages;
  int64_t count;  // of all tasks
  Parallel::Task task;
  void* context;
  std::unique_ptr<Left[]> left{};  // where there are several stages
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
  std::atomic<bool> failed{false};
  Caught error{};

  // Indices are handed out one by one: tasks differ in length, and every task owns its outputs, so who runs which task
  // does not change a result.
  void run() {
    const int worker = workers++;
    try {
      int stage = 0;
      int64_t end = stages[0].tasks;
      for (int64_t index = next++; index < count && !failed; index = next++) {
        while (index >= end) end += stages[++stage].tasks;
        if (!wait_for(stage)) return;
        task(context, index, worker);
        if (left) left[stage].tasks.fetch_sub(1, std::memory_order_release);
        if (between_tasks) between_tasks();
      }
    } catch (...) {
      if (!failed.exchange(true)) error.keep();
    }
  }

  bool has_ended(int stage) const {
    return stages[stage].tasks > 0 ? left[stage].tasks.load(std::memory_order_acquire) == 0 : may_begin(stage);
  }
  bool may_begin(int stage) const {
    const Stage& s = stages[stage];
    return std::all_of(s.after, s.after + s.after_count, [&](int earlier) { return has_ended(earlier); });
  }
  // The first task that has not ended waits for none, so somebody always works. There may be fewer cores than threads.
  bool wait_for(int stage) const {
    for (int round = 0; !may_begin(stage); ++round) {
      if (failed) return false;
      if (round < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    return true;
  }
  static constexpr int kSpins = 2000;  // some 50 us
};

int64_t tasks_of(int stage_count, const Stage* stages) {
  int64_t count = 0;
  for (int s = 0; s < stage_count; ++s) count += stages[s].tasks;
  return count;
}

// ---- Virtual cores --------------------------------------------------------------------------------------------------

thread_local int modelled_cores = 0;
thread_local std::vector<ModelledRegion> modelled_regions;

// Processor time of this thread: another process that takes the core does not lengthen a task.
double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// What two readings of the clock are apart when nothing is between them.
double seconds_of_clock() {
  double least = 1;
  for (int k = 0; k < 200; ++k) {
    const double began = seconds();
    least = std::min(least, seconds() - began);
  }
  return least;
}

// One task after another on this thread. As threads do, the virtual core that is free first takes the next task, and
// waits until it may begin.
void run_modelled(int stage_count, const Stage* stages, Parallel::Task task, void* context) {
  static const double clock = seconds_of_clock();
  const double region_began = seconds();
  const int64_t count = tasks_of(stage_count, stages);
  std::vector<double> core_free(static_cast<size_t>(std::max<int64_t>(std::min<int64_t>(count, modelled_cores), 1)));
  std::vector<double> stage_begin(static_cast<size_t>(stage_count)), stage_end(static_cast<size_t>(stage_count));
  ModelledRegion region{count, 0, 0, 0, 0, {}, {}};
  region.seconds.reserve(static_cast<size_t>(count));
  int64_t index = 0;
  for (size_t s = 0; s < stage_end.size(); ++s) {
    const Stage& stage = stages[s];
    region.stages.push_back({stage.tasks, {stage.after, stage.after + stage.after_count}});
    for (const int earlier : region.stages.back().after) {
      stage_begin[s] = std::max(stage_begin[s], stage_end[static_cast<size_t>(earlier)]);
    }
    stage_end[s] = stage_begin[s];
    for (int64_t left = stage.tasks; left > 0; --left) {
      const auto core = std::min_element(core_free.begin(), core_free.end());
      const double began = seconds();
      task(context, index++, static_cast<int>(core - core_free.begin()));
      const double took = std::max(seconds() - began - clock, 1e-9);
      *core = std::max(*core, stage_begin[s]) + took;
      stage_end[s] = std::max(stage_end[s], *core);
      region.seconds.push_back(took);
      region.total += took;
      region.longest = std::max(region.longest, took);
    }
  }
  region.makespan = *std::max_element(core_free.begin(), core_free.end());
  region.elapsed = seconds() - region_began + clock;
  if (count > 0) modelled_regions.push_back(std::move(region));
}

// ---- Regions --------------------------------------------------------------------------------------------------------

void run_stages(int stage_count, const Stage* stages, Parallel::Task task, void* context) {
  if (modelled_cores > 0) return run_modelled(stage_count, stages, task, context);
  const int64_t count = tasks_of(stage_count, stages);
  const int64_t workers = std::min<int64_t>(count, parallel().threads);
  if (workers <= 1 || runtime.in_parallel()) return run_in_order(count, task, context);
  Work work{stage_count, stages, count, task, context};
  if (stage_count > 1) {
    work.left.reset(new Left[static_cast<size_t>(stage_count)]);
    for (int s = 0; s < stage_count; ++s) work.left[static_cast<size_t>(s)].tasks = stages[s].tasks;
  }
  threads_began = true;
  runtime.start([](void* data) { static_cast<Work*>(data)->run(); }, &work, static_cast<unsigned>(workers), 0);
  work.error.raise_again();
}

void run_tasks(int64_t count, Parallel::Task task, void* context) {
  const Stage all{count};
  run_stages(1, &all, task, context);
}

}  // namespace

void (*between_tasks)() = nullptr;

void run_in_order(int64_t count, Parallel::Task task, void* context) {
  for (int64_t index = 0; index < count; ++index) {
    task(context, index, 0);
    if (between_tasks) between_tasks();
  }
}

void find_threads(const char* library) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) handle = RTLD_DEFAULT;
  static const int watched = pthread_atfork(nullptr, nullptr, after_fork);
  (void)watched;
  Runtime found;
  // A handle stands for the library and for what it was linked with.
  found.start = reinterpret_cast<decltype(found.start)>(dlsym(handle, "GOMP_parallel"));
  found.get_threads = reinterpret_cast<decltype(found.get_threads)>(dlsym(handle, "_ZN2at15get_num_threadsEv"));
  found.in_parallel = reinterpret_cast<decltype(found.in_parallel)>(dlsym(handle, "omp_in_parallel"));
  runtime = found.complete() ? found : Runtime();
}

bool has_threads() { return runtime.complete(); }

Parallel parallel() {
  if (modelled_cores > 0) return {run_tasks, modelled_cores, run_stages};
  const bool several = runtime.complete() && !threads_are_lost;
  return {run_tasks, several ? std::max(runtime.get_threads(), 1) : 1, run_stages};
}

Parallel one_thread() {
  const auto stages_in_order = [](int stage_count, const Stage* stages, Parallel::Task task, void* context) {
    run_in_order(tasks_of(stage_count, stages), task, context);
  };
  return {run_in_order, 1, stages_in_order};
}

std::vector<ModelledRegion> model_cores(int cores) {
  modelled_cores = cores;
  return std::exchange(modelled_regions, {});
}

}  // namespace contrastive_ops
