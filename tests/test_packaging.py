"""What gets installed, in every way a user can install it; without compiling C++ or a network."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
from install_cases import NO_COMPILER, ROOT, copy_sources, environment, run

from contrastive_ops import _checkout

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source checkout, not an installed package"
)


def literal_version() -> str:
    tree = ast.parse((ROOT / "contrastive_ops" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return ast.literal_eval(node.value)
    raise LookupError("contrastive_ops/__init__.py must assign a literal to __version__")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that no build product lands in the checkout."""
    return copy_sources(tmp_path_factory.mktemp("source"))


# --- a machine without a compiler ------------------------------------------------------------


@pytest.fixture(scope="module")
def pure(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment, with the package installed without a compiler."""
    folder = tmp_path_factory.mktemp("pure")
    python = folder / "venv" / "bin" / "python"
    env = environment(PATH=str(folder), **NO_COMPILER)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder, env=env)
    # torch and setuptools are borrowed. A plain path in a .pth file does not run the .pth files
    # found there, so the editable installation of this package stays out.
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    done = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-v"),
        *("--no-deps", "--no-build-isolation", "--ignore-installed", source),
        cwd=folder,
        env=env,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "installed WITHOUT its compiled CPU extension" in output
    assert not list(site.glob("contrastive_ops/_C*.so"))
    assert (site / "contrastive_ops" / "kernels" / "__init__.py").exists()
    return python


def test_runs_without_compiler(pure: Path, tmp_path: Path) -> None:
    script = """
        import sys
        import torch
        import contrastive_ops
        print("imported", file=sys.stderr)
        q = torch.randn(5, 8, requires_grad=True)
        k = torch.randn(7, 8)
        for backend in ("auto", "reference"):
            lse = contrastive_ops.similarity_reduce(q, k, scale=2.0, backend=backend)
            expected = (2.0 * q @ k.T).logsumexp(1)
            torch.testing.assert_close(lse, expected)
            contrastive_ops.info_nce(q, k[:5], temperature=0.1, backend=backend).backward()
        print(contrastive_ops.__file__)
    """
    done = run(pure, "-c", textwrap.dedent(script), cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(pure.parent.parent), done.stdout
    said = done.stderr.splitlines()
    assert said[0] == "imported"  # the import itself is silent
    assert len(said) > 1 and all("slow reference backend" in line for line in said[1:]), said


def test_info_says_why_and_how_to_fix(pure: Path, tmp_path: Path, source: Path) -> None:
    command = (pure, "-m", "contrastive_ops", "info", "--json")
    done = run(*command, cwd=tmp_path, env=environment(**NO_COMPILER))
    assert done.returncode == 0, done.stderr
    extension = json.loads(done.stdout)["extension"]
    assert extension["present"] is False
    assert "no C++ compiler was found (looked for /nonexistent/c++)" in extension["why"]
    install = extension["fix"][-1]
    # Of a machine that has a compiler after all, which only the build did not see.
    install = re.sub(r"^CXX=\S+ ", "", install)
    assert install.startswith(f"CONTRASTIVE_OPS_EXT=1 {pure} -m pip install --no-build-isolation")
    assert install.endswith(f" {source}")


# --- what a wheel and a source archive contain -----------------------------------------------


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("-w", folder, source),
        cwd=folder,
        env=environment(CONTRASTIVE_OPS_EXT="0"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_pure_wheel_contents(wheel: Path) -> None:
    assert wheel.name == f"contrastive_ops-{literal_version()}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"contrastive_ops/kernels/__init__.py", "contrastive_ops/py.typed"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"contrastive_ops"}
    assert not [name for name in names if name.endswith((".so", ".h", ".cpp", ".pyc"))]
    modules = {
        f"contrastive_ops/{p.relative_to(ROOT / 'contrastive_ops').as_posix()}"
        for p in (ROOT / "contrastive_ops").rglob("*.py")
    }
    assert modules <= set(names)


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    assert f"\nVersion: {literal_version()}\n" in metadata
    hard = [line for line in re.findall("Requires-Dist: (.*)", metadata) if "extra ==" not in line]
    assert hard == ["torch>=2.6"]
    extras = set(re.findall("Provides-Extra: (.*)", metadata))
    assert extras == {"triton", "dev", "bench", "docs"}


def test_source_archive_contains_every_build_input(source: Path, tmp_path: Path) -> None:
    script = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    done = run(sys.executable, "-c", script, cwd=source, env=environment())
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels", "contrastive_ops"):
        files = [path for path in (source / folder).rglob("*") if path.is_file()]
        missing = {path.relative_to(source).as_posix() for path in files} - names
        assert not [name for name in missing if not name.endswith((".pyc", ".json"))], missing
    assert {*(path.name for path in source.glob("setup*.py")), "pyproject.toml", "LICENSE"} <= names


# --- the switches of the build ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["CONTRASTIVE_OPS_CUDA", "CONTRASTIVE_OPS_EXT"])
def test_invalid_switch_fails(source: Path, name: str) -> None:
    done = run(sys.executable, "setup.py", "--version", cwd=source, env=environment(**{name: "yes"}))
    assert done.returncode != 0
    assert f"contrastive_ops: {name} must be auto, 0 or 1, got 'yes'\n  unset it" in done.stderr


def test_cuda_without_toolkit_fails_loudly(source: Path) -> None:
    env = environment(CONTRASTIVE_OPS_CUDA="1", CUDA_HOME="/nonexistent")
    done = run(sys.executable, "setup.py", "build_py", cwd=source, env=env)
    assert done.returncode != 0
    assert "CONTRASTIVE_OPS_CUDA=1 must be able to build CUDA kernels, but " in done.stderr
    assert "or set CONTRASTIVE_OPS_CUDA=0" in done.stderr


def test_required_extension_without_compiler_fails(source: Path, tmp_path: Path) -> None:
    env = environment(CONTRASTIVE_OPS_EXT="1", PATH=str(tmp_path), **NO_COMPILER)
    done = run(sys.executable, "setup.py", "build_py", cwd=source, env=env)
    assert done.returncode != 0
    assert "CONTRASTIVE_OPS_EXT=1 must be able to build the extension" in done.stderr


def test_a_compiler_that_fails_is_named_with_its_first_error(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    error = "csrc/x.h:7:1: error: no such thing"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'odd c++ 1.0' && exit\necho '{error}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    env = environment(CXX=str(compiler), CC=str(compiler), CONTRASTIVE_OPS_CUDA="0", MAX_JOBS="1")
    command = (sys.executable, "setup.py", "build", "--build-base", tmp_path / "build")
    reason = f"the compilation failed: odd c++ 1.0 rejected csrc/bindings.cpp: {error}"
    done = run(*command, cwd=source, env=env)
    assert done.returncode == 0 and f"why: {reason}\n  fix: " in done.stderr, done.stderr
    (report,) = (tmp_path / "build").glob("lib*/contrastive_ops/_build_report.json")
    assert json.loads(report.read_text())["why_no_extension"] == reason


# --- a clone that is not built ---------------------------------------------------------------


@pytest.fixture
def clone(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The sources in the place of the package in use, and one installed copy whose extension is no library."""
    (tmp_path / "contrastive_ops").mkdir()
    (tmp_path / "contrastive_ops" / _checkout.EXTENSION).write_text("not a library")
    monkeypatch.setattr(_checkout, "PACKAGE", source / "contrastive_ops")
    monkeypatch.setattr(_checkout, "installations", lambda: iter([(tmp_path / "contrastive_ops", {})]))
    return source


def say(folder: Path, **report: str) -> None:
    (folder / "contrastive_ops" / "_build_report.json").write_text(json.dumps(report))


def test_unbuilt_clone_looks_at_what_is_installed(clone: Path, tmp_path: Path) -> None:
    file = tmp_path / "contrastive_ops" / _checkout.EXTENSION
    other = f"{file} was built from other C++ sources than those in {clone}"
    assert _checkout.borrow_extension() == (None, other)  # a build that recorded nothing
    say(tmp_path, sources="0123456789abcdef")
    assert _checkout.borrow_extension() == (None, other)
    say(tmp_path, sources=_checkout.sources_digest(clone))
    assert _checkout.borrow_extension()[1].startswith(f"{file} does not load: ")
    file.unlink()
    say(tmp_path, why_no_extension="no C++ compiler was found")
    assert _checkout.borrow_extension() == (None, "no C++ compiler was found")


def test_unbuilt_clone_without_an_installation(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checkout, "installations", lambda: iter(()))
    said = f"{clone} holds source code, and nothing was built or installed from it"
    assert _checkout.borrow_extension() == (None, said)
    other = clone / "contrastive_ops" / "_C.cpython-39-x86_64-linux-gnu.so"
    other.touch()
    assert "was built for another Python: " in _checkout.borrow_extension()[1]
    other.unlink()


def test_digest_sees_every_native_source(source: Path) -> None:
    before = _checkout.sources_digest(source)
    for path in ("csrc/bindings.cpp", "csrc/cpu/simd.h", sorted((source / "csrc/cuda").glob("*.cu"))[0]):
        text = (source / path).read_text()
        (source / path).write_text(text + "\n")
        assert _checkout.sources_digest(source) != before
        (source / path).write_text(text)
    assert _checkout.sources_digest(source) == before == _checkout.sources_digest(ROOT)


def test_kernels_are_a_subpackage_of_a_clone(source: Path) -> None:
    script = """
        import importlib, contrastive_ops, contrastive_ops.kernels as kernels
        print(contrastive_ops.kernels is kernels, kernels.__file__)
        print(importlib.util.find_spec("contrastive_ops.kernels").origin)
    """
    done = run(sys.executable, "-c", textwrap.dedent(script), cwd=source, env=environment())
    file = source / "kernels" / "__init__.py"
    assert done.stdout.split() == ["True", str(file), str(file)], done.stderr


# --- the package under test ------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Facts about a fresh process that imports the installed package and calls an op."""
    folder = tmp_path_factory.mktemp("imported")
    script = """
        import importlib.util, json, pathlib, sys
        import torch
        before = set(sys.modules)
        import contrastive_ops
        new = set(sys.modules) - before
        q, k = torch.randn(200, 32, requires_grad=True), torch.randn(300, 32)
        contrastive_ops.similarity_reduce(q, k, scale=2.0).sum().backward()
        maps = pathlib.Path("/proc/self/maps")
        lines = maps.read_text().splitlines() if maps.exists() else []
        files = {line.split()[-1] for line in lines}
        spec = importlib.util.find_spec("contrastive_ops.kernels")
        top = importlib.util.find_spec("kernels")
        facts = {
            "version": contrastive_ops.__version__,
            "file": contrastive_ops.__file__,
            "new": sorted(new),
            "files": sorted(files),
            "kernels": spec and spec.origin,
            "top_level_kernels": top and top.origin,
        }
        pathlib.Path("facts.json").write_text(json.dumps(facts))
    """
    done = run(sys.executable, "-c", textwrap.dedent(script), cwd=folder, env=environment())
    assert done.returncode == 0, done.stderr
    return {**json.loads((folder / "facts.json").read_text()), "said": done.stdout + done.stderr}


def test_import_is_silent(imported: dict) -> None:
    assert imported["said"] == ""


def test_import_leaves_heavy_packages_out(imported: dict) -> None:
    heavy = {"triton", "numpy.testing", "transformers", "sentence_transformers", "open_clip"}
    assert not heavy & set(imported["new"])


def test_kernels_are_a_subpackage(imported: dict) -> None:
    assert imported["kernels"] is not None
    if Path(imported["file"]).is_relative_to(ROOT):  # editable: the files themselves
        assert Path(imported["kernels"]) == ROOT / "kernels" / "__init__.py"
    assert imported["top_level_kernels"] != imported["kernels"]


def test_one_version_everywhere(imported: dict) -> None:
    version = literal_version()
    assert imported["version"] == version
    assert importlib.metadata.version("contrastive-ops") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime(imported: dict) -> None:
    runtimes = [f for f in imported["files"] if re.match(r"lib(gomp|iomp|omp)", Path(f).name)]
    assert len(runtimes) == 1, runtimes


# --- the SIMD levels -------------------------------------------------------------------------


def test_sources_include_no_torch() -> None:
    """So that one build serves every torch, and no inline function of torch is compiled for one SIMD level."""
    for path in (path for path in (ROOT / "csrc").rglob("*") if path.is_file() and not path.name.startswith("eager")):
        found = re.findall(r'#include\s*[<"](?:torch|ATen|c10)/.*', path.read_text())
        assert not found, f"{path.name}: {found}"


def test_simd_libraries_share_no_code() -> None:
    """A function with external linkage could be linked in its AVX-512 form for every processor."""
    archives = sorted((ROOT / "build").glob("*/libcontrastive_ops_*.a"))
    if not archives or shutil.which("nm") is None:
        pytest.skip("needs the build folder and nm")
    for archive in archives:
        level = archive.stem.removeprefix("libcontrastive_ops_")
        if level in ("capability", "cuda", "scratch"):
            continue
        symbols = run("nm", "-C", "--defined-only", archive, cwd=ROOT, env=environment()).stdout
        code = re.findall(r"^[0-9a-f]+ [TWui] (.*)$", symbols, re.MULTILINE)
        foreign = [name for name in code if f"contrastive_ops::level_{level}::" not in name]
        assert code and not foreign, (archive.name, foreign)
