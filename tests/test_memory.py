"""Memory is proven, not promised: bytes that autograd keeps, and the peak resident set of a process."""

import json
import os
import subprocess
import sys

import pytest
import torch

from contrastive_ops import clip, info_nce, nt_xent

MIB = 1 << 20
LOSSES = {"info_nce": info_nce, "clip": clip, "nt_xent": nt_xent}


def saved_bytes(function):
    """Bytes of the distinct storages that autograd keeps for backward."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = function()
    return sum(storages.values()), value


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_are_linear_in_the_batch(name, reduction, backend):
    sizes = []
    for rows in (500, 1000):
        a, b = (torch.randn(rows, 64, requires_grad=True) for _ in range(2))
        size, _ = saved_bytes(
            lambda a=a, b=b: LOSSES[name](a, b, reduction=reduction, memory_budget=0, backend=backend)
        )
        sizes.append(size)
    assert sizes[1] <= 2.2 * sizes[0]
    assert sizes[1] <= 8 * 1000 * 64 * 4  # inputs, float32 gradients, a few vectors


@pytest.mark.parametrize("budget", [0, 1 * MIB, 3 * MIB, 1 << 40])
def test_memory_budget_bounds_what_is_kept(budget):
    a, b = (torch.randn(1000, 64, requires_grad=True) for _ in range(2))
    base, _ = saved_bytes(lambda: clip(a, b, memory_budget=0, backend="cpu"))
    size, _ = saved_bytes(lambda: clip(a, b, memory_budget=budget, backend="cpu"))
    whole = (1000 + 32) * (1000 + 128) * 4
    assert size - base == min(budget, whole)


def test_evaluation_keeps_nothing():
    a, b = torch.randn(500, 64), torch.randn(500, 64)
    for loss in LOSSES.values():
        with torch.no_grad():
            size, _ = saved_bytes(lambda loss=loss: loss(a.requires_grad_(), b.requires_grad_()))
        assert size == 0


# The peak is read from VmHWM and reset through clear_refs: ru_maxrss would start at the parent's peak.
CHILD = """
import ctypes, json, sys, torch
import contrastive_ops
name, rows, depth, backend = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
loss = getattr(contrastive_ops, name)
a, b = (torch.nn.functional.normalize(torch.randn(rows, depth), dim=1).requires_grad_() for _ in range(2))
loss(a[:64], b[:64], memory_budget=0, backend=backend).backward()
a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) << 10
def peak_above(base):
    return status("VmHWM") - base
def reset():
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    return status("VmRSS")
base = reset()
value = loss(a, b, memory_budget=0, backend=backend)
forward = peak_above(base)
second = reset()
value.backward()
print(json.dumps({"forward": forward, "backward": peak_above(second) + second - base, "loss": value.item()}))
"""


def peak(name, rows, depth, backend="cpu"):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, name, str(rows), str(depth), backend], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's resettable peak")


@LINUX
@pytest.mark.parametrize("name", LOSSES)
def test_peak_resident_set(name):
    """The matrix would take 400 MB (nt_xent: 1.6 GB); dense autograd holds several of them."""
    rows, depth = 10_000, 32
    measured = peak(name, rows, depth)
    gradients = 2 * rows * depth * 4
    assert measured["forward"] <= 96 * MIB + gradients, measured
    assert measured["backward"] <= 96 * MIB + 3 * gradients, measured


@LINUX
def test_peak_resident_set_of_the_reference():
    measured = peak("clip", 6000, 16, "reference")
    assert measured["forward"] <= 160 * MIB and measured["backward"] <= 160 * MIB, measured


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_peak_resident_set_at_65536_rows(name):
    rows = 65_536 if name != "nt_xent" else 32_768
    measured = peak(name, rows, 64)
    assert measured["forward"] <= 256 * MIB and measured["backward"] <= 256 * MIB, measured
