"""Objects with tensors as registered pytrees: torch.export, torch.func and tree_map see the tensors inside."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch.utils import _pytree

T = TypeVar("T")


def named(cls: type[T]) -> type[T]:
    """Give a named tuple, which is a pytree, the name by which exported programs are saved."""
    register = getattr(_pytree, "_register_namedtuple", None)
    if register is not None:
        register(cls, serialized_type_name=f"contrastive_ops.{cls.__name__}")
    return cls


def pytree(cls: type[T]) -> type[T]:
    """Register a dataclass; its fields are the children."""
    names = [each.name for each in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def flatten(value: T) -> tuple[list[Any], None]:
        return [getattr(value, name) for name in names], None

    def flatten_with_keys(value: T) -> tuple[list[Any], None]:
        return [(_pytree.GetAttrKey(name), getattr(value, name)) for name in names], None

    def unflatten(children: Any, context: None) -> T:
        # Not by the constructor, which checks: a tree of specifications has no tensors.
        value = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(value, name, child)
        return value

    _pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"contrastive_ops.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return cls
