"""The two loss layers of the demo, and what each costs in time and memory.

Memory is measured in a fresh process per trial, by running this file:

    python examples/_loss_meter.py LAYER BATCH DIM      # prints one JSON object

so that neither layer inherits memory that the other, or the training, left behind.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_ops

MIB = 1 << 20
STATUS = Path("/proc/self/status")
LossLayer = Callable[[Tensor, Tensor, Tensor], Tensor]


def pytorch_layer(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The CLIP loss as everybody writes it: the whole similarity matrix, two cross entropies."""
    logits = scale * a @ b.T
    labels = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def contrastive_ops_layer(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The same loss, the matrix never stored."""
    return contrastive_ops.clip(a, b, scale=scale, normalize=False)


def uncached_layer(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The same again, with nothing of the matrix kept between forward and backward."""
    return contrastive_ops.clip(a, b, scale=scale, normalize=False, memory_budget=0)


LAYERS: dict[str, LossLayer] = {
    "pytorch": pytorch_layer,
    "contrastive_ops": contrastive_ops_layer,
}
MEASURED = {**LAYERS, "uncached": uncached_layer}


class Trial(NamedTuple):
    """What one forward and backward of a loss layer cost in a process of its own."""

    batch: int
    extra_bytes: float  # above inputs and gradients; infinite where the system killed the trial
    seconds: float


class Largest(NamedTuple):
    """The largest batch found to fit; `at_least` where the time cap ended the search."""

    batch: int
    at_least: bool


# --- inside the measuring process ----------------------------------------------------------------


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process.

    Not ru_maxrss where /proc exists: a child starts with the peak of the process it was spawned
    from, and the training process is larger than what is measured here.
    """
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Bring VmHWM down to VmRSS where the kernel offers it."""
    if STATUS.exists():
        # Without it the peak of the imports stays in: at worst the result is too small.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def random_rows(batch: int, dim: int, seed: int) -> Tensor:
    """Unit rows, every page of them touched."""
    rows = torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed))
    return rows.div_(rows.norm(dim=1, keepdim=True)).requires_grad_()


def measure_here(layer: str, batch: int, dim: int) -> Trial:
    """Peak resident memory of one forward and backward above inputs and gradients.

    Torch is warmed up by the plain layer and by an optimizer, as in training (the latter imports
    torch's compiler, which custom operators need too). What contrastive_ops loads and allocates on
    its own first call counts as its extra memory.
    """
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    warm_a, warm_b = random_rows(64, dim, 0), random_rows(64, dim, 1)
    pytorch_layer(warm_a, warm_b, scale).backward()
    torch.optim.Adam([warm_a, warm_b])
    a, b = random_rows(batch, dim, 2), random_rows(batch, dim, 3)
    forget_peak()
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    MEASURED[layer](a, b, scale).backward()
    seconds = time.perf_counter() - start
    gradients = sum(x.grad.nbytes for x in (a, b) if x.grad is not None)
    extra = resident_bytes("VmHWM") - before - gradients
    return Trial(batch, max(extra, 0), seconds)


# --- in the demo's process -----------------------------------------------------------------------


def measure(layer: str, batch: int, dim: int, timeout: float | None = None) -> Trial | None:
    """One trial in a fresh process; None where it ran past the timeout."""
    command = [sys.executable, __file__, layer, str(batch), str(dim)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == -9:  # out of memory
        return Trial(batch, math.inf, math.inf)
    if done.returncode:
        raise RuntimeError(f"measuring {layer} at batch {batch} failed:\n{done.stderr}")
    return Trial(**json.loads(done.stdout))


def next_batch(last: Trial, fits: int, too_big: int | None, limit: int, step: int, growth: int) -> int:
    """Where to look next: at most `growth` times as far, never past what the last trial predicts.

    The prediction takes memory to grow with the square of the batch, which it does for a stored
    matrix and which is too careful for anything better, so no trial can fill the machine.
    """
    predicted = int(last.batch * math.sqrt(limit / max(last.extra_bytes, 1))) // step * step
    if too_big is None:
        return max(min(growth * fits, predicted), fits + step)
    if fits < predicted < too_big:
        return predicted
    return (fits + too_big) // 2 // step * step if too_big - fits > step else fits


def largest_batch(
    first: Trial,
    run: Callable[[int, float], Trial | None],
    *,
    limit: int,
    seconds: float,
    step: int = 256,
) -> Largest:
    """The largest batch, to a multiple of `step`, whose loss layer needs at most `limit` bytes.

    first: a trial already made. run(batch, timeout): makes another one. Steps are as long as the
    time that is left allows; a trial takes time with the square of its batch.
    """
    deadline = time.monotonic() + seconds
    fits, too_big, last = 0, None, first
    while True:
        if last.extra_bytes <= limit:
            fits = max(fits, last.batch)
        else:
            too_big = min(too_big or last.batch, last.batch)
        left = deadline - time.monotonic()
        seconds_per_square = last.seconds / last.batch**2 if math.isfinite(last.seconds) else 0
        for growth in (4, 2):
            batch = next_batch(last, fits, too_big, limit, step, growth)
            if batch == fits:
                return Largest(fits, at_least=False)
            if seconds_per_square * batch**2 < left:
                break
        else:
            return Largest(fits, at_least=True)
        trial = run(batch, left)
        if trial is None:
            return Largest(fits, at_least=True)
        last = trial


if __name__ == "__main__":
    name, batch_size, width = sys.argv[1:]
    print(json.dumps(measure_here(name, int(batch_size), int(width))._asdict()))
