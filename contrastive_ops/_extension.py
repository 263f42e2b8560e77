"""Loads the compiled extension once and remembers why it could not be loaded."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType, SimpleNamespace

import torch  # noqa: F401  # the extension links against libraries that importing torch loads

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps contrastive-ops"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("contrastive_ops._C"), None
    except ModuleNotFoundError:
        return None, "the extension was not built: no C++ compiler was found, or compiling failed"
    except ImportError as error:
        # An undefined symbol: the extension was built for another torch than the one that is running.
        return None, f"the extension does not load with torch {torch.__version__}: {error}"


def load() -> ModuleType | None:
    """Return the module `contrastive_ops._C`, or None where it is missing."""
    return _load()[0]


def why_missing() -> str | None:
    """Return None if the extension is loaded, else the reason and how to fix it."""
    reason = _load()[1]
    if reason is None:
        return None
    return f"{reason}; install g++ and run: {REINSTALL}"


@functools.cache
def functions(stem: str) -> SimpleNamespace:
    """Return the compiled launchers of a primitive under the names that its reference module uses."""
    module = load()
    if module is None:
        raise NotImplementedError(f"contrastive_ops: {why_missing()}")
    prefix = f"{stem}_"
    return SimpleNamespace(
        **{name.removeprefix(prefix): getattr(module, name) for name in dir(module) if name.startswith(prefix)}
    )
