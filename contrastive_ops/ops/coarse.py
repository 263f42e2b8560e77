"""A first pass of similarity_topk in a lower precision, with a proof per row that nothing was missed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.offsets import common_row
from ..core.problem import Problem
from ..core.records import changed
from ..core.rule_kinds import Data, Places
from ..core.rule_slices import rows_of
from ..core.rules import Pairs, bound_rules, resolve
from ._nearest import products

DTYPES = (torch.bfloat16, torch.int8)


class RoundedRows(NamedTuple):
    """A corpus in a lower precision.

    Attributes:
        rows: (M, D) bfloat16, or int8 codes.
        scale: (M,) for codes, what one unit of a row is worth.
        error: (M,) length of what rounding took from each row.
        norm: (M,) length of each row.
    """

    rows: Tensor
    scale: Tensor | None
    error: Tensor
    norm: Tensor


@dataclass(frozen=True, eq=False)
class Coarse:
    """Rows of a corpus in a lower precision, for the first pass of `similarity_topk`.

    The first pass keeps some candidates for each row; their scores are computed again from the corpus itself, and the
    list is certified where no other column can belong to it: with x', y' the rounded rows,
    ``|<x, y> - <x', y'>| <= |x - x'| |y| + |x'| |y - y'|``.

    Args:
        dtype: torch.bfloat16, or torch.int8 with a scale for each row.
        candidates: columns that the first pass keeps for each row; None: 2 k + 64, for int8 8 k + 64. Those whose score
            cannot reach the list are not computed again.
        retry: search the rows without a certificate again in full precision. Otherwise their lists are the best of the
            candidates, and `TopK.certified` tells.
        rounded: the rounded rows; made from the corpus at each call where it is None. See `of`.

    Examples:
        >>> from contrastive_ops import similarity_topk
        >>> corpus = torch.nn.functional.normalize(torch.randn(1000, 64), dim=1)
        >>> coarse = Coarse.of(corpus, torch.int8)             # 64 kB in place of 256
        >>> found = similarity_topk(corpus[:4], corpus, 10, coarse=coarse)
        >>> found.indices[:, 0]
        tensor([0, 1, 2, 3])
    """

    dtype: torch.dtype = torch.bfloat16
    candidates: int | None = None
    retry: bool = True
    rounded: RoundedRows | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check what does not depend on the matrices."""
        checks.check_choice("Coarse", "dtype", self.dtype, DTYPES)
        if self.candidates is not None:
            object.__setattr__(self, "candidates", checks.integer("Coarse", "candidates", self.candidates, 1))

    @classmethod
    def of(
        cls, y: Tensor, dtype: torch.dtype = torch.bfloat16, *, candidates: int | None = None, retry: bool = True
    ) -> Coarse:
        """Round the rows of a corpus once, for many searches.

        Args:
            y: (M, D) floating, as it will be searched: normalised already where the search is by cosine.
            dtype: torch.bfloat16 or torch.int8.
            candidates: see the class.
            retry: see the class.

        Raises:
            ValueError, TypeError: arguments that do not fit.
        """
        checks.check_matrix("Coarse.of", "y", y)
        made = cls(dtype, candidates, retry)
        return changed(made, rounded=made.round(y))

    def round(self, y: Tensor) -> RoundedRows:
        """The rows of `y` in the lower precision."""
        y = y.detach()
        wide = y.to(checks.accumulator(y.dtype))
        if self.dtype == torch.bfloat16:
            rows, scale = y.to(torch.bfloat16), None
            back = rows.to(wide.dtype)
        else:
            scale = wide.abs().amax(1) / 127 if y.shape[1] > 0 else wide.new_zeros(len(y))
            unit = torch.where(scale > 0, scale, 1.0)[:, None]
            rows = (wide / unit).round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
            back, scale = rows.to(wide.dtype) * scale[:, None], scale.float()
        return RoundedRows(
            rows, scale, torch.linalg.vector_norm(wide - back, dim=1), torch.linalg.vector_norm(wide, dim=1)
        )


def _doubt(x: Tensor, rounded: Tensor, corpus: RoundedRows) -> Tensor:
    """(N,) how far the similarities of each row may be off."""
    dtype = checks.accumulator(x.dtype)
    wide, rounded = x.to(dtype), rounded.to(dtype)
    norm, error = (v.max() if len(v) else wide.new_zeros(()) for v in (corpus.norm, corpus.error))
    lost = torch.linalg.vector_norm(wide - rounded, dim=1)
    length = torch.linalg.vector_norm(rounded, dim=1)
    # Both passes add D products in float32, and the lengths themselves are rounded.
    sums = 2 * (x.shape[1] + 8) * torch.finfo(torch.float32).eps / 2
    return (lost * norm + length * (error + sums * (norm + error))) * (1 + 1e-4)


def _added(*parts: Tensor | None) -> Tensor | float:
    """(N,) or a number: what rounding takes where biases and weights of classes are added to logits, in both passes."""
    most: Tensor | float = 0.0
    for at, part in enumerate(parts):
        if part is not None and part.numel() > 0:
            size = part.detach().abs().nan_to_num(0.0, posinf=0.0)  # what is infinite stays so, and has no neighbour
            most = most + (size if at == 0 else size.max())
    return 4 * torch.finfo(torch.float32).eps * most


def _relaxed(pairs: Pairs, data: Data, doubt: Tensor) -> Pairs:
    """The rules with bounds that no pair fails because of rounding; `data` are the bounds as backends take them."""
    most = doubt.max() if len(doubt) else doubt.new_zeros(())
    wider: dict[str, Any] = {}
    for rule in bound_rules():
        wider[rule.name] = rule.decode(rule.relaxed(data, lambda _, of_columns: most if of_columns else doubt))
    return changed(pairs, **wider)


def _worth_computing(values: Tensor, indices: Tensor, k: int, doubt: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates that may be among the k best, others replaced by -1, and (N,) the best coarse score of all others.

    The k best of the first pass have scores of at least the k-th minus the doubt, and what is more than twice the doubt
    below it cannot reach that.
    """
    last = values[:, k - 1 : k] - 2 * doubt[:, None]
    kept = values >= last
    after = kept.sum(1, keepdim=True).clamp_max(values.shape[1] - 1)  # lists are in order
    # Columns that the first pass left out are no better than its last candidate.
    return indices.masked_fill(~kept, -1), values.gather(1, after).squeeze(1)


def search(
    problem: Problem,
    k: int,
    coarse: Coarse,
    metric: str,
    scale: float | Tensor,
    pairs: Pairs | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return ((N, k) int64 the columns of each row, best first, and (N,) whether the list is certified)."""
    from .similarity_topk import logits_at, order, select

    x, y, row_bias, col_bias = problem.x, problem.columns, problem.row_bias, problem.col_bias
    left, right = products(x, y, common_row(x)) if metric == "sqeuclidean" else (x, y)
    corpus = coarse.round(right) if coarse.rounded is None else coarse.rounded
    if corpus.rows.shape != right.shape:
        raise ValueError(
            f"similarity_topk: coarse must be made from y, got rows {checks.shape(corpus.rows)} and y "
            f"{checks.shape(right)}\n  make it with Coarse.of(y)"
        )
    if y.shape[0] == 0:  # nothing was left out of an empty list
        indices = torch.full((x.shape[0], k), -1, dtype=torch.int64, device=x.device)
        return indices, torch.ones(x.shape[:1], dtype=torch.bool, device=x.device)
    rounded = left.to(torch.bfloat16)
    doubt = _doubt(left, rounded, corpus)
    bounds = {} if pairs is None else resolve("similarity_topk", pairs, x, y, bound_rules())
    usual = (2 if coarse.dtype == torch.bfloat16 else 8) * k + 64
    biases = [None if bias is None else bias.to(torch.float32) for bias in (row_bias, col_bias)]
    first = select(
        Problem(problem.names, rounded, corpus.rows, *biases),
        max(k, coarse.candidates or usual),
        scale=scale,
        pairs=_relaxed(pairs, bounds, doubt) if pairs is not None and bounds else pairs,
        code_scale=corpus.scale,
        backend=backend,
    ).top
    size = scale.detach().abs() if isinstance(scale, Tensor) else abs(scale)
    table = None if pairs is None or pairs.log_weight is None else pairs.log_weight[0]
    doubt_of_logits = size * doubt + _added(row_bias, col_bias, table)
    candidates, rest = _worth_computing(first.values, first.indices, k, doubt_of_logits)
    exact = logits_at(problem, candidates, scale=scale, pairs=pairs, metric=metric, backend=backend)
    if bounds:
        dots = logits_at(Problem(problem.names, x, y), candidates, metric=metric, backend=backend)
        places = Places((slice(None), None), candidates.clamp_min(0), dots)
        for rule in (rule for rule in bound_rules() if rule.is_in(bounds)):
            exact = exact.masked_fill(rule.mask(bounds, places), -torch.inf)
    values, indices, _, _ = order(exact, candidates, k, backend)
    certified = (rest + doubt_of_logits < values[:, -1]) | (rest == -torch.inf)
    if coarse.retry and not bool(certified.all()):
        rows = (~certified).nonzero().squeeze(1)
        again = select(
            Problem(problem.names, x[rows], y, None if row_bias is None else row_bias[rows], col_bias),
            k,
            scale=scale[rows] if isinstance(scale, Tensor) and scale.dim() else scale,
            pairs=rows_of(pairs, rows, y.shape[0]),
            metric=metric,
            backend=backend,
        ).top
        indices = indices.index_copy(0, rows, again.indices)
    return indices, certified
