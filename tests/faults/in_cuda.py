"""Faults of the CUDA kernels, which tests execute on the host."""

from __future__ import annotations

from . import Fault

TOPK, REDUCE = "tests/test_cuda_similarity_topk.py", "tests/test_cuda_similarity_reduce.py"
ROUTING = "tests/test_cuda_expert_routing.py"

FAULTS = [
    # ---- Top k -------------------------------------------------------------------------------------------------------
    Fault(
        "no barrier between reading a list and moving its entries",
        "csrc/cuda/similarity_selection.h",
        "    __syncthreads();  // keys are moved to where others have just been read\n",
        "",
        (TOPK, "-k", "lengths_of_lists or long_lists or when"),
    ),
    Fault(
        "no barrier before the count of a list is read",
        "csrc/cuda/similarity_topk.cu",
        "    __syncthreads();  // the count is complete\n",
        "",
        (TOPK, "-k", "lengths_of_lists or long_lists or when"),
    ),
    Fault(
        "a list that is cut down when there is no room any more",
        "csrc/cuda/similarity_topk.cu",
        "if (memory.count > capacity - kLeg) threshold",
        "if (memory.count > capacity) threshold",
        (TOPK, "-k", "lengths_of_lists or long_lists or any_order"),
    ),
    Fault(
        "columns behind the strip that pass the filter",
        "csrc/cuda/similarity_topk.cu",
        "      if (at >= strip.end) break;\n",
        "",
        (TOPK, "-k", "shapes or several_lists"),
    ),
    Fault(
        "a threshold that equal scores pass",
        "csrc/cuda/similarity_topk.cu",
        "if (!(score > threshold) || strip.dropped_at",
        "if (!(score >= threshold) || strip.dropped_at",
        (TOPK, "-k", "floor_is_exclusive"),
    ),
    Fault(
        "a statistic of the warps that misses the last lanes",
        "csrc/cuda/similarity_topk.cu",
        "    own[higher] += logit > level[i];",
        "    own[higher] += logit >= level[i];",
        (TOPK, "-k", "statistics"),
    ),
    Fault(
        "an order in which the larger index of a tie comes first",
        "csrc/cuda/similarity_topk.cu",
        "return rank != other.rank ? rank < other.rank : index > other.index;",
        "return rank != other.rank ? rank < other.rank : index < other.index;",
        (TOPK, "-k", "lists_are_merged or lists_of_any"),
    ),
    Fault(
        "a digit of the k-th largest that forgets those above it",
        "csrc/cuda/similarity_selection.h",
        "    wanted -= memory.above;\n",
        "",
        (TOPK, "-k", "lengths_of_lists or long_lists"),
    ),
    # ---- Rules and folds ---------------------------------------------------------------------------------------------
    Fault(
        "a bound from above of columns that excludes its own value",
        "csrc/cuda/similarity_pairs.h",
        "return (by_row && number > by_row[i]) || (by_column && number > by_column[j]);",
        "return (by_row && number > by_row[i]) || (by_column && number >= by_column[j]);",
        (TOPK, "-k", "each_rule or include"),
    ),
    Fault(
        "a negated set whose biases keep their sign",
        "csrc/cuda/similarity_pairs.h",
        "return set.negate ? logit - bias : logit + bias;",
        "return logit + bias;",
        (REDUCE, "-k", "negated"),
    ),
    Fault(
        "a search in an ascending list that never finds its last entry",
        "csrc/cuda/similarity_pairs.h",
        "  while (begin < end) {\n",
        "  while (begin + 1 < end) {\n",
        (TOPK, "-k", "each_rule or name_the_best"),
    ),
    Fault(
        "a running logsumexp that does not shift its sum",
        "csrc/cuda/similarity_folds.h",
        "b = z > a ? fmaf(b, e, 1.0f) : b + e;",
        "b = z > a ? b + 1.0f : b + e;",
        (REDUCE, "-k", "tiles_of_more_rows and logsumexp"),
    ),
    Fault(
        "a tie of parts that goes to the later index",
        "csrc/cuda/similarity_folds.h",
        "return larger || (tie && j < i) ? y : x;",
        "return larger || (tie && j > i) ? y : x;",
        (REDUCE, "-k", "ties"),
    ),
    Fault(
        "a fold of columns without a barrier between its warps",
        "csrc/cuda/similarity_reduce.cu",
        """  __syncthreads();
  const int column = tile.across * kTileColumns + threadIdx.x;""",
        "  const int column = tile.across * kTileColumns + threadIdx.x;",
        (REDUCE, "-k", "every_fold or negated"),
    ),
    Fault(
        "sums of columns that begin before their memory is free",
        "csrc/cuda/similarity_sums.h",
        """    to[int64_t{tile.down} * chunk.cols + column] = sum;
  }
  __syncthreads();
""",
        """    to[int64_t{tile.down} * chunk.cols + column] = sum;
  }
""",
        (REDUCE, "-k", "negated or schedules"),
    ),
    Fault(
        "the diagonal of a matrix with itself that counts twice",
        "csrc/cuda/similarity_reduce.cu",
        "if (!inside || (chunk.itself && j < i + mirrored)) continue;",
        "if (!inside || (chunk.itself && j < i)) continue;",
        (REDUCE, "-k", "every_fold_under_each_rule and (differ or same)"),
    ),
    Fault(
        "an accumulator of a list in float32",
        "csrc/cuda/similarity_reduce.cu",
        "  double sum = 0.0;  // a list may be millions long",
        "  float sum = 0.0f;  // a list may be millions long",
        ("tests/test_cuda_sums.py", "-k", "lists"),
    ),
    Fault(
        "what rounding took is not given back where rows are packs",
        "csrc/cuda/similarity_gradients.cu",
        "values.at[q] += weight * to_float(mate.at[q]);",
        "values.at[q] += 0.0f * weight * to_float(mate.at[q]);",
        ("tests/test_cuda_sums.py", "-k", "given_back"),
    ),
    Fault(
        "a list that names a column twice and counts it once",
        "csrc/cuda/similarity_gradients.cu",
        "spread[(chunk.itself && j < owner ? plane : 0) + place] += d_linear[owner] * p.linear_weight[e];",
        "spread[(chunk.itself && j < owner ? plane : 0) + place] = d_linear[owner] * p.linear_weight[e];",
        (REDUCE, "-k", "twice"),
    ),
    # ---- Experts -----------------------------------------------------------------------------------------------------
    Fault(
        "an expert that takes one token beyond its capacity",
        "csrc/cuda/expert_routing_order.h",
        "const bool kept = rank < p.capacity;",
        "const bool kept = rank <= p.capacity;",
        (ROUTING, "-k", "slots_are_those or slots_of_several"),
    ),
    Fault(
        "an expert with many tokens that takes one beyond its capacity",
        "csrc/cuda/expert_routing_order.h",
        "const bool kept = key < prefix || (shares && rank < wanted);",
        "const bool kept = key < prefix || (shares && rank <= wanted);",
        (ROUTING, "-k", "slots_of_several"),
    ),
    Fault(
        "a bin that begins where the one before it is just enough",
        "csrc/cuda/expert_routing_order.h",
        "while (above + counts[d] < wanted) above += counts[d++];",
        "while (above + counts[d] <= wanted) above += counts[d++];",
        (ROUTING, "-k", "edge_of_a_bin"),
    ),
    Fault(
        "a digit that forgets those that come before it",
        "csrc/cuda/expert_routing_order.h",
        "    wanted -= bin.above;\n",
        "",
        (ROUTING, "-k", "slots_of_several"),
    ),
    Fault(
        "counts of earlier blocks that have their own in them",
        "csrc/cuda/expert_routing_slots.cu",
        "    before += other < slice ? of_other : 0;\n    total += of_other;",
        "    before += other <= slice ? of_other : 0;\n    total += of_other;",
        (ROUTING, "-k", "slots_of_several or slots_are_those"),
    ),
    Fault(
        "lanes that do not wait for each other's next place",
        "csrc/cuda/expert_routing_order.h",
        """  __syncwarp();
  if (expert >= 0 && peers.before == 0) *next += __popc(peers.all);""",
        "  if (expert >= 0 && peers.before == 0) *next += __popc(peers.all);",
        (ROUTING, "-k", "slots_are_those or slots_have"),
    ),
    Fault(
        "a ticket that begins with what the memory had",
        "csrc/cuda/expert_routing_scores.cu",
        "    out.state[c] = 0;\n",
        "    out.state[c] += 0;\n",
        (ROUTING, "-k", "something_else"),
    ),
    Fault(
        "losses of the block that comes before the last one",
        "csrc/cuda/expert_routing_totals.h",
        "*last = atomicAdd(ticket, 1) == static_cast<int32_t>(gridDim.x) - 1;",
        "*last = atomicAdd(ticket, 1) == static_cast<int32_t>(gridDim.x) - 2;",
        (ROUTING, "-k", "several_parts or whole_routers"),
    ),
    Fault(
        "sums of blocks that are folded before all warps have theirs",
        "csrc/cuda/expert_routing_totals.h",
        "  __syncthreads();\n  if (threadIdx.x >= kWarp) return 0;\n",
        "  if (threadIdx.x >= kWarp) return 0;\n",
        (ROUTING, "-k", "several_parts or whole_routers_have"),
    ),
    Fault(
        "a gradient of 16 bits whose last pack has no end",
        "csrc/cuda/expert_routing_scores_backward.cu",
        "is_aligned16(d_logits.data) && E % (d_logits.dtype == DType::float32 ? 4 : 8) == 0",
        "is_aligned16(d_logits.data) && E % 4 == 0",
        (ROUTING, "-k", "16_bits_are"),
    ),
    Fault(
        "a slope of the spread that goes up with the mean",
        "csrc/cuda/expert_routing_losses.h",
        "const double shift = spread.mean + (none ? 0 : spread.variance / spread.mean);",
        "const double shift = spread.mean - (none ? 0 : spread.variance / spread.mean);",
        (ROUTING, "-k", "losses_and_gradients"),
    ),
    Fault(
        "a NaN that comes back where a choice was dropped",
        "csrc/cuda/expert_routing.cu",
        "        if (taken.slot[j] < 0) continue;  // whatever its gate is\n",
        "",
        (ROUTING, "-k", "nan_does_not or no_place"),
    ),
]
