"""Classes of `contrastive_ops.integrations` against the classes that they replace.

    python -m benchmarks.run --adapters                          all, appended to results/<machine>-adapters.csv
    python -m benchmarks.run --adapters --op SupConLoss          those of one name

A step is forward and backward in float32 at D=512 from embeddings, miners included. N=64 is timed in CPU time of one
thread, N=1024 in wall time with all threads; both sides take turns, ratios are of minima. Needs the packages of
requirements/peers.txt.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import provenance, results
from benchmarks.registry import OURS
from benchmarks.small_batches import PLAIN, Side, measure_one, rows_of

SIZES = (64, 1024)
PACKAGES = {
    "open_clip": ("open_clip.loss", "open_clip_torch"),
    "lightly": ("lightly.loss", "lightly"),
    "pytorch_metric_learning": ("pytorch_metric_learning.losses", "pytorch-metric-learning"),
    "sentence_transformers": ("sentence_transformers.sentence_transformer.losses", "sentence-transformers"),
}


@dataclass(frozen=True)
class Adapter:
    """A class, how it is made, and how a step calls it.

    Attributes:
        package: the module of `contrastive_ops.integrations`.
        name: of the class.
        make: (the class, the module it is from) to what a step calls.
        matrices: embeddings of a step.
        largest: rows that the original's memory allows.
    """

    package: str
    name: str
    make: Callable[[Any, Any], Callable[..., Tensor]]
    matrices: int = 2
    largest: int = 1024

    def side(self) -> Side:
        """Both ways to compute it."""
        ours = importlib.import_module(f"contrastive_ops.integrations.{self.package}")
        original = importlib.import_module(PACKAGES[self.package][0])
        classes = [getattr(module, self.name.partition(" ")[0]) for module in (ours, original)]
        mine, theirs = (self.make(each, module) for each, module in zip(classes, (ours, original), strict=True))
        return Side(mine, theirs, self.matrices, self.largest)


def _labelled(**options: Any) -> Callable[[Any, Any], Callable[..., Tensor]]:
    """Rows of four of a label, all pairs of them."""

    def make(kind: Any, _: Any) -> Callable[..., Tensor]:
        loss = kind(**options)
        return lambda x: loss(x, torch.arange(len(x)) // 4)

    return make


def _mined(miner: str) -> Callable[[Any, Any], Callable[..., Tensor]]:
    """Rows of four of a label, the pairs or triplets that a miner of the same module picks."""

    def make(kind: Any, module: Any) -> Callable[..., Tensor]:
        found = module if hasattr(module, miner) else importlib.import_module("pytorch_metric_learning.miners")
        loss, pick = kind(), getattr(found, miner)()

        def step(x: Tensor) -> Tensor:
            labels = torch.arange(len(x)) // 4
            value: Tensor = loss(x, labels, pick(x, labels))
            return value

        return step

    return make


def _of_pairs(*arguments: Any) -> Callable[[Any, Any], Callable[..., Tensor]]:
    def make(kind: Any, _: Any) -> Callable[..., Tensor]:
        loss = kind()
        return lambda x, y: loss(x, y, *arguments)

    return make


def _embedded(labels: Callable[[int], Tensor | None]) -> Callable[[Any, Any], Callable[..., Tensor]]:
    """A loss of sentence-transformers from the embeddings of its columns."""

    def make(kind: Any, _: Any) -> Callable[..., Tensor]:
        loss = kind(torch.nn.Module())
        return lambda *columns: loss.compute_loss_from_embeddings(list(columns), labels(len(columns[0])))

    return make


def _memory(kind: Any, module: Any) -> Callable[..., Tensor]:
    memory = kind(module.MultiSimilarityLoss(), 512, memory_size=4096)
    return lambda x: memory(x, torch.arange(len(x)) // 4)


def adapters() -> Iterator[Adapter]:
    """All that are measured."""
    distances = importlib.import_module("pytorch_metric_learning.distances")
    clip, learning, sentences = "open_clip", "pytorch_metric_learning", "sentence_transformers"
    scale, bias = torch.tensor(14.3), torch.tensor(-10.0)
    yield Adapter(clip, "ClipLoss", _of_pairs(scale))
    yield Adapter(clip, "SigLipLoss", _of_pairs(scale, bias))
    for name in ("NTXentLoss", "DCLLoss", "VICRegLoss", "BarlowTwinsLoss"):
        yield Adapter("lightly", name, _of_pairs())
    yield Adapter(learning, "SupConLoss", _labelled(), 1)
    yield Adapter(learning, "NTXentLoss", _labelled(), 1, largest=64)
    yield Adapter(learning, "MultiSimilarityLoss", _labelled(), 1)
    yield Adapter(learning, "MultiSimilarityLoss MultiSimilarityMiner", _mined("MultiSimilarityMiner"), 1)
    margins = {"pos_margin": 0.9, "neg_margin": 0.1, "distance": distances.CosineSimilarity()}
    yield Adapter(learning, "ContrastiveLoss", _labelled(**margins), 1)
    yield Adapter(learning, "TripletMarginLoss BatchHardMiner", _mined("BatchHardMiner"), 1)
    yield Adapter(learning, "CrossBatchMemory", _memory, 1)
    yield Adapter(sentences, "MultipleNegativesRankingLoss", _embedded(lambda _: None), 3)
    yield Adapter(sentences, "CoSENTLoss", _embedded(lambda rows: torch.linspace(0, 1, rows)))


def run(op: str | None, *, rounds: int, quick: bool = False, csv: Path | None = None) -> int:
    """The command; returns the exit status."""
    chosen = [each for each in adapters() if op in (None, each.name, each.name.partition(" ")[0])]
    if not chosen:
        print(f"no adapter op={op!r}; there are {', '.join(each.name for each in adapters())}", file=sys.stderr)
        return 2
    warnings.filterwarnings("error", message=".*has no fused form")  # the original against itself
    stamp = {"run": provenance.now(), **provenance.gather()}
    if csv is None and not quick:
        csv = results.file_of(f"{provenance.machine_kind()}-adapters")
    print(f"{'step':72s} {'ours us':>10s} {'original us':>12s}   ratio", flush=True)
    for adapter in chosen:
        package = PACKAGES[adapter.package][1]
        for rows in SIZES[:1] if quick else SIZES:
            if rows > adapter.largest:
                continue
            timings = measure_one(adapter.side(), rows, rounds)
            mine, other = timings[OURS].minimum, timings[PLAIN].minimum
            label = f"{adapter.package} {adapter.name} N={rows}"
            mark = "" if mine <= other else "  above 1"
            print(f"{label:72s} {1e6 * mine:10.0f} {1e6 * other:12.0f} {mine / other:7.2f}{mark}", flush=True)
            found = rows_of(adapter.name, rows, timings, rounds)
            for row in found:
                row["case"] = f"adapter-{adapter.package}-{adapter.name.replace(' ', '+')}-N{rows}"
                if row["provider"] == PLAIN:
                    row.update(provider=package, kind="peer", version=provenance.version(package))
            if csv is not None:
                results.append(csv, [{**row, **stamp} for row in found])
    return 0
