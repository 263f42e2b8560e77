"""similarity_reduce in plain PyTorch: any device, any floating dtype, memory bounded by chunks of rows.

Every function takes what the operator of the same name in ops/similarity_reduce.py takes. `backward` is made of
differentiable operations, so that it also defines the second derivative of every backend.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import accumulator

# Logits that one chunk of rows may hold: 4 MiB of float32, some twenty times that with temporaries.
CHUNK_ELEMENTS = 1 << 20


def merge_lse(*lse: Tensor) -> Tensor:
    """Logsumexp over equally shaped tensors, with gradient 0 (not NaN) where all of them are -inf."""
    stacked = torch.stack(lse)
    top = stacked.detach().amax(0)
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = (stacked - top).exp().sum(0)
    empty = total == 0
    # log is kept away from 0, whose infinite slope would turn the masked gradient into NaN.
    return torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, total).log())


def chunks_of_rows(rows: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` rows; one empty slice for no rows, so that shapes are still found out."""
    for begin in range(0, max(rows, 1), step):
        yield slice(begin, min(begin + step, rows))


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    return chunks_of_rows(rows, max(1, CHUNK_ELEMENTS // max(columns, 1)))


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products in the accumulation dtype: low-precision inputs never give rounded logits."""
    dtype = accumulator(x.dtype)
    return x.to(dtype) @ y.to(dtype).T


def _of_rows(scale: Tensor, rows: slice) -> Tensor:
    return scale[rows, None] if scale.dim() else scale


def _logits(dots: Tensor, rows: slice, scale: Tensor, row_bias: Tensor | None, col_bias: Tensor | None) -> Tensor:
    logits = dots * _of_rows(scale, rows)
    if row_bias is not None:
        logits = logits + row_bias[rows, None]
    return logits if col_bias is None else logits + col_bias


def _left_out(rows: slice, logits: Tensor, target: Tensor | None, diagonal: int | None) -> Tensor | None:
    """True where a pair is in no fold: the diagonal rule, and the target that is returned on its own."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    drop = None
    if diagonal is not None:
        drop = torch.arange(rows.start, rows.stop, device=logits.device)[:, None] + diagonal == columns
    if target is not None:
        own = target[rows, None] == columns
        drop = own if drop is None else drop | own
    return drop


def forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    diagonal: int | None,
    rows: bool,
    cols: bool,
    kept_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (row_lse, col_lse, target_logit, kept); what was not asked for is empty."""
    y = x if y is None else y
    dtype = accumulator(x.dtype)
    row_lse = x.new_full((len(x) if rows else 0,), -torch.inf, dtype=dtype)
    col_lse = x.new_full((len(y) if cols else 0,), -torch.inf, dtype=dtype)
    target_logit = x.new_empty((0 if target is None else len(x),), dtype=dtype)
    for part in _chunks(len(x), len(y)):
        logits = _logits(inner_products(x[part], y), part, scale, row_bias, col_bias)
        if target is not None:
            target_logit[part] = logits.gather(1, target[part, None]).squeeze(1)
        drop = _left_out(part, logits, target, diagonal)
        if drop is not None:
            logits = logits.masked_fill(drop, -torch.inf)
        if rows and len(y):
            row_lse[part] = logits.logsumexp(1)
        if cols:
            col_lse = merge_lse(col_lse, logits.logsumexp(0))
    return row_lse, col_lse, target_logit, x.new_empty((kept_size,), dtype=dtype)


def backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    diagonal: int | None,
    row_lse: Tensor | None,
    col_lse: Tensor | None,
    d_rows: Tensor | None,
    d_cols: Tensor | None,
    d_target: Tensor | None,
    kept: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, scale per row, row_bias, col_bias in the accumulation dtype."""
    columns = x if y is None else y
    dtype = accumulator(x.dtype)

    def one_chunk(part: slice) -> tuple[Tensor, ...]:
        dots = inner_products(x[part], columns)
        logits = _logits(dots, part, scale, row_bias, col_bias)
        drop = _left_out(part, logits, target, diagonal)
        e = torch.zeros_like(logits)
        if d_rows is not None and row_lse is not None:
            e = e + _probability(logits, row_lse[part, None]) * d_rows[part, None]
        if d_cols is not None and col_lse is not None:
            e = e + _probability(logits, col_lse) * d_cols
        if drop is not None:
            e = e.masked_fill(drop, 0.0)
        if d_target is not None and target is not None:
            e = e.scatter_add(1, target[part, None], d_target[part, None])
        weights = e * _of_rows(scale, part)
        dx, dy = weights @ columns.to(dtype), weights.T @ x[part].to(dtype)
        return dx, dy, (e * dots.masked_fill(e == 0, 0.0)).sum(1), e.sum(1), e.sum(0)

    # Under autograd (second derivatives) each chunk is computed again instead of being stored.
    run = one_chunk
    if torch.is_grad_enabled():
        run = functools.partial(checkpoint, one_chunk, use_reentrant=False, preserve_rng_state=False)
    dx, dy = (x.new_zeros(t.shape, dtype=dtype) for t in (x, columns))
    dscale, drow_bias, dcol_bias = (x.new_zeros((len(t),), dtype=dtype) for t in (x, x, columns))
    for part in _chunks(len(x), len(columns)):
        dx[part], dy_part, dscale[part], drow_bias[part], dcol_part = run(part)
        dy += dy_part
        dcol_bias += dcol_part
    if y is None:
        dx, dy = dx + dy, dy[:0]
    full = (dx, dy, dscale, drow_bias, dcol_bias)
    return tuple(g if needs >> bit & 1 else g[:0] for bit, g in enumerate(full))  # type: ignore[return-value]


def _probability(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 where lse is -inf: a row or column without a pair has no gradient."""
    empty = lse == -torch.inf
    return (logits - lse.masked_fill(empty, 0.0)).exp().masked_fill(empty, 0.0)


def total(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor,
    diagonal: int | None,
    weight: Tensor,
    extra: Tensor | None,
    target_weight: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (losses, target_logit, dx, dy, dscale, drow_bias, dcol_bias, dextra)."""
    problem = (x, y, scale, row_bias, col_bias, target, diagonal)
    lse, _, target_logit, kept = forward(*problem, True, False, 0)
    everything = lse if extra is None else merge_lse(lse, extra)
    z = everything - target_logit
    d_all = weight * z.sigmoid()
    d_target = -d_all if target_weight is None else target_weight - d_all
    gradients = backward(*problem, lse, None, d_all * _probability(lse, everything), None, d_target, kept, needs)
    dextra = x.new_empty((0,), dtype=lse.dtype) if extra is None else d_all * _probability(extra, everything)
    # -logsigmoid(-z) is softplus without torch's switch to the identity above 20.
    return -torch.nn.functional.logsigmoid(-z), target_logit, *gradients, dextra
