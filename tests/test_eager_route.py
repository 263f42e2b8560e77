"""`route` of plain tensors on the CPU in C++ with its node: the operator's bits, and the operator where it must be."""

import pytest
import torch
from pairwise import pairwise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_ops import route
from contrastive_ops.core import eager, operators
from contrastive_ops.moe import SparseMoE
from contrastive_ops.ops import Capacity, Gating, RouterLoss, expert_routing

pytestmark = pytest.mark.skipif(eager.reason() is not None, reason=str(eager.reason()))

NODE = "RouteBackward"
TOKENS, EXPERTS = 70, 12
LOSSES = ("importance", RouterLoss("switch", 0.5), RouterLoss("global_entropy", [0.1, 0.2, 0.0], 2.0), "z")
GATINGS = {
    "plain": Gating(),
    "renormalized": Gating(renormalize=True),
    "sigmoid": Gating(score="sigmoid", bias=torch.linspace(-1, 1, EXPERTS)),
    "groups": Gating(expert_groups=4, kept_groups=2, group_score="max"),
    "noise": Gating(noise_std=1.0),
}
LABELS = {
    "none": {},
    "segments": {"segments": torch.arange(TOKENS) % 3, "num_segments": 3},
    "valid": {"valid": torch.arange(TOKENS) % 5 > 0},
    "mask": {"allowed": (torch.arange(TOKENS * EXPERTS) % 7 > 1).view(TOKENS, EXPERTS)},
    "given": {"allowed": torch.stack([torch.arange(TOKENS) % EXPERTS, torch.arange(TOKENS) % 5 + 6], 1)},
}
CAPACITIES = {
    "none": None,
    "factor": 0.8,
    "padded": Capacity(limit=3, group_size=TOKENS // 2, padded=True),
}


def leaf(dtype=torch.float32, rows=TOKENS):
    torch.manual_seed(0)
    return torch.randn(rows, EXPERTS).to(dtype).requires_grad_()


def both_ways(call):
    """What `call` returns without and with the operators; both draw the same noise."""
    torch.manual_seed(1)
    found = call()
    torch.manual_seed(1)
    with eager.closed():
        return found, call()


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def tensors_of(routing):
    whole = [routing.experts, routing.gates, routing.slots, routing.order, routing.offsets, routing.loss]
    return [*whole, routing.sums, routing.counts, *routing.losses.values(), *routing.metrics.values()]


def made_by(routing):
    return None if routing.gates.grad_fn is None else routing.gates.grad_fn.name()


@pairwise(
    dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float16],
    gating=GATINGS,
    labels=LABELS,
    capacity=CAPACITIES,
    priority=["gate", "position"],
    losses=[False, True],
    k=[1, 2],
)
def test_the_same_bits(dtype, gating, labels, capacity, priority, losses, k):
    logits, options = leaf(dtype), dict(LABELS[labels])
    if "allowed" in options and options["allowed"].dtype == torch.int64:
        options["allowed"] = options["allowed"][:, :k]
    wanted = LOSSES if "segments" in options else ("importance", "switch", "z", "local_entropy")
    options |= {"gating": GATINGS[gating], "capacity": CAPACITIES[capacity], "priority": priority}

    def call():
        routing = route(logits, k, losses=wanted if losses else (), **options)
        upstream = torch.linspace(-1, 1, routing.gates.numel(), dtype=routing.gates.dtype).view_as(routing.gates)
        outputs = [(routing.gates, upstream)] if routing.gates.requires_grad else []
        outputs += [(loss, torch.ones_like(loss)) for loss in (*routing.losses.values(), routing.loss) if losses]
        found = []
        for pairs in (outputs, outputs[:1], outputs[-1:]):
            each, d = zip(*pairs, strict=True)
            found += torch.autograd.grad(each, logits, d, retain_graph=True)
        return operator_of(routing), [*tensors_of(routing), *found]

    (node, got), (operator, expected) = both_ways(call)
    assert node == NODE != operator
    assert_same(got, expected)


def operator_of(routing):
    """The name of the node that has the gates; with one choice they may have been replaced."""
    node = routing.gates.grad_fn
    while node.name() not in (NODE, "expert_routing_routeBackward"):
        (node,) = {next_node for next_node, _ in node.next_functions if next_node is not None}
    return node.name()


def test_large_numbers_are_cast_in_parts():
    """Gradients of 16-bit logits, and checks of many choices."""
    logits = leaf(torch.bfloat16, rows=40_000)

    def call():
        routing = route(logits, 2, losses=("z",))
        return torch.autograd.grad((routing.gates.sum(), routing.loss), logits)

    assert_same(*both_ways(call))


def test_without_gradients():
    logits = leaf()
    with torch.no_grad():
        got, expected = both_ways(lambda: tensors_of(route(logits, 2, losses=("z",))))
    assert not any(each.requires_grad for each in got)
    assert_same(got, expected)
    routing = route(logits, 2)
    assert routing.gates.requires_grad and not routing.loss.requires_grad
    assert not any(each.requires_grad for each in (routing.experts, routing.slots, routing.sums, routing.counts))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_tokens_and_one(rows):
    logits = leaf(rows=rows)

    def call():
        routing = route(logits, 2, losses=("switch", "z"), capacity=1.0)
        return [*tensors_of(routing), *torch.autograd.grad((routing.gates.sum(), routing.loss), logits)]

    assert_same(*both_ways(call))


@pytest.mark.parametrize("gating", ["plain", "renormalized", "sigmoid"])
def test_second_derivatives(gating):
    logits = leaf(torch.float64)

    def call():
        routing = route(logits, 2, losses=("switch", "z"), gating=GATINGS[gating])
        (first,) = torch.autograd.grad(routing.gates.square().sum() + routing.loss, logits, create_graph=True)
        return torch.autograd.grad(first.square().sum(), logits)

    got, expected = both_ways(call)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_upstream_gradients_in_any_layout():
    logits = leaf()

    def call():
        gates = route(logits, 2).gates
        strided = torch.arange(2.0 * TOKENS).view(2, TOKENS).t()
        found = [torch.autograd.grad(gates, logits, d, retain_graph=True) for d in (strided, torch.ones_like(gates))]
        return [each for (each,) in found] + list(torch.autograd.grad(gates.sum(), logits))

    assert_same(*both_ways(call))


def test_a_graph_is_used_once_and_its_inputs_are_not_changed():
    logits = leaf()
    scaled = logits * 2
    gates = route(scaled, 2).gates
    gates.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        gates.sum().backward()
    scaled = logits * 2
    gates = route(scaled, 2).gates
    scaled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gates.sum().backward()


def test_what_is_kept_passes_hooks():
    """Activation checkpointing and offloading see what is saved, and choices that a hook has spoiled are refused."""
    logits, packed = leaf(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        gates = route(logits, 2).gates
    assert any(each.data_ptr() == logits.data_ptr() for each in packed)
    assert_same(torch.autograd.grad(gates.sum(), logits), torch.autograd.grad(route(logits, 2).gates.sum(), logits))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t + 99 if t.dtype == torch.int64 else t):
        gates = route(logits, 2).gates
    with pytest.raises((RuntimeError, ValueError), match=r"must be in \[-1, 12\)"):
        gates.sum().backward()


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Tensor(torch.Tensor):
    pass


def _under(context):
    def call(logits):
        with context():
            return made_by(route(logits, 2))

    return call


@pytest.mark.parametrize(
    "call",
    [
        _under(lambda: torch.autocast("cpu")),
        _under(_Dispatch),
        _under(lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])),
        lambda logits: made_by(route(logits.as_subclass(_Tensor), 2)),
        lambda logits: made_by(route(logits, 2, backend="reference")),
        lambda logits: type(torch.compile(lambda x: route(x, 2).gates, backend="eager")(logits).grad_fn).__name__,
    ],
    ids=["autocast", "dispatch mode", "profiler", "subclass", "reference", "compile"],
)
def test_calls_that_go_by_the_operator(call):
    assert made_by(route(leaf(), 2)) == NODE
    assert call(leaf()) not in (NODE, None)


def test_transforms_and_fake_tensors_go_by_the_operator():
    logits = leaf()

    def total(x):
        return route(x, 2, losses=("z",)).loss

    numbers = logits.detach()
    torch.testing.assert_close(torch.func.grad(total)(numbers), torch.autograd.grad(total(logits), logits)[0])
    with FakeTensorMode() as mode:
        assert type(route(mode.from_tensor(numbers), 2).gates).__name__ == "FakeTensor"
    assert route(numbers.to("meta"), 2).gates.is_meta
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: route(x, 2).gates, (numbers,), (torch.ones_like(numbers),))


def test_what_does_not_fit_is_worded_by_the_operator():
    """Of arguments that Python has not checked; nothing is read or written outside of memory."""
    run = operators.call.expert_routing_route
    arguments = [leaf(), *(None,) * 6, [2, 0, 0, 1, 1, 0, 1, 0], 0.0, [EXPERTS, TOKENS, -1, 0, 1], False, [], [], "cpu"]
    assert run(*arguments)[1].grad_fn.name() == NODE
    for place, wrong in ((7, [20, 0, 0, 1, 1, 0, 1, 0]), (9, [5, TOKENS, -1, 0, 1]), (11, [0, 0, 1]), (4, leaf())):
        with pytest.raises((ValueError, TypeError)):
            run(*arguments[:place], wrong, *arguments[place + 1 :])
    with pytest.raises(ValueError, match=r"experts must be in \[-1, 12\), got 12"):
        run(*arguments[:4], torch.full((TOKENS, 2), EXPERTS), *arguments[5:])


@pytest.mark.parametrize(
    ("k", "options"),
    [
        (True, {}),
        (torch.tensor(2), {}),
        (2, {"capacity": torch.tensor(1.0)}),
        (2, {"capacity": True}),
        (2, {"losses": [RouterLoss("z", [0.5])]}),
        (2, {"losses": [RouterLoss("z", torch.tensor(0.5))]}),
        (2, {"losses": "z"}),
        (2, {"losses": ["load"]}),
        (2, {"priority": ["gate"]}),
        (20, {}),
    ],
)
def test_options_that_are_not_usual(k, options):
    """Equal to others, but of another kind; or that may change, or do not fit: as without the module, said the same."""
    route(leaf(), 1, capacity=1), route(leaf(), 2, losses=("z",))  # what these come to is known

    def call():
        try:
            return tensors_of(route(leaf(), k, **options))
        except (TypeError, ValueError) as error:
            return [str(error)]

    got, expected = both_ways(call)
    assert_same(got, expected) if isinstance(got[0], torch.Tensor) else got == expected or pytest.fail(str(got))


def test_without_the_module(monkeypatch):
    """As with the operator, which is what there is then."""
    logits = leaf()
    expected = tensors_of(route(logits, 2, losses=("z",)))
    monkeypatch.setattr(eager, "_closed", True)
    routing = route(logits, 2, losses=("z",))
    assert made_by(routing) != NODE
    assert_same(tensors_of(routing), expected)


def test_a_layer_of_experts_takes_it():
    layer = SparseMoE(16, 8, 4, 2)
    _, routing = layer(torch.randn(10, 16))
    assert made_by(routing) == NODE and expert_routing.BACKENDS["cpu"].unsupported(routing.gates) == []
