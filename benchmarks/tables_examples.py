"""The tables, in docs/examples.md, of what the examples measured, from the JSON files that they wrote.

make limoe-ablation ARGS="--json benchmarks/results/limoe.json"
make simclr ARGS="--seed 0 --json benchmarks/results/simclr-0.json"
make moe-embeddings ARGS="--seed 0 --json benchmarks/results/moe-embeddings-0.json"
make distill ARGS="--seed 0 --json benchmarks/results/distill-0.json"
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
LIMOE_COLUMNS = {
    "text tokens kept": "success_text",
    "image tokens kept": "success_image",
    "experts that text is spread over": "effective_text",
    "zero-shot accuracy": "zero_shot",
    "text to image, recall@5": "text_to_image_at_5",
}


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))


def _spread(values: list[float], form: str) -> str:
    """Mean of the seeds, and least and most."""
    if not values:
        return ""
    mean, least, most = (format(f(values), form) for f in (statistics.fmean, min, max))
    return f"{mean} ({least.rstrip('%')} to {most})"


def limoe(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Every variant of LIMoE's balance losses."""
    rows = []
    for name, found in runs.items():
        cells = []
        for key in LIMOE_COLUMNS.values():
            cells.append(_spread([run[key] for run in found if key in run], ".1f" if "effective" in key else ".1%"))
        rows.append([name, *cells])
    seconds = [run["cpu_seconds"] for found in runs.values() for run in found]
    seeds = len(next(iter(runs.values())))
    took = f"{min(seconds):.0f} to {max(seconds):.0f} s"
    note = f"Mean of {seeds} seeds (least to most). A run took {took} of processor time on one thread."
    return f"{_table(['', *LIMOE_COLUMNS], rows)}\n{note}\n"


def simclr(runs: list[dict[str, Any]]) -> str:
    """Linear probes on digits."""
    labels = {
        "pixels": "pixels",
        "untrained": "encoder, untrained",
        "nt_xent": "trained with `nt_xent`, no labels",
        "sup_con": "trained with `sup_con`, all labels",
    }
    rows = []
    for name, label in labels.items():
        found = [run["accuracy"][name] for run in runs]
        rows.append([label, *(_spread([each[key] for each in found], ".1%") for key in ("few", "all"))])
    return _table(["linear probe on", "10 labels a class", f"all {runs[0]['train']:,} labels"], rows)


def moe_embeddings(runs: list[dict[str, Any]]) -> str:
    """Search within domains."""
    rows = []
    for way, size in runs[0]["parameters"].items():
        means = [statistics.fmean(run["mrr"][way]) for run in runs]
        rows.append([way, _spread(means, ".3f"), f"{size / 1e6:.1f} M"])
    return _table(["", f"MRR@10, mean of {len(runs[0]['domains'])} domains", "parameters"], rows)


def distill(runs: list[dict[str, Any]]) -> str:
    """Students that learn from labels, and from a teacher."""
    rows = [
        [name, _spread([run["mrr"][name] for run in runs], ".3f"), f"{size / 1e6:.2f} M"]
        for name, size in runs[0]["parameters"].items()
    ]
    header = f"MRR@10 on {runs[0]['held_out']:,} held-out pairs"
    return _table([f"learned from, of {runs[0]['pairs']:,} pairs", header, "parameters"], rows)


def tables() -> dict[str, Callable[[], str]]:
    """The tables that there are results for."""

    def several(stem: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{stem}-*.json"))]

    found: dict[str, Callable[[], str]] = {}
    if (RESULTS / "limoe.json").exists():
        found["limoe"] = lambda: limoe(json.loads((RESULTS / "limoe.json").read_text()))
    if runs := several("simclr"):
        found["simclr"] = lambda: simclr(runs)
    if others := several("moe-embeddings"):
        found["moe-embeddings"] = lambda: moe_embeddings(others)
    if taught := several("distill"):
        found["distill"] = lambda: distill(taught)
    return found
