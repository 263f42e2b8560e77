"""A folder of source code as a package: what it lacks until it is installed, and where else that may be found.

Python started in a clone imports the clone, whatever is installed. So the kernels get their name without an
installation, and the extension of an installed copy serves if it was built from the same C++ sources.

This file imports nothing of the package: setup.py runs it.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

PACKAGE = Path(__file__).resolve().parent
# Of this Python, and of every Python: what wheels have.
EXTENSIONS = (f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}", "_C.abi3.so")
EXTENSION = EXTENSIONS[0]
EAGER = EXTENSION.replace("_C", "_eager", 1)
REPORT = "_build_report.json"


def source_folder() -> Path | None:
    """The folder that this package can be built from, if it lies in one."""
    root = PACKAGE.parent
    return root if (root / "setup.py").exists() and (root / "csrc").is_dir() else None


def extension_file(folder: Path) -> Path | None:
    """The extension that this Python loads from a folder of this package, if there is one."""
    loads = [name for name in EXTENSIONS if name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))]
    return next((folder / name for name in loads if (folder / name).exists()), None)


def sources_digest(root: Path) -> str:
    """A short name for the contents of csrc: builds record it."""
    digest = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def report(folder: Path) -> dict[str, str | None]:
    """What the build said of a folder of this package; empty if it said nothing."""
    try:
        said = json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def map_kernels() -> None:
    """Name the folder beside the package contrastive_ops.kernels, as every installation does."""
    name, folder = "contrastive_ops.kernels", PACKAGE.parent / "kernels"
    if (PACKAGE / "kernels").exists() or name in sys.modules or not (folder / "__init__.py").exists():
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is not None and spec.loader is not None:
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["contrastive_ops"].kernels = module  # type: ignore[attr-defined]


def installations() -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder of this package in each distribution on the path, and what pip recorded of its source (PEP 610)."""
    import importlib.metadata

    for distribution in importlib.metadata.distributions(name="contrastive-ops"):
        text = distribution.read_text("direct_url.json")  # the metadata that a build leaves in a clone has none
        record = json.loads(text) if text else {}
        folder = Path(str(distribution.locate_file("contrastive_ops")))
        if record.get("dir_info", {}).get("editable"):
            folder = local_path(record["url"]) / "contrastive_ops"
        if (folder / "__init__.py").exists():
            yield folder.resolve(), record


def local_path(url: str) -> Path:
    """The path that a file: URL names."""
    return Path(url2pathname(urlparse(url).path))


def installed_copies() -> Iterator[Path]:
    """Folders of this package that are installed, other than the one in use."""
    yield from dict.fromkeys(folder for folder, _ in installations() if folder != PACKAGE)


def borrow_extension() -> tuple[ModuleType | None, str]:
    """The extension of an installed copy, or None; and what there is to say about it."""
    own = report(PACKAGE).get("why_no_extension")
    reasons = [own] if own else []
    for other in sorted(path.name for path in PACKAGE.glob("_C.*")):
        reasons.append(f"the extension was built for another Python: {PACKAGE} has {other}, this one loads {EXTENSION}")
    root = source_folder()
    digest = sources_digest(root) if root is not None else None
    for folder in installed_copies() if root is not None else ():
        said, file = report(folder), extension_file(folder)
        if file is None:
            reasons.append(said.get("why_no_extension") or f"{folder} has no {EXTENSION}")
        elif said.get("sources") != digest:
            reasons.append(f"{file} was built from other C++ sources than those in {root}")
        else:
            try:
                return load("contrastive_ops._C", file), f"the extension is {file}"
            except ImportError as error:
                reasons.append(f"{file} does not load: {error}")
    if not reasons and root is not None:
        reasons.append(f"{root} holds source code, and nothing was built or installed from it")
    elif not reasons:
        reasons.append(f"{PACKAGE} has neither {EXTENSION} nor a report of its build")
    return None, reasons[0]


def load(name: str, file: Path) -> ModuleType:
    """Load a compiled module from a file."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no extension")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module
    return module
