"""Fold the rows and columns of a similarity matrix that is never stored."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

import torch
from torch import Tensor

from ..core import checks, cuda_kernels, extension, triton_kernels
from ..core.backends import NEVER_ON_A_DEVICE, Backend, choose, enrol, unsupported_by_cpu
from ..core.fold_kinds import WithoutWinner
from ..core.folds import Fold, Folded, Reduced, as_fold
from ..core.operators import call
from ..core.problem import LogitSets, Problem, SetFold
from ..core.rules import Pairs
from ..cuda import _pairs, _products, hopper
from ..reference import similarity_reduce as reference
from . import _persistent
from ._similarity_reduce_autograd import register

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch

# One hop to every implementation; each offers forward, backward and total with the same arguments.
BACKENDS = enrol(
    "similarity_reduce",
    {
        "reference": Backend(
            source="contrastive_ops/reference/similarity_reduce.py",
            functions=lambda: reference,
            unsupported=lambda x: [],
            keeps=True,
        ),
        "cpu": Backend(
            source="csrc/cpu/similarity_reduce.cpp",
            functions=functools.cache(lambda: extension.functions("similarity_reduce")),
            unsupported=unsupported_by_cpu,
            keeps=True,
        ),
        "triton": Backend(
            source="kernels/similarity_reduce.py",
            functions=functools.cache(lambda: triton_kernels.functions("similarity_reduce")),
            unsupported=triton_kernels.unsupported,
        ),
        "triton_persistent": _persistent.BACKEND,
        "cuda": Backend(
            source="csrc/cuda/similarity_reduce.cu",
            functions=functools.cache(lambda: cuda_kernels.functions("similarity_reduce")),
            unsupported=lambda x: [*cuda_kernels.unsupported(x), *_products.unsupported(x)],
            keeps=True,
            no_room=_pairs.no_room,
        ),
        "hopper": Backend(
            source="csrc/cuda/hopper/sweep.h",
            functions=functools.cache(lambda: cuda_kernels.functions("hopper")),
            unsupported=hopper.unsupported,
            keeps=True,
            no_room=hopper.no_room,
            by_name=NEVER_ON_A_DEVICE,
        ),
    },
)

register(BACKENDS)

# Bytes of inner products that a training step keeps by default, so that backward need not compute them again.
# A GPU, where a step of this size takes gigabytes for its layers, has all of N = M = 16,384 in it.
DEFAULT_MEMORY_BUDGET, DEFAULT_MEMORY_BUDGET_OF_GPU = 128 << 20, 1 << 30
# Below this dimension reading a kept inner product costs as much as computing it.
KEEP_FROM_DIMENSION = 64


class _Options(TypedDict, total=False):
    """Those that do not decide what `similarity_reduce` returns."""

    scale: float | Tensor
    col_scale: float | Tensor | None
    row_bias: Tensor | None
    col_bias: Tensor | None
    pairs: Pairs | None
    memory_budget: int | None
    backend: str


_Reduce: TypeAlias = "str | Fold | tuple[str | Fold, ...]"
_Dim: TypeAlias = "int | tuple[int, ...]"
_Lists: TypeAlias = "tuple[Tensor, ...] | None"


@overload
def similarity_reduce(
    x: Tensor,
    y: Tensor | None = ...,
    *,
    reduce: WithoutWinner = ...,
    dim: int = ...,
    target: None = ...,
    linear: None = ...,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def similarity_reduce(
    x: Tensor,
    y: Tensor | None = ...,
    *,
    reduce: Literal["max"] | tuple[str | Fold, ...],
    dim: _Dim = ...,
    target: Tensor | None = ...,
    linear: _Lists = ...,
    **options: Unpack[_Options],
) -> Reduced: ...


@overload
def similarity_reduce(
    x: Tensor,
    y: Tensor | None = ...,
    *,
    reduce: _Reduce = ...,
    dim: tuple[int, ...],
    target: Tensor | None = ...,
    linear: _Lists = ...,
    **options: Unpack[_Options],
) -> Reduced: ...


@overload
def similarity_reduce(
    x: Tensor,
    y: Tensor | None = ...,
    *,
    reduce: _Reduce = ...,
    dim: _Dim = ...,
    target: Tensor,
    linear: _Lists = ...,
    **options: Unpack[_Options],
) -> Reduced: ...


@overload
def similarity_reduce(
    x: Tensor,
    y: Tensor | None = ...,
    *,
    reduce: _Reduce = ...,
    dim: _Dim = ...,
    target: Tensor | None = ...,
    linear: tuple[Tensor, ...],
    **options: Unpack[_Options],
) -> Reduced: ...


@overload
def similarity_reduce(
    x: Tensor,
    y: Tensor | None = ...,
    *,
    reduce: _Reduce = ...,
    dim: _Dim = ...,
    target: Tensor | None = ...,
    linear: _Lists = ...,
    **options: Unpack[_Options],
) -> Tensor | Reduced: ...


def similarity_reduce(
    x: Tensor,
    y: Tensor | None = None,
    *,
    reduce: str | Fold | tuple[str | Fold, ...] = "logsumexp",
    dim: int | tuple[int, ...] = 1,
    scale: float | Tensor = 1.0,
    col_scale: float | Tensor | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    target: Tensor | None = None,
    linear: tuple[Tensor, ...] | None = None,
    pairs: Pairs | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | Reduced:
    """Fold each row and/or column of a similarity matrix to one number, without storing the matrix.

    Equivalent to::

        logits = scale * (x @ y.T) + row_bias[:, None] + col_bias      # (N, M), in float32
        target_logit = logits.gather(1, target[:, None]).squeeze(1)
        linear_sum = (sparse_csr(*linear).to_dense() * logits).sum(1)
        logits = logits.masked_fill(~keep, -torch.inf)                  # the rules of Pairs
        logits = logits.scatter(1, target[:, None], -torch.inf)         # left out of every fold
        rows, cols = logits.logsumexp(1), logits.logsumexp(0)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D) of the same dtype; None for self-similarity (y = x) at half the work.
        reduce: what a row or column becomes: "logsumexp", "max", "sum_softplus", "sum_relu", "sum", "count", or a
            `Fold` with a scale, bias, pairs or sign of its own; a tuple of these shares one sweep and its matmul.
        dim: 1 folds each row, 0 folds each column, (0, 1) does both in one sweep.
        scale: float, 0-d tensor, or (N,) tensor with one scale per row. Differentiable.
        col_scale: the scale of the folds of columns where it is another one: float, 0-d or (M,). Differentiable.
        row_bias: (N,) added to the logits of each row. Differentiable.
        col_bias: (M,) added to the logits of each column. Differentiable.
        target: (N,) int64, one column per row that is left out of every fold; its logit is returned from the same
            accumulators, so that a loss can be ``softplus(rows - target)``, which is never negative and exact
            near convergence, where ``logsumexp - target`` cancels.
        linear: (indptr (N + 1,), indices[, weights]): a list of columns per row, whose weighted logits are summed in
            the tile, so that its gradient joins that of the folds before anything is rounded. Weights default to 1 and
            are not differentiable; those of a column that is listed twice add up. Rules and target do not apply to it.
        pairs: which pairs take part. The target is returned even where a rule drops its pair.
        memory_budget: bytes of inner products to keep between forward and backward, so that backward need not
            compute them again; 0 keeps none. None: 128 MiB, on a GPU 1 GiB. Does not change
            results. Of use to "cpu" and "cuda", and to "reference" where it suffices for all of them; "hopper" keeps
            logits in 16 bits, with gradients as close as those of 16-bit weights.
        backend: "auto", "reference", "cpu", "triton", "triton_persistent", "cuda" or "hopper". An explicit backend runs
            or raises. "hopper" is for 16-bit rows on GPUs of compute capability 9.0, "triton_persistent" for 16-bit
            rows on any GPU that Triton has; both are taken by name only: they have not run on a device.

    Returns:
        (N,) for ``dim=1``, (M,) for ``dim=0``; a `Reduced` for ``dim=(0, 1)``, "max", several folds, a target or
        lists. float32 (float64 for float64 inputs). A row or column in which no pair takes part gives the value that
        `Fold` names and has gradient 0. NaN and inf propagate.

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        Memory: O((N + M) D) and a few MiB of tiles beside ``memory_budget``; never N x M. Logits are never rounded
        to a lower precision than float32. Results are bitwise the same for any number of threads. Differentiable
        twice; the second derivative runs on the reference backend.

    Examples:
        >>> x, y = torch.randn(6, 8), torch.randn(5, 8)
        >>> lse = similarity_reduce(x, y, scale=2.0)
        >>> torch.allclose(lse, (2.0 * x @ y.T).logsumexp(1), atol=1e-5)
        True
        >>> ids = torch.tensor([0, 1, 0, 1, 2, 2])
        >>> largest = Fold("max", pairs=Pairs(diagonal=0, differ=(ids, ids)))
        >>> similarity_reduce(x, reduce=("logsumexp", largest)).row_argmax[1].shape
        torch.Size([6])
    """
    name = "similarity_reduce"
    requests = reduce if isinstance(reduce, tuple) else (reduce,)
    folded = fold(
        Problem.of((name, "x", "y"), x, y, row_bias, col_bias, target),
        reduce=requests,
        dim=dim,
        scale=scale,
        col_scale=col_scale,
        linear=linear,
        pairs=pairs,
        memory_budget=memory_budget,
        backend=backend,
    )
    values_alone = isinstance(dim, int) and target is None and linear is None
    if values_alone and not isinstance(reduce, tuple) and as_fold(name, reduce).name != "max":
        return (folded.rows if dim == 1 else folded.cols)[0]
    return as_asked_for(folded, reduce, dim, target, linear)


def as_asked_for(
    folded: Folded,
    reduce: str | Fold | tuple[str | Fold, ...],
    dim: int | tuple[int, ...],
    target: Tensor | None,
    linear: tuple[Tensor, ...] | None = None,
) -> Reduced:
    """A value for one fold, a tuple for a tuple; None for what was not asked for, or has no winner."""
    name, one = "similarity_reduce", not isinstance(reduce, tuple)
    by_rows, by_cols = directions(name, dim)
    has_max = any(as_fold(name, each).name == "max" for each in (reduce if isinstance(reduce, tuple) else (reduce,)))

    def shown(values: tuple[Tensor, ...], wanted: bool) -> Any:
        return None if not wanted else values[0] if one else values

    return Reduced(
        rows=shown(folded.rows, by_rows),
        cols=shown(folded.cols, by_cols),
        target=None if target is None else folded.target,
        linear=None if linear is None else folded.linear,
        row_argmax=shown(folded.row_argmax, by_rows and has_max),
        col_argmax=shown(folded.col_argmax, by_cols and has_max),
    )


def fold(
    problem: Problem,
    *,
    reduce: tuple[str | Fold, ...] = ("logsumexp",),
    dim: int | tuple[int, ...] = 1,
    scale: float | Tensor = 1.0,
    col_scale: float | Tensor | None = None,
    linear: tuple[Tensor, ...] | None = None,
    pairs: Pairs | None = None,
    memory_budget: int | None = None,
    unit: bool = False,
    backend: str = "auto",
) -> Folded:
    """`similarity_reduce` of matrices, biases and a target that were checked; the other arguments as there.

    `unit`: rows of x and y count as if they had length 1. 16-bit rows are not rounded again for it.

    Returns:
        One entry per fold of `reduce`, whatever `dim` is; empty where not asked for.
    """
    function, x, y = problem.names[0], problem.x, problem.y
    by_rows, by_cols = directions(function, dim)
    if not reduce:
        raise ValueError(f"{function}: reduce must name at least one fold, got ()")
    sets = LogitSets(problem, unit)
    if problem.target is not None or linear is not None:
        sets.add(scale, pairs, linear=linear)  # the first set is that of the targets and of the lists
    folds = []
    for request in reduce:
        each = as_fold(function, request)
        own_scale = scale if each.scale is None else each.scale
        own_pairs = pairs if each.pairs is None else each.pairs
        if by_rows:
            folds.append(SetFold(sets.add(own_scale, own_pairs, each.negate, bias=each.bias), each.name, cols=False))
        if by_cols and each.scale is None and col_scale is not None:
            of_columns = sets.add(col_scale, own_pairs, each.negate, of_columns=True, bias=each.bias)
            folds.append(SetFold(of_columns, each.name, cols=True))
        elif by_cols:
            folds.append(SetFold(sets.add(own_scale, own_pairs, each.negate, bias=each.bias), each.name, cols=True))
    layout = sets.layout(*folds)
    arguments = (*sets.arguments(), problem.target, *layout.encode())
    chosen = choose(function, BACKENDS, x, backend, layout)
    budget = budget_bytes(function, memory_budget, x.device.type)
    keeps = needs_gradient(*arguments) and BACKENDS[chosen].keeps
    kept = kept_size(x, y, budget, chosen) if keeps else 0
    values, argmax, target_logit, linear_sum, _ = call.similarity_reduce_forward(*arguments, kept, chosen)
    shape = (x.shape[0], problem.columns.shape[0])
    each_value, each_winner = values.split(layout.sizes(*shape)), argmax.split(layout.argmax_sizes(*shape))
    by_fold = list(zip(folds, each_value, each_winner, strict=True))
    return Folded(
        rows=tuple(value for each, value, _ in by_fold if not each.cols),
        cols=tuple(value for each, value, _ in by_fold if each.cols),
        target=target_logit,
        linear=linear_sum,
        row_argmax=tuple(winner for each, _, winner in by_fold if not each.cols),
        col_argmax=tuple(winner for each, _, winner in by_fold if each.cols),
    )


def needs_gradient(*arguments: object) -> bool:
    """Whether autograd will ask for a gradient of any argument."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def directions(function: str, dim: object) -> tuple[bool, bool]:
    """Whether `dim` asks for rows and for columns."""
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, tuple) or not dims or not set(dims) <= {0, 1} or len(set(dims)) != len(dims):
        raise ValueError(f"{function}: dim must be 0, 1 or (0, 1), got {checks.shown(dim)}")
    return 1 in dims, 0 in dims


def budget_bytes(function: str, memory_budget: object, device: str) -> int:
    """The number of bytes that `memory_budget` allows."""
    if memory_budget is None:
        return DEFAULT_MEMORY_BUDGET_OF_GPU if device == "cuda" else DEFAULT_MEMORY_BUDGET
    return checks.integer(function, "memory_budget", memory_budget, 0)


def kept_size(x: Tensor, y: Tensor | None, budget: int, backend: str) -> int:
    """How many inner products forward may keep for backward."""
    if budget == 0 or x.shape[1] < KEEP_FROM_DIMENSION:
        return 0
    size = budget // checks.accumulator(x.dtype).itemsize
    if backend == "reference":  # all or nothing
        whole = x.shape[0] * (x if y is None else y).shape[0]
        return whole if whole <= size else 0
    if backend == "hopper":  # half as many bytes; of a matrix that is compared with itself none
        return 0 if y is None else min(size, hopper.Kept.most(len(x), len(y)))
    return min(size, most_kept(x, y))


def most_kept(x: Tensor, y: Tensor | None) -> int:
    """How many inner products there are to keep, at most: tiles are padded, those below the diagonal not there."""
    rows = x.shape[0]
    return (rows + 512) * (rows + 512) // 2 if y is None else (rows + 32) * (y.shape[0] + 128)
