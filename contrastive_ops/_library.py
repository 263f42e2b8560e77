"""How operators are defined: the library, and what every one of them has beside its function.

Not torch.library.custom_op, whose first call imports torch._dynamo: three seconds and 150 MiB for a plain evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import _autocast
from ._dispatch import Backend

LIBRARY = torch.library.Library("contrastive_ops", "FRAGMENT")


def define(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    derivative: Callable[..., Any] | None = None,
) -> None:
    """Define contrastive_ops::name for all devices; without `derivative` it has none."""
    qualified = f"contrastive_ops::{name}"
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if derivative is not None:
        torch.library.register_autograd(qualified, derivative, setup_context=setup, lib=LIBRARY)


def of_backend(backends: Mapping[str, Backend], name: str) -> Callable[..., Any]:
    """The function `name` of the backend that the last argument names, outside of any autocast region."""

    def function(*arguments: Any) -> Any:
        *problem, backend = arguments
        with _autocast.disabled(problem[0]):
            return getattr(backends[backend].functions(), name)(*problem)

    return function
