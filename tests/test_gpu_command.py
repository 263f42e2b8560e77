"""``make gpu`` itself: limits, verdicts, what is left out and said; the stages are fakes, and no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

# The suite is part of the checkout only. At the end: an installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu, gpu_stages, gpu_tables
from benchmarks.gpu_stages import Result, Stage, run_stages, verdict_of_pytest, verdict_of_sanitizer


def python(name: str, code: str, **changes) -> Stage:
    return Stage(name, [sys.executable, "-c", code], **{"limit": 60, **changes})


def run(folder: Path, *stages: Stage, rest=(), seconds: float = 60) -> list[Result]:
    return run_stages(stages, lambda: rest, folder=folder, cwd=folder, env=dict(os.environ), seconds=seconds)


# ---- Stages


def test_each_stage_has_a_log_and_a_status(tmp_path: Path) -> None:
    good = python("a good one", "import os; print(os.environ['WORD'], os.getcwd())", env={"WORD": "hello"})
    bad = python("bad", "print('what went wrong'); raise SystemExit(3)")
    absent = Stage("absent", [str(tmp_path / "no-such-program")], limit=60)
    left_out = python("left out", "raise SystemExit(1)", skip="no reason")
    results = run(tmp_path, good, bad, rest=[absent, left_out])
    assert [(r.name, r.status, r.is_bad) for r in results] == [
        ("a good one", "passed", False),
        ("bad", "failed", True),
        ("absent", "failed", True),
        ("left out", "skipped", False),
    ]
    assert results[1].note == "what went wrong" and results[3].note == "no reason"
    assert (tmp_path / "a-good-one.log").read_text().splitlines()[1] == f"hello {tmp_path}"
    assert "no-such-program" in results[2].note and not (tmp_path / "left-out.log").exists()


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(") ")[2][0] not in "ZX"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_stage_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    slow = Stage("slow", ["/bin/sh", "-c", "sleep 600 & echo $!; sleep 600"], limit=4)
    (result,) = run(tmp_path, slow)
    assert (result.status, result.is_bad, result.note) == ("timed out", True, "ended after 4 s")
    child = int((tmp_path / "slow.log").read_text().splitlines()[1])
    for _ in range(100):  # a signal takes a moment
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)
    (result,) = run(tmp_path, replace(slow, may_be_cut=True))
    assert (result.status, result.is_bad) == ("cut", False)


def test_all_stages_share_one_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 0.0, 90.0, 100.0, 100.0, 198.0])
    monkeypatch.setattr(gpu_stages.time, "monotonic", lambda: next(clock))
    limits = []
    monkeypatch.setattr(gpu_stages, "_run", lambda stage, log, limit, **_: limits.append(limit) or 0)
    results = run(tmp_path, python("one", "", limit=150), python("two", "", limit=150), seconds=200)
    assert limits == [150, 100]  # the second gets what is left
    assert [r.status for r in results] == ["passed", "passed"]


def test_what_gets_no_time_is_named(tmp_path: Path) -> None:
    results = run(tmp_path, python("tests", ""), python("benchmarks", "", may_be_cut=True), seconds=1)
    assert [(r.status, r.is_bad) for r in results] == [("timed out", True), ("cut", False)]
    assert {r.note for r in results} == {"no time was left for it"} and not list(tmp_path.glob("*.log"))


def test_nothing_follows_an_essential_stage_that_fails(tmp_path: Path) -> None:
    results = run(tmp_path, python("build", "raise SystemExit(1)", essential=True), rest=[python("tests", "")])
    assert [r.name for r in results] == ["build"]


# ---- Verdicts


@pytest.mark.parametrize(
    ("status", "log", "verdict"),
    [
        (0, "...\n12 passed in 3.21s", ("passed", "12 passed in 3.21s")),
        (0, "=== 12 passed, 1 skipped in 63.00s (0:01:03) ===", ("passed", "12 passed, 1 skipped in 63.00s (0:01:03)")),
        (0, "===== 3 skipped in 0.1s =====", ("skipped", "3 skipped in 0.1s")),
        (1, "=== 1 failed, 11 passed in 3.2s ===", ("failed", "1 failed, 11 passed in 3.2s")),
        (5, "no tests ran in 0.01s", ("failed", "no tests ran in 0.01s")),
        (2, "usage: pytest\nbroken", ("failed", "broken")),
        (0, "nothing that pytest says", ("skipped", "nothing that pytest says")),
    ],
)
def test_verdict_of_pytest(status: int, log: str, verdict: tuple[str, str]) -> None:
    assert verdict_of_pytest(status, log) == verdict


@pytest.mark.parametrize(
    ("status", "log", "verdict"),
    [
        (0, "x\n========= ERROR SUMMARY: 0 errors", ("passed", "ERROR SUMMARY: 0 errors")),
        (99, "========= ERROR SUMMARY: 7 errors", ("failed", "ERROR SUMMARY: 7 errors")),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed", ("passed", "RACECHECK SUMMARY: 0 hazards displayed")),
        (1, "Traceback\nRuntimeError: a bug", ("failed", "RuntimeError: a bug")),
        (0, "silence", ("failed", "silence")),
        (
            1,
            "========= Error: Device not supported\nRuntimeError: 999\n========= ERROR SUMMARY: 1 error",
            ("skipped", "compute-sanitizer cannot run here: Device not supported"),
        ),
    ],
)
def test_verdict_of_sanitizer(status: int, log: str, verdict: tuple[str, str]) -> None:
    assert verdict_of_sanitizer(status, log) == verdict


# ---- The plan


def test_a_backend_that_cannot_run_is_left_out_with_its_reason(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    why = {"triton": "Triton 3.6 (supported: 3.8 and newer)", "cuda": None, "hopper": "compute capability 8.0"}
    instructions, hopper, first, graphs, triton, cuda = gpu.test_stages(why)
    assert {instructions.skip, hopper.skip} == {why["hopper"]}
    assert any(word.endswith("test_hopper_primitives.py") for word in instructions.command)
    assert any(word.endswith("test_hopper_topk.py") for word in hopper.command)
    assert (first.skip, graphs.skip) == (why["triton"], None)
    assert {word for word in first.command if word.endswith(".py")}.isdisjoint(triton.command)
    assert (triton.skip, cuda.skip) == (why["triton"], None)
    assert any(word.endswith("test_extension_cuda.py") for word in cuda.command)
    assert not any("compile" in word for word in triton.command)
    assert {stage.skip for stage in gpu.sanitizer_stages(why)} == {None}
    assert gpu.benchmark_stage(tmp_path, why).skip is None
    nobody = {"triton": "old", "cuda": "not built", "hopper": "not built"}
    assert {stage.skip for stage in gpu.sanitizer_stages(nobody)} == {"not built"}
    assert gpu.test_stages(nobody)[3].skip == "no backend can run"
    assert gpu.benchmark_stage(tmp_path, nobody).skip == "no backend can run"


def test_missing_tools_are_named(monkeypatch) -> None:
    found = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name in ("pytest", "xdist") else found(name)
    )
    works = dict.fromkeys(gpu.BACKENDS)
    assert {stage.skip for stage in gpu.test_stages(works)} == {"pytest is not installed"}
    assert all("-n" not in stage.command for stage in gpu.test_stages(works))
    assert {stage.skip for stage in gpu.sanitizer_stages(works)} == {"compute-sanitizer was not found"}


@pytest.mark.parametrize(("capability", "code"), [((9, 0), "9.0a"), ((8, 6), "8.6"), ((12, 0), "12.0")])
def test_only_code_for_this_gpu_is_built(capability, code, monkeypatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    stage = gpu.build_stage(capability)
    assert stage.env["TORCH_CUDA_ARCH_LIST"] == code and stage.essential
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert gpu.build_stage(capability).env["TORCH_CUDA_ARCH_LIST"] == "8.0"


def test_the_built_package_comes_before_the_checkout(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    env = gpu.environment()
    assert env["PYTHONPATH"].split(os.pathsep) == [str(gpu.WORK / "site"), str(gpu.ROOT), "/mine"]
    assert "TRITON_INTERPRET" not in env


def test_limits_fit_into_eight_minutes(tmp_path: Path) -> None:
    works = dict.fromkeys(gpu.BACKENDS)
    stages = [gpu.build_stage((9, 0)), *gpu.test_stages(works), *gpu.sanitizer_stages(works)]
    experiments = gpu.experiment_stages(tmp_path, works)
    assert gpu.MINUTES <= 8 and all(0 < stage.limit <= 150 for stage in stages)
    # At their limits; experiments may be cut, and what all leave is for the benchmarks.
    assert sum(stage.limit for stage in stages) <= 60 * gpu.MINUTES
    assert all(stage.may_be_cut and stage.limit <= 25 for stage in experiments)
    assert sum(stage.limit for stage in experiments) <= 180


def test_experiments_come_behind_the_tests_of_what_they_time(tmp_path: Path) -> None:
    plan = gpu.plan(tmp_path, dict.fromkeys(gpu.BACKENDS))
    names = [stage.name for stage in plan]
    experiments = [f"experiment {name}" for name in gpu.EXPERIMENTS]
    assert names[:2] == ["tests hopper parts", "tests hopper"] and names[2 : 2 + len(experiments)] == experiments
    assert names[-1] == "benchmarks" and len(set(names)) == len(names)
    assert all(stage.command[-1] == stage.name.split()[1] for stage in plan[2 : 2 + len(experiments)])
    nobody = gpu.experiment_stages(tmp_path, {"triton": "old", "cuda": "not built"})
    assert {stage.skip for stage in nobody} == {"no backend can run"}


# ---- The command


def answers(*found: dict):
    """Replaces the questions to Pythons of their own."""
    left = iter(found)
    return lambda script, env, seconds=120: next(left)


@pytest.fixture
def folders(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    return tmp_path / "output"


@pytest.mark.parametrize(
    "facts", [{"torch": "2.14.1", "gpu": None}, {"error": "ModuleNotFoundError: No module named 'torch'"}]
)
def test_without_a_gpu_it_says_so_and_stops(facts, folders, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "ask", answers(facts))
    assert gpu.main(["--output", str(folders)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("make gpu needs an NVIDIA GPU and a CUDA build of torch: ")
    assert (facts.get("error") or "torch 2.14.1 sees none") in said
    assert not folders.exists()


DEVICE = {"python": "3.12", "torch": "2.11.0", "cuda": "13.0", "gpu": "a GPU", "capability": [9, 0], "memory_gib": 80.0}


EXPERIMENT = [
    {"experiment": "grouped", "shape": "E=32", "what": what, "kind": kind, "status": status, "min_ms": ms}
    for what, kind, status, ms in (
        ("torch grouped_mm", "way", "ok", "2.0"),
        ("grouped_matmul", "way", "ok", "1.6"),
        ("another", "way", "wrong", ""),
        ("one dense matmul", "floor", "ok", "1.0"),
    )
]


def fake_stages(monkeypatch, folders: Path, tests: str, why=None) -> None:
    """A build that works, tests that say something, and benchmarks that write one row."""
    monkeypatch.setattr(gpu, "ask", answers(DEVICE, {"why": why or {"triton": "old", "cuda": None}, "built": "13.0"}))
    monkeypatch.setattr(gpu, "build_stage", lambda capability: python("build", "print('built')", essential=True))
    status = int("failed" in tests)
    code = f"print({tests!r}); raise SystemExit({status})"
    monkeypatch.setattr(gpu, "test_stages", lambda why: [python("tests cuda", code, verdict=verdict_of_pytest)])
    monkeypatch.setattr(gpu, "sanitizer_stages", lambda why: [python("sanitizer memcheck", "", skip="not here")])
    row = "case,provider,status,min_ms,of_matmul_rate\\nclip,contrastive_ops cuda,ok,3.5,0.62\\nclip,peer,wrong,,\\n"
    write = f"open({str(folders / 'benchmarks.csv')!r}, 'w').write('{row}')"
    monkeypatch.setattr(gpu, "benchmark_stage", lambda output, why: python("benchmarks", write))
    rows = [dict.fromkeys(gpu_tables.COLUMNS, "") | row for row in EXPERIMENT]
    found = (
        f"from benchmarks import gpu_tables; gpu_tables.append(Path({str(folders / 'experiments.csv')!r}), {rows!r})"
    )
    timed = python("experiment grouped", f"from pathlib import Path; {found}", cwd=gpu.ROOT)
    monkeypatch.setattr(gpu, "experiment_stages", lambda output, why: [timed])


def test_the_whole_command(folders, monkeypatch, capsys) -> None:
    fake_stages(monkeypatch, folders, "3 passed in 0.1s")
    assert gpu.main(["--output", str(folders)]) == 0
    said = capsys.readouterr().out
    summary = (folders / "summary.txt").read_text()
    assert said.endswith(f"\n{summary}")
    for line in ("gpu: a GPU", "torch: 2.11.0", "3 passed in 0.1s", "not here"):
        assert line in summary
    lines = [line.split() for line in summary.splitlines()]
    first = lines.index(["case", "provider", "ms", "of", "matmul"])
    assert lines[first + 1 : first + 3] == [
        ["clip", "contrastive_ops", "cuda", "3.5", "62%"],
        ["clip", "peer", "wrong"],
    ]
    assert lines[1:4] == [
        ["grouped", "E=32", "torch", "grouped_mm", "2.0"],
        ["grouped", "E=32", "grouped_matmul", "1.6"],
        ["grouped", "E=32", "another", "wrong"],
    ]
    assert ["grouped", "E=32", "grouped_matmul", "1.25x", "of", "torch", "grouped_mm"] in lines
    facts = json.loads((folders / "provenance.json").read_text())
    assert facts["capability"] == [9, 0] and facts["backends"]["why"]["triton"] == "old"
    assert {path.name for path in folders.iterdir()} == {
        *("build.log", "tests-cuda.log", "experiment-grouped.log", "experiments.csv"),
        *("benchmarks.log", "benchmarks.csv", "provenance.json", "summary.txt"),
    }


def test_failed_tests_fail_the_command(folders, monkeypatch) -> None:
    fake_stages(monkeypatch, folders, "1 failed, 2 passed in 0.1s")
    assert gpu.main(["--output", str(folders)]) == 1
    assert "failed" in (folders / "summary.txt").read_text()


def test_only_chosen_stages_run_after_the_build(folders, monkeypatch) -> None:
    fake_stages(monkeypatch, folders, "1 failed in 0.1s")
    assert gpu.main(["--output", str(folders), "--only", "benchmarks"]) == 0
    names = [line.split()[0] for line in (folders / "summary.txt").read_text().splitlines()[-2:]]
    assert names == ["build", "benchmarks"]


def test_each_result_is_there_before_the_next_stage(folders, monkeypatch) -> None:
    fake_stages(monkeypatch, folders, "3 passed in 0.1s")
    look = f"print('passed' in open({str(folders / 'summary.txt')!r}).read()); print('1 passed in 0.1s')"
    monkeypatch.setattr(gpu, "test_stages", lambda why: [python("tests cuda", look, verdict=verdict_of_pytest)])
    assert gpu.main(["--output", str(folders), "--only", "tests"]) == 0
    assert (folders / "tests-cuda.log").read_text().splitlines()[1] == "True"
    assert json.loads((folders / "provenance.json").read_text())["gpu"] == "a GPU"


def test_a_rehearsal_runs_the_stages_without_a_gpu(folders, monkeypatch) -> None:
    """The same plan, on what stands in for the device; no stage is left out."""
    works = dict.fromkeys(gpu.BACKENDS)
    plan = [gpu.build_stage((9, 0)), *gpu.plan(folders, works)]
    for stage in plan:
        found = gpu.rehearsed(stage)
        assert (found.name, found.limit, found.skip, found.may_be_cut) == (stage.name, stage.limit, None, True)
        assert "setup.py" not in str(found.command) and "compute-sanitizer" not in str(found.command)
        assert not any(word == "cuda" for word in found.command)
        assert ("--quick" in found.command) == (stage.name == "benchmarks")
        assert ("--rehearse" in found.command) == stage.name.startswith("experiment")
    monkeypatch.setattr(gpu, "ask", answers({"torch": "2.11.0", "gpu": None}))
    monkeypatch.setattr(
        gpu, "rehearsed", lambda stage: python(stage.name, "import os; print(os.environ['TRITON_INTERPRET'])")
    )
    assert gpu.main(["--output", str(folders), "--rehearse"]) == 0
    lines = (folders / "summary.txt").read_text().splitlines()
    assert "gpu: none: this is a rehearsal" in lines
    assert [line.split("  ")[0] for line in lines[-len(plan) :]] == [stage.name for stage in plan]
    assert (folders / "benchmarks.log").read_text().splitlines()[1] == "1"


def test_questions_are_asked_of_another_process(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    env = dict(os.environ)
    assert gpu.ask("print('noise'); print('{\"a\": 1}')", env) == {"a": 1}
    assert gpu.ask("raise ValueError('no')", env) == {"error": "ValueError: no"}
    assert gpu.ask("import os; os._exit(7)", env) == {"error": "exit status 7"}
    assert "no answer within" in gpu.ask("import time; time.sleep(60)", env, seconds=0.2)["error"]


def test_the_calls_for_the_sanitizer_are_valid(capsys) -> None:
    from benchmarks import gpu_calls

    assert gpu_calls.main("reference", "cpu") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in said] == [name for name in gpu_calls.CALLS for _ in range(2)]
    assert gpu_calls.main("no such backend", "cpu") == 1


def test_the_runner_needs_no_torch() -> None:
    code = "import sys; from benchmarks import gpu; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, check=False).returncode == 0
