"""What is said where no compiler builds the extension: which one, why, and what can help on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from contrastive_ops import _compilers

ROOT = Path(__file__).resolve().parent.parent
GCC12, CLANG14 = "g++ (Debian 12.2.0-14+deb12u1) 12.2.0", "Debian clang version 14.0.6"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts commands on an otherwise empty PATH: each says a version, or fails where it is None."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")

    def add(commands: dict[str, str | None]) -> None:
        for name, said in commands.items():
            path = tmp_path / name
            path.write_text("#!/bin/sh\n" + ("exit 1\n" if said is None else f"echo '{said}'\n"))
            path.chmod(0o755)

    return add


def rejected(by: str, error: str = "csrc/cpu/simd.h:9:1: error: no such thing") -> str:
    return f"the compilation failed: {by} rejected csrc/bindings.cpp: {error}"


@pytest.mark.parametrize(
    ("said", "old"),
    [
        (GCC12, False),
        (CLANG14, False),
        ("g++-11 (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0", False),
        ("g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-26)", True),
        ("x86_64-conda-linux-gnu-c++ (conda-forge gcc 9.5.0-19) 9.5.0", True),
        ("Apple clang version 15.0.0 (clang-1500.3.9.4)", False),
        ("clang version 11.0.1", True),
        ("odd c++ 1.0", True),
        ("icpx 2024", False),
    ],
)
def test_age(said: str, old: bool) -> None:
    assert _compilers.is_too_old(said) is old


def test_another_compiler_of_the_machine_is_named(machine) -> None:
    # Names of the one that failed, one that is too old, and one that does not run are no help.
    machine({"c++": GCC12.replace("g++", "c++"), "g++-12": GCC12.replace("g++", "g++-12")})
    machine({"g++-9": "g++-9 (X) 9.4.0", "clang++": None, "clang++-14": CLANG14})
    said, name = _compilers.remedies(rejected(GCC12))
    assert name == "clang++-14"
    assert said == [f"take another compiler, which is installed here: CXX=clang++-14 ({CLANG14})"]


@pytest.mark.parametrize("manager", [*_compilers.PACKAGES, None])
def test_else_the_package_of_this_system(machine, manager: str | None) -> None:
    machine({"g++": GCC12, **({manager: ""} if manager else {})})
    (said,), name = _compilers.remedies(rejected(GCC12))
    assert name is None and said.startswith("install another C++ compiler (GCC 11 or Clang 14 or newer): ")
    assert said.endswith(_compilers.PACKAGES[manager or "apt-get"][0])
    (said,), name = _compilers.remedies(rejected(GCC12, "Python.h: No such file or directory"))
    assert name is None and said.endswith(_compilers.PACKAGES[manager or "apt-get"][1])


def test_a_mac_without_its_tools(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine({"c++": None})
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _compilers.version(["c++"]) is None
    (said,), _ = _compilers.remedies("no C++ compiler was found (looked for c++, g++ and clang++)")
    assert said.endswith("xcode-select --install")


def test_a_compiler_that_does_not_exist(machine) -> None:
    machine({"g++-12": GCC12.replace("g++", "g++-12")})
    assert _compilers.version(["no-such-c++"]) is None
    said, name = _compilers.remedies("no C++ compiler was found (looked for no-such-c++)")
    assert name == "g++-12" and said[0].startswith("take another compiler, which is installed here: CXX=g++-12 (")


def test_a_compiler_that_is_too_old(machine) -> None:
    old = "g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-26)"
    machine({"g++": old, "dnf": ""})
    said, name = _compilers.remedies(rejected(old, "g++: error: unrecognized command line option '-std=c++20'"))
    assert said[0] == f"{old} is too old: GCC 11 or Clang 14 or newer is needed"
    assert name is None and "dnf install gcc-c++" in said[1]


def test_a_compiler_that_runs_out_of_memory(machine) -> None:
    machine({"g++": GCC12, "clang++": CLANG14})
    error = "g++: fatal error: Killed signal terminated program cc1plus"
    assert _compilers.remedies(rejected(GCC12, error))[0] == [
        "a compiler ran out of memory: compile one file at a time, with MAX_JOBS=1"
    ]


@pytest.mark.parametrize("reason", ["CONTRASTIVE_OPS_EXT=0 was set when the package was built", ""])
def test_what_no_compiler_helps(machine, reason: str) -> None:
    machine({"clang++": CLANG14})
    assert _compilers.remedies(reason) == ([], None)


@pytest.mark.skipif(not (ROOT / "setup_torch.py").exists(), reason="needs the source checkout")
def test_musl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import setup_torch

    assert "pip install" in setup_torch.advice()
    monkeypatch.setattr(setup_torch.compilers, "is_musl", lambda: True)
    assert "no wheels for musl" in setup_torch.advice() and "pip install" not in setup_torch.advice()
