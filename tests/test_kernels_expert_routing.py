"""The Triton kernels of expert_routing against the reference. Without a GPU they run interpreted.

Decisions must be those of the reference in the same precision, numbers are compared with the reference in float64.
"""

import itertools

import pytest
import torch
from expert_routing_cases import EXTREME, LAYOUTS, NAMES, NAN, OPTIONS, Subject, ops

from contrastive_ops import route
from contrastive_ops.core import triton_kernels
from contrastive_ops.ops import Capacity, Gating, RouterLoss, combine, dispatch, expert_choice, grouped_matmul
from contrastive_ops.testing import TOLERANCE, relative_error

if not triton_kernels.interprets() and not torch.cuda.is_available():
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() and not triton_kernels.interprets() else "cpu"
SUBJECT = Subject("triton", DEVICE)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integers", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("name", OPTIONS)
def test_scores_and_their_derivative(name, integers):
    arguments = SUBJECT.problem(**OPTIONS[name], integers=integers)
    found = SUBJECT.check_scores(arguments)
    SUBJECT.check_backward(arguments, found["experts"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["softmax", "load of segments", "best two of groups"])
def test_scores_of_16_bits(name, dtype):
    arguments = SUBJECT.problem(**OPTIONS[name], dtype=dtype)
    found = SUBJECT.check_scores(arguments)
    SUBJECT.check_backward(arguments, found["experts"])


@pytest.mark.parametrize("options", ["softmax", "sigmoid", "load of segments", "best two of groups", "bias"])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits(name, options):
    logits, *others = SUBJECT.problem(**{**OPTIONS[options], "k": 3})
    SUBJECT.check_extreme((EXTREME[name](logits), *others))


def test_logits_of_padding_are_not_read():
    arguments = SUBJECT.problem(valid=True, noise="load", segments=2)
    clean = SUBJECT.scores(arguments)
    logits, valid = arguments[0].clone(), arguments[6]
    logits[~valid] = NAN
    found = SUBJECT.scores((logits, *arguments[1:]))
    for name in NAMES:
        assert torch.equal(found[name], clean[name]), name


def test_strided_and_expanded_scores():
    arguments = SUBJECT.problem(allowed=True, segments=2, integers=True)
    expected = SUBJECT.scores(arguments, "reference")
    logits, noise, bias, allowed, given, segment, valid, *rest = arguments
    variants = {
        "columns": (logits.T.contiguous().T, allowed.T.contiguous().T),
        "part of rows": (torch.cat([logits, logits], 1)[:, : logits.shape[1]], allowed),
        "every other": (logits.repeat_interleave(2, 1)[:, ::2], allowed.repeat_interleave(2, 0)[::2]),
    }
    for name, (z, mask) in variants.items():
        found = SUBJECT.scores((z, noise, bias, mask, given, segment, valid, *rest))
        assert torch.equal(found["experts"], expected["experts"]), name
        torch.testing.assert_close(found["sums"], expected["sums"])
    mask = allowed[:1].expand_as(allowed)
    arguments = (logits, noise, bias, mask, given, segment, valid, *rest)
    assert torch.equal(SUBJECT.scores(arguments)["experts"], SUBJECT.scores(arguments, "reference")["experts"])


def test_scores_have_the_same_bits_in_every_run():
    arguments = SUBJECT.problem(tokens=200, **OPTIONS["load of segments"])
    first, second = SUBJECT.scores(arguments), SUBJECT.scores(arguments)
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


def test_no_tokens():
    arguments = SUBJECT.problem(tokens=0, segments=3, noise="load", valid=True)
    found, expected = SUBJECT.scores(arguments), SUBJECT.scores(arguments, "reference")
    for name in NAMES:
        assert torch.equal(found[name], expected[name]), name
    SUBJECT.check_backward(arguments, found["experts"])


# ---- Slots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [None, "ties", "NaN"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_slots_are_those_of_the_reference(layout, priority):
    SUBJECT.check_slots(layout, priority)


def test_slots_of_experts_that_are_not_contiguous():
    SUBJECT.check_slots_of(torch.randint(5, (3, 40), device=DEVICE).T, None, None, [5, 40, 9, 0, 1])


# ---- Moving rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(9, 2, 16, 15), (20, 3, 70, 70), (1, 1, 1, 1), (5, 1, 33, 40), (3, 2, 0, 4)], ids=str
)
def test_moved_integers_are_exact(shape, dtype):
    tokens, rows, gates, *places = SUBJECT.moved(*shape, dtype)
    SUBJECT.check_moves(tokens, rows, gates, places)


def test_moved_rows_may_be_strided():
    tokens, rows, gates, *places = SUBJECT.moved(20, 3, 70, 70, torch.float32)
    expected = SUBJECT.moves(tokens, rows, gates, places, "reference")
    variants = {
        "columns": (tokens.T.contiguous().T, rows.T.contiguous().T, gates.T.contiguous().T),
        "parts": (torch.cat([tokens, tokens], 1)[:, :70], torch.cat([rows, rows], 1)[:, :70], gates),
        "every other": (tokens.repeat_interleave(2, 1)[:, ::2], rows.repeat_interleave(2, 0)[::2], gates),
    }
    for name, given in variants.items():
        for value, truth in zip(SUBJECT.moves(*given, places), expected, strict=True):
            assert torch.equal(value, truth), name


def test_what_has_no_place_is_not_read():
    tokens, rows, gates, slots, order = SUBJECT.moved(20, 3, 70, 90, torch.float32)
    clean = SUBJECT.moves(tokens, rows, gates, (slots, order))
    rows[order < 0] = NAN
    gates[slots < 0] = NAN
    tokens[(slots < 0).all(1)] = NAN
    for value, truth in zip(SUBJECT.moves(tokens, rows, gates, (slots, order)), clean, strict=True):
        assert torch.equal(value, truth)


def test_nan_does_not_come_back_where_a_choice_was_dropped():
    """Not through its gate, and not through a token that has another row."""
    tokens, rows, gates, slots, order = SUBJECT.moved(20, 3, 70, 40, torch.float32)
    slots[0] = torch.tensor([-1, 5, -1])
    gates[slots < 0], tokens[:] = NAN, NAN
    assert ops.expert_routing_combine(rows, gates, slots, order, "triton").isfinite().all()
    products = ops.expert_routing_dots(tokens, rows, slots, order, "triton")
    assert torch.equal(products == 0, slots < 0) and torch.equal(products.isnan(), slots >= 0)


# ---- The whole -------------------------------------------------------------------------------------------------------

LOSSES = ["importance", "switch", "z", RouterLoss("local_entropy", weight=[0.1, 0.5]),
          RouterLoss("global_entropy", threshold=1.5)]  # fmt: skip


def layer(backend, routed, tokens, weight, bias):
    """A layer of experts: its output and the total of the losses."""
    rows = dispatch(tokens, routed, backend=backend)
    out = grouped_matmul(rows, weight, routed.offsets, bias, backend=backend)
    return combine(out, routed, backend=backend), routed.loss


ROUTERS = {
    "dropless": lambda z, backend, s: route(z, 2, segments=s, num_segments=2, losses=LOSSES, backend=backend),
    "capacity": lambda z, backend, s: route(
        z, 2, capacity=0.8, segments=s, num_segments=2, losses=LOSSES, backend=backend
    ),
    "padded groups": lambda z, backend, s: route(
        z, 3, capacity=Capacity(factor=0.7, group_size=20, padded=True), gating=Gating(renormalize=True), segments=s,
        num_segments=2, losses=LOSSES, backend=backend,
    ),
    "sigmoid": lambda z, backend, s: route(
        z, 2, capacity=1.0, gating=Gating("sigmoid", expert_groups=3, kept_groups=2), priority="position", segments=s,
        num_segments=2, losses=LOSSES, backend=backend,
    ),
    "experts choose": lambda z, backend, s: expert_choice(
        z, 1.0, segments=s, num_segments=2, losses=LOSSES, backend=backend
    ),
    "experts choose, padded": lambda z, backend, s: expert_choice(
        z, Capacity(limit=5, group_size=20, padded=True), segments=s, num_segments=2, losses=LOSSES, backend=backend
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_of_experts(name):
    tokens, experts, depth, columns = 40, 6, 18, 10
    segment = torch.randint(2, (tokens,), device=DEVICE)
    inputs = [torch.randn(shape, device=DEVICE) for shape in (
        (tokens, experts), (tokens, depth), (experts, depth, columns), (experts, columns))]  # fmt: skip
    results, routings = [], []
    for backend in ("triton", "reference"):
        leaves = [(t if backend == "triton" else t.double()).detach().requires_grad_() for t in inputs]
        routed = ROUTERS[name](leaves[0], backend, segment)
        out, loss = layer(backend, routed, *leaves[1:])
        upstream = torch.arange(out.numel(), device=DEVICE).view_as(out) % 7 - 3
        gradients = torch.autograd.grad([out, loss], leaves, [upstream.to(out.dtype), torch.ones_like(loss)])
        results.append((out, loss, *gradients, *routed.losses.values(), *routed.metrics.values()))
        routings.append(routed)
    for field in ("experts", "slots", "order", "offsets"):
        assert torch.equal(getattr(routings[0], field), getattr(routings[1], field)), field
    for value, truth in zip(*results, strict=True):
        assert relative_error(value, truth) <= 4 * TOLERANCE[torch.float32]


def test_noise_is_that_of_the_generator():
    """The load loss and its gradient, with the same noise on both backends."""
    logits, results = torch.randn(30, 5, device=DEVICE), []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        generator = torch.Generator(DEVICE).manual_seed(3)
        routed = route(leaf, 2, gating=Gating(noise_std=1.0), losses=["load"], generator=generator, backend=backend)
        results.append((routed.experts, routed.loss, *torch.autograd.grad(routed.loss, leaf)))
    assert torch.equal(results[0][0], results[1][0])
    for value, truth in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6)


def test_second_derivatives():
    """They run through the reference."""
    logits, results = torch.randn(12, 4, device=DEVICE), []
    for backend in ("triton", "reference"):
        leaf = (logits if backend == "triton" else logits.double()).requires_grad_()
        routed = route(leaf, 2, losses=["importance", "z"], backend=backend)
        (first,) = torch.autograd.grad(routed.loss + routed.gates.square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert relative_error(*results) <= 1e-5


def test_golden_places_of_v_moe():
    gates = torch.tensor([[5, 3, 2], [6, 3, 1], [4, 3.5, 2.5], [7, 2, 1], [2, 5, 3], [3, 3, 4]], device=DEVICE) / 10
    kept = {
        "position": [[0, 1], [1, -1], [-1, -1], [-1, -1], [0, 1], [0, -1]],
        "gate": [[-1, -1], [1, -1], [-1, -1], [0, 1], [0, 1], [0, -1]],
    }
    for priority, places in kept.items():
        capacity = Capacity(limit=2, padded=True)
        routed = route(gates.log(), 2, capacity=capacity, priority=priority, backend="triton")
        assert routed.experts.tolist() == [[0, 1], [0, 1], [0, 1], [0, 1], [1, 2], [2, 0]]
        expected = torch.tensor(places, device=DEVICE)
        assert torch.equal(routed.slots, torch.where(expected < 0, -1, 2 * routed.experts + expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_other_dtypes_are_refused_with_a_reason(dtype):
    error, reason = (NotImplementedError, "supported: float32") if dtype.is_floating_point else (TypeError, "float32")
    with pytest.raises(error, match=reason):
        route(torch.zeros(3, 2, dtype=dtype, device=DEVICE), backend="triton")


def test_options_cover_each_other():
    """Every switch of a kernel is thrown by some case, and left alone by another."""
    switches = ("score", "renormalize", "noise", "bias", "groups", "allowed", "given", "valid", "segments")
    for a, b in itertools.product(switches, repeat=2):
        assert any(a in options and (a == b or b not in options) for options in OPTIONS.values()), (a, b)
