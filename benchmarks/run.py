"""Runs benchmark cases: checks every provider against the float64 truth, then times them in turns.

    python -m benchmarks.run                     everything; appends to benchmarks/results/
    python -m benchmarks.run --op clip           the cases of one op
    python -m benchmarks.run --case N2048        the cases whose name contains this
    python -m benchmarks.run --device cuda       the cases of a GPU (see gpu.py for all that needs one)
    python -m benchmarks.run --targets           every number to reach, in ten minutes: what `make bench` runs
    python -m benchmarks.run --base REV          this package against that of a commit, in turns (see base.py)
    python -m benchmarks.run --curves            time and memory against N, M, D, k, E and threads (see curves.py)
    python -m benchmarks.run --quick             tiny shapes, written nowhere unless --csv is given
    python -m benchmarks.run --list              the cases, their providers and targets
    python -m benchmarks.run --overhead          what each loss adds to its sweeps (see overhead.py)
    python -m benchmarks.run --adapters          classes of integrations against the originals (see adapters.py)
    python -m benchmarks.run --small             losses of few rows against plain torch (see small_batches.py)
    python -m benchmarks.run --recipes           recipes of papers against the folds they rest on (see recipes.py)
    python -m benchmarks.run --processes         clip over two processes beside open_clip (see processes.py)

A provider that fails the check is named as wrong and not timed. The exit status is 1 if that, or an
error, happens to this package, and with --peers also if a peer is not installed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import (
    adapters,
    base,
    curves,
    measure,
    memory,
    overhead,
    processes,
    provenance,
    recipes,
    report,
    results,
    small_batches,
)
from benchmarks.errors import errors
from benchmarks.registry import FLOORS, Case, Inputs, Provider, Step, Truth, representatives, select
from benchmarks.report import Measurement


@dataclass(frozen=True)
class Options:
    """What to measure of each case, and how.

    ``of_targets``: those alone whom a target names, and memory of those alone who have a target for it. ``until``: by
    `time.monotonic`, no further round begins after it.
    """

    rounds: int = 7
    quick: bool = False
    memory: bool = True
    peers: bool = True
    optional: bool = False
    csv: Path | None = None
    of_targets: bool = False
    until: float = math.inf


# When `--targets` begins its last case; a minute of the ten is for that case.
TARGETS_MINUTES = 9.0
# A case of which memory alone is wanted is of a large batch: it takes as long as so many others have for themselves.
LARGE = 3


def _checked(provider: Provider, inputs: Inputs, truth: Truth, tolerance: float) -> tuple[Measurement, Step | None]:
    """The measurement so far and, if the provider is right, its step."""
    found = Measurement(provider)
    try:
        step = provider.build(inputs)
        began = time.monotonic()
        answer = step()
        found.first_call = time.monotonic() - began
    except ImportError as error:
        found.status = "missing"
        found.note = f"{provider.name}: not installed ({provider.package}): {error}"
        return found, None
    except Exception as error:  # a peer's failure must not end the run; it is printed
        found.status = "failed"
        found.note = f"{provider.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return found, None
    if answer is None:
        return found, step
    found.errors = errors(answer, truth)
    return found, (step if _right(found, tolerance) else None)


def _right(found: Measurement, tolerance: float) -> bool:
    """Whether the errors are within the tolerance, NaN is not, and no list is shorter than allowed."""
    name, seen = found.provider.name, found.errors
    if seen.worst <= tolerance and (not seen.starved or found.provider.starves):
        return True
    found.status = "wrong"
    if seen.grads is not None:
        wrong = f"loss error {seen.value:.1e}, gradient error {seen.grads:.1e}"
    else:
        wrong = f"error of the lists {seen.value:.1e}, starved rows {seen.starved}"
    found.note = f"{name}: WRONG, not measured: {wrong}, allowed {tolerance:.0e}"
    return False


def _wanted(case: Case, options: Options) -> list[Provider]:
    named = {case.baseline, *(name for target in case.targets for name in report.providers_of(target))}
    return [
        provider
        for provider in case.providers
        if (options.peers or provider.kind != "peer")
        and (options.optional or not provider.optional)
        and (not options.of_targets or provider.name in named or provider.kind in FLOORS)
    ]


def _measure_time(case: Case, options: Options) -> list[Measurement]:
    """Checks and times every provider in this process; the memory of a GPU is known here, too."""
    if case.device == "cuda":
        torch.cuda.empty_cache()  # what the last case left in pieces
    inputs = case.make_inputs(case)
    truth = case.truth(inputs)
    measurements, steps = [], {}
    for provider in _wanted(case, options):
        found, step = _checked(provider, inputs, truth, case.tolerance)
        measurements.append(found)
        if step is not None:
            steps[provider.name] = step
    del truth
    warm = {found.provider.name: found.first_call for found in measurements if case.device == "cpu"}
    timings = measure.interleave(steps, rounds=options.rounds, device=case.device, until=options.until, warm=warm)
    for found in measurements:
        if found.provider.name in timings:
            found.timing = timings[found.provider.name]
            found.rounds = options.rounds
            if case.device != "cpu" and options.memory and found.provider.kind not in FLOORS:
                found.peak_extra_mib = memory.extra_bytes(steps[found.provider.name], case.device)[0] / memory.MIB
    return measurements


def _measure_memory(registered: Case, measurements: list[Measurement], options: Options) -> None:
    """Adds the peak of every right provider, each in a process of its own."""
    named = report.memory_providers(registered)
    for found in measurements:
        if found.status != "ok" or found.provider.kind in FLOORS:
            continue
        if options.of_targets and found.provider.name not in named:
            continue
        check = found.errors is None
        try:
            extra, seen = memory.measure(registered, found.provider, quick=options.quick, check=check)
        except RuntimeError as error:
            found.status, found.note = "failed", f"memory of {error}"
            continue
        if seen is not None:
            found.errors = seen
            if not _right(found, registered.tolerance):
                continue
        found.peak_extra_mib = extra


def run_case(registered: Case, options: Options) -> tuple[list[results.Row], list[str]]:
    """Measures one case; returns its rows without provenance, and notes to print."""
    case = registered.shrunk() if options.quick else registered
    if "time" in case.measure:
        measurements = _measure_time(case, options)
    else:
        measurements = [Measurement(provider) for provider in _wanted(case, options)]
    if options.memory and "memory" in case.measure and case.device == "cpu":
        _measure_memory(registered, measurements, options)
    floors = [m.timing for m in measurements if m.provider.kind == "matmul" and m.timing]
    rate = report.gflops_of(case, floors[0]) if floors else None
    rows = [
        report.to_row(case, found, rate, provenance.version(found.provider.package))
        for found in measurements
        if found.status != "missing" or found.provider.kind == "ours"
    ]
    return rows, [found.note for found in measurements if found.note]


def csv_of(case: Case, options: Options) -> Path | None:
    """The file a case's rows go to; None for a quick run that was given no file."""
    if options.csv is not None or options.quick:
        return options.csv
    return results.file_of(provenance.machine_kind(case.device))


def run(cases: Sequence[Case], options: Options) -> list[results.Row]:
    """Runs the cases one by one, prints each table, appends its rows at once; in the end what became of the targets.

    With ``options.until`` a case gets its share of what is left, and those that none is left for are not measured.
    """
    everything: list[results.Row] = []
    started, began = provenance.now(), time.monotonic()
    for number, registered in enumerate(cases):
        now = time.monotonic()
        if now > options.until:
            break
        left = sum(1 if "time" in each.measure else LARGE for each in cases[number:])
        share = now + (options.until - now) / left
        print(f"[{number + 1} of {len(cases)}, {now - began:.0f} s]", end=" ", flush=True)
        rows, notes = run_case(registered, replace(options, until=share))
        stamp = {"run": started, **provenance.gather(registered.device)}
        rows = [{**row, **stamp} for row in rows]
        shown = registered.shrunk() if options.quick else registered
        print(report.table(shown, rows, notes), end="\n\n", flush=True)
        path = csv_of(registered, options)
        if path is not None:
            results.append(path, rows)
            print(f"appended {len(rows)} rows to {path}", flush=True)
        everything += rows
    named = [case.shrunk() for case in cases] if options.quick else cases
    print(f"{report.targets_text(named, everything)}\n{time.monotonic() - began:.0f} s", flush=True)
    return everything


def list_cases(cases: Sequence[Case]) -> None:
    """Prints every case with its providers and targets."""
    for case in cases:
        print(f"{case.name}  ({', '.join(case.measure)})")
        names = (p.name + (" (optional)" if p.optional else "") for p in case.providers)
        print(f"  providers: {', '.join(names)}")
        for target in case.targets:
            print(f"  {' against '.join(report.providers_of(target))}: {report.bound_text(target)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="only the cases of this op")
    parser.add_argument("--case", help="only the cases whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only the cases of this device")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing (default: 7)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 rounds, no file")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--csv", type=Path, help="file to append to (default: by machine kind)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--optional", action="store_true", help="also torch.compile")
    parser.add_argument("--targets", action="store_true", help="cases with a number to reach, in ten minutes")
    parser.add_argument("--minutes", type=float, default=TARGETS_MINUTES, help="of --targets, without the last case")
    parser.add_argument("--base", metavar="REV", help="time this package against that of a commit")
    parser.add_argument("--curves", action="store_true", help="time and memory against sizes and threads")
    parser.add_argument("--overhead", action="store_true", help="time losses against their sweeps")
    parser.add_argument("--adapters", action="store_true", help="time classes of integrations against the originals")
    parser.add_argument("--small", action="store_true", help="time losses of few rows against plain torch")
    parser.add_argument("--recipes", action="store_true", help="time recipes of papers against their folds")
    parser.add_argument("--processes", action="store_true", help="time clip over two processes beside open_clip")
    parser.add_argument("--profile", action="store_true", help="with --overhead: where the rest goes")
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument("--peers", action="store_true", help="a peer not installed is an error")
    peers.add_argument("--no-peers", action="store_true", help="only this package and torch")
    return parser.parse_args(arguments)


def _runnable(cases: Sequence[Case], options: Options) -> list[Case]:
    """The cases whose device is here and of which something is to be measured."""
    found = [
        case
        for case in cases
        if (case.device == "cpu" or torch.cuda.is_available()) and ("time" in case.measure or options.memory)
    ]
    if not options.quick:
        return found
    # Several cases shrink to one; a quick run needs it once.
    timed = representatives(case for case in found if "time" in case.measure)
    untimed = representatives(case for case in found if "time" not in case.measure)
    return [*timed.values(), *untimed.values()]


def _missing_peers(cases: Sequence[Case]) -> list[str]:
    packages = {p.package for case in cases for p in case.providers if p.kind == "peer"}
    return sorted(package for package in packages if not provenance.version(package))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    rounds = min(args.rounds, 2) if args.quick else args.rounds
    if args.overhead:
        return overhead.run(args.op, args.case, rounds=rounds, quick=args.quick, csv=args.csv, profiled=args.profile)
    if args.adapters:
        return adapters.run(args.op, rounds=rounds, quick=args.quick, csv=args.csv)
    if args.small:
        return small_batches.run(args.op, rounds=rounds, quick=args.quick, csv=args.csv)
    if args.processes:
        return processes.run(rounds=rounds, quick=args.quick, csv=args.csv)
    if args.recipes:
        return recipes.run(args.op, rounds=rounds, quick=args.quick, csv=args.csv)
    if args.curves:
        return curves.run(args.op, rounds=rounds, quick=args.quick, csv=args.csv)
    try:
        cases = select(args.op, args.case, args.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        list_cases(cases)
        return 0
    if args.base:
        return base.run(cases, args.base, rounds=rounds, quick=args.quick, csv=args.csv)
    missing = _missing_peers(cases) if args.peers else []
    if missing:
        print(f"not installed: {', '.join(missing)}; pip install -r requirements/peers.txt")
        return 1
    options = Options(
        rounds=rounds,
        quick=args.quick,
        memory=not args.no_memory,
        peers=not args.no_peers,
        optional=args.optional,
        csv=args.csv,
        of_targets=args.targets,
        until=time.monotonic() + 60 * args.minutes if args.targets else math.inf,
    )
    runnable = _runnable([case for case in cases if case.targets or not args.targets], options)
    if args.targets:  # steps of large batches, of which memory alone is wanted, take most of the time: they come last
        runnable.sort(key=lambda case: 0.0 if "time" in case.measure else case.flops(case.shapes))
    if args.device and not runnable:
        print(f"no case can run on device={args.device!r}: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    return int(_is_bad(run(runnable, options)))


def _is_bad(rows: Sequence[results.Row]) -> bool:
    """Whether this package is wrong or fails anywhere, or cannot run at all in a case."""
    ours = [row for row in rows if row["kind"] == "ours"]
    ran = {row["case"] for row in ours if row["status"] == "ok"}
    return any(row["status"] not in ("ok", "missing") or row["case"] not in ran for row in ours)


if __name__ == "__main__":
    sys.exit(main())
