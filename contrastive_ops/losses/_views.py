"""What losses of two views of N samples share: their rows are stacked, and each is compared with all others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.records import changed
from ..core.rules import Pairs
from . import _arguments
from ._columns import check_filters
from ._sweep import Sweep


class Views(NamedTuple):
    """Both views as rows of one matrix.

    Attributes:
        z: (2 N, D), the rows of z0, then those of z1.
        partner: (2 N,) the row of each one's other view.
        weight: (2 N,) or None.
        sweep: what drops each row from its own columns.
        filtered: whether the caller has rules, so that rows differ in the number of their negatives.
    """

    z: Tensor
    partner: Tensor
    weight: Tensor | None
    sweep: Sweep
    filtered: bool


def stacked(
    function: str,
    z0: Tensor,
    z1: Tensor,
    default_temperature: float,
    *,
    weight: Tensor | None,
    pairs: Pairs | None,
    col_bias: Tensor | None = None,
    normalize: bool,
    memory_budget: int | None,
    backend: str,
    **scale_and_reduction: Any,
) -> Views:
    """Check what every loss of two views takes, and stack them."""
    z0, z1, scale = _arguments.two_sides(
        function,
        (("z0", z0), ("z1", z1)),
        default_temperature=default_temperature,
        normalize=normalize,
        partners=True,
        **scale_and_reduction,
    )
    count = z0.shape[0]
    check_filters(function, pairs, col_bias, 2 * count, "z0", z0)
    z, partner = torch.cat([z0, z1]), torch.arange(2 * count, device=z0.device).roll(count)
    unit = _arguments.in_sweep(normalize, z)
    rules = without_itself(function, pairs)
    sweep = Sweep((function, "z0", "z1"), scale, rules, col_bias, unit, memory_budget, backend)
    return Views(z, partner, weight_of_views(function, weight, z0), sweep, pairs is not None)


def without_itself(function: str, pairs: Pairs | None) -> Pairs:
    """The rules, and that no row is compared with itself."""
    if pairs is None:
        return Pairs(diagonal=0)
    if pairs.diagonal not in (None, 0):
        raise ValueError(
            f"{function}: pairs.diagonal must be None, got {pairs.diagonal}: the one that there is drops each row "
            "from its own columns\n  use exclude, or ids in differ"
        )
    if pairs.fill is not None:
        raise ValueError(
            f"{function}: pairs.fill must be None, got {pairs.fill}: each row would meet itself with that logit"
        )
    return changed(pairs, diagonal=0)


def weight_of_views(function: str, weight: object, z0: Tensor) -> Tensor | None:
    """(2 N,) weight of each row; what is given may be (N,), of samples."""
    if weight is None:
        return None
    weight, count = checks.check_tensor(function, "weight", weight), z0.shape[0]
    if weight.shape == (count,):
        _arguments.check_weight(function, weight, count, "z0", z0)
        return weight.repeat(2)
    if weight.shape != (2 * count,):
        raise ValueError(
            f"{function}: weight must have shape ({count},), of samples, or ({2 * count},), of their views, "
            f"got {checks.shape(weight)}"
        )
    _arguments.check_weight(function, weight, 2 * count, "z0", z0)
    return weight
