"""The measurement of what losses add to their sweeps; no time is asserted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The suite is part of the checkout only. At the end: an installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import measure, overhead, results, run
from benchmarks.registry import OURS
from contrastive_ops.core import extension
from contrastive_ops.ops.similarity_reduce import BACKENDS

compiled = pytest.mark.skipif(extension.why_missing() is not None, reason="the operators are not compiled")


@compiled
def test_overhead_runs_every_loss_with_a_sweep_and_names_the_others(capsys, tmp_path):
    path = tmp_path / "overhead.csv"
    command = ["--overhead", "--quick", "--rounds", "1", "--op", "gist", "--csv", str(path)]
    assert run.main(command) == 0
    rows = results.read(tmp_path)
    assert {row["case"] for row in rows} == {"overhead-gist-fp32-N192-D48", "overhead-gist-relative-fp32-N192-D48"}
    for total, inside, outside in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert [each["provider"] for each in (total, inside, outside)] == [OURS, overhead.INSIDE, overhead.OUTSIDE]
        assert 0 < float(inside["min_ms"]) < float(total["min_ms"])
        assert total["device"] and total["run"] == outside["run"]
    assert run.main(["--overhead", "--quick", "--case", "triplet", "--rounds", "1"]) == 0
    assert "no sweep: triplet" in capsys.readouterr().out
    assert run.main(["--overhead", "--op", "nothing"]) == 2


@compiled
def test_the_clock_runs_inside_the_operators_alone():
    backend = BACKENDS["cpu"]
    step = overhead.step_of("sup_con", 64, 16)
    with overhead.clocked() as seconds:
        assert seconds == [0.0]
        step()
        once = seconds[0]
        step()
    assert 0 < once < seconds[0]
    assert BACKENDS["cpu"] is backend


def test_overhead_above_the_limit_is_marked():
    def timing(milliseconds: float) -> measure.Timing:
        return measure.Timing.of([milliseconds / 1e3])

    found = [
        overhead.Overhead("lean", "lean", timing(11.4), timing(10), timing(1.4)),
        overhead.Overhead("heavy", "heavy", timing(11.6), timing(10), timing(1.6)),
    ]
    lean, heavy = overhead.table(found, []).splitlines()[1:]
    assert lean.endswith("1.140") and heavy.endswith("1.160  above 1.15")
