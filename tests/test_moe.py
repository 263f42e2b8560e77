"""Mixture-of-experts layers: values against loops over experts, checkpoints, training against the dense formulation."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from contrastive_ops import clip, moe, route
from contrastive_ops.ops import Capacity, Gating, RouterLoss, dispatch
from contrastive_ops.testing import saved_bytes

DOUBLE = torch.float64
ACTIVATION = {False: F.gelu, True: F.silu}


def sparse(k=1, dim=6, hidden=10, experts=4, **options):
    return moe.SparseMoE(dim, hidden, experts, k, dtype=DOUBLE, **options)


def expert_by_expert(layer, rows, routing):
    """Every choice that was kept, one expert after the other, in plain torch."""
    experts, out = layer.experts, torch.zeros_like(rows)
    for e in range(len(experts.down_proj)):
        token, choice = ((routing.experts == e) & routing.kept).nonzero(as_tuple=True)
        hidden = F.linear(rows[token], experts.up[e], None if experts.up_bias is None else experts.up_bias[e])
        if experts.gated:
            gate, hidden = hidden.chunk(2, dim=1)
            hidden = experts.activation(gate) * hidden
        else:
            hidden = experts.activation(hidden)
        found = F.linear(hidden, experts.down_proj[e], None if experts.down_bias is None else experts.down_bias[e])
        out = out.index_add(0, token, routing.gates[token, choice, None] * found)
    return out


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k, capacity", [(1, None), (1, 1.05), (2, 0.7), (3, Capacity(limit=4, padded=True))], ids=str)
def test_layer_is_a_loop_over_experts(gated, bias, k, capacity, backend):
    layer = sparse(k, gated=gated, bias=bias, router={"capacity": capacity})
    tokens = torch.randn(3, 7, 6, dtype=DOUBLE, requires_grad=True)
    out, routing = layer(tokens, backend=backend)
    expected = expert_by_expert(
        layer, tokens.view(-1, 6), route(layer.gate.logits(tokens.view(-1, 6)), k, capacity=capacity)
    )
    torch.testing.assert_close(out, expected.view_as(out))
    if capacity is not None:
        assert not routing.kept.all()
    inputs = (tokens, *layer.parameters())
    upstream = torch.randn_like(out)
    for got, truth in zip(*(torch.autograd.grad(o, inputs, upstream.view_as(o)) for o in (out, expected)), strict=True):
        torch.testing.assert_close(got, truth)


def test_shared_experts_see_every_token():
    layer = sparse(shared=2, bias=True)
    tokens = torch.randn(9, 6, dtype=DOUBLE)
    out, routing = layer(tokens)
    shared = layer.shared_experts
    assert shared.down_proj.shape == (1, 6, 20)
    always = F.linear(
        F.gelu(F.linear(tokens, shared.up[0], shared.up_bias[0])), shared.down_proj[0], shared.down_bias[0]
    )
    torch.testing.assert_close(out, expert_by_expert(layer, tokens, routing) + always)


def test_padding_is_zero_and_changes_nothing():
    layer = sparse(2, shared=1, router={"capacity": Capacity(limit=9), "losses": ["importance", "z"]})
    tokens, valid = torch.randn(4, 5, 6, dtype=DOUBLE), torch.rand(4, 5) < 0.6
    out, routing = layer(tokens.masked_fill(~valid[..., None], torch.nan), valid=valid)
    alone, routing_alone = layer(tokens[valid])
    assert (out[~valid] == 0).all()
    torch.testing.assert_close(out[valid], alone)
    torch.testing.assert_close(routing.loss, routing_alone.loss)


@pytest.mark.parametrize("k", [1, 2])
def test_domains_have_experts_of_their_own(k):
    """Tokens of a sequence go to the experts that its domain names, whatever the router prefers."""
    layer, tokens = sparse(k), torch.randn(3, 5, 6, dtype=DOUBLE)
    domain = torch.tensor([2, 0, 3]) if k == 1 else torch.tensor([[2, 1], [0, 3], [3, 2]])
    out, routing = layer(tokens, allowed=domain)
    named = domain.view(3, 1, -1).expand(3, 5, -1).reshape(-1, k)
    assert torch.equal(routing.experts, named)
    mask = torch.zeros(3, 4, dtype=torch.bool).scatter(1, domain.view(3, -1), True)
    masked, of_mask = layer(tokens, allowed=mask)
    assert torch.equal(of_mask.experts.sort(1).values, named.sort(1).values)
    # A mask restricts the softmax; an assignment leaves it as it is.
    torch.testing.assert_close(of_mask.gates.sum(1), torch.ones(15, dtype=DOUBLE))
    assert out.shape == masked.shape == tokens.shape


def test_labels_of_sequences_are_labels_of_their_tokens():
    layer, tokens = sparse(router={"losses": ["importance"]}), torch.randn(3, 5, 6, dtype=DOUBLE)
    label = torch.tensor([1, 0, 1])
    _, of_sequences = layer(tokens, segments=label, num_segments=2, valid=label.bool())
    every = label[:, None].expand(3, 5)
    _, of_tokens = layer(tokens, segments=every, num_segments=2, valid=every.bool())
    torch.testing.assert_close(of_sequences.losses, of_tokens.losses)
    assert of_sequences.metrics["tokens"].tolist() == [0, 10]


def test_experts_choose_tokens(backend):
    layer = moe.ExpertChoice(6, 10, 4, capacity=1.0, gated=True, dtype=DOUBLE)
    tokens = torch.randn(2, 10, 6, dtype=DOUBLE)
    out, routing = layer(tokens, backend=backend)
    flat = tokens.view(-1, 6)
    p = layer.gate.logits(flat).softmax(1)
    expected = torch.zeros_like(flat)
    for e in range(4):
        gate, best = p[:, e].topk(5)
        a, b = F.linear(flat[best], layer.experts.up[e]).chunk(2, 1)
        expected = expected.index_add(0, best, gate[:, None] * F.linear(F.silu(a) * b, layer.experts.down_proj[e]))
    torch.testing.assert_close(out.view(-1, 6), expected)
    assert routing.offsets.tolist() == [0, 5, 10, 15, 20]


def test_soft_moe_is_its_formula(backend):
    layer = moe.SoftMoE(6, 10, 4, slots=3, bias=True, dtype=DOUBLE)
    with torch.no_grad():
        layer.scale.fill_(3.0)
    tokens = torch.randn(2, 7, 6, dtype=DOUBLE, requires_grad=True)
    out = layer(tokens, backend=backend)
    slots = layer.slots.flatten(1)
    logits = F.normalize(tokens, dim=-1) @ (layer.scale * F.normalize(slots, dim=0))
    mixed = (logits.softmax(1).transpose(1, 2) @ tokens).unflatten(1, (4, 3))
    experts = layer.experts
    hidden = F.gelu(torch.einsum("bepd,efd->bepf", mixed, experts.up) + experts.up_bias[:, None])
    found = torch.einsum("bepf,edf->bepd", hidden, experts.down_proj) + experts.down_bias[:, None]
    expected = logits.softmax(2) @ found.flatten(1, 2)
    torch.testing.assert_close(out, expected)
    inputs = (tokens, *layer.parameters())
    for got, truth in zip(*(torch.autograd.grad(o.sin().sum(), inputs) for o in (out, expected)), strict=True):
        torch.testing.assert_close(got, truth)


def test_soft_moe_leaves_padding_out():
    layer, tokens = moe.SoftMoE(6, 10, 4, dtype=DOUBLE), torch.randn(3, 7, 6, dtype=DOUBLE)
    valid = torch.arange(7) < torch.tensor([7, 4, 0])[:, None]
    out = layer(tokens.masked_fill(~valid[..., None], 1e9), valid=valid)
    torch.testing.assert_close(out[1, :4], layer(tokens[1:2, :4])[0])
    assert (out[~valid] == 0).all()
    torch.testing.assert_close(out[0], layer(tokens[0]))


# ---- Modes of the router ---------------------------------------------------------------------------------------------


def test_noise_and_the_load_loss_are_for_training():
    router = moe.Router(6, 4, 2, capacity=1.0, eval_capacity=4.0, gating=Gating(noise_std=1.0), losses=["load", "z"])
    tokens = torch.randn(50, 6)
    noisy, again = (router(tokens, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert set(noisy.losses) == {"load", "z"} and not torch.equal(noisy.gates, again.gates)
    assert not noisy.kept.all()
    quiet, again = router.eval()(tokens), router(tokens)
    assert set(quiet.losses) == {"z"} and torch.equal(quiet.gates, again.gates) and quiet.kept.all()


@pytest.mark.parametrize("rule", ["sign", "zscore"])
def test_bias_balances_without_a_loss(rule):
    """A skewed router: after some steps the most loaded expert has nearly its fair share, and gates are as before."""
    router = moe.Router(8, 6, 2, gating=Gating(score="sigmoid"), balance=rule, balance_rate=0.01, dtype=DOUBLE)
    tokens = torch.randn(600, 8, dtype=DOUBLE) + 1.0
    before = router(tokens).metrics["choices"].max()
    for _ in range(200):
        router.update_bias(router(tokens).metrics["choices"])
    routing = router(tokens)
    assert before > 300 and routing.metrics["choices"].max() < 220
    p = router.logits(tokens).sigmoid()
    torch.testing.assert_close(routing.gates, p.gather(1, routing.experts))
    assert list(router.state_dict()) == ["weight", "expert_bias"]


def test_balanced_bias_does_not_move_a_balanced_router():
    bias, counts = torch.randn(3), torch.tensor([[2, 5, 1], [4, 1, 5]])
    for rule in ("sign", "zscore"):
        assert torch.equal(moe.balanced_bias(bias, counts, rule=rule), bias)
    moved = moe.balanced_bias(bias, torch.tensor([0, 0, 9]), 0.1, "zscore")
    torch.testing.assert_close(moved - bias, 0.1 * torch.tensor([1.0, 1.0, -2.0]) / 2**0.5)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def mixtral(dim=16, hidden=24, experts=4):
    models = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = pytest.importorskip("transformers").MixtralConfig(
        hidden_size=dim, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=2
    )
    block = models.MixtralSparseMoeBlock(config).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def test_state_of_a_mixtral_block_loads():
    block = mixtral()
    layer = moe.SparseMoE(16, 24, 4, 2, gated=True, router={"gating": Gating(renormalize=True)}, dtype=DOUBLE)
    layer.load_state_dict(block.state_dict())
    tokens = torch.randn(2, 9, 16, dtype=DOUBLE)
    # The block's router has a softmax in float32.
    torch.testing.assert_close(layer(tokens)[0], block(tokens), rtol=1e-6, atol=1e-6)
    block.load_state_dict(layer.state_dict())


def test_state_with_a_matrix_for_each_expert_loads():
    layer = moe.SparseMoE(6, 10, 3, gated=True)
    gate, up = layer.experts.gate_up_proj.detach().chunk(2, 1)
    state = {"gate.weight": layer.gate.weight.detach()}
    for e in range(3):
        matrices = {"w1": gate[e], "w3": up[e], "w2": layer.experts.down_proj[e].detach()}
        state |= {f"experts.{e}.{name}.weight": matrix for name, matrix in matrices.items()}
    fresh = moe.SparseMoE(6, 10, 3, gated=True)
    fresh.load_state_dict(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.gate_up_proj"):
        fresh.load_state_dict({name: value for name, value in state.items() if "2.w2" not in name})


# ---- Pure functions --------------------------------------------------------------------------------------------------

ALL_LOSSES = [
    RouterLoss("importance", 0.1),
    RouterLoss("load", 0.1),
    RouterLoss("switch", 0.1),
    RouterLoss("z", 0.01),
    RouterLoss("local_entropy", [0.0, 0.1]),
    RouterLoss("global_entropy", 0.1, threshold=[1.5, 1.2]),
]
NOISY = {"capacity": 1.05, "gating": Gating(noise_std=1.0), "losses": ALL_LOSSES}


def step(layer, tokens, label, wrap=lambda function, x: function(x)):
    def run(x):
        out, routing = layer(x, segments=label, num_segments=2, generator=torch.Generator().manual_seed(3))
        return out, routing.loss

    out, loss = wrap(run, tokens)
    return torch.autograd.grad(out.square().sum() + loss, (tokens, *layer.parameters()))


def test_recomputation_gives_the_same_bits():
    layer, label = sparse(router=NOISY), torch.arange(12).view(2, 6) % 2
    tokens = torch.randn(2, 6, 6, dtype=DOUBLE, requires_grad=True)
    plain = step(layer, tokens, label)
    again = step(layer, tokens, label, lambda function, x: checkpoint(function, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_compiles_without_graph_break_or_recompilation():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    quiet = {**NOISY, "gating": Gating(), "losses": [each for each in ALL_LOSSES if each.name != "load"]}
    layer = sparse(2, gated=True, shared=1, router=quiet)

    def function(tokens, label):
        out, routing = layer(tokens, segments=label, num_segments=2)
        return out.square().sum() + routing.loss

    compiled, frames = torch.compile(function, fullgraph=True, backend=counter, dynamic=True), None
    for length in (7, 9, 20):
        tokens = torch.randn(2, length, 6, dtype=DOUBLE, requires_grad=True)
        label = torch.arange(2 * length).view(2, length) % 2
        got, expected = compiled(tokens, label), function(tokens, label)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(v, tokens) for v in (got, expected)))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


def test_autocast_runs_experts_in_bfloat16_and_the_router_in_float32():
    layer, tokens = moe.SparseMoE(16, 32, 4, gated=True), torch.randn(40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, routing = layer(tokens)
    full, truth = layer(tokens)
    assert torch.equal(routing.experts, truth.experts) and torch.equal(routing.gates, truth.gates)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), full, rtol=0.05, atol=0.01)


def test_module_in_bfloat16():
    layer, tokens = moe.SparseMoE(16, 32, 4, 2, shared=1).bfloat16(), torch.randn(40, 16).bfloat16()
    out, routing = layer(tokens)
    assert out.dtype == torch.bfloat16 and routing.gates.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_rows_of_the_chosen_experts_only_are_kept():
    """What backward needs is O(T k (D + F)), for any number of experts."""
    tokens, kept = torch.randn(200, 16, requires_grad=True), []
    for experts in (4, 32):
        layer = moe.SparseMoE(16, 64, experts)
        weights = sum(p.nbytes for p in layer.parameters())
        kept.append(saved_bytes(lambda layer=layer: layer(tokens)[0].sum())[0] - weights)
    assert kept[1] - kept[0] <= 4 * 200 * 32 + 4096  # the logits


@pytest.mark.parametrize("kind", [moe.SparseMoE, moe.ExpertChoice])
def test_tokens_are_kept_once_and_not_for_every_choice(kind):
    """Of the rows (R, D) those that experts return, for the gates, and not those that they are given."""
    tokens, dim, choices = torch.randn(200, 256, requires_grad=True), 256, 3
    options = (choices,) if kind is moe.SparseMoE else (float(choices),)
    layer = kind(dim, 4, 4, *options)
    weights = sum(p.nbytes for p in layer.parameters())
    kept = saved_bytes(lambda: layer(tokens)[0].sum())[0] - weights
    assert kept <= (1 + choices) * tokens.nbytes + tokens.nbytes // 2


def test_experts_on_tokens_of_a_routing_are_those_on_dispatched_rows():
    for gated, bias in itertools.product([False, True], repeat=2):
        experts = moe.Experts(6, 8, 4, gated=gated, bias=bias)
        tokens = torch.randn(30, 6)
        for routing in (
            route(torch.randn(30, 4), 2),
            route(torch.randn(30, 4), 2, capacity=Capacity(1.5, padded=True)),
        ):
            results = []
            for rows, places in ((tokens, routing), (dispatch(tokens, routing), routing.offsets)):
                out = experts(rows, places)
                results.append((out, *torch.autograd.grad(out.square().sum(), list(experts.parameters()))))
            assert all(map(torch.equal, *results))


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: moe.Router(4, 4, balance="mean"), ValueError, "Router: balance must be one of 'sign', 'zscore'"),
        (lambda: moe.Router(4, 4, balance="sign", gating=Gating(bias=torch.zeros(4))), ValueError, "got both"),
        (lambda: moe.Router(4, 4).update_bias(torch.zeros(4)), ValueError, "Router.update_bias: balance must be"),
        (lambda: moe.balanced_bias(torch.zeros(4), torch.zeros(3)), ValueError, "must have one count for each of 4"),
        (lambda: moe.Experts(4, 8, 2, activation="swish"), ValueError, "Experts: activation must be one of"),
        (lambda: moe.ExpertChoice(4, 8, 2, router={"balance": "sign"}), ValueError, "router must have no balance"),
        (lambda: moe.SparseMoE(4, 8, 2)(torch.zeros(3, 5, 4), valid=torch.ones(2, dtype=torch.bool)), ValueError,
         r"SparseMoE: valid must have shape \(3, 5\) or \(3,\), got \(2,\)"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- Training --------------------------------------------------------------------------------------------------------


class DenseMoE(nn.Module):
    """The same layer as V-MoE writes it down: one-hot tensors (T, E, C) and einsums, losses from probabilities."""

    def __init__(self, layer, capacity):
        super().__init__()
        self.layer, self.capacity = layer, capacity

    def forward(self, tokens, segments, num_segments, generator):
        shape, tokens = tokens.shape, tokens.flatten(0, 1)
        segments, experts = segments.flatten(), self.layer.experts
        logits = tokens @ self.layer.gate.weight.T
        count, width = logits.shape
        slots = math.ceil(self.capacity * count / width)
        p = logits.softmax(1)
        gate, expert = p.max(1)
        chosen = F.one_hot(expert, width)
        order = gate.detach().argsort(descending=True, stable=True)
        position = torch.zeros_like(expert).scatter(0, order, ((chosen[order].cumsum(0) - 1) * chosen[order]).sum(1))
        place = chosen[:, :, None] * (position[:, None] == torch.arange(slots))[:, None, :]
        taken = torch.einsum("tec,td->ecd", place.to(tokens.dtype), tokens)
        hidden = F.gelu(torch.einsum("ecd,efd->ecf", taken, experts.up))
        found = torch.einsum("ecf,edf->ecd", hidden, experts.down_proj)
        out = torch.einsum("tec,t,ecd->td", place.to(tokens.dtype), gate, found)
        loss = 0.0
        for segment in range(num_segments):
            q = p[segments == segment]
            summed, mean = q.sum(0), q.mean(0)
            loss = loss + 0.01 * summed.var(correction=0) / summed.mean() ** 2
            loss = loss + 0.02 * -(q * q.log()).sum(1).mean()
            loss = loss + 0.02 * (1.2 + (mean * mean.log()).sum()).clamp_min(0)
        return out.view(shape), loss


class Sparse(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, tokens, segments, num_segments, generator):
        out, routing = self.layer(tokens, segments=segments, num_segments=num_segments)
        return out, routing.loss


class Tower(nn.Module):
    """One tower for both modalities: projections, one block of experts, pooling."""

    def __init__(self, block, dim=16):
        super().__init__()
        self.image, self.text = nn.Linear(12, dim), nn.Embedding(20, dim)
        self.block, self.scale = block, nn.Parameter(torch.tensor(2.0))

    def forward(self, patches, words):
        tokens = torch.cat([self.image(patches), self.text(words)], 1)
        segments = (torch.arange(tokens.shape[1]) >= patches.shape[1]).long().expand(tokens.shape[:2])
        out, loss = self.block(tokens, segments, 2, None)
        tokens = F.normalize(tokens + out, dim=-1)
        image, text = tokens[:, : patches.shape[1]].mean(1), tokens[:, patches.shape[1] :].mean(1)
        return image, text, loss


def curve(block, contrast, steps=200):
    torch.manual_seed(1)
    tower = Tower(block)
    optimiser, losses = torch.optim.SGD(tower.parameters(), lr=0.3), []
    prototypes, words = torch.randn(10, 4, 12), torch.randint(20, (10, 3))
    for _ in range(steps):
        thing = torch.randint(10, (24,))
        patches = prototypes[thing] + 0.3 * torch.randn(24, 4, 12)
        image, text, balance = tower(patches, words[thing])
        loss = contrast(image, text, tower.scale.exp()) + balance
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def dense_clip(image, text, scale):
    logits, own = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def test_training_follows_the_dense_formulation(backend, monkeypatch):
    """200 steps of a one-tower model with capacity, priority and balance losses."""
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", backend)
    losses = [
        RouterLoss("importance", 0.01),
        RouterLoss("local_entropy", 0.02),
        RouterLoss("global_entropy", 0.02, threshold=1.2),
    ]
    torch.manual_seed(0)
    layer = moe.SparseMoE(16, 32, 8, router={"capacity": 1.05, "losses": losses})
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    ours = curve(Sparse(layer), lambda image, text, scale: clip(image, text, scale=scale, normalize=False))
    layer.load_state_dict(state)
    expected = curve(DenseMoE(layer, 1.05), dense_clip)
    assert expected[-20:].mean() < expected[:5].mean() - 1.0
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
