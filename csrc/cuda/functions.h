// Every function of the CUDA kernels, once: for bindings.cpp, and for the driver that runs them on the host.
#pragma once

#include "expert_routing.h"
#include "similarity_topk.h"

namespace contrastive_ops {

// Calls use(name) for each function; Python finds it as _C.cuda_<name>.
#define CONTRASTIVE_OPS_CUDA_FUNCTIONS(use)                                                                            \
  use(expert_routing_combine) use(expert_routing_dispatch) use(expert_routing_dots) use(expert_routing_scores)         \
      use(expert_routing_scores_backward) use(expert_routing_slots) use(similarity_topk_at) use(similarity_topk_count) \
          use(similarity_topk_filter) use(similarity_topk_order) use(similarity_topk_select) use(similarity_topk_sum)  \
              use(similarity_topk_sum_rows)

}  // namespace contrastive_ops
