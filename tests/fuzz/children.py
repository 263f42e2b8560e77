"""The fuzzer in children of its process: a signal ends the case that raised it, not the run, and has a reproducer."""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cases import FINE, Case, Subject, attempt, draw_case, shrunk

# A child is begun anew after as many cases, so that what one leaves behind does not last.
CASES_OF_A_CHILD = 250
SECONDS_OF_A_CASE = 300  # of computing; one that waits for ever ends after WAITS times as many
WAITS = 24


def _in_child(cases: Sequence[Case], seconds: int = SECONDS_OF_A_CASE) -> Iterator[str | None]:
    """What `attempt` says of one case after another; the last may be the signal that ended the child.

    A case that computes for more seconds is ended by SIGPROF, one that waits by SIGALRM: a busy machine is no fault.
    The process that calls must not have used threads: its children would wait for them.
    """
    source, to = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        code = 1
        try:
            for case in cases:
                signal.setitimer(signal.ITIMER_PROF, seconds)
                signal.alarm(seconds * WAITS)
                said = attempt(case)
                signal.alarm(0)
                signal.setitimer(signal.ITIMER_PROF, 0)
                os.write(to, f"{json.dumps(said)}\n".encode())
            code = 0
        finally:
            os._exit(code)
    os.close(to)
    try:
        with os.fdopen(source) as lines:
            for line in lines:
                yield json.loads(line)
    except GeneratorExit:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        yield f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    elif status:
        yield "ended the process"


def attempt_in_child(case: Case, seconds: int = SECONDS_OF_A_CASE) -> str | None:
    """As `attempt`, also where the case ends the process."""
    return next(iter(_in_child([case], seconds)), None)


@dataclass
class Report:
    """What a run found.

    Attributes:
        drawn: cases.
        compared: cases of each subject whose numbers were compared.
        levels: those of the backend "cpu" at each SIMD level.
        backends: those of each backend.
        refused: cases that ask for what no call has, or that a call refuses.
        empty: cases without a number.
        failed: reproducers, made simple, and what is wrong.
        seconds: of the whole run.
    """

    drawn: int = 0
    compared: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    empty: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, case: Case, said: str | None) -> None:
        """Count a case."""
        self.drawn += 1
        if said == "refused":
            self.refused += 1
        elif said == "empty":
            self.empty += 1
        else:
            self.compared[case.subject.name] += 1
            backend = case.parameters.get("backend", "")
            self.backends[backend] += 1
            if backend == "cpu":
                self.levels[case.parameters["level"]] += 1


def run_in_children(
    subjects: Mapping[str, Subject],
    cases: int,
    seed: int,
    fixed: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] = lambda text: None,
    progress: Callable[[Report], object] = lambda report: None,
    seconds: int = SECONDS_OF_A_CASE,
    before: Report | None = None,
) -> Report:
    """Draw cases until as many were compared; `progress` is called now and then with what was found so far.

    A case that takes more than `seconds` is a finding. `before` is what `progress` was last given by a run that was
    stopped: its cases are drawn, and not run again.
    """
    rng, report = random.Random(seed), before or Report()
    began = time.monotonic() - report.seconds
    for _ in range(report.drawn):
        draw_case(subjects, rng, fixed)
    while report.compared.total() < cases:
        todo = [draw_case(subjects, rng, fixed) for _ in range(CASES_OF_A_CHILD)]
        while todo and report.compared.total() < cases:
            at = 0
            for said in _in_child(todo, seconds):
                case, at = todo[at], at + 1
                report.add(case, said)
                if said not in FINE:
                    tell(f"{case.reproducer()}\n    {said}")
                    simple, message = shrunk(case, attempt=functools.partial(attempt_in_child, seconds=seconds))
                    report.failed.append((simple.reproducer(), message))
                    tell(f"  simpler: {simple.reproducer()}\n    {message}")
                if report.compared.total() >= cases:
                    break
            todo = todo[at:]
        report.seconds = time.monotonic() - began
        progress(report)
        print(f"{report.compared.total()} of {cases} cases, {len(report.failed)} failed", file=sys.stderr, flush=True)
    return report
