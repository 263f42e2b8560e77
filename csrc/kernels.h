// What contrastive_ops._C hands to contrastive_ops._eager in a capsule: the kernels are linked once.
#pragma once

#include "cuda/similarity_loss.h"
#include "cuda/similarity_reduce.h"
#include "expert_routing.h"
#include "similarity_reduce.h"

namespace contrastive_ops {

constexpr const char* kKernelsCapsule = "contrastive_ops._C.kernels";

// Functions of cuda/, for whole losses. One table, filled in where they are linked.
// clang-format off
#define CONTRASTIVE_OPS_LOSS_FUNCTIONS(use) \
  use(similarity_loss_finish)               \
  use(similarity_loss_multiply)             \
  use(similarity_loss_prepare)              \
  use(similarity_loss_rows)                 \
  use(similarity_reduce_fold)               \
  use(similarity_reduce_partners)           \
  use(similarity_reduce_weigh)
// clang-format on

struct CudaKernels {
#define CONTRASTIVE_OPS_FIELD(name) decltype(&::contrastive_ops::name) name;
  CONTRASTIVE_OPS_LOSS_FUNCTIONS(CONTRASTIVE_OPS_FIELD)
#undef CONTRASTIVE_OPS_FIELD
};

struct Kernels {
  int64_t layout;  // `kKernelsLayout` of who filled it in
  SimilarityReduce (*similarity_reduce)();
  ExpertRouting (*expert_routing)();
  Parallel (*parallel)();
  Parallel (*one_thread)();
  const CudaKernels* cuda;                // null in builds without them
  int64_t (*current_stream)(int device);  // of a GPU; with the interpreter's lock
};

// Two modules that were built from different sources would read each other's structures wrongly.
constexpr int64_t kKernelsLayout =
    sizeof(SimilarityProblem) + 1000 * sizeof(SimilaritySet) + 1000000 * sizeof(SimilarityBackward) +
    1000000000 * sizeof(SimilarityTotal) + 10000000000 * sizeof(Kernels) + 1000000000000 * sizeof(CudaKernels) +
    100000000000000 * sizeof(Parallel) +
    10000000000000000 * (sizeof(RouterProblem) + sizeof(RouterScores) + sizeof(RouterGradients) + sizeof(RouterSlots));

}  // namespace contrastive_ops
