"""Builds the extension for 64-bit ARM, and runs it in an emulator: make aarch64.

    apt-get install g++-aarch64-linux-gnu qemu-user-static      what it needs on Debian, and its package lists

Everything is made in build/aarch64 and kept: a root with Python of Debian for arm64 and torch (700 MB, the first time
alone), the extension, compiled across, and the log. Then main loops are counted in the assembly, objects that every
processor runs are searched for instructions of newer ones, and at both levels `check` and a short list of the
primitives' tests run. Prints a table. An emulator shows that results are right, not how fast they come.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "aarch64"
SYSTEM = FOLDER / "root"
PACKAGES = SYSTEM / "usr" / "lib" / "python3" / "dist-packages"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
NEEDED = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user-static", "apt-get": "apt", "dpkg": "dpkg"}

DEBIAN = ["python3", "libpython3-dev", "libgomp1", "libstdc++6"]
# The newest torch whose wheel for ARM has no CUDA; what it imports, and what the tests do.
WHEELS = ["torch==2.9.1", "numpy==2.2.6", "typing-extensions", "sympy", "mpmath", "jinja2", "MarkupSafe", "networkx"]
WHEELS += ["fsspec", "filelock", "setuptools", "pytest", "iniconfig", "packaging", "pluggy", "pygments", "hypothesis"]
WHEELS += ["sortedcontainers", "psutil"]
TAGS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")

# Of the tests of `make matrix`: an emulator takes some twenty times as long.
PRIMITIVES = ["similarity_reduce", "similarity_topk", "similarity_values", "grouped_matmul", "maxsim", "expert_routing"]
TESTS = [f"tests/test_{name}.py" for name in PRIMITIVES]
SHORT = "cpu and (values_and_gradients or sums_and_gradients or low_precision or stable_sort)"
LEVELS = ("neon", "neon_bf16")


def run(*command: object, **options) -> None:
    """Runs a command that must succeed."""
    words = [str(word) for word in command]
    print("$", *(word if len(word) < 60 else "..." for word in words[:8]), flush=True)
    if subprocess.run(words, check=False, **options).returncode:
        sys.exit(f"aarch64: this command must succeed:\n  {' '.join(words)}")


def unpack_debian() -> None:
    """Python and the libraries below it, by an apt whose lists and packages are in the folder."""
    state = FOLDER / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state / "cache",
    }
    apt = ["apt-get", "-qq", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    run(*apt, "update")
    run(*apt, "install", "--download-only", "-y", *DEBIAN)
    for package in sorted((state / "cache" / "archives").glob("*.deb")):
        run("dpkg", "-x", package, SYSTEM)


def python() -> str:
    """The version of the root's Python, as 3.11."""
    return next(path.name.removeprefix("python") for path in (SYSTEM / "usr" / "bin").glob("python3.?*[0-9]"))


def make_root() -> None:
    """The root, where it is not there yet."""
    if not (FOLDER / ".debian").exists():
        unpack_debian()
        (FOLDER / ".debian").touch()
    made = FOLDER / ".wheels"
    if not made.exists() or made.read_text() != "\n".join(WHEELS):
        tags = (word for tag in TAGS for word in ("--platform", tag))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile", "--upgrade"]
        only = ["--only-binary=:all:", "--no-deps", "--python-version", python(), "--target", PACKAGES]
        run(*pip, *tags, *only, *WHEELS)
        made.write_text("\n".join(WHEELS))


def build() -> Path:
    """The package with the extension, as setup.py makes it for another machine; the folder that it lies in."""
    version, tools = python(), COMPILER.removesuffix("g++")
    linker = f"{COMPILER} -shared"
    switches = {
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version.replace('.', '')}-aarch64-linux-gnu.so",
        **{"CC": COMPILER, "CXX": COMPILER, "LDSHARED": linker, "LDCXXSHARED": linker, "AR": f"{tools}ar"},
        **{"CONTRASTIVE_OPS_EXT": "1", "CONTRASTIVE_OPS_CUDA": "0"},
    }
    include = SYSTEM / "usr" / "include"
    headers = ["build_ext", "--include-dirs", f"{include / f'python{version}'}:{include}"]
    command = [sys.executable, "setup.py", "build", "--build-base", FOLDER / "made", *headers]
    run(*command, cwd=ROOT, env={**os.environ, **switches}, stdout=(FOLDER / "build.log").open("w"))
    return next((FOLDER / "made").glob("lib.linux-aarch64-*"))


def search_objects() -> str:
    """Instructions that not every ARM processor has, outside of the level that asks for them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # nothing is installed
    import test_baseline

    found, counted = {}, 0
    for path in sorted((FOLDER / "made").glob("temp.*/**/*.o")):
        if "neon_bf16" not in str(path):
            counted += 1
            found.update({path.name: new} if (new := test_baseline.newer_instructions(path, "aarch64")) else {})
    if found or not counted:
        sys.exit(f"aarch64: {counted} objects must have instructions of Armv8.0 alone, got {found}")
    return f"{counted} objects"


def emulated(level: str, folder: Path, *command: str) -> tuple[bool, str]:
    """Whether a command of the root's Python succeeds at a level, and what it says."""
    settings = {"PYTHONPATH": folder, "OMP_NUM_THREADS": 1, "CONTRASTIVE_OPS_CPU_CAPABILITY": level}
    settings["PYTHONDONTWRITEBYTECODE"] = 1
    given = (word for name, value in settings.items() for word in ("-E", f"{name}={value}"))
    start = [EMULATOR, "-L", SYSTEM, *given, SYSTEM / "usr" / "bin" / f"python{python()}", "-P"]
    words = [str(word) for word in (*start, *command)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    with (FOLDER / "run.log").open("a") as log:
        log.write(f"$ {' '.join(words)}\n{done.stdout}\n")
    return done.returncode == 0, done.stdout


# One process for all: an import of torch takes half a minute there.
WORK = """
import sys, torch, contrastive_ops._C as compiled
from contrastive_ops.__main__ import main
print("runs", compiled.cpu_capability(), torch.__version__, flush=True)
status = main(["check"])
if sys.argv[1:]:
    import pytest
    status |= pytest.main(sys.argv[1:])
sys.exit(int(status))
"""


def row(level: str, folder: Path, tests: list[str]) -> tuple[bool, str]:
    """Runs one level; whether all went well, and its row of the table."""
    options = ["-q", "-p", "no:cacheprovider", "-k", SHORT, *tests] if tests else []
    well, said = emulated(level, folder, "-c", WORK, *options)
    used, torch = (re.findall(r"^runs (\w+) (\S+)", said, re.MULTILINE) or [("fails", "-")])[-1]
    comparisons = (re.findall(r"(\d+ of \d+) comparisons", said) or ["fails"])[-1]
    summary = (re.findall(r"\d+ (?:passed|failed).*(?= in )", said) or ["fails"])[-1] if tests else "-"
    return well and used == level, f"{used} | {torch} | {comparisons} | {summary}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 0 where all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files (default: those of the primitives)")
    chosen = parser.parse_args(arguments)
    if missing := [package for command, package in NEEDED.items() if shutil.which(command) is None]:
        sys.exit(f"aarch64: {' and '.join(missing)} must be installed: apt-get install {' '.join(missing)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    make_root()
    folder = build()
    (FOLDER / "run.log").unlink(missing_ok=True)
    run(sys.executable, ROOT / ".ci" / "count_instructions.py", COMPILER)
    print(f"no instruction of newer processors in {search_objects()}; emulated on {platform.machine()}\n")
    print("| level | torch | check | tests |\n|---|---|---|---|", flush=True)
    fine = True
    for level in LEVELS:
        well, cells = row(level, folder, chosen.tests)
        print(f"| {cells} |", flush=True)
        fine &= well
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
