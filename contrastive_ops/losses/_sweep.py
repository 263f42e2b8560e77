"""What the sweeps of one loss share: names, scale, rules, bias, memory and backend, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.folds import Fold, Folded, as_fold
from ..core.numerics import merge_lse
from ..core.problem import Problem
from ..core.records import changed
from ..core.rules import Pairs
from ..ops.similarity_loss import similarity_loss
from ..ops.similarity_reduce import fold


@dataclass(frozen=True, eq=False)
class Sweep:
    """The arguments that all sweeps of one loss have in common.

    Attributes:
        names: the loss, its rows and its columns, for errors.
        scale: float, 0-d or (N,).
        pairs: rules for the columns.
        also: rules of more columns, where one set cannot say both; no pair obeys both. For `fold_rows`.
        col_bias: (M,), added to the logits of each column.
        unit: rows of both matrices count as if they had length 1; see `_arguments.in_sweep`.
        memory_budget: as in `similarity_reduce`.
        backend: as in `similarity_reduce`.
    """

    names: tuple[str, str, str]
    scale: float | Tensor
    pairs: Pairs | None = None
    col_bias: Tensor | None = None
    unit: bool = False
    memory_budget: int | None = None
    backend: str = "auto"
    also: Pairs | None = None

    def fold_rows(
        self, x: Tensor, y: Tensor | None, *reduce: str | Fold, of_sets: tuple[Fold, ...] = (), **options: Any
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Fold the rows over all columns that take part by either set of rules.

        Args:
            x: (N, D).
            y: (M, D) or None.
            reduce: folds without rules of their own.
            of_sets: more folds, which have their own.
            options: as in `similarity_reduce`.

        Returns:
            What `reduce` and what `of_sets` found, and the targets' logits.
        """
        if self.also is None:
            found = self.fold(x, y, *reduce, *of_sets, **options)
            return list(found.rows[: len(reduce)]), list(found.rows[len(reduce) :]), found.target
        end, folds = len(reduce), [as_fold(self.names[0], each) for each in reduce]
        found = self.fold(x, y, *folds, *(changed(each, pairs=self.also) for each in folds), *of_sets, **options)
        merged = [
            merge_lse(*both) if each.name == "logsumexp" else both[0] + both[1]
            for each, both in zip(folds, zip(found.rows[:end], found.rows[end : 2 * end], strict=True), strict=True)
        ]
        return merged, list(found.rows[2 * end :]), found.target

    def fold(
        self, x: Tensor, y: Tensor | None = None, *reduce: str | Fold, dim: int | tuple[int, ...] = 1, **options: Any
    ) -> Folded:
        """Fold the rows (and columns) of x against y, or of x against itself; `options` as in `similarity_reduce`."""
        return fold(self._problem(x, y, options), reduce=reduce, dim=dim, **self._shared(), **options)

    def loss(self, kind: str, x: Tensor, y: Tensor | None, **options: Any) -> Tensor:
        """The loss of this kind as one operator; `options` as in `similarity_loss`, ``target`` and ``row_bias``."""
        return similarity_loss(self._problem(x, y, options), kind=kind, **self._shared(), **options)

    def _problem(self, x: Tensor, y: Tensor | None, options: dict[str, Any]) -> Problem:
        """The matrices with what `options` has for their rows, which is taken out of it."""
        return Problem.of(self.names, x, y, options.pop("row_bias", None), self.col_bias, options.pop("target", None))

    def sums_of_all(self, sums: Tensor) -> Tensor:
        """Sums over the rows here as those over all rows there are."""
        return sums

    def _shared(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "pairs": self.pairs,
            "unit": self.unit,
            "memory_budget": self.memory_budget,
            "backend": self.backend,
        }


# Of a `Sweep`; read here, because torch.compile does not trace how dataclasses tell them.
FIELDS = tuple(field.name for field in dataclasses.fields(Sweep))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A loss whose arguments are checked, and whose sweep may be replaced by one over many processes.

    Attributes:
        function: of (sweep, x, y) and options.
        sweep: what it sweeps with.
        x: (N, D) the rows.
        y: (M, D) the columns, or None.
        options: of the function; "weight" and "reduction" are among them.
    """

    function: Callable[..., Any]
    sweep: Sweep
    x: Tensor
    y: Tensor | None
    options: dict[str, Any]

    def loss(self) -> Any:
        """What the loss function returns."""
        return self.function(self.sweep, self.x, self.y, **self.options)
