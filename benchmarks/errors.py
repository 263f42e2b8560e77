"""How far the answer of a provider is from the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Answer, Lists, Outcome, Scores, Truth


@dataclass(frozen=True)
class Errors:
    """How far an answer is from the truth.

    ``value``: relative error of the loss, or error of the scores of lists, which is infinite where a
    list has a column that may not be there. ``grads``: relative error of the worst gradient, None for
    lists. ``starved``: rows with fewer columns than there are to find, None for losses.
    """

    value: float
    grads: float | None = None
    starved: int | None = None

    @property
    def worst(self) -> float:
        """The larger error; NaN if one is."""
        return _largest([self.value] if self.grads is None else [self.value, self.grads])


def errors(answer: Answer, truth: Truth) -> Errors:
    """Errors of a loss and its gradients, relative and in the 2-norm, or of lists."""
    if isinstance(answer, Lists) and isinstance(truth, Scores):
        return _errors_of_lists(answer, truth)
    if not isinstance(answer, Outcome) or not isinstance(truth, Outcome):
        raise TypeError(f"a truth of type {type(truth).__name__} cannot judge {type(answer).__name__}")
    missing = truth.grads.keys() - answer.grads.keys()
    if missing:
        raise ValueError(f"the provider returns no gradient for {sorted(missing)}")
    worst = _largest([_relative(answer.grads[name], grad) for name, grad in truth.grads.items()])
    return Errors(_relative(answer.loss, truth.loss), worst)


def _largest(numbers: list[float]) -> float:
    """The maximum; NaN if one is, where Python's depends on the order."""
    return torch.tensor(numbers, dtype=torch.float64).max().item()


def _errors_of_lists(lists: Lists, truth: Scores) -> Errors:
    """The j-th column of a row must have the j-th best score, and the score that is given for it.

    Columns with equal scores, up to rounding, may so stand for each other, in the list and at its end.
    """
    indices, values = lists.indices, lists.values.double()
    if indices.shape != truth.best.shape or values.shape != truth.best.shape:
        raise ValueError(
            f"lists must have shape {tuple(truth.best.shape)}, got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    listed = indices >= 0
    starved = int((listed.sum(1) < truth.best.isfinite().sum(1)).sum())
    if _malformed(indices, truth.scores.shape[1]) or not _equal_sets(lists, lists.same_as):
        return Errors(torch.inf, starved=starved)
    chosen = truth.scores.gather(1, indices.clamp_min(0))
    off = torch.maximum((chosen - truth.best).abs(), (values - truth.best).abs())
    # NaN is also inf - inf, of a column that takes no part listed where nothing is left to find.
    off = off.nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(~listed, 0)
    return Errors(off.max().item(), starved=starved)


def _malformed(indices: Tensor, columns: int) -> bool:
    """Whether a list names a column twice or one that does not exist, or has one behind its end."""
    ordered = indices.sort(1).values
    twice = (ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)
    behind = (indices >= 0).int().diff(dim=1) > 0
    return bool(twice.any() or behind.any() or (indices >= columns).any())


def _equal_sets(lists: Lists, other: Lists | None) -> bool:
    """Whether every row has the columns of the other lists, if there are any."""
    return other is None or torch.equal(lists.indices.sort(1).values, other.indices.sort(1).values)


def _relative(value: Tensor, truth: Tensor) -> float:
    difference = value.detach().to(truth.device, torch.float64) - truth
    norm = truth.norm().item()
    return difference.norm().item() / norm if norm else difference.norm().item()
