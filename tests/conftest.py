"""Fixtures: the backends that can run here, seeds, and an interpreter of Triton that rounds as devices do."""

import random

import durations
import numpy as np
import pytest
import torch

from contrastive_ops.core import backends, eager, operators, triton_kernels


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--run-exhaustive", action="store_true", help="also run tests marked exhaustive")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files in random order, and so the tests of each")


def shuffled(items, seed):
    """Tests of a file stay together, for the sake of what they share."""
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order, generator = list(files.values()), random.Random(seed)
    generator.shuffle(order)
    for tests in order:
        generator.shuffle(tests)
    return [item for tests in order for item in tests]


def pytest_configure(config):
    durations.register(config)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--shuffle") is not None:
        items[:] = shuffled(items, config.getoption("--shuffle"))
    for marker in ("slow", "exhaustive"):
        if config.getoption(f"--run-{marker}"):
            continue
        skip = pytest.mark.skip(reason=f"{marker}: needs --run-{marker}")
        for item in items:
            if marker in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _interpreter_rounds():
    """Triton's interpreter cuts off the digits that bfloat16 has no room for; devices round to the nearest."""
    if not triton_kernels.interprets() or triton_kernels.why_missing() is not None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, source, to):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)
        yield


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend of similarity_reduce; one that cannot run is skipped with its own reason."""
    reason = backends.backends()["similarity_reduce"][request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=["direct", "dispatcher"])
def way(request, monkeypatch):
    """Both ways of an eager call: past the dispatcher or all in C++, as plain tensors go, and through it."""
    if request.param == "dispatcher":
        monkeypatch.setattr(operators, "seen_by_autograd_alone", lambda arguments: False)
        monkeypatch.setattr(eager, "_closed", True)
    return request.param
