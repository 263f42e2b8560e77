"""What rows and columns of a similarity matrix are folded to, and the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from . import checks
from .fold_kinds import FOLDS
from .results import named
from .rules import Pairs


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold of a similarity matrix, with a scale, a bias, pairs and a sign of its own.

    Args:
        name: what a row (or column) of logits becomes; ``l`` are the logits of the pairs that take part:

            ============  ======================  =====================================  ==========
            name          value                   derivative by a logit                  no pair
            ============  ======================  =====================================  ==========
            logsumexp     log sum exp(l)          softmax                                -inf
            max           max l, and its index    1 at the first of the largest          -inf, -1
            sum_softplus  sum log(1 + exp(l))     sigmoid(l)                             0
            sum_relu      sum max(l, 0)           1 where l > 0                          0
            sum           sum l                   1                                      0
            count         the number of pairs     0                                      0
            ============  ======================  =====================================  ==========

        scale: replaces the call's scale for this fold: float, 0-d or (N,) tensor.
        pairs: replaces the call's pairs for this fold.
        negate: fold -l in place of l: ``Fold("max", negate=True)`` is minus the smallest logit, and
            ``Fold("sum_softplus", negate=True)`` the sum of -log sigmoid(l).
        bias: added to the logits of this fold, beside the call's biases: float, 0-d or (N,) tensor; a constant, such as
            a margin. What needs a gradient is a ``row_bias`` of the call. Not with ``log_weight`` in its pairs.
    """

    name: str
    scale: float | Tensor | None = None
    pairs: Pairs | None = None
    negate: bool = False
    bias: float | Tensor | None = None

    def __post_init__(self) -> None:
        """Check what does not depend on the matrices."""
        checks.check_choice("Fold", "name", self.name, tuple(FOLDS))
        if self.pairs is not None and not isinstance(self.pairs, Pairs):
            raise TypeError(f"Fold: pairs must be Pairs or None, got {type(self.pairs).__name__}")
        if isinstance(self.bias, Tensor):
            checks.check_constant("Fold", "bias", self.bias)
        elif self.bias is not None:
            checks.number("Fold", "bias", self.bias, "(-inf, inf)")


@named
class Reduced(NamedTuple):
    """The results of one sweep; None where one was not asked for.

    Where `reduce` was a tuple of folds, `rows`, `cols`, `row_argmax` and `col_argmax` are tuples of one entry each.

    Attributes:
        rows: (N,) the fold of each row.
        cols: (M,) the fold of each column.
        target: (N,) the logit of each row's target.
        linear: (N,) the weighted sum of each row's list.
        row_argmax: (N,) int64, the column of each row's maximum; -1 where no pair takes part. For "max" alone.
        col_argmax: (M,) int64, the row of each column's maximum.
    """

    rows: Tensor | tuple[Tensor, ...] | None = None
    cols: Tensor | tuple[Tensor, ...] | None = None
    target: Tensor | None = None
    linear: Tensor | None = None
    row_argmax: Tensor | tuple[Tensor | None, ...] | None = None
    col_argmax: Tensor | tuple[Tensor | None, ...] | None = None


class Folded(NamedTuple):
    """What `fold` returns to losses: one entry per fold, empty where a direction was not asked for."""

    rows: tuple[Tensor, ...]
    cols: tuple[Tensor, ...]
    target: Tensor
    linear: Tensor
    row_argmax: tuple[Tensor, ...]
    col_argmax: tuple[Tensor, ...]


def as_fold(function: str, request: object) -> Fold:
    """Return what `reduce` asks for as a `Fold`."""
    if isinstance(request, str):
        checks.check_choice(function, "reduce", request, tuple(FOLDS))
        return Fold(request)
    if not isinstance(request, Fold):
        raise TypeError(f"{function}: reduce must be a name, a Fold or a tuple of these, got {type(request).__name__}")
    return request
