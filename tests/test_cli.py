"""``python -m contrastive_ops``: it must answer, also where the installation is broken."""

from __future__ import annotations

import json
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
        assert [p for p in tables if name not in tables[p]] == [p for p in tables if p in text.partition("has no")[2]]
