// All primitives of the CPU.
#pragma once

#include "expert_routing.h"
#include "grouped_matmul.h"
#include "maxsim.h"
#include "similarity_distill.h"
#include "similarity_prefix.h"
#include "similarity_reduce.h"
#include "similarity_topk.h"
#include "similarity_values.h"

namespace contrastive_ops {

// Calls use(Functions, stem) for each.
// clang-format off
#define CONTRASTIVE_OPS_PRIMITIVES(use)      \
  use(ExpertRouting, expert_routing)         \
  use(GroupedMatmul, grouped_matmul)         \
  use(MaxSim, maxsim)                        \
  use(SimilarityDistill, similarity_distill) \
  use(SimilarityPrefix, similarity_prefix)   \
  use(SimilarityReduce, similarity_reduce)   \
  use(SimilarityTopK, similarity_topk)       \
  use(SimilarityValues, similarity_values)
// clang-format on

}  // namespace contrastive_ops
