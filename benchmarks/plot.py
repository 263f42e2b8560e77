"""Draws the measured times as bars, one panel a case, from the newest CSV rows.

python -m benchmarks.plot [--op clip] [--out benchmarks.svg]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, results
from benchmarks.registry import OURS, Case, all_cases
from benchmarks.results import Row

COLOURS = {"ours": "#1a7f5a", "torch": "#8c96a3", "peer": "#c8803c", "matmul": "#d5dae0", "read": "#b9c6d8"}
LEGEND = {
    "ours": "contrastive_ops",
    "peer": "other packages",
    "torch": "torch",
    "matmul": "the matrix products alone",
    "read": "reading the corpus once",
}


def panels(rows: Sequence[Row], op: str | None = None) -> list[tuple[Case, Mapping[str, Row]]]:
    """The timed cases that have been measured, with the rows of their newest run."""
    found = []
    for case in all_cases().values():
        if op is not None and case.op != op:
            continue
        timed = results.newest(rows, case.name, "min_ms", [OURS, case.baseline])
        if timed is not None:
            found.append((case, timed))
    return found


def draw_panel(axes: Any, case: Case, timed: Mapping[str, Row]) -> None:
    """Horizontal bars of the minimum in ms, fastest on top, with the speed against the baseline."""
    ordered = sorted(timed.values(), key=lambda row: float(row["min_ms"]), reverse=True)
    times = [float(row["min_ms"]) for row in ordered]
    bars = axes.barh([row["provider"] for row in ordered], times, color=[COLOURS[row["kind"]] for row in ordered])
    labels = []
    for row in ordered:
        speed = report.speed_text(row, timed.get(case.baseline))
        labels.append(f" {float(row['min_ms']):.0f} ms" + (f"  {speed}" if speed else ""))
    axes.bar_label(bars, labels, fontsize=8)
    axes.set_xlim(0, 1.3 * max(times))
    axes.set_title(f"{case.op} {case.shape_text} {ordered[0]['dtype']}", fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"ms a step; speed against {case.baseline}", fontsize=8, loc="right")


def draw(found: Sequence[tuple[Case, Mapping[str, Row]]], path: Path) -> None:
    """Writes the figure; the suffix of the path chooses SVG or PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(6.2 * columns, 2.7 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (case, timed) in zip(grid, found, strict=False):
        draw_panel(axes, case, timed)
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    row = next(iter(found[0][1].values()))
    kinds = {each["kind"] for _, timed in found for each in timed.values()}
    figure.legend(
        handles=[Patch(color=COLOURS[kind], label=text) for kind, text in LEGEND.items() if kind in kinds],
        loc="outside upper center",
        ncols=len(kinds),
        fontsize=8,
        frameon=False,
        title=f"{row['device']}, {row['threads']} threads, torch {row['torch']}",
        title_fontsize=8,
    )
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a figure so that the same rows give the same file: a fixed salt and no date."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "contrastive_ops", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, facecolor="white", metadata=metadata)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="only the cases of this op")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.svg"), help="SVG or PNG")
    args = parser.parse_args(arguments)
    found = panels(results.read(), args.op)
    if not found:
        print("nothing measured yet; run python -m benchmarks.run")
        return 1
    draw(found, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
