"""Times the extension as two or more compilers build it, taking turns; the numbers of one run, never those of two.

    make matrix ARGS="--compilers g++-12 clang++-19 --tests"      the builds, in build/matrix
    python -m benchmarks.compilers g++-12 clang++-19 --save       the others are compared with the first

Each build has a process of its own, which waits while another one is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import provenance

ROOT = Path(__file__).resolve().parent.parent
BUILDS, STORED = ROOT / "build" / "matrix", Path(__file__).parent / "results" / "compilers.json"
N, SECONDS = 2048, 6  # of a case with a number of threads, at least


def calls() -> dict[str, Callable[[], object]]:
    """The cases by name, each a call that may be repeated."""
    from contrastive_ops import clip, linear_cross_entropy, route, similarity_topk

    torch.manual_seed(0)
    x, y = (torch.randn(N, 512).requires_grad_() for _ in range(2))
    corpus, head = torch.randn(8 * N, 128), torch.randn(8 * N, 256).requires_grad_()
    queries, hidden = torch.randn(N, 128), torch.randn(N, 256).requires_grad_()
    labels, logits = torch.randint(8 * N, (N,)), torch.randn(32 * N, 32).requires_grad_()

    def routed() -> None:
        routing = route(logits, 2, losses=("switch", "z"), capacity=1.25, backend="cpu")
        torch.autograd.grad(routing.gates.sum() + sum(routing.losses.values()), logits)

    return {
        f"clip {N} x 512": lambda: torch.autograd.grad(clip(x, y, backend="cpu"), (x, y)),
        f"similarity_topk {N} x {8 * N} x 128, k = 100": lambda: similarity_topk(queries, corpus, 100, backend="cpu"),
        f"linear_cross_entropy {N} x {8 * N} x 256": lambda: torch.autograd.grad(
            linear_cross_entropy(hidden, head, labels, backend="cpu"), (hidden, head)
        ),
        f"route {32 * N} x 32, k = 2": routed,
    }


def work() -> None:
    """Answers requests, a line each: names of cases, then a case and a number of threads at a time."""
    cases = calls()
    print(json.dumps(list(cases)), flush=True)
    for line in sys.stdin:
        case, threads = json.loads(line)
        torch.set_num_threads(threads)
        began, processor = time.perf_counter(), time.process_time()
        cases[case]()
        print(json.dumps([time.perf_counter() - began, time.process_time() - processor]), flush=True)


class Build:
    """A process with the extension of one compiler."""

    def __init__(self, name: str) -> None:
        if not list((BUILDS / name / "contrastive_ops").glob("_C.*")):
            sys.exit(f'compilers: {name} must be built: make matrix ARGS="--compilers {name} --tests"')
        command = [sys.executable, "-m", "benchmarks.compilers", "--work"]
        self.process = subprocess.Popen(
            command, cwd=BUILDS / name, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.cases: list[str] = json.loads(self.answer())

    def answer(self) -> str:
        """The next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def timed(self, case: str, threads: int) -> tuple[float, float]:
        """Seconds of the clock and of the processor of one call."""
        assert self.process.stdin is not None
        print(json.dumps([case, threads]), file=self.process.stdin, flush=True)
        clock, processor = json.loads(self.answer())
        return clock, processor


def measure(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """The fastest of some rounds, in which all builds take turns, by case and number of threads."""
    builds = {name: Build(name) for name in names}
    rows = []
    for case in builds[names[0]].cases:
        for threads in (1, 2):
            best: dict[str, tuple[float, float]] = {}
            began, turn = time.perf_counter(), 0
            while turn <= rounds or time.perf_counter() < began + SECONDS:
                order = names if turn % 2 else names[::-1]
                found = {name: builds[name].timed(case, threads) for name in order}
                if turn:  # the first warms up
                    best = {name: min(best.get(name, found[name]), found[name]) for name in names}
                turn += 1
            for name, (clock, processor) in best.items():
                row = {"case": case, "threads": threads, "compiler": name, "ms": 1000 * clock}
                rows.append({**row, "ratio": clock / best[names[0]][0], "processor": processor / clock})
                print(f"{case:50} {threads} {name:10} {1000 * clock:8.2f} ms {rows[-1]['ratio']:.3f}", flush=True)
    for build in builds.values():
        build.process.terminate()
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints the rows and stores them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compilers", nargs="*", help="as `make matrix` names them")
    parser.add_argument(
        "--rounds", type=int, default=12, help=f"calls of each build, for {SECONDS} seconds at least (default: 12)"
    )
    parser.add_argument("--save", action="store_true", help=f"write {STORED.relative_to(ROOT)}")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.work:
        work()
        return 0
    if len(chosen.compilers) < 2:
        parser.error("name two compilers or more")
    rows = measure(chosen.compilers, chosen.rounds)
    if chosen.save:
        STORED.write_text(json.dumps({**provenance.gather(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
