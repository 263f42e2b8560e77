"""Frozen dataclasses with some fields replaced, in traced programs too."""

from __future__ import annotations

from typing import Any, TypeVar

Record = TypeVar("Record")


def changed(record: Record, **fields: Any) -> Record:
    """`dataclasses.replace`, which the tracer of torch before 2.7 does not follow for records made while it traces."""
    names: tuple[str, ...] = type(record).__match_args__  # type: ignore[attr-defined]
    return type(record)(**{name: getattr(record, name) for name in names if name not in fields}, **fields)
