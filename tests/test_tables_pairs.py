"""Tables of runs outside the registry: which run they take, and what a line says."""

from __future__ import annotations

from benchmarks import tables, tables_pairs
from benchmarks.results import COLUMNS


def row(run: str, case: str, provider: str, ms: str, **more: str) -> dict[str, str]:
    kind = "peer" if "clip_loss" in provider else "ours"
    given = {
        "run": run,
        "case": case,
        "provider": provider,
        "min_ms": ms,
        "kind": kind,
        "shapes": "N=64",
        "status": "ok",
    }
    return {**dict.fromkeys(COLUMNS, ""), **given, "date": f"{run}T00:00", **more}


def both(run: str, case: str, mine: str, other: str) -> list[dict[str, str]]:
    return [row(run, case, "clip_loss", other, version="3.0"), row(run, case, "contrastive_ops", mine)]


def test_a_line_has_both_sides_and_their_ratio() -> None:
    header, lines, used = tables_pairs.tables(both("2026-01-01", "adapter-a-B+C-N64", "0.5", "2.0"))["adapters"]()
    assert len(header) == len(lines[0])
    assert lines == [["a-B C", "N=64", "clip_loss 3.0", "0.5", "2", "0.25"]]
    assert len(used) == 2


def test_the_newest_of_the_longest_runs_is_taken() -> None:
    rows = [
        *both("2026-01-01", "small-clip-N8", "1", "1"),
        *both("2026-01-01", "small-clip-N64", "1", "1"),
        *both("2026-01-02", "small-clip-N8", "2", "1"),
        *both("2026-01-02", "small-clip-N64", "3", "1"),
        *both("2026-01-03", "small-clip-N8", "9", "1"),  # of one function alone
    ]
    _, lines, used = tables_pairs.tables(rows)["small"]()
    assert [line[-1] for line in lines] == ["2.00", "3.00"]
    assert {each["run"] for each in used} == {"2026-01-02"}


def test_providers_of_processes_are_beside_ours() -> None:
    names = {"contrastive_ops gather": "100", "clip_loss": "250", "bytes moved": "10"}
    rows = [row("2026-01-01", "distributed.clip-fp32", name, ms) for name, ms in names.items()]
    _, lines, _ = tables_pairs.tables(rows)["processes"]()
    assert [line[1:] for line in lines] == [
        ["contrastive_ops gather", "100", "1.00"],
        ["clip_loss ", "250", "2.50"],
        ["bytes moved", "10", "0.10"],
    ]


def test_pages_know_them_and_say_where_there_is_nothing() -> None:
    text = "<!-- benchmark:recipes -->\n<!-- /benchmark -->"
    assert tables.NOTHING in tables.updated(text, [])
    assert "0.50" in tables.updated(text, both("2026-01-01", "recipe-negclip", "1", "2"))
