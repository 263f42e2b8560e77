"""`make fuzz`: many cases, of all subjects or of some."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import provenance
from contrastive_ops.core import extension

from .children import SECONDS_OF_A_CASE, Report, run_in_children
from .subjects import SUBJECTS


def save(path: Path, seed: int, level: str, report: Report) -> None:
    """Replace what the file says of this seed at this level."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [run for run in runs if (run["seed"], run["processor_level"]) != (seed, level)]
    found = {"drawn": report.drawn, "compared": report.compared.total(), "refused": report.refused}
    found |= {"empty": report.empty, "failed": [f"{case}  # {said}" for case, said in report.failed]}
    found |= {"subjects": report.compared, "cpu_levels": report.levels, "backends": report.backends}
    runs.append(
        {"seed": seed, "processor_level": level, **found, "seconds": round(report.seconds), **provenance.gather()}
    )
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def saved(path: Path, seed: int, level: str) -> Report | None:
    """What the file says of this seed at this level, None where it says nothing."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for run in runs:
        if (run["seed"], run["processor_level"]) == (seed, level):
            counts = (Counter(run[name]) for name in ("subjects", "cpu_levels", "backends"))
            failed = [tuple(said.split("  # ", 1)) for said in run["failed"]]
            return Report(run["drawn"], *counts, run["refused"], run["empty"], failed, run["seconds"])
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="that are compared; others are drawn beside them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS), metavar="NAME", help=", ".join(SUBJECTS))
    parser.add_argument("--backend", help="one backend alone; triton needs TRITON_INTERPRET=1")
    parser.add_argument("--dtype", help="one dtype alone")
    parser.add_argument("--level", help="at most this SIMD level in all cases")
    parser.add_argument("--seconds", type=int, default=SECONDS_OF_A_CASE, help="of one case; one that takes more fails")
    parser.add_argument("--save", type=Path, help="a JSON file, such as benchmarks/results/fuzz.json")
    parser.add_argument("--resume", action="store_true", help="go on where the run in this file was stopped")
    given = parser.parse_args()
    names = ("backend", "dtype", "level")
    fixed: dict[str, Any] = {n: getattr(given, n) for n in names if getattr(given, n) is not None}
    subjects = {name: SUBJECTS[name] for name in given.subjects}
    module: Any = extension.load()
    level = "no extension" if module is None else module.cpu_capability()
    if given.backend is not None:
        level = f"{given.backend} alone"  # a run of its own beside that of the same seed

    before = saved(given.save, given.seed, level) if given.save and given.resume else None

    def keep(report: Report) -> None:
        if given.save:
            save(given.save, given.seed, level, report)

    def tell(text: str) -> None:
        print(text, flush=True)

    report = run_in_children(subjects, given.cases, given.seed, fixed, tell, keep, given.seconds, before)
    print(
        f"seed {given.seed}, {level}: {report.drawn} cases drawn, {report.refused} refused, {report.empty} without a "
        f"number, {report.compared.total()} compared, {len(report.failed)} failed: {dict(report.compared)}"
    )
    return bool(report.failed)


if __name__ == "__main__":
    sys.exit(main())
