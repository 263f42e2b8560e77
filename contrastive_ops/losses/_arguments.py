"""What every loss does with its common arguments: scale or temperature, normalisation, weights, reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.column_lists import row_of_each
from ..core.masks import left_out, times
from ..core.ordered import ordered_sum
from ..core.unit_rows import unit_rows

if TYPE_CHECKING:
    from ..core.rules import Pairs

REDUCTIONS = ("mean", "sum", "none")


class Options(TypedDict, total=False):
    """What losses with `Diagnostics` have in common, for the overloads that tell their results apart."""

    temperature: float | Tensor | None
    scale: float | Tensor | None
    weight: Tensor | None
    reduction: str
    normalize: bool
    memory_budget: int | None
    backend: str


class SoftmaxOptions(Options, total=False):
    """The same, of a loss with label smoothing."""

    label_smoothing: float | Tensor


class RuledOptions(Options, total=False):
    """The same, of a loss that takes rules."""

    pairs: Pairs | None


class BiasedOptions(RuledOptions, total=False):
    """The same, of a loss that takes rules and a bias of columns."""

    col_bias: Tensor | None


class FilteredOptions(BiasedOptions, total=False):
    """The same, of a loss that takes rules, a bias of columns and label smoothing."""

    label_smoothing: float | Tensor


def two_sides(
    function: str,
    sides: tuple[tuple[str, Tensor], tuple[str, Tensor]],
    *,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    default_temperature: float,
    reduction: str,
    weight: Tensor | None = None,
    normalize: bool = False,
    partners: bool = False,
    anchors: int = 0,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Check what every loss takes; return both matrices, cast and as `unit_sides` leaves them, and the scale.

    Args:
        function: the loss, for errors.
        sides: the names and matrices of rows and columns.
        temperature: or `scale`; the default is `default_temperature`.
        scale: factor of the inner products.
        default_temperature: the loss's own.
        reduction: "mean", "sum" or "none".
        weight: (rows,) or None.
        normalize: scale the rows of both matrices to length 1, or let the sweep do so: see `in_sweep`.
        partners: row i of one side belongs to row i of the other, so both must have one shape.
        anchors: how many of the sides have rows that belong to the row of the loss alone, and that no other row is
            compared with: none, the first, or both. Those of weight 0 are left out.
    """
    check_reduction(function, reduction)
    (x_name, x), (y_name, y) = sides
    x, y = autocast.cast(x, y)
    checks.check_matrices(function, x_name, x, y_name, y)
    if partners:
        check_partners(function, x_name, x, y_name, y)
    if weight is not None:
        check_weight(function, weight, x.shape[0], x_name, x)
        x, y = (of_weighted(weight if side < anchors else None, each) for side, each in enumerate((x, y)))
        temperature, scale = (of_weighted(weight, each, 1) for each in (temperature, scale))
    factor = resolve_scale(function, temperature, scale, default_temperature)
    x, y = unit_sides(normalize, x, y)
    return x, y, factor


def one_side(
    function: str,
    name: str,
    x: Tensor,
    *,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    default_temperature: float,
    reduction: str,
    weight: Tensor | None = None,
    normalize: bool = False,
) -> tuple[Tensor, float | Tensor]:
    """`two_sides` for a loss that compares the rows of one matrix with each other."""
    check_reduction(function, reduction)
    (x,) = autocast.cast(x)
    checks.check_matrix(function, name, x)
    if weight is not None:
        check_weight(function, weight, x.shape[0], name, x)
    factor = resolve_scale(function, temperature, scale, default_temperature)
    (x,) = unit_sides(normalize, x)
    return x, factor


def in_sweep(normalize: bool, x: Tensor) -> bool:
    """Whether the sweep takes rows of any length as unit rows: those of 16 bits would be rounded once more.

    Such rows reach a loss as they are. `fold` and `similarity_loss` are told so by ``unit=True``, and what else reads
    them does so through `_columns.wide`.
    """
    return normalize and x.dtype in (torch.bfloat16, torch.float16)


def unit_sides(normalize: bool, *sides: Tensor) -> tuple[Tensor, ...]:
    """Rows of length 1 if asked for, unless that is left to the sweep."""
    return tuple(unit_rows(x) if normalize and not in_sweep(normalize, x) else x for x in sides)


def resolve_scale(
    function: str,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    default_temperature: float,
    prefix: str = "",
) -> float | Tensor:
    """Return the factor of the inner products; `temperature` and `scale` exclude each other.

    Args:
        function: the loss, for errors.
        temperature: or `scale`; each may be one number, in a tensor of any shape, or one of each row.
        scale: 1 / temperature.
        default_temperature: where neither is given.
        prefix: of the names of both, in errors.
    """
    if temperature is not None and scale is not None:
        raise ValueError(
            f"{function}: {prefix}temperature and {prefix}scale must not both be given "
            f"({prefix}scale = 1 / {prefix}temperature)"
        )
    if scale is not None:
        return checks.factor(function, f"{prefix}scale", scale)
    return inverse(function, f"{prefix}temperature", default_temperature if temperature is None else temperature)


def inverse(function: str, name: str, temperature: float | Tensor) -> float | Tensor:
    """Return 1 / temperature, which must be positive.

    A tensor is looked at where that costs nothing. Elsewhere, on a GPU or traced, a temperature that is not positive
    makes the scale NaN, and so the loss: turned around, it would train without a word.
    """
    if not isinstance(temperature, Tensor):
        return 1.0 / checks.number(function, name, temperature, "(0, inf]")
    value: Any = checks.factor(function, name, temperature)
    if not checks.may_read(value):
        return torch.where(value > 0, value, torch.nan).reciprocal()
    if value.numel() > 0:
        least = value.item() if value.dim() == 0 else float(value.detach().amin())
        if not least > 0:
            raise ValueError(f"{function}: {name} must be in (0, inf], got {least}")
    return value.reciprocal()


def of_weighted(weight: Tensor | None, value: Any, otherwise: float = 0) -> Any:
    """A tensor with one entry for each row, with 0, or what is given, for those of weight 0; others as they are.

    What such a row holds is left out before anything is computed from it, be it NaN or an impossible label. That goes
    for what belongs to this row alone: what other rows are compared with stays as it is.
    """
    if weight is None or not isinstance(value, Tensor):
        return value
    if value.is_quantized or checks.unreadable(value) is not None:
        return value  # is refused by the checks that follow
    if value.shape[:1] != weight.shape:
        return value
    return left_out(value, weight != 0, otherwise) if value.device == weight.device else value


def lists_of_weighted(weight: Tensor | None, indptr: Tensor, *entries: Tensor) -> tuple[Tensor, ...]:
    """Lists of the rows (indptr, and entries such as indices and grades) without those of rows of weight 0."""
    fits = all(isinstance(each, Tensor) and each.dim() == 1 for each in (indptr, *entries))
    if weight is None or not fits or indptr.dtype != torch.int64 or indptr.shape[0] != weight.shape[0] + 1:
        return indptr, *entries
    used = weight != 0
    row = row_of_each(indptr, entries[0])
    kept = (
        used[row.clamp(0, max(used.shape[0] - 1, 0))] if used.shape[0] > 0 else torch.ones_like(row, dtype=torch.bool)
    )
    if not checks.may_read(indptr, waits=True):  # which a traced program cannot drop
        return indptr, *(left_out(each, kept) for each in entries)
    lengths = torch.where(used, indptr.diff(), 0)
    return torch.cat([indptr[:1], indptr[:1] + lengths.cumsum(0)]), *(each[kept] for each in entries)


def reduce_rows(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Mean (weighted: divided by the sum of weights), sum, or the weighted rows themselves."""
    weighted = losses if weight is None else times(weight.to(losses.dtype), losses)
    if reduction == "none":
        return weighted
    total = ordered_sum(weighted)
    return total if reduction == "sum" else divide(total, losses, weight)


def divide(total: Tensor, losses: Tensor, weight: Tensor | None) -> Tensor:
    """Turn a sum into the mean; NaN for no rows, as everywhere in PyTorch, and 0 where all weights are 0."""
    if weight is not None:
        size = ordered_sum(of_weighted(weight, weight).to(total.dtype))
        return total / torch.where(size == 0, 1.0, size)
    rows = losses.shape[0]
    if isinstance(rows, int) and rows > 0 and not torch.compiler.is_compiling():
        return total / rows
    # Testing for 0 rows would fix a traced batch size, and 0 / 0 has an infinite gradient, which would reach the scale.
    count = torch.full_like(total, losses.shape[0])
    return total / count.clamp_min(1.0) + torch.where(count == 0, torch.nan, 0.0)


def mean_over(rows: Tensor, counted: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """`reduce_rows` for losses in which some rows do not count: they are 0, and the mean leaves them out.

    Where no row counts, the mean is 0 with gradient 0.
    """
    counted = counted if weight is None else counted & (weight != 0)
    rows = torch.where(counted, rows, 0.0)
    if reduction != "mean":
        return reduce_rows(rows, weight, reduction)
    share = counted.to(rows.dtype) if weight is None else left_out(weight.to(rows.dtype), counted)
    size = ordered_sum(share)
    return ordered_sum(rows * share) / torch.where(size == 0, 1.0, size)


def check_reduction(function: str, reduction: str) -> None:
    """`reduction` must be one that PyTorch knows."""
    checks.check_choice(function, "reduction", reduction, REDUCTIONS)


def check_partners(function: str, x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """Row i of one matrix belongs to row i of the other."""
    if x.shape != y.shape:
        raise ValueError(
            f"{function}: {y_name} must have the same shape as {x_name}, "
            f"got {x_name} {checks.shape(x)} and {y_name} {checks.shape(y)}"
        )


def one_or_each(function: str, name: str, value: object, interval: str, x_name: str, x: Tensor) -> float | Tensor:
    """An option in an interval, written as in `checks.number`: a number, or one of each row of `x`, differentiable.

    Numbers of the rows are in the accumulation dtype. Those that can be read are looked at.
    """
    if not isinstance(value, Tensor) or (value.numel() == 1 and not value.requires_grad):
        return checks.number(function, name, value, interval)
    size = x.shape[0]
    each = checks.one_number(function, name, value, x_name, x).expand(size) if value.numel() == 1 else value
    checks.check_vector(function, name, each, size, x_name, x)
    if checks.may_read(each):
        low, high = (float(end) for end in interval[1:-1].split(","))
        found = each.detach()
        inside = (found >= low if interval[0] == "[" else found > low) & (
            found <= high if interval[-1] == "]" else found < high
        )
        if not bool(inside.all()):
            raise ValueError(f"{function}: {name} must be in {interval}, got {float(found[~inside][0])}")
    return each.to(checks.accumulator(x.dtype))


def check_weight(function: str, weight: Tensor, size: int, x_name: str, x: Tensor, name: str = "weight") -> None:
    """`weight` must be (size,) numbers >= 0, where they can be read."""
    checks.check_vector(function, name, weight, size, x_name, x)
    if not checks.may_read(weight):
        return
    negative = weight.detach()[weight.detach() < 0]
    if negative.numel() > 0:
        raise ValueError(f"{function}: {name} must not be negative, got {float(negative[0])}")
