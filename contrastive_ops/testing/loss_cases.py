"""One loss with inputs of any size, and its arguments that are made of several tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.rules import Pairs
from ..losses import RunningDenominator
from ..ops.token_sets import TokenSets
from .draws import Draw

Inputs = dict[str, Tensor]


def _mean(inputs: Inputs, rows: Tensor) -> Tensor:
    return rows.sum() / (inputs["weight"].sum() if "weight" in inputs else rows.shape[0])


def mean_over_positives(inputs: Inputs, rows: Tensor) -> Tensor:
    """The mean of what rows have over all their positives, each once."""
    labels = inputs["labels"] if "labels" in inputs else inputs["segments"]
    number = (labels[:, None] == labels).sum(1) - 1
    return (rows * number).sum() / number.sum()


@dataclass(eq=False)
class LossCase:
    """One loss, or an important variant of it.

    Attributes:
        function: the public function.
        tensors: how each of its tensors is drawn; the first is a matrix that the rows of the loss belong to.
        options: keyword arguments that are no tensors.
        arrange: makes the keyword arguments out of the tensors where they are others.
        mean: what reduction="mean" makes of the rows of the loss.
        copies: rows of the loss for each row of the batch.
        reductions: which it has.
        permutes: whether its rows follow a permutation of the batch; not where a tensor names rows by number.
        keeps_scores: whether it keeps a matrix of scores for backward, which is small next to the tokens of its rows.
    """

    function: Callable[..., Any]
    tensors: Mapping[str, Callable[[Draw], Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)
    arrange: Callable[[Inputs], dict[str, Any]] = dict
    mean: Callable[[Inputs, Tensor], Tensor] = _mean
    copies: int = 1
    reductions: tuple[str, ...] = ("mean", "sum", "none")
    permutes: bool = True
    keeps_scores: bool = False

    def __post_init__(self) -> None:
        """Read which common options the function has."""
        parameters = inspect.signature(self.function).parameters
        self.takes_backend = "backend" in parameters
        self.takes_memory_budget = "memory_budget" in parameters
        self.takes_weight = "weight" in parameters

    def inputs(self, rows: int, depth: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
        """Draw the tensors for a batch of `rows`; those that the loss is differentiated by require a gradient."""
        draw = Draw(rows, depth, dtype, seed)
        return {name: make(draw) for name, make in self.tensors.items()}

    def __call__(self, inputs: Inputs, reduction: str = "mean", backend: str = "auto", **options: Any) -> Tensor:
        """Return the loss of tensors that `inputs` has drawn; `options` replace arguments of the case."""
        given = {**self.options, **self.arrange(inputs), "reduction": reduction, **options}
        if self.takes_backend:
            given["backend"] = backend
        value = self.function(**given)
        return value[0] if isinstance(value, tuple) else value  # the second are diagnostics


def leaves(inputs: Inputs) -> list[Tensor]:
    """The tensors that a loss is differentiated by."""
    return [t for t in inputs.values() if t.requires_grad]


# ---- Arguments that are made of tensors ----------------------------------------------------------------------------


def _without(inputs: Inputs, *names: str) -> dict[str, Any]:
    return {name: t for name, t in inputs.items() if name not in names}


def rules(inputs: Inputs) -> dict[str, Any]:
    """Pairs of one id are no negatives, nor are those above a bound."""
    pairs = Pairs(differ=(inputs["ids"], inputs.get("col_ids", inputs["ids"])), below=0.8)
    return {**_without(inputs, "ids", "col_ids"), "pairs": pairs}


def view_rules(inputs: Inputs) -> dict[str, Any]:
    """The same for the rows of two views."""
    ids = inputs["ids"].repeat(2)
    return {**_without(inputs, "ids"), "pairs": Pairs(differ=(ids, ids), below=0.8)}


def _indptr(lists: Tensor) -> Tensor:
    return torch.arange(lists.shape[0] + 1, device=lists.device) * lists.shape[1]


def soft_targets(inputs: Inputs) -> dict[str, Any]:
    """The shares of each row as lists."""
    lists = inputs["indices"]
    targets = (_indptr(lists), lists.flatten(), inputs["shares"].flatten())
    return {**_without(inputs, "indices", "shares"), "targets": targets}


def graded_lists(inputs: Inputs) -> dict[str, Any]:
    """Lists of graded pairs, as one list with its beginnings."""
    lists = inputs["target"]
    flat = {"target": lists.flatten(), "grades": inputs["grades"].flatten(), "indptr": _indptr(lists)}
    return {**inputs, **flat}


def masked(inputs: Inputs) -> dict[str, Any]:
    """Documents whose mask leaves out some tokens."""
    documents = TokenSets(inputs["documents"], inputs["mask"])
    return {**_without(inputs, "mask"), "documents": documents}


def prefixes(inputs: Inputs) -> dict[str, Any]:
    """A few prefixes of whatever depth the inputs have; the last column takes no part where there are enough."""
    depth = next(iter(inputs.values())).shape[1]
    pairs = {"pairs": Pairs(differ=(inputs["ids"], inputs["ids"]))} if "ids" in inputs else {}
    return {**_without(inputs, "ids"), **pairs, "dims": sorted({1, depth // 3, max(depth - 1, 0)} - {0})}


def state(inputs: Inputs) -> dict[str, Any]:
    """Running denominators, a copy for every step: one that is stored could not be repeated."""
    state = RunningDenominator(0)
    state.log_u = inputs["log_u"].clone()
    return {**_without(inputs, "log_u"), "state": state}
