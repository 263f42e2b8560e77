"""Cases of the fuzzer: how they are drawn, run, made simpler and printed."""

from __future__ import annotations

import contextlib
import random
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
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
}


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
def _called(way: str, threads: int) -> Iterator[None]:
    """Plain calls past the dispatcher, or through the registered operators."""
    before, torch_threads = operators.seen_by_autograd_alone, torch.get_num_threads()
    torch.set_num_threads(threads)
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


def attempt(case: Case) -> str | None:
    """Run a case: "refused" where it asks for what there is not, None where the answer is right, or what is wrong."""
    torch.manual_seed(case.parameters["seed"])
    own = {n: v for n, v in case.parameters.items() if n not in ("way", "threads")}
    try:
        with _called(case.parameters["way"], case.parameters["threads"]):
            judge(case.subject.build(**own), case.parameters["seed"])
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


def shrunk(case: Case, attempts: int = 150) -> tuple[Case, str]:
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
                if said is not None and said != "refused":
                    case, message, again = other, said, True
                    break
    return case, message


def check(subject: str, **parameters: Any) -> None:
    """Repeat a case, of which parameters that are not given have their first choice."""
    from .subjects import SUBJECTS

    space = {**COMMON, **SUBJECTS[subject].space}
    case = Case(SUBJECTS[subject], {**{n: choice.first for n, choice in space.items()}, **parameters})
    said = attempt(case)
    if said is not None and said != "refused":
        raise Difference(said)


def run(
    subjects: Mapping[str, Subject], cases: int, seed: int, fixed: Mapping[str, Any] | None = None, tell: bool = False
) -> tuple[Counter[str], list[tuple[Case, str]]]:
    """Draw and run cases; (how many of each subject, and how many were refused; those that fail, made simple)."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    failed: list[tuple[Case, str]] = []
    for number in range(cases):
        case = draw_case(subjects, rng, fixed)
        counts[case.subject.name] += 1
        said = attempt(case)
        counts["refused"] += said == "refused"
        if said is not None and said != "refused":
            failed.append(shrunk(case))
            if tell:
                print(f"{failed[-1][0].reproducer()}\n    {failed[-1][1]}", flush=True)
        if tell and number % 500 == 499:
            print(f"{number + 1} cases, {len(failed)} failed", file=sys.stderr, flush=True)
    return counts, failed
