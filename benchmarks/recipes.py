"""Recipes of papers against the folds that they rest on.

    python -m benchmarks.run --recipes                 all, appended to results/<machine>-recipes.csv
    python -m benchmarks.run --recipes --op simcse     one recipe

A step is forward and backward in float32 at N=2048, D=256, in CPU time of one thread, which a busy machine leaves alone
to 3%. Both sides take turns, ratios are of minima. The other side is `similarity_reduce` of the same matrices, sums of
its rows, one call for each sweep that the formula asks for, searches, whitening and codes: what nobody does without.
What is no sweep is in plain torch: products of a row with its own negatives, statistics of dimensions, mixtures.
Recipes whose released code was read should take at most 1.3 times as long.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import provenance, results
from benchmarks.measure import Timing
from benchmarks.recipe_steps import DEPTH, inputs, steps
from benchmarks.registry import OURS

FOLDS = "folds"
ROWS = 2048
LIMIT = 1.3


def measure_one(pair: tuple[Callable[[], Tensor], Callable[[], Tensor]], rounds: int) -> dict[str, Timing]:
    """CPU time of both in turns."""
    samples: dict[str, list[float]] = {OURS: [], FOLDS: []}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(2 * rounds + 1):
            for name, step in zip(samples, pair, strict=True):
                start = time.thread_time()
                found = step()
                if found.requires_grad:  # measures have no gradient
                    found.backward()
                if turn:
                    samples[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(before)
    return {name: Timing.of(values) for name, values in samples.items()}


def rows_of(name: str, rows: int, timings: dict[str, Timing], rounds: int) -> list[results.Row]:
    """CSV rows of both sides."""
    common = {"op": f"recipes.{name}", "case": f"recipe-{name}", "shapes": f"N={rows} D={DEPTH}", "dtype": "fp32"}
    version = provenance.version("contrastive_ops")
    found = []
    for side, timing in timings.items():
        seconds = {"min": timing.minimum, "median": timing.median, "p20": timing.p20, "p80": timing.p80}
        times = {f"{key}_ms": f"{1e3 * value:.4g}" for key, value in seconds.items()}
        found.append(
            {**common, "provider": side, "kind": "ours", "version": version, "status": "ok", "rounds": str(rounds)}
            | times
        )
    return found


def run(op: str | None, *, rounds: int, quick: bool = False, csv: Path | None = None) -> int:
    """The command; returns the exit status."""
    rows = 64 if quick else ROWS
    pairs = {name: pair for name, pair in steps(inputs(rows)).items() if op in (None, name)}
    if not pairs:
        print(f"no recipe {op!r}; there are {', '.join(steps(inputs(64)))}", file=sys.stderr)
        return 2
    stamp = {"run": provenance.now(), **provenance.gather()}
    if csv is None and not quick:
        csv = results.file_of(f"{provenance.machine_kind()}-recipes")
    print(f"{'recipe':24s} {'ours ms':>10s} {'folds ms':>10s}   ratio", flush=True)
    for name, pair in pairs.items():
        timings = measure_one(pair, rounds)
        mine, other = timings[OURS].minimum, timings[FOLDS].minimum
        mark = "" if mine <= LIMIT * other else f"  above {LIMIT}"
        print(f"{name:24s} {1e3 * mine:10.1f} {1e3 * other:10.1f} {mine / other:7.2f}{mark}", flush=True)
        if csv is not None:
            results.append(csv, [{**row, **stamp} for row in rows_of(name, rows, timings, rounds)])
    return 0
