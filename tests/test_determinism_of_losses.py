"""All losses have the same bits under deterministic algorithms, and over processes and threads."""

import hashlib
import subprocess
import sys

import pytest
import torch

from contrastive_ops.testing import LOSSES, leaves

NAMES = sorted(LOSSES)


def bits(name, backend, rows=37, dtype=torch.float32):
    """The loss and all gradients."""
    case = LOSSES[name]
    inputs = case.inputs(rows, 24, dtype, seed=1)
    torch.manual_seed(0)
    loss = case(inputs, "sum", backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaves(inputs), materialize_grads=True)]


def same(a, b):
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


@pytest.fixture
def deterministic():
    """Also what is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMES)
def test_under_deterministic_algorithms(backend, name, deterministic):
    found = bits(name, backend)
    torch.use_deterministic_algorithms(False)
    assert same(found, bits(name, backend)) and not any(t.isnan().any() for t in found)


def digest():
    """Of everything, for another process to compare."""
    total = hashlib.sha256()
    for name in NAMES:
        for t in bits(name, "auto"):
            total.update(t.double().numpy().tobytes())
    return total.hexdigest()


def test_in_other_processes():
    """Of other numbers of threads, addresses and orders of sets."""
    code = (
        "import sys, torch, test_determinism_of_losses as t; torch.set_num_threads(int(sys.argv[1])); print(t.digest())"
    )
    found = set()
    for threads, seed in ((1, "1"), (2, "77")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(threads)],
            env={"PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p), "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found.add(done.stdout.strip())
    assert found == {digest()}
