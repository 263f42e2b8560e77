"""Sums over millions by the Triton kernels: tiles of a program, and parts of programs, add up without a loss."""

import pytest
import torch

from contrastive_ops.core import triton_kernels

if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)
if not (triton_kernels.interprets() or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import sums_cases
from expert_routing_cases import Subject

from contrastive_ops.kernels import _similarity_plan, _tiles, expert_routing

DEVICE = "cpu" if triton_kernels.interprets() else "cuda"
# Tiles are 32 x 32 in the interpreter, and up to 128 x 64 on a GPU.
LONG = sums_cases.Long(2048, 32) if triton_kernels.interprets() else sums_cases.Long(16_000, 128)
# For launches of one tile each, of which an interpreter takes long.
SHORTER = LONG._replace(size=1280) if triton_kernels.interprets() else LONG
DIMS = (0, 1)


@pytest.fixture(autouse=True)
def _one_program(monkeypatch):
    """A program has all tiles of its rows."""
    monkeypatch.setattr(_similarity_plan, "PROGRAMS", 1)


@pytest.fixture
def many_launches(monkeypatch):
    """Blocks of rows in launches of their own, whose parts merge one after another."""
    monkeypatch.setattr(_similarity_plan, "PARTS_BYTES", 16)
    monkeypatch.setattr(_similarity_plan, "CHUNK_ROWS", 32)
    monkeypatch.setattr(_similarity_plan, "CHUNK_BYTES", 32 * 32 * 4)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", ["sum", "sum_relu", "sum_softplus"])
def test_folds(kind, dim):
    sums_cases.check_folds("triton", DEVICE, LONG, kind, dim)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("logits", ["equal_and_small", "rising"])
def test_logsumexp(logits, dim):
    sums_cases.check_logsumexp("triton", DEVICE, getattr(LONG, logits)(), dim)


def test_folds_of_many_launches(many_launches):
    sums_cases.check_folds("triton", DEVICE, LONG, "sum", 0)
    sums_cases.check_logsumexp("triton", DEVICE, LONG.equal_and_small(), 0)


@pytest.mark.parametrize("dim", DIMS)
def test_gradients(dim):
    sums_cases.check_gradients("triton", DEVICE, LONG, dim)


@pytest.mark.parametrize("dim", DIMS)
def test_gradients_by_weights(dim, many_launches, monkeypatch):
    monkeypatch.setattr(_tiles, "RESIDENT_DEPTH", dict.fromkeys(_tiles.RESIDENT_DEPTH, (0, 0)))
    sums_cases.check_gradients("triton", DEVICE, SHORTER, dim)


# Experts, and how many tokens a program has at a time in the interpreter.
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("experts,at_once", [(3, 32), (60, 2)])
def test_routers(experts, at_once, segments, monkeypatch):
    monkeypatch.setattr(expert_routing, "PARTS", 1)
    monkeypatch.setattr(expert_routing, "SETTLED", 4)
    few = {"first": 16, "then": 60, "square": 3.6}
    sums_cases.check_router(Subject("triton", DEVICE).scores, DEVICE, experts, at_once, segments, **few)
