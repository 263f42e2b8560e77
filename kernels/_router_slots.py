"""Places of choices: a stable counting sort in which every number has one writer, so nothing depends on timing.

Items are choices in the order in which they are placed, in blocks. `count_kernel` ranks each item among those of its
expert in its block and counts those; `scan_kernel` adds up the counts of earlier blocks; `place_kernel` adds the two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _choice(item, turn, group, size, K: tl.constexpr, BY_TURN: tl.constexpr):
    """The choice token * K + j that is an item of a group.

    BY_TURN: all first choices come before all second ones, and among those tokens come by their turn. Otherwise choices
    come in their own order.
    """
    if BY_TURN:
        j, t = item // size, item % size
        if turn is not None:
            t = tl.load(turn + group * size + t, mask=j < K, other=0)
        return (group * size + t) * K + j
    return item


@triton.jit
def _expert(experts, slots, choice, inside, E):
    """The expert of a choice; -1 where it has none, or where it has already been dropped."""
    expert = tl.load(experts + choice, mask=inside, other=-1)
    if slots is not None:
        expert = tl.where(tl.load(slots + choice, mask=inside, other=-1) >= 0, expert, -1)
    return tl.where(expert < E, expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["size", "items", "blocks"])
def count_kernel(
    experts, slots, turn, ranks, counts, size, items, blocks, E,
    K: tl.constexpr, BY_TURN: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Rank of each item in its block (groups, items), and counts (groups, blocks, E), which are 0 before."""
    group = tl.program_id(0).to(tl.int64) // blocks
    start = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK
    item = start + tl.arange(0, BLOCK)
    expert = _expert(experts, slots, _choice(item, turn, group, size, K, BY_TURN), item < items, E)
    before, total = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, STEP):
        other = start + first + tl.arange(0, STEP)
        its_expert = _expert(experts, slots, _choice(other, turn, group, size, K, BY_TURN), other < items, E)
        same = expert[:, None] == its_expert[None, :]
        total += tl.sum(same.to(tl.int32), 1)
        before += tl.sum((same & (other[None, :] < item[:, None])).to(tl.int32), 1)
    tl.store(ranks + group * items + item, before, mask=item < items)
    # The last item of an expert knows how many there are.
    is_last = (expert >= 0) & (before == total - 1)
    tl.store(counts + tl.program_id(0).to(tl.int64) * E + expert, total, mask=is_last)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(counts, totals, blocks, E, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """Replace each count by the sum of those of earlier blocks of its group; `totals` (groups, E): of all blocks."""
    parts = tl.cdiv(E, BLOCK_E)
    group = tl.program_id(0).to(tl.int64) // parts
    expert = (tl.program_id(0) % parts) * BLOCK_E + tl.arange(0, BLOCK_E)
    carry = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        at = counts + (group * blocks + block)[:, None] * E + expert[None, :]
        inside = (block < blocks)[:, None] & (expert < E)[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, tl.cumsum(count, 0) - count + carry[None, :], mask=inside)
        carry += tl.sum(count, 0)
    if totals is not None:
        tl.store(totals + group * E + expert, carry, mask=expert < E)


@triton.jit
def offsets_kernel(totals, offsets, E, BLOCK_E: tl.constexpr):
    """The first row of each expert, and behind the last one, out of how many rows each has."""
    tl.store(offsets, 0)
    carry = tl.zeros([], tl.int64)
    for first in range(0, E, BLOCK_E):
        expert = first + tl.arange(0, BLOCK_E)
        total = tl.load(totals + expert, mask=expert < E, other=0).to(tl.int64)
        tl.store(offsets + 1 + expert, carry + tl.cumsum(total, 0), mask=expert < E)
        carry += tl.sum(total, 0)


@triton.jit(do_not_specialize=["size", "items", "blocks", "groups", "capacity"])
def place_kernel(
    experts, slots, turn, ranks, counts, offsets, order, size, items, blocks, groups, capacity, E,
    K: tl.constexpr, BY_TURN: tl.constexpr, ONLY_KEPT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Slots of a block of items.

    With offsets: rows without gaps, in the order of the items. Otherwise positions among those of the same expert and
    group, -1 from `capacity` on; PADDED: the rows that they have in that layout.
    """
    group = tl.program_id(0).to(tl.int64) // blocks
    item = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = item < items
    choice = _choice(item, turn, group, size, K, BY_TURN)
    expert = _expert(experts, slots if ONLY_KEPT else None, choice, inside, E)
    kept = expert >= 0
    slot = tl.load(ranks + group * items + item, mask=kept, other=0).to(tl.int64)
    slot += tl.load(counts + tl.program_id(0).to(tl.int64) * E + expert, mask=kept, other=0)
    if offsets is not None:
        slot += tl.load(offsets + expert, mask=kept, other=0)
    else:
        kept = kept & (slot < capacity)
        if PADDED:
            slot += (expert.to(tl.int64) * groups + group) * capacity
    tl.store(slots + choice, tl.where(kept, slot, -1), mask=inside)
    if order is not None:
        tl.store(order + slot, choice, mask=kept)


@triton.jit(do_not_specialize=["segments"])
def kept_kernel(
    order, offsets, segment, kept, segments, E, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Rows of each segment and expert that are taken, (segments, E)."""
    expert = (tl.program_id(0) % E).to(tl.int64)
    label = (tl.program_id(0) // E) * BLOCK_S + tl.arange(0, BLOCK_S)
    end = tl.load(offsets + expert + 1)
    count = tl.zeros([BLOCK_S], tl.int64)
    for first in range(tl.load(offsets + expert), end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        choice = tl.load(order + row, mask=row < end, other=-1)
        its_label = tl.where(choice >= 0, 0, -1)
        if segment is not None:
            its_label = tl.load(segment + choice // K, mask=choice >= 0, other=-1)
        count += tl.sum((its_label[:, None] == label[None, :]).to(tl.int32), 0)
    tl.store(kept + label.to(tl.int64) * E + expert, count, mask=label < segments)
