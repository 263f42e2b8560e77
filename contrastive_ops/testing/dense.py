"""similarity_reduce once more, N x M and all, in plain torch: the truth that every backend is compared with.

Written from the definitions in `Pairs` and `Fold`, rule by rule and fold by fold: the tables of the package, `RULES`
and `FOLDS`, are under test themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.folds import Fold, Reduced
from ..core.rule_kinds import Bound
from ..core.rules import Pairs


def dense_keep(pairs: Pairs | None, x: Tensor, y: Tensor) -> Tensor:
    """(N, M) True where the rules of `pairs` let a pair take part."""
    keep = torch.ones(len(x), len(y), dtype=torch.bool)
    if pairs is None:
        return keep
    if pairs.diagonal is not None:
        keep &= torch.arange(len(x))[:, None] + pairs.diagonal != torch.arange(len(y))
    if pairs.differ is not None:
        keep &= ~_equal(*pairs.differ)
    if pairs.same is not None:
        keep &= _equal(*pairs.same)
    if pairs.rows is not None:
        keep &= pairs.rows[:, None]
    if pairs.columns is not None:
        keep &= pairs.columns
    if pairs.exclude is not None:
        indptr, indices = pairs.exclude
        for row, (begin, end) in enumerate(zip(indptr[:-1], indptr[1:], strict=True)):
            keep[row, indices[begin:end]] = False
    similarity = (x @ y.T).detach()
    keep &= ~(similarity > _matrix(pairs.below, similarity, least=True))
    keep &= ~(similarity < _matrix(pairs.above, similarity, least=False))
    if pairs.guide is not None:
        gx, gy = pairs.guide.gx, pairs.guide.gx if pairs.guide.gy is None else pairs.guide.gy
        guide = gx.to(x.dtype) @ gy.to(x.dtype).T
        keep &= ~(guide > _matrix(pairs.guide.below, guide, least=True))
    return keep


def _equal(rows: Tensor, cols: Tensor) -> Tensor:
    return (rows[:, None] == cols) & (rows[:, None] != -1)


def _matrix(bound: Bound | tuple[Bound, ...] | None, like: Tensor, least: bool) -> Tensor:
    whole = torch.full_like(like, torch.inf if least else -torch.inf)
    for each in bound if isinstance(bound, tuple) else (() if bound is None else (bound,)):
        value = torch.as_tensor(each, dtype=like.dtype).detach()
        value = value[:, None] if value.dim() == 1 else value
        whole = torch.minimum(whole, value) if least else torch.maximum(whole, value)
    return whole


def _fold(kind: str, logits: Tensor, keep: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    any_pair = keep.any(dim)
    if kind == "count":
        return keep.to(logits.dtype).sum(dim), None
    if kind in ("logsumexp", "max"):
        empty = ~any_pair
        safe = logits.masked_fill(~keep, -torch.inf).masked_fill(empty.unsqueeze(dim), 0.0)
        if kind == "logsumexp":
            return safe.logsumexp(dim).masked_fill(empty, -torch.inf), None
        if not logits.shape[dim]:
            shape = logits.sum(dim).shape
            return torch.full(shape, -torch.inf, dtype=logits.dtype), torch.full(shape, -1)
        value, index = safe.max(dim)
        return value.masked_fill(empty, -torch.inf), index.masked_fill(empty, -1)
    each = {
        "sum_softplus": lambda v: torch.logaddexp(v, torch.zeros_like(v)),
        "sum_relu": torch.relu,
        "sum": lambda v: v,
    }
    return torch.where(keep, each[kind](logits), 0.0).sum(dim), None


def dense_reduce(
    x: Tensor,
    y: Tensor | None = None,
    *,
    reduce: tuple[str | Fold, ...] = ("logsumexp",),
    dim: tuple[int, ...] = (0, 1),
    scale: float | Tensor = 1.0,
    col_scale: float | Tensor | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    target: Tensor | None = None,
    linear: tuple[Tensor, ...] | None = None,
    pairs: Pairs | None = None,
) -> Reduced:
    """What `similarity_reduce` computes, with a tuple of folds, in the dtype of the inputs."""
    y = x if y is None else y
    dots = x @ y.T

    def logits_of(factor: float | Tensor, rules: Pairs | None, of_columns: bool = False) -> Tensor:
        by_row = isinstance(factor, Tensor) and factor.dim() == 1 and not of_columns
        logits = dots * (factor[:, None] if by_row else factor)  # type: ignore[index]
        logits = logits if row_bias is None else logits + row_bias[:, None]
        logits = logits if col_bias is None else logits + col_bias
        if rules is not None and rules.log_weight is not None:
            table, row_class, col_class = rules.log_weight
            entry = table.to(logits.dtype)[row_class.clamp_min(0)][:, col_class.clamp_min(0)]
            logits = logits + entry.masked_fill((row_class[:, None] < 0) | (col_class < 0), 0.0)
        return logits

    base = logits_of(scale, pairs)
    own = torch.zeros(dots.shape, dtype=torch.bool)
    if target is not None:
        own = torch.arange(len(y)) == target[:, None]
    found: dict[int, list[tuple[Tensor, Tensor | None]]] = {0: [], 1: []}
    for request in reduce:
        each = Fold(request) if isinstance(request, str) else request
        rules = pairs if each.pairs is None else each.pairs
        keep = dense_keep(rules, x, y)
        for direction in dim:
            factor, of_columns = scale if each.scale is None else each.scale, False
            if direction == 0 and each.scale is None and col_scale is not None:
                factor, of_columns = col_scale, True
            logits = logits_of(factor, rules, of_columns)
            if each.bias is not None:
                by_row = isinstance(each.bias, Tensor) and each.bias.dim() == 1
                logits = logits + (each.bias[:, None] if by_row else each.bias)  # type: ignore[index]
            logits = -logits if each.negate else logits
            takes_part = keep
            if rules is not None and rules.fill is not None:
                logits, takes_part = torch.where(keep, logits, rules.fill), torch.ones_like(keep)
            found[direction].append(_fold(each.name, logits, takes_part & ~own, direction))
    return Reduced(
        rows=tuple(value for value, _ in found[1]),
        cols=tuple(value for value, _ in found[0]),
        target=None if target is None else base.gather(1, target[:, None]).squeeze(1),
        linear=None if linear is None else (_dense_lists(linear, base) * base).sum(1),
        row_argmax=tuple(winner for _, winner in found[1]),
        col_argmax=tuple(winner for _, winner in found[0]),
    )


def _dense_lists(linear: tuple[Tensor, ...], like: Tensor) -> Tensor:
    indptr, indices = linear[:2]
    weights = torch.ones(len(indices)) if len(linear) == 2 else linear[2]
    matrix = torch.zeros_like(like)
    row = torch.repeat_interleave(indptr.diff())
    return matrix.index_put((row, indices), weights.to(like.dtype), accumulate=True)
