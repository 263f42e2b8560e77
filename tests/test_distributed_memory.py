"""A ring holds a multiple of what its own rows take."""

import ctypes
import sys

import pytest
import torch
from ranks import ranks

from contrastive_ops import distributed
from contrastive_ops.testing.memory import reset_peak, resident_bytes

DEPTH = 1 << 14
M_MMAP_THRESHOLD = -3


def peak(rank, size, rows, schedule):
    """Bytes that forward and backward of `rows` rows take at most, beside the rows themselves."""

    # Otherwise the C library keeps blocks that were freed, more or fewer by what came when.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)

    def step():
        x, y = (torch.randn(rows, DEPTH, requires_grad=True) for _ in range(2))
        before = reset_peak()
        distributed.clip(x, y, schedule=schedule, normalize=False, memory_budget=0).backward()
        return resident_bytes("VmHWM") - before

    step()
    return min(step() for _ in range(2))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_ring_is_linear_in_local_rows():
    """Twice the rows, twice the memory, and less than all columns and their gradients take."""
    shard = 64 * DEPTH * 4
    of_64, of_128 = (max(ranks(4).run(peak, rows, "ring")) for rows in (64, 128))
    gathered = max(ranks(4).run(peak, 128, "gather"))
    assert 2 * shard < of_64 and of_128 < 2.1 * of_64, (of_64 / shard, of_128 / shard)
    assert of_128 < gathered, (of_128 / shard, gathered / shard)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_ring_does_not_grow_with_ranks():
    """What is gathered does."""
    rings, gathered = ([max(ranks(size).run(peak, 64, schedule)) for size in (3, 4)] for schedule in ("ring", "gather"))
    assert rings[1] < 1.05 * rings[0], rings
    assert gathered[1] > 1.1 * gathered[0], gathered
