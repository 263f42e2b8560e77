"""Tables of what `make gpu` has measured so far, from its CSV files; needs no torch."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

# One row for each way to compute a trial of an experiment. `of_floor`: time of what nobody can avoid over the time.
COLUMNS = (
    "experiment",
    "shape",
    "what",
    "kind",
    "status",
    "error",
    "min_ms",
    "median_ms",
    "tflops",
    "of_floor",
    "note",
)

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none where it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows of an experiment at once, so that a stage that is cut leaves them."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def of_benchmarks(rows: Sequence[Row]) -> list[str]:
    """Time and share of the matmul rate of each provider."""
    if not rows:
        return []
    lines = [f"{'case':<34} {'provider':<28} {'ms':>9} {'of matmul':>9}"]
    for row in rows:
        share = f"{float(row['of_matmul_rate']):.0%}" if row["of_matmul_rate"] else ""
        said = row["min_ms"] if row["status"] == "ok" else row["status"]
        lines.append(f"{row['case']:<34} {row['provider']:<28} {said:>9} {share:>9}")
    return lines


def of_experiments(rows: Sequence[Row]) -> list[str]:
    """Each trial, and behind them which way is the fastest at each shape."""
    if not rows:
        return []
    lines = [f"{'experiment':<12} {'shape':<34} {'what':<28} {'ms':>9} {'TFLOP/s':>8} {'of floor':>8} {'error':>8}"]
    for row in rows:
        said = row["min_ms"] if row["status"] == "ok" else row["status"]
        share = f"{float(row['of_floor']):.0%}" if row["of_floor"] else ""
        numbers = f"{said:>9} {row['tflops']:>8} {share:>8} {row['error']:>8}"
        lines.append(f"{row['experiment']:<12} {row['shape']:<34} {row['what']:<28} {numbers}".rstrip())
    return [*lines, "", *fastest(rows)]


def fastest(rows: Sequence[Row]) -> list[str]:
    """Which way is the fastest at each shape, and by how much the next takes longer."""
    trials: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["status"] == "ok" and row["kind"] != "floor" and row["min_ms"]:
            trials.setdefault((row["experiment"], row["shape"]), []).append(row)
    lines = []
    for (experiment, shape), found in trials.items():
        first, *others = sorted(found, key=lambda row: float(row["min_ms"]))
        if others:
            ratio = float(others[0]["min_ms"]) / max(float(first["min_ms"]), 1e-9)
            lines.append(f"{experiment:<12} {shape:<34} {first['what']:<28} {ratio:.2f}x of {others[0]['what']}")
    return [f"{'experiment':<12} {'shape':<34} {'fastest':<28} faster than the next", *lines] if lines else []
