"""expert_routing in Triton: launchers with the names and arguments of reference/expert_routing.py.

What the kernels do is in the files _router_*.py. Numbers of programs depend on the
problem alone, every number has one writer, and sums are made in a fixed order: all results have the same bits in every
run. E up to 4,096 keeps a token's logits in registers; more work too, slower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from contrastive_ops.core import triton_kernels
from contrastive_ops.core.routing import ScoreSpec, SlotSpec

from . import _router_gradients, _router_rows, _router_scores, _router_slots
from ._cover import Combine, pairwise_cover
from ._launch import arch_of, launch, recording
from ._variants import Variant

# Numbers of a tile. Interpreted, tiles are small, so that small inputs have several.
ELEMENTS = 128 if triton_kernels.interprets() else 1024
# Most programs that sums are made in, and the size of their tables from which on there are fewer.
PARTS, TABLE = (3, 1 << 22) if triton_kernels.interprets() else (512, 1 << 22)
# Blocks of tokens that a program adds up in float32, and then in float64.
SETTLED = 32
# Items of a counting sort that are ranked together.
BLOCK, STEP = (32, 16) if triton_kernels.interprets() else (256, 16)
PLAIN = {"num_warps": 4, "num_stages": 1}


def _flag(mask: Tensor | None) -> Tensor | None:
    """A mask as bytes."""
    return None if mask is None else mask.view(torch.uint8)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _with_dense_rows(x: Tensor) -> Tensor:
    """The same matrix with the numbers of a row next to each other; rows may lie anywhere."""
    return x if x.stride(1) == 1 else x.contiguous()


# ---- Scores --------------------------------------------------------------------------------------------------------


def _score_tile(logits: Tensor, s: ScoreSpec, *, backward: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time sizes of a block of tokens, and its warps."""
    padded = max(2, triton.next_power_of_2(logits.shape[1]))
    tokens = min(max(ELEMENTS // padded, 1), 128)
    # By how many numbers a thread has registers for.
    warps = 8 if s.load or padded > (1024 if backward else 512) else 4  # the load loss holds one more table
    if arch_of(logits) == "gfx942":  # and there its masks must fit scalar registers
        warps = 8 if padded <= 512 else 16
    return {"E_PAD": padded, "BLOCK_T": tokens}, {"num_warps": warps, "num_stages": 1}


def _score_rules(s: ScoreSpec) -> dict[str, Any]:
    """Compile-time switches that forward and backward share."""
    return {"K": s.k, "SCORE": s.score, "RENORMALIZE": bool(s.renormalize), "LOAD": bool(s.load)}


def _choice_rules(s: ScoreSpec, experts: int) -> dict[str, Any]:
    """Those of the choice."""
    return {
        "MEMBERS": experts // s.expert_groups,
        "GROUPS": s.expert_groups,
        "KEPT": s.kept_groups,
        "GROUP_SCORE": s.group_score,
        "ONE_EXPERT": experts == 1,
        "K_PAD": triton.next_power_of_2(s.k),
        "G_PAD": triton.next_power_of_2(s.expert_groups),
    }


def _mask_strides(allowed: Tensor | None) -> tuple[int, int]:
    return (0, 0) if allowed is None else (allowed.stride(0), allowed.stride(1))


def scores(
    logits: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    given: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    spec: Sequence[int],
    sigma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    s = ScoreSpec(*spec)
    logits = _with_dense_rows(logits)
    tokens, experts = logits.shape
    (tile, options), cells = _score_tile(logits, s), s.segments * experts
    blocks = triton.cdiv(tokens, tile["BLOCK_T"])
    steps = triton.cdiv(blocks, max(min(PARTS, TABLE // cells), min(PARTS, 64)))
    parts = triton.cdiv(blocks, max(steps, 1))

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    chosen, gates, priority = integers(tokens, s.k), numbers(tokens, s.k), numbers(tokens)
    sums, totals, margin = numbers(3, s.segments, experts), numbers(2, s.segments), numbers(s.segments)
    choices, routed = integers(s.segments, experts), integers(s.segments)
    part_sums = torch.empty((parts, 3 * (cells + s.segments)), dtype=torch.float64, device=logits.device)
    part_counts = integers(parts, cells + s.segments, dtype=torch.int32)
    # Without fused operations noisy logits are those of every other backend, and so are the choices.
    launch(
        _router_scores.scores_kernel, parts,
        logits, _dense(noise), _dense(bias), _flag(allowed), _dense(given), _dense(segment), _flag(_dense(valid)),
        chosen, gates, priority, part_sums, part_counts, tokens, experts, s.segments, steps, sigma, logits.stride(0),
        *_mask_strides(allowed), options={**options, "enable_fp_fusion": False}, **_score_rules(s),
        **_choice_rules(s, experts), **tile, SETTLED=SETTLED,
    )  # fmt: skip
    launch(
        _router_scores.totals_kernel, 2 * triton.cdiv(3 * (cells + s.segments), 32),
        part_sums, part_counts, sums, totals, margin, choices, routed, parts, s.segments, experts,
        options=PLAIN, NOISE=noise is not None, LOAD=bool(s.load), BLOCK_P=128, BLOCK_C=32,
    )  # fmt: skip
    return chosen, gates, priority, sums, totals, choices, routed, margin


def scores_backward(
    logits: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    spec: Sequence[int],
    sigma: float,
    experts: Tensor,
    d_gates: Tensor,
    d_sums: Tensor,
    d_totals: Tensor,
) -> Tensor:
    s = ScoreSpec(*spec)
    logits = _with_dense_rows(logits)
    tokens, count = logits.shape
    tile, options = _score_tile(logits, s, backward=True)
    dlogits = torch.empty((tokens, count), dtype=torch.float32, device=logits.device)
    launch(
        _router_gradients.scores_backward_kernel, triton.cdiv(tokens, tile["BLOCK_T"]),
        logits, _dense(noise), _flag(allowed), _dense(segment), _flag(_dense(valid)), experts.contiguous(),
        d_gates.contiguous(), d_sums.contiguous(), d_totals.contiguous(), dlogits, tokens, count, s.segments, sigma,
        logits.stride(0), *_mask_strides(allowed), options=options, **_score_rules(s), **tile,
    )  # fmt: skip
    return dlogits


# ---- Slots ---------------------------------------------------------------------------------------------------------


def slots(
    experts: Tensor, priority: Tensor | None, segment: Tensor | None, spec: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = SlotSpec(*spec)
    tokens, k = experts.shape
    groups, device = s.groups(tokens), experts.device
    order = torch.full((s.rows(tokens, k),), -1, dtype=torch.int64, device=device)
    places = torch.empty_like(experts, memory_format=torch.contiguous_format)
    offsets = torch.empty(s.experts + 1, dtype=torch.int64, device=device)
    kept = torch.empty((s.segments, s.experts), dtype=torch.int64, device=device)
    experts = experts.contiguous()
    if s.capacity >= 0:
        turn = None
        if priority is not None and tokens:
            first = priority.masked_fill(priority.isnan(), -torch.inf).view(groups, -1)
            turn = first.argsort(dim=1, descending=True, stable=True)
        _place(s, experts, places, order if s.padded else None, None, turn, groups)
    if s.padded:
        offsets = torch.arange(s.experts + 1, device=device) * (groups * s.capacity)
    else:
        _place(s, experts, places, order, offsets, None, 1)
    block = min(triton.next_power_of_2(s.segments), 16)
    launch(
        _router_slots.kept_kernel, s.experts * triton.cdiv(s.segments, block),
        order, offsets, _dense(segment), kept, s.segments, s.experts, options=PLAIN, K=k, BLOCK_R=1024, BLOCK_S=block,
    )  # fmt: skip
    return places, order, offsets, kept


def _place(
    s: SlotSpec,
    experts: Tensor,
    places: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    turn: Tensor | None,
    groups: int,
) -> None:
    """One counting sort: of all choices, in turn, into positions or padded rows; with `offsets`, of those that are kept
    into rows without gaps, whose offsets are written.
    """
    tokens, k = experts.shape
    rows_follow = offsets is not None
    size = tokens // max(groups, 1)
    items = size * k
    blocks = triton.cdiv(items, BLOCK)
    programs = groups * blocks
    only_kept = rows_follow and s.capacity >= 0
    ranks = torch.empty((groups, items), dtype=torch.int32, device=experts.device)
    counts = torch.zeros((groups, blocks, s.experts), dtype=torch.int32, device=experts.device)
    totals = torch.empty(s.experts, dtype=torch.int32, device=experts.device) if rows_follow else None
    rules = {"K": k, "BY_TURN": not rows_follow, "BLOCK": BLOCK}
    launch(
        _router_slots.count_kernel, programs,
        experts, places if only_kept else None, turn, ranks, counts, size, items, blocks, s.experts,
        options=PLAIN, STEP=STEP, **rules,
    )  # fmt: skip
    launch(
        _router_slots.scan_kernel, groups * triton.cdiv(s.experts, 16),
        counts, totals, blocks, s.experts, options=PLAIN, BLOCK_B=128, BLOCK_E=16,
    )  # fmt: skip
    if rows_follow:
        launch(_router_slots.offsets_kernel, 1, totals, offsets, s.experts, options=PLAIN, BLOCK_E=1024)
    launch(
        _router_slots.place_kernel, programs,
        experts, places, turn, ranks, counts, offsets, order, size, items, blocks, groups, s.capacity, s.experts,
        options=PLAIN, ONLY_KEPT=only_kept, PADDED=bool(s.padded), **rules,
    )  # fmt: skip


# ---- Moving rows ---------------------------------------------------------------------------------------------------


def _row_tile(depth: int) -> tuple[int, int]:
    """(rows, numbers of each) of a tile."""
    numbers = min(max(triton.next_power_of_2(depth), 16), 32 if triton_kernels.interprets() else 512)
    return min(max(2 * ELEMENTS // numbers, 1), 16), numbers


def dispatch(tokens: Tensor, gates: Tensor | None, slots: Tensor, order: Tensor) -> Tensor:
    tokens = _with_dense_rows(tokens)
    count, depth = len(order), tokens.shape[1]
    rows = torch.empty((count, depth), dtype=tokens.dtype, device=tokens.device)
    block, numbers = _row_tile(depth)
    launch(
        _router_rows.dispatch_kernel, triton.cdiv(count, block) * triton.cdiv(depth, numbers),
        tokens, _dense(gates), order.contiguous(), rows, count, depth, tokens.stride(0),
        options=PLAIN, K=slots.shape[1], BLOCK_R=block, BLOCK_D=numbers,
    )  # fmt: skip
    return rows


def combine(rows: Tensor, gates: Tensor | None, slots: Tensor, order: Tensor) -> Tensor:
    rows = _with_dense_rows(rows)
    (count, k), depth = slots.shape, rows.shape[1]
    tokens = torch.empty((count, depth), dtype=rows.dtype, device=rows.device)
    block, numbers = _row_tile(depth)
    launch(
        _router_rows.combine_kernel, triton.cdiv(count, block) * triton.cdiv(depth, numbers),
        rows, _dense(gates), slots.contiguous(), tokens, count, depth, rows.stride(0),
        options=PLAIN, K=k, BLOCK_T=block, BLOCK_D=numbers,
    )  # fmt: skip
    return tokens


def dots(tokens: Tensor, rows: Tensor, slots: Tensor, order: Tensor) -> Tensor:
    tokens, rows = _with_dense_rows(tokens), _with_dense_rows(rows)
    (count, k), depth = slots.shape, tokens.shape[1]
    products = torch.empty((count, k), dtype=torch.float32, device=tokens.device)
    block, numbers = _row_tile(depth)
    launch(
        _router_rows.dots_kernel, triton.cdiv(count, block) if k else 0,
        tokens, rows, slots.contiguous(), products, count, depth, tokens.stride(0), rows.stride(0),
        options=PLAIN, K=k, BLOCK_T=block, BLOCK_D=numbers,
    )  # fmt: skip
    return products


# ---- What is compiled ahead of time --------------------------------------------------------------------------------


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Every kernel as these launchers launch it: pairs of options that users can combine, tiles of all kinds."""
    yield from _score_variants(arch, combine)
    yield from _slot_variants(arch)
    yield from _row_variants(arch)


_SWITCHES: dict[str, Sequence[Any]] = {
    "experts": (32, 1000),
    "dtype": (torch.bfloat16, torch.float32),
    "k": (2, 8),
    "noise": (None, "noise", "load"),
    "score": (0, 1),
    "renormalize": (0, 1),
    "segments": (1, 3),
    "valid": (False, True),
}
# With everything at once, and the most numbers that a thread has registers for.
_LARGEST: dict[str, Any] = {
    "choice": "bias", "mask": "allowed", "experts": 4096, "dtype": torch.float16, "k": 1, "noise": "load", "score": 1,
    "renormalize": 1, "segments": 3, "valid": True,
}  # fmt: skip


def _score_variants(arch: str, combine: Combine) -> Iterator[Variant]:
    choices = {"choice": ("logits", "bias", "top2", "max"), "mask": (None, "allowed", "given")}
    for row in (*combine({**choices, **_SWITCHES}), _LARGEST):
        with recording(arch) as recorded:
            scores(*_score_problem(row, row["choice"]))
        kernel, totals = recorded.launches
        recorded.launches[:] = [kernel]
        yield from recorded.variants(_about("scores", row))
    recorded.launches[:] = [totals]
    yield from recorded.variants("expert_routing")
    # Padding goes with segments, which the derivative reads as the scores do; as it reads other types and k.
    choices = {"mask": (None, "allowed"), **_SWITCHES, "k": (8,), "dtype": (torch.bfloat16,), "valid": (None,)}
    for row in (*({**row, "valid": row["segments"] > 1} for row in combine(choices)), _LARGEST):
        logits, noise, bias, allowed, _, segment, valid, spec, sigma = _score_problem(row, "logits")
        like = (logits.new_empty(len(logits), spec.k, dtype=dtype) for dtype in (torch.int64, torch.float32))
        d_sums, d_totals = torch.empty(3, spec.segments, logits.shape[1]), torch.empty(2, spec.segments)
        with recording(arch) as recorded:
            scores_backward(logits, noise, bias, allowed, segment, valid, spec, sigma, *like, d_sums, d_totals)
        yield from recorded.variants(_about("backward", row))


def _score_problem(row: Mapping[str, Any], choice: str) -> tuple[Any, ...]:
    """What `scores` takes, with these switches."""
    tokens, experts, k, segments = 64, row["experts"], row["k"], row["segments"]
    groups = 4 if choice in ("top2", "max") else 1
    group_rule = (groups, max(groups // 2, 1), int(choice == "max"))
    spec = ScoreSpec(k, row["score"], row["renormalize"], *group_rule, segments, int(row["noise"] == "load"))
    return (
        torch.empty(tokens, experts, dtype=row["dtype"]),
        torch.empty(tokens, experts) if row["noise"] else None,
        torch.empty(experts) if choice in ("bias", "top2") else None,
        torch.empty(tokens, experts, dtype=torch.bool) if row["mask"] == "allowed" else None,
        torch.empty(tokens, k, dtype=torch.int64) if row["mask"] == "given" else None,
        torch.empty(tokens, dtype=torch.int64) if segments > 1 else None,
        torch.empty(tokens, dtype=torch.bool) if row["valid"] else None,
        spec,
        0.5,
    )


def _about(kind: str, row: Mapping[str, Any]) -> str:
    options = " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in row.items())
    return f"expert_routing {kind} {options}"


def _slot_variants(arch: str) -> Iterator[Variant]:
    tokens, seen = 512, set()
    for k, experts, capacity, padded, priority, segments in (
        (2, 1000, 40, 0, True, 3),
        (4, 32, 80, 1, False, 1),
        (1, 8, -1, 0, False, 20),
    ):
        chosen = torch.empty(tokens, k, dtype=torch.int64)
        first = torch.zeros(tokens) if priority else None
        segment = torch.empty(tokens, dtype=torch.int64) if segments > 1 else None
        with recording(arch) as recorded:
            slots(chosen, first, segment, SlotSpec(experts, tokens // 2, capacity, padded, segments))
        about = f"expert_routing slots k={k} experts={experts} capacity={capacity} padded={padded}"
        for number, variant in enumerate(recorded.variants(about)):
            what = repr((variant.kernel.__name__, variant.types, variant.constants))
            if what not in seen:  # the layouts share kernels
                seen.add(what)
                yield dataclasses.replace(variant, name=f"{variant.name} {number}")


def _row_variants(arch: str) -> Iterator[Variant]:
    tokens = 64
    for dtype, depth, k, gated in (
        (torch.bfloat16, 768, 2, True),
        (torch.float32, 1000, 64, False),
    ):
        rows = torch.empty(tokens, depth, dtype=dtype)
        gates = torch.empty(tokens, k) if gated else None
        places, order = torch.empty(tokens, k, dtype=torch.int64), torch.empty(tokens, dtype=torch.int64)
        with recording(arch) as recorded:
            dispatch(rows, gates, places, order)
            combine(rows, gates, places, order)
            dots(rows, rows, places, order)
        about = f"expert_routing rows {str(dtype).removeprefix('torch.')} D={depth} k={k} gated={gated}"
        yield from recorded.variants(about)
