"""`make fuzz`: many cases, of all subjects or of some."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from contrastive_ops.core import extension

from . import SUBJECTS, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS), metavar="NAME", help=", ".join(SUBJECTS))
    parser.add_argument("--backend", help="one backend alone; triton needs TRITON_INTERPRET=1")
    parser.add_argument("--dtype", help="one dtype alone")
    given = parser.parse_args()
    fixed: dict[str, Any] = {n: v for n, v in (("backend", given.backend), ("dtype", given.dtype)) if v is not None}
    counts, failed = run({name: SUBJECTS[name] for name in given.subjects}, given.cases, given.seed, fixed, tell=True)
    module: Any = extension.load()
    level = "no extension" if module is None else module.cpu_capability()
    print(f"{given.cases} cases (seed {given.seed}, {level}), {len(failed)} failed: {dict(counts)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
