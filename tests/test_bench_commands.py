"""What `make bench` says of targets and does within its minutes, the comparison with a commit, and the curves."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

# The suite is part of the checkout only. At the end: an installed package stays the one under test.
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks import base, curves, measure, providers, report, run  # noqa: E402
from benchmarks.registry import OURS, Target, all_cases  # noqa: E402

CLIP = next(case for case in all_cases().values() if case.op == "clip" and case.device == "cpu")
TINY = replace(
    CLIP.shrunk(),
    providers=(CLIP.provider(OURS), CLIP.provider("torch eager"), CLIP.provider(providers.MATMUL)),
    baseline="torch eager",
    targets=(Target("clip", "faster", 2.0, OURS, "torch eager"), Target("clip", "peak", 10, OURS)),
)


def row(provider: str, **columns: str) -> dict[str, str]:
    return {"case": TINY.name, "provider": provider, "status": "ok", **columns}


def test_every_target_is_hit_missed_or_not_measured() -> None:
    rows = [row(OURS, min_ms="2.0", peak_extra_mib="11"), row("torch eager", min_ms="5.0")]
    *lines, last = report.targets_text([TINY], rows).splitlines()
    assert [line.split()[-1] for line in lines] == ["hit", "missed"]
    assert "2.50x" in lines[0] and ">= 2.00x faster" in lines[0] and TINY.name in lines[0]
    assert last == "1 hit, 1 missed, 0 not measured"
    rows[0]["status"] = "wrong"
    assert report.targets_text([TINY], rows).splitlines()[-1] == "0 hit, 0 missed, 2 not measured"
    assert report.targets_text([replace(TINY, targets=())], rows) == "no targets"


def test_memory_is_that_of_targets() -> None:
    assert report.memory_providers(CLIP) == {"contrastive_ops no cache", "open_clip ClipLoss"}
    assert report.memory_providers(TINY) == {OURS}
    untimed = next(case for case in all_cases().values() if case.measure == ("memory",))
    assert report.memory_providers(untimed) == {provider.name for provider in untimed.providers}


def test_who_takes_part_is_named_by_a_target() -> None:
    named = [each.name for each in run._wanted(CLIP, run.Options(of_targets=True))]
    everyone = [each.name for each in run._wanted(CLIP, run.Options())]
    assert set(everyone) - set(named) == {"torch eager"} and OURS in named and providers.MATMUL in named


def test_tables_keep_the_providers_that_a_run_of_targets_leaves_out() -> None:
    from benchmarks import tables

    columns = {
        "median_ms": "",
        "peak_extra_mib": "",
        "grad_error": "",
        "starved": "",
        "of_matmul_rate": "",
        "version": "",
    }
    common = {"case": CLIP.name, "status": "ok", "kind": "ours", "dtype": "fp32", **columns}
    old, new = (dict(common, run=name, min_ms=time) for name, time in (("1", "5"), ("2", "4")))
    rows = [{**old, "provider": each.name} for each in CLIP.providers if not each.optional]
    lines, used = tables._timed_case(CLIP, [*rows, {**new, "provider": OURS}, {**new, "provider": CLIP.baseline}])
    assert {each["run"] for each in used} == {"1"} and len(lines) == len(rows)
    newer = [{**new, "provider": each["provider"]} for each in rows]
    assert {each["run"] for each in tables._timed_case(CLIP, [*rows, *newer])[1]} == {"2"}


def test_a_run_ends_with_its_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []
    timings = measure.interleave({"a": lambda: calls.append(1) or time.sleep(0.06)}, rounds=5, until=time.monotonic())
    assert len(calls) == 2 and timings["a"].samples == 1  # once warm and one round
    for seconds, expected in ((1.0, 1), (0.001, 2)):  # a long call that was made is not made again; a short one is
        calls.clear()
        measure.interleave({"a": lambda: calls.append(1) or time.sleep(0.06)}, rounds=1, warm={"a": seconds})
        assert len(calls) == expected
    options = run.Options(rounds=9, quick=True, memory=False, until=time.monotonic())
    assert run.run([TINY], options) == []
    assert "2 not measured" in capsys.readouterr().out
    rows = run.run([TINY], replace(options, until=time.monotonic() + 60))
    assert {each["provider"] for each in rows} == {OURS, "torch eager", providers.MATMUL}


def test_a_package_is_timed_against_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(base, "BUILD", tmp_path)
    sides = {name: base.Side(ROOT) for name in ("now", "then")}
    try:
        timings = base.compare(sides, CLIP, rounds=2, quick=True)
        assert set(timings) == {"now", "then"} and all(each.minimum > 0 for each in timings.values())
        assert timings["now"].samples == timings["then"].samples >= 2
        with pytest.raises(RuntimeError, match="KeyError: 'no such case'"):
            sides["now"].ask(case="no such case", quick=True)
        assert sides["now"].ask(calls=2)  # lives on
    finally:
        for side in sides.values():
            side.close()
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(RuntimeError, match=r"the package of .*elsewhere must be imported, got"):
        base.Side(tmp_path / "elsewhere")


def test_only_a_commit_can_be_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone")
    assert len(base.commit_of("HEAD")) == 40
    assert run.main(["--base", "no-such-revision", "--quick"]) == 2
    assert "--base must name a commit of this repository, got 'no-such-revision'" in capsys.readouterr().err


def test_a_curve_has_both_sides_in_time_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curves.run("k", rounds=1, quick=True, csv=tmp_path / "curves.csv") == 0
    from benchmarks import results

    found = curves.points(results.read(tmp_path), "k")
    assert {name: sorted(sizes) for name, sizes in found.items()} == {OURS: [1, 10], curves.PLAIN: [1, 10]}
    assert all(
        float(each["min_ms"]) > 0 and each["peak_extra_mib"] for sides in found.values() for each in sides.values()
    )
    assert curves.draw(results.read(tmp_path), tmp_path / "curves.svg")
    assert "extra MiB" in (tmp_path / "curves.svg").read_text()
    assert curves.run("no such", rounds=1) == 2
    assert "there are N, D, threads, M, k, E, largest" in capsys.readouterr().err


def test_the_largest_problem_is_the_last_that_fits() -> None:
    def rows(side: str, mib: dict[int, float]) -> list[dict[str, str]]:
        common = {"op": "curve-largest", "status": "ok", "provider": side, "run": "1"}
        return [{**common, "case": f"curve-largest-{n}", "peak_extra_mib": str(each)} for n, each in mib.items()]

    stored = rows(OURS, {1024: 1.0, 2048: 2.0}) + rows(curves.PLAIN, {1024: 100.0, 2048: 400.0})
    _, lines, _ = curves.largest_table(stored)
    assert lines == [[OURS, "at least 2,048", "2.0"], [curves.PLAIN, "1,024", "100.0"]]


def test_plain_torch_stops_where_its_matrices_are_too_large() -> None:
    curve = curves.curves()["N"]
    assert set(curve.sides(8192)) == {OURS, curves.PLAIN} and set(curve.sides(16_384)) == {OURS}
    assert all(OURS in each.sides(each.sizes[-1]) for each in curves.curves().values())
