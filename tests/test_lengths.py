"""Losses of embeddings compare cosines unless they are told otherwise: lengths of rows do not count."""

import inspect

import pytest
import torch
from torch.testing import assert_close

from contrastive_ops import losses
from contrastive_ops.testing import LOSSES

EMBEDDINGS = {"matrix", "columns", "of_each_row", "queue", "guide", "guide_columns", "teacher"}
EMBEDDINGS |= {"tokens", "more_tokens", "lists_of_tokens"}
AS_THEY_ARE = {"pair_bce", "distance_distillation", "spectral_contrastive"}


def default(function):
    parameter = inspect.signature(function).parameters.get("normalize")
    return None if parameter is None else parameter.default


NORMALISED = [name for name, case in LOSSES.items() if default(case.function) and case.options.get("normalize", True)]


def test_defaults():
    functions = {name: getattr(losses, name) for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    assert {name for name, function in functions.items() if default(function) is False} == AS_THEY_ARE


@pytest.mark.parametrize("name", NORMALISED)
def test_rows_of_any_length_are_unit_rows(name):
    case = LOSSES[name]
    drawn = case.inputs(7, 6, torch.float64)
    rows = [key for key, make in case.tensors.items() if make.__name__ in EMBEDDINGS]
    long, unit = dict(drawn), dict(drawn)
    generator = torch.Generator().manual_seed(3)
    for key in rows:
        x = torch.nn.functional.normalize(drawn[key].detach(), dim=-1)
        lengths = 0.2 + 4 * torch.rand(*x.shape[:-1], 1, dtype=x.dtype, generator=generator)
        unit[key] = x.clone().requires_grad_(drawn[key].requires_grad)
        long[key] = (lengths * x).requires_grad_(drawn[key].requires_grad)
    # Prefixes of unit rows have other lengths.
    loss, expected = case(long), case(unit, normalize="matryoshka" in name)
    assert_close(loss, expected)
    assert_close(case(unit), expected)
    loss.backward()  # a step along a row changes no cosine
    for key in rows:
        if long[key].grad is not None:
            along = (long[key].grad * long[key].detach()).sum(-1)
            assert_close(along, torch.zeros_like(along))
