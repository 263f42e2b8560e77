"""`make sanitize`: tests of the primitives and the fuzzer on builds of the C++ extension under sanitizers.

make sanitize                                        both kinds, at the usual SIMD level
make sanitize ARGS="--kinds thread --cases 50"       one kind; fewer cases of the fuzzer
make sanitize ARGS="--levels default avx512 amx"     other levels, a build each
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import builds

from . import FOLDER, KINDS, ROOT, build, run, why_missing


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="sanitizers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--levels", nargs="+", default=[builds.usual_level()], metavar="LEVEL")
    parser.add_argument("--cases", type=int, default=200, help="of the fuzzer, at each level and kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1800, help="of one list of tests; longer is an error")
    parser.add_argument("--save", type=Path, help="a file for the results")
    return parser.parse_args()


def lists(given: argparse.Namespace, kind: str, level: str) -> list[tuple[str, list[str]]]:
    """What is run, by name: arguments of Python."""
    pytest = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    found = [(words[0].removeprefix("tests/"), [*pytest, *words]) for words in KINDS[kind].tests]
    fuzz = ["-m", "fuzz", "--cases", str(given.cases), "--seed", str(given.seed), "--level", level, "--backend", "cpu"]
    subjects = ["losses", "similarity_reduce", "similarity_topk", "similarity_prefix", "similarity_distill"]
    subjects += ["similarity_values", "maxsim", "grouped_matmul", "route"]
    found.append(("the fuzzer", [*fuzz, "--subjects", *subjects]))
    if kind == "address":
        found.append(("raw calls", ["-m", "fuzz.raw", str(given.seed), "0.1"]))
    return found


def main() -> int:
    """Builds and runs; 0 if nothing is reported."""
    given = parse()
    reason = why_missing()
    if reason is not None:
        print(f"sanitizers: {reason}")
        return 2
    rows = []
    for kind in given.kinds:
        for level in given.levels:
            began = time.monotonic()
            build(KINDS[kind], level)
            print(f"{kind}, {level}: built in {time.monotonic() - began:.0f} s", flush=True)
            if not builds.runs(level, ROOT):
                print(f"{kind}, {level}: this processor does not have it")
                continue
            for name, arguments in lists(given, kind, level):
                began = time.monotonic()
                wrong, said = run(KINDS[kind], level, *arguments, seconds=given.seconds)
                spent = time.monotonic() - began
                (FOLDER / f"{kind}-{level}-{name}.log".replace(" ", "-")).write_text(said)
                last = (said.strip().splitlines() or [""])[-1]
                print(f"{kind}, {level}: {name}: {wrong or 'clean'} ({spent:.0f} s): {last}", flush=True)
                row = {"kind": kind, "level": level, "run": name, "result": wrong or "clean", "said": last}
                rows.append({**row, "seconds": round(spent)})
    wrong = sum(row["result"] != "clean" for row in rows)
    print(f"{len(rows)} runs: {wrong} with a report; what each said is in {FOLDER.relative_to(ROOT)}")
    if given.save:
        sys.path.append(str(ROOT))
        from benchmarks import provenance

        given.save.write_text(json.dumps({"provenance": provenance.gather(), "runs": rows}, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
