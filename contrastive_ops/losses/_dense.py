"""Losses of few plain rows by the reference: one matrix of logits, and no operator around it.

Without the C++ a step with few rows is host time of Python: checks, the description of a problem, a loop over chunks.
`dense_loss` finds the same numbers, bit for bit, in about as many operations as plain torch takes for the loss.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import fold_kinds
from ..core.checks import accumulator
from ..core.numerics import CHUNK_ELEMENTS
from ..core.operators import seen_by_autograd_alone
from ..core.ordered import ordered_sum
from ..core.unit_rows import inverse_lengths, parts_of
from ..ops._similarity_loss_autograd import may_give
from ..ops.similarity_reduce import kept_size
from ..reference import row_losses as rows_of
from ..reference.pairs import affine, inner_products
from ..reference.similarity_loss import in_one_pass, usual_target
from ._calls import COLUMNS, LABELLED, STACKED, Call, gradients_again
from ._labels import one_positive

# Bits of `needs`, and the places of the tensors of a `Call`.
_X, _Y, _FACTOR, _BIAS, _WEIGHT, _TARGET, _LABELS, _COL_LABELS = range(8)
_SWEPT = 15
_WIDE, _NARROW = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)


class Matrix(NamedTuple):
    """The rows and columns of a call's matrix of logits, and which of its pairs take part.

    Attributes:
        x: (N, D) of length 1 where that is asked for.
        y: (M, D), or x itself.
        inverses: 1 / the lengths of the rows that were given, x and y.
        target: (N,) the column of each row that no fold sees; None: that of the row's number.
        itself: whether no row is compared with itself.
        masks: for each set of logits the pairs that take no part.
        scale: (1,).
        bias: (N, 1) or None.
    """

    x: Tensor
    y: Tensor
    inverses: tuple[Tensor | None, Tensor | None]
    target: Tensor | None
    itself: bool
    masks: tuple[Tensor | None, ...]
    scale: Tensor
    bias: Tensor | None


def is_for_dense(form: int, x: Any, y: Any, normalize: bool, numbers: tuple[Any, ...], rows: tuple[Any, ...]) -> bool:
    """Whether all arguments fit, the pairs are few enough, and nobody but autograd watches the call.

    Args:
        form: how rows meet.
        x: the first matrix.
        y: the second one, or None.
        normalize: whether rows count as if they had length 1; then those of 16 bits are not for here.
        numbers: scale or temperature, and bias: float, tensor or None.
        rows: weight, target, labels and col_labels: tensor or None.
    """
    tensors = tuple(t for t in (x, y, *numbers, *rows) if t is not None and type(t) is not float)
    if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in (_WIDE if normalize else _WIDE + _NARROW):
        return False
    if torch.is_autocast_enabled("cpu") or not all(isinstance(t, Tensor) and _is_here(t) for t in tensors):
        return False
    if y is not None and not (y.dim() == 2 and y.shape[1] == x.shape[1] and y.dtype == x.dtype):
        return False
    N, M = x.shape[0], (x if y is None else y).shape[0]
    pairs = 4 * N * N if form == STACKED else N * M
    if not (0 < pairs <= CHUNK_ELEMENTS and seen_by_autograd_alone(tensors)):
        return False
    return _form_fits(form, y is None, N, M) and _rows_fit(form, x, N, M, numbers, rows)


def _is_here(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.layout == torch.strided


def _form_fits(form: int, alone: bool, N: int, M: int) -> bool:
    if form == LABELLED:
        return True
    return not alone and (M >= N if form == COLUMNS else M == N)


def _rows_fit(form: int, x: Tensor, N: int, M: int, numbers: tuple[Any, ...], rows: tuple[Any, ...]) -> bool:
    dtype = accumulator(x.dtype)
    weight, target, labels, col_labels = rows
    if not all(n is None or type(n) is float or (n.numel() == 1 and n.dim() < 2 and n.dtype == dtype) for n in numbers):
        return False
    if weight is not None and not (form != STACKED and weight.shape == (N,) and weight.dtype == dtype):
        return False
    vectors = ((target, N), (labels, N), (col_labels, M))
    if not all(v is None or (v.shape == (size,) and v.dtype == torch.int64) for v, size in vectors):
        return False
    if target is not None and not (int(target.min()) >= 0 and int(target.max()) < M):
        return False
    return form != LABELLED or labels is not None


def dense_loss(call: Call, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """The loss, or None where numbers are not finite or not positive, for which the operator has rules and words."""
    weight, factor, needs = tensors[_WEIGHT], tensors[_FACTOR], 0
    if torch.is_grad_enabled():
        needs = sum(1 << bit for bit, t in enumerate(tensors) if t is not None and t.requires_grad)
    with torch.no_grad():
        if factor is not None and call.inverted and not factor.item() > 0:
            return None
        if weight is not None and not bool((weight > 0).all()):
            return None
        found = _forward(call, tensors, needs)
    if found is None or not needs:
        return None if found is None else found[0]
    loss: Tensor = DenseLoss.apply(call, needs, found, *tensors)
    return loss


# ---- The matrix ------------------------------------------------------------------------------------------------------


def _matrix(call: Call, tensors: tuple[Tensor | None, ...], inverses: tuple[Tensor | None, ...] = ()) -> Matrix:
    x, y, factor, bias = tensors[:_WEIGHT]
    inverse_x, inverse_y = inverses or (None, None)
    if call.normalize:
        inverse_x = inverse_lengths(x) if inverse_x is None else inverse_x  # type: ignore[arg-type]
        x = x * inverse_x  # type: ignore[operator]
        if y is not None:
            inverse_y = inverse_lengths(y) if inverse_y is None else inverse_y
            y = y * inverse_y
    if call.form == STACKED:
        x, y = torch.cat([x, y]), None  # type: ignore[list-item]
    target, masks = tensors[_TARGET], (None,)
    if call.form == STACKED:
        target = usual_target(x, None)  # type: ignore[arg-type]
    elif call.form == LABELLED:
        labels, col_labels = tensors[_LABELS], tensors[_COL_LABELS]
        columns = labels if col_labels is None else col_labels
        equal = (labels[:, None] == columns) & (columns != -1)  # type: ignore[index]
        masks = (equal, ~equal)  # type: ignore[assignment]
    dtype = accumulator(x.dtype)  # type: ignore[union-attr]
    if factor is None:
        scale = torch.full((1,), call.number, dtype=dtype)
    else:
        scale = factor.reshape(1).reciprocal() if call.inverted else factor.reshape(1)
    if call.has_bias:
        bias = torch.full((1,), call.bias_number, dtype=dtype) if bias is None else bias.reshape(1)
        bias = bias.expand(x.shape[0])[:, None]  # type: ignore[union-attr]
    return Matrix(x, x if y is None else y, (inverse_x, inverse_y), target, y is None, masks, scale, bias)  # type: ignore[arg-type]


def _logits(matrix: Matrix, dots: Tensor) -> tuple[list[Tensor], Tensor]:
    """The logits of each set, -inf where a pair takes no part and at the target, and the targets' own."""
    logits = affine(dots, matrix.scale, matrix.bias, None)
    column = None if matrix.target is None else matrix.target[:, None]
    target = logits.diagonal().clone() if column is None else logits.gather(1, column)[:, 0]
    shown = []
    for mask in matrix.masks:
        z = logits if mask is None else logits.masked_fill(mask, -torch.inf)
        if matrix.itself:
            z.fill_diagonal_(-torch.inf)
        shown.append(z.fill_diagonal_(-torch.inf) if column is None else z.scatter_(1, column, -torch.inf))
    return shown, target


# ---- Forward ---------------------------------------------------------------------------------------------------------


def _forward(call: Call, tensors: tuple[Tensor | None, ...], needs: int) -> tuple[Any, ...] | None:
    """Return the loss, the derivative by the weights, and gradients or what backward makes them of."""
    matrix, weight, count = _matrix(call, tensors), tensors[_WEIGHT], None
    dtype = matrix.scale.dtype
    if call.form == LABELLED:
        target, number = one_positive(*tensors[_LABELS:])  # type: ignore[arg-type]
        matrix, count = matrix._replace(target=target), number.to(dtype)
    dots = inner_products(matrix.x, matrix.y)
    if call.form == LABELLED and not math.isfinite(dots.sum().item()):
        return None
    shown, target_logit = _logits(matrix, dots)
    kind, reduction = rows_of.KINDS[call.kind], rows_of.REDUCTIONS[call.reduction]
    folds = [fold_kinds.FOLDS[f.kind].chunk(shown[f.set], 0 if f.cols else 1) for f in rows_of.FOLDS[kind]]
    terms = rows_of.Terms(weight, None, None, count)
    losses = rows_of.row_losses(kind, folds, target_logit, terms)
    loss = rows_of.reduced(losses, target_logit, terms, reduction)
    if not math.isfinite((loss if not loss.dim() else loss.sum()).item()):
        return None
    if not needs:
        return (loss,)
    size = rows_of.divisor(terms, reduction, losses)
    by_weight = rows_of.term_slopes(losses, target_logit, loss, terms, reduction, size)
    slopes, weights = rows_of.row_slopes(kind, folds, target_logit, terms), rows_of.row_weights(terms, size, losses)
    by_logits = [slope * weights for slope in (*slopes.folds, slopes.target)]
    if in_one_pass(kind, reduction, matrix.itself, needs & _SWEPT):
        return loss, by_weight, _gradients(kind, matrix, dots, shown, folds, by_logits, needs), matrix
    kept = dots if kept_size(matrix.x, matrix.y, call.memory_budget, "reference") else None
    return loss, by_weight, [kept, *folds, *by_logits], matrix


# ---- Backward --------------------------------------------------------------------------------------------------------


def _gradients(
    kind: str,
    matrix: Matrix,
    dots: Tensor,
    shown: list[Tensor],
    folds: list[Tensor],
    by_logits: list[Tensor],
    needs: int,
) -> list[Tensor | None]:
    """The gradients of x, y, scale (one number for each set) and bias of a matrix; overwrites `shown`."""
    parts, d_scale, d_bias = [], [], None
    for number, z in enumerate(shown):
        e = None
        for fold, value, slope in zip(rows_of.FOLDS[kind], folds, by_logits, strict=False):
            if fold.set == number:
                along, by_logit = (1, -1) if fold.cols else (-1, 1), fold_kinds.FOLDS[fold.kind].slope
                part = by_logit(z, value.view(along)).mul_(slope.view(along))  # type: ignore[misc]
                e = part if e is None else e.add_(part)
        if number == 0:
            d_target = by_logits[-1]
            if matrix.target is None:
                e.diagonal().copy_(d_target)  # type: ignore[union-attr]
            else:
                e.scatter_(1, matrix.target[:, None], d_target[:, None])  # type: ignore[union-attr]
        if needs >> _FACTOR & 1:
            d_scale.append((e * dots).sum())  # type: ignore[operator]
        if needs >> _BIAS & 1:
            d_bias = e.sum(1)  # type: ignore[union-attr]
        parts.append(e.mul_(matrix.scale))  # type: ignore[union-attr]
    total, dtype = parts[0] if len(parts) == 1 else parts[0].add_(parts[1]), dots.dtype
    itself, dx, dy = matrix.x is matrix.y, None, None
    if needs >> _X & 1 or itself:
        dx = total @ matrix.y.to(dtype)
    if needs >> _Y & 1 or itself:
        dy = total.T @ matrix.x.to(dtype)
    if itself:
        dx, dy = dx + dy, None  # type: ignore[operator]
    return [dx, dy, torch.stack(d_scale) if d_scale else None, d_bias]


def _to_inputs(
    call: Call, found: list[Tensor | None], tensors: tuple[Tensor | None, ...], matrix: Matrix, needs: int
) -> list[Tensor | None]:
    """From the gradients of a matrix to those of x, y, scale or temperature, and bias."""
    x, y, factor, bias = tensors[:_WEIGHT]
    dx, dy, d_scale, d_bias = found
    if call.form == STACKED and dx is not None:
        dx, dy = dx.split(x.shape[0])  # type: ignore[union-attr]
    dx, dy = (
        None if not needs >> bit & 1 else _through_lengths(gradient, rows, inverse)  # type: ignore[arg-type]
        for bit, gradient, rows, inverse in ((_X, dx, x, matrix.inverses[0]), (_Y, dy, y, matrix.inverses[1]))
    )
    if d_scale is not None:
        d_factor = d_scale[0] if d_scale.shape[0] == 1 else d_scale[0] + d_scale[1]
        if call.inverted:
            d_factor = d_factor.neg() * (matrix.scale[0] * matrix.scale[0])
        d_scale = d_factor.reshape(factor.shape)  # type: ignore[union-attr]
    if d_bias is not None:
        d_bias = ordered_sum(d_bias).reshape(bias.shape)  # type: ignore[union-attr]
    return [dx, dy, d_scale, d_bias]


def _through_lengths(gradient: Tensor, x: Tensor, inverse: Tensor | None) -> Tensor:
    if inverse is not None:
        gradient = parts_of(gradient, x * inverse)[1].mul_(inverse)
    return gradient.to(x.dtype)


class DenseLoss(torch.autograd.Function):
    """The node in a graph of a loss that `_forward` has found already."""

    @staticmethod
    def forward(ctx: Any, call: Call, needs: int, found: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        loss, by_weight, parts, matrix = found
        ctx.call, ctx.needs, ctx.weighted = call, needs, len(by_weight)
        target = matrix.target if call.form == LABELLED else None
        ctx.save_for_backward(*tensors, target, *matrix.inverses, *by_weight, *parts)
        ctx.set_materialize_grads(False)
        found_loss: Tensor = loss
        return found_loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None) -> tuple[Any, ...]:
        if d_loss is None:
            return (None,) * 11
        tensors, call, needs = ctx.saved_tensors, ctx.call, ctx.needs
        tensors, (target, *inverses), found = tensors[:8], tensors[8:11], list(tensors[11:])
        if torch.is_grad_enabled():
            return (None, None, None, *gradients_again(call, tensors, d_loss, "reference"), None, None, None)
        of_weight = found.pop(0) * d_loss if ctx.weighted else None
        if not needs & _SWEPT:
            return (*(None,) * 7, of_weight, None, None, None)
        matrix = _matrix(call, tensors, inverses)
        matrix = matrix if target is None else matrix._replace(target=target)
        kind = rows_of.KINDS[call.kind]
        if in_one_pass(kind, rows_of.REDUCTIONS[call.reduction], matrix.itself, needs & _SWEPT):
            give = may_give(d_loss)
            gradients = [g if g is None or give else g * d_loss for g in found]
        else:
            kept, *folds = found
            folds, by_logits = folds[: len(folds) // 2], folds[len(folds) // 2 :]
            dots = inner_products(matrix.x, matrix.y) if kept is None else kept
            shown, _ = _logits(matrix, dots)
            by_logits = [slope * d_loss for slope in by_logits]
            gradients = _gradients(kind, matrix, dots, shown, folds, by_logits, needs)
        gradients = _to_inputs(call, gradients, tensors, matrix, needs)
        return (None, None, None, *gradients, of_weight if needs >> _WEIGHT & 1 else None, None, None, None)
