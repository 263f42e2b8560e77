// Tasks on the threads of the torch that is running.
#pragma once

#include <vector>

#include "similarity_problem.h"

namespace contrastive_ops {

// Called between tasks, by every thread that runs some: whoever set it may end the work by an exception.
extern void (*between_tasks)();

// Finds torch's OpenMP; `library` is the path of libtorch_cpu. Without it every task runs in the calling thread.
void find_threads(const char* library);
bool has_threads();

// One task after another, in the calling thread.
void run_in_order(int64_t count, Parallel::Task task, void* context);

// What primitives are given: as many threads as torch.set_num_threads says. Needs no GIL.
Parallel parallel();
// The calling thread alone.
Parallel one_thread();

// What a region took on virtual cores: its tasks run one after another, each is timed and scheduled. Seconds, of tasks
// without the clock's.
struct ModelledRegion {
  struct Tasks {
    int64_t count;
    std::vector<int> after;  // the stages that they wait for
  };
  int64_t tasks;
  double total, makespan, longest, elapsed;  // of all tasks; of the region; of a task; of all that the model did
  std::vector<Tasks> stages;
  std::vector<double> seconds;  // of each task
};

// Models as many cores in the regions that this thread begins from here on; 0 ends that. Returns the regions since the
// last call.
std::vector<ModelledRegion> model_cores(int cores);

}  // namespace contrastive_ops
