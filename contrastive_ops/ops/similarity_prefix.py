"""Folds of the similarity matrices of all prefixes of embeddings (Matryoshka), from one sweep."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks, extension, triton_kernels
from ..core.backends import NEVER_ON_A_DEVICE, Backend, choose, enrol, unsupported_by_cpu
from ..core.declarations import Declaration, Named, Shapes, declare
from ..core.operators import call
from ..core.problem import Layout, LogitSet, Problem
from ..core.results import named
from ..core.rules import Pairs, Slot, resolve
from ..reference import similarity_prefix as reference
from ._idle_rows import clean_rows
from .similarity_reduce import directions

# One hop to every implementation; each offers forward and backward with the same arguments.
BACKENDS = enrol(
    "similarity_prefix",
    {
        "reference": Backend(
            source="contrastive_ops/reference/similarity_prefix.py",
            functions=lambda: reference,
            unsupported=lambda x: [],
        ),
        "cpu": Backend(
            source="csrc/cpu/similarity_prefix.cpp",
            functions=functools.cache(lambda: extension.functions("similarity_prefix")),
            unsupported=unsupported_by_cpu,
        ),
        "triton": Backend(
            source="kernels/similarity_prefix.py",
            functions=functools.cache(lambda: triton_kernels.functions("similarity_prefix")),
            unsupported=triton_kernels.unsupported,
            by_name=NEVER_ON_A_DEVICE,
        ),
    },
)


def _shapes(given: Named) -> Shapes:
    x, y, prefixes = given["x"], given["y"], len(given["dims"])
    rows, columns = x.shape[0], x.shape[0] if y is None else y.shape[0]
    return (
        (prefixes, rows if given["directions"] & 1 else 0),
        (prefixes, columns if given["directions"] & 2 else 0),
        (prefixes, 0 if given["target"] is None else rows),
    )


def _check_target(given: Named) -> None:
    x, y = given["x"], given["y"]
    if given["target"] is not None:
        checks.check_index_values("similarity_prefix", "target", given["target"], (x if y is None else y).shape[0])


def _clean(given: Named, backward: bool) -> Named:
    """Rows that take part in no pair: the rules are some of those of `Pairs`."""
    ids = given["differ_rows"], given["differ_cols"]
    data = {} if ids[0] is None else dict(zip((Slot.DIFFER_ROWS, Slot.DIFFER_COLS), ids, strict=True))
    pair_data, spec = Layout((LogitSet(diagonal=given["diagonal"], data=data),), ()).encode()
    found = clean_rows({**given, "pair_data": pair_data, "spec": spec}, backward)
    return {name: found[name] for name in ("x", "y") if found}


def _finish(given: Named, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients without what float16 cannot hold in rows whose first prefix is 0.

    Such a prefix has a constant factor of 1e12 in place of its inverse length, which turns the rounding of terms that
    cancel into infinity.
    """
    if not given["normalize"] or given["x"].dtype != torch.float16:
        return gradients
    shortest = given["dims"][0]

    def within_float16(x: Tensor | None, gradient: Tensor) -> Tensor:
        if x is None or gradient.shape[0] == 0:
            return gradient
        zero = (x[:, :shortest] == 0).all(1, keepdim=True)
        beyond = (gradient.abs() > torch.finfo(torch.float16).max) & gradient.isfinite()
        return gradient.masked_fill(zero & beyond, 0.0)

    dx, dy, dscale = gradients
    return within_float16(given["x"], dx), within_float16(given["y"], dy), dscale


declare(
    Declaration(
        "similarity_prefix",
        takes="Tensor x, Tensor? y, Tensor scale, Tensor? target, Tensor? differ_rows, Tensor? differ_cols, int[] dims,"
        " SymInt? diagonal, bool normalize, int directions",
        differentiable=3,
        returns="Tensor rows, Tensor cols, Tensor target_logit",
        reads="x y scale target differ_rows differ_cols dims diagonal normalize rows cols d_rows d_cols d_target_logit",
        shapes=_shapes,
        reference=reference,
        check=_check_target,
        clean=_clean,
        finish=_finish,
    ),
    BACKENDS,
)


@named
class PrefixFolds(NamedTuple):
    """What `similarity_prefix` found out, a row for each prefix; None where not asked for.

    Attributes:
        rows: (P, N) logsumexp of each row.
        cols: (P, M) logsumexp of each column.
        target: (P, N) the logit of each row's target.
    """

    rows: Tensor | None
    cols: Tensor | None
    target: Tensor | None


def similarity_prefix(
    x: Tensor,
    y: Tensor | None = None,
    *,
    dims: Sequence[int],
    dim: int | tuple[int, ...] = 1,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    target: Tensor | None = None,
    pairs: Pairs | None = None,
    backend: str = "auto",
) -> PrefixFolds:
    """Fold the similarity matrix of every prefix of the embeddings by logsumexp, with one matmul for all prefixes.

    Equivalent to::

        for p, d in enumerate(dims):
            unit = lambda z: F.normalize(z[:, :d]) if normalize else z[:, :d]
            logits = scale * (unit(x) @ unit(y).T)                          # (N, M), in float32
            target_logit[p] = logits.gather(1, target[:, None]).squeeze(1)
            logits = logits.masked_fill(~keep, -torch.inf)                  # the rules of Pairs
            logits = logits.scatter(1, target[:, None], -torch.inf)         # left out of every fold
            rows[p], cols[p] = logits.logsumexp(1), logits.logsumexp(0)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D) of the same dtype; None for self-similarity (y = x) at half the work, folded by rows.
        dims: lengths of the prefixes, ascending, the last at most D; columns after the last take no part.
        dim: 1 folds each row, 0 folds each column, (0, 1) does both in one sweep.
        scale: float or 0-d tensor. Differentiable.
        normalize: scale every prefix of every row to length 1.
        target: (N,) int64, one column per row that is left out of every fold; its logits are returned, as by
            `similarity_reduce`.
        pairs: which pairs take part in the folds: the rules ``diagonal`` and ``differ`` of `Pairs`.
        backend: "auto", "reference", "cpu" or "triton", which "auto" does not take. An explicit backend runs or raises.

    Returns:
        `PrefixFolds` in float32 (float64 for float64 inputs). A row or column in which no pair takes part gives -inf
        and has gradient 0. NaN and inf propagate.

    Raises:
        ValueError: shapes, devices, dims or rules that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        The inner products of a prefix are those of the one before it and some more: running sums along the dimension,
        2 N M D for all prefixes. The gradient of a column is weighted by all prefixes that contain it: sums from the
        last prefix on, 6 N M D with the products, which are computed again. Normalisation costs O((N + M) D): the
        prefixes' lengths are factors of rows and columns, in float32 even for 16-bit inputs. Squared lengths must be
        within the range of float32. A row whose first prefix is 0 has no direction: what float16 cannot hold of its
        gradient is 0.

        Memory: O((N + M) (D + P)) and a few MiB of tiles; never N x M. Logits are never
        rounded to a lower precision than float32. Results are bitwise the same for any number of threads.
        Differentiable twice; the second derivative runs on the reference backend.

    Source:
        Kusupati et al., Matryoshka Representation Learning, 2022.

    Examples:
        >>> x, y = torch.randn(6, 8), torch.randn(5, 8)
        >>> folds = similarity_prefix(x, y, dims=(2, 8), scale=2.0)
        >>> torch.allclose(folds.rows[0], (2.0 * x[:, :2] @ y[:, :2].T).logsumexp(1), atol=1e-5)
        True
    """
    problem = Problem.of(("similarity_prefix", "x", "y"), x, y, target=target)
    return prefix_folds(problem, dims=dims, dim=dim, scale=scale, normalize=normalize, pairs=pairs, backend=backend)


def prefix_folds(
    problem: Problem,
    *,
    dims: Sequence[int],
    dim: int | tuple[int, ...] = 1,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    pairs: Pairs | None = None,
    backend: str = "auto",
) -> PrefixFolds:
    """`similarity_prefix` of matrices and a target that were checked."""
    (function, x_name, _), x, y, target = problem.names, problem.x, problem.y, problem.target
    by_rows, by_cols = directions(function, dim)
    if y is None and by_cols:
        raise ValueError(f"{function}: dim must be 1 for self-similarity, got {dim!r}: rows and columns are equal")
    checked_dims = check_dims(function, dims, x_name, x)
    factor = checks.one_number(function, "scale", scale, x_name, x)
    rules = _rules(function, pairs, x, problem.columns)
    diagonal = None if pairs is None else pairs.diagonal
    ids = rules.get(Slot.DIFFER_ROWS), rules.get(Slot.DIFFER_COLS)
    chosen = choose(function, BACKENDS, x, backend)
    rows, cols, target_logit = call.similarity_prefix_forward(
        x,
        y,
        factor,
        target,
        *ids,
        checked_dims,
        diagonal,
        normalize,
        int(by_rows) + 2 * int(by_cols),
        chosen,
    )
    return PrefixFolds(
        rows if by_rows else None, cols if by_cols else None, target_logit if target is not None else None
    )


# ---- Arguments -------------------------------------------------------------------------------------------------------


def check_dims(function: str, dims: Sequence[int], x_name: str, x: Tensor) -> list[int]:
    """`dims` must be lengths of prefixes of the rows of `x`, ascending."""
    found = [checks.integer(function, "dims", each, 1) for each in checks.listed(function, "dims", dims)]
    if not found or any(a >= b for a, b in zip(found[:-1], found[1:], strict=True)):
        raise ValueError(
            f"{function}: dims must be one or more ascending lengths >= 1, got {tuple(found)}\n"
            "  sort them, and put weights of prefixes into the same order"
        )
    if found[-1] > x.shape[1]:
        raise ValueError(
            f"{function}: dims must be at most the last dimension of {x_name}, "
            f"got {tuple(found)} and {x_name} {checks.shape(x)}"
        )
    return found


def _rules(function: str, pairs: Pairs | None, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
    if pairs is None:
        return {}
    known = ("diagonal", "differ")
    others = [f.name for f in dataclasses.fields(pairs) if f.name not in known and getattr(pairs, f.name) is not None]
    if others:
        raise ValueError(f"{function}: pairs must have no rules but diagonal and differ, got {', '.join(others)}")
    return resolve(function, pairs, x, y)
