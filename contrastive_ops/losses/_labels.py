"""Positives and negatives from labels: pairs of equal and of different label, and one positive for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.records import changed
from ..core.rules import Pairs
from . import _arguments
from ._columns import check_pairs
from ._rules import refuse


def labelled(
    function: str,
    x: Tensor,
    labels: Tensor,
    y: Tensor | None,
    col_labels: Tensor | None,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    default_temperature: float,
    reduction: str,
    weight: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor | None, float | Tensor, Pairs, Pairs]:
    """Return x, y and the scale, and the pairs of different and of the same label."""
    common: dict[str, Any] = {
        "temperature": temperature,
        "scale": scale,
        "default_temperature": default_temperature,
        "reduction": reduction,
        "weight": weight,
        "normalize": normalize,
    }
    if (y is None) != (col_labels is None):
        missing, given = ("col_labels", "y") if col_labels is None else ("y", "col_labels")
        raise ValueError(f"{function}: {missing} must be given together with {given}, got {given} alone")
    if y is None:
        x, factor = _arguments.one_side(function, "x", x, **common)
    else:
        x, y, factor = _arguments.two_sides(function, (("x", x), ("y", y)), anchors=1, **common)
    labels = checks.check_index(function, "labels", labels, x.shape[0], "x", x)
    if y is None or col_labels is None:
        ids, diagonal = (labels, labels), 0
        return x, y, factor, Pairs(diagonal=diagonal, differ=ids), Pairs(diagonal=diagonal, same=ids)
    col_labels = checks.check_index(function, "col_labels", col_labels, y.shape[0], "y", y)
    ids = (labels, col_labels)
    return x, y, factor, Pairs(differ=ids), Pairs(same=ids)


def other_labels(function: str, pairs: Pairs | None, others: Pairs, with_itself: bool) -> Pairs:
    """The rules of the caller for pairs of different label."""
    check_pairs(function, pairs)
    if pairs is None:
        return others
    reasons = {"differ": "labels take its place", "fill": "positives would be filled too"}
    if with_itself:
        reasons["diagonal"] = "no row is compared with itself"
    refuse(function, "pairs", pairs, reasons)
    diagonal = others.diagonal if pairs.diagonal is None else pairs.diagonal
    return changed(pairs, differ=others.differ, diagonal=diagonal)


def one_positive(labels: Tensor, col_labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """A column with each row's label, not its own, and the number of such columns.

    Where there is none the first is any column; it is None where there are no columns at all.
    """
    known = labels if col_labels is None else col_labels
    columns = known.shape[0]
    if columns == 0:  # "not columns" would fix a traced size
        return None, torch.zeros_like(labels)
    order = known.argsort(stable=True)
    ascending, wanted = known[order], labels.contiguous()
    begin, end = (torch.searchsorted(ascending, wanted, right=right) for right in (False, True))
    count, chosen = end - begin, begin
    if col_labels is None:
        # The next one of the same label, after the last one the first again.
        place = torch.empty_like(order).scatter_(0, order, torch.arange(columns, device=order.device)) + 1
        count, chosen = count - 1, torch.where(place < end, place, begin)
    # A label above all others stands past the end; clamping to a traced size would fix the size.
    return torch.cat([order, order[:1]])[chosen], torch.where(labels == -1, 0, count)
