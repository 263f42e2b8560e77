"""Builds and tests the CPU extension with every C++ compiler and every Python of this machine, and prints a table.

    make matrix                                        every g++ and clang++ on PATH, every Python there that has torch
    make matrix ARGS="--compilers clang++-19 --pythons python3.12 --tests tests/test_maxsim.py"
    make matrix ARGS="--resume --save"                 go on where a run ended, and keep the table of docs/platforms.md

Each compiler has a copy of the sources in build/matrix, where the extension is compiled once, for it is for all
Pythons, and each combination a log of its build and of its tests. With --each everything is compiled by each Python,
also the module that has headers of torch. Nothing is installed. A compiler takes six minutes of one core, a combination
two more. The tests are those that compare with dense formulas, and eight Python threads at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD, STORED = ROOT / "build" / "matrix", ROOT / "benchmarks" / "results" / "matrix.json"
compilers = runpy.run_path(str(ROOT / "contrastive_ops" / "_compilers.py"))
checkout = runpy.run_path(str(ROOT / "contrastive_ops" / "_checkout.py"))

TESTS = [f"tests/test_similarity_{name}.py" for name in ("reduce", "folds", "topk", "prefix", "distill", "values")]
TESTS += [f"tests/test_{name}.py" for name in ("maxsim", "grouped_matmul", "expert_routing", "router_losses")]
TESTS += ["tests/test_python_threads.py"]
SELECTED = [
    *("values_and_gradients", "each_fold", "each_rule", "stable_sort", "two_matrices", "sums_and_gradients"),
    *("places_are_those_of_loops", "losses_are_their_formulas", "low_precision", "number_of_threads", "python_threads"),
]
ASK = """
import sys, torch
try:
    import numpy
except ImportError:
    numpy = None
free = "" if getattr(sys, "_is_gil_enabled", lambda: True)() else "t"
print("%d.%d.%d" % sys.version_info[:3] + free, torch.__version__, numpy.__version__ if numpy else "none")
"""
COLUMNS = ("compiler", "python", "torch", "numpy", "build", "check", "tests")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compilers", nargs="+", help="commands (default: every one that is new enough)")
    parser.add_argument("--pythons", nargs="+", help="commands (default: this one, and python3.10 to 3.14 on PATH)")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files (default: those of the primitives)")
    parser.add_argument("--select", default=f"cpu and ({' or '.join(SELECTED)})", help="what pytest -k takes")
    parser.add_argument("--each", action="store_true", help="compile for each Python what is for one, or could be")
    parser.add_argument("--resume", action="store_true", help="keep rows of the same sources, compiler and packages")
    parser.add_argument("--save", action="store_true", help=f"write what is kept to {STORED.relative_to(ROOT)}")
    return parser.parse_args(arguments)


def pythons(named: list[str] | None) -> dict[str, list[str]]:
    """Interpreters that import torch, and the versions of Python, torch and numpy."""
    found: dict[str, list[str]] = {}
    for command in named or [sys.executable, *(f"python3.{minor}" for minor in range(10, 15))]:
        path = shutil.which(command)
        run = subprocess.run([path, "-c", ASK], capture_output=True, text=True, check=False) if path else None
        if run is not None and run.returncode == 0 and run.stdout.split() not in found.values():
            found[os.path.abspath(str(path))] = run.stdout.split()  # commands run in other folders
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


def built(compiler: str, python: str, says: list[str], folder: Path, log: Path) -> str:
    """Builds one combination in its folder, and says how many warnings there were, or that it fails."""
    for module in folder.glob("contrastive_ops/_*.so"):
        module.unlink()  # of another Python
    switches = {"CXX": compiler, "CONTRASTIVE_OPS_EXT": "1", "CONTRASTIVE_OPS_CUDA": "0"}
    well, said = logged(log, folder, python, "setup.py", "build", "--build-temp", "build/objects", **switches)
    if not well:
        return "fails"
    abi = "".join(says[0].split(".")[:2]) + ("t" if says[0].endswith("t") else "")
    for module in folder.glob(f"build/lib*-cpython-{abi}/contrastive_ops/_*"):
        if module.suffix in (".so", ".json"):
            shutil.copy2(module, folder / "contrastive_ops")
    warnings = f"{len(set(re.findall(r'^csrc/[^ ]+ warning: .*', said, re.MULTILINE)))} warnings"
    (folder / "built").write_text(f"{warnings}, by {says[0]}")
    return warnings


def borrowed(says: list[str], folder: Path) -> str | None:
    """Takes what this compiler has made of the same sources for another Python, and says which."""
    package = folder / "contrastive_ops"
    made, report = next(package.glob("_C.*so"), None), checkout["report"](package)
    if made is None or says[0].endswith("t") or report.get("sources") != checkout["sources_digest"](ROOT):
        return None
    made.replace(package / "_C.abi3.so")  # as a wheel names it
    return (folder / "built").read_text()


def row(compiler: str, python: str, says: list[str], chosen: argparse.Namespace) -> tuple[bool, dict[str, str]]:
    """Builds and tests one combination; whether all went well, and its row of the table."""
    name = re.sub(r"[^\w.+-]", "_", compiler)
    folder, log = BUILD / name, BUILD / f"{name}-{'-'.join(says[:2])}.log"
    copy_sources(folder)
    log.unlink(missing_ok=True)
    how = (None if chosen.each else borrowed(says, folder)) or built(compiler, python, says, folder, log)
    cells = dict(zip(COLUMNS, [compiler, *says, how, "-", "-"], strict=True))
    if how == "fails":
        return False, cells
    checked, said = logged(log, folder, python, "-m", "contrastive_ops", "check")
    cells["check"] = (re.findall(r"(\d+ of \d+) comparisons", said) or ["fails"])[-1]
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen.select, *chosen.tests]
    passed, said = logged(log, folder, python, *words) if chosen.tests else (True, "")
    counted = re.findall(r"\d+ (?:passed|failed).*?(?=, \d+ deselected| in )", said)
    cells["tests"] = (counted or ["-" if passed else "fails"])[-1]
    return how.startswith("0 ") and checked and passed, cells


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """What earlier runs have found."""
    return json.loads(path.read_text()) if path.exists() else []


def printed(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    return f"| {' | '.join(row[name] for name in COLUMNS)} |"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table as it grows; 0 where all went well."""
    chosen, path = parse(arguments), BUILD / "rows.json"
    named = chosen.compilers
    said = dict(compilers["installed"]()) if named is None else {name: compilers["version"]([name]) for name in named}
    today = str(datetime.date.today())
    print(f"{today}\n", *(f"- `{name}`: {what}" for name, what in said.items()), "", sep="\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    fine = True
    for python, says in pythons(chosen.pythons).items():
        for compiler, what in said.items():
            same = {"compiler": compiler, **dict(zip(COLUMNS[1:], says, strict=False)), "said": what}
            same |= {"sources": checkout["sources_digest"](ROOT), "selected": f"{chosen.select} {chosen.tests}"}
            known = kept_rows(path)
            old = [each for each in known if chosen.resume and same.items() <= each.items()]
            if not old:
                well, cells = row(compiler, python, says, chosen)
                old = [{**same, **cells, "date": today, "well": well}]
                BUILD.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps([*kept_rows(path), *old], indent=1) + "\n")
            print(printed(old[-1]), flush=True)
            fine &= old[-1]["well"]
    if chosen.save:
        newest = {tuple(each[name] for name in COLUMNS[:4]): each for each in kept_rows(path)}
        STORED.write_text(json.dumps([newest[key] for key in sorted(newest)], indent=1) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
