"""Clean environments to install into: a clone, an interpreter with nothing but torch, numpy and pip, and a compiler."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *(path.name for path in ROOT.glob("setup*.py")),
    *("pyproject.toml", "MANIFEST.in", "LICENSE"),
    *("contrastive_ops", "kernels", "csrc"),
]
NO_COMPILER = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}

# The kernel files take minutes, and are the same for every way to install: each is compiled once.
CACHING_COMPILER = """#!/bin/sh
for word; do
  [ "$last" = -o ] && target=$word
  case "$word" in csrc/*.cpp) source=$word ;; esac
  last=$word
done
case " $* " in *" -c "*) ;; *) exec {real} "$@" ;; esac
[ -n "$source" ] || exec {real} "$@"
# A source is compiled in a folder for each SIMD level, and for each module.
name=$(echo "$target" | sed 's|.*/\\([a-z0-9_]*/csrc/\\)|\\1|')
object={cache}/$(echo "$name" | tr / +)
[ -e "$object" ] || {{ {real} "$@" {flags} && cp "$target" "$object"; }} || exit 1
cp "$object" "$target"
"""


def environment(**changes: str) -> dict[str, str]:
    """The environment without the variables of this package, of pip and of Python's path."""
    own = ("CONTRASTIVE_OPS_", "PYTHONPATH", "PIP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {**kept, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **changes}


def run(*command: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The result of a command, whatever its status is."""
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def copy_sources(folder: Path) -> Path:
    """A copy of what the package is built from, so that no build product lands in the checkout."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_report.json")
    folder.mkdir(exist_ok=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    readme = ROOT / "README.md"
    (folder / "README.md").write_text(readme.read_text() if readme.exists() else "")
    return folder


def closure(*names: str) -> list[importlib.metadata.Distribution]:
    """Installed distributions and all that they require."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue, seen = [Requirement(name) for name in names], set()
    while queue:
        wanted = queue.pop()
        for extra in {"", *wanted.extras} - {extra for name, extra in seen if name == wanted.name}:
            seen.add((wanted.name, extra))
            try:
                found[wanted.name] = importlib.metadata.distribution(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                continue  # of another platform
            required = [Requirement(line) for line in found[wanted.name].requires or ()]
            queue += [each for each in required if each.marker is None or each.marker.evaluate({"extra": extra})]
    return list(found.values())


def clean_interpreter(folder: Path, *names: str) -> Path:
    """The interpreter of an environment with pip and links to these distributions and what they require."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent, env=environment())
    site = next((folder / "lib").glob("python*/site-packages"))
    for distribution in closure("pip", *names):
        tops = {Path(file).parts[0] for file in distribution.files or ()}
        for top in tops - {"..", "__pycache__"}:
            if not (site / top).exists():
                here = Path(str(distribution.locate_file(top)))
                (site / top).symlink_to(here)
                if sys.pycache_prefix and here.is_dir():
                    # Where Python will look for compiled files; torch's took most of the time of an import.
                    compiled, known = (Path(f"{sys.pycache_prefix}{path}") for path in (site / top, here))
                    compiled.parent.mkdir(parents=True, exist_ok=True)
                    compiled.symlink_to(known)
    python = folder / "bin" / "python"
    pip = folder / "bin" / "pip"
    pip.write_text(f"#!{python}\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n")
    pip.chmod(0o755)
    return python


def setuptools_wheel(folder: Path) -> Path:
    """A folder with the wheel of setuptools that is installed here: isolated builds ask for one."""
    folder.mkdir(exist_ok=True)
    distribution = importlib.metadata.distribution("setuptools")
    with zipfile.ZipFile(folder / f"setuptools-{distribution.version}-py3-none-any.whl", "w") as archive:
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and file.suffix != ".pyc" and path.exists():
                archive.write(path, str(file))
    return folder


def caching_compiler(folder: Path, flags: str = "") -> Path:
    """A C++ compiler that keeps objects; it begins with those of `make install`, if they are up to date.

    Args:
        folder: where it and its objects are.
        flags: after those that it is called with, for what it compiles.
    """
    cache = folder / "objects"
    cache.mkdir(parents=True, exist_ok=True)
    built = ROOT / "build" / f"editable.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    # Not those of the bindings, which know whether there are CUDA kernels.
    for path in [*built.glob("contrastive_ops_*/csrc/cpu/*.o"), *built.glob("eager/csrc/*.o")]:
        if path.stat().st_mtime > newest:
            shutil.copy(path, cache / "+".join(path.relative_to(built).parts))
    compiler, real = folder / "c++", shutil.which("g++") or shutil.which("c++")
    compiler.write_text(CACHING_COMPILER.format(real=real, flags=flags, cache=cache))
    compiler.chmod(0o755)
    return compiler
