"""The compiled extension, or why it could not be loaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch  # the extension links against libraries that importing torch loads

from .. import _checkout

HOW_TO_FIX = "run `python -m contrastive_ops info`, which prints the command that builds it"


def _load() -> tuple[ModuleType | None, str | None]:
    if _checkout.extension_file(_checkout.PACKAGE) is None:
        module, said = _checkout.borrow_extension()
        return module, said if module is None else None
    try:
        return importlib.import_module("contrastive_ops._C"), None
    except ImportError as error:
        # The extension asks nothing of torch but a CUDA runtime of the major version that its kernels were built for.
        return None, f"the extension does not load with torch {torch.__version__}: {error}"


_checkout.map_kernels()
# At import, so that a traced program sees constants instead of an import.
# MISSING is None if there is a module, else why there is none.
_MODULE, MISSING = _load()
_REPORT = _checkout.report(_checkout.PACKAGE if _MODULE is None else Path(str(_MODULE.__file__)).parent)


def load() -> ModuleType | None:
    """Return the module `contrastive_ops._C`, or None where it is missing."""
    return _MODULE


def reason() -> str | None:
    """Return None if the extension is loaded, else why it is not: what its build recorded, where there was one."""
    return MISSING


def why_missing() -> str | None:
    """Return None if the extension is loaded, else the reason and how to fix it."""
    return None if MISSING is None else f"{MISSING}; {HOW_TO_FIX}"


def report() -> dict[str, str | None]:
    """Return what the build of the loaded extension recorded; empty if it recorded nothing."""
    return _REPORT


def has_bfloat16_tiles() -> bool:
    """Return whether the compiled kernels multiply bfloat16 matrices several times as fast as float32 ones."""
    return _MODULE is not None and _MODULE.cpu_capability() == "amx"


def functions(stem: str) -> SimpleNamespace:
    """Return the compiled launchers of a primitive under the names that its reference module uses."""
    if _MODULE is None:
        raise NotImplementedError(f"{stem}: {why_missing()}")
    prefix = f"{stem}_"
    return SimpleNamespace(
        **{name.removeprefix(prefix): getattr(_MODULE, name) for name in dir(_MODULE) if name.startswith(prefix)}
    )
