"""Cases of the fuzzer: how they are drawn, run, made simpler and printed."""

from __future__ import annotations

import contextlib
import os
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from contrastive_ops.core import eager, operators

from .judge import Call, Difference, judge


@dataclass(frozen=True)
class One:
    """One of the choices, the simplest first; the later of `choices` are drawn as often as the first."""

    choices: tuple[Any, ...]

    def draw(self, rng: random.Random) -> Any:
        return rng.choice(self.choices)

    def simpler(self, value: Any) -> Iterator[Any]:
        if value in self.choices:  # else it was fixed for the whole run
            yield from self.choices[: self.choices.index(value)]

    @property
    def first(self) -> Any:
        return self.choices[0]


@dataclass(frozen=True)
class Some:
    """Some of the choices, at least `least` and `most` at most, in any order."""

    choices: tuple[str, ...]
    most: int
    least: int = 0

    def draw(self, rng: random.Random) -> tuple[str, ...]:
        return tuple(rng.sample(self.choices, rng.randint(self.least, self.most)))

    def simpler(self, value: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for at in range(len(value) if len(value) > self.least else 0):
            yield value[:at] + value[at + 1 :]

    @property
    def first(self) -> tuple[str, ...]:
        return self.choices[: self.least]


Space = Mapping[str, One | Some]
# Of every subject. `needs`: which inputs require a gradient, a bit each.
COMMON: Space = {
    "seed": One(tuple(range(1000))),
    "dtype": One(("float32", "float64", "bfloat16", "float16")),
    "layout": One(("plain", "gaps", "offset", "transposed")),
    "needs": One((-1, 1, 2, 4, 5, 6, 0)),
    "way": One(("direct", "dispatcher")),
    "threads": One((1, 2)),
    # At most this SIMD level; the first is that of the processor.
    "level": One(("", "avx512_bf16", "avx512", "avx2", "default")),
}
LEVEL = "CONTRASTIVE_OPS_CPU_CAPABILITY"
# What `attempt` says of cases that are not wrong: the call refused, there were no numbers, all are right.
FINE = ("refused", "empty", None)


class Refused(Exception):
    """The case asks for what no call has, such as a target among no columns."""


class Subject:
    """What the fuzzer calls. `space` has the parameters beyond `COMMON`; `build` makes the call."""

    name: str
    space: Space
    weight = 1  # how often it is drawn

    def build(self, **parameters: Any) -> Call:
        raise NotImplementedError


@dataclass(frozen=True)
class Case:
    """A subject with a choice of each of its parameters."""

    subject: Subject
    parameters: Mapping[str, Any]

    @property
    def space(self) -> Space:
        return {**COMMON, **self.subject.space}

    def reproducer(self) -> str:
        given = {n: v for n, v in self.parameters.items() if v != self.space[n].first}
        words = "".join(f", {n}={v!r}" for n, v in given.items())
        return f"PYTHONPATH=tests python -c 'from fuzz import check; check({self.subject.name!r}{words})'".replace(
            "'from", '"from', 1
        ).replace(")'", ')"')


@contextlib.contextmanager
def _called(way: str, threads: int, level: str) -> Iterator[None]:
    """Plain calls past the dispatcher, or through the registered operators; on some threads, at a SIMD level."""
    before, torch_threads, before_level = (
        operators.seen_by_autograd_alone,
        torch.get_num_threads(),
        os.environ.get(LEVEL),
    )
    torch.set_num_threads(threads)
    if level:
        os.environ[LEVEL] = level
    try:
        if way == "direct":
            yield
        else:
            operators.seen_by_autograd_alone = lambda arguments: False
            with eager.closed():
                yield
    finally:
        operators.seen_by_autograd_alone = before
        torch.set_num_threads(torch_threads)
        if level and before_level is None:
            del os.environ[LEVEL]
        elif level:
            os.environ[LEVEL] = str(before_level)


def attempt(case: Case) -> str | None:
    """Run a case: one of `FINE`, or what is wrong."""
    torch.manual_seed(case.parameters["seed"])
    how = ("way", "threads", "level")
    own = {n: v for n, v in case.parameters.items() if n not in how}
    try:
        with _called(*(case.parameters[n] for n in how)):
            if not judge(case.subject.build(**own), case.parameters["seed"]):
                return "empty"
    except (Refused, NotImplementedError):
        return "refused"
    except Difference as difference:
        return str(difference)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:300]} ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
    return None


def draw_case(subjects: Mapping[str, Subject], rng: random.Random, fixed: Mapping[str, Any] | None = None) -> Case:
    """A case of any subject; `fixed` parameters have that value where the subject has them."""
    subject = rng.choices(list(subjects.values()), [s.weight for s in subjects.values()])[0]
    space = {**COMMON, **subject.space}
    drawn = {name: choice.draw(rng) for name, choice in space.items()}
    return Case(subject, {**drawn, **{n: v for n, v in (fixed or {}).items() if n in space}})


def shrunk(case: Case, attempts: int = 150, attempt: Callable[[Case], str | None] = attempt) -> tuple[Case, str]:
    """The simplest case found that fails, and what it says."""
    message = attempt(case) or "fails no more"
    again = True
    while again:
        again = False
        for name, choice in case.space.items():
            if name == "seed":
                continue
            for value in choice.simpler(case.parameters[name]):
                attempts -= 1
                if attempts < 0:
                    return case, message
                other = Case(case.subject, {**case.parameters, name: value})
                said = attempt(other)
                if said not in FINE:
                    case, message, again = other, str(said), True
                    break
    return case, message


def check(subject: str, **parameters: Any) -> None:
    """Repeat a case, of which parameters that are not given have their first choice."""
    from .subjects import SUBJECTS

    space = {**COMMON, **SUBJECTS[subject].space}
    case = Case(SUBJECTS[subject], {**{n: choice.first for n, choice in space.items()}, **parameters})
    said = attempt(case)
    if said not in FINE:
        raise Difference(said)


def run(
    subjects: Mapping[str, Subject], cases: int, seed: int, fixed: Mapping[str, Any] | None = None
) -> tuple[Counter[str], list[tuple[Case, str]]]:
    """Draw and run cases in this process.

    Returns:
        How many of each subject were compared, refused and empty; the cases that fail, made simple.
    """
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    failed: list[tuple[Case, str]] = []
    for _ in range(cases):
        case = draw_case(subjects, rng, fixed)
        said = attempt(case)
        counts[said if said in FINE and said else case.subject.name] += 1
        if said not in FINE:
            failed.append(shrunk(case))
    return counts, failed
