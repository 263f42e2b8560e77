"""This package against that of a commit: both built, in processes of their own, timed in turns.

    python -m benchmarks.run --base main                 every case that ours is timed in
    python -m benchmarks.run --base v0.2.0 --op clip     one op

The commit is checked out and installed below build/base, with the SIMD levels of this processor alone where it knows
how; the cases are those of this tree. A process with nothing to do waits for its next line. Of a case the ratio of the
minima is printed: above 1 this tree is slower.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, provenance, report, results
from benchmarks.registry import OURS, Case, all_cases

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "base"
# A ratio outside is marked; what the same code gives against itself on a quiet machine lies within.
NOISE = 0.05


def commit_of(revision: str) -> str:
    """The full name of a commit; ValueError where git knows none."""
    command = ["git", "rev-parse", "--verify", "-q", f"{revision}^{{commit}}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--base must name a commit of this repository, got {revision!r}")
    return done.stdout.strip()


def install(commit: str) -> Path:
    """The folder that the package of a commit is installed in; it is built where it is not there."""
    tree, site = BUILD / commit / "tree", BUILD / commit / "site"
    if (site / "contrastive_ops").exists():
        return site
    if not tree.exists():
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), commit], cwd=ROOT, check=True)
    print(f"building {commit[:7]}; it takes some minutes on two cores", flush=True)
    chosen = {"CONTRASTIVE_OPS_EXT": "1", "CONTRASTIVE_OPS_NATIVE": "1"}
    chosen |= {} if torch.cuda.is_available() else {"CONTRASTIVE_OPS_CUDA": "0"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(site),
        ".",
    ]
    done = subprocess.run(command, cwd=tree, env={**os.environ, **chosen}, check=False)
    subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    if done.returncode:
        raise RuntimeError(f"{commit[:7]} cannot be built here; see above")
    return site


class Side:
    """A process that times the package in a folder."""

    def __init__(self, package: Path) -> None:
        code = (
            f"import sys; sys.path[:0] = [{str(package)!r}, {str(ROOT)!r}]; from benchmarks import base; base.serve()"
        )
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        kept["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # those of --threads
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=BUILD,
            env={**kept, "OMP_WAIT_POLICY": "passive"},  # a process that waits leaves the processor to the other
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = Path(self.ask(hello=True))
        if found.parent.resolve() != package.resolve():
            self.close()
            raise RuntimeError(f"the package of {package} must be imported, got {found}")

    def ask(self, **line: Any) -> Any:
        """The answer to a line; RuntimeError with what went wrong there."""
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process has ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """The other end: reads lines, writes answers; what the package itself prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    step = None
    for text in sys.stdin:
        line = json.loads(text)
        try:
            if "hello" in line:
                value: Any = importlib.import_module("contrastive_ops").__path__[0]
            elif "case" in line:
                case = all_cases()[line["case"]]
                case = case.shrunk() if line["quick"] else case
                step = case.provider(OURS).build(case.make_inputs(case))
                value = measure._timed(step, "cpu")  # warms up
            else:
                value = [measure._timed(step, "cpu") for _ in range(line["calls"])]
            answer = {"value": value}
        except Exception as error:  # said by the other end
            answer = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


def compare(sides: dict[str, Side], case: Case, rounds: int, quick: bool) -> dict[str, measure.Timing]:
    """Times of a case in turns; who comes first changes from round to round."""
    for side in sides.values():
        side.ask(case=case.name, quick=quick)
    one = max(side.ask(calls=1)[0] for side in sides.values())
    calls = min(measure.MAX_CALLS, max(1, round(measure.SLICE_SECONDS / max(one, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            samples[name] += sides[name].ask(calls=calls)
    return {name: measure.Timing.of(found) for name, found in samples.items()}


def run(cases: Sequence[Case], revision: str, *, rounds: int, quick: bool = False, csv: Path | None = None) -> int:
    """The command; returns the exit status."""
    try:
        commit = commit_of(revision)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    site = install(commit)
    before = f"{OURS} of {commit[:7]}"
    sides = {OURS: Side(ROOT), before: Side(site)}
    stamp = {"run": provenance.now(), **provenance.gather()}
    chosen = [case for case in cases if case.device == "cpu" and "time" in case.measure]
    chosen = [case for case in chosen if any(provider.name == OURS for provider in case.providers)]
    print(f"{'case':52s} {'now ms':>10s} {commit[:7]:>10s}   ratio", flush=True)
    began = time.monotonic()
    for case in chosen:
        try:
            timings = compare(sides, case, rounds, quick)
        except RuntimeError as error:  # the commit may lack what a case calls
            print(f"{case.name:52s} not compared: {error}", flush=True)
            continue
        now, then = timings[OURS].minimum, timings[before].minimum
        mark = "" if abs(now / then - 1) <= NOISE else "  slower" if now > then else "  faster"
        print(f"{case.name:52s} {1e3 * now:10.2f} {1e3 * then:10.2f} {now / then:7.2f}{mark}", flush=True)
        if csv is not None:
            found = [
                report.Measurement(case.provider(OURS), timing=timing, rounds=rounds) for timing in timings.values()
            ]
            version = provenance.version("contrastive_ops")
            rows = [report.to_row(case, each, None, version) for each in found]
            rows[1] |= {"provider": before, "version": commit[:7]}
            results.append(csv, [{**row, **stamp} for row in rows])
    for side in sides.values():
        side.close()
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds a commit and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="of the commit to build below build/base")
    print(install(commit_of(parser.parse_args(arguments).revision)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
