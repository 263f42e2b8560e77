"""Faults of the Triton kernels, which tests run in its interpreter."""

from __future__ import annotations

from . import Fault

TOPK, REDUCE = "tests/test_kernels_similarity_topk.py", "tests/test_kernels_similarity_reduce.py"
PERSISTENT = "tests/test_kernels_persistent.py"
ROUTING, GROUPED = "tests/test_kernels_expert_routing.py", "tests/test_kernels_grouped_matmul.py"

FAULTS = [
    Fault(
        "a bound from above of columns that excludes its own value",
        "kernels/_pairs.py",
        "drop |= dots > tl.load(data[rules.below_cols] + cols, mask=cols < M, other=0.0)",
        "drop |= dots >= tl.load(data[rules.below_cols] + cols, mask=cols < M, other=0.0)",
        (TOPK, "-k", "each_rule or include"),
    ),
    Fault(
        "a bias of columns that is read out of bounds",
        "kernels/_pairs.py",
        "col_bias = tl.load(data[rules.col_bias] + cols, mask=cols < M, other=0.0)",
        "col_bias = tl.load(data[rules.col_bias] + cols)",
        ("tests/test_kernels_guarded.py", "-k", "vectors"),
    ),
    Fault(
        "ids of -1 that equal each other",
        "kernels/_pairs.py",
        "return (own == other) & (own != -1)",
        "return own == other",
        (TOPK, "-k", "each_rule"),
    ),
    Fault(
        "a scale of columns that belongs to rows",
        "kernels/_pairs.py",
        "factor = tl.load(data[rules.scale] + cols, mask=cols < M, other=0.0)",
        "factor = tl.load(data[rules.scale] + rows, mask=rows < N, other=0.0)",
        (REDUCE, "-k", "sets_targets_and_lists"),
    ),
    Fault(
        "an offset of the diagonal in the other direction",
        "kernels/_pairs.py",
        "drop |= rows + offset == cols",
        "drop |= cols + offset == rows",
        (TOPK, "-k", "each_rule or name_the_best"),
    ),
    Fault(
        "a merge of maxima in which a later tie wins",
        "kernels/_folds.py",
        "takes = (d != 0) & ((b == 0) | larger | (tie & (d < b)))",
        "takes = (d != 0) & ((b == 0) | larger | tie)",
        (REDUCE, "-k", "ties"),
    ),
    Fault(
        "a carried sum that forgets what rounding took",
        "kernels/_folds.py",
        "        part = (carried[0], with_lost(carried[1], carried[2]))",
        "        part = (carried[0], carried[1])",
        ("tests/test_kernels_sums.py", "-k", "logsumexp"),
    ),
    Fault(
        "a part of columns that is written past their end",
        "kernels/_folds.py",
        "    tl.store(at + index, part[0], mask=index < size)",
        "    tl.store(at + index, part[0])",
        (REDUCE, "-k", "shapes_around or parts_of_folds"),
    ),
    Fault(
        "a slope by the value of another column",
        "kernels/_folds.py",
        "    own = cols if fold.cols else rows\n",
        "    own = rows if fold.cols else cols\n",
        (REDUCE, "-k", "every_fold"),
    ),
    Fault(
        "pairs of rows past the end that are folded",
        "kernels/_similarity_forward.py",
        "    outside = (i >= N) | (j >= M)\n",
        "    outside = (i > N) | (j >= M)\n",
        (REDUCE, "-k", "shapes_around"),
    ),
    Fault(
        "a pair that takes no part and has a gradient",
        "kernels/_similarity_backward.py",
        '    e = tl.where(z == float("-inf"), 0.0, e)\n',
        "",
        (REDUCE, "-k", "rules_are_anded or every_fold or no_pair"),
    ),
    Fault(
        "a norm of float16 weights that is not taken out again",
        "kernels/_similarity_backward.py",
        "            total *= 1.0 / tl.load(norm)",
        "            total *= 1.0",
        (REDUCE, "-k", "float16_weights"),
    ),
    Fault(
        "a floor that its own value passes",
        "kernels/_topk_sweep.py",
        "wanted = (logit > threshold[:, None]) & ~outside",
        "wanted = (logit >= threshold[:, None]) & ~outside",
        (TOPK, "-k", "floor"),
    ),
    Fault(
        "a list that is cut down one tile too late",
        "kernels/_topk_sweep.py",
        "if tl.max(count, 0) > capacity - BLOCK_N:",
        "if tl.max(count, 0) > capacity:",
        (TOPK, "-k", "lengths_of_lists or any_order"),
    ),
    Fault(
        "entries of equal rank that all stay",
        "kernels/_selection.py",
        "stays = (tl.cumsum(tie, 1) <= ties_left[:, None]) & (tie != 0)",
        "stays = tie != 0",
        (TOPK, "-k", "lengths_of_lists or any_order"),
    ),
    Fault(
        "an expert that takes one token beyond its capacity",
        "kernels/_router_slots.py",
        "kept = kept & (slot < capacity)",
        "kept = kept & (slot <= capacity)",
        (ROUTING, "-k", "slots_are_those"),
    ),
    Fault(
        "rows behind the last group that have its matrix",
        "kernels/grouped_matmul.py",
        "    if (stretch > 0) & (stretch <= E) & (tl.min(row, 0) < end):",
        "    if (stretch > 0) & (tl.min(row, 0) < end):",
        (GROUPED, "-k", "rows_of_no_group"),
    ),
    Fault(
        "a depth whose tail reads the next row",
        "kernels/grouped_matmul.py",
        "            inside = done + k < D\n            left = tl.load(a_at,",
        "            inside = k < D\n            left = tl.load(a_at,",
        (GROUPED, "-k", "forward or values or integers"),
    ),
    Fault(
        "equal products of which a later token wins",
        "kernels/maxsim.py",
        "    at = tl.min(tl.where(wins, place, _NONE), 1)\n",
        "    at = tl.max(tl.where(wins, place, -1), 1)\n",
        ("tests/test_kernels_maxsim.py", "-k", "winners or numbers"),
    ),
    Fault(
        "tiles of a last, smaller group that are taken for those of a whole one",
        "kernels/_persistent_tiles.py",
        "    return first + within % height, within // height\n",
        "    return first + within % height, within // GROUP\n",
        (PERSISTENT, "-k", "shapes_around"),
    ),
    Fault(
        "logits that lie too far apart and share a reference",
        "kernels/_persistent_fold.py",
        "        far = 1 - (largest - smallest <= REACH).to(tl.int32)",
        "        far = 0 * (largest - smallest <= REACH).to(tl.int32)",
        (PERSISTENT, "-k", "far_apart"),
    ),
    Fault(
        "a reference of its own for a small sum that is not in logits",
        "kernels/_persistent_fold.py",
        "    return reference + power.to(tl.float32) * LN_2, total * inverse\n",
        "    return reference + power.to(tl.float32), total * inverse\n",
        (PERSISTENT, "-k", "far_below"),
    ),
    Fault(
        "sums of rows of which each tile writes over those before",
        "kernels/_persistent_weigh.py",
        "            at = part_at(row_partials, FOUND + col_tile, row_sums, count, M, across, 0, k, False)\n",
        "            at = part_at(row_partials, FOUND, row_sums, count, M, across, 0, k, False)\n",
        (PERSISTENT, "-k", "softplus_is_one_sweep"),
    ),
    Fault(
        "a target's slope without what its own loss adds",
        "kernels/_persistent_weigh.py",
        "                e = tl.where(own, by_target - of_target, e)\n",
        "                e = tl.where(own, by_target, e)\n",
        (PERSISTENT, "-k", "softplus_is_one_sweep"),
    ),
    Fault(
        "a gradient of columns that forgets the bands before",
        "kernels/similarity_reduce_persistent.py",
        "products.set_or_add(dy, weights[:, :M].T, p.x[rows], add=rows.start > 0)",
        "products.set_or_add(dy, weights[:, :M].T, p.x[rows], add=False)",
        (PERSISTENT, "-k", "shapes_around or losses"),
    ),
]
