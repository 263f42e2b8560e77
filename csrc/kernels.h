// What contrastive_ops._C hands to contrastive_ops._eager in a capsule: the kernels are linked once.
#pragma once

#include "similarity_reduce.h"

namespace contrastive_ops {

constexpr const char* kKernelsCapsule = "contrastive_ops._C.kernels";

struct Kernels {
  int64_t layout;  // `kKernelsLayout` of who filled it in
  SimilarityReduce (*similarity_reduce)();
  Parallel (*parallel)();
};

// Two modules that were built from different sources would read each other's structures wrongly.
constexpr int64_t kKernelsLayout = sizeof(SimilarityProblem) + 1000 * sizeof(SimilaritySet) +
                                   1000000 * sizeof(SimilarityBackward) + 1000000000 * sizeof(SimilarityTotal);

}  // namespace contrastive_ops
