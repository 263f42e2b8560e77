"""The CSV: one row per case and provider of a run, appended and never changed.

All rows are strings once written; an empty field was not measured. ``run`` is the start of the run
and groups its rows, since only numbers of one run may be compared. ``loss_error`` is the error of the
scores where the answer is lists, and ``starved`` the rows whose list is too short.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

COLUMNS = (
    "run", "op", "case", "shapes", "dtype", "provider", "kind", "version", "status",
    "rounds", "min_ms", "median_ms", "p20_ms", "p80_ms",
    "peak_extra_mib", "loss_error", "grad_error", "starved", "gflops", "of_matmul_rate",
    "date", "device", "cores", "threads", "capability", "torch", "contrastive_ops",
    "commit", "dirty",
)  # fmt: skip

Row = dict[str, str]


def file_of(kind: str) -> Path:
    """The file of a kind of machine; with a number where the columns changed since the one before was begun."""
    names = (kind if number == 1 else f"{kind}-{number}" for number in itertools.count(1))
    paths = (RESULTS / f"{name}.csv" for name in names)
    return next(path for path in paths if not path.exists() or _columns(path) == COLUMNS)


def _columns(path: Path) -> tuple[str, ...]:
    with path.open(newline="") as file:
        return tuple(next(csv.reader(file), ()))


def append(path: Path, rows: Iterable[Row]) -> None:
    """Appends rows; writes the header if the file is new.

    ValueError if the file has other columns: a changed schema starts a new file, it does not
    rewrite what was measured.
    """
    new = not path.exists()
    if not new and _columns(path) != COLUMNS:
        raise ValueError(
            f"{path}: must have the columns of benchmarks/results.py, got {', '.join(_columns(path))}; "
            "pass --csv with another file"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(directory: Path = RESULTS) -> list[Row]:
    """Every row of every CSV of a directory, oldest run first; columns newer than a file are empty."""
    rows: list[Row] = []
    for path in sorted(directory.glob("*.csv")):
        with path.open(newline="") as file:
            rows += ({**dict.fromkeys(COLUMNS, ""), **row} for row in csv.DictReader(file))
    return sorted(rows, key=lambda row: row["run"])


def newest(rows: Sequence[Row], case: str, column: str, providers: Sequence[str]) -> dict[str, Row] | None:
    """The rows, by provider, of the newest run in which each of ``providers`` has ``column``.

    None if there is no such run. Other providers of that run come along where they have a value.
    """
    runs: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["case"] == case and row["status"] == "ok" and row[column]:
            runs.setdefault(row["run"], {})[row["provider"]] = row
    complete = [run for run, found in runs.items() if all(name in found for name in providers)]
    return runs[max(complete)] if complete else None
