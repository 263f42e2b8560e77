"""The wheel of `make wheel`: one for every torch, every Python and every Linux that torch has wheels for."""

from __future__ import annotations

import importlib.machinery
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from install_cases import NO_COMPILER, ROOT, caching_compiler, clean_interpreter, copy_sources, environment, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout, not an installed package"),
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++"),
]

EAGER = f"contrastive_ops/_eager{importlib.machinery.EXTENSION_SUFFIXES[0]}"
# What there is in manylinux_2_28: glibc 2.28 and the libstdc++ of GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    compiler = str(caching_compiler(folder / "compiler"))
    switches = {"CONTRASTIVE_OPS_WHEEL": "1", "CONTRASTIVE_OPS_EXT": "1", "CONTRASTIVE_OPS_CUDA": "0"}
    done = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, "."),
        cwd=copy_sources(folder / "clone"),
        env=environment(CXX=compiler, CC=compiler, **switches),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with nothing but torch and the wheel, from a folder as from an index."""
    folder = tmp_path_factory.mktemp("installed")
    python = clean_interpreter(folder / "venv", "torch", "numpy")
    env = environment(PATH=str(python.parent), PIP_FIND_LINKS=str(wheel.parent), **NO_COMPILER)
    done = run(python, "-m", "pip", "install", "contrastive-ops", cwd=folder, env=env)
    assert done.returncode == 0 and "Successfully installed contrastive-ops" in done.stdout, done.stdout + done.stderr
    return python


def info(python: Path, folder: Path, before: str = "") -> dict:
    """What the command says of the extension, after a line of Python."""
    code = f"import torch; {before}\nfrom contrastive_ops.__main__ import main; main(['info', '--json'])"
    done = run(python, "-c", code, cwd=folder, env=environment(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["extension"]


def test_it_is_for_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"contrastive_ops-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".so")}
    assert modules == {"contrastive_ops/_C.abi3.so", EAGER}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_it_asks_for_no_newer_library_than_torch_does(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for module in (tmp_path / "contrastive_ops").glob("*.so"):
        said = run("objdump", "-T", module, cwd=tmp_path, env=environment()).stdout
        for symbol in (line for line in said.splitlines() if "*UND*" in line):
            for name, version in re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)", symbol):
                assert tuple(map(int, version.split("."))) <= NEWEST[name], (module.name, symbol)


def test_it_needs_no_compiler_and_runs(python: Path, tmp_path: Path) -> None:
    found = info(python, tmp_path)
    assert found["present"] and found["losses_in_C++"] == "yes" and found["file"].endswith("_C.abi3.so")
    command = python.parent / "contrastive-ops"
    done = run(command, "check", cwd=tmp_path, env=environment(OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and len(re.findall(r"^ok +cpu ", done.stdout, re.MULTILINE)) == 18, done.stdout


def test_another_torch_takes_the_kernels_and_says_what_it_leaves(python: Path, tmp_path: Path) -> None:
    found = info(python, tmp_path, before="torch.__version__ = '2.6.7'")
    assert found["present"] and found["file"].endswith("_C.abi3.so")
    assert re.search(r"_eager\S+ was built for torch \S+, and this is 2\.6\.7$", found["losses_in_C++"])


def test_another_python_takes_the_kernels_and_says_what_it_leaves(python: Path, tmp_path: Path) -> None:
    (site,) = (python.parent.parent / "lib").glob("python*/site-packages/contrastive_ops")
    shutil.copytree(site, tmp_path / "contrastive_ops")
    (tmp_path / EAGER).rename(tmp_path / "contrastive_ops" / "_eager.cpython-399.so")
    found = info(python, tmp_path, before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    assert found["present"] and found["file"] == str(tmp_path / "contrastive_ops" / "_C.abi3.so")
    assert found["losses_in_C++"].endswith("was not built, only _eager.cpython-399.so")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads TOML")
def test_cibuildwheel_builds_the_same() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert settings["environment"]["CONTRASTIVE_OPS_WHEEL"] == "1"
    rule = re.search(r"^wheel:.*?\n\n", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)[0]
    assert all(f"{name}={value}" in rule for name, value in settings["environment"].items())
    excluded = re.findall(r"--exclude [\"']?([\w.*]+)", settings["linux"]["repair-wheel-command"])
    assert excluded == re.findall(r"--exclude [\"']?([\w.*]+)", rule) == ["libc10.so", "libtorch*.so"]
