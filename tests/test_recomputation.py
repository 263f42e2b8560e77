"""What other programs do with results and layers: checkpointing, export, tracing with other sizes, no tokens at all.

Randomised functions are found by their argument `generator`.
"""

import dataclasses
import inspect

import pytest
import torch
import torch._dynamo.testing
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import contrastive_ops
from contrastive_ops import Pairs, info_nce, route, similarity_reduce, similarity_topk
from contrastive_ops.losses import UnigramSampler, group_whiten
from contrastive_ops.mining import HardNegatives
from contrastive_ops.moe import ExpertChoice, SoftMoE, SparseMoE
from contrastive_ops.ops import (
    Gating,
    Guide,
    Routing,
    TokenSets,
    combine,
    dispatch,
    expert_choice,
    grouped_matmul,
    maxsim,
    similarity_values,
    stream_rows,
)

NOISY, SAMPLED = Gating(noise_std=2.0), Gating(noise_std=2.0, sampled=True)
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))


def _sampled(x, **options):
    sampler = UnigramSampler(torch.arange(1, 21))
    negatives = sampler(torch.arange(12), 5, **options)
    return (x[:, None] * TABLE[negatives]).sum(2).square()


def _dropped(routing):
    return routing.gates * routing.kept


RANDOM = {
    "route": lambda x, **options: _dropped(route(x, 2, capacity=5, gating=SAMPLED, **options)),
    "expert_choice": lambda x, **options: expert_choice(x, 2, gating=NOISY, **options).gates,
    "SparseMoE": lambda x, **options: LAYERS["SparseMoE"](x, **options)[0],
    "ExpertChoice": lambda x, **options: LAYERS["ExpertChoice"](x, **options)[0],
    "group_whiten": lambda x, **options: group_whiten(x, 2, shuffle=True, **options),
    "UnigramSampler": _sampled,
}
LAYERS = {
    "SparseMoE": SparseMoE(
        4, 8, 4, 2, router={"gating": SAMPLED, "jitter": 0.5, "learned_noise": True, "expert_dropout": 0.4}
    ),
    "ExpertChoice": ExpertChoice(4, 8, 4, router={"gating": NOISY}),
    "SoftMoE": SoftMoE(4, 8, 4),
}
every_random = pytest.mark.parametrize("name", RANDOM)
both_kinds = pytest.mark.parametrize("use_reentrant", [False, True])


def test_every_randomised_function_is_here():
    names = ("losses", "ops", "moe", "mining", "decoding")
    spaces = [getattr(contrastive_ops, name) for name in names]
    found = set()
    for space in spaces:
        for name, thing in vars(space).items():
            function = getattr(thing, "forward", thing)
            if inspect.isfunction(function) and "generator" in inspect.signature(function).parameters:
                found.add(name)
    assert found == set(RANDOM)


def _gradient(run):
    torch.manual_seed(7)
    x = X.clone().requires_grad_()
    out = run(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0] if out.requires_grad else None


def _backward(run):
    torch.manual_seed(7)
    x = X.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return out.detach(), x.grad


@every_random
@both_kinds
def test_checkpointing_repeats_draws(name, use_reentrant):
    function = RANDOM[name]
    expected, dx = _backward(function)
    out, again = _backward(lambda x: checkpoint(function, x, use_reentrant=use_reentrant))
    assert torch.equal(out, expected) and torch.equal(again, dx)


@every_random
@both_kinds
def test_a_generator_of_the_caller_is_refused_when_computing_again(name, use_reentrant):
    seed = 1000 + list(RANDOM).index(name)  # of its own: what was drawn from once counts as set back
    generator = torch.Generator().manual_seed(seed)

    def function(x):
        return RANDOM[name](x, generator=generator)

    expected, _ = _backward(function)  # without checkpointing as ever
    generator.manual_seed(seed)
    x = X.clone().requires_grad_()
    out = checkpoint(function, x, use_reentrant=use_reentrant)
    assert torch.equal(out, expected)
    with pytest.raises(NotImplementedError, match=r"generator must be None where activation checkpointing"):
        out.square().sum().backward()
    with pytest.raises(TypeError, match="generator must be a torch.Generator or None, got int"):
        RANDOM[name](X, generator=3)


@every_random
def test_draws_are_traced_for_any_batch(name):
    counter = torch._dynamo.testing.CompileCounter()
    if name == "UnigramSampler":  # has one avoided word for each row
        sampler = UnigramSampler(torch.arange(1, 21))
        compiled = torch.compile(lambda x: sampler(x[:, 0].long().clamp(0, 19), 5), fullgraph=True, backend=counter)
    else:
        compiled = torch.compile(RANDOM[name], fullgraph=True, backend=counter)
    for rows in (12, 8, 16):
        assert compiled(torch.randn(rows, 4)).shape[0] == rows
    assert counter.frame_count <= 2


def test_stream_rows_repeats_draws():
    def function(x):
        return stream_rows(lambda logits, rows: (logits * torch.rand_like(logits)).sum(1), x, chunk_rows=5)

    expected = _backward(function)
    for use_reentrant in (False, True):
        out, dx = _backward(lambda x, kind=use_reentrant: checkpoint(function, x, use_reentrant=kind))
        assert torch.equal(out, expected[0]) and torch.equal(dx, expected[1])


# ---- Losses inside of results ----------------------------------------------------------------------------------------


BALANCED = SparseMoE(4, 8, 4, 2, router={"gating": NOISY, "losses": ["switch"]})


def _router_gradient(run, x=X):
    layer = BALANCED
    layer.zero_grad()
    torch.manual_seed(7)
    out, loss = run(layer, x.clone().requires_grad_())
    (out.square().mean() + loss).backward()
    return layer.gate.weight.grad.clone()


def test_the_balance_loss_of_a_checkpointed_layer():
    def plain(layer, x):
        out, routing = layer(x)
        return out, routing.loss

    expected = _router_gradient(plain)

    def not_reentrant(layer, x):
        out, routing = checkpoint(layer, x, use_reentrant=False)
        return out, routing.loss

    assert torch.equal(_router_gradient(not_reentrant), expected)
    # The loss as a tensor beside the output is seen by both kinds.
    for use_reentrant in (False, True):
        got = _router_gradient(lambda *given, kind=use_reentrant: checkpoint(plain, *given, use_reentrant=kind))
        assert torch.equal(got, expected)


def test_a_hidden_loss_is_not_lost_in_silence():
    def hidden(layer, x):
        out, routing = checkpoint(layer, x, use_reentrant=True)
        return out, routing.loss

    with pytest.raises(NotImplementedError, match=r"^route: losses must not be hidden in a Routing.*\n.*routing.loss"):
        _router_gradient(hidden)

    def nested(layer, x):  # the kind that is nearer decides
        def block(x):
            out, routing = checkpoint(layer, x, use_reentrant=False)
            return out, routing.loss

        return checkpoint(block, x, use_reentrant=True)

    assert torch.equal(
        _router_gradient(nested), _router_gradient(lambda layer, x: (lambda o, r: (o, r.loss))(*layer(x)))
    )


# ---- Results as pytrees ----------------------------------------------------------------------------------------------


def _results():
    routing = route(X, 2, losses=["switch"])
    yield routing
    yield TokenSets(X.view(3, 4, 4), torch.ones(3, 4, dtype=torch.bool))
    yield Pairs(diagonal=1, below=torch.ones(12), guide=Guide(X, None, 0.5))
    yield similarity_topk(X, k=2)
    yield similarity_reduce(X, TABLE, dim=(0, 1), reduce=("max", "logsumexp"))
    yield info_nce(X, X, diagnostics=True)[1]
    fields = {each.name: None for each in dataclasses.fields(HardNegatives)}
    yield HardNegatives(**{**fields, "indices": torch.zeros(2, 3)})


@pytest.mark.parametrize("value", list(_results()), ids=lambda value: type(value).__name__)
def test_results_are_pytrees(value):
    children, spec = _pytree.tree_flatten(value)
    assert any(isinstance(each, torch.Tensor) for each in children)
    again = _pytree.tree_unflatten(children, spec)
    assert type(again) is type(value)
    assert [id(each) for each in _pytree.tree_leaves(again)] == [id(each) for each in children]
    doubled = _pytree.tree_map(lambda leaf: leaf.to(torch.float64) if isinstance(leaf, torch.Tensor) else leaf, value)
    assert type(doubled) is type(value)
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec


OPTIONS = ("Gating", "Fold", "Coarse", "Sampling", "NegativeRules")  # are given, never returned


def test_every_result_is_a_pytree():
    """Public functions return tensors, named tuples and registered dataclasses."""
    for space in (contrastive_ops, contrastive_ops.ops, contrastive_ops.mining, contrastive_ops.losses):
        for name, thing in vars(space).items():
            holds = dataclasses.is_dataclass(thing) and any("Tensor" in str(f.type) for f in dataclasses.fields(thing))
            if (
                inspect.isclass(thing)
                and holds
                and name not in ("Gating", "Fold", "Coarse", "Sampling", "NegativeRules")
            ):
                assert thing in _pytree.SUPPORTED_NODES, name


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


EXPORTED = {
    "info_nce": lambda x: info_nce(x, x),
    "similarity_topk": lambda x: similarity_topk(x, k=3),
    "similarity_reduce": lambda x: similarity_reduce(x, x, dim=(0, 1)),
    "similarity_values": lambda x: similarity_values(x, TABLE),
    "maxsim": lambda x: maxsim(x[:, None], x[:, None]),
    "route": lambda x: route(x, 2, losses=["switch", "z"]),
    "route with a capacity": lambda x: route(x, 2, capacity=1.25, gating=Gating(noise_std=1.0)),
    "route padded": lambda x: dispatch(x, route(x, 2, capacity=4)),
    "expert_choice": lambda x: expert_choice(x, 1.0),
    "grouped_matmul": lambda x: (lambda r: combine(grouped_matmul(x, TABLE.view(4, 4, 5), r), r))(route(x, 2)),
    "SparseMoE": SparseMoE(4, 8, 4, 2, router={"losses": ["switch"], "capacity": 1.25}, shared=1),
    "ExpertChoice": ExpertChoice(4, 8, 4),
    "SoftMoE": SoftMoE(4, 8, 4),
    "sequences": lambda x: EXPORTED["SparseMoE"](x[:, None].expand(-1, 3, 4))[0],
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_export_with_any_number_of_tokens(name, strict, tmp_path):
    module = _Module(EXPORTED[name])
    tokens = torch.export.Dim("tokens", min=4, max=4096)
    program = torch.export.export(module, (torch.randn(20, 4),), dynamic_shapes=({0: tokens},), strict=strict)
    x = torch.randn(33, 4)
    got, expected = program.module()(x), module(x)
    assert type(got) is type(expected)
    if "noise" not in name and name != "route with a capacity":
        for each, right in zip(_pytree.tree_leaves(got), _pytree.tree_leaves(expected), strict=True):
            assert right is None or torch.equal(each, right) or bool(right.isnan().any())


# ---- No tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (0, 5, 4), (2, 0, 4)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_tokens(name, backend, shape):
    layer, x = LAYERS[name], torch.randn(shape, requires_grad=True)
    options = {}
    if name != "SoftMoE":
        lead = shape[:-1]
        options = {"segments": torch.zeros(lead, dtype=torch.int64), "num_segments": 2}
        options["allowed"] = torch.ones(*lead, 4, dtype=torch.bool)
    for given in ({}, options, {"valid": torch.ones(shape[:-1], dtype=torch.bool)}):
        layer.zero_grad()
        out = layer(x, backend=backend, **given)
        out = out if name == "SoftMoE" else out[0]
        assert out.shape == shape
        out.sum().backward()
        assert x.grad.shape == shape
        assert all(p.grad is None or not bool(p.grad.any()) for p in layer.parameters())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_functions_without_tokens(backend):
    logits = torch.randn(0, 4, requires_grad=True)
    losses = ["importance", "switch", "z", "local_entropy", "global_entropy", "load"]
    some = [
        route(logits, 2, losses=losses, gating=NOISY, backend=backend),
        route(logits, 1, capacity=1.5, segments=torch.zeros(0, dtype=torch.int64), backend=backend),
        route(logits, 1, allowed=torch.zeros(0, 1, dtype=torch.int64), backend=backend),
        expert_choice(logits, 1.0, losses=losses[:-1], backend=backend),
        expert_choice(logits, 2, backend=backend),
    ]
    for routing in some:
        assert isinstance(routing, Routing) and routing.gates.shape[0] == 0
        rows = dispatch(torch.randn(0, 8), routing, backend=backend)
        weights = torch.randn(4, 8, 8, requires_grad=True)
        out = combine(grouped_matmul(rows, weights, routing.offsets, backend=backend), routing, backend=backend)
        assert out.shape == (0, 8)
        (out.sum() + routing.loss).backward()
        assert weights.grad is None or not bool(weights.grad.any())
        assert logits.grad is None or logits.grad.shape == (0, 4)
