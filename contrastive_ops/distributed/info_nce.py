"""InfoNCE with the keys of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..core import autocast, checks
from ..core.rules import Pairs
from ..losses import _arguments
from ..losses._columns import (
    check_filters,
    checked_own_target,
    checked_row_negatives,
    partner_similarity,
    scaled,
    smoothing_share,
)
from ..losses._row_softmax import OwnColumns, row_softmax
from ..losses.info_nce import rules_of_columns
from ._agreement import Agreement
from ._groups import Group, find_team, local_tensor
from ._rows import local_reduction, rank_share


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    row_negatives: Tensor | None = None,
    target: Tensor | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    negative_pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    margin: float = 0.0,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
    group: Group = None,
    schedule: str = "auto",
    average: bool = True,
    check: bool = True,
) -> Tensor:
    """`losses.info_nce` of the queries of all ranks with the keys and negatives of all ranks.

    Equivalent to::

        queries, keys, others = (all_gather(each) for each in (query, key, negatives))      # with gradients
        losses.info_nce(queries, keys, others, ...)                 # the mean over ranks of what is returned

    Args:
        query: (N, D) this rank's queries; see `clip` for what all ranks share.
        key: (M, D) this rank's keys; query i belongs to key ``target[i]`` of this rank.
        negatives: (K, D) more columns for every query of all ranks, this rank's part of them.
        row_negatives: (N, D) or (N, K', D), more columns for each query alone.
        target: (N,) int64 in [0, M), counted on this rank. None: query i belongs to key i, and M >= N.
        temperature: as in `losses.info_nce`; scale too.
        scale: 1 / temperature instead; not both.
        pairs: rules of this rank's keys, as in `clip`.
        negative_pairs: rules of this rank's negatives, likewise.
        col_bias: (M + K,) of this rank's columns.
        margin: as in `losses.info_nce`; ``label_smoothing`` and ``z_loss`` too.
        label_smoothing: share of the target distribution that is spread over all columns.
        z_loss: factor of the squared logarithm of the denominator.
        weight: (N,) of this rank's queries; the mean divides by the sum over all ranks.
        reduction: "mean" or "sum" over the queries of all ranks, or "none": the losses of this rank's.
        normalize: scale all rows to length 1 first.
        memory_budget: as in `losses.info_nce`; of "ring" for each block.
        backend: as in `losses.info_nce`.
        group: as in `clip`; ``schedule``, ``average`` and ``check`` too.
        schedule: "auto", "gather" or "ring".
        average: for gradients that are averaged over ranks afterwards, as DDP and FSDP do.
        check: compare shapes, dtypes and options of all ranks first.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.

    Note:
        6 N_local M_all D operations for "gather", which forms gradients in the forward pass, 8 for "ring".
    """
    name = "info_nce"
    team = find_team(name, group, query, key)
    query, key = local_tensor(query), local_tensor(key)
    common: dict[str, Any] = {"temperature": temperature, "scale": scale, "col_bias": col_bias, "margin": margin}
    common |= {"label_smoothing": label_smoothing, "z_loss": z_loss, "weight": weight, "reduction": reduction}
    if team is None:
        common |= {"row_negatives": row_negatives, "target": target, "pairs": pairs, "normalize": normalize}
        common["negative_pairs"] = negative_pairs
        return losses.info_nce(query, key, negatives, memory_budget=memory_budget, backend=backend, **common)
    with Agreement(name, team, check) as agreed:
        _arguments.check_reduction(name, reduction)
        margin = checks.number(name, "margin", margin, "[0, inf)")
        z_loss = checks.number(name, "z_loss", z_loss, "[0, inf)")
        query, key, negatives, row_negatives = autocast.cast(query, key, negatives, row_negatives)
        checks.check_matrices(name, "query", query, "key", key)
        if weight is not None:
            _arguments.check_weight(name, weight, query.shape[0], "query", query)
            rows = (query, row_negatives, target, label_smoothing)
            query, row_negatives, target, label_smoothing = (_arguments.of_weighted(weight, row) for row in rows)
            temperature, scale = (_arguments.of_weighted(weight, factor, 1) for factor in (temperature, scale))
        scale = _arguments.resolve_scale(name, temperature, scale, 0.07)
        share = smoothing_share(name, label_smoothing, "query", query)
        target = checked_own_target(name, target, query, key)
        if negatives is not None:
            checks.check_matrices(name, "query", query, "negatives", negatives)
        pairs, also = rules_of_columns(True, query, key, negatives, row_negatives, pairs, negative_pairs)
        key = key if negatives is None else torch.cat([key, negatives])
        check_filters(name, pairs, col_bias, key.shape[0], "query", query)
        if row_negatives is not None:
            row_negatives = checked_row_negatives(name, query, row_negatives)
        agreed.compare(query, key, pairs, schedule=schedule, average=average, row_negatives=row_negatives, **common)
    unit, (query, key) = _arguments.in_sweep(normalize, query), _arguments.unit_sides(normalize, query, key)
    own = None
    if row_negatives is not None:
        (row_negatives,) = _arguments.unit_sides(normalize, row_negatives)
        own = OwnColumns(partner_similarity(query, row_negatives, unit))
    query, key = agreed.with_gradients(query, key)
    sweep = agreed.sweep(
        schedule,
        key,
        (name, "query", "key"),
        scale,
        pairs=Pairs() if pairs is None and share is not None else pairs,
        also=also,
        col_bias=col_bias,
        unit=unit,
        memory_budget=memory_budget,
        backend=backend,
    )
    loss: Tensor = row_softmax(
        sweep,
        query,
        key,
        target=target,
        own=own,
        own_logit=(lambda logit: logit - scaled(scale, torch.full_like(logit, margin))) if margin else None,
        share=share,
        z_loss=z_loss,
        weight=weight,
        reduction=local_reduction(reduction),
    )
    return rank_share(loss, agreed.rows, weight, reduction, average)
