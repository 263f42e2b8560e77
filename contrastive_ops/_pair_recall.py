"""Recall of pairs in both directions, as papers on images and texts print it, and tables of measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .core import autocast, checks
from .core.folds import Fold
from .core.problem import Problem
from .core.rules import Pairs
from .core.unit_rows import unit_rows
from .ops.similarity_reduce import fold


@torch.no_grad()
def pair_recall(
    x: Tensor,
    y: Tensor,
    labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    *,
    k: Sequence[int] = (1, 5, 10),
    names: tuple[str, str] = ("image", "text"),
    backend: str = "auto",
) -> dict[str, float]:
    """Recall of pairs in both directions: R@1, R@5, R@10 from images to texts and back, and ranks.

    Equivalent to, for the rows and the same of the columns::

        s = F.normalize(x) @ F.normalize(y).T
        same = labels[:, None] == col_labels
        best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        rank = 1 + ((s >= best) & ~same).sum(1)                              # of the best partner
        recall_at_k = 100 * (rank <= k).double().mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D) of the same dtype.
        labels: (N,) int64; rows and columns of one label are partners, such as an image and its five captions. None:
            row i and column i are, and nothing else. -1 has no partner.
        col_labels: (M,) int64, given exactly where ``labels`` is.
        k: cut-offs.
        names: of the sides, for the names of the measures.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        Percentages "image_to_text_R@1", ..., and "image_to_text_mean_rank", "image_to_text_median_rank"; the same of
        "text_to_image"; and "rsum", the sum of all R@k. Of rows that have a partner; NaN where none has. A column that
        is as similar as the partner, up to rounding, counts as better, so that embeddings that have collapsed have no
        recall.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D), and two sweeps over the similarities, which are not stored.

    Source:
        The protocol of Karpathy and Fei-Fei, Deep Visual-Semantic Alignments for Generating Image Descriptions, 2015.

    Examples:
        >>> image = torch.eye(4)
        >>> text = torch.eye(4)[[0, 1, 3, 2]]
        >>> found = pair_recall(image, text, k=(1, 5))
        >>> found["image_to_text_R@1"], found["text_to_image_mean_rank"], found["rsum"]
        (50.0, 2.5, 300.0)
    """
    name = "pair_recall"
    checks.check_matrices(name, "x", x, "y", y)
    k = [checks.integer(name, "k", cut, 1) for cut in checks.listed(name, "k", k)]
    if len(names) != 2 or not all(isinstance(each, str) for each in names):
        raise ValueError(f"{name}: names must be two strings, got {names!r}")
    if (labels is None) != (col_labels is None):
        raise ValueError(f"{name}: labels and col_labels must both be given, or neither")
    if labels is None or col_labels is None:
        if len(x) != len(y):
            raise ValueError(
                f"{name}: labels must be given where sides have different numbers of rows, got x {checks.shape(x)} "
                f"and y {checks.shape(y)}"
            )
        labels = col_labels = torch.arange(len(x), device=x.device)
    labels = checks.check_index(name, "labels", labels, len(x), "x", x)
    col_labels = checks.check_index(name, "col_labels", col_labels, len(y), "y", y)
    measures: dict[str, float] = {}
    ranks = _ranks_of_partners(x, y, labels, col_labels, (name, "x", "y"), backend)
    for rank, ways in zip(ranks, (names, names[::-1]), strict=True):
        way = "_to_".join(ways)
        measures |= {f"{way}_R@{cut}": 100 * float((rank <= cut).double().mean()) for cut in k}
        measures[f"{way}_mean_rank"] = float(rank.mean())
        measures[f"{way}_median_rank"] = float(rank.median()) if len(rank) else float("nan")
    measures["rsum"] = sum(value for key, value in measures.items() if "_R@" in key)
    return measures


def _ranks_of_partners(
    x: Tensor, y: Tensor, labels: Tensor, col_labels: Tensor, names: tuple[str, str, str], backend: str
) -> tuple[Tensor, Tensor]:
    """The rank of the best partner of each row, and of each column, that has one, in float64."""
    with autocast.disabled(x):
        x, y = (unit_rows(each.detach().to(checks.accumulator(each.dtype))) for each in (x, y))
        ids, problem, both = (labels, col_labels), Problem.of(names, x, y), (0, 1)
        best = fold(problem, reduce=(Fold("max", pairs=Pairs(same=ids)),), dim=both, backend=backend)
        # Equal rows may differ by the rounding of their inner products.
        slack = 8 * torch.finfo(x.dtype).eps
        of_rows, of_cols = (found[0] - slack for found in (best.rows, best.cols))
        bounds = (Pairs(differ=ids, above=of_rows), Pairs(differ=ids, above=of_cols[None]))
        counts = fold(problem, reduce=tuple(Fold("count", pairs=each) for each in bounds), dim=both, backend=backend)
    above = counts.rows[0][of_rows > -torch.inf], counts.cols[1][of_cols > -torch.inf]
    return above[0].double() + 1, above[1].double() + 1


def table(
    measures: Mapping[str, Mapping[str, Tensor | float]],
    *,
    names: Sequence[str] | None = None,
    percent: bool = True,
    digits: int = 1,
) -> str:
    """Measures of several systems as a table in Markdown, the best of each column in bold.

    Args:
        measures: {system: measures}, as `retrieval_metrics` and `pair_recall` return them. Of a tensor the mean over
            queries is shown, without those that are NaN.
        names: which measures, in this order; None for all.
        percent: tensors are shares, and shown in percent. Numbers are shown as they are.
        digits: behind the point.

    Returns:
        Lines of text, "-" where a system lacks a measure. The largest number is the best, of ranks the smallest.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Examples:
        >>> found = {"bm25": {"ndcg@10": torch.tensor([0.4, 0.6])}, "dense": {"ndcg@10": torch.tensor([0.7, 0.7])}}
        >>> print(table(found))
        | | ndcg@10 |
        |---|---|
        | bm25 | 50.0 |
        | dense | **70.0** |
    """
    digits = checks.integer("table", "digits", digits, 0)
    checks.flag("table", "percent", percent)
    if not isinstance(measures, Mapping) or not all(isinstance(each, Mapping) for each in measures.values()):
        raise TypeError(f"table: measures must be a dict {{system: measures}}, got {checks.shown(measures)}")
    known = list(dict.fromkeys(name for each in measures.values() for name in each))
    names = known if names is None else list(names)
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise ValueError(f"table: names must be among {', '.join(known)}, got {missing!r}")
    shown = [[_shown(each.get(name), percent, digits) for name in names] for each in measures.values()]
    columns = []
    for name, column in zip(names, zip(*shown, strict=True), strict=True):
        numbers = [float(text) for text in column if text not in ("-", "nan")]
        best = (min if name.endswith("rank") else max)(numbers, default=None)
        columns.append([f"**{text}**" if text not in ("-", "nan") and float(text) == best else text for text in column])
    rows = [["", *names], *([system, *row] for system, row in zip(measures, zip(*columns, strict=True), strict=True))]
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join([lines[0], "|" + "---|" * (1 + len(names)), *lines[1:]])


def _shown(value: Tensor | float | None, percent: bool, digits: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, Tensor):
        value = float(value.double().nanmean()) * (100 if percent else 1)
    return f"{value:.{digits}f}"
