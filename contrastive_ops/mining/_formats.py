"""Mined negatives as columns of a data set, in the formats of sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core import checks

FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")

Columns = dict[str, list[Any]]


class Texts(Protocol):
    """A sequence, or anything else with a length and numbered items, such as a column of a data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Mined(NamedTuple):
    """What formats are made of.

    Attributes:
        indices: (N, n) negatives of each query.
        scores: (N, n).
        counts: (N,).
        row: (P,) the query of each positive.
        positive: (P,) the positives.
        positive_scores: (P,).
    """

    indices: Tensor
    scores: Tensor
    counts: Tensor
    row: Tensor
    positive: Tensor
    positive_scores: Tensor


def columns(mined: Mined, output_format: str, queries: Texts | None, documents: Texts | None, scores: bool) -> Columns:
    """See `HardNegatives.format`."""
    name = "HardNegatives.format"
    checks.check_choice(name, "output_format", output_format, FORMATS)
    highest = int(torch.cat([mined.indices.flatten(), mined.positive, mined.positive.new_tensor([-1])]).max())
    if queries is not None and len(queries) != len(mined.counts):
        raise ValueError(f"{name}: queries must have {len(mined.counts)} items, one for each query, got {len(queries)}")
    if documents is not None and len(documents) <= highest:
        raise ValueError(
            f"{name}: documents must have an item for each row of the corpus, at least {highest + 1}, "
            f"got {len(documents)}"
        )
    made = {
        "triplet": _triplet,
        "n-tuple": _n_tuple,
        "labeled-pair": _labeled_pair,
        "labeled-list": _labeled_list,
    }[output_format](mined, scores)
    for column, values in made.items():
        source = queries if column == "anchor" else documents
        if source is not None and column not in ("label", "labels", "score", "scores"):
            made[column] = [_text(source, value) for value in values]
    return made


def _text(source: Texts, index: Any) -> Any:
    return [source[each] for each in index] if isinstance(index, list) else source[index]


def _triplet(mined: Mined, scores: bool) -> Columns:
    """A row for each query, positive and negative."""
    entry = torch.arange(len(mined.row), device=mined.row.device).repeat_interleave(mined.counts[mined.row])
    first = mined.counts[mined.row].cumsum(0) - mined.counts[mined.row]
    slot = torch.arange(len(entry), device=entry.device) - first[entry]
    anchor = mined.row[entry]
    made = {
        "anchor": anchor.tolist(),
        "positive": mined.positive[entry].tolist(),
        "negative": mined.indices[anchor, slot].tolist(),
    }
    if scores:
        made["scores"] = torch.stack([mined.positive_scores[entry], mined.scores[anchor, slot]], 1).tolist()
    return made


def _n_tuple(mined: Mined, scores: bool) -> Columns:
    """A row for each query and positive, where the query has all its negatives."""
    full = mined.counts[mined.row] == mined.indices.shape[1]
    anchor = mined.row[full]
    made = {"anchor": anchor.tolist(), "positive": mined.positive[full].tolist()}
    for number, negative in enumerate(mined.indices[anchor].unbind(1), 1):
        made[f"negative_{number}"] = negative.tolist()
    if scores:
        made["scores"] = torch.cat([mined.positive_scores[full, None], mined.scores[anchor]], 1).tolist()
    return made


def _labeled_pair(mined: Mined, scores: bool) -> Columns:
    """A row for each query and positive, and for each query and negative."""
    row, slot = (mined.indices >= 0).nonzero(as_tuple=True)
    anchor = torch.cat([mined.row, row])
    # Stable: the positives of a query come before its negatives.
    order = anchor.argsort(stable=True)
    passage = torch.cat([mined.positive, mined.indices[row, slot]])[order]
    made = {"anchor": anchor[order].tolist(), "passage": passage.tolist()}
    if scores:
        made["score"] = torch.cat([mined.positive_scores, mined.scores[row, slot]])[order].tolist()
    else:
        made["label"] = (order < len(mined.row)).long().tolist()
    return made


def _labeled_list(mined: Mined, scores: bool) -> Columns:
    """A row for each query and positive, where the query has a negative."""
    kept = mined.counts[mined.row] > 0
    anchor = mined.row[kept]
    counts = mined.counts[anchor].tolist()

    def lists(first: Tensor, others: Tensor) -> list[list[Any]]:
        rows: Sequence[list[Any]] = torch.cat([first[kept, None], others[anchor]], 1).tolist()
        return [row[: 1 + count] for row, count in zip(rows, counts, strict=True)]

    made: Columns = {"anchor": anchor.tolist(), "passages": lists(mined.positive, mined.indices)}
    if scores:
        made["scores"] = lists(mined.positive_scores, mined.scores)
    else:
        made["labels"] = [[1] + [0] * count for count in counts]
    return made
