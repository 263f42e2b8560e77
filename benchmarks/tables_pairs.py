"""The tables of runs outside the registry: two sides of a step in turns, and providers on the same processes.

python -m benchmarks.run --adapters      docs/integrations.md
python -m benchmarks.run --recipes       docs/papers.md
python -m benchmarks.run --small         docs/benchmarks.md
python -m benchmarks.run --processes     docs/distributed.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.results import Row

Table = tuple[tuple[str, ...], list[list[str]], list[Row]]  # header, lines, the rows they come from


def _one_run(rows: Sequence[Row], prefix: str) -> dict[tuple[str, str], list[Row]]:
    """The rows of each case and shape that begins so: of the run with the most of them, the newest of those."""
    runs: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if row["case"].startswith(prefix) and row["status"] == "ok" and row["min_ms"]:
            runs.setdefault(row["run"], {}).setdefault((row["case"], row["shapes"]), []).append(row)
    return max(runs.items(), key=lambda run: (len(run[1]), run[0]))[1] if runs else {}


def _times(mine: Row, other: Row) -> list[str]:
    ours, theirs = float(mine["min_ms"]), float(other["min_ms"])
    return [f"{ours:.3g}", f"{theirs:.3g}", f"{ours / theirs:.2f}"]


def pairs(rows: Sequence[Row], prefix: str, header: tuple[str, ...]) -> Table:
    """A line for each case: ours, the other side, and ours over the other's."""
    lines, used = [], []
    for (case, shapes), found in _one_run(rows, prefix).items():
        mine, *others = sorted(found, key=lambda row: row["provider"] != "contrastive_ops")
        if mine["provider"] != "contrastive_ops" or not others:
            continue
        other = others[0]
        name = case.removeprefix(prefix).rpartition("-N")[0] or case.removeprefix(prefix)
        version = f" {other['version']}" if other["kind"] == "peer" else ""
        against = [other["provider"] + version] if len(header) == 6 else []
        lines.append([name.replace("+", " "), shapes, *against, *_times(mine, other)])
        used += found
    return header, lines, used


def processes(rows: Sequence[Row]) -> Table:
    """Each provider of the two processes, and its time over that of ours."""
    lines, used = [], []
    for (_, shapes), found in _one_run(rows, "distributed.clip-fp32").items():
        ours = next(row for row in found if row["provider"] == "contrastive_ops gather")
        for row in found:
            version = f" {row['version']}" if row["kind"] == "peer" else ""
            ratio = float(row["min_ms"]) / float(ours["min_ms"])
            lines.append([shapes, row["provider"] + version, f"{float(row['min_ms']):.0f}", f"{ratio:.2f}"])
        used += found
    return ("pairs x dimensions", "provider", "ms", "over ours with gather"), lines, used


def tables(rows: Sequence[Row]) -> dict[str, Callable[[], Table]]:
    """The known tables by name."""
    sides = ("step", "shape", "ms of ours", "ms", "ours over it")
    return {
        "adapters": lambda: pairs(rows, "adapter-", ("adapter", "shape", "against", *sides[2:])),
        "recipes": lambda: pairs(rows, "recipe-", ("recipe", "shape", "ms of ours", "ms of its folds", "ours over it")),
        "small": lambda: pairs(rows, "small-", ("loss", "shape", "ms of ours", "ms of plain torch", "ours over it")),
        "processes": lambda: processes(rows),
    }
