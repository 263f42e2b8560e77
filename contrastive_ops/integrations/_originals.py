"""What adapters share: how another package is found, and when its own code runs."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any


def third_party(module: str, install: str) -> Any:
    """Import what an adapter stands on; what is missing is an error that says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"contrastive_ops.integrations: {error.name} must be installed, got none: pip install {install}",
            name=error.name,
        ) from error


def runs_original(what: object, reason: str) -> None:
    """Say once for each class, or function of a name, and reason that the code of the other package runs."""
    _warn_once(what if isinstance(what, str) else type(what).__name__, reason)


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"{name}: {reason} has no fused form; the original runs", stacklevel=4)
