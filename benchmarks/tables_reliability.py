"""Tables of what was tested: the fuzzer's runs, the errors by dtype and temperature, compilers and Pythons.

make fuzz CASES=7000 SEED=1 ARGS="--save benchmarks/results/fuzz.json"
make mutate ARGS="--save benchmarks/results/faults.json"
python -m benchmarks.numerics --save
make matrix ARGS=--save
python -m benchmarks.compilers g++-12 clang++-19 --save
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SIMD_LEVELS = ("default", "avx2", "avx512", "avx512_bf16", "amx")  # of x86, the lowest first


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---", *["--:"] * (len(header) - 1)], *rows))


def _origin(found: dict[str, Any]) -> str:
    changed = " with local changes" if found["dirty"] == "yes" else ""
    return f"{found['device']}, torch {found['torch']}, commit {found['commit']}{changed}, {found['date'][:10]}.\n"


def _ran_at(level: str, processor: str) -> str:
    """A case asks for a level at most: what the processor does not have runs at the processor's."""
    if level in SIMD_LEVELS and processor in SIMD_LEVELS:
        return min(level, processor, key=SIMD_LEVELS.index)
    return level or processor


def fuzz(runs: list[dict[str, Any]]) -> str:
    """Cases of each run, then of each subject and SIMD level over all runs."""
    rows = [
        [str(run["seed"]), run["processor_level"], *(f"{run[n]:,}" for n in ("drawn", "refused", "empty", "compared")),
         str(len(run["failed"]))]
        for run in runs
    ]  # fmt: skip
    header = ["seed", "up to level", "drawn", "refused", "without a number", "compared", "different"]
    subjects, levels = Counter[str](), Counter[str]()
    for run in runs:
        subjects.update(run["subjects"])
        for name, count in run["cpu_levels"].items():
            levels[_ran_at(name, run["processor_level"])] += count
        levels["reference"] += run["backends"].get("reference", 0)
        levels["triton, interpreted"] += run["backends"].get("triton", 0)
    many = [[f"`{name}`", f"{count:,}"] for name, count in subjects.most_common()]
    where = [[name, f"{count:,}"] for name, count in levels.most_common() if count]
    parts = [
        _markdown(header, rows),
        _markdown(["subject", "compared"], many),
        _markdown(["where", "compared"], where),
        "<br>\n".join(_origin(run) for run in runs),
    ]
    return "\n".join(parts)


LANGUAGES = {"cpu": "C++", "cuda": "CUDA, executed on the host", "triton": "Triton, interpreted", "python": "Python"}


def faults(found: dict[str, Any]) -> str:
    """How many of the planted faults the tests notice, by the code that they are in."""

    def counted(name: str, rows: list[dict[str, Any]]) -> list[str]:
        results = Counter(row["result"] for row in rows)
        left = results["not run"] + results["skipped"]
        return [name, *map(str, (len(rows), results["caught"], len(rows) - results["caught"] - left, left))]

    every = found["results"]
    rows = [counted(language, [r for r in every if r["kind"] == kind]) for kind, language in LANGUAGES.items()]
    table = _markdown(["faults in", "planted", "caught", "not caught", "not run"], [*rows, counted("all", every)])
    missed = [row for row in every if row["result"] not in ("caught", "not run", "skipped")]
    lines = "".join(f"- {row['name']} (`{row['file']}`): {row['result']}\n" for row in missed)
    return "\n".join(filter(None, [table, lines, "<br>\n".join(dict.fromkeys(map(_origin, found["runs"])))]))


def numerics(found: dict[str, Any]) -> str:
    """Errors over all losses."""
    from benchmarks.numerics import table

    return f"{table(found)}\n\n{found['rows']} rows of dimension {found['depth']}. {_origin(found)}"


def matrix(rows: list[dict[str, str]]) -> str:
    """Builds and tests by compiler and Python, and what the compilers are."""
    columns = ("compiler", "python", "torch", "numpy", "build", "check", "tests")
    lines = [[f"`{row['compiler']}`", *(row[name] for name in columns[1:])] for row in rows]
    said = sorted({f"`{row['compiler']}` is {row['said']}" for row in rows})
    days = sorted({row["date"] for row in rows})
    header = ["compiler", "Python", "torch", "numpy", "build", "`check`", "tests"]
    return f"{_markdown(header, lines)}\n{'; '.join(said)}. {' to '.join(sorted({days[0], days[-1]}))}.\n"


def compilers(found: dict[str, Any]) -> str:
    """Times of the builds of several compilers, of which the first is what the others are compared with."""
    header = ["case", "threads", "compiler", "ms", "against the first", "processor per wall clock"]
    lines = [
        [row["case"], str(row["threads"]), f"`{row['compiler']}`"]
        + [f"{row['ms']:.2f}", f"{row['ratio']:.2f}", f"{row['processor']:.2f}"]
        for row in found["rows"]
    ]
    return f"{_markdown(header, lines)}\n{_origin(found)}"


def tables() -> dict[str, Callable[[], str]]:
    """The tables that there are results for."""
    known: dict[str, Callable[[], str]] = {}
    makers = {
        "fuzz": lambda f: fuzz(f["runs"]),
        "faults": faults,
        "numerics": numerics,
        "matrix": matrix,
        "compilers": compilers,
    }
    for name, make in makers.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            known[name] = lambda path=path, make=make: make(json.loads(path.read_text()))  # type: ignore[misc]
    return known
