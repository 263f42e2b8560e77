// Every function of the CUDA kernels, once: for the bindings, and for the driver that runs them on the host.
#pragma once

#include "expert_routing.h"
#include "hopper/fold.h"
#include "hopper/kept.h"
#include "hopper/topk.h"
#include "hopper/weigh.h"
#include "similarity_loss.h"
#include "similarity_reduce.h"
#include "similarity_topk.h"

namespace contrastive_ops {

// Calls use(name) for each function; Python finds it as _C.cuda_<name>.
// clang-format off
#define CONTRASTIVE_OPS_CUDA_FUNCTIONS(use) \
  use(expert_routing_combine)               \
  use(expert_routing_dispatch)              \
  use(expert_routing_dots)                  \
  use(expert_routing_scores)                \
  use(expert_routing_scores_backward)       \
  use(expert_routing_slots)                 \
  use(hopper_fold)                          \
  use(hopper_topk)                          \
  use(hopper_weigh)                         \
  use(hopper_weigh_kept)                    \
  use(similarity_loss_finish)               \
  use(similarity_loss_multiply)             \
  use(similarity_loss_prepare)              \
  use(similarity_loss_rows)                 \
  use(similarity_reduce_finish)             \
  use(similarity_reduce_fold)               \
  use(similarity_reduce_give_back)          \
  use(similarity_reduce_named)              \
  use(similarity_reduce_partners)           \
  use(similarity_reduce_spread)             \
  use(similarity_reduce_weigh)              \
  use(similarity_topk_at)                   \
  use(similarity_topk_count)                \
  use(similarity_topk_filter)               \
  use(similarity_topk_order)                \
  use(similarity_topk_select)               \
  use(similarity_topk_sum)                  \
  use(similarity_topk_sum_rows)
// clang-format on

}  // namespace contrastive_ops
