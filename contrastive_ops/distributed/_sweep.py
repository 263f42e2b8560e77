"""Folds of the similarities of this rank's rows and the columns of all ranks.

    gather   the columns of all ranks come here, one sweep folds them; what it found of columns goes to their owners
    ring     blocks of columns go round, each is swept while the next one travels; backward sends them round again

Each pair is computed on one rank, for both directions. Parts of a fold are merged in the order of the ranks, wherever
and whenever they were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.fold_kinds import FOLDS
from ..core.folds import Fold, Folded, as_fold
from ..core.numerics import merge_lse
from ..core.problem import Problem
from ..core.records import changed
from ..core.rule_slices import columns_of
from ..core.rules import Pairs, given
from ..losses._sweep import Sweep
from ..ops.similarity_loss import similarity_loss
from ..ops.similarity_reduce import directions, fold
from ..reference.row_losses import FOLDS as FOLDS_OF_ROWS
from ..reference.row_losses import Terms, reduced, row_losses
from ..reference.similarity_loss import usual_target
from ._collectives import gather_rows, send_to_owners, sum_over_ranks
from ._groups import Shards
from ._ring import ring

SCHEDULES = ("auto", "gather", "ring")
# What "auto" lets the gathered columns and their gradient take; the same on all ranks, whatever room they have.
GATHERED_BYTES = 4 << 30


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardedSweep(Sweep):
    """The sweeps of a loss whose rows and columns are spread over ranks; what is given and returned is this rank's.

    Attributes:
        rows: the shards of x.
        columns: the shards of y.
        schedule: "gather" or "ring".
    """

    rows: Shards
    columns: Shards
    schedule: str
    __match_args__ = (*Sweep.__match_args__, "rows", "columns", "schedule")  # without them `changed` would lose these

    def fold(
        self, x: Tensor, y: Tensor | None = None, *reduce: str | Fold, dim: int | tuple[int, ...] = 1, **options: Any
    ) -> Folded:
        """Fold this rank's rows, with the columns of all, and its columns, with the rows of all.

        Without y the rows of x are compared with those of all ranks. A target is one of the columns of this rank.
        """
        y = x if y is None else y
        given: dict[str, Any] = dict.fromkeys(("target", "row_bias", "col_scale"))
        given.update(self._shared(), col_bias=self.col_bias, dim=dim, **options)
        known: dict[int, Pairs | None] = {}
        folds = tuple(as_fold(self.names[0], request) for request in reduce)
        given["reduce"] = tuple(changed(fold, pairs=self.global_pairs(fold.pairs, known)) for fold in folds)
        given["pairs"] = self.global_pairs(given["pairs"], known)
        for name in ("col_scale", "col_bias"):
            given[name] = self.gathered(given[name])
        folded = self._ring(x, y, given) if self.schedule == "ring" else self._gather(x, y, given)
        return self._to_owners(folded, [fold.name for fold in folds])

    def loss(self, kind: str, x: Tensor, y: Tensor | None, **options: Any) -> Tensor:
        """The losses of this rank's rows, or their sum.

        A target is counted from the first column of this rank; that of another rank is for "gather" alone. Gathered
        columns are swept in one operator where rows alone are folded: it forms gradients in the forward pass.
        """
        target = options.pop("target", None)
        target = usual_target(x, y) if target is None else target
        if self.schedule == "gather" and kind != "softmax_both":
            given = {**self._shared(), **options}
            for name in ("pairs", "positives"):
                given[name] = self.global_pairs(given.get(name))
            given |= {"target": target + self.columns.offset, "col_bias": self.gathered(self.col_bias)}
            problem = self._taken(x, self.gathered(x if y is None else y), given)
            return similarity_loss(problem, kind=kind, **given)
        reduction = options.pop("reduction")
        terms = Terms(**{name: options.pop(name, None) for name in ("weight", "extra", "target_weight")})
        both = kind == "softmax_both"
        folded = self.fold(x, y, FOLDS_OF_ROWS[kind][0].kind, dim=(0, 1) if both else 1, target=target, **options)
        losses = row_losses(kind, (*folded.rows, *folded.cols), folded.target, terms)
        return reduced(losses, folded.target, terms, reduction)

    def sums_of_all(self, sums: Tensor) -> Tensor:
        """See `Sweep.sums_of_all`."""
        return sum_over_ranks(sums, self.rows.team)

    def gathered(self, values: Any) -> Any:
        """The values of all columns, where there is one for each."""
        return gather_rows(values, self.columns) if isinstance(values, Tensor) and values.dim() else values

    def global_pairs(self, pairs: Pairs | None, known: dict[int, Pairs | None] | None = None) -> Pairs | None:
        """Rules for this rank's rows and the columns of all; of rules that were made before, the same object."""
        if pairs is None:
            return None
        known = {} if known is None else known
        if id(pairs) not in known:
            rules = {rule.name: rule.map(value, lambda part: part, self._gathered_rule) for rule, value in given(pairs)}
            if pairs.diagonal is not None:
                rules["diagonal"] = pairs.diagonal + self.rows.offset
            known[id(pairs)] = changed(pairs, **rules)
        return known[id(pairs)]

    def _gathered_rule(self, part: Tensor) -> Tensor:
        return gather_rows((part if part.is_floating_point() else part.to(torch.int64)).detach(), self.columns)

    def _gather(self, x: Tensor, y: Tensor, options: dict[str, Any]) -> Folded:
        target = options["target"]
        options = {**options, "target": None if target is None else target + self.columns.offset}
        return fold(self._taken(x, gather_rows(y, self.columns), options), **options)

    def _taken(self, x: Tensor, y: Tensor, options: dict[str, Any]) -> Problem:
        """The matrices with the biases and the target, which are taken out of the options."""
        return Problem.of(self.names, x, y, *(options.pop(each, None) for each in ("row_bias", "col_bias", "target")))

    def _ring(self, x: Tensor, y: Tensor, options: dict[str, Any]) -> Folded:
        """Backward differentiates by `tensors` beside x and y, which each block takes in place of the options."""
        tensors = {name: options[name] for name in ("scale", "row_bias", "col_scale", "col_bias")}
        tensors |= {str(place): each.scale for place, each in enumerate(options["reduce"])}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}

        def block(owner: int, x: Tensor, y: Tensor, here: dict[str, Tensor]) -> Folded:
            given = self._of_block(owner, {**options, **here})
            return fold(self._taken(x, y, given), **given)

        folds = len(options["reduce"])
        by_rows, by_cols = directions(self.names[0], options["dim"])
        folded = ring(block, x, y, tensors, self.columns, (folds * by_rows, folds * by_cols))
        return merged_rows(folded, [each.name for each in options["reduce"]])

    def _of_block(self, owner: int, options: dict[str, Any]) -> dict[str, Any]:
        """The options for the columns of one rank."""
        begin, end = self.columns.begins[owner : owner + 2]
        known: dict[int, Pairs | None] = {}

        def rules(pairs: Pairs | None) -> Pairs | None:
            return known.setdefault(id(pairs), columns_of(pairs, begin, end))

        folds = [
            changed(each, pairs=rules(each.pairs), scale=options.pop(str(place), each.scale))
            for place, each in enumerate(options["reduce"])
        ]
        for name in ("col_scale", "col_bias"):
            values = options[name]
            options[name] = values[begin:end] if isinstance(values, Tensor) and values.dim() else values
        target = options["target"] if owner == self.columns.team.rank else None
        return {**options, "reduce": tuple(folds), "pairs": rules(options["pairs"]), "target": target}

    def _to_owners(self, folded: Folded, kinds: list[str]) -> Folded:
        """In place of what this rank found of all columns, what all ranks found of the columns of this one."""
        if not folded.cols:
            return folded
        parts = send_to_owners(torch.stack(folded.cols, 1), self.columns).unbind(2)
        offset = self.rows.offset
        winners = tuple(
            send_to_owners(torch.where(winner < 0, winner, winner + offset), self.columns)
            if FOLDS[kind].has_winner
            else winner
            for kind, winner in zip(kinds, folded.col_argmax, strict=True)
        )
        cols, col_argmax = merged(kinds, parts, winners)
        return folded._replace(cols=cols, col_argmax=col_argmax)


def merged_rows(folded: Folded, kinds: list[str]) -> Folded:
    """Of (ranks, rows) parts of each fold of rows, which they are of all columns."""
    rows, row_argmax = merged(kinds[: len(folded.rows)], folded.rows, folded.row_argmax)
    return folded._replace(rows=rows, row_argmax=row_argmax)


def merged(
    kinds: Sequence[str], parts: Sequence[Tensor], winners: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The folds and their winners from (ranks, ...) parts of each, in the order of the ranks."""
    found = [_merged_one(*each) for each in zip(kinds, parts, winners, strict=True)]
    return tuple(value for value, _ in found), tuple(winner for _, winner in found)


def _merged_one(kind: str, parts: Tensor, winners: Tensor) -> tuple[Tensor, Tensor]:
    if FOLDS[kind].has_winner:  # the first of the largest
        best = parts.detach().argmax(0, keepdim=True)
        return parts.gather(0, best)[0], winners.gather(0, best)[0]
    return (merge_lse(*parts.unbind()) if kind == "logsumexp" else parts.sum(0)), winners
