"""Faults of the kernels for Hopper GPUs, which tests execute on the host with twins of the instructions."""

from __future__ import annotations

from dataclasses import replace

from . import Fault

SWEEP, RULES = "csrc/cuda/hopper/sweep.h", "csrc/cuda/hopper/rules.h"
FOLD, WEIGH = "csrc/cuda/hopper/fold.cu", "csrc/cuda/hopper/weigh.cu"
TOPK, TOPK_LAUNCHERS = "csrc/cuda/hopper/topk.cu", "contrastive_ops/cuda/hopper_topk.py"
KEEP, OF_KEPT, WEIGHTS = (f"csrc/cuda/hopper/{name}" for name in ("keep.h", "kept.cu", "weights.h"))
TESTS = "tests/test_hopper_similarity.py"
SHAPES = (TESTS, "-k", "logsumexp_of_rows_and_columns and 257-385")
EDGES = (TESTS, "-k", "logsumexp_of_rows_and_columns and (130-3 or 257-385)")
GRADIENTS = (TESTS, "-k", "gradients_of_rows_and_columns and 600-261")
DIRECTION = (TESTS, "-k", "gradients_of_one_direction and dim0")
UNDER_RULES = (TESTS, "-k", "test_rules or gradients_under_rules")
SCALES = (TESTS, "-k", "scales_and_biases or gradients_of_one_direction")
APART = (TESTS, "-k", "far_apart or not_finite or every_kind")
LOSSES = (TESTS, "-k", "test_losses or weights_cancel")
BANDS = (TESTS, "-k", "bands_of_rows")
ITSELF = (TESTS, "-k", "tiles_above_the_diagonal and 257-shuffled")
ITS_TARGETS = (TESTS, "-k", "targets_of_a_matrix_with_itself")
ITS_RULES = (TESTS, "-k", "rules_of_a_matrix_with_itself or directions_of_a_matrix")
ITS_BANDS = (TESTS, "-k", "bands_of_a_matrix_with_itself")
KEPT = (TESTS, "-k", "from_kept_logits and (97 or 300) and shuffled")
KEPT_RANGES = (TESTS, "-k", "too_far_apart_are_not_kept or not_finite_are_not_kept")
KEPT_BANDS = (TESTS, "-k", "kept_logits_of_some_rows")
PLACES = ("tests/test_hopper_primitives.py", "-k", "tiles_that_a_sweep_goes_through")
TOPK_TESTS = "tests/test_hopper_topk.py"
THRESHOLDS = (TOPK_TESTS, "-k", "threshold_is_a_score or fewer_than_k_groups or floor_is_exclusive")
LISTS = (TOPK_TESTS, "-k", "many_ties or no_room or bands_of_rows")
SCORES = (TOPK_TESTS, "-k", "scales_and_biases or drop_the_best or nan_never")


def _stems(tests: tuple[str, ...]) -> tuple[str, ...]:
    """The kernels that tests run."""
    if tests in (SHAPES, EDGES, APART, PLACES):
        return ("fold",)
    if tests[0] == TOPK_TESTS:
        return ("topk",)
    return ("fold", "weigh", "kept") if tests in (KEPT, KEPT_RANGES, KEPT_BANDS) else ("fold", "weigh")


_FAULTS = [
    # ---- Waits, phases and barriers ----------------------------------------------------------------------------------
    Fault(
        "tiles that are brought before their stage is free",
        SWEEP,
        "      barrier_wait(&s.empty[turn.stage], turn.parity ^ 1);\n",
        "",
        SHAPES,
    ),
    Fault(
        "products that do not wait for their tiles",
        SWEEP,
        "        barrier_wait(&s.full[turn.stage], turn.parity);\n",
        "",
        SHAPES,
    ),
    Fault("a stage whose parity stays", SWEEP, "stage = 0, parity ^= 1;", "stage = 0;", SHAPES),
    Fault(
        "the other group's steps that do not turn the parity",
        SWEEP,
        "parity(before / kStages % 2)",
        "parity(0)",
        SHAPES,
    ),
    Fault(
        "a stage that is free while it is multiplied",
        SWEEP,
        "        mma_wait<1>();\n        release(last);",
        "        release(last);\n        mma_wait<1>();",
        SHAPES,
    ),
    Fault("a stage that is released before its products", SWEEP, "mma_wait<1>();", "mma_wait<2>();", SHAPES),
    Fault("sums that are read before the last products", SWEEP, "mma_wait<0>();", "mma_wait<1>();", SHAPES),
    Fault(
        "a stage that is free for the own block only",
        SWEEP,
        "barrier_arrive_at(&s.empty[stage], thread % kWarp);",
        "barrier_arrive_at(&s.empty[stage], rank);",
        SHAPES,
    ),
    Fault(
        "a stage that waits for one block",
        SWEEP,
        "barrier_init(&empty[stage], kCluster * kGroup / kWarp);",
        "barrier_init(&empty[stage], kGroup / kWarp);",
        SHAPES,
    ),
    Fault("a last stage that is not released", SWEEP, "      release(turn.stage);\n", "", SHAPES),
    Fault("barriers that other blocks do not know", SWEEP, "    fence_barrier_init();\n", "", SHAPES),
    Fault("no turns", SWEEP, "      named_sync(kTurns + group, 2 * kGroup);\n", "", SHAPES),
    Fault(
        "turns that nobody begins",
        SWEEP,
        "    if (group == 1) named_arrive(kTurns, 2 * kGroup);  // the first group begins\n",
        "",
        SHAPES,
    ),
    Fault("registers that nobody leaves", SWEEP, "    give_registers<kFewRegisters>();\n", "", SHAPES),
    Fault("products without a fence", SWEEP, "        mma_fence();\n", "", SHAPES),
    Fault(
        "a block that leaves before the other has written to it",
        SWEEP,
        "  cluster_sync();  // nobody leaves while another block may write to it\n",
        "  if (group >= 0) cluster_sync();\n",
        SHAPES,
    ),
    Fault(
        "fewer bytes than a stage has", SWEEP, "kBytes = (kRows + kCols) *", "kBytes = (kRows + kCols / 2) *", SHAPES
    ),
    # ---- Which tiles, and which numbers ------------------------------------------------------------------------------
    Fault(
        "half of the columns that go to the other half's place",
        SWEEP,
        "load_tile_to(y, s.y[turn.stage] + rank * kShare * kDepth,",
        "load_tile_to(y, s.y[turn.stage] + (1 - rank) * kShare * kDepth,",
        SHAPES,
    ),
    Fault(
        "a row tile that both blocks take",
        SWEEP,
        "row_tile = (first + at % height) * kCluster + rank,",
        "row_tile = (first + at % height) * kCluster,",
        SHAPES,
    ),
    Fault(
        "a last band of tiles as high as the others", SWEEP, "min(kRaster, plan.row_pairs - first)", "kRaster", EDGES
    ),
    Fault("sums that keep those of the tile before", SWEEP, "!first.value || k > 0", "first.value || k >= 0", SHAPES),
    Fault(
        "rows of the second half in the place of the first",
        SWEEP,
        "row + r / 2 * 64 + r % 2 * 8",
        "row + r / 2 * 8 + r % 2 * 64",
        SHAPES,
    ),
    Fault(
        "columns in groups of four",
        SWEEP,
        "return col + c / 2 * 8 + c % 2;",
        "return col + c / 2 * 4 + c % 2;",
        UNDER_RULES,
    ),
    Fault(
        "an exchange that gives lanes the other half",
        SWEEP,
        "const bool upper = (lane & step) != 0;",
        "const bool upper = (lane & step) == 0;",
        SHAPES,
    ),
    # ---- Rules -------------------------------------------------------------------------------------------------------
    Fault(
        "columns behind the last that take part",
        RULES,
        "~uint64_t{0} << inside;",
        "~uint64_t{0} << inside << 1;",
        EDGES,
    ),
    Fault(
        "rows behind the last that take part",
        RULES,
        "rows[r] = real ? beyond : ~uint64_t{0};",
        "rows[r] = beyond;",
        EDGES,
    ),
    Fault(
        "a target that folds see", RULES, "      if (wanted[r] >= 0) rows[r] |= uint64_t{1} << wanted[r];\n", "", SHAPES
    ),
    Fault(
        "a diagonal of the rows of a band",
        RULES,
        "own.find(i + p.diagonal)",
        "own.find(row + p.diagonal - 1)",
        UNDER_RULES,
    ),
    Fault("ids of -1 that are equal", RULES, "differ[r] == other && other != -1", "differ[r] == other", UNDER_RULES),
    Fault("no id that is like another", RULES, "(same[r] != alike || alike == -1)", "same[r] != alike", UNDER_RULES),
    Fault(
        "a bound that equal numbers exceed",
        RULES,
        "dot > most[r] || dot > high",
        "dot >= most[r] || dot < high",
        UNDER_RULES,
    ),
    Fault(
        "a bound of rows that nobody keeps",
        RULES,
        "if (dot < least[r] || dot < low",
        "if ((dot < least[r] && dot < low) || dot < low",
        UNDER_RULES,
    ),
    Fault(
        "a scale of rows that begins with the first of all",
        RULES,
        "scale[scale_of_rows ? first_row + min(row, rows - 1) : 0]",
        "scale[scale_of_rows ? min(row, rows - 1) : 0]",
        BANDS,
    ),
    Fault(
        "a bias whose sign stays",
        RULES,
        "sign * row_bias[first_row + min(row, rows - 1)]",
        "row_bias[first_row + min(row, rows - 1)]",
        SCALES,
    ),
    # ---- Folds -------------------------------------------------------------------------------------------------------
    Fault(
        "logits that lie too far below the largest",
        FOLD,
        "return top - low <= kReach ? top : kInfinity;",
        "return top;",
        APART,
    ),
    Fault(
        "a reference that is not that of the warp",
        FOLD,
        "const float top = reference * kLn2;",
        "const float top = reference;",
        SHAPES,
    ),
    Fault(
        "columns that are joined before all warps are there",
        FOLD,
        "    named_sync(kGroups + group, kGroup);\n",
        "",
        SHAPES,
    ),
    Fault(
        "columns of three warps",
        FOLD,
        "warp < kGroupWarps; ++warp) part",
        "warp < kGroupWarps - 1; ++warp) part",
        SHAPES,
    ),
    Fault(
        "a winner that counts from the first row of its tile",
        FOLD,
        "running.add(logit(true, r, c), p.first_row + own.row_of(r));",
        "running.add(logit(true, r, c), own.row_of(r) % kRows);",
        APART,
    ),
    # ---- Weights -----------------------------------------------------------------------------------------------------
    Fault(
        "weights over those that have not been read",
        WEIGH,
        "    if (thread == 0) store_wait_read();  // of the weights of the tile before\n",
        "",
        GRADIENTS,
    ),
    Fault("weights that are not fenced", WEIGH, "    fence_async();\n", "", GRADIENTS),
    Fault(
        "weights that leave before all are written",
        WEIGH,
        "    fence_async();\n    named_sync(kGroups + group, kGroup);\n",
        "    fence_async();\n",
        GRADIENTS,
    ),
    Fault("stores that nobody waits for", WEIGH, "    if (threadIdx.x % kGroup == 0) store_wait();\n", "", GRADIENTS),
    Fault("stores that are not committed", WEIGH, "      store_commit();\n", "", GRADIENTS),
    Fault(
        "constants of columns that others still write",
        WEIGH,
        "    named_sync(kGroups + group, kGroup);\n    weigh(",
        "    weigh(",
        GRADIENTS,
    ),
    Fault(
        "weights without a swizzle",
        WEIGH,
        "chunk = (n % 8 + lane / 16) ^ (row % 8);",
        "chunk = n % 8 + lane / 16;",
        GRADIENTS,
    ),
    Fault(
        "panels in one place",
        WEIGH,
        "T* panel = shared.weights[group][n / 8];",
        "T* panel = shared.weights[group][0];",
        GRADIENTS,
    ),
    Fault(
        "two weights in the other order",
        WEIGH,
        "rounded_pair<T>(weights[0], weights[1])",
        "rounded_pair<T>(weights[1], weights[0])",
        GRADIENTS,
    ),
    Fault(
        "blocks in the other order",
        WEIGH,
        "word(0, n), word(1, n), word(0, n + 1)",
        "word(1, n), word(0, n), word(0, n + 1)",
        GRADIENTS,
    ),
    Fault(
        "pairs that are dropped and weighed",
        WEIGH,
        "          if (drops.any && drops.has(r, c)) z = -kInfinity;\n",
        "",
        UNDER_RULES,
    ),
    Fault(
        "targets without what arrives at them",
        WEIGH,
        "            if (drops.any && c == drops.direct.wanted[r]) e = rows.target[r];\n",
        "",
        GRADIENTS,
    ),
    Fault(
        "residuals of columns in the other order",
        WEIGH,
        "to[0] = residuals[0], to[1] = residuals[1];",
        "to[0] = residuals[1], to[1] = residuals[0];",
        LOSSES,
    ),
    Fault("residuals that are left out", WEIGH, "        rows.residual[r] += rest[0] + rest[1];\n", "", LOSSES),
    Fault(
        "a scale whose sign stays",
        WEIGH,
        "write(task.scale, rows.scale[r], p.sign)",
        "write(task.scale, rows.scale[r], 1.0f)",
        SCALES,
    ),
    Fault(
        "a sigmoid of the other side",
        WEIGH,
        "(z < 0.0f ? power * inverse : inverse)",
        "(z < 0.0f ? inverse : power * inverse)",
        LOSSES,
    ),
    Fault(
        "weights without the lengths of columns",
        WEIGH,
        "rows.unit[r] * shared.unit[group][at + q]",
        "rows.unit[r]",
        LOSSES,
    ),
    Fault(
        "a loss of targets that is not weighed",
        WEIGH,
        "rows.target[r] -= rows.gain[r] * sigmoid(-z);",
        "rows.target[r] -= sigmoid(-z);",
        LOSSES,
    ),
    # ---- A matrix that is compared with itself -----------------------------------------------------------------------
    Fault(
        "tiles from the one behind the diagonal on",
        SWEEP,
        "(diagonal + pair * kCluster * kRows) / tile_cols;",
        "(diagonal + pair * kCluster * kRows) / tile_cols + (pair > 0);",
        ITSELF,
    ),
    Fault(
        "tiles below the diagonal that are multiplied",
        SWEEP,
        "(diagonal + pair * kCluster * kRows) / tile_cols;",
        "(diagonal + 0 * pair) / tile_cols;",
        PLACES,
    ),
    Fault(
        "columns without the last tiles of rows",
        SWEEP,
        "pairs = (rows + kCluster * kRows - 1) / (kCluster * kRows);",
        "pairs = rows / (kCluster * kRows);",
        ITSELF,
    ),
    Fault("a diagonal that both halves have", RULES, "other.behind = 1,", "other.behind = 0,", ITS_RULES),
    Fault(
        "pairs below the diagonal that take part",
        RULES,
        "      rows[r] |= (uint64_t{1} << before) - 1;\n",
        "",
        ITSELF,
    ),
    Fault(
        "targets below the diagonal that are found twice",
        RULES,
        "      if (wanted[r] < before) wanted[r] = -1;\n",
        "",
        ITS_TARGETS,
    ),
    Fault(
        "targets of the mirrored half that are pairs",
        RULES,
        ", mirrored[r] |= uint64_t{found} << c;",
        ";",
        ITS_TARGETS,
    ),
    Fault("a diagonal that is not mirrored", RULES, "other.diagonal = -pairs.diagonal;", "(void)pairs;", ITS_RULES),
    Fault(
        "ids of rows and columns that are not mirrored",
        RULES,
        "std::swap(other.differ_rows, other.differ_cols), ",
        "",
        ITS_RULES,
    ),
    Fault("bounds that are not mirrored", RULES, "  std::swap(other.below_rows, other.below_cols), ", "  ", ITS_RULES),
    Fault(
        "a fold of columns that has the rows' pairs",
        FOLD,
        "left_out(group)[task.of_cols][r] = drops.direct.rows[r];\n        left_out(group)[!task.of_cols][r]",
        "left_out(group)[0][r] = drops.direct.rows[r];\n        left_out(group)[1][r]",
        ITS_RULES,
    ),
    Fault(
        "what is left out of one of two that both leave out",
        FOLD,
        "const bool differ = itself && drops.differ;",
        "const bool differ = false;",
        ITS_TARGETS,
    ),
    Fault(
        "mirrored targets without a logit",
        FOLD,
        "      if (!both.has_targets) return;\n",
        "      return;\n",
        ITS_TARGETS,
    ),
    Fault(
        "weights of columns for the pairs of rows",
        WEIGH,
        "(first != task.of_cols ? drops.direct.has(r, c)",
        "(first ? drops.direct.has(r, c)",
        ITS_RULES,
    ),
    Fault(
        "mirrored targets without what arrives at them",
        WEIGH,
        "task.d_target == nullptr ? 0.0f : task.d_target[col];",
        "task.d_target == nullptr ? 0.0f : 0.0f * task.d_target[col];",
        ITS_TARGETS,
    ),
    Fault(
        "weights of a band that begin with the first column",
        WEIGH,
        "panel * kDepth - task.first_col;",
        "panel * kDepth;",
        ITS_BANDS,
    ),
    Fault(
        "residuals of rows alone",
        WEIGHTS,
        "      if (itself && what == SumOf::residual) task.col_residuals = take(true, totals + sum[3], 1);\n",
        "      (void)itself;\n",
        (TESTS, "-k", "given_back"),
    ),
    # ---- Lists of the best columns -----------------------------------------------------------------------------------
    Fault(
        "a threshold that is one too high",
        TOPK,
        "groups}, k, memory);",
        "groups}, k - (k > 1), memory);",
        (TOPK_TESTS, "-k", "threshold_is_a_score or lengths_of_lists"),
    ),
    Fault(
        "a group of the best that has no part in the threshold",
        TOPK,
        "group < groups; group += ",
        "group < groups - 1; group += ",
        THRESHOLDS,
    ),
    Fault(
        "rules that apply after a maximum has counted",
        TOPK,
        "    make_logits(p, own, drops, 1.0f, sums);\n    float best[4];\n",
        """    float best[4];
    for (int r = 0; r < 4; ++r) best[r] = kNoLogit;
    for (int k = 0; k < 4 * kColumns; ++k) {
      best[k % 4] = fmaxf(best[k % 4], own.number(sums, k % 4, k / 4) * p.factor(own.row_of(k % 4)));
    }
    if (task.maxima != nullptr) return write_maxima(tile, own, best);
    make_logits(p, own, drops, 1.0f, sums);
""",
        SCORES,
    ),
    Fault(
        "the maximum of one thread for a row of four",
        TOPK,
        "      if (task.of_tile == 1) largest = fold_row_lanes(",
        "      if (task.of_tile == 4) largest = fold_row_lanes(",
        THRESHOLDS,
    ),
    Fault(
        "maxima of all tiles in the place of the first",
        TOPK,
        "tile.col_tile * task.of_tile + lane] = largest;",
        "tile.col_tile * 0 + lane] = largest;",
        THRESHOLDS,
    ),
    Fault(
        "maxima of rows behind the last",
        TOPK,
        "if (row >= p.rows || lane >= task.of_tile) continue;",
        "if (lane >= task.of_tile) continue;",
        THRESHOLDS,
    ),
    Fault(
        "the threshold of the next row",
        TOPK,
        "kNoLogit : task.thresholds[row];",
        "kNoLogit : task.thresholds[(row + 1) % p.rows];",
        THRESHOLDS,
    ),
    Fault(
        "a floor that begins with the first row of a band",
        TOPK,
        "task.floor[p.first_row + row]",
        "task.floor[row]",
        LISTS,
    ),
    Fault(
        "a score that must exceed the threshold",
        TOPK,
        "return score >= least && score > floor;",
        "return score > least && score > floor;",
        THRESHOLDS,
    ),
    Fault(
        "a floor that a score may equal",
        TOPK,
        "return score >= least && score > floor;",
        "return score >= least && score >= floor;",
        THRESHOLDS,
    ),
    Fault(
        "a last column of a thread that is not listed",
        TOPK,
        "c < kColumns; ++c) passing",
        "c < kColumns - 1; ++c) passing",
        THRESHOLDS,
    ),
    Fault(
        "columns that count from their tile",
        TOPK,
        "key_of(score, own.col_of(column));",
        "key_of(score, own.col_of(column) % kCols);",
        THRESHOLDS,
    ),
    Fault(
        "ties in another order",
        TOPK,
        "key_of(score, own.col_of(column));",
        "key_of(score, own.col_of(column ^ 1));",
        LISTS,
    ),
    Fault(
        "the score of another column",
        TOPK,
        "score = c == column ?",
        "score = c == column - column % 2 ?",
        THRESHOLDS,
    ),
    Fault("a list that is longer than its room", TOPK, "        if (place >= task.capacity) continue;\n", "", LISTS),
    Fault(
        "lists without room whose rows are not searched again",
        TOPK_LAUNCHERS,
        "return lengths > cut.capacity",
        "return lengths < 0",
        LISTS,
    ),
    Fault(
        "rows that are searched again without what belongs to them",
        TOPK_LAUNCHERS,
        "some = take_rows(rows, shape,",
        "some = take_rows(rows * 0, shape,",
        LISTS,
    ),
    Fault(
        "a tail of columns that has no pairs",
        TOPK,
        "  const Plan plan(rows, M, D, kCols);\n  const int64_t of_tile",
        "  const Plan plan(rows, M - M % kCols + (M < kCols ? kCols : 0), D, kCols);\n  const int64_t of_tile",
        SCORES,
    ),
    Fault(
        "a sweep that does not wait for the tiles of its turn",
        SWEEP,
        "        barrier_wait(&s.full[turn.stage], turn.parity);\n        mma_fence();",
        "        mma_fence();",
        (TOPK_TESTS, "-k", "test_shapes and 257-577"),
    ),
    # ---- Kept logits -------------------------------------------------------------------------------------------------
    Fault(
        "logits that are kept however far apart", KEEP, "if (!fits) atomicMax(", "if (false) atomicMax(", KEPT_RANGES
    ),
    Fault("two logits in the other order", KEEP, "words[1] << 16 | words[0];", "words[0] << 16 | words[1];", KEPT),
    Fault(
        "weights that both kernels make",
        WEIGHTS,
        "any != runs_if_wide;",
        "any != runs_if_wide && any == runs_if_wide;",
        KEPT,
    ),
    Fault("logits below those of the first warp", OF_KEPT, "* kGroupWarps + warp];", "* kGroupWarps];", KEPT),
    Fault(
        "rows of a warp one after another",
        OF_KEPT,
        "of_warp / 16 * 64 + warp * 16 + of_warp % 16;",
        "warp * 32 + of_warp;",
        KEPT,
    ),
    Fault(
        "targets whose logit was left out",
        OF_KEPT,
        "z = own.target_logit, e = own.of_target;",
        "e = own.of_target;",
        KEPT,
    ),
    Fault(
        "bands that begin with what is kept of the first row",
        "contrastive_ops/cuda/hopper.py",
        "self.heads[heads:]",
        "self.heads[0 * heads :]",
        KEPT_BANDS,
    ),
]

FAULTS = [replace(fault, stems=_stems(fault.tests)) for fault in _FAULTS]
