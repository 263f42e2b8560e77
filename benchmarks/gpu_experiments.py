"""Runs one experiment of `gpu_trials.py`: what does it take, and who is the fastest at each shape?

    python -m benchmarks.gpu_experiments grouped --csv experiments.csv      on a GPU; `make gpu` runs all of them
    python -m benchmarks.gpu_experiments grouped --csv x.csv --rehearse     small shapes on the CPU

A way whose result differs from that of the first is named as wrong and not timed. Rows are written trial by trial. The
exit status is 1 if something is wrong or fails; what cannot run here is missing, with its reason.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import gpu_tables, measure
from benchmarks.gpu_tables import Row
from benchmarks.gpu_trials import EXPERIMENTS, Setup, Step, Trial
from benchmarks.registry import TOLERANCE
from contrastive_ops.testing import relative_error

ALLOWED = TOLERANCE[torch.bfloat16]
ROUNDS = 5


def tried(
    name: str, build: Callable[[], Step], kind: str, truth: Tensor | None
) -> tuple[Row, Step | None, Tensor | None]:
    """The row so far, the step if it is right, and the truth, which is that of the first way that has a result."""
    row = {"what": name, "kind": kind, "status": "ok"}
    try:
        step = build()
        answer = step()
        error = None if answer is None or truth is None else relative_error(answer, truth)
    except (ImportError, NotImplementedError) as reason:
        return row | {"status": "missing", "note": _first_lines(reason)}, None, truth
    except Exception as reason:  # the other ways are still to be timed
        return row | {"status": "failed", "note": f"{type(reason).__name__}: {_first_lines(reason)}"}, None, truth
    if error is not None:
        row["error"] = f"{error:.1e}"
        if not error <= ALLOWED:
            return row | {"status": "wrong", "note": f"allowed {ALLOWED:.0e}"}, None, truth
    return row, step, answer if truth is None else truth


def _first_lines(reason: Exception) -> str:
    return " ".join(str(reason).split())[:200]


def measured(trial: Trial, device: str, rounds: int, until: float) -> list[Row]:
    """Checks every way of a trial, then times them in turns."""
    rows, steps, truth = [], {}, None
    everyone = [(*way, "way") for way in trial.ways.items()] + [(*floor, "floor") for floor in trial.floors.items()]
    for name, build, kind in everyone:
        row, step, truth = tried(name, build, kind, truth)
        rows.append({"shape": trial.shape, **row})
        if step is not None:
            steps[name] = step
    del truth
    timings = measure.interleave(steps, rounds=rounds, device=device, until=until) if steps else {}
    floor = next((timings[name].minimum for name in trial.floors if name in timings), None)
    for row in rows:
        timing = timings.get(row["what"])
        if timing is not None:
            row["min_ms"], row["median_ms"] = f"{1e3 * timing.minimum:.4g}", f"{1e3 * timing.median:.4g}"
            row["tflops"] = f"{trial.flops / timing.minimum / 1e12:.3g}"
            row["of_floor"] = f"{floor / timing.minimum:.3f}" if floor else ""
    return rows


def run(name: str, setup: Setup, path: Path, *, rounds: int = ROUNDS, until: float = float("inf")) -> list[Row]:
    """All trials of an experiment that begin in time, each written when it is done."""
    everything: list[Row] = []
    for trial in EXPERIMENTS[name](setup):
        if everything and time.monotonic() > until:
            print("no time is left for the next trial", flush=True)
            break
        blank = dict.fromkeys(gpu_tables.COLUMNS, "")
        rows = [{**blank, "experiment": name, **row} for row in measured(trial, setup.device, rounds, until)]
        del trial
        gpu_tables.append(path, rows)
        everything += rows
        print(f"{len(everything)} rows", flush=True)
        if setup.device == "cuda":
            torch.cuda.empty_cache()
    return everything


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_experiments", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    parser.add_argument("--csv", type=Path, required=True, help="file to append to")
    parser.add_argument("--seconds", type=float, default=60, help="no trial begins later (default: 60)")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args(arguments)
    setup = Setup("cpu", rehearses=True) if args.rehearse else Setup()
    until = time.monotonic() + args.seconds
    rows = run(args.experiment, setup, args.csv, rounds=1 if args.rehearse else ROUNDS, until=until)
    print("\n".join([*gpu_tables.of_experiments(rows), *(f"{r['what']}: {r['note']}" for r in rows if r["note"])]))
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
