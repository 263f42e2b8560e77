"""Draws time and peak memory of CLIP's loss against the batch, on a CPU and on a GPU, from the newest rows.

python -m benchmarks.run --op clip-scaling && python -m benchmarks.scaling_plot --out docs/images/scaling.svg
python -m benchmarks.scaling_plot --only memory: where others use the machine, times are none, and bytes are
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.plot import COLOURS, save
from benchmarks.registry import OURS, Case, all_cases
from benchmarks.results import Row

PLAIN = "torch eager"
# (op, provider of ours, title): a GPU's cases are those of its table.
MACHINES = (("clip-scaling", OURS, "CPU"), ("clip", "contrastive_ops cuda", "GPU"))
Panel = tuple[str, str, Callable[[Row], float]]
PANELS: dict[str, Panel] = {
    "time": ("min_ms", "ms a step", lambda row: float(row["min_ms"])),
    "memory": ("peak_extra_mib", "extra memory, MiB", lambda row: max(float(row["peak_extra_mib"]), 0.1)),
}


def _size(case: Case) -> int:
    return case.shapes["N"]


def curves(rows: Sequence[Row], op: str, ours: str, column: str) -> dict[str, dict[int, Row]]:
    """By provider, the newest rows that have the column, by their number of pairs."""
    device = "cpu" if ours == OURS else "cuda"
    found: dict[str, dict[int, Row]] = {ours: {}, PLAIN: {}}
    for case in sorted((c for c in all_cases().values() if c.op == op and c.device == device), key=_size):
        newest = results.newest(rows, case.name, column, [ours]) or {}
        for name in found:
            if name in newest:
                found[name][_size(case)] = newest[name]
    return found


def _panel(axes: Any, found: Mapping[str, Mapping[int, Row]], value: Callable[[Row], float]) -> None:
    for name, points in found.items():
        kind, label = ("torch", "plain PyTorch") if name == PLAIN else ("ours", "contrastive_ops")
        sizes = sorted(points)
        axes.plot(sizes, [value(points[n]) for n in sizes], marker="o", markersize=4, color=COLOURS[kind], label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({n for points in found.values() for n in points})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=7, rotation=40)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def draw(rows: Sequence[Row], path: Path, kinds: Sequence[str] = tuple(PANELS)) -> bool:
    """Writes the figure, a column for each kind of machine that was measured; False if none was."""
    from matplotlib.figure import Figure

    chosen = [PANELS[kind] for kind in kinds]
    columns = [
        (title, [curves(rows, op, ours, column) for column, _, _ in chosen])
        for op, ours, title in MACHINES
        if curves(rows, op, ours, chosen[0][0])[ours]
    ]
    if not columns:
        return False
    figure = Figure(figsize=(5.0 * len(columns), 2.6 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), len(columns), squeeze=False)
    for column, (title, panels) in enumerate(columns):
        row = next(iter(next(iter(panels[0].values())).values()))
        grid[0][column].set_title(f"{title}: {row['device']}, {row['dtype']}, {row['shapes'].split()[-1]}", fontsize=8)
        for line, (found, (_, label, value)) in enumerate(zip(panels, chosen, strict=True)):
            _panel(grid[line][column], found, value)
            grid[line][column].set_ylabel(label, fontsize=8)
        grid[-1][column].set_xlabel("pairs in the batch", fontsize=8)
    grid[0][0].legend(fontsize=8, frameon=False)
    save(figure, path)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_plot", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("scaling.svg"), help="SVG or PNG")
    parser.add_argument("--only", choices=tuple(PANELS), help="one panel (default: both)")
    args = parser.parse_args(arguments)
    if not draw(results.read(), args.out, [args.only] if args.only else tuple(PANELS)):
        print("nothing measured yet; run python -m benchmarks.run --op clip-scaling")
        return 1
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
