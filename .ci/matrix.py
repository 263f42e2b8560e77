"""Builds and tests the CPU extension with every C++ compiler and every Python of this machine, and prints a table.

    make matrix                                        every g++ and clang++ on PATH, every Python there that has torch
    make matrix ARGS="--compilers clang++-19 --pythons python3.12 --tests tests/test_maxsim.py"

Each compiler has a copy of the sources in build/matrix, where the kernels are compiled once for all Pythons, and each
combination a log of its build and of its tests. Nothing is installed. A compiler takes five minutes of one core, a
combination three more.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
installed = runpy.run_path(str(ROOT / "contrastive_ops" / "_compilers.py"))["installed"]
version = runpy.run_path(str(ROOT / "contrastive_ops" / "_compilers.py"))["version"]

TESTS = [f"tests/test_similarity_{name}.py" for name in ("reduce", "folds", "topk", "prefix", "distill", "values")]
TESTS += [f"tests/test_{name}.py" for name in ("maxsim", "grouped_matmul", "expert_routing", "router_losses")]
ASK = "import sys, torch; print('%d.%d.%d' % sys.version_info[:3], torch.__version__)"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compilers", nargs="+", help="commands (default: every one that is new enough)")
    parser.add_argument("--pythons", nargs="+", help="commands (default: this one, and python3.10 to 3.14 on PATH)")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files (default: those of the primitives)")
    return parser.parse_args(arguments)


def pythons(named: list[str] | None) -> dict[str, str]:
    """Interpreters that import torch, and what they say of themselves."""
    found: dict[str, str] = {}
    for command in named or [sys.executable, *(f"python3.{minor}" for minor in range(10, 15))]:
        path = shutil.which(command)
        run = subprocess.run([path, "-c", ASK], capture_output=True, text=True, check=False) if path else None
        if run is not None and run.returncode == 0 and run.stdout not in found.values():
            found[str(path)] = run.stdout
        elif named:
            sys.exit(f"matrix: --pythons must name interpreters that import torch, got {command}")
    return found


def logged(log: Path, folder: Path, *command: str, **variables: str) -> tuple[bool, str]:
    """Whether a command succeeds in a folder, and what it says, which is added to the log."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        command, cwd=folder, env={**kept, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{run.stdout}\n")
    return run.returncode == 0, run.stdout


def copy_sources(folder: Path) -> None:
    """The files of the clone that git knows, with their times, so that what is built stays built."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def row(compiler: str, python: str, says: str, tests: list[str]) -> tuple[bool, str]:
    """Builds and tests one combination; whether all went well, and its row of the table."""
    name = re.sub(r"[^\w.+-]", "_", compiler)
    folder, log = ROOT / "build" / "matrix" / name, ROOT / "build" / "matrix" / f"{name}-{says.split()[0]}.log"
    copy_sources(folder)
    log.unlink(missing_ok=True)
    switches = {"CXX": compiler, "CONTRASTIVE_OPS_EXT": "1", "CONTRASTIVE_OPS_CUDA": "0"}
    built, said = logged(log, folder, python, "setup.py", "build", "--build-temp", "build/objects", **switches)
    warnings = len(set(re.findall(r"^csrc/\S+ warning: .*", said, re.MULTILINE)))
    cells = [compiler, *says.split(), f"{warnings} warnings" if built else "fails", "-", "-"]
    if not built:
        return False, " | ".join(cells)
    for module in folder.glob("build/lib*/contrastive_ops/_*"):
        if module.suffix in (".so", ".json"):
            shutil.copy2(module, folder / "contrastive_ops")
    checked, said = logged(log, folder, python, "-m", "contrastive_ops", "check")
    cells[4] = (re.findall(r"(\d+ of \d+) comparisons", said) or ["fails"])[-1]
    passed, said = logged(log, folder, python, "-m", "pytest", "-q", "-k", "cpu", *tests) if tests else (True, "")
    cells[5] = (re.findall(r"\d+ (?:passed|failed).*(?= in )", said) or ["-" if passed else "fails"])[-1]
    return built and not warnings and checked and passed, " | ".join(cells)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table as it grows; 0 where all went well."""
    chosen = parse(arguments)
    said = dict(installed()) if chosen.compilers is None else {name: version([name]) for name in chosen.compilers}
    print(f"{datetime.date.today()}\n", *(f"- `{name}`: {what}" for name, what in said.items()), "", sep="\n")
    print("| compiler | Python | torch | build | check | tests |\n|---|---|---|---|---|---|", flush=True)
    fine = True
    for python, says in pythons(chosen.pythons).items():
        for compiler in said:
            well, cells = row(compiler, python, says, chosen.tests)
            print(f"| {cells} |", flush=True)
            fine &= well
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
