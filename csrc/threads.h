// Tasks on the threads of the torch that is running.
#pragma once

#include "similarity_problem.h"

namespace contrastive_ops {

// Finds torch's OpenMP; `library` is the path of libtorch_cpu. Without it every task runs in the calling thread.
void find_threads(const char* library);
bool has_threads();

// One task after another, in the calling thread.
void run_in_order(int64_t count, Parallel::Task task, void* context);

// What primitives are given: as many threads as torch.set_num_threads says. Needs no GIL.
Parallel parallel();

}  // namespace contrastive_ops
