"""What each loss adds to its sweeps: its whole forward and backward over the time inside the operators.

    python -m benchmarks.run --overhead              every loss, appended to results/<machine>-overhead.csv
    python -m benchmarks.run --overhead --op gist    the variants of one loss; --case chooses by name
    python -m benchmarks.run --overhead --profile    and where the time outside goes
    python -m benchmarks.overhead                    the same

Both times are taken of the same calls, at N=2048 D=256 in float32. Inside is what the compiled
functions take; checks, autograd, normalisation and the algebra of the loss are outside. The ratio
is formed of the minima of both parts: 1 + outside / inside, which should stay below 1.15. Losses of
given pairs have no sweep and are left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import measure, provenance, results
from benchmarks.measure import Timing
from benchmarks.registry import OURS, QUICK_SHAPES

ROWS, DEPTH = 2048, 256
LIMIT = 1.15
INSIDE, OUTSIDE = "inside the operators", "outside the operators"
PROFILED_STEPS = 7
PROFILED_LINES = 12


@dataclass(frozen=True)
class Overhead:
    """Times of one loss: all of it, and its parts inside and outside the operators."""

    loss: str
    function: str
    total: Timing
    inside: Timing
    outside: Timing

    @property
    def ratio(self) -> float:
        """The whole loss over its sweeps."""
        return 1 + self.outside.minimum / self.inside.minimum


# ---------------------------------------------------------------------------------------------
# Measuring


@contextmanager
def clocked() -> Iterator[list[float]]:
    """A list whose one number grows by the seconds of every call of a compiled function.

    Losses that are made whole in C++ go through the operators here: else nothing would be outside.
    """
    from contrastive_ops.core import eager
    from contrastive_ops.ops.maxsim import BACKENDS as INTERACTING
    from contrastive_ops.ops.similarity_loss import BACKENDS as LOSSES
    from contrastive_ops.ops.similarity_reduce import BACKENDS as FOLDING
    from contrastive_ops.ops.similarity_topk import BACKENDS as SELECTING

    seconds = [0.0]
    compiled = [(table, table["cpu"]) for table in (FOLDING, SELECTING, INTERACTING, LOSSES)]

    def timed(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            with torch.profiler.record_function(INSIDE):
                start = time.perf_counter()
                try:
                    return function(*arguments)
                finally:
                    seconds[0] += time.perf_counter() - start

        return call

    for table, backend in compiled:
        found = backend.functions()
        names = [name for name in dir(found) if not name.startswith("_")]
        functions = SimpleNamespace(**{name: timed(getattr(found, name)) for name in names})
        table["cpu"] = replace(backend, functions=lambda functions=functions: functions)
    try:
        with eager.closed():
            yield seconds
    finally:
        for table, backend in compiled:
            table["cpu"] = backend


def step_of(loss: str, rows: int, depth: int) -> Callable[[], None]:
    """One forward and backward of a loss of the package's own list."""
    from contrastive_ops.testing import LOSSES, leaves

    case = LOSSES[loss]
    inputs = case.inputs(rows, depth)
    wanted = leaves(inputs)

    def step() -> None:
        torch.autograd.grad(case(inputs, backend="cpu"), wanted, allow_unused=True)

    return step


def measure_all(losses: list[str], *, rounds: int, rows: int, depth: int) -> list[Overhead]:
    """Times of several losses in turns, so that noise hits all of them alike."""
    from contrastive_ops.testing import LOSSES

    calls: dict[str, list[tuple[float, float]]] = {loss: [] for loss in losses}
    with clocked() as seconds:

        def recorded(loss: str) -> Callable[[], None]:
            step = step_of(loss, rows, depth)

            def run() -> None:
                seconds[0] = 0.0
                start = time.perf_counter()
                step()
                calls[loss].append((time.perf_counter() - start, seconds[0]))

            return run

        measure.interleave({loss: recorded(loss) for loss in losses}, rounds=rounds)
    found = []
    for loss in losses:
        total, inside = zip(*calls[loss][1:], strict=True)  # the first call of each was the warm-up
        outside = [all_of_it - part for all_of_it, part in zip(total, inside, strict=True)]
        name = LOSSES[loss].function.__name__
        found.append(Overhead(loss, name, Timing.of([*total]), Timing.of([*inside]), Timing.of(outside)))
    return found


def profile(loss: str, rows: int, depth: int) -> str:
    """Where the time outside goes: the least self time of each torch operator in one step, in ms."""
    step = step_of(loss, rows, depth)
    step()
    least: dict[str, tuple[float, int]] = {}
    for _ in range(PROFILED_STEPS):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with clocked(), torch.profiler.profile(activities=cpu) as found:
            step()
        for event in found.key_averages():
            seen = (event.self_cpu_time_total / 1e3, event.count)
            least[event.key] = min(seen, least.get(event.key, seen))
    least.pop(INSIDE, None)
    ordered = sorted(least.items(), key=lambda item: item[1], reverse=True)[:PROFILED_LINES]
    lines = [f"{loss}: ms outside the operators, and calls"]
    lines += [f"  {milliseconds:9.3f}  {count:4d}  {key}" for key, (milliseconds, count) in ordered]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Rows and table


def rows_of(found: Overhead, rounds: int, rows: int, depth: int) -> list[results.Row]:
    """CSV rows of the loss and of both parts."""
    common = {
        "op": found.function,
        "case": f"overhead-{found.loss.replace(' ', '-')}-fp32-N{rows}-D{depth}",
        "shapes": f"N={rows} D={depth}",
        "dtype": "fp32",
        "version": provenance.version("contrastive_ops"),
        "status": "ok",
        "rounds": str(rounds),
    }
    lines = []
    for provider, kind, timing in (
        (OURS, "ours", found.total),
        (INSIDE, "part", found.inside),
        (OUTSIDE, "part", found.outside),
    ):
        seconds = {"min": timing.minimum, "median": timing.median, "p20": timing.p20, "p80": timing.p80}
        times = {f"{name}_ms": f"{1e3 * value:.4g}" for name, value in seconds.items()}
        lines.append({**common, "provider": provider, "kind": kind, **times})
    return lines


def table(found: list[Overhead], left_out: list[str]) -> str:
    """The ratio of every loss; those above the limit are marked."""
    width = max(len(each.loss) for each in found)
    lines = [f"{'loss'.ljust(width)}    total ms      inside    outside    ratio"]
    for each in found:
        times = (f"{1e3 * timing.minimum:11.2f}" for timing in (each.total, each.inside, each.outside))
        mark = f"  above {LIMIT}" if each.ratio > LIMIT else ""
        lines.append(f"{each.loss.ljust(width)} {' '.join(times)} {each.ratio:8.3f}{mark}")
    if left_out:
        lines.append(f"left out, because they have no sweep: {', '.join(left_out)}")
    return "\n".join(lines)


def run(
    op: str | None,
    case: str | None,
    *,
    rounds: int,
    quick: bool = False,
    csv: Path | None = None,
    profiled: bool = False,
) -> int:
    """The command; returns the exit status."""
    from contrastive_ops.core import extension
    from contrastive_ops.testing import LOSSES

    if extension.why_missing():
        print(f"the overhead is measured against the compiled operators: {extension.why_missing()}", file=sys.stderr)
        return 1
    chosen = [
        loss
        for loss, entry in LOSSES.items()
        if (op is None or entry.function.__name__ == op) and (case is None or case in loss)
    ]
    swept = [loss for loss in chosen if LOSSES[loss].takes_backend]
    if not swept:
        print(f"no loss with a sweep matches op={op!r} case={case!r}", file=sys.stderr)
        return 2
    rows, depth = (QUICK_SHAPES["N"], QUICK_SHAPES["D"]) if quick else (ROWS, DEPTH)
    stamp = {"run": provenance.now(), **provenance.gather()}
    found = measure_all(swept, rounds=rounds, rows=rows, depth=depth)
    print(table(found, [loss for loss in chosen if loss not in swept]), flush=True)
    for each in found if profiled else ():
        if each.ratio > LIMIT:
            print("\n" + profile(each.loss, rows, depth), flush=True)
    if csv is None and not quick:
        csv = results.file_of(f"{provenance.machine_kind()}-overhead")
    if csv is not None:
        lines = [{**row, **stamp} for each in found for row in rows_of(each, rounds, rows, depth)]
        results.append(csv, lines)
        print(f"appended {len(lines)} rows to {csv}")
    return 0


if __name__ == "__main__":
    from benchmarks.run import main

    sys.exit(main(["--overhead", *sys.argv[1:]]))
