"""Writes the package as Hugging Face's `kernels` loads it: pure Python with its Triton kernels, nothing compiled.

    make hf-kernels                                 build/hf-kernels/build/torch-cuda and torch-rocm
    kernels.get_local_kernel(Path("build/hf-kernels"))

That layout wants a folder for each variant, whose `__init__.py` is imported under a name of its own, and its
`metadata.json`. So imports become relative, and operators get a namespace of their own: a program may have the
installed package, too, and two revisions of this one.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "contrastive_ops"
VARIANTS = ("cuda", "rocm")
# Of other packages, of tests, and of the command line, which a kernel has none of.
LEFT_OUT = ("integrations", "testing", "__main__.py")
# What names operators, and classes in exported programs.
NAMES = re.compile(rf'(?<=torch\.ops\.){PACKAGE}\b|(?<="){PACKAGE}(?=::|", "FRAGMENT"|\.\{{cls)')


def sources(root: Path) -> Iterator[tuple[Path, str]]:
    """Paths in the package, and what they hold."""
    for folder, within in ((root / PACKAGE, Path()), (root / "kernels", Path("kernels"))):
        for file in sorted(folder.rglob("*.py")):
            path = within / file.relative_to(folder)
            if path.parts[0] not in LEFT_OUT:
                yield path, file.read_text()


def relative(path: Path, text: str) -> str:
    """The source of a file of the package with relative imports of the package."""
    lines, dots = text.splitlines(keepends=True), "." * len(path.parts)
    for node in ast.walk(ast.parse(text)):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if any(name.partition(".")[0] == PACKAGE for name in names):
            raise ValueError(f"{path}: line {node.lineno} must import from {PACKAGE}, got import {PACKAGE}")
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == PACKAGE:
            rest = (node.module or "")[len(PACKAGE) :].lstrip(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {dots}{rest} ", 1)
    return "".join(lines)


def write(folder: Path, root: Path = ROOT) -> list[Path]:
    """Write all variants below a folder and return theirs."""
    files = [(path, relative(path, text)) for path, text in sources(root)]
    digest = hashlib.sha256(repr(files).encode()).hexdigest()[:8]
    unique = f"{PACKAGE}_{digest}"
    written = []
    for backend in VARIANTS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for path, text in files:
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_text(NAMES.sub(unique, text))
        metadata = {"id": unique, "name": "contrastive-ops", "version": 1, "license": "Apache-2.0"}
        metadata |= {"python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        shutil.copy(root / "LICENSE", variant)
        written.append(variant)
    return written


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hf-kernels", help="folder of the repository")
    for variant in write(parser.parse_args(arguments).out):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
