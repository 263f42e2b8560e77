"""Fold the rows and columns of a similarity matrix that is never stored."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _autocast, _checks, _extension
from .._dispatch import Backend, choose, unsupported_by_cpu
from ..reference import similarity_reduce as reference
from ._similarity_reduce_autograd import register
from .pairs import Pairs

# One hop to every implementation; each offers forward, backward and total with the same arguments.
BACKENDS = {
    "reference": Backend(
        source="contrastive_ops/reference/similarity_reduce.py",
        functions=lambda: reference,
        unsupported=lambda x: [],
    ),
    "cpu": Backend(
        source="csrc/cpu/similarity_reduce.cpp",
        functions=functools.cache(lambda: _extension.functions("similarity_reduce")),
        unsupported=unsupported_by_cpu,
    ),
}

register(BACKENDS)

# Bytes of inner products that a training step keeps by default, so that backward need not compute them again.
DEFAULT_MEMORY_BUDGET = 128 << 20
# Below this dimension reading a kept inner product costs as much as computing it.
KEEP_FROM_DIMENSION = 64

FOLDS = ("logsumexp",)


class Reduced(NamedTuple):
    """The folds of one sweep; None where a fold was not asked for.

    Attributes:
        rows: (N,) the fold of each row.
        cols: (M,) the fold of each column.
        target: (N,) the logit of each row's target.
    """

    rows: Tensor | None = None
    cols: Tensor | None = None
    target: Tensor | None = None


def merge_lse(*lse: Tensor) -> Tensor:
    """Merge the logsumexp of several blocks of columns into that of their union.

    Equivalent to::

        torch.logsumexp(torch.stack(lse), dim=0)

    but with gradient 0 instead of NaN where every block is empty (-inf).

    Args:
        lse: one or more tensors of one shape.

    Returns:
        A tensor of that shape.
    """
    if not lse:
        raise ValueError("merge_lse: lse must be at least one tensor, got none")
    for tensor in lse:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"merge_lse: lse must be tensors, got {type(tensor).__name__}")
        if tensor.shape != lse[0].shape:
            raise ValueError(
                f"merge_lse: lse must have one shape, got {_checks.shape(lse[0])} and {_checks.shape(tensor)}"
            )
    return reference.merge_lse(*lse)


def similarity_reduce(
    x: Tensor,
    y: Tensor | None = None,
    *,
    reduce: str = "logsumexp",
    dim: int | tuple[int, ...] = 1,
    scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    target: Tensor | None = None,
    pairs: Pairs | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | Reduced:
    """Fold each row and/or column of a similarity matrix to one number, without storing the matrix.

    Equivalent to::

        logits = scale * (x @ y.T) + row_bias[:, None] + col_bias      # (N, M), in float32
        target_logit = logits.gather(1, target[:, None]).squeeze(1)
        logits = logits.scatter(1, target[:, None], -torch.inf)         # left out of every fold
        rows, cols = logits.logsumexp(1), logits.logsumexp(0)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D) of the same dtype; None for self-similarity (y = x) at half the work.
        reduce: "logsumexp".
        dim: 1 folds each row, 0 folds each column, (0, 1) does both in one sweep.
        scale: float, 0-d tensor, or (N,) tensor with one scale per row. Differentiable.
        row_bias: (N,) added to the logits of each row. Differentiable.
        col_bias: (M,) added to the logits of each column. Differentiable.
        target: (N,) int64, one column per row that is left out of every fold; its logit is returned from the same
            accumulators, so that a loss can be ``softplus(rows - target)``, which is never negative and exact
            near convergence, where ``logsumexp - target`` cancels.
        pairs: which pairs take part. The target is returned even where a rule drops its pair.
        memory_budget: bytes of inner products to keep between forward and backward, so that backward need not
            compute them again; 0 keeps none. None: 128 MiB. Does not change results.
        backend: "auto", "reference" or "cpu". An explicit backend runs or raises.

    Returns:
        (N,) for ``dim=1``, (M,) for ``dim=0``; a `Reduced` of ``rows``, ``cols``, ``target`` for ``dim=(0, 1)`` or
        with a target. float32 (float64 for float64 inputs). A row or column in which no pair takes part gives -inf
        and has gradient 0. NaN and inf propagate.

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        Memory: O((N + M) D) and a few MiB of tiles beside ``memory_budget``; never N x M. Logits are never rounded
        to a lower precision than float32. Results are bitwise the same for any number of threads. Differentiable
        twice; the second derivative runs on the reference backend.

    Example:
        >>> x, y = torch.randn(6, 8), torch.randn(5, 8)
        >>> lse = similarity_reduce(x, y, scale=2.0)
        >>> torch.allclose(lse, (2.0 * x @ y.T).logsumexp(1), atol=1e-5)
        True
    """
    _checks.check_choice("similarity_reduce", "reduce", reduce, FOLDS)
    row_fold, col_fold, target_logit = fold(
        x,
        y,
        dim=dim,
        scale=scale,
        row_bias=row_bias,
        col_bias=col_bias,
        target=target,
        pairs=pairs,
        memory_budget=memory_budget,
        backend=backend,
    )
    if target is None and isinstance(dim, int):
        return row_fold if dim == 1 else col_fold
    rows, cols = _directions("similarity_reduce", dim)
    return Reduced(
        rows=row_fold if rows else None,
        cols=col_fold if cols else None,
        target=None if target is None else target_logit,
    )


def fold(
    x: Tensor,
    y: Tensor | None = None,
    *,
    dim: int | tuple[int, ...] = 1,
    scale: float | Tensor = 1.0,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    target: Tensor | None = None,
    pairs: Pairs | None = None,
    memory_budget: int | None = None,
    names: tuple[str, str, str] = ("similarity_reduce", "x", "y"),
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`similarity_reduce` for losses: arguments as there, and `names` to name in errors: the loss, its x, its y.

    Returns:
        The folds of rows and columns and the targets' logits; empty where not asked for.
    """
    rows, cols = _directions(names[0], dim)
    x, y, scale, row_bias, col_bias = prepare(names, x, y, scale, row_bias, col_bias, target)
    arguments = (x, y, scale, row_bias, col_bias, target, None if pairs is None else pairs.diagonal)
    chosen = choose(names[0], BACKENDS, x, backend)
    budget = _bytes(names[0], memory_budget)
    keeps = needs_gradient(*arguments) and chosen != "reference"
    kept_size = _kept_size(x, y, budget) if keeps else 0
    folded = torch.ops.contrastive_ops.similarity_reduce_forward(*arguments, rows, cols, kept_size, chosen)
    row_fold, col_fold, target_logit, _ = folded
    return row_fold, col_fold, target_logit


def prepare(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor | None,
    scale: float | Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Check what every operator of this stem takes and bring it to the dtypes that the backends expect."""
    function, x_name, y_name = names
    x, y = _autocast.cast(x, y)
    if y is None:
        _checks.check_matrix(function, x_name, x)
    else:
        _checks.check_matrices(function, x_name, x, y_name, y)
    columns = x if y is None else y
    if row_bias is not None:
        _checks.check_vector(function, "row_bias", row_bias, x.shape[0], x_name, x)
    if col_bias is not None:
        _checks.check_vector(function, "col_bias", col_bias, columns.shape[0], x_name, x)
    if target is not None:
        _checks.check_index(function, "target", target, x.shape[0], x_name, x)
    dtype = _checks.accumulator(x.dtype)
    return (
        x,
        y,
        _checks.scale_tensor(function, scale, x_name, x),
        None if row_bias is None else row_bias.to(dtype),
        None if col_bias is None else col_bias.to(dtype),
    )


def needs_gradient(*arguments: object) -> bool:
    """Whether autograd will ask for a gradient of any argument."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def _directions(function: str, dim: object) -> tuple[bool, bool]:
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, tuple) or not dims or not set(dims) <= {0, 1} or len(set(dims)) != len(dims):
        raise ValueError(f"{function}: dim must be 0, 1 or (0, 1), got {dim!r}")
    return 1 in dims, 0 in dims


def _bytes(function: str, memory_budget: object) -> int:
    if memory_budget is None:
        return DEFAULT_MEMORY_BUDGET
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 0:
        raise ValueError(f"{function}: memory_budget must be a number of bytes >= 0, got {memory_budget!r}")
    return memory_budget


def _kept_size(x: Tensor, y: Tensor | None, budget: int) -> int:
    """How many inner products forward may keep for backward."""
    if budget == 0 or x.shape[1] < KEEP_FROM_DIMENSION:
        return 0
    size = budget // _checks.accumulator(x.dtype).itemsize
    rows, columns = x.shape[0], x.shape[0] if y is None else y.shape[0]
    # Upper bounds: tiles are padded, and self-similarity keeps what lies on and above the diagonal.
    whole = (rows + 512) * (rows + 512) // 2 if y is None else (rows + 32) * (columns + 128)
    return min(size, whole)


def softplus_total(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    target: Tensor,
    weight: Tensor,
    extra: Tensor | None = None,
    target_weight: Tensor | None = None,
    names: tuple[str, str, str] = ("similarity_reduce", "x", "y"),
    backend: str = "auto",
) -> Tensor:
    """Weighted total of row losses whose gradients are formed in the forward pass: 6 N M D instead of 8.

    Equivalent to::

        _, _, t = reduced = similarity_reduce(x, y, scale=scale, target=target)
        lse = merge_lse(reduced.rows, extra)
        total = (weight * F.softplus(lse - t)).sum() + (target_weight * t).sum()

    For losses whose row weights are known before the sweep; not part of the public surface.

    Args:
        x: (N, D).
        y: (M, D).
        scale: as in `similarity_reduce`.
        target: (N,) int64.
        weight: (N,) weight of each row's loss. Differentiable.
        extra: (N,) lse of logits that the sweep does not see. Differentiable.
        target_weight: (N,) weight of each target's logit. Differentiable.
        names: the function and the arguments to name in errors.
        backend: as in `similarity_reduce`.

    Returns:
        The total, 0-d.
    """
    prepared = prepare(names, x, y, scale, None, None, target)
    arguments = (*prepared, target, None, weight, extra, target_weight)
    needs = sum(1 << bit for bit, a in enumerate(prepared) if a is not None and a.requires_grad)
    chosen = choose(names[0], BACKENDS, prepared[0], backend)
    return torch.ops.contrastive_ops.similarity_reduce_total(*arguments, needs, chosen)[0]
