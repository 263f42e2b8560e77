"""similarity_topk by a kernel for Hopper GPUs, whose inner products never reach memory; see csrc/cuda/hopper/topk.h.

A first sweep finds a score that k columns of each row reach, a second one lists all columns that reach it. Rows whose
lists have no room for so many, because scores are equal or a row's best columns are side by side, are searched again by
the kernels of "cuda", which also have the logits of listed pairs and all gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.cuda_kernels import kernels
from ..core.problem import Layout, take_rows
from . import hopper
from . import similarity_topk as lists
from ._pairs import dense, dense_tuple
from .similarity_topk import at, backward, merge, order

__all__ = ["at", "backward", "forward", "merge", "no_room", "order", "unsupported"]

# Columns of a tile, and groups of them that can have a maximum each; csrc/cuda/hopper/topk.cu has the same numbers.
COLUMNS, QUARTERS = 192, 4
# A list has room for so many times k columns and so many more. Of five groups at most four are to reach the threshold:
# then 2 k columns are expected to.
ROOM, LEAST_ROOM = 4, 256
OF_GROUPS, REACHING = 5, 4
# Maxima and lists of the rows that are searched at once.
BYTES = 256 << 20


class Asked(NamedTuple):
    """What a call asks for.

    Attributes:
        layout: the sets.
        columns: how many there are.
        k: length of the lists.
        counts: whether statistics are wanted.
    """

    layout: Layout
    columns: int
    k: int
    counts: bool


def unsupported(x: Tensor) -> list[str]:
    """Reasons why these kernels cannot run on rows like `x`."""
    reasons = hopper.unsupported(x)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        reasons.append("a CUDA graph is recorded (which rows are searched again is up to numbers)")
    return reasons


def no_room(asked: Asked) -> list[str]:
    """Reasons why what a call asks for is not for these kernels."""
    reasons = hopper.no_room(asked.layout)
    if asked.counts:
        reasons.append("statistics of all columns (supported: lists)")
    most = QUARTERS * -(-asked.columns // COLUMNS) * REACHING // OF_GROUPS
    if asked.k > most and asked.columns > ROOM * asked.k + LEAST_ROOM:
        least = -(-(asked.columns - LEAST_ROOM) // ROOM)
        reasons.append(f"k={asked.k} of M={asked.columns} columns (supported: up to {most}, and {least} or more)")
    return reasons


class Plan(NamedTuple):
    """How the work is cut.

    Attributes:
        rows: rows at a time.
        groups: groups of columns that have a maximum; none where lists have room for all columns.
        capacity: columns of a list.
    """

    rows: int
    groups: int
    capacity: int


def plan(rows: int, columns: int, k: int) -> Plan:
    """Cut a matrix of at least one row and column."""
    capacity = min(ROOM * k + LEAST_ROOM, columns)
    groups = -(-columns // COLUMNS)
    if OF_GROUPS * k > REACHING * groups:
        groups *= QUARTERS
    groups = groups if capacity < columns else 0
    fitting = BYTES // (4 * groups + 8 * capacity) // hopper.CLUSTER_ROWS * hopper.CLUSTER_ROWS
    return Plan(min(rows, max(fitting, hopper.CLUSTER_ROWS)), groups, capacity)


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    k: int,
    floor: Tensor | None,
    count_above: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (values, indices, counts, statistics); there are no statistics, for which nobody may ask."""
    shape = len(x), len(y)
    values = torch.empty((shape[0], k), dtype=torch.float32, device=x.device)
    indices = torch.empty((shape[0], k), dtype=torch.int64, device=x.device)
    counts = indices.new_zeros(shape[0])
    found = values, indices, counts
    if floor is not None:
        floor = floor.float().masked_fill(floor.isnan(), -torch.inf)  # NaN is none
    if not shape[1]:
        values.fill_(-torch.inf), indices.fill_(-1)
    elif shape[0]:
        crowded = _sweep((x, y, scale, row_bias, col_bias, pair_data, spec), k, floor, found)
        rows = crowded.nonzero().squeeze(1)
        if len(rows):
            some = take_rows(rows, shape, scale, row_bias, pair_data, spec)
            of_rows = None if floor is None else floor[rows]
            again = lists.forward(x[rows], y, *some[:2], col_bias, *some[2:], k, of_rows, None)
            for every, own in zip(found, again, strict=False):
                every[rows] = own
    return *found, indices.new_zeros((0, shape[0]))


def _sweep(problem: tuple[Any, ...], k: int, floor: Tensor | None, found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Write what the lists of all rows have; return which rows have more columns than room."""
    x, y, *vectors, pair_data, spec = problem
    x, y = hopper.aligned(x), hopper.aligned(y)
    arguments = (dense_tuple(pair_data), list(spec), *map(dense, vectors), len(x), len(y))
    cut = plan(len(x), len(y), k)
    maxima = x.new_empty((cut.rows * cut.groups,), dtype=torch.float32)
    thresholds = torch.empty_like(maxima[: cut.rows])
    keys = x.new_empty((cut.rows, cut.capacity), dtype=torch.int64)
    lengths = torch.zeros((len(x),), dtype=torch.int32, device=x.device)
    for begin in range(0, len(x), cut.rows):
        own = lengths[begin : begin + cut.rows]
        kernels().cuda_hopper_topk(
            x, y, x.shape[1], begin, len(own), *arguments, k, floor,
            cut.groups, maxima, thresholds, keys, own, cut.capacity,
        )  # fmt: skip
        part = (each[begin : begin + len(own)] for each in found)
        lists.best_of_lists(keys, own.clamp(max=cut.capacity), 1, k, len(y), *part)
    return lengths > cut.capacity
