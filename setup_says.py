"""The part of setup.py that speaks: switches that are wrong, builds that stop, and what is left out of one."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

# Neither is imported: that would import the package, which needs torch and an extension.
PACKAGE = Path(__file__).resolve().parent / "contrastive_ops"
checkout = SimpleNamespace(**runpy.run_path(str(PACKAGE / "_checkout.py")))
compilers = SimpleNamespace(**runpy.run_path(str(PACKAGE / "_compilers.py")))


def fail(message: str) -> NoReturn:
    raise SystemExit(f"\ncontrastive_ops: {message}\n")


def choice(name: str, meaning: str) -> str:
    value = os.environ.get(name, "").strip() or "auto"
    if value not in ("auto", "0", "1"):
        fail(f"{name} must be auto, 0 or 1, got {value!r}\n  {meaning}")
    return value


def fixes(reason: str) -> str:
    """What helps against the reason of a build without an extension: lines, each of which begins one."""
    return "".join(f"  fix: {remedy}\n" for remedy in compilers.remedies(reason)[0])


def warn_pure_python(reason: str) -> None:
    line = "*" * 88
    print(
        f"\n{line}\nWARNING: contrastive_ops is installed WITHOUT its compiled CPU extension.\n"
        f"  why: {reason}\n{fixes(reason)}"
        "  Everything works on the slower reference backend. To get the extension, remove the\n"
        "  cause and install again; CONTRASTIVE_OPS_EXT=1 turns this warning into an error.\n"
        f"  `python -m contrastive_ops info` repeats it.\n{line}\n",
        file=sys.stderr,
        flush=True,
    )


def warn_cpu_only(why: str) -> None:
    print(
        f"\nWARNING: contrastive_ops is installed WITHOUT CUDA kernels.\n  why: {why}\n"
        "  CONTRASTIVE_OPS_CUDA=0 builds none, 1 turns this warning into an error.\n",
        file=sys.stderr,
        flush=True,
    )
