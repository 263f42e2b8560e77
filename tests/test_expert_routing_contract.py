"""What routing promises whatever is asked: the same bits, tracing, meta tensors; and clear refusals."""

import pytest
import torch
import torch._dynamo.testing

from contrastive_ops import route
from contrastive_ops.core.routing import ScoreSpec, SlotSpec
from contrastive_ops.ops import Capacity, Gating, RouterLoss, combine, dispatch, expert_choice
from contrastive_ops.ops.router_losses import encode

OPS = torch.ops.contrastive_ops
LOSSES = ["importance", "load", "switch", "z", "local_entropy", RouterLoss("global_entropy", 0.3, threshold=5.0)]
NOISY = Gating(noise_std=1.0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(tokens, experts, k, backend, dtype=torch.float32):
    """All decisions, losses, metrics and gradients of a layer with every loss."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(tokens, experts, generator=generator).to(dtype).requires_grad_()
    x = torch.randn(tokens, 24, generator=generator).to(dtype).requires_grad_()
    routing = route(
        logits,
        k,
        capacity=1.1,
        gating=NOISY,
        segments=torch.arange(tokens) % 3,
        num_segments=3,
        losses=LOSSES,
        generator=generator,
        backend=backend,
    )
    out = combine(dispatch(x, routing, backend=backend).sin(), routing, backend=backend)
    gradients = torch.autograd.grad(out.float().square().sum() + routing.loss, (logits, x))
    whole = (routing.experts, routing.gates, routing.slots, routing.order, routing.offsets, out, routing.loss)
    return [*whole, *routing.losses.values(), *routing.metrics.values(), *gradients]


def assert_same_bits(found, expected):
    for value, truth in zip(found, expected, strict=True):
        assert torch.equal(value.nan_to_num(7.0), truth.nan_to_num(7.0))


def test_a_hundred_runs_give_the_same_bits(backend):
    first = everything(300, 13, 2, backend)
    for _ in range(100):
        assert_same_bits(everything(300, 13, 2, backend), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, threads):
    first = None
    for count in (1, 2, 3, 16, 2):
        threads(count)
        found = everything(20_011, 32, 2, "cpu", dtype)
        first = first or found
        assert_same_bits(found, first)


def test_noise_of_an_earlier_pass(backend):
    """Given noise is what would be drawn, in every dtype; two passes over chunks decide as one over all tokens."""
    logits, noise = torch.randn(40, 6), torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    drawn = route(logits, 2, gating=NOISY, generator=torch.Generator().manual_seed(2), backend=backend)
    given = route(logits, 2, gating=NOISY, noise=noise.double(), backend=backend)
    assert torch.equal(given.experts, drawn.experts) and torch.equal(given.gates, drawn.gates)
    parts = [route(logits[r], 2, gating=NOISY, noise=noise[r], backend=backend) for r in (slice(25), slice(25, 40))]
    assert torch.equal(torch.cat([part.experts for part in parts]), drawn.experts)
    assert torch.equal(torch.cat([part.gates for part in parts]), drawn.gates)
    chosen = expert_choice(logits, 3, gating=NOISY, noise=noise, backend=backend)
    again = expert_choice(logits, 3, gating=NOISY, generator=torch.Generator().manual_seed(2), backend=backend)
    assert torch.equal(chosen.experts, again.experts)


# ---- Operators -------------------------------------------------------------------------------------------------------


def scores_arguments(backend):
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    noise, segment = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 2
    allowed, valid = torch.rand(9, 5) < 0.8, torch.arange(9) != 4
    spec = list(ScoreSpec(2, 0, 0, 1, 1, 0, 2, 1))
    return (logits, noise, None, allowed), (segment, valid, spec, 0.3), backend


def test_opcheck_of_a_whole_router(backend):
    problem, rules, _ = scores_arguments(backend)
    losses = encode([RouterLoss("load"), RouterLoss("z", [0.5, 2.0]), RouterLoss("global_entropy", threshold=1.0)])
    places = list(SlotSpec(5, 9, 3, 0, 2))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*problem, None, *rules, places, True, *losses, backend)
    torch.library.opcheck(OPS.expert_routing_route, arguments, test_utils=checks)
    experts, gates, *_, values, total, sums, counts = OPS.expert_routing_route(*arguments)
    assert values.shape == (6,) and values.requires_grad and total.requires_grad and not sums.requires_grad
    for upstream in ((gates, values, total), (gates, None, None), (None, None, total)):
        upstream = [None if t is None else torch.randn_like(t).detach() for t in upstream]
        arguments = (problem[0].detach(), *problem[1:], *rules, *losses, experts, sums, counts, *upstream, backend)
        torch.library.opcheck(OPS.expert_routing_route_backward, arguments, test_utils=checks)


def test_opcheck(backend):
    problem, rules, _ = scores_arguments(backend)
    # AOT autograd as this check runs it adds integers and numbers; the compiled functions below are traced by it.
    # The second derivative runs through the reference, which it has no need to trace.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.expert_routing_scores, (*problem, None, *rules, backend), test_utils=checks)
    experts, gates, priority, sums, totals, *_ = OPS.expert_routing_scores(*problem, None, *rules, backend)
    upstream = [torch.randn_like(t).detach().requires_grad_() for t in (gates, sums, totals)]
    torch.library.opcheck(
        OPS.expert_routing_scores_backward, (*problem, *rules, experts, *upstream, backend), test_utils=checks
    )
    spec = list(SlotSpec(5, 9, 3, 0, 2))
    torch.library.opcheck(OPS.expert_routing_slots, (experts, priority.detach(), rules[0], spec, backend))
    slots, order, *_ = OPS.expert_routing_slots(experts, priority.detach(), rules[0], spec, backend)
    tokens = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(order), 4, dtype=torch.float64, requires_grad=True)
    weights = gates.detach().requires_grad_()
    torch.library.opcheck(OPS.expert_routing_dispatch, (tokens, None, slots, order, backend))
    torch.library.opcheck(OPS.expert_routing_combine, (rows, weights, slots, order, backend))
    torch.library.opcheck(OPS.expert_routing_dots, (tokens, rows, slots, order, backend))


@pytest.mark.parametrize("chooses", ["tokens", "experts"])
def test_compiles_without_graph_break_or_recompilation(chooses, backend):
    counter, frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), None
    torch._dynamo.reset()
    losses = [loss for loss in LOSSES if loss != "load"]

    def function(logits, x, segments):
        options = {"segments": segments, "num_segments": 2, "losses": losses, "backend": backend}
        if chooses == "tokens":
            routing = route(logits, 2, capacity=1.25, **options)
        else:
            routing = expert_choice(logits, 1.0, **options)
        out = combine(dispatch(x, routing, backend=backend), routing, backend=backend)
        return out.square().sum() + routing.loss, routing.metrics["success_rate"]

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=None)
    for tokens in (30, 50, 41, 97):
        logits, x = torch.randn(tokens, 6, requires_grad=True), torch.randn(tokens, 8, requires_grad=True)
        for tensor in (logits, x):
            torch._dynamo.mark_dynamic(tensor, 0)
        segments = torch.arange(tokens) % 2
        torch._dynamo.mark_dynamic(segments, 0)
        (value, rate), (expected, expected_rate) = compiled(logits, x, segments), function(logits, x, segments)
        torch.testing.assert_close((value, rate), (expected, expected_rate))
        torch.testing.assert_close(*(torch.autograd.grad(v, (logits, x)) for v in (value, expected)))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


def test_meta_tensors():
    logits = torch.empty(12, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    x = torch.empty(12, 4, device="meta", requires_grad=True)
    segments = torch.empty(12, device="meta", dtype=torch.int64)
    routing = route(
        logits, 2, capacity=3, segments=segments, num_segments=2, losses=["importance"], backend="reference"
    )
    assert routing.experts.shape == (12, 2) and routing.order.shape == (15,) and routing.offsets.shape == (6,)
    assert routing.losses["importance"].shape == (2,) and routing.gates.dtype == torch.float32
    out = combine(dispatch(x, routing, backend="reference"), routing, backend="reference")
    for gradient, leaf in zip(torch.autograd.grad(out.sum() + routing.loss, (logits, x)), (logits, x), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype


# ---- Bad input -------------------------------------------------------------------------------------------------------

LOGITS = torch.zeros(6, 4)
FLAGS = torch.ones(6, dtype=torch.bool)
BAD = {
    "logits are a list": ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
    "logits of integers": ({"logits": LOGITS.long()}, TypeError, "logits must be float32"),
    "logits of one dimension": ({"logits": LOGITS[0]}, ValueError, "logits must have two dimensions"),
    "k of 0": ({"k": 0}, ValueError, "k must be at least 1, got 0"),
    "k is a float": ({"k": 1.0}, TypeError, "k must be an int, got float"),
    "k above E": ({"k": 5}, ValueError, "k must be at most the number of experts, got k=5 and 4 experts"),
    "unknown priority": ({"priority": "random"}, ValueError, "priority must be one of"),
    "negative capacity": ({"capacity": -1}, ValueError, "capacity.limit must be at least 0, got -1"),
    "infinite capacity": ({"capacity": torch.inf}, ValueError, "capacity.factor must be in"),
    "capacity is a word": ({"capacity": "all"}, TypeError, "capacity must be an int, a float, Capacity or None"),
    "capacity twice": (
        {"capacity": Capacity(factor=1.0, limit=2)},
        ValueError,
        "must have a factor or a limit, got both",
    ),
    "padded without capacity": ({"capacity": Capacity(padded=True)}, ValueError, "factor or a limit to be padded"),
    "groups that do not fit": ({"capacity": Capacity(limit=2, group_size=4)}, ValueError, "group_size must divide"),
    "rounded to multiples of 0": ({"capacity": Capacity(limit=2, multiple_of=0)}, ValueError, "multiple_of must be"),
    "limit is a float": ({"capacity": Capacity(limit=2.5)}, TypeError, "capacity.limit must be an int, got float"),
    "gating is a dict": ({"gating": {}}, TypeError, "gating must be Gating, got dict"),
    "unknown score": ({"gating": Gating(score="relu")}, ValueError, "gating.score must be one of"),
    "negative noise": ({"gating": Gating(noise_std=-1.0)}, ValueError, "gating.noise_std must be in"),
    "noise of nan": ({"gating": Gating(noise_std=torch.nan)}, ValueError, "gating.noise_std must be in"),
    "bias of another size": (
        {"gating": Gating(bias=torch.zeros(3))},
        ValueError,
        r"gating.bias must have shape \(4,\)",
    ),
    "groups of experts that do not fit": ({"gating": Gating(expert_groups=3)}, ValueError, "expert_groups must divide"),
    "too many kept groups": ({"gating": Gating(expert_groups=2, kept_groups=3)}, ValueError, "kept_groups must be in"),
    "k above the kept groups": (
        {"gating": Gating(expert_groups=4, kept_groups=1), "k": 2},
        ValueError,
        "k must be at most the number of experts that may be chosen",
    ),
    "segments of float32": ({"segments": FLAGS.float()}, TypeError, "segments must be int64"),
    "segments of another size": ({"segments": FLAGS.long()[:5]}, ValueError, r"segments must have shape \(6,\)"),
    "segments out of range": ({"segments": FLAGS.long(), "num_segments": 1}, ValueError, "segments must be in"),
    "negative segments": ({"segments": -FLAGS.long(), "num_segments": 2}, ValueError, "segments must be in"),
    "number of segments alone": ({"num_segments": 2}, ValueError, "segments must be given for num_segments=2"),
    "valid of floats": ({"valid": FLAGS.float()}, TypeError, "valid must be bool"),
    "allowed of floats": ({"allowed": LOGITS}, TypeError, r"allowed must be bool \(T, E\), or int64 \(T, k\)"),
    "allowed of another shape": ({"allowed": FLAGS}, ValueError, r"allowed must have shape \(6, 4\)"),
    "allowed out of range": ({"allowed": torch.full((6,), 4)}, ValueError, "allowed must be"),
    "elsewhere": ({"valid": FLAGS.to("meta")}, ValueError, "valid must be on the same device as logits"),
    "noise for a router without": ({"noise": LOGITS}, ValueError, "noise must be None without gating.noise_std"),
    "noise of another shape": ({"noise": LOGITS[:3], "gating": NOISY}, ValueError, r"noise must have shape \(6, 4\)"),
    "noise is a number": ({"noise": 1.0, "gating": NOISY}, TypeError, "noise must be a tensor, got float"),
    "noise of integers": ({"noise": LOGITS.long(), "gating": NOISY}, TypeError, "noise must be float"),
    "unknown loss": ({"losses": ["entropy"]}, ValueError, "RouterLoss: name must be one of"),
    "a loss twice": ({"losses": ["z", "z"]}, ValueError, "losses must differ in name or in pooled"),
    "losses are a name": ({"losses": "z"}, TypeError, "losses must be a list of names and RouterLoss"),
    "losses of numbers": ({"losses": [1.0]}, TypeError, "losses must be names and RouterLoss, got float"),
    "load without noise": ({"losses": ["load"]}, ValueError, 'losses must not have "load" without noise'),
    "weights of other segments": (
        {"losses": [RouterLoss("z", weight=[1.0, 2.0])]},
        ValueError,
        "losses must have one weight and threshold",
    ),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message if message.startswith("RouterLoss") else f"route: {message}|{message}"):
        route(**{"logits": LOGITS, "k": 1, **change})


def test_a_threshold_is_for_the_global_entropy():
    with pytest.raises(ValueError, match="RouterLoss: threshold must be None for 'z', got 1.0"):
        RouterLoss("z", threshold=1.0)


def test_rows_that_do_not_fit():
    routing = route(torch.randn(6, 4), 2)
    with pytest.raises(ValueError, match=r"dispatch: tokens must have 6 rows as the routing has, got \(5, 3\)"):
        dispatch(torch.zeros(5, 3), routing)
    with pytest.raises(ValueError, match=r"combine: rows must have 12 rows as the routing has, got \(6, 3\)"):
        combine(torch.zeros(6, 3), routing)
    with pytest.raises(TypeError, match="combine: rows must be float32"):
        combine(torch.zeros(12, 3).long(), routing)


def test_the_compiled_functions_protect_memory():
    """They check what addresses memory once more: a graph may run on other choices than it was traced with."""
    from contrastive_ops.core import extension

    if extension.why_missing() is not None:
        pytest.skip(extension.why_missing())
    functions = extension.functions("expert_routing")
    routing, tokens, rows = route(torch.randn(6, 4), 2), torch.zeros(6, 3), torch.zeros(12, 3)
    for slots, order in ((routing.slots + 12, routing.order), (routing.slots, routing.order + 12)):
        for call, arguments in (
            (functions.dispatch, (tokens, None, slots, order)),
            (functions.combine, (rows, None, slots, order)),
            (functions.dots, (tokens, rows, slots, order)),
        ):
            with pytest.raises(ValueError):
                call(*arguments)
    problem = (torch.randn(6, 4), None, None, None, None, None, None, list(ScoreSpec(2, 0, 0, 1, 1, 0, 1, 0)), 0.0)
    for places, losses, numbers in (
        (SlotSpec(5, 6, -1, 0, 1), [], []),  # of another number of experts
        (SlotSpec(4, 6, -1, 0, 1), [0, 0, 1, 0], []),  # without its weight
        (SlotSpec(4, 6, -1, 0, 1), [0, 0, 3, 0], [1.0] * 3),  # weights of other segments
        (SlotSpec(4, 6, -1, 0, 1), [6, 0, 1, 0], [1.0]),
    ):
        with pytest.raises(ValueError):
            functions.route(*problem, list(places), False, losses, numbers)
    with pytest.raises(ValueError):
        functions.slots(routing.experts + 4, None, None, list(SlotSpec(4, 6, 2, 0, 1)))
