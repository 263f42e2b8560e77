"""Padding reaches nothing in layers of experts, whatever it holds; and what a causal model may use.

Layers are found in `contrastive_ops.moe`: all modules that route or mix tokens.
"""

import inspect

import pytest
import torch

from contrastive_ops import moe, route
from contrastive_ops.ops import Capacity, Gating, RouterLoss, expert_choice
from contrastive_ops.ops.expert_routing import BACKENDS

LOSSES = ["importance", "switch", "z", "local_entropy", "global_entropy"]
NOISY = {"gating": Gating(noise_std=1.0), "losses": [*LOSSES, "load"]}
SIGMOID = {"gating": Gating("sigmoid", renormalize=True), "losses": LOSSES, "balance": "sign"}
LAYERS = {
    "SparseMoE": lambda: moe.SparseMoE(8, 16, 4, 2, shared=1, router={"losses": LOSSES}),
    "SparseMoE k=1": lambda: moe.SparseMoE(8, 16, 4, 1, gated=True, router={"gating": Gating(renormalize=True)}),
    "SparseMoE noise": lambda: moe.SparseMoE(8, 16, 4, 2, bias=True, shared=2, router={"capacity": 0.7, **NOISY}),
    "SparseMoE sigmoid": lambda: moe.SparseMoE(8, 16, 4, 2, router={"priority": "position", "capacity": 3, **SIGMOID}),
    "SparseMoE padded": lambda: moe.SparseMoE(8, 16, 4, 2, router={"capacity": Capacity(factor=1.0, padded=True)}),
    "ExpertChoice": lambda: moe.ExpertChoice(8, 16, 4, 0.75, shared=1, router={"losses": LOSSES}),
    "ExpertChoice noise": lambda: moe.ExpertChoice(8, 16, 4, router={"gating": Gating(noise_std=1.0)}),
    "Router": lambda: moe.Router(8, 4, 2, losses=LOSSES),
    "SoftMoE": lambda: moe.SoftMoE(8, 16, 4, 2),
}
FILLINGS = (torch.nan, torch.inf, -torch.inf, 1e38)


def test_all_layers_are_here():
    layers = {
        name
        for name, each in inspect.getmembers(moe, inspect.isclass)
        if issubclass(each, torch.nn.Module) and name != "Experts"  # networks of rows, which see no padding
    }
    assert layers == {name.split()[0] for name in LAYERS}


def run(layer, x, valid, **labels):
    """The output, all losses, and the gradients of the tokens and of all parameters."""
    x = x.clone().requires_grad_()
    flat = isinstance(layer, moe.Router)
    found = layer(x.flatten(0, 1), valid=valid.flatten(), **labels) if flat else layer(x, valid=valid, **labels)
    out, routing = (found.gates, found) if flat else found if isinstance(found, tuple) else (found, None)
    total = (out * out.detach().cos()).sum() + (0.0 if routing is None else routing.loss)
    return [out.detach(), total.detach(), *torch.autograd.grad(total, [x, *layer.parameters()], allow_unused=True)]


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LAYERS)
def test_padding_reaches_nothing(name, backend):
    layer, valid = LAYERS[name](), torch.tensor([[True] * 4 + [False] * 2, [True] * 6, [False] * 6])
    if backend == "cpu" and BACKENDS["cpu"].unsupported(torch.zeros(1)):
        pytest.skip("no C++ extension")
    x, results = torch.randn(3, 6, 8), []
    for filling in (0.0, *FILLINGS):
        generator = {} if name == "SoftMoE" else {"generator": torch.Generator().manual_seed(0)}
        filled = x.masked_fill(~valid[..., None], filling)
        results.append(run(layer, filled, valid, backend=backend, **generator))
        assert all(each is None or each.isfinite().all() for each in results[-1])
        assert not results[-1][2][~valid].any()
    for each in results[1:]:
        assert_equal(each, results[0])


@pytest.mark.parametrize("name", [name for name in LAYERS if "noise" not in name])
def test_padding_reaches_nothing_compiled(name):
    layer, valid = LAYERS[name](), torch.rand(3, 6) < 0.7
    x = torch.randn(3, 6, 8)
    torch._dynamo.reset()
    call = torch.compile(lambda x: run(layer, x, valid)[:2], backend="aot_eager")
    clean, filled = (call(x.masked_fill(~valid[..., None], filling)) for filling in (0.0, torch.nan))
    assert_equal(filled, clean)

    def total(x):
        found = layer(x.flatten(0, 1), valid=valid.flatten()) if name == "Router" else layer(x, valid=valid)
        out = found.gates if name == "Router" else found[0] if isinstance(found, tuple) else found
        return out.square().sum()

    compiled = torch.compile(total, backend="aot_eager")
    grads = [
        torch.autograd.grad(compiled(x.masked_fill(~valid[..., None], f)), list(layer.parameters()), allow_unused=True)
        for f in (0.0, torch.nan)
    ]
    assert_equal(grads[1], grads[0])


@pytest.mark.parametrize("given", ["mask", "assignment"])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_token_without_an_expert_does_not_reach_the_router(given, shared):
    layer, x = moe.SparseMoE(8, 16, 4, 2, shared=shared, router={"losses": LOSSES}), torch.randn(1, 6, 8)
    allowed = torch.rand(1, 6, 4) < 0.7 if given == "mask" else torch.randint(4, (1, 6, 2))
    allowed[0, 2:4] = False if given == "mask" else -1
    grads = []
    for filling in (0.0, torch.nan):
        x[0, 2:4] = filling
        out, routing = layer(x, allowed=allowed)
        total = out[:, [0, 1, 4, 5]].square().sum() + routing.loss
        grads.append(torch.autograd.grad(total, [*layer.gate.parameters(), *layer.experts.parameters()]))
    assert_equal(grads[1], grads[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("choose", [route, expert_choice])
def test_labels_of_padding_are_not_looked_at(choose, backend):
    if backend == "cpu" and BACKENDS["cpu"].unsupported(torch.zeros(1)):
        pytest.skip("no C++ extension")
    valid = torch.rand(20) < 0.6
    logits, noise, segments = torch.randn(20, 4), torch.randn(20, 4), torch.randint(2, (20,))
    results = []
    for filling, label in ((0.0, 0), (torch.nan, -1), (torch.inf, 10**9)):
        z = logits.masked_fill(~valid[:, None], filling).requires_grad_()
        arguments = {
            "noise": noise.masked_fill(~valid[:, None], filling),
            "segments": segments.masked_fill(~valid, label),
            "allowed": torch.ones(20, 4, dtype=torch.bool).masked_fill(~valid[:, None], bool(label)),
        }
        found = choose(
            z, 2, gating=Gating(noise_std=1.0), num_segments=2, valid=valid, losses=LOSSES, backend=backend, **arguments
        )
        (dz,) = torch.autograd.grad(found.gates.square().sum() + found.loss, z)
        results.append([found.experts, found.gates.detach(), found.loss.detach(), dz, found.metrics["choices"]])
        assert dz.isfinite().all() and not dz[~valid].any()
    for each in results[1:]:
        assert_equal(each, results[0])
    given = torch.randint(4, (20, 2)).masked_fill(~valid[:, None], 10**9)
    assert (route(logits, 2, valid=valid, allowed=given, backend=backend).experts[~valid] == -1).all()


def test_a_loss_of_weight_0_reaches_nothing():
    logits, segments = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])
    logits[0] = torch.nan
    logits.requires_grad_()
    losses = [RouterLoss("z", [0.0, 1.0]), RouterLoss("importance", [0.0, 0.5]), RouterLoss("local_entropy", 0.0)]
    found = route(logits, 1, segments=segments, num_segments=2, losses=losses)
    (gradient,) = torch.autograd.grad(found.loss, logits)
    assert found.loss.isfinite() and gradient[3:].isfinite().all() and gradient[3:].any()


# ---- One expert per token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_only_gate_is_1_when_renormalised(backend, score, dtype):
    if backend == "cpu" and BACKENDS["cpu"].unsupported(torch.zeros(1)):
        pytest.skip("no C++ extension")
    logits = (100 * torch.randn(30, 4)).to(dtype)
    logits[3] = -torch.inf
    logits[4] = -300.0  # all sigmoids are 0
    logits.requires_grad_()
    given = torch.randint(-1, 4, (30, 1))
    for options in ({}, {"allowed": given}, {"allowed": torch.rand(30, 4) < 0.5}, {"capacity": 2}):
        routing = route(logits, 1, gating=Gating(score, renormalize=True), backend=backend, **options)
        plain = route(logits, 1, gating=Gating(score), backend=backend, **options)
        assert torch.equal(routing.experts, plain.experts) and torch.equal(routing.slots, plain.slots)
        assert torch.equal(routing.gates, (routing.experts >= 0).to(routing.gates.dtype))
        (gradient,) = torch.autograd.grad((routing.gates * torch.randn(30, 1)).sum(), logits)
        assert not gradient.any()
    broken = logits.detach().index_fill(0, torch.tensor([7]), torch.nan)
    gates = route(broken, 1, gating=Gating(score, renormalize=True), backend=backend).gates
    assert gates[7].isnan() and gates[8:].isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_of_one_expert_per_token(training):
    layer = moe.SparseMoE(8, 16, 4, router={"gating": Gating(renormalize=True), "losses": ["importance"]})
    layer.train(training)
    x = torch.randn(10, 8)
    out, routing = layer(x)
    for token, expert in enumerate(routing.experts[:, 0].tolist()):
        alone = layer.experts.up[expert] @ x[token]
        expected = layer.experts.down_proj[expert] @ torch.nn.functional.gelu(alone)
        torch.testing.assert_close(out[token], expected)
    assert not torch.autograd.grad(out.sum(), layer.gate.weight, retain_graph=True)[0].any()
    assert torch.autograd.grad(routing.loss, layer.gate.weight)[0].any()  # what the router learns from


# ---- Causal models -------------------------------------------------------------------------------------------------

CAUSAL = {
    "no capacity": (2, {}),
    "no capacity, noise": (2, {"gating": Gating(noise_std=1.0)}),
    "position": (1, {"capacity": 0.5, "priority": "position"}),
    "position, padded": (1, {"capacity": Capacity(limit=2, padded=True), "priority": "position"}),
}
NOT_CAUSAL = {
    "gate": lambda: moe.SparseMoE(8, 16, 4, 1, router={"capacity": 0.5}),
    "position, two choices": lambda: moe.SparseMoE(8, 16, 4, 2, router={"capacity": 0.5, "priority": "position"}),
    "expert choice": lambda: moe.ExpertChoice(8, 16, 4, 0.5),
    "soft": lambda: moe.SoftMoE(8, 16, 4),
}


def earlier(layer, x, changed):
    """Whether the outputs of the first half of a sequence are the same when the second half is another."""
    halves = []
    for tokens in (x, changed):
        torch.manual_seed(0)
        found = layer(tokens)
        halves.append((found[0] if isinstance(found, tuple) else found)[:, : x.shape[1] // 2])
    return torch.equal(*halves)


@pytest.mark.parametrize("name", [*CAUSAL, *NOT_CAUSAL])
def test_what_depends_on_later_tokens(name):
    same = []
    for seed in range(8):
        torch.manual_seed(seed)
        layer = (
            moe.SparseMoE(8, 16, 4, CAUSAL[name][0], router=CAUSAL[name][1]) if name in CAUSAL else NOT_CAUSAL[name]()
        )
        x = torch.randn(1, 24, 8)
        same.append(earlier(layer, x, torch.cat([x[:, :12], 3 * torch.randn(1, 12, 8)], 1)))
    assert all(same) == (name in CAUSAL)
    if name in ("expert choice", "soft"):
        assert "ausal" in type(layer).__doc__
    assert "ausal" in moe.SparseMoE.__doc__ and "ausal" in route.__doc__ and "ausal" in expert_choice.__doc__
