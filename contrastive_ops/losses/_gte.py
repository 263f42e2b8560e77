"""What GTE's loss is made of, here and over many processes: its blocks of similarities, and the losses of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import merge_lse, softplus
from ..core.rules import Pairs, given
from . import _arguments
from ._blocks import DIRECTIONS, Blocks
from ._columns import check_pairs, partner_similarity
from ._hardness import checked_hardness


def gte_blocks(
    query: Tensor,
    document: Tensor,
    negatives: Tensor | None,
    *,
    partition: str,
    directions: tuple[str, ...],
    false_negative_margin: float | None,
    hardness: float,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    pairs: Pairs | None,
    weight: Tensor | None,
    reduction: str,
    normalize: bool,
    memory_budget: int | None,
    backend: str,
) -> tuple[Blocks, tuple[Tensor, Tensor] | None]:
    """Check the arguments of `gte`; return its blocks, and the query of each document and of each hard negative."""
    name = "gte"
    _check_directions(name, partition, directions)
    if false_negative_margin is not None:
        false_negative_margin = checks.number(name, "false_negative_margin", false_negative_margin, "(-inf, inf)")
    query, document, scale = _arguments.two_sides(
        name,
        (("query", query), ("document", document)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.01,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        partners=True,
    )
    sides, owners, unit = {"q": query, "d": document}, None, _arguments.in_sweep(normalize, query)
    if negatives is not None:
        sides["h"], owners = _hard_negatives(name, query, negatives, normalize)
    bound = None
    if false_negative_margin is not None:
        bound = partner_similarity(query.detach(), document.detach(), unit) + false_negative_margin
    blocks = Blocks(
        (name, "query", "document"),
        sides,
        checks.scale_tensor(name, scale, "query", query),
        bound=bound,
        guides=None,
        ids=ids_of_samples(name, pairs, query),
        unit=unit,
        memory_budget=memory_budget,
        backend=backend,
        hardness=checked_hardness(name, hardness, scale, None, None, both=True),
    )
    return blocks, owners


def gte_losses(
    blocks: Blocks, owners: tuple[Tensor, Tensor] | None, partition: str, directions: tuple[str, ...]
) -> Tensor:
    """(N,) the loss of each query and its document."""
    hard_of_documents = "h" in blocks.sides and "doc_to_doc" in directions
    of_query, of_document, positive = blocks.others(directions, owners, hard_of_documents)
    if partition == "per_direction":
        parts = [part for part in (of_query, of_document) if part]
        return torch.stack([softplus(merge_lse(*part) - positive) for part in parts]).mean(0)
    # Each rectangle holds the positive: log(c exp(p) + others) - p for c of them, without the cancellation.
    count = math.log(2.0) if "doc_to_query" in directions else 0.0
    return softplus(merge_lse(*of_query, *of_document) - positive - count) + count


def ids_of_samples(function: str, pairs: Pairs | None, query: Tensor) -> tuple[Tensor, Tensor] | None:
    """The ids of rules that have nothing else."""
    check_pairs(function, pairs)
    if pairs is None:
        return None
    others = [rule.name for rule, _ in given(pairs) if rule.name != "differ"]
    if others:
        raise ValueError(f"{function}: pairs must have no rule but differ, got {', '.join(others)}")
    if pairs.differ is None:
        return None
    rows, cols = pairs.differ
    rows = checks.check_index(function, "pairs.differ of the rows", rows, query.shape[0], "query", query)
    return rows, checks.check_index(function, "pairs.differ of the columns", cols, query.shape[0], "query", query)


def _check_directions(function: str, partition: object, directions: object) -> None:
    checks.check_choice(function, "partition", partition, ("joint", "per_direction"))
    if not isinstance(directions, tuple) or not directions or not set(directions) <= set(DIRECTIONS):
        raise ValueError(
            f"{function}: directions must be a tuple of {', '.join(DIRECTIONS)}, got {checks.shown(directions)}"
        )
    if "query_to_doc" not in directions:
        raise ValueError(f"{function}: directions must include query_to_doc, which holds the positive")
    without = [each for each in ("query_to_query", "doc_to_doc") if each in directions]
    if partition == "per_direction" and without:
        raise ValueError(
            f"{function}: directions must each hold the positive for partition='per_direction', got {without[0]}\n"
            "  use partition='joint'"
        )


def _hard_negatives(
    function: str, query: Tensor, negatives: Tensor, normalize: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return them as columns, and the owners of documents and columns."""
    checks.check_tensor(function, "negatives", negatives)
    if negatives.dim() != 3:
        return shared_negatives(function, query, negatives, normalize, "negatives"), None
    count, each = query.shape[0], negatives.shape[1]
    if negatives.shape[0] != count:
        raise ValueError(
            f"{function}: negatives must have shape ({count}, K, {query.shape[1]}) or (H, {query.shape[1]}), "
            f"got {checks.shape(negatives)}"
        )
    columns = shared_negatives(function, query, negatives.flatten(0, 1), normalize, "negatives")
    owner = torch.arange(count, device=query.device)
    return columns, (owner, owner.repeat_interleave(each))


def shared_negatives(
    function: str, query: Tensor, negatives: Tensor, normalize: bool, name: str = "negatives"
) -> Tensor:
    (negatives,) = autocast.cast(negatives)
    checks.check_matrices(function, "query", query, name, negatives)
    return _arguments.unit_sides(normalize, negatives)[0]
