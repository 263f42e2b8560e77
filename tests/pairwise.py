"""Few combinations of many parameters: every two values of two parameters meet in one of them."""

import pytest

from contrastive_ops.kernels._cover import pairwise_cover


def pairwise(**choices):
    """As a `pytest.mark.parametrize` for each, with a part of their combinations, always the same."""
    cover = pairwise_cover({name: list(values) for name, values in choices.items()})
    rows = [tuple(row[name] for name in choices) for row in cover]
    return pytest.mark.parametrize(tuple(choices), rows, ids=str)
