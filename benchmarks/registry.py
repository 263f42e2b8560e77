"""The one registry of cases: what is computed, on which inputs, by whom, and what it has to reach.

A case family is a module ``benchmarks/cases_<family>.py`` that calls :func:`register` at import.
Adding a family means adding the module and its name to ``FAMILIES``; nothing else knows them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# The name of this package's provider with its defaults.
OURS = "contrastive_ops"

FAMILIES = (
    "cases_softmax",
    "cases_multi_positive",
    "cases_sigmoid",
    "cases_partition",
    "cases_topk",
    "cases_routing",
    "cases_late_interaction",
    "cases_distillation",
    "cases_self_distillation",
    "cases_metrics",
    "cases_values",
    "cases_matryoshka",
    "cases_linear_log_prob",
    "cases_scaling",
    "cases_gpu",
)

# Kinds of providers that show what the machine can do and have no answer to check.
FLOORS = ("matmul", "read")

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Relative error of loss and gradients above which a provider computes something else. The bf16
# value is wide because torch itself is several percent off there; the tables print the errors.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

# Extra memory of a memory case, and the rows that its batch repeats.
PEAK_MIB = 256
COPY_ROWS = 2048

# What --quick and the pytest-benchmark level shrink every case to: large enough for more than one
# tile and chunk, small enough for a second. M is the length of a corpus that queries search,
# T a number of tokens, V of words, F the hidden size of an expert, A and B tokens of a query and of a document.
QUICK_SHAPES = {"N": 192, "M": 2048, "D": 48, "T": 512, "V": 800, "F": 96, "A": 8, "B": 20}


@dataclass(frozen=True)
class Inputs:
    """What every provider of a case gets: the tensors it differentiates, plain numbers, and tensors
    that nobody differentiates, such as labels.

    ``copies`` says that the rows of each matrix are that many copies of the first ones, one block
    after the other. Batches of copies have an exact truth at any size (see ``truth.py``).
    """

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, float] = field(default_factory=dict)
    copies: int = 1
    frozen: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, float | Tensor]:
        """All that a loss takes beside the tensors it differentiates."""
        return {**self.constants, **self.frozen}


@dataclass(frozen=True)
class Outcome:
    """What a loss answers: its value, and its gradients by the name of the input."""

    loss: Tensor
    grads: Mapping[str, Tensor]

    @property
    def answers(self) -> tuple[Tensor, ...]:
        """What the caller wants to have; its bytes are not extra memory."""
        return tuple(self.grads.values())


@dataclass(frozen=True)
class Lists:
    """What a search answers: for every row the columns with the highest scores, best first.

    ``indices`` (N, k) int64 has -1 behind the columns of a list that is shorter; ``values`` are their
    scores. ``same_as`` are the lists that these must equal column by column, beyond what the truth,
    which allows for rounding, asks for.
    """

    values: Tensor
    indices: Tensor
    same_as: Lists | None = None

    @property
    def answers(self) -> tuple[Tensor, ...]:
        """What the caller wants to have; its bytes are not extra memory."""
        return self.values, self.indices


@dataclass(frozen=True)
class Scores:
    """The truth of a search: every score, -inf where a pair takes no part, and the k best of each row."""

    scores: Tensor
    best: Tensor


Answer = Outcome | Lists
Truth = Outcome | Scores
Step = Callable[[], "Answer | None"]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    ``build(inputs)`` imports what it needs (ImportError: the provider is named as missing) and
    returns a step: one forward and backward from fresh leaves, or one search. ``kind`` is "ours",
    "torch", "peer", or one of ``FLOORS``: "matmul" for the bare matrix products of the case, "read"
    for reading its corpus once. A step that returns None is not checked: that of a floor, or that of
    a peer which can only do a part of the case and says so in its name.

    ``starves``: lists that are too short are counted, where they would make another provider wrong.
    """

    name: str
    build: Callable[[Inputs], Step]
    kind: str = "peer"
    package: str = "torch"
    optional: bool = False
    starves: bool = False


@dataclass(frozen=True)
class Target:
    """A number to reach, from one row of the design (``row`` names it in ``targets.py``).

    metric "faster": time(against) / time(ours) >= bound
           "time":   time(ours) / time(against) <= bound
           "memory": extra memory(ours) / extra memory(against) <= bound
           "peak":   extra memory(ours) in MiB <= bound
           "error":  relative gradient error(ours) <= bound
           "starved": rows of ours whose list is shorter than it could be <= bound
    """

    row: str
    metric: str
    bound: float
    ours: str = OURS
    against: str | None = None


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype, with everybody who can compute it.

    ``flops`` is what the op cannot do without (multiply-add = 2), so a provider's share of the
    machine's matmul rate may exceed 1 where it needs fewer products or multiplies faster.
    ``measure`` says which numbers are wanted: "time", "memory" or both.
    """

    op: str
    shapes: Mapping[str, int]
    dtype: torch.dtype
    make_inputs: Callable[[Case], Inputs]
    truth: Callable[[Inputs], Truth]
    providers: tuple[Provider, ...]
    baseline: str
    flops: Callable[[Mapping[str, int]], float]
    tolerance: float
    targets: tuple[Target, ...] = ()
    measure: tuple[str, ...] = ("time", "memory")
    copies: int = 1
    device: str = "cpu"

    @property
    def shape_text(self) -> str:
        """The shapes as people read them: ``N=4096 D=768``."""
        return " ".join(f"{letter}={size}" for letter, size in self.shapes.items())

    @property
    def name(self) -> str:
        """The key of the case in the registry and in the CSV."""
        shape = "-".join(f"{letter}{size}" for letter, size in self.shapes.items())
        suffix = "" if self.device == "cpu" else f"-{self.device}"
        return f"{self.op}-{DTYPE_NAMES[self.dtype]}-{shape}{suffix}"

    def provider(self, name: str) -> Provider:
        """The provider of that name."""
        for provider in self.providers:
            if provider.name == name:
                return provider
        raise KeyError(f"case {self.name} has no provider {name!r}")

    def shrunk(self) -> Case:
        """The same case at a size that takes milliseconds, under its own name."""
        shapes = {k: min(size, QUICK_SHAPES.get(k, size)) for k, size in self.shapes.items()}
        return replace(self, shapes=shapes, copies=min(self.copies, 2))


def memory_case(row: str, like: Case, n: int, d: int) -> Case:
    """The op of another case where one matrix of logits would take GiBs: peak memory and errors only.

    ``row`` is the row of the design that its target belongs to.
    """
    return replace(
        like,
        shapes={"N": n, "D": d},
        providers=(like.provider(OURS),),
        baseline=OURS,
        targets=(Target(row, "peak", PEAK_MIB, OURS),),
        measure=("memory",),
        copies=n // COPY_ROWS,
    )


_CASES: dict[str, Case] = {}


def register(*cases: Case) -> None:
    """Adds cases; a name may be used once."""
    for case in cases:
        if case.name in _CASES:
            raise ValueError(f"benchmark case {case.name!r} is registered twice")
        _CASES[case.name] = case


def all_cases() -> dict[str, Case]:
    """Every registered case by name, in the order of registration."""
    for family in FAMILIES:
        importlib.import_module(f"benchmarks.{family}")
    return dict(_CASES)


def representatives(cases: Iterable[Case]) -> dict[str, Case]:
    """One registered case, that with the most providers, for each small shape that cases shrink to, by its name."""
    found: dict[str, Case] = {}
    for case in cases:
        name = case.shrunk().name
        if name not in found or len(case.providers) > len(found[name].providers):
            found[name] = case
    return found


def select(op: str | None = None, case: str | None = None, device: str | None = None) -> list[Case]:
    """The cases of one op, and/or whose name contains ``case``, and/or of one device."""
    wanted = {"op": op, "device": device}
    found = [
        c
        for c in all_cases().values()
        if all(value is None or getattr(c, name) == value for name, value in wanted.items())
        and (case is None or case in c.name)
    ]
    if not found:
        raise ValueError(f"no benchmark case matches op={op!r} case={case!r} device={device!r}; see --list")
    return found
