"""What softmax losses share about columns: whose target, a row's own negatives, label smoothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.folds import Fold
from ..core.ordered import ordered_sum, segment_rows
from ..core.rules import Pairs
from ..core.unit_rows import unit_rows


def check_own_column(function: str, query: Tensor, key: Tensor) -> None:
    """Row i's target is column i, which must exist."""
    if key.shape[0] < query.shape[0]:
        raise ValueError(
            f"{function}: key must have at least as many rows as query where target is not given, "
            f"got query {checks.shape(query)} and key {checks.shape(key)}"
        )


def own_column(function: str, query: Tensor, key: Tensor) -> Tensor:
    """(N,) column i for row i, which must exist."""
    check_own_column(function, query, key)
    return torch.arange(query.shape[0], device=query.device)


def checked_target(function: str, name: str, target: Tensor, x_name: str, x: Tensor, columns: int) -> Tensor:
    """`target` must name one of the first `columns` columns for each row of `x`."""
    target = checks.check_index(function, name, target, x.shape[0], x_name, x)
    # Of these columns alone: a target among shared negatives is a mistake that the operator could not see.
    # On a GPU it goes unseen, and the row of a target that is no column at all gets NaN.
    checks.check_index_values(function, name, target, columns, waits=False)
    return target


def checked_own_target(function: str, target: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """`target`, which must name a row of key for each query; None where each has its own."""
    if target is None:
        check_own_column(function, query, key)
        return None
    return checked_target(function, "target", target, "query", query, key.shape[0])


def checked_row_negatives(
    function: str, query: Tensor, row_negatives: object, x_name: str = "query", name: str = "row_negatives"
) -> Tensor:
    """`row_negatives`, which must be (N, D) or (N, K, D), of the query's dtype and device, as (N, K, D)."""
    row_negatives = checks.check_tensor(function, name, row_negatives)
    each = row_negatives[:, None] if row_negatives.dim() == 2 else row_negatives
    if each.dim() != 3 or each.shape[::2] != query.shape:
        rows, depth = query.shape
        raise ValueError(
            f"{function}: {name} must have shape ({rows}, {depth}) or ({rows}, K, {depth}), "
            f"got {checks.shape(row_negatives)}"
        )
    if row_negatives.dtype != query.dtype:
        raise TypeError(
            f"{function}: {name} must have the same dtype as {x_name}, "
            f"got {x_name} {query.dtype} and {name} {row_negatives.dtype}"
        )
    checks.check_device(function, x_name, query, name, row_negatives)
    return each


def checked_row_mask(function: str, name: str, mask: object, row_negatives: Tensor) -> Tensor:
    """(N, K) bool: which of the (N, K, D) negatives of each row there are; (N,) says it of all that a row has."""
    mask = checks.check_tensor(function, name, mask)
    rows, each = row_negatives.shape[:2]
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: {name} must be a bool tensor, got {mask.dtype}")
    if mask.shape not in ((rows,), (rows, each)):
        raise ValueError(f"{function}: {name} must have shape ({rows},) or ({rows}, {each}), got {checks.shape(mask)}")
    checks.check_device(function, "row_negatives", row_negatives, name, mask)
    return mask if mask.dim() == 2 else mask[:, None].expand(rows, each)


def with_margin(scale: float | Tensor, margin: float | Tensor) -> Callable[[Tensor], Tensor] | None:
    """What becomes of the targets' logits whose similarities are less by the margin; None where nothing does."""
    if not isinstance(margin, Tensor) and not margin:
        return None
    return lambda logit: logit - scaled(scale, torch.zeros_like(logit) + margin)


def check_pairs(function: str, pairs: object, name: str = "pairs") -> None:
    """`pairs` must be rules."""
    if pairs is not None and not isinstance(pairs, Pairs):
        raise TypeError(f"{function}: {name} must be Pairs or None, got {type(pairs).__name__}")


def check_filters(
    function: str, pairs: object, col_bias: object, columns: int, x_name: str, x: Tensor, name: str = "col_bias"
) -> None:
    """`pairs` must be rules, and the bias (columns,) numbers."""
    check_pairs(function, pairs)
    if col_bias is not None:
        checks.check_vector(function, name, col_bias, columns, x_name, x)


def check_expected(
    function: str, log_expected: object, indices: Tensor, columns: int, x_name: str, x: Tensor, words: str = "indices"
) -> None:
    """`log_expected` must have a number of each column, or of each of the (N, P) indices."""
    found = checks.check_tensor(function, "log_expected", log_expected)
    if found.dim() != 2:
        checks.check_vector(function, "log_expected", found, columns, x_name, x)
        return
    if found.shape != indices.shape:
        raise ValueError(
            f"{function}: log_expected must have shape ({columns},) or, of {words}, {checks.shape(indices)}, "
            f"got {checks.shape(found)}"
        )
    checks.check_floating(function, "log_expected", found)
    checks.check_device(function, x_name, x, "log_expected", found)


def less_expected(logits: Tensor, log_expected: Tensor, indices: Tensor) -> Tensor:
    """The (N, P) logits of what was drawn, less the logarithms of how often that was expected; -inf where none was."""
    none = indices < 0
    shift = log_expected.to(logits.dtype)
    shift = segment_rows(shift, indices.flatten()).view(indices.shape) if shift.dim() == 1 else shift
    return torch.where(none, -torch.inf, logits - torch.where(none, 0.0, shift))


def wide(x: Tensor, unit: bool = False) -> Tensor:
    """Rows in the accumulation dtype, of length 1 where `unit`."""
    x = x.to(checks.accumulator(x.dtype))
    return unit_rows(x) if unit else x


def partner_similarity(x: Tensor, y: Tensor, unit: bool = False) -> Tensor:
    """(N,) inner product of each row with its partner, or (N, K) with its K partners, in the accumulation dtype."""
    with autocast.disabled(x):
        x, y = wide(x, unit), wide(y, unit)
        return torch.einsum("nd,nkd->nk", x, y) if y.dim() == 3 else (x * y).sum(1)


def by_row(scale: float | Tensor, like: Tensor) -> float | Tensor:
    """The scale in the dtype of `like`; one of each row as a column vector."""
    if not isinstance(scale, Tensor):
        return scale
    scale = scale.to(device=like.device, dtype=like.dtype)
    return scale[:, None] if scale.dim() == 1 else scale


def scaled(scale: float | Tensor, rows: Tensor) -> Tensor:
    """`rows` (N,) or (N, K) times the scale, which may be one of each row."""
    factor = by_row(scale, rows)
    if isinstance(factor, Tensor) and factor.dim() == 2 and rows.dim() == 1:
        return factor[:, 0] * rows
    return factor * rows


# ---- Label smoothing -----------------------------------------------------------------------------------------------


def smoothing_share(
    function: str, label_smoothing: float | Tensor, x_name: str, x: Tensor, smooth: str = "all"
) -> float | Tensor | None:
    """Check `label_smoothing`: a number or (N,) numbers in [0, 1]. None where there is nothing to smooth."""
    checks.check_choice(function, "smooth", smooth, ("all", "others"))
    if not isinstance(label_smoothing, Tensor):
        return checks.number(function, "label_smoothing", label_smoothing, "[0, 1]") or None
    if label_smoothing.numel() == 1:
        label_smoothing = checks.one_number(function, "label_smoothing", label_smoothing, x_name, x).expand(x.shape[0])
    checks.check_vector(function, "label_smoothing", label_smoothing, x.shape[0], x_name, x)
    if checks.may_read(label_smoothing):
        wrong = label_smoothing.detach()[~((label_smoothing >= 0) & (label_smoothing <= 1))]
        if wrong.numel() > 0:
            raise ValueError(f"{function}: label_smoothing must be in [0, 1], got {float(wrong[0])}")
    return label_smoothing.to(checks.accumulator(x.dtype))


def share_of_all(share: float | Tensor, smooth: str, count: int | Tensor) -> float | Tensor:
    """The share that spread over all `count` columns gives what `share` gives over all but the target."""
    if smooth == "all":
        return share
    if isinstance(count, Tensor):
        others = count - 1
        return share * torch.where(others > 0, count / others.clamp_min(1), 0.0)
    return share * (count / (count - 1)) if count > 1 else share * 0.0


def smoothing_folds(share: float | Tensor | None, pairs: Pairs | None) -> tuple[Fold, ...]:
    """What label smoothing needs of the sweep: nothing where every pair takes part, because sums of rows are enough."""
    return () if share is None or pairs is None else (Fold("sum"), Fold("count"))


def logit_sums(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    of_columns: bool = False,
    unit: bool = False,
    col_bias: Tensor | None = None,
) -> Tensor:
    """Each row's (or column's) sum of logits; linear, so that it takes O((N + M) D)."""
    with autocast.disabled(x):
        x, y = wide(x, unit), wide(y, unit)
        # Not a matrix-vector product: the bits of one depend on the number of threads in some libraries.
        if of_columns:
            sums = (y * (by_row(scale, x) * x).sum(0)).sum(1)
            return sums if col_bias is None else sums + x.shape[0] * col_bias.to(sums.dtype)
        sums = scaled(scale, (x * y.sum(0)).sum(1))
        return sums if col_bias is None else sums + ordered_sum(col_bias.to(sums.dtype))


def sum_and_count(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    target_logit: Tensor,
    folded: Sequence[Tensor],
    of_columns: bool = False,
    unit: bool = False,
    col_bias: Tensor | None = None,
) -> tuple[Tensor, int | Tensor]:
    """Each row's (or column's) sum and number of logits that take part; `folded`: the results of `smoothing_folds`."""
    if folded:
        return folded[0] + target_logit, folded[1] + 1
    return logit_sums(x, y, scale, of_columns, unit, col_bias), (x if of_columns else y).shape[0]


def mean_logit(total: Tensor, count: int | Tensor, own: tuple[Tensor, int | Tensor] | None = None) -> Tensor:
    """(N,) mean logit over the columns of the sweep and those of each row alone, whose sum and number are given."""
    return total / count if own is None else (total + own[0]) / (count + own[1])
