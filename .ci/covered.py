"""`make coverage`: which lines of the package and of csrc the tests run, from one run of them.

make coverage                                            all tests but those of kernels for GPUs
make coverage ARGS="tests/test_maxsim.py -k cpu"         what is given to pytest instead
make coverage ARGS="--report"                            what the last run found, again

The extension is built with counters, one SIMD level, in a copy of the sources below build/coverage: all levels are
compiled from the same lines. `build/coverage/lines.txt` names the lines that no test ran.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "coverage"
TREE, OBJECTS = FOLDER / "tree", FOLDER / "objects"
sys.path.append(str(ROOT / "tests"))

import builds  # noqa: E402

FLAGS = ("--coverage", "-fprofile-update=atomic", "-g0")
# Kernels for GPUs run in programs of their own, and in an interpreter.
USUAL = ("--ignore-glob=tests/test_cuda_*", "--ignore-glob=tests/test_hopper_*", "--ignore-glob=tests/test_kernels_*")
USUAL = (*USUAL, "--ignore-glob=tests/test_distributed_*", "--ignore=tests/test_install.py")
# Levels that were not compiled end the process.
USUAL = (*USUAL, "--deselect=tests/test_small_batches.py::test_every_level_of_this_processor")
CONFIGURATION = """[run]
source = contrastive_ops
data_file = {folder}/python
parallel = true
branch = false
[report]
exclude_also =
    if TYPE_CHECKING:
    raise NotImplementedError$
    @overload
    @triton.jit
"""

Counts = dict[str, dict[int, int]]


def run_tests(arguments: Iterable[str]) -> int:
    """Build, run, and leave counters; what pytest returns."""
    for old in (*OBJECTS.glob("*.gcda"), *FOLDER.glob("python*")):
        old.unlink()
    builds.copy_sources(TREE)
    level = builds.usual_level()
    builds.Build(TREE, OBJECTS, level, FLAGS).make()
    configuration = FOLDER / "coverage.ini"
    configuration.write_text(CONFIGURATION.format(folder=FOLDER))
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={configuration}", "-m", "pytest", "-q"]
    variables = builds.environment(level, PYTHONPATH=os.pathsep.join([str(TREE), *own_path()]))
    return subprocess.run([*command, *arguments], cwd=TREE, env=variables, check=False).returncode


def own_path() -> list[str]:
    """What this process was given as PYTHONPATH."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def python_lines() -> Counts:
    """How often each line of the package ran, from its data files; 1 stands for any number."""
    common = [sys.executable, "-m", "coverage"]
    rc = f"--rcfile={FOLDER / 'coverage.ini'}"
    subprocess.run([*common, "combine", rc, "--keep"], cwd=TREE, check=True, capture_output=True)
    report = FOLDER / "python.json"
    subprocess.run([*common, "json", rc, "-q", "-o", str(report)], cwd=TREE, check=True)
    found = json.loads(report.read_text())["files"]
    return {
        name: {**dict.fromkeys(lines["missing_lines"], 0), **dict.fromkeys(lines["executed_lines"], 1)}
        for name, lines in found.items()
    }


def cpp_lines() -> Counts:
    """How often each line of csrc ran, over all objects that were made of it."""
    counts: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted(OBJECTS.glob("*.gcda")):
        command = ["gcov", "--json-format", "--stdout", str(data)]
        done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=True)
        for text in done.stdout.splitlines():
            for file in json.loads(text)["files"]:
                name = os.path.relpath(TREE / file["file"], TREE)
                if name.startswith("csrc/"):
                    for line in file["lines"]:
                        counts[name][line["line_number"]] += line["count"]
    return {name: dict(lines) for name, lines in counts.items()}


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges: 3-5, 9."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def report() -> None:
    """Print shares, write the lines that did not run."""
    rows, lines = [], []
    for language, counts in (("Python", python_lines()), ("C++", cpp_lines())):
        missing = {name: [n for n, count in found.items() if count == 0] for name, found in counts.items()}
        total, left = sum(map(len, counts.values())), sum(map(len, missing.values()))
        rows.append({"language": language, "files": len(counts), "lines": total, "run": total - left})
        print(f"{language}: {total - left} of {total} lines, {100 * (1 - left / max(total, 1)):.1f}%")
        for name in sorted(missing, key=lambda name: -len(missing[name])):
            if missing[name]:
                lines.append(f"{name}: {len(missing[name])} of {len(counts[name])}: {ranges(missing[name])}")
    (FOLDER / "lines.txt").write_text("\n".join(lines) + "\n")
    (FOLDER / "totals.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"those that did not: {(FOLDER / 'lines.txt').relative_to(ROOT)}")


def main(arguments: list[str]) -> int:
    """The exit status of the tests; 0 of a report alone."""
    status = 0 if arguments == ["--report"] else run_tests(arguments or USUAL)
    report()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
