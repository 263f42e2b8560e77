"""Fixtures: the backends that can run here, and seeds."""

import pytest
import torch

from contrastive_ops import _dispatch


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: needs --run-slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend of similarity_reduce; one that cannot run is skipped with its own reason."""
    reason = _dispatch.backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param
