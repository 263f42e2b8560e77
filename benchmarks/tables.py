"""Writes the benchmark tables of the README and of docs/ from the CSV files; no number in them is typed.

    python -m benchmarks.tables            rewrite the tables of every page
    python -m benchmarks.tables --check    exit 1 if they are not what the CSV files say

A table stands between ``<!-- benchmark:NAME -->`` and ``<!-- /benchmark -->``. NAME is ``targets``,
``memory``, an op of the registry (``clip``), one of `tables_pairs`, or ``demo``, ``demo-mining`` and
``headline`` for what ``make demo ARGS="--json benchmarks/results/demo.json --out docs/images"`` wrote;
the other examples are in `tables_examples`, and what was tested in `tables_reliability`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import curves, report, results, tables_examples, tables_pairs, tables_reliability, targets
from benchmarks.registry import DTYPE_NAMES, OURS, Case, Target, all_cases
from benchmarks.results import Row

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
DEMO = Path(__file__).resolve().parent / "results" / "demo.json"
MARKERS = re.compile(r"(<!-- benchmark:([\w-]+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
NOTHING = "Not measured yet.\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], right_from: int) -> str:
    rule = ["---" if index < right_from else "--:" for index in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))


def _origin(rows: Sequence[Row]) -> str:
    """One sentence per machine and version that the rows come from."""
    sentences = []
    for row in rows:
        changed = " with local changes" if row["dirty"] == "yes" else ""
        commit = f", commit {row['commit']}{changed}" if row["commit"] else ""
        sentence = (
            f"{row['device']}, {row['threads']} threads, {row['capability']}, "
            f"torch {row['torch']}, contrastive_ops {row['contrastive_ops']}{commit}, "
            f"{row['date'][:10]}."
        )
        if sentence not in sentences:
            sentences.append(sentence)
    return "\n" + "<br>\n".join(sentences) + "\n" if sentences else ""


def _described(case: Case) -> str:
    return f"{case.op} {DTYPE_NAMES[case.dtype]} {case.shape_text}"


def _timed_case(case: Case, rows: Sequence[Row]) -> tuple[list[list[str]], list[Row]]:
    """The table lines of one case and the rows they come from."""
    # On a GPU any backend of ours will do; which of them can run differs between machines.
    ours = [OURS] if case.device == "cpu" else [each.name for each in case.providers if each.kind == "ours"]
    # A run of targets alone does not hide the other providers of an older one.
    known = {row["provider"] for row in rows if row["case"] == case.name and row["min_ms"] and row["status"] == "ok"}
    whole = [each.name for each in case.providers if each.name in known and not each.optional]
    runs = [whole, *([name, *others] for others in ([case.baseline], []) for name in ours)]
    timed = next(filter(None, (results.newest(rows, case.name, "min_ms", names) for names in runs)), None)
    if timed is None:
        return [], []
    # A run without memory does not hide the memory of an older one.
    peaks = next(filter(None, (results.newest(rows, case.name, "peak_extra_mib", [name]) for name in ours)), {})
    lines = []
    for name, row in timed.items():
        version = f" {row['version']}" if row["kind"] == "peer" else ""
        lines.append(
            [
                case.shape_text + f" {row['dtype']}",
                name + version,
                f"{float(row['min_ms']):.1f}",
                report.speed_text(row, timed.get(case.baseline)),
                peaks.get(name, {}).get("peak_extra_mib", ""),
                row["grad_error"],
                row["starved"],
                report.share_text(row),
            ]
        )
    return lines, list(timed.values())


def op_table(op: str, rows: Sequence[Row], device: str = "cpu") -> str:
    """Every provider of every timed case of one op on one kind of device."""
    lines, used = [], []
    timed = [c for c in all_cases().values() if c.op == op and c.device == device and "time" in c.measure]
    for case in timed:
        case_lines, case_rows = _timed_case(case, rows)
        lines += case_lines
        used += case_rows
    if not lines:
        return NOTHING
    baselines = sorted({case.baseline for case in timed})
    header = (
        "shape", "provider", "ms", f"speed against {', '.join(baselines)}", "extra MiB",
        "gradient error", "starved rows", "of matmul rate",
    )  # fmt: skip
    header, *lines = report.without_empty(header, lines)
    return _markdown(header, lines, right_from=2) + _origin(used)


def memory_table(rows: Sequence[Row]) -> str:
    """Peak memory of the cases whose logits would not fit."""
    lines, used = [], []
    for case in all_cases().values():
        found = results.newest(rows, case.name, "peak_extra_mib", [OURS])
        if case.measure != ("memory",) or found is None:
            continue
        row = found[OURS]
        lines.append([case.op, case.shape_text, row["peak_extra_mib"], row["grad_error"]])
        used.append(row)
    if not lines:
        return NOTHING
    header = ("op", "shape", "peak MiB above inputs and gradients", "gradient error")
    return _markdown(header, lines, right_from=2) + _origin(used)


def measured(case: Case, target: Target, rows: Sequence[Row]) -> tuple[float, list[Row]] | None:
    """The newest value of a target and the rows it comes from; None if it was never measured."""
    names = report.providers_of(target)
    found = results.newest(rows, case.name, report.METRIC_COLUMN[target.metric], names)
    if found is None:
        return None
    value = report.value_of(target, found)
    return None if value is None else (value, [found[name] for name in names])


def targets_table(rows: Sequence[Row]) -> str:
    """What finished work had to reach, and what it reached."""
    due = {row.key for row in targets.ROWS if row.group in targets.FINISHED}
    lines, used = [], []
    for case in all_cases().values():
        for target in case.targets:
            found = measured(case, target, rows) if target.row in due else None
            if found is None:
                continue
            value, target_rows = found
            outcome = "ok" if report.is_met(target, value) else "**missed**"
            who = " against ".join(report.providers_of(target))
            reached = report.value_text(target, value)
            lines.append([_described(case), who, report.bound_text(target), reached, outcome])
            used += target_rows
    if not lines:
        return NOTHING
    header = ("case", "what", "reach", "measured", "")
    return _markdown(header, lines, right_from=5) + _origin(used)


def demo_table(demo: dict[str, Any]) -> str:
    """The demo's two trainings side by side."""
    labels = {"pytorch": "plain PyTorch", "contrastive_ops": "contrastive_ops"}

    def line(label: str, value: Callable[[str], str]) -> list[str]:
        return [label, *(value(name) for name in labels)]

    def largest(name: str) -> str:
        found = demo["largest"][name]
        return f"{'at least ' if found['at_least'] else ''}{found['batch']:,}"

    lines = [
        line("loss at the last step", lambda name: f"{demo['losses'][name][-1]:.5f}"),
        line("loss layer, ms per step (minimum)", lambda name: f"{demo['ms_min'][name]:.0f}"),
        line("loss layer, ms per step (median)", lambda name: f"{demo['ms_median'][name]:.0f}"),
        line("loss layer, peak extra memory", lambda name: f"{demo['extra_mib'][name]:.0f} MiB"),
        line(f"MRR@10 on {demo['held_out']:,} held-out pairs", lambda name: f"{demo['mrr'][name]:.4f}"),
        line(f"largest batch whose loss layer fits in {demo['limit_mib'] // 1024} GiB", largest),
    ]
    header = (f"{demo['pairs']:,} pairs, batch {demo['batch']:,}, dimension {demo['dim']}", *labels.values())
    extra = (
        f"\nThe curves differ by at most {demo['max_difference']:.1e}. With `memory_budget=0` contrastive_ops needs "
        f"{demo['extra_mib']['uncached']:.0f} MiB. {demo['provenance']}\n"
    )
    return _markdown(header, lines, right_from=1) + extra


def demo_mining_table(demo: dict[str, Any]) -> str:
    """What the demo's encoder is worth after more training, with and without mined negatives."""
    mining = demo["mining"]
    labels = {"in_batch": "trained on, negatives of the batch alone", "mined": "trained on, mined negatives as well"}
    lines = [["before", f"{mining['mrr_before']:.4f}", ""]]
    lines += [[label, f"{mining['mrr'][name]:.4f}", f"{mining['seconds'][name]:.1f}"] for name, label in labels.items()]
    header = (f"{mining['steps']} more steps, batch {mining['batch']:,}", "MRR@10", "seconds")
    extra = (
        f"\n{mining['num_negatives']} negatives for each of {mining['corpus']:,} sentences were mined "
        f"{mining['refreshes']} times in {mining['mining_seconds']:.1f} s, embedding included.\n"
    )
    return _markdown(header, lines, right_from=1) + extra


def headline(demo: dict[str, Any]) -> str:
    """The one number of the first screen."""
    speed = demo["ms_min"]["pytorch"] / demo["ms_min"]["contrastive_ops"]
    batches = {name: found["batch"] for name, found in demo["largest"].items()}
    return (
        f"On {demo['threads']} CPU cores, in `make demo`: a loss layer **{speed:.1f} times as fast**, and a batch "
        f"of {batches['pytorch']:,} pairs that fills {demo['limit_mib'] // 1024} GiB grows to "
        f"{'at least ' if demo['largest']['contrastive_ops']['at_least'] else ''}{batches['contrastive_ops']:,}.\n"
    )


def curves_picture(rows: Sequence[Row]) -> str:
    """The picture of the curves, where they are measured and drawn."""
    used = [row for name in curves.LABELS for row in list(curves.points(rows, name)[OURS].values())[-1:]]
    if not used or not curves.PICTURE.exists():
        return NOTHING
    text = "Time and extra memory of one step against each size of a problem"
    return f"![{text}](images/{curves.PICTURE.name})\n{_origin([row for row in used if row['op'] != 'curve-threads'])}"


def _other_table(table: tables_pairs.Table) -> str:
    header, lines, used = table
    return _markdown(header, lines, right_from=2) + _origin(used) if lines else NOTHING


def tables(rows: Sequence[Row]) -> dict[str, Callable[[], str]]:
    """The known tables by name."""
    ops = dict.fromkeys((case.op, case.device) for case in all_cases().values())
    known: dict[str, Callable[[], str]] = {
        op if device == "cpu" else f"gpu-{op}": lambda op=op, device=device: op_table(op, rows, device)
        for op, device in ops
    }
    known["memory"] = lambda: memory_table(rows)
    known["targets"] = lambda: targets_table(rows)
    if DEMO.exists():
        demo = json.loads(DEMO.read_text())
        known["demo"] = lambda: demo_table(demo)
        known["demo-mining"] = lambda: demo_mining_table(demo)
        known["headline"] = lambda: headline(demo)
    known["curves"] = lambda: curves_picture(rows)
    known["largest"] = lambda: _other_table(curves.largest_table(rows))
    known |= {name: lambda table=table: _other_table(table()) for name, table in tables_pairs.tables(rows).items()}
    return known | tables_examples.tables() | tables_reliability.tables()


def updated(text: str, rows: Sequence[Row]) -> str:
    """The text with every marked table written anew.

    ValueError for a table nobody knows, and for markers that do not pair up.
    """
    known = tables(rows)

    def replacement(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in known:
            raise ValueError(f"benchmark:{name} must be one of {', '.join(known)}")
        return f"{opening}\n{known[name]()}\n{closing}"

    if text.count("<!-- benchmark:") != len(MARKERS.findall(text)):
        raise ValueError("a <!-- benchmark:NAME --> marker has no <!-- /benchmark --> of its own")
    return MARKERS.sub(replacement, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    parser.add_argument("--page", type=Path, nargs="+", default=PAGES)
    args = parser.parse_args(arguments)
    rows, out_of_date = results.read(), 0
    for page in args.page:
        old = page.read_text()
        new = updated(old, rows)
        if new == old:
            continue
        if args.check:
            print(f"{page.name}: tables out of date; run python -m benchmarks.tables")
            out_of_date = 1
        else:
            page.write_text(new)
    return out_of_date


if __name__ == "__main__":
    sys.exit(main())
