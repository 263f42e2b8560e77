"""similarity_values in Triton: fused passes over chunks of inner products between products of the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.core.numerics import DECIDED
from contrastive_ops.core.ordered import in_parts
from contrastive_ops.core.problem import ScaleOf
from contrastive_ops.core.weight_norm import power_below
from contrastive_ops.cuda import _products as products

from . import _pairs, _stored
from ._cover import Combine, pairwise_cover
from ._folds import exact_sum, with_lost
from ._launch import arch_of, recording
from ._similarity_problem import Problem
from ._variants import Variant

__all__ = ["backward", "forward", "variants"]

_DECIDED: tl.constexpr = tl.constexpr(DECIDED)
# What probabilities are multiplied by before they are rounded to float16, which has few numbers near 0.
_P_FACTOR = 2.0**14

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "M", "first_row", "last_row"])
def softmax_kernel(
    dots, N, M, first_row, last_row, data, offsets, guide_depth, lse, weights, factor, sets: tl.constexpr,
    guide: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Write the probabilities of the chunk's rows, times `factor`, in the dtype that they are multiplied in."""
    own = _stored.owned(first_row, OWN)
    row_lse = tl.load(lse + own, mask=own < last_row, other=float("-inf"))[:, None]
    for start in range(0, M, OTHER):
        other = start + tl.arange(0, OTHER)
        _, z = _stored.stored_logits(
            dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, sets, guide, 0, OWN, OTHER
        )
        _stored.store_tile(weights, _stored.probability(z, row_lse) * factor, own, other, first_row, last_row, M)


@triton.jit(do_not_specialize=["N", "M", "first_row", "last_row"])
def slopes_kernel(
    dots, upstream, N, M, first_row, last_row, data, offsets, guide_depth, lse, factor, norm, p_weights, weights,
    rest, of_bias, of_scale, by_cols, sets: tl.constexpr, guide: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """From t, the products of upstream gradients and values: dtotal/dlogit = p (t - mean) of each row, and its sums.

    The derivative of a column with nearly all of its row's weight is minus the sum of the others.

    Args:
        upstream: t, (rows, M).
        factor: of `p_weights`.
        norm: a power of two that brings `weights` into the range of float16, or None.
        p_weights: where to write probabilities, or None.
        weights: where to write dtotal/d(inner product), and `rest` of `Weights`.
        of_bias: (N,) sums of rows.
        of_scale: (N,) sums of rows, of derivatives times inner products.
        by_cols: (programs, M) sums of columns, or None.
    """
    own = _stored.owned(first_row, OWN)
    row_lse = tl.load(lse + own, mask=own < last_row, other=float("-inf"))[:, None]
    mean, lost = tl.zeros([OWN], tl.float32), tl.zeros([OWN], tl.float32)
    for start in range(0, M, OTHER):
        other = start + tl.arange(0, OTHER)
        _, z = _stored.stored_logits(
            dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, sets, guide, 0, OWN, OTHER
        )
        t = _stored.chunk_tile(upstream, own[:, None], other[None, :], first_row, last_row, M)
        p = _stored.probability(z, row_lse)
        mean, lost = exact_sum(mean, tl.sum(tl.where(p == 0, 0.0, p * t), 1), lost)
    mean = with_lost(mean, lost)[:, None]
    total, lost = tl.zeros([OWN], tl.float32), tl.zeros([OWN], tl.float32)
    for start in range(0, M, OTHER):
        other = start + tl.arange(0, OTHER)
        _, z = _stored.stored_logits(
            dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, sets, guide, 0, OWN, OTHER
        )
        t = _stored.chunk_tile(upstream, own[:, None], other[None, :], first_row, last_row, M)
        p = _stored.probability(z, row_lse)
        e = tl.where((p == 0) | (p > _DECIDED), 0.0, p * (t - mean))
        total, lost = exact_sum(total, tl.sum(e, 1), lost)
    total = with_lost(total, lost)[:, None]
    bias, bias_lost = tl.zeros([OWN], tl.float32), tl.zeros([OWN], tl.float32)
    scale, scale_lost = tl.zeros([OWN], tl.float32), tl.zeros([OWN], tl.float32)
    for start in range(0, M, OTHER):
        other = start + tl.arange(0, OTHER)
        found, z = _stored.stored_logits(
            dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, sets, guide, 0, OWN, OTHER
        )
        t = _stored.chunk_tile(upstream, own[:, None], other[None, :], first_row, last_row, M)
        p = _stored.probability(z, row_lse)
        e = tl.where(p > _DECIDED, -total, tl.where(p == 0, 0.0, p * (t - mean)))
        bias, bias_lost = exact_sum(bias, tl.sum(e, 1), bias_lost)
        scale, scale_lost = exact_sum(scale, tl.sum(tl.where(e == 0, 0.0, e * found), 1), scale_lost)
        g = e * _pairs.scale_factor(own[:, None], other[None, :], N, M, data, sets[0])
        if norm is not None:
            g *= tl.load(norm)
        _stored.store_weights(weights, rest, g, own, other, first_row, last_row, M)
        if p_weights is not None:
            _stored.store_tile(p_weights, p * factor, own, other, first_row, last_row, M)
        if by_cols is not None:
            at = by_cols + tl.program_id(0).to(tl.int64) * M + other
            tl.store(at, tl.sum(e, 0), mask=other < M)
    tl.store(of_bias + own, with_lost(bias, bias_lost), mask=own < last_row)
    tl.store(of_scale + own, with_lost(scale, scale_lost), mask=own < last_row)


# ---- Launchers -------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    values: Tensor,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    kept_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sums, lse, kept): see the operator."""
    p = Problem.of(x, y, scale, row_bias, col_bias, None, pair_data, spec, arch_of(x))
    sums = x.new_zeros((len(x), values.shape[1]), dtype=torch.float32)
    lines, lse = _stored.no_lines(x, 1, len(x)), x.new_empty((len(x),), dtype=torch.float32)
    dots = _stored.room(p)
    weights = p.x.new_empty(dots.shape)
    factor = _p_factor(x)
    for rows in _stored.chunks(p):
        chunk = _stored.Chunk(p, rows, _stored.inner_products(p.x[rows], p.y, dots))
        chunk.launch(_stored.lines_kernel, False, lines=lines, size=len(x))
        top, log = _stored.tops_and_logs(lines[:, :, rows])
        torch.add(top[0], log[0], out=lse[rows])
        own = weights[: chunk.dots.numel()].view(chunk.dots.shape)
        chunk.launch(softmax_kernel, False, lse=lse, weights=own, factor=factor)
        products.set_or_add(sums[rows], own, values, add=False)
    sums /= factor
    return sums, lse if len(p.y) else lse.fill_(-torch.inf), x.new_empty((kept_size,), dtype=torch.float32)


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    values: Tensor,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    sums: Tensor,
    lse: Tensor,
    d_sums: Tensor,
    kept: Tensor,
    needs: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, y, scale, row_bias, col_bias and values in float32, empty where not needed."""
    p = Problem.of(x, y, scale, row_bias, col_bias, None, pair_data, spec, arch_of(x))
    dx, dy, dvalues = (t.new_zeros(t.shape, dtype=torch.float32) for t in (x, y, values))
    of_bias, of_scale, by_cols = (x.new_zeros((size,), dtype=torch.float32) for size in (len(x), len(x), len(y)))
    dots, t = _stored.room(p, 2), _stored.room(p, 2)
    weights, p_weights = _stored.Weights(p.x, dots.numel()), p.x.new_empty(dots.shape)
    parts, unit = _two_parts(d_sums, x.dtype)
    norm = _norm(x, values, scale, d_sums)
    for number, rows in enumerate(_stored.chunks(p, 2)):
        chunk = _stored.Chunk(p, rows, _stored.inner_products(p.x[rows], p.y, dots))
        upstream = t[: chunk.dots.numel()].view(chunk.dots.shape)
        for part in parts:
            products.set_or_add(upstream, part[rows], values.T, add=part is not parts[0])
        if unit is not None:
            upstream /= unit
        own_p = p_weights[: chunk.dots.numel()].view(chunk.dots.shape)
        of_blocks = chunk.blocks() if needs >> 4 & 1 else None
        chunk.launch(
            slopes_kernel, False, upstream=upstream, lse=lse, factor=_p_factor(x), norm=norm,
            p_weights=own_p if needs >> 5 & 1 else None, of_bias=of_bias, of_scale=of_scale, by_cols=of_blocks,
            **weights.arguments(chunk.dots.shape),
        )  # fmt: skip
        if of_blocks is not None:
            by_cols += of_blocks.sum(0, dtype=torch.float64)
        if needs & 1:
            weights.product(dx[rows], p.y, add=False)
        if needs & 2:
            weights.product(dy, p.x[rows], add=number > 0, of_columns=True)
        if needs >> 5 & 1:
            products.set_or_add(dvalues, own_p.T, parts[0][rows], add=number > 0)
    if norm is not None:
        dx, dy = dx / norm, dy / norm
    dvalues = dvalues / (_p_factor(x) if unit is None else unit * _p_factor(x))
    per_row = p.layout.sets[0].scale_of == ScaleOf.ROWS
    sign = -1.0 if p.layout.sets[0].negate else 1.0
    dscale = sign * (of_scale if per_row else in_parts(of_scale).reshape(1).float())
    full = (dx, dy, dscale, sign * of_bias, sign * by_cols, dvalues)
    return tuple(g if needs >> bit & 1 else g.new_empty((0, *g.shape[1:])) for bit, g in enumerate(full))


def _p_factor(x: Tensor) -> float:
    return _P_FACTOR if x.dtype == torch.float16 else 1.0


def _two_parts(d_sums: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """The upstream gradient as a sum of matrices of this dtype, times a power of two for float16.

    One matrix of 16 bits would round t before the mean is taken from it.
    """
    if dtype == torch.float32:
        return [d_sums.contiguous()], None
    unit, scaled = None, d_sums
    if dtype == torch.float16:
        unit = power_below(d_sums.abs().amax() if d_sums.numel() else d_sums.new_zeros(()))
        scaled = d_sums * unit
    first = scaled.to(dtype)
    return [first, (scaled - first.float()).to(dtype)], unit


def _norm(x: Tensor, values: Tensor, scale: Tensor, d_sums: Tensor) -> Tensor | None:
    """What brings derivatives of inner products into the range of float16: |p (t - mean)| <= 2 |t|."""
    if x.dtype != torch.float16:
        return None
    if not d_sums.numel() or not values.numel():
        return x.new_ones((), dtype=torch.float32)
    longest = d_sums.norm(dim=1).amax() * values.float().norm(dim=1).amax()
    return power_below(2.0 * longest * scale.detach().abs().amax())


# ---- What is compiled ahead of time ----------------------------------------------------------------------------------


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Every two options that users can reach together in some variant."""
    choices: dict[str, Sequence[Any]] = {
        "dtype": (torch.bfloat16, torch.float16, torch.float32),
        "rules": _stored.RULES,
        "scale_of": (ScaleOf.ALL, ScaleOf.ROWS),
        "bias": (False, True),
        "needs": (63, 3),
    }
    for row in combine(choices):
        x, y, scale, bias, layout = _stored.sample(row)
        values = torch.zeros(len(y), 16, dtype=x.dtype)
        problem = (x, y, scale, None, bias, values, *layout.encode())
        with recording(arch) as recorded:
            sums, lse, kept = forward(*problem, 0)
            backward(*problem, sums, lse, sums, kept, row["needs"])
        about = " ".join(f"{name}={_stored.shown(value)}" for name, value in row.items())
        yield from _stored.distinct(recorded.variants(f"similarity_values {about}"))
