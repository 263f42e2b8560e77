"""How the demo's result is shown: a table, a JSON object, a sentence and a plot."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from _loss_meter import Largest
from _mining_stage import Mining

import contrastive_ops

PLAIN, OURS = "pytorch", "contrastive_ops"
UNCACHED = "uncached"  # contrastive_ops with memory_budget=0, measured for memory alone
LABELS = {PLAIN: "plain PyTorch", OURS: "contrastive_ops"}
COLORS = {PLAIN: "#E69F00", OURS: "#0072B2"}  # told apart by colour-blind readers
TOLERANCE = 1e-3


@dataclass
class Result:
    """Everything measured; the dictionaries are keyed by loss layer."""

    pairs: int
    held_out: int
    batch: int
    dim: int
    limit_mib: int
    losses: dict[str, list[float]]
    ms_min: dict[str, float]
    ms_median: dict[str, float]
    extra_mib: dict[str, float]
    mrr: dict[str, float]
    mrr_chance: float
    largest: dict[str, Largest]
    mining: Mining

    @property
    def differences(self) -> list[float]:
        """|loss - loss| at every step."""
        return [abs(p - o) for p, o in zip(self.losses[PLAIN], self.losses[OURS], strict=True)]

    @property
    def agrees(self) -> bool:
        """Whether the two trainings reach the same loss; NaN does not."""
        return all(difference <= TOLERANCE for difference in self.differences)


def to_json(result: Result) -> dict[str, Any]:
    """The result as plain values, with what is derived from it."""
    return {
        **asdict(result),
        "largest": {name: found._asdict() for name, found in result.largest.items()},
        "max_difference": max(result.differences),
        "final_difference": result.differences[-1],
        "tolerance": TOLERANCE,
        "agrees": result.agrees,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }


def provenance() -> str:
    """One sentence on where the numbers come from."""
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{platform.system()} {platform.machine()}, {capability}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, contrastive_ops {contrastive_ops.__version__}, {date.today().isoformat()}."
    )


def show_batch(found: Largest) -> str:
    """`at least N` where the time cap ended the search."""
    return f"{'at least ' if found.at_least else ''}{found.batch:,}"


def memory_size(mib: int) -> str:
    """`2 GiB` rather than `2048 MiB`."""
    return f"{mib // 1024} GiB" if mib % 1024 == 0 else f"{mib} MiB"


def to_table(result: Result) -> str:
    """Aligned text: one row a quantity, one column a loss layer."""

    def row(label: str, values: dict[str, Any], form: str) -> tuple[str, ...]:
        return (label, *(format(values[name], form) for name in LABELS))

    shown = {name: show_batch(found) for name, found in result.largest.items()}
    fits = f"largest batch in {memory_size(result.limit_mib)}"
    rows = [
        (f"batch {result.batch:,}, dimension {result.dim}", *LABELS.values()),
        row("loss, first step", {k: v[0] for k, v in result.losses.items()}, ".5f"),
        row("loss, last step", {k: v[-1] for k, v in result.losses.items()}, ".5f"),
        row("loss layer, ms per step (median)", result.ms_median, ",.0f"),
        row("loss layer, ms per step (min)", result.ms_min, ",.0f"),
        row("loss layer, peak extra memory (MiB)", result.extra_mib, ",.1f"),
        row(f"MRR@10, {result.held_out:,} held-out pairs", result.mrr, ".4f"),
        row(fits, shown, ""),
    ]
    widths = [max(len(cells[i]) for cells in rows) for i in range(3)]
    lines = [f"{cells[0]:<{widths[0]}}   {cells[1]:>{widths[1]}}   {cells[2]:>{widths[2]}}" for cells in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, lines[1], *remarks(result)])


def remarks(result: Result) -> list[str]:
    """What does not fit into two columns."""
    verdict = "yes" if result.agrees else "NO"
    lines = [
        f"both trainings reach the same loss within {TOLERANCE:g}: {verdict} "
        f"(largest difference of the curves {max(result.differences):.1e}, "
        f"at the last step {result.differences[-1]:.1e})",
        f"MRR@10 of a random order: {result.mrr_chance:.4f}",
    ]
    if UNCACHED in result.extra_mib:
        needed = result.extra_mib[UNCACHED]
        lines.append(f"peak extra memory of contrastive_ops with memory_budget=0: {needed:.1f} MiB")
    return lines


def takeaway(result: Result) -> str:
    """One sentence to remember."""
    # The fastest steps are compared: other work on the machine only ever adds time.
    speed = result.ms_min[PLAIN] / result.ms_min[OURS]
    memory = result.extra_mib[OURS] / result.extra_mib[PLAIN]
    reached = "the same model" if result.agrees else "NOT the same model"
    sentence = (
        f"With one line changed, {reached} was trained with a loss layer {speed:.1f} times as "
        f"fast, in {memory:.1%} of the extra memory"
    )
    if result.largest[PLAIN].at_least:  # the time cap, not memory, ended both searches
        return f"{sentence}."
    growth = result.largest[OURS].batch / result.largest[PLAIN].batch
    least = "at least " if result.largest[OURS].at_least else ""
    return f"{sentence}, and {memory_size(result.limit_mib)} hold a batch {least}{growth:.1f} times as large."


def draw(result: Result, path: Path) -> None:
    """The two curves with their difference below, and what each loss layer cost beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=(3.2, 1, 1, 1), height_ratios=(3, 1))
    curves = figure.add_subplot(grid[0, 0])
    draw_curves(result, curves, figure.add_subplot(grid[1, 0], sharex=curves))
    limit = memory_size(result.limit_mib)
    batches = {name: found.batch for name, found in result.largest.items()}
    shown = {name: f"{'≥ ' if found.at_least else ''}{found.batch:,}" for name, found in result.largest.items()}
    bars = (
        ("Loss layer,\ntime per step", "ms (fastest step)", result.ms_min, None),
        ("Loss layer,\npeak extra memory", "MiB", result.extra_mib, None),
        (f"Largest batch\nin {limit}", "pairs", batches, shown),
    )
    for column, (title, unit, values, texts) in enumerate(bars, start=1):
        draw_bars(figure.add_subplot(grid[:, column]), title, unit, values, texts)
    figure.suptitle(
        f"Docstring search on {result.pairs:,} pairs: batch {result.batch:,}, dimension {result.dim}",
        fontsize=13,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curves(result: Result, curves: Any, gap: Any) -> None:
    """Both losses, the second dashed on top of the first; below, how far apart they are."""
    steps = range(1, len(result.differences) + 1)
    styles = {PLAIN: {"linewidth": 5, "alpha": 0.6}, OURS: {"linewidth": 2, "linestyle": "--"}}
    for name, label in LABELS.items():
        curves.plot(steps, result.losses[name], label=label, color=COLORS[name], **styles[name])
    curves.set(title="Same loss, step by step", ylabel="contrastive loss (nats)")
    curves.tick_params(labelbottom=False)
    curves.legend(frameon=False)
    gap.plot(steps, result.differences, color="0.25", marker=".", clip_on=False)
    gap.axhline(TOLERANCE, color="0.6", linestyle=":")
    gap.annotate(
        f"tolerance {TOLERANCE:g}", (1, TOLERANCE), (0, -3), textcoords="offset points",
        va="top", color="0.4", fontsize=9,
    )  # fmt: skip
    # Equal losses are common and have no logarithm, hence the linear piece next to 0.
    gap.set_yscale("symlog", linthresh=1e-7)
    gap.set(xlabel="training step", ylabel="|difference|")
    gap.set_yticks([0, 1e-7, 1e-5, 1e-3])
    gap.set_ylim(0, max(5 * TOLERANCE, 2 * max(result.differences)))
    for axes in (curves, gap):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)


def draw_bars(axes: Any, title: str, unit: str, values: dict[str, float], texts: dict[str, str] | None) -> None:
    """One bar a loss layer, its value written on it."""
    names = list(LABELS)
    heights = [values[name] for name in names]
    bars = axes.bar(
        [LABELS[name].replace(" ", "\n").replace("_", "_\n") for name in names],
        heights,
        color=[COLORS[name] for name in names],
        width=0.65,
    )
    labels = [texts[name] if texts else f"{values[name]:,.0f}" for name in names]
    axes.bar_label(bars, labels, padding=3, fontweight="bold")
    axes.set(title=title, ylabel=unit)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0, 1.12 * max(heights))
    axes.spines[["top", "right"]].set_visible(False)
