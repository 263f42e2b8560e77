"""Turns measurements into CSV rows, and rows into verdicts and the table a terminal shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.errors import Errors
from benchmarks.measure import Timing
from benchmarks.registry import DTYPE_NAMES, Case, Provider, Target
from benchmarks.results import Row

# The column a target's metric reads.
METRIC_COLUMN = {
    "faster": "min_ms",
    "time": "min_ms",
    "memory": "peak_extra_mib",
    "peak": "peak_extra_mib",
    "error": "grad_error",
    "starved": "starved",
}


@dataclass
class Measurement:
    """All that a run learned about one provider of one case."""

    provider: Provider
    status: str = "ok"
    note: str = ""
    timing: Timing | None = None
    rounds: int = 0
    peak_extra_mib: float | None = None
    errors: Errors | None = None
    first_call: float = 0.0  # seconds of the call that was checked


def to_row(case: Case, found: Measurement, matmul_gflops: float | None, version: str) -> Row:
    """The CSV row of a measurement, without run and provenance."""
    row = {
        "op": case.op,
        "case": case.name,
        "shapes": case.shape_text,
        "dtype": DTYPE_NAMES[case.dtype],
        "provider": found.provider.name,
        "kind": found.provider.kind,
        "version": version,
        "status": found.status,
        "rounds": str(found.rounds or ""),
        "peak_extra_mib": _number(found.peak_extra_mib, ".1f"),
    }
    if found.errors is not None:
        row["loss_error"] = _number(found.errors.value, ".2e")
        row["grad_error"] = _number(found.errors.grads, ".2e")
        row["starved"] = _number(found.errors.starved, "d")
    if found.timing is not None:
        timing = found.timing
        for column, seconds in (
            ("min_ms", timing.minimum),
            ("median_ms", timing.median),
            ("p20_ms", timing.p20),
            ("p80_ms", timing.p80),
        ):
            row[column] = _number(1e3 * seconds, ".4g" if seconds < 1 else ".1f")
        gflops = gflops_of(case, timing)
        row["gflops"] = _number(gflops, ".1f")
        row["of_matmul_rate"] = _number(gflops / matmul_gflops if matmul_gflops else None, ".3f")
    return row


def gflops_of(case: Case, timing: Timing) -> float:
    """The case's necessary work over the shortest time."""
    return case.flops(case.shapes) / timing.minimum / 1e9


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ---------------------------------------------------------------------------------------------
# Targets


def providers_of(target: Target) -> list[str]:
    """The providers whose rows a target needs."""
    return [target.ours] + ([target.against] if target.against else [])


def value_of(target: Target, rows: Mapping[str, Row]) -> float | None:
    """What a target measures, from the rows of one run by provider; None if not measured."""
    column = METRIC_COLUMN[target.metric]
    fields = [rows.get(name, {}).get(column, "") for name in providers_of(target)]
    if not all(fields):
        return None
    ours = float(fields[0])
    if target.against is None:
        return ours
    against = float(fields[1])
    if target.metric == "faster":
        return against / ours
    return ours / against if against else float("inf")


def is_met(target: Target, value: float) -> bool:
    """Whether the bound holds, at two decimals as it is printed."""
    if target.metric == "faster":
        return round(value, 2) >= target.bound
    return value <= target.bound


def bound_text(target: Target) -> str:
    """The bound in words: ``>= 2.00x faster``."""
    return {
        "faster": f">= {target.bound:.2f}x faster",
        "time": f"<= {target.bound:.2f}x the time",
        "memory": f"<= {target.bound:.3f}x the extra memory",
        "peak": f"<= {target.bound:g} MiB",
        "error": f"<= {target.bound:.0e} gradient error",
        "starved": f"<= {target.bound:g} starved rows",
    }[target.metric]


def value_text(target: Target, value: float) -> str:
    """The measured value in the unit of the bound."""
    return {
        "faster": f"{value:.2f}x",
        "time": f"{value:.2f}x",
        "memory": f"{value:.3f}x",
        "peak": f"{value:.0f} MiB",
        "error": f"{value:.1e}",
        "starved": f"{value:g}",
    }[target.metric]


def verdict(target: Target, rows: Mapping[str, Row]) -> str:
    """One line: ``contrastive_ops against open_clip: reach >= 2.00x faster: 2.60x ok``."""
    who = " against ".join(providers_of(target))
    value = value_of(target, rows)
    if value is None:
        return f"{who}: reach {bound_text(target)}: not measured"
    outcome = "ok" if is_met(target, value) else "missed"
    return f"{who}: reach {bound_text(target)}: {value_text(target, value)} {outcome}"


def memory_providers(case: Case) -> set[str]:
    """Those whose memory a target of the case asks for; of a case that measures nothing else, all."""
    if "time" not in case.measure:
        return {provider.name for provider in case.providers}
    asked = [target for target in case.targets if METRIC_COLUMN[target.metric] == "peak_extra_mib"]
    return {name for target in asked for name in providers_of(target)}


def targets_text(cases: Sequence[Case], rows: Sequence[Row]) -> str:
    """A line for each target of the cases, from the rows of one run: hit, missed, or not measured."""
    lines, counts = [], {"hit": 0, "missed": 0, "not measured": 0}
    for case in cases:
        good = {row["provider"]: row for row in rows if row["case"] == case.name and row["status"] == "ok"}
        for target in case.targets:
            value = value_of(target, good)
            outcome = "not measured" if value is None else "hit" if is_met(target, value) else "missed"
            counts[outcome] += 1
            found = "" if value is None else value_text(target, value)
            lines.append((case.name, " against ".join(providers_of(target)), bound_text(target), found, outcome))
    if not lines:
        return "no targets"
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, ", ".join(f"{number} {outcome}" for outcome, number in counts.items())])


# ---------------------------------------------------------------------------------------------
# The terminal's table

HEADER = (
    "provider", "version", "min ms", "median", "p20..p80", "speed", "extra MiB",
    "error", "grad err", "starved", "of matmul",
)  # fmt: skip


def without_empty(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Header and lines without the columns that are empty or 0 in every line; the first two stay."""
    columns = list(zip(header, *lines, strict=True))
    return list(zip(*(c for i, c in enumerate(columns) if i < 2 or set(c[1:]) - {"", "0"}), strict=True))


def speed_text(row: Row, baseline: Row | None) -> str:
    """How many times faster than the baseline, or an empty string."""
    if not (baseline and baseline.get("min_ms") and row.get("min_ms")):
        return ""
    return f"{float(baseline['min_ms']) / float(row['min_ms']):.2f}x"


def share_text(row: Row) -> str:
    """The fraction of the machine's matmul rate in percent."""
    return f"{float(row['of_matmul_rate']):.0%}" if row.get("of_matmul_rate") else ""


def _cells(row: Row, baseline: Row | None) -> tuple[str, ...]:
    spread = f"{row['p20_ms']}..{row['p80_ms']}" if row.get("p20_ms") else ""
    return (
        row["provider"],
        row.get("version", ""),
        row.get("min_ms", ""),
        row.get("median_ms", ""),
        spread,
        speed_text(row, baseline),
        row.get("peak_extra_mib", ""),
        row.get("loss_error", ""),
        row.get("grad_error", ""),
        row.get("starved", ""),
        share_text(row),
    )


def table(case: Case, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table of one case, its notes (missing, wrong, failed providers) and verdicts."""
    good = {row["provider"]: row for row in rows if row["status"] == "ok"}
    lines = without_empty(HEADER, [_cells(row, good.get(case.baseline)) for row in good.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [case.name + (f"   speed: against {case.baseline}" if "time" in case.measure else "")]
    for line in lines:
        first, *rest = (
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text.append("  " + "  ".join([first, *rest]).rstrip())
    text += [f"  {note}" for note in notes]
    text += [f"  {verdict(target, good)}" for target in case.targets]
    return "\n".join(text)
