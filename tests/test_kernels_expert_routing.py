"""The Triton kernels of expert_routing against the reference. Without a GPU they run interpreted.

Decisions must be those of the reference in the same precision, numbers are compared with the reference in float64.
"""

import itertools

import pytest
import torch

from contrastive_ops import (
    Capacity,
    Gating,
    RouterLoss,
    _triton,
    combine,
    dispatch,
    expert_choice,
    grouped_matmul,
    route,
)
from contrastive_ops._routing import ScoreSpec, SlotSpec
from contrastive_ops.testing import TOLERANCE, relative_error

if not _triton.interprets() and not torch.cuda.is_available():
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
if _triton.why_missing() is not None:
    pytest.skip(_triton.why_missing(), allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() and not _triton.interprets() else "cpu"
NAN, INF = torch.nan, torch.inf
NAMES = ("experts", "gates", "priority", "sums", "totals", "choices", "tokens", "margin")
DECISIONS = ("experts", "choices", "tokens")
ops = torch.ops.contrastive_ops
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def wide(tensors):
    """The same numbers in float64; what is not floating stays."""
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


# ---- Scores ----------------------------------------------------------------------------------------------------------


def problem(
    tokens=37, experts=8, k=2, *, dtype=torch.float32, score=0, renormalize=0, noise=None, bias=False, groups=(1, 1, 0),
    allowed=False, given=False, valid=False, segments=1, integers=False
):  # fmt: skip
    """The arguments of the operator up to the backend."""
    draw = torch.randint(-2, 3, (tokens, experts)) if integers else 2 * torch.randn(tokens, experts)
    spec = ScoreSpec(k, score, renormalize, *groups, segments, int(noise == "load"))
    tensors = (
        draw.to(dtype),
        torch.randn(tokens, experts) if noise else None,
        torch.randn(experts) / 4 if bias else None,
        torch.rand(tokens, experts) < 0.5 if allowed else None,
        torch.rand(tokens, experts).argsort(1)[:, :k] - 1 if given else None,
        torch.randint(segments, (tokens,)) if segments > 1 else None,
        torch.rand(tokens) < 0.8 if valid else None,
    )
    return *(t if t is None else t.to(DEVICE) for t in tensors), list(spec), 0.5


def scores(arguments, backend="triton"):
    return dict(zip(NAMES, ops.expert_routing_scores(*arguments, backend), strict=True))


def check_scores(arguments, tolerance=TOLERANCE[torch.float32]):
    """Equal decisions; gates, sums and totals of the reference in float64 for these decisions. Returns the results."""
    found, same_precision = scores(arguments), scores(arguments, "reference")
    for name in DECISIONS:
        assert torch.equal(found[name], same_precision[name]), name
    logits, noise, bias, allowed, _, *others = arguments
    truth = scores(wide([logits, noise, None, allowed, found["experts"], *others]), "reference")
    for name in NAMES:
        assert found[name].shape == same_precision[name].shape and found[name].dtype == same_precision[name].dtype
        if name not in DECISIONS:
            assert relative_error(found[name], truth[name]) <= tolerance, name
    return found


def check_backward(arguments, experts, tolerance=2 * TOLERANCE[torch.float32]):
    logits, noise, bias, allowed, _, segment, valid, spec, sigma = arguments
    s = ScoreSpec(*spec)
    shapes = (experts.shape, (3, s.segments, logits.shape[1]), (2, s.segments))
    upstream = [torch.randn(shape, device=DEVICE) for shape in shapes]
    problem = [logits, noise, bias, allowed, segment, valid, spec, sigma, experts, *upstream]
    found = ops.expert_routing_scores_backward(*problem, "triton")
    truth = ops.expert_routing_scores_backward(*wide(problem), "reference")
    assert found.dtype == torch.float32
    assert relative_error(found, truth) <= tolerance


OPTIONS = {
    "softmax": {},
    "sigmoid": {"score": 1},
    "renormalized": {"renormalize": 1},
    "renormalized sigmoid": {"renormalize": 1, "score": 1, "k": 3},
    "noise": {"noise": "noise"},
    "noise on sigmoid": {"noise": "noise", "score": 1, "segments": 3},
    "load": {"noise": "load"},
    "load of segments": {"noise": "load", "segments": 3, "valid": True},
    "load with too few experts": {"noise": "load", "allowed": True, "k": 6},
    "bias": {"bias": True},
    "bias on sigmoid": {"bias": True, "score": 1, "k": 4},
    "best two of groups": {"experts": 12, "groups": (4, 2, 0), "k": 3},
    "best of groups": {"experts": 15, "groups": (5, 2, 1), "k": 3, "bias": True, "score": 1},
    "groups of one": {"groups": (8, 3, 0), "k": 3},
    "groups and a mask": {"experts": 12, "groups": (3, 2, 0), "k": 4, "allowed": True},
    "mask": {"allowed": True, "segments": 2},
    "assignment": {"given": True, "k": 3},
    "assignment with noise": {"given": True, "k": 3, "noise": "noise"},
    "padding": {"valid": True},
    "segments": {"segments": 5},
    "more segments than tokens": {"segments": 60, "tokens": 20},
    "everything": {
        "noise": "load", "valid": True, "segments": 3, "allowed": True, "renormalize": 1, "k": 3, "experts": 11
    },
    "all experts": {"k": 8},
    "one expert": {"experts": 1, "k": 1, "segments": 2},
    "one token": {"tokens": 1},
    "more experts than a tile": {"experts": 300, "tokens": 9, "k": 5},
}  # fmt: skip


@pytest.mark.parametrize("integers", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("name", OPTIONS)
def test_scores_and_their_derivative(name, integers):
    arguments = problem(**OPTIONS[name], integers=integers)
    found = check_scores(arguments)
    check_backward(arguments, found["experts"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["softmax", "load of segments", "best two of groups"])
def test_scores_of_16_bits(name, dtype):
    arguments = problem(**OPTIONS[name], dtype=dtype)
    found = check_scores(arguments)
    check_backward(arguments, found["experts"])


EXTREME = {
    "huge": lambda z: z * 1e4,
    "equal": lambda z: z * 0,
    "minus infinity": lambda z: z.masked_fill(torch.rand_like(z) < 0.5, -INF),
    "a row of minus infinity": lambda z: torch.cat([z[:3], torch.full_like(z[:2], -INF), z[5:]]),
    "NaN": lambda z: z.masked_fill(torch.rand_like(z) < 0.2, NAN),
    "a row of NaN": lambda z: torch.cat([z[:3], torch.full_like(z[:2], NAN), z[5:]]),
    "infinity": lambda z: z.masked_fill(torch.rand_like(z) < 0.1, INF),
    "all of them": lambda z: torch.where(
        torch.rand_like(z) < 0.6,
        torch.tensor([NAN, INF, -INF, 3e38, -3e38, 0.0, -0.0], device=z.device)[torch.randint(7, z.shape).to(z.device)],
        z,
    ),
}


@pytest.mark.parametrize("options", ["softmax", "sigmoid", "load of segments", "best two of groups", "bias"])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits(name, options):
    """Decisions are those of the reference and name each expert once; NaN and infinity are where it has them."""
    logits, *others = problem(**{**OPTIONS[options], "k": 3})
    arguments = (EXTREME[name](logits), *others)
    found, expected = scores(arguments), scores(arguments, "reference")
    for each in DECISIONS:
        assert torch.equal(found[each], expected[each]), each
    for each in set(NAMES) - set(DECISIONS):
        torch.testing.assert_close(found[each], expected[each], rtol=1e-4, atol=1e-5, equal_nan=True, msg=each)
    for row in found["experts"]:
        chosen = row[row >= 0].tolist()
        assert len(chosen) == len(set(chosen))
    upstream = [torch.randn(shape, device=DEVICE) for shape in (
        found["gates"].shape, found["sums"].shape, found["totals"].shape)]  # fmt: skip
    given = (*arguments[:4], *arguments[5:], found["experts"], *upstream)
    gradients = [ops.expert_routing_scores_backward(*given, backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_logits_of_padding_are_not_read():
    arguments = problem(valid=True, noise="load", segments=2)
    clean = scores(arguments)
    logits, valid = arguments[0].clone(), arguments[6]
    logits[~valid] = NAN
    found = scores((logits, *arguments[1:]))
    for name in NAMES:
        assert torch.equal(found[name], clean[name]), name


def test_strided_and_expanded_scores():
    arguments = problem(allowed=True, segments=2, integers=True)
    expected = scores(arguments, "reference")
    logits, noise, bias, allowed, given, segment, valid, *rest = arguments
    variants = {
        "columns": (logits.T.contiguous().T, allowed.T.contiguous().T),
        "part of rows": (torch.cat([logits, logits], 1)[:, : logits.shape[1]], allowed),
        "every other": (logits.repeat_interleave(2, 1)[:, ::2], allowed.repeat_interleave(2, 0)[::2]),
    }
    for name, (z, mask) in variants.items():
        found = scores((z, noise, bias, mask, given, segment, valid, *rest))
        assert torch.equal(found["experts"], expected["experts"]), name
        torch.testing.assert_close(found["sums"], expected["sums"])
    mask = allowed[:1].expand_as(allowed)
    arguments = (logits, noise, bias, mask, given, segment, valid, *rest)
    assert torch.equal(scores(arguments)["experts"], scores(arguments, "reference")["experts"])


def test_scores_have_the_same_bits_in_every_run():
    arguments = problem(tokens=200, **OPTIONS["load of segments"])
    first, second = scores(arguments), scores(arguments)
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


def test_no_tokens():
    arguments = problem(tokens=0, segments=3, noise="load", valid=True)
    found, expected = scores(arguments), scores(arguments, "reference")
    for name in NAMES:
        assert torch.equal(found[name], expected[name]), name
    check_backward(arguments, found["experts"])


# ---- Slots -----------------------------------------------------------------------------------------------------------

# Tokens, k, experts, group size (None for all), capacity, padded, segments.
LAYOUTS = [
    (50, 2, 5, None, -1, 0, 1),
    (50, 2, 5, None, 7, 0, 1),
    (50, 2, 5, None, 7, 1, 3),
    (60, 3, 4, 12, 4, 0, 2),
    (60, 3, 4, 12, 4, 1, 1),
    (60, 1, 40, 1, 1, 1, 1),
    (7, 7, 7, None, 3, 0, 1),
    (130, 2, 3, None, 1000, 0, 40),
    (20, 2, 3, None, 0, 0, 1),
    (20, 2, 3, None, 0, 1, 1),
    (1, 1, 1, None, 1, 0, 1),
    (0, 2, 3, None, 0, 1, 2),
    (0, 2, 3, None, -1, 0, 1),
]


@pytest.mark.parametrize("priority", [None, "ties", "NaN"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_slots_are_those_of_the_reference(layout, priority):
    tokens, k, experts, size, capacity, padded, segments = layout
    spec = SlotSpec(experts, tokens if size is None else size, capacity, padded, segments)
    chosen = torch.rand(tokens, experts).argsort(1)[:, :k].masked_fill(torch.rand(tokens, k) < 0.2, -1)
    first = torch.randint(3, (tokens,)) / 4
    if priority == "NaN":
        first = first.masked_fill(torch.rand(tokens) < 0.3, NAN).masked_fill(torch.rand(tokens) < 0.2, -INF)
    label = torch.randint(segments, (tokens,)).to(DEVICE) if segments > 1 else None
    given = (chosen.to(DEVICE), None if priority is None else first.to(DEVICE), label, list(spec))
    found, expected = (ops.expert_routing_slots(*given, backend) for backend in ("triton", "reference"))
    for name, value, truth in zip(("slots", "order", "offsets", "kept"), found, expected, strict=True):
        assert value.shape == truth.shape and torch.equal(value, truth), name


def test_slots_of_experts_that_are_not_contiguous():
    chosen = torch.randint(5, (3, 40), device=DEVICE).T
    found, expected = (
        ops.expert_routing_slots(chosen, None, None, [5, 40, 9, 0, 1], backend) for backend in ("triton", "reference")
    )
    assert all(torch.equal(value, truth) for value, truth in zip(found, expected, strict=True))


# ---- Moving rows -----------------------------------------------------------------------------------------------------


def moved(tokens, k, depth, rows, dtype):
    """Tokens, rows, gates and places in which some choices and some rows are empty; integers."""
    order = torch.full((rows,), -1)
    count = min(rows, tokens * k) * 2 // 3
    order[torch.randperm(rows)[:count]] = torch.randperm(tokens * k)[:count]
    slots = torch.full((tokens * k,), -1)
    slots[order[order >= 0]] = (order >= 0).nonzero()[:, 0]
    numbers = [torch.randint(-3, 4, shape).to(DEVICE, dtype) for shape in ((tokens, depth), (rows, depth))]
    gates = torch.randint(-2, 3, (tokens, k)).to(DEVICE).float() / 2
    return *numbers, gates, slots.view(tokens, k).to(DEVICE), order.to(DEVICE)


def moves(tokens, rows, gates, places, backend):
    """Everything that rows are moved by."""
    return (
        *(ops.expert_routing_dispatch(tokens, g, *places, backend) for g in (None, gates)),
        *(ops.expert_routing_combine(rows, g, *places, backend) for g in (None, gates)),
        ops.expert_routing_dots(tokens, rows, *places, backend),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(9, 2, 16, 15), (20, 3, 70, 70), (1, 1, 1, 1), (5, 1, 33, 40), (3, 2, 0, 4)], ids=str
)
def test_moved_integers_are_exact(shape, dtype):
    tokens, rows, gates, *places = moved(*shape, dtype)
    expected = moves(tokens, rows, gates, places, "reference")
    for value, truth in zip(moves(tokens, rows, gates, places, "triton"), expected, strict=True):
        assert value.dtype == truth.dtype and torch.equal(value, truth)


def test_moved_rows_may_be_strided():
    tokens, rows, gates, *places = moved(20, 3, 70, 70, torch.float32)
    expected = moves(tokens, rows, gates, places, "reference")
    variants = {
        "columns": (tokens.T.contiguous().T, rows.T.contiguous().T, gates.T.contiguous().T),
        "parts": (torch.cat([tokens, tokens], 1)[:, :70], torch.cat([rows, rows], 1)[:, :70], gates),
        "every other": (tokens.repeat_interleave(2, 1)[:, ::2], rows.repeat_interleave(2, 0)[::2], gates),
    }
    for name, given in variants.items():
        for value, truth in zip(moves(*given, places, "triton"), expected, strict=True):
            assert torch.equal(value, truth), name


def test_what_has_no_place_is_not_read():
    tokens, rows, gates, slots, order = moved(20, 3, 70, 90, torch.float32)
    clean = moves(tokens, rows, gates, (slots, order), "triton")
    rows[order < 0] = NAN
    gates[slots < 0] = NAN
    tokens[(slots < 0).all(1)] = NAN
    for value, truth in zip(moves(tokens, rows, gates, (slots, order), "triton"), clean, strict=True):
        assert torch.equal(value, truth)


def test_nan_does_not_come_back_where_a_choice_was_dropped():
    """Not through its gate, and not through a token that has another row."""
    tokens, rows, gates, slots, order = moved(20, 3, 70, 40, torch.float32)
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
