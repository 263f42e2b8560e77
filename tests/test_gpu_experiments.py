"""The experiments of ``make gpu``, rehearsed: every trial is built, checked, timed and written; no GPU is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The suite is part of the checkout only. At the end: an installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu, gpu_experiments, gpu_tables
from benchmarks.gpu_trials import EXPERIMENTS, Setup, Trial

ON_CPU = Setup("cpu", rehearses=True)


def test_each_experiment_is_a_stage():
    assert tuple(gpu.EXPERIMENTS) == tuple(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_rehearsal(name, tmp_path, capsys):
    path = tmp_path / "experiments.csv"
    assert gpu_experiments.main([name, "--csv", str(path), "--rehearse"]) == 0
    rows = gpu_tables.read(path)
    trials = list(EXPERIMENTS[name](ON_CPU))
    assert len(rows) == sum(len(trial.ways) + len(trial.floors) for trial in trials)
    for row in rows:
        assert row["experiment"] == name and row["shape"] in {trial.shape for trial in trials}
        graph = row["what"].endswith("graph")
        assert row["status"] == ("missing" if graph else "ok"), row["note"]
        assert bool(row["min_ms"]) != graph
    said = capsys.readouterr().out
    assert all(row["what"] in said for row in rows)
    assert ("faster than the next" in said) == any(len(trial.ways) > 1 for trial in trials)


def test_ways_that_the_issue_asks_for():
    def ways(name):
        return {way for trial in EXPERIMENTS[name](ON_CPU) for way in trial.ways}

    assert ways("persistent") >= {"triton_persistent", "triton", "cuda"}
    assert ways("clip") >= {"hopper", "hopper, logits kept", "cuda", "cuda, logits kept"}
    assert ways("topk") >= {"hopper", "cuda", "triton"} and ways("router") >= {"cuda", "triton"}
    assert ways("grouped") == {"torch grouped_mm", "grouped_matmul"}


def of(**ways):
    return Trial("N=1", 1e9, {name: (lambda way=way: way) for name, way in ways.items()})


def test_what_is_wrong_fails_or_is_missing_is_named_and_not_timed(tmp_path):
    def raises():
        raise ValueError("why\nnot")

    def cannot():
        raise NotImplementedError("no such device")

    trial = of(first=lambda: torch.ones(3), other=lambda: torch.full((3,), 1.5), raises=raises, cannot=cannot)
    rows = {row["what"]: row for row in gpu_experiments.measured(trial, "cpu", 1, float("inf"))}
    assert [row["status"] for row in rows.values()] == ["ok", "wrong", "failed", "missing"]
    assert rows["other"]["error"] == "5.0e-01" and rows["raises"]["note"] == "ValueError: why not"
    assert rows["cannot"]["note"] == "no such device"
    assert [bool(row.get("min_ms")) for row in rows.values()] == [True, False, False, False]


def test_nan_is_wrong():
    trial = of(first=lambda: torch.ones(3), nan=lambda: torch.full((3,), torch.nan))
    assert [row["status"] for row in gpu_experiments.measured(trial, "cpu", 1, float("inf"))] == ["ok", "wrong"]


def test_what_fails_fails_the_command_and_a_trial_too_late_is_not_begun(tmp_path, monkeypatch, capsys):
    def raises():
        raise RuntimeError("out of memory")

    monkeypatch.setitem(EXPERIMENTS, "grouped", lambda setup: iter([of(raises=raises), of(late=lambda: None)]))
    path = tmp_path / "experiments.csv"
    assert gpu_experiments.main(["grouped", "--csv", str(path), "--rehearse", "--seconds", "0"]) == 1
    assert [row["what"] for row in gpu_tables.read(path)] == ["raises"]
    said = capsys.readouterr().out
    assert "no time is left for the next trial" in said and "raises: RuntimeError: out of memory" in said


def test_share_of_what_nobody_can_avoid(monkeypatch):
    from benchmarks.measure import Timing

    times = {"one": Timing.of([2e-3]), "floor": Timing.of([1e-3])}
    monkeypatch.setattr(gpu_experiments.measure, "interleave", lambda *a, **k: times)
    trial = Trial("N=1", 4e9, {"one": lambda: lambda: torch.ones(1)}, {"floor": lambda: lambda: None})
    one, floor = gpu_experiments.measured(trial, "cpu", 1, 0.0)
    assert (one["min_ms"], one["tflops"], one["of_floor"]) == ("2", "2", "0.500")
    assert (floor["kind"], floor["of_floor"]) == ("floor", "1.000")
