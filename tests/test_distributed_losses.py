"""Losses over the rows of several processes are those of one process that has all rows."""

import pytest
import torch
from distributed_cases import CASES, errors, measures
from ranks import ranks


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", ["gather", "ring"])
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(name, schedule, size):
    for found, same in ranks(size).run(errors, name, torch.float32, schedule):
        assert same
        worst = max(found, key=found.get)
        assert found[worst] < 1e-6, (worst, found[worst])


@pytest.mark.parametrize("size", [2, 4])
def test_diagnostics(size):
    for found in ranks(size).run(measures):
        for name, schedule, same, error in found:
            assert same and error < 1e-6, (name, schedule, error)
