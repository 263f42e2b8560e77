"""Sinkhorn's algorithm: balanced assignment of rows to columns, of a matrix that is there or of one that is not.

A plan is ``exp(scores / epsilon + u + v)`` with a number for each row and for each column. An iteration chooses v so
that the columns have their mass, and then u for the rows. What is needed of the scores are logsumexps of rows and
columns: of a matrix that is there (`sinkhorn`), or folds of one that is not kept (`column_potentials`), as of rows and
tens of thousands of prototypes. A row of the last plan is the softmax of ``scores / epsilon + v`` in any case.

A matrix that is there is exponentiated once, and from then on rows and columns are multiplied, in one pass an
iteration. Where a sum leaves float32's range that way, the logarithms decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import chunks_of_rows
from ..core.ordered import in_parts, ordered_logsumexp
from ..core.problem import Problem
from .similarity_reduce import fold

# Numbers that are multiplied and added up at once: few enough for a cache, enough for two threads.
CHUNK = 1 << 19
# Rows that are added up by one product.
BLOCK = 64


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    row_mass: Tensor | None = None,
    col_mass: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Sinkhorn-Knopp: assign rows to columns so that all columns receive their share; SwAV's codes, BASE routing.

    Equivalent to::

        plan = (scores / epsilon).exp()
        for _ in range(iterations):
            plan = plan / plan.sum(-2, keepdim=True) * col_mass[None]           # (K,), default N / K each
            plan = plan / plan.sum(-1, keepdim=True) * row_mass[:, None]        # (N,), default 1 each

    Args:
        scores: (..., N, K) float32, bfloat16, float16 or float64: cosines with prototypes, logits of a router. -inf
            forbids a pair. Matrices of the leading dimensions are balanced each on its own.
        epsilon: what scores are divided by; a number > 0. Smaller is more decided, and takes more iterations.
        iterations: at least 1. Rows have their mass after each, columns the better the more there are.
        row_mass: (N,) numbers >= 0, 0 for padding.
        col_mass: (K,) numbers >= 0 of the same sum, 0 for a column that receives nothing.
        group: the processes over which rows are spread (a `ProcessGroup` or a `DeviceMesh` of one dimension): columns
            are balanced over the rows of all. None for those of this process alone; all with
            ``torch.distributed.group.WORLD``. Processes may have different numbers of rows.

    Returns:
        (..., N, K) the plan, in float32 (float64 for float64 inputs): not negative, with ``row_mass`` as sums of rows.
        A constant, without a gradient. A score that is NaN makes its matrix NaN.

    Raises:
        ValueError: masses that are negative or of unequal sums, a row or column that has a mass and no pair, on any
            process.
        TypeError: dtypes that do not fit.

    Note:
        Memory that of the plan. A router of balanced tokens (BASE) takes the best experts of the plan, and its gates
        from the logits: ``route(logits, k, allowed=sinkhorn(logits).topk(k).indices)``.

    Source:
        Cuturi, Sinkhorn Distances, 2013; Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster
        Assignments, 2020; the router: Lewis et al., BASE Layers, 2021, with Clark et al., Unified Scaling Laws for
        Routed Language Models, 2022.

    Examples:
        >>> plan = sinkhorn(torch.tensor([[2.0, 0.0], [2.0, 1.0], [2.0, 1.5], [2.0, 1.9]]), epsilon=0.1, iterations=50)
        >>> plan.sum(0).round(decimals=2), plan.argmax(1)
        (tensor([2., 2.]), tensor([0, 0, 1, 1]))
    """
    name = "sinkhorn"
    checks.check_floating(name, "scores", scores)
    if scores.dim() < 2:
        raise ValueError(f"{name}: scores must have shape (..., N, K), got {checks.shape(scores)}")
    epsilon = checks.number(name, "epsilon", epsilon, "(0, inf)")
    iterations = checks.integer(name, "iterations", iterations, 1)
    with autocast.disabled(scores):
        scores = scores.detach().to(checks.accumulator(scores.dtype))
        ranks = Ranks.find(name, group)
        masses = _masses(name, scores, row_mass, col_mass, ranks)
        if scores.shape[-1] == 0 or (ranks.team is None and scores.numel() == 0):
            return torch.zeros_like(scores)
        if checks.may_read(scores, waits=True):
            found = _multiplied(scores, epsilon, masses, iterations, ranks)
            if found is not None:
                return found[0]
            _check_pairs(name, scores, masses, ranks)
        rows, columns = _lse_of(scores, epsilon)
        v = _potentials(rows, columns, masses, iterations, ranks)
        plan = (scores / epsilon + v[..., None, :]).softmax(-1)
        return torch.where(masses.rows[:, None] > 0, masses.rows[:, None] * plan, 0.0)


@torch.no_grad()
def column_potentials(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    iterations: int,
    group: Any,
    kept: int,
    backend: str,
) -> Tensor:
    """(K,) v of the balanced plan of ``scale * x @ y.T``, whose rows are the softmax of these logits plus v.

    Args:
        names: the function and the arguments to name in errors.
        x: (N, D) in the accumulation dtype.
        y: (K, D).
        scale: 1 / epsilon.
        iterations: at least 1.
        group: as in `sinkhorn`.
        kept: bytes of logits that may be in memory at once; more are folded, and made again for each fold.
        backend: as in `similarity_reduce`.
    """
    ranks = Ranks.find(names[0], group)
    N, K = x.shape[0], y.shape[0]
    masses = Masses(x.new_ones(N), _even_shares(ranks.sum(x.new_full((), N, dtype=torch.float64)), K, x))
    if checks.may_read(x, waits=True) and 0 < N * K * x.element_size() <= kept and not ranks.team:
        found = _multiplied((x @ y.T).mul_(scale), 1.0, masses, iterations, ranks)
        if found is not None:
            return found[1]
    options: dict[str, Any] = {"scale": scale, "backend": backend}

    def rows(v: Tensor) -> Tensor:
        return fold(Problem.of(names, x, y, None, v), **options).rows[0]

    def columns(u: Tensor) -> Tensor:
        return fold(Problem.of(names, x, y, u), dim=0, **options).cols[0]

    return _potentials(rows, columns, masses, iterations, ranks)


class Masses(NamedTuple):
    """(N,) and (K,) what rows and columns have."""

    rows: Tensor
    columns: Tensor


class Ranks:
    """The processes over which rows are spread; of one alone nothing is exchanged. Sums are in the order of ranks."""

    def __init__(self, team: Any) -> None:
        self.team = team

    @classmethod
    def find(cls, function: str, group: Any) -> Ranks:
        """Those of a group, or this process alone for None."""
        if group is None:
            return cls(None)
        from ..distributed._groups import find_team  # which one process does not import

        return cls(find_team(function, group))

    def each(self, x: Tensor) -> Tensor:
        """(ranks, ...) the tensor of each."""
        if self.team is None:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.team.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.team.group)
        return torch.stack(parts)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all."""
        return x if self.team is None else self.each(x).sum(0)

    def max(self, x: Tensor) -> Tensor:
        """The maximum over all."""
        return x if self.team is None else self.each(x).amax(0)


# ---- Iterations ------------------------------------------------------------------------------------------------------


def _potentials(
    rows: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    masses: Masses,
    iterations: int,
    ranks: Ranks,
) -> Tensor:
    """(..., K) v from logsumexps over each row with v added, and over each column with u added."""
    log_rows, log_columns = masses.rows.log(), masses.columns.log()
    u = torch.where(masses.rows > 0, torch.zeros_like(masses.rows), -torch.inf)
    for iteration in range(iterations):
        v = log_columns - ranks.each(columns(u)).logsumexp(0)
        v = torch.where(masses.columns > 0, v, -torch.inf)
        if iteration + 1 < iterations:
            u = torch.where(masses.rows > 0, log_rows - rows(v), -torch.inf)
    return v


def _lse_of(scores: Tensor, epsilon: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Both logsumexps of a matrix that is there."""
    logits = scores / epsilon

    def over(x: Tensor, dim: int) -> Tensor:
        found = _without(x, dim)
        return ordered_logsumexp(x.flatten()).view(found) if found.numel() == 1 else x.logsumexp(dim)

    return lambda v: over(logits + v[..., None, :], -1), lambda u: over(logits + u[..., None], -2)


def _multiplied(
    scores: Tensor, epsilon: float, masses: Masses, iterations: int, ranks: Ranks
) -> tuple[Tensor, Tensor] | None:
    """The plan and v by multiplications; None where float32 has no such numbers, or where there are no such plans."""
    N, K = scores.shape[-2:]
    plan, sums = torch.empty_like(scores), scores.new_zeros((*scores.shape[:-2], K))
    shift = scores.amax(-1, keepdim=True) / epsilon
    shift = torch.where(shift.isfinite(), shift, 0.0)
    # Each row less its largest number: no exponential exceeds 1.
    largest = shift.amax(-2, keepdim=True) if N > 0 else shift.new_full((*shift.shape[:-2], 1, 1), -torch.inf)
    has_mass = masses.rows[:, None] > 0
    u, all_have = (shift - ranks.max(largest)).exp() * has_mass, bool(has_mass.all())
    step = max(1, CHUNK * N // max(scores.numel(), 1))
    chunks = list(chunks_of_rows(N, step if step < BLOCK else step // BLOCK * BLOCK))
    buffer = scores.new_empty((*scores.shape[:-2], chunks[0].stop, K))
    parts = [[each[..., rows, :] for each in (scores, -shift, plan, u)] for rows in chunks]
    spaces = [buffer[..., : rows.stop - rows.start, :] for rows in chunks]
    for (of_scores, of_shift, of_plan, of_u), space in zip(parts, spaces, strict=True):
        torch.add(of_shift, of_scores, alpha=1 / epsilon, out=of_plan).exp_()
        sums += _column_sums(of_plan, of_u, space)
    for iteration in range(iterations):
        v = torch.where(masses.columns > 0, masses.columns / ranks.sum(sums), 0.0)[..., None, :]
        sums, last = torch.zeros_like(sums), iteration + 1 == iterations
        for rows, (_, _, of_plan, of_u), space in zip(chunks, parts, spaces, strict=True):
            scaled = torch.mul(of_plan, v, out=of_plan if last else space)
            torch.div(masses.rows[rows, None], _sum(scaled, -1)[..., None], out=of_u)
            if not all_have:  # a row that has no mass has perhaps no pair
                of_u.masked_fill_(~has_mass[rows], 0.0)
            if last:
                of_plan.mul_(of_u)
            else:
                sums += _column_sums(of_plan, of_u, space)
    in_range = torch.stack([(each < 1e30).all() for each in (u, v)]).all()
    if bool(ranks.max((~in_range).to(torch.uint8))):
        return None
    return plan, v[..., 0, :].log()


def _column_sums(plan: Tensor, u: Tensor, space: Tensor) -> Tensor:
    """``(plan * u).sum(-2)``: of many columns by products of few rows each, whose sums have one order."""
    rows, K = plan.shape[-2:]
    if plan.dim() > 2 or K < 256 or rows % BLOCK or rows == 0:
        return _sum(torch.mul(plan, u, out=space), -2)
    return torch.bmm(u.view(-1, 1, BLOCK), plan.view(-1, BLOCK, K)).sum((0, 1))


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _masses(function: str, scores: Tensor, row_mass: Tensor | None, col_mass: Tensor | None, ranks: Ranks) -> Masses:
    """Both masses in the dtype of the scores."""
    given = []
    for name, mass, size in (("row_mass", row_mass, scores.shape[-2]), ("col_mass", col_mass, scores.shape[-1])):
        if mass is not None:
            checks.check_vector(function, name, mass, size, "scores", scores)
            checks.check_constant(function, name, mass)
            wrong = mass[~((mass >= 0) & (mass < torch.inf))] if checks.may_read(mass) else mass[:0]
            if len(wrong):
                raise ValueError(f"{function}: {name} must be finite and >= 0, got {float(wrong[0]):g}")
            mass = mass.to(scores.dtype)
        given.append(mass)
    rows = scores.new_ones(scores.shape[-2]) if given[0] is None else given[0]
    total = ranks.sum(rows.double().sum())
    if given[1] is None:
        return Masses(rows, _even_shares(total, scores.shape[-1], scores))
    received = given[1].double().sum()
    if checks.may_read(received) and abs(float(received) - float(total)) > 1e-3 * max(float(received), float(total)):
        raise ValueError(
            f"{function}: row_mass and col_mass must have one sum, got {float(total):g} and {float(received):g}\n"
            "  without row_mass each row has 1"
        )
    return Masses(rows, given[1])


def _even_shares(total: Tensor, columns: int, like: Tensor) -> Tensor:
    """(K,) an equal share of the mass for each column."""
    return (like.new_ones(columns, dtype=torch.float64) * (total / max(columns, 1))).to(like.dtype)


def _check_pairs(function: str, scores: Tensor, masses: Masses, ranks: Ranks) -> None:
    """Rows and columns that have a mass must have a pair, which all processes find out together."""
    some = ~(scores == -torch.inf)  # NaN is a number that is wrong, not a pair that is not there
    rows, columns = some.any(-1), ranks.max(some.any(-2).to(torch.uint8)).bool()
    empty_rows, empty_columns = ~rows & (masses.rows > 0), ~columns & (masses.columns > 0)
    for name, empty in (("row", empty_rows), ("col", empty_columns)):
        if bool(ranks.max(empty.any().to(torch.uint8)).bool()):
            where = int(empty.nonzero()[0, -1]) if bool(empty.any()) else "one of another process"
            raise ValueError(
                f"{function}: scores must not be -inf in all of a {'row' if name == 'row' else 'column'}, got "
                f"{'row' if name == 'row' else 'column'} {where}\n"
                f"  give it {name}_mass 0, which leaves it out"
            )


def _sum(x: Tensor, dim: int) -> Tensor:
    """``x.sum(dim)``; torch splits a sum among its threads where it is the only one."""
    found = _without(x, dim)
    return in_parts(x.flatten()).view(found) if found.numel() == 1 else x.sum(dim)


def _without(x: Tensor, dim: int) -> torch.Size:
    """The shape without the last dimension, or the one before it."""
    return x.shape[:-1] if dim == -1 else x.shape[:-2] + x.shape[-1:]
