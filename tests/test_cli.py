"""``python -m contrastive_ops``: it must answer, also where the installation is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import contrastive_ops
from contrastive_ops import __main__ as cli
from contrastive_ops.core import backends, cuda_kernels, extension


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(list(arguments))
    output = capsys.readouterr()
    return status, output.out + output.err


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, output = say(capsys, "info", "--json")
    facts = json.loads(output)
    assert status == 0
    assert facts["contrastive_ops"]["version"] == contrastive_ops.__version__
    assert facts["torch"]["version"] == str(torch.__version__)
    assert facts["extension"]["present"] is (extension.load() is not None)
    assert facts["backends"]["reference"] == "available"
    assert set(facts["backends"]) == set(backends.backends()["similarity_reduce"])
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert "unknown:" not in output


def test_info_text_has_one_fact_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, output = say(capsys, "info")
    assert status == 0
    for word in ("version", "torch", "extension", "backends", "triton", "cuda devices"):
        assert word in output
    assert "{" not in output


def test_info_survives_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(extension, "load", broken)
    monkeypatch.setattr(backends, "backends", broken)
    status, output = say(capsys, "info")
    assert status == 0
    assert "unknown: RuntimeError: no such thing" in output


@pytest.mark.skipif(extension.load() is None, reason="needs the C++ extension")
def test_info_says_why_a_level_is_not_taken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(cpu_capability=lambda: "avx2", cpu_capability_detected=lambda: "avx2")
    monkeypatch.setattr(extension, "load", lambda: module)
    for cap, noted in (("", False), ("avx2", False), ("avx512", True)):
        monkeypatch.setenv("CONTRASTIVE_OPS_CPU_CAPABILITY", cap)
        assert ("this processor has no higher one" in say(capsys, "info")[1]) is noted, cap
    # Where the build has no such level, every call says so, and `info` too.
    monkeypatch.undo()
    monkeypatch.setenv("CONTRASTIVE_OPS_CPU_CAPABILITY", "sse9")
    status, output = say(capsys, "info")
    assert status == 0 and "value must be a level of this build" in output and "got sse9" in output


TWO_RUNTIMES = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)  # before torch, so its names are found first
import torch
from contrastive_ops import clip
from contrastive_ops.__main__ import main
torch.set_num_threads(2)
x, y = torch.randn(2, 300, 40)
assert torch.allclose(clip(x, y, backend="cpu"), clip(x, y, backend="reference"))
main(["info"])
"""


@pytest.mark.skipif(extension.load() is None or sys.platform != "linux", reason="needs the C++ extension on Linux")
def test_two_openmp_runtimes_are_named(tmp_path: Path) -> None:
    with open("/proc/self/maps") as maps:
        own = {line.split()[-1] for line in maps if Path(line.split()[-1]).name.startswith("libgomp")}
    if len(own) != 1:
        pytest.skip("torch runs on another OpenMP")
    library, other = Path(own.pop()), tmp_path / "libgomp-other.so.1"
    name = library.name.encode()
    other.write_bytes(library.read_bytes().replace(name, name[:-1] + b"9"))  # else the loader takes both for one
    command = [sys.executable, "-c", TWO_RUNTIMES, str(other)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "several OpenMP runtimes are loaded" in done.stdout and str(other) in done.stdout


def test_info_explains_a_missing_extension(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "reason", lambda: "it was never built")
    status, output = say(capsys, "info", "--json")
    shown = json.loads(output)["extension"]
    assert status == 0
    assert shown["present"] is False
    assert shown["why"] == "it was never built"
    assert "CONTRASTIVE_OPS_EXT=1" in shown["fix"][-1]  # test_commands.py has the whole line


def test_info_and_check_say_what_cuda_kernels_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(cli.PACKAGE / "_C.so")
    built = SimpleNamespace(__file__=file, build_config=lambda: {"cuda": "13.0.88 for sm_80 compute_90"})
    plain = SimpleNamespace(__file__=file, build_config=lambda: {"cuda": "no"})
    monkeypatch.setattr(extension, "report", lambda: {"summary": "a CPU extension", "why_no_cuda": "no toolkit"})
    monkeypatch.setattr(cli, "check_cases", dict)
    monkeypatch.setattr(backends, "backends", lambda: {"similarity_reduce": {}})
    monkeypatch.setattr(cuda_kernels, "why_missing", cuda_kernels.why_missing.__wrapped__)
    monkeypatch.setattr(extension, "why_missing", lambda: None)
    for module, why, said in (
        (built, None, "13.0.88 for sm_80 compute_90"),
        (plain, "no toolkit", "built without CUDA kernels (no toolkit)"),
    ):
        monkeypatch.setattr(extension, "load", lambda module=module: module)
        assert cli._extension_info().get("why_no_cuda") == why
        assert f"CUDA kernels: {said}" in say(capsys, "check")[1].replace("the extension was ", "")


def test_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    status, output = say(capsys, "check")
    assert status == 0, output
    assert "FAIL" not in output
    available = [name for name, reason in backends.backends()["similarity_reduce"].items() if reason is None]
    for backend in available:
        assert f"ok    {backend}" in output


def wrong_gradient(x: torch.Tensor, y: torch.Tensor, backend: str) -> torch.Tensor:
    """The right value everywhere; float32, which is never the truth, gets a wrong gradient."""
    total = (x @ y.T).sum()
    return total if x.dtype == torch.float64 else total.detach() + 0.5 * (total - total.detach())


def not_a_number(x: torch.Tensor, y: torch.Tensor, backend: str) -> torch.Tensor:
    return (x @ y.T).sum() * (1.0 if x.dtype == torch.float64 else float("nan"))


def crash(x: torch.Tensor, y: torch.Tensor, backend: str) -> torch.Tensor:
    raise RuntimeError("kernel exploded")


@pytest.mark.parametrize("case", [wrong_gradient, not_a_number, crash])
def test_check_finds_what_is_wrong(
    case: cli.Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "check_cases", lambda: {"case": case})
    monkeypatch.setattr(backends, "backends", lambda: {"similarity_reduce": {"reference": None, "cuda": "no device"}})
    status, output = say(capsys, "check")
    assert status == 1
    assert "FAIL" in output
    assert "skip  cuda: no device" in output
    assert "kernel exploded" in output or case is not crash


def test_bench_needs_a_checkout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "PACKAGE", tmp_path / "site" / "contrastive_ops")
    monkeypatch.chdir(tmp_path)
    status, output = say(capsys, "bench")
    assert status == 2
    assert "make bench" in output


def test_bench_runs_the_suite_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = tmp_path / "benchmarks"
    suite.mkdir()
    (suite / "__init__.py").touch()
    (suite / "run.py").write_text("import sys; sys.exit(7 if sys.argv[1:] == ['--quick'] else 0)")
    monkeypatch.setattr(cli, "PACKAGE", tmp_path / "contrastive_ops")
    assert cli.main(["bench", "--quick"]) == 7


def test_unknown_command_is_refused() -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["inform"])
    assert stop.value.code == 2


def test_info_speaks_for_every_primitive(capsys: pytest.CaptureFixture[str]) -> None:
    """A backend without kernels of a primitive says so: its calls run on another one."""
    tables = backends.backends()
    assert set(tables) >= {"similarity_reduce", "similarity_topk", "maxsim", "expert_routing", "grouped_matmul"}
    said = json.loads(say(capsys, "info", "--json")[1])["backends"]
    for name, text in said.items():
        without = text.partition("(has no ")[2].partition(")")[0].split(", ")
        assert [p for p in tables if name not in tables[p]] == [p for p in tables if p in without]
