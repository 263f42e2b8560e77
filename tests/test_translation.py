"""What depends on differences of rows only keeps its digits wherever the rows lie.

Losses are found by a search: of the registry and of all functions of `contrastive_ops.losses` with no required argument
but x and y, those whose value in float64 stays the same as all rows move. Lists by squared distance follow, by whoever
makes them.
"""

import inspect

import pytest
import torch

import contrastive_ops.losses
from contrastive_ops import mine_hard_negatives, similarity_topk
from contrastive_ops.losses.whitening import group_whiten
from contrastive_ops.mining import MemoryBank, TopKState, search
from contrastive_ops.testing import LOSSES, leaves

DEPTH = 12
OFFSETS = (100.0, 10_000.0)  # standard deviations


class _OfRows:
    """A function of x, or of x and y, called as a case of the registry is."""

    def __init__(self, function):
        self.function = function
        self.names = [name for name in ("x", "y") if name in inspect.signature(function).parameters]

    def inputs(self, rows, depth, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        draws = (torch.randn(rows, depth, dtype=torch.float64, generator=generator) for _ in self.names)
        return {name: each.to(dtype).requires_grad_() for name, each in zip(self.names, draws, strict=True)}

    def __call__(self, inputs, **options):
        return self.function(**inputs, **options)


def _candidates():
    yield from LOSSES.items()
    for name, function in inspect.getmembers(contrastive_ops.losses, inspect.isfunction):
        parameters = inspect.signature(function).parameters.values()
        required = {each.name for each in parameters if each.default is inspect.Parameter.empty}
        if required in ({"x"}, {"x", "y"}) and name not in LOSSES:
            yield name, _OfRows(function)


def _moved(inputs, by, dtype):
    """The matrices moved by so many standard deviations of the first, as leaves; other tensors as they are."""
    moved, unit = {}, next(iter(inputs.values())).detach().double().std()
    for name, each in inputs.items():
        move = each.is_floating_point() and each.dim() == 2 and each.shape[1] == DEPTH
        tensor = each.detach().double() + by * unit if move else each.detach()
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        moved[name] = tensor.requires_grad_(each.requires_grad)
    return moved


def _value(case, inputs):
    parameters = inspect.signature(case.function).parameters
    options = {"normalize": False} if "normalize" in parameters else {}
    if "distance" in parameters and "distance" not in getattr(case, "options", {}):
        options["distance"] = "euclidean"
    value = case(inputs, **options)
    if not isinstance(value, torch.Tensor):
        return None
    return (value * torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)).sum()


def _is_invariant(case):
    try:
        inputs = case.inputs(24, DEPTH, torch.float64, 0)
        values = [_value(case, _moved(inputs, by, torch.float64)) for by in (0.0, 3.0)]
    except (TypeError, ValueError):
        return False
    if not any(each.dim() == 2 and each.is_floating_point() for each in inputs.values()):
        return False
    if values[0] is None or not values[0].isfinite() or not values[0].requires_grad:
        return False
    return bool(torch.isclose(*values, rtol=1e-7, atol=1e-9))


INVARIANT = {name: case for name, case in _candidates() if _is_invariant(case)}


def test_the_search_finds_what_it_should():
    known = {"uniformity", "distance_distillation", "batch_hard_triplet", "batch_semi_hard_triplet", "triplet"}
    known |= {"contrastive", "alignment", "vicreg", "covariance_penalty", "variance_hinge", "barlow_twins", "log_det"}
    assert known <= set(INVARIANT)


@pytest.mark.parametrize("name", INVARIANT)
def test_losses_keep_their_digits(name):
    case = INVARIANT[name]
    inputs = case.inputs(24, DEPTH, torch.float64, 1)

    def error(by):
        given = _moved(inputs, by, torch.float32)
        exact = {
            key: each.detach().double().requires_grad_(each.requires_grad) if each.is_floating_point() else each
            for key, each in given.items()
        }
        value, truth = _value(case, given), _value(case, exact)
        apart = abs(value.item() / truth.item() - 1) if abs(truth.item()) > 1e-3 else 0.0
        got = torch.cat([g.flatten().double() for g in torch.autograd.grad(value, leaves(given))])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(truth, leaves(exact))])
        distance = (got - expected).norm() / expected.norm().clamp_min(1e-12)
        return max(float(distance), apart)

    at_origin = error(0.0)
    assert at_origin < 1e-4
    for by in OFFSETS:
        assert error(by) < 4 * at_origin + 1e-5, by


def test_whitened_rows_keep_their_digits():
    x = torch.randn(200, 8, dtype=torch.float64)
    for by in OFFSETS:
        moved = (x + by).float()
        got, expected = group_whiten(moved), group_whiten(moved.double())
        assert (got - expected).norm() / expected.norm() < 1e-5


# ---- Lists by squared distance -------------------------------------------------------------------------------------


def _by_state(x, y, k, backend):
    state = TopKState(x, k, metric="sqeuclidean", backend=backend)
    for begin in (128, 0, 64):
        state.update(y[begin : begin + (64 if begin < 128 else len(y))], begin)
    return state.finalize().indices


def _by_bank(x, y, k, backend):
    bank = MemoryBank(len(y), y.shape[1], dtype=y.dtype)
    bank.enqueue(y)
    return bank.topk(x, k, metric="sqeuclidean", backend=backend).indices


def _by_mining(x, y, k, backend):
    nothing = torch.full((len(x), 1), -1)
    return mine_hard_negatives(x, y, nothing, k, metric="sqeuclidean", block_rows=50, backend=backend).indices


LISTS = {
    "similarity_topk": lambda x, y, k, backend: similarity_topk(x, y, k, metric="sqeuclidean", backend=backend).indices,
    "similarity_topk coarse": lambda x, y, k, backend: (
        similarity_topk(x, y, k, metric="sqeuclidean", coarse=torch.bfloat16, backend=backend).indices
    ),
    "search": lambda x, y, k, backend: search(x, [y], k, metric="sqeuclidean", backend=backend).indices,
    "TopKState": _by_state,
    "MemoryBank": _by_bank,
    "mine_hard_negatives": _by_mining,
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_have_full_recall(name, dtype, backend):
    x, y = torch.randn(40, 16, dtype=torch.float64), torch.randn(300, 16, dtype=torch.float64)
    for by in (0.0, *OFFSETS):
        a, b = (x + by).to(dtype), (y + by).to(dtype)
        d = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
        best = d.sort(dim=1, stable=True).indices[:, :10]
        found = LISTS[name](a, b, 10, backend)
        torch.testing.assert_close(d.gather(1, found), d.gather(1, best), rtol=1e-6, atol=0.0)
