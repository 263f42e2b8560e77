"""Builds of fewer SIMD levels, and what `make demo` compiles: neither is asked for by name, so each is easily lost."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contrastive_ops.core import extension

ROOT = Path(__file__).resolve().parent.parent
AVX2 = "fpu sse4_2 avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout")


@pytest.fixture
def setup_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import setup_cpu

    return setup_cpu


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="levels of x86-64")
@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("fpu sse4_2", "default"),
        ("fpu sse4_2 avx2", "default"),  # without fma
        (AVX2, "avx2"),
        (f"{AVX2} avx512f", "avx2"),
        (AVX512, "avx512"),
        # Those of 16-bit numbers leave much to another, which would have to be built as well.
        (f"{AVX512} avx512_bf16", "avx512"),
        (f"{AVX512} avx512_bf16 amx_tile amx_bf16", "avx512"),
    ],
)
def test_level_of_a_processor(setup_cpu, monkeypatch, flags: str, level: str) -> None:
    monkeypatch.setattr(setup_cpu, "has_amx", lambda: True)
    every = setup_cpu.levels()
    assert setup_cpu.native_levels(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n") == {level: every[level]}
    assert setup_cpu.native_levels("") == every and list(every)[-1] == "amx"


def test_sources_know_every_level(setup_cpu) -> None:
    text = (ROOT / "csrc" / "cpu" / "capability.cpp").read_text()
    for levels in (setup_cpu.X86_LEVELS, setup_cpu.ARM_LEVELS):
        for name, _ in setup_cpu.has_macros(list(levels)["neon" in levels :]):  # every ARM has NEON
            assert text.count(f"#ifdef {name}\n") >= 2, name


ONE_LEVEL = """
#include <cstdlib>
#include <iostream>
#include "cpu/capability.h"
#include "primitives.h"
namespace contrastive_ops::level_{level} {{
#define EMPTY(Functions, stem) Functions stem() {{ std::abort(); }}
CONTRASTIVE_OPS_PRIMITIVES(EMPTY)
}}
int main() {{
  using namespace contrastive_ops;
  std::cout << capability_names() << "\\n" << why_not_this_processor();
}}
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="levels of x86-64")
@pytest.mark.parametrize("level", ["default", "avx2", "amx"])
def test_a_build_of_one_level_says_what_the_processor_lacks(setup_cpu, tmp_path: Path, level: str) -> None:
    (tmp_path / "main.cpp").write_text(ONE_LEVEL.format(level=level))
    command = [
        *(setup_cpu.find_compiler() or []),
        "-std=c++20",
        f"-I{ROOT / 'csrc'}",
        *map(str, tmp_path.glob("*.cpp")),
    ]
    macros = [f"-D{name}={value}" for name, value in (*setup_cpu.amx_macro(), *setup_cpu.has_macros([level]))]
    sources = [str(ROOT / "csrc" / "cpu" / "capability.cpp")]
    subprocess.run([*command, *sources, *macros, "-o", str(tmp_path / "main")], check=True)
    names, *why = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert names == level
    detected = extension.functions("cpu").capability_detected() if extension.load() else "default"
    every = list(setup_cpu.X86_LEVELS)
    if every.index(detected) >= every.index(level):
        assert why == []
    else:
        assert f"must have {level}, the lowest SIMD level that was built, got {detected}" in why[0]
        assert "make install" in why[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A Makefile with what it looks at, and an environment that is there."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements/dev.txt", "setup.py", "pyproject.toml", "csrc/a.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", ".dev"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def planned(clone: Path, target: str, *folders: Path) -> str:
    """What `make` would run that installs the package; empty where it would not."""
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    done = subprocess.run(
        ["make", "-n", target], cwd=clone, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return "".join(line for line in done.stdout.splitlines() if " -m pip install " in line and " -e ." in line)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
def test_the_demo_compiles_for_this_machine_and_the_next_install_the_rest(clone: Path) -> None:
    first = planned(clone, "demo")
    assert "CONTRASTIVE_OPS_NATIVE=1" in first and "-e ." in first
    (clone / ".venv" / ".demo").touch()
    assert planned(clone, "demo") == ""
    for target in ("install", "test", "bench"):
        assert "CONTRASTIVE_OPS" not in planned(clone, target) and "-e ." in planned(clone, target)
    (clone / ".venv" / ".install").touch()
    (clone / ".venv" / ".demo").touch()
    assert not any(planned(clone, target) for target in ("demo", "test"))
    os.utime(clone / "csrc" / "a.cpp", (2e9, 2e9))
    assert all(planned(clone, target) for target in ("demo", "test"))


@needs_make
@pytest.mark.skipif(any(Path("/dev").glob("nvidia*")) or bool(shutil.which("nvidia-smi")), reason="sees a GPU")
def test_the_demo_compiles_for_gpus_where_one_is_seen(clone: Path, tmp_path: Path) -> None:
    assert "CONTRASTIVE_OPS_CUDA=${CONTRASTIVE_OPS_CUDA:-0}" in planned(clone, "demo")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "nvidia-smi").touch(0o755)
    assert "CONTRASTIVE_OPS_CUDA=${CONTRASTIVE_OPS_CUDA:-auto}" in planned(clone, "demo", tmp_path / "tools")
    assert "CONTRASTIVE_OPS_CUDA" not in planned(clone, "install", tmp_path / "tools")
