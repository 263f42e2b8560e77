"""Times the providers of one case against each other, so that noise hits all of them alike.

A shared machine changes its speed by a third within a second. Timing one provider after the other
compares two moments as much as two programs; here each round calls every provider once (short ones
several times), the order rotates from round to round, and ratios are formed of minima.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# A provider faster than this is called several times a round: single short calls sit on timer and
# scheduler noise, and a minimum needs chances.
SLICE_SECONDS = 0.05
MAX_CALLS = 20


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: the minimum, the median, and the 20th and 80th percentiles; and of how many samples."""

    minimum: float
    median: float
    p20: float
    p80: float
    samples: int = 1

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarises samples; with one sample all four are that sample."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        return cls(ordered[0], statistics.median(ordered), p20, p80, len(ordered))


def _timed(step: Callable[[], object], device: str) -> float:
    if device == "cuda":
        return _timed_by_events(step)
    synchronise(device)
    start = time.perf_counter()
    result = step()
    synchronise(device)
    elapsed = time.perf_counter() - start
    # Freeing the answer belongs to nobody's time.
    del result
    return elapsed


def _timed_by_events(step: Callable[[], object]) -> float:
    """Seconds on the GPU's own clock from an idle queue: without this process's way to and from the driver."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = step()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


def synchronise(device: str) -> None:
    """Waits for the device's queue; a CPU has none."""
    if device != "cpu":
        torch.accelerator.synchronize()


def interleave(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: str = "cpu",
    until: float = math.inf,
    warm: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Timings of every step over ``rounds`` rounds, each step once warm before the first.

    Args:
        steps: what to time, by provider.
        rounds: at least 1.
        device: "cpu", or the type of an accelerator to synchronise.
        until: when `time.monotonic` is past it no further round begins, but for the first.
        warm: seconds of a call that has been made, by provider; a long one is not made again before the first round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = list(steps)
    calls = {}
    for name in names:
        seconds = (warm or {}).get(name, 0.0)
        if seconds < max(SLICE_SECONDS, 1e-9):
            seconds = max(_timed(steps[name], device), 1e-9)
        calls[name] = min(MAX_CALLS, max(1, round(SLICE_SECONDS / seconds)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn and time.monotonic() > until:
                break
            first = turn % len(names) if names else 0
            for name in names[first:] + names[:first]:
                samples[name] += [_timed(steps[name], device) for _ in range(calls[name])]
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in samples.items()}
