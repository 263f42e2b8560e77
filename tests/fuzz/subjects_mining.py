"""Searches for negatives, margins of neighbours, and measures."""

from __future__ import annotations

from typing import Any

import test_metrics
import test_mining_hard_negatives as mined
import test_mining_margins
import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_ops import Pairs
from contrastive_ops.metrics import hubness, isotropy, retrieval_metrics
from contrastive_ops.mining import NegativeRules, Sampling, csls, mine_hard_negatives, ratio_margin
from contrastive_ops.ops import Guide

from .cases import One, Refused, Some, Subject
from .judge import Call
from .layouts import BACKENDS, DEPTHS, DTYPES, Numbers, laid_out

LIMITS = {"absolute_margin": 1.0, "relative_margin": 0.25, "min_score": -6.0, "max_score": 5.0, "near_duplicate": 3.0}
MEASURES = ("retrieval", "isotropy", "hubness")


def _integers(seed: int) -> Any:
    """Draws small whole numbers, whose products and sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)


class Negatives(Subject):
    """mine_hard_negatives with its rules and ways to sample, against a loop over queries."""

    name = "mine_hard_negatives"
    weight = 2
    space = {
        "n": One((1, 2, 3, 6)),
        "m": One((1, 2, 3, 5, 9, 17, 33, 65)),
        "d": One((1, 2, 3, 4, 8, 17)),
        "wanted": One((1, 2, 3, 5)),
        "metric": One(("dot", "sqeuclidean")),
        "strategy": One(("top", "uniform", "softmax", "simans")),
        "limits": Some(tuple(LIMITS), 3),
        "positive": One(("min", "max")),
        "window": One(((0, None), (1, None), (0, 7), (2, 9), (3, 200))),
        "basis": One(("surviving", "raw")),
        "block_rows": One((None, 9, 25)),
        "rules": Some(("diagonal", "differ", "same", "exclude", "below", "above", "guide"), 2),
        "positives": One((1, 2, 3, 0)),
        "lists": One(("csr", "padded")),
        "ids": One((False, True)),
        "backend": BACKENDS,
    }

    def build(self, *, seed, dtype, layout, needs, n, m, d, wanted, metric, strategy, limits, positive, window, basis,
              block_rows, rules, positives, lists, ids, backend) -> Call:  # fmt: skip
        if not positives and (strategy == "simans" or {"absolute_margin", "relative_margin"} & set(limits)):
            raise Refused  # what is measured by a positive needs one
        draw = _integers(seed)
        given = {"query": draw(-3, 4, n, d).to(DTYPES[dtype]), "corpus": draw(-3, 4, m, d).to(DTYPES[dtype])}
        given = laid_out(given, layout)
        own = [draw(0, m, positives).tolist() for _ in range(n)]
        numbered = (draw(-9, 9, n), torch.arange(m).flip(0) * 7 - 3) if ids else None
        sampling = Sampling(strategy, seed=seed, temperature=2.0, a=0.1, b=-2.0, ids=numbered)
        chosen = NegativeRules(
            **{name: LIMITS[name] for name in limits}, positive_score=positive, rank_window=window, rank_basis=basis
        )
        makes = {
            "diagonal": lambda: int(draw(-2, 4)),
            "differ": lambda: (draw(-1, 4, n), draw(-1, 4, m)),
            "same": lambda: (draw(-1, 2, n), draw(-1, 2, m)),
            "exclude": lambda: mined.as_csr([draw(0, m, 3).tolist() for _ in range(n)]),
            "below": lambda: draw(-3, 9, n).float(),
            "above": lambda: draw(-9, 3, 1, m).float(),
            "guide": lambda: Guide(draw(-2, 3, n, 3).bfloat16(), draw(-2, 3, m, 3).bfloat16(), 1.0),
        }
        pairs = Pairs(**{name: makes[name]() for name in rules}) if rules else None
        given_lists = mined.as_csr(own) if lists == "csr" else mined.as_padded(own)
        call = {"rules": chosen, "sampling": sampling, "metric": metric, "pairs": pairs}

        def ours(g: dict[str, Any]) -> list[Tensor]:
            found = mine_hard_negatives(
                g["query"], g["corpus"], given_lists, wanted, **call, block_rows=block_rows, backend=backend
            )
            return [found.indices, found.scores, found.counts, *(v for _, v in sorted(found.statistics.items()))]

        def dense(g: dict[str, Any]) -> list[Tensor]:
            results, statistics = mined.oracle(g["query"], g["corpus"], own, wanted, chosen, sampling, metric, pairs)
            pads = [wanted - len(indices) for indices, _ in results]
            indices = [each + [-1] * pad for (each, _), pad in zip(results, pads, strict=True)]
            scores = [each + [-torch.inf] * pad for (_, each), pad in zip(results, pads, strict=True)]
            counts = torch.tensor([len(each) for each, _ in results])
            rest = [torch.tensor(v) for _, v in sorted(statistics.items())]
            return [torch.tensor(indices), torch.tensor(scores, dtype=torch.float64), counts, *rest]

        return Call(given, ours, dense, finite=False)


class Margins(Subject):
    """csls and ratio_margin: neighbours in whole matrices of cosines."""

    name = "margins"
    space = {
        "n": One((1, 2, 3, 17, 65, 130)),
        "m": One((1, 2, 3, 9, 33, 67)),
        "d": DEPTHS,
        "k": One((1, 2, 3, 10)),
        "neighbors": One((1, 3, 4, 10, 40)),
        "call": One(("csls", "ratio")),
        "backend": BACKENDS,
    }

    def build(self, *, seed, dtype, layout, needs, n, m, d, k, neighbors, call, backend) -> Call:
        kind = DTYPES[dtype]
        if d < 3 or kind.itemsize == 2 or (call == "ratio" and k > neighbors):
            raise Refused  # many cosines are equal, or differ by less than 16 bits hold; candidates are `neighbors`
        made = Numbers(n, m, d, "normal", dtype=kind, seed=seed)
        shift = 0.0 if call == "csls" else 1.0  # a ratio needs cosines above 0
        given = laid_out({"x": made.x.detach() + shift, "y": made.y.detach() + shift}, layout)
        function = csls if call == "csls" else ratio_margin

        def ours(g: dict[str, Any]) -> list[Tensor]:
            return [function(g["x"], g["y"], k, neighbors=neighbors, backend=backend).values]

        def dense(g: dict[str, Any]) -> list[Tensor]:
            s, near_x, near_y = test_mining_margins.dense(g["x"], g["y"], neighbors)
            if call == "csls":
                margins = 2 * s - near_x - near_y
            else:
                margins = (2 * s / (near_x + near_y)).gather(1, s.topk(min(neighbors, m), 1).indices)
            best = margins.sort(dim=1, descending=True).values[:, :k]
            return [F.pad(best, (0, k - best.shape[1]), value=-torch.inf)]

        return Call(given, ours, dense, finite=False, size=float(n) ** 0.5)


class Measures(Subject):
    """retrieval_metrics, isotropy and hubness against loops over their definitions."""

    name = "metrics"
    space = {
        "call": One(MEASURES),
        "n": One((1, 2, 3, 9, 25, 64)),
        "m": One((2, 3, 9, 30, 100)),
        "d": One((2, 3, 5, 17, 64)),
        "listed": One((1, 3, 8)),
        "judged": One((1, 0, 3, 7)),
        "graded": One((False, True)),
        "gain": One(("linear", "exponential")),
        "segments": One((1, 3)),
    }

    def build(self, *, seed, dtype, layout, needs, call, n, m, d, listed, judged, graded, gain, segments) -> Call:
        draw = _integers(seed)
        if call == "isotropy":
            made = Numbers(n, 1, d, "normal", dtype=DTYPES[dtype], seed=seed)
            given = laid_out({"x": made.x.detach()}, layout)
            texts = draw(-1, segments, n)
            return Call(
                given,
                lambda g: [isotropy(g["x"], texts)],
                lambda g: [_isotropy(g["x"], texts)],
                finite=False,
                size=1.0,
            )
        order = torch.stack([torch.randperm(m, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)])
        found = order[:, :listed]
        found = found.masked_fill(torch.arange(found.shape[1]) >= draw(1, listed + 1, n)[:, None], -1)
        if call == "hubness":
            return Call({"found": found}, lambda g: [hubness(g["found"], m)], lambda g: [_hubness(g["found"], m)])
        lists = [draw(0, m, judged).unique() for _ in range(n)]
        grades = [draw(0, 4, len(each)).double() if graded else torch.ones(len(each)).double() for each in lists]
        indptr = torch.tensor([0, *(len(each) for each in lists)]).cumsum(0)
        relevant = (indptr, torch.cat(lists), torch.cat(grades))
        cuts, p = (1, 3, 8), 0.7

        def ours(g: dict[str, Any]) -> list[Tensor]:
            given = relevant if graded else relevant[:2]
            measures = retrieval_metrics(g["found"], given, k=cuts, persistence=(p,), gain=gain)
            return [measures[name] for name in sorted(measures)]

        def dense(g: dict[str, Any]) -> list[Tensor]:
            top = max([1e-300, *torch.cat(grades).tolist()])
            measures: dict[str, list[float]] = {}
            for row, own, grade in zip(g["found"].tolist(), lists, grades, strict=True):
                known = dict(zip(own.tolist(), grade.tolist(), strict=True))
                row = row + [-1] * max(0, max(cuts) - len(row))
                for cut in cuts:
                    for name, value in test_metrics.of_query(row, known, cut, p, top, gain).items():
                        key = f"rbp@{p}" if name == "rbp" else f"{name}@{cut}"
                        measures.setdefault(key, []).append(value)
            measures[f"rbp@{p}"] = measures[f"rbp@{p}"][:: len(cuts)]
            return [torch.tensor(measures[name], dtype=torch.float64) for name in sorted(measures)]

        return Call({"found": found}, ours, dense, finite=False)


def _isotropy(x: Tensor, texts: Tensor) -> Tensor:
    c = F.normalize(x) @ F.normalize(x).T
    counts = (texts[:, None] == texts) & (texts >= 0) & ~torch.eye(len(x), dtype=torch.bool)
    return 1 - c[counts].mean() if counts.any() else c.new_tensor(torch.nan)


def _hubness(found: Tensor, columns: int) -> Tensor:
    counts = torch.tensor([float((found == column).sum()) for column in range(columns)], dtype=torch.float64)
    deviation = counts - counts.mean()
    return deviation.pow(3).mean() / deviation.square().mean().pow(1.5)


MINING = (Negatives(), Margins(), Measures())
