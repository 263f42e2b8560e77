"""What routers draw in training: jitter, learned noise, choices kept by chance, experts left out.

Formulas with the same random numbers, and frequencies.
"""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from contrastive_ops import moe, route
from contrastive_ops.ops import Gating, expert_choice
from contrastive_ops.testing.compare import check

DOUBLE = torch.float64
T, D, E = 40, 6, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens_of(seed=0):
    return torch.randn(T, D, dtype=DOUBLE, generator=seeded(seed)).requires_grad_()


def router(k=2, **options):
    torch.manual_seed(1)
    return moe.Router(D, E, k, dtype=DOUBLE, **options)


def weights(found):
    """(T, E) the gates of what was chosen, whose cotangents tell experts apart."""
    return torch.zeros(T, E, dtype=DOUBLE).scatter(1, found.experts, found.gates)


# ---- Jitter and noise of the scores ----------------------------------------------------------------------------------


def test_jitter_is_for_the_scores_alone():
    gate, tokens = router(jitter=0.3), tokens_of()
    uniform = torch.rand(T, D, dtype=DOUBLE, generator=seeded(7))
    truth = route(F.linear(tokens * (0.7 + 0.6 * uniform), gate.weight), 2)
    check(weights(gate(tokens, generator=seeded(7))), weights(truth), [tokens, gate.weight])
    layer = moe.SparseMoE(D, 8, E, router={"jitter": 0.3}, dtype=DOUBLE)
    ones = torch.ones(T, D, dtype=DOUBLE)
    out, routing = layer(ones)
    same = routing.experts[:, 0] == routing.experts[0, 0]
    plain = (out / routing.gates)[same]  # what an expert makes of a token does not depend on the jitter
    torch.testing.assert_close(plain, plain[:1].expand_as(plain))
    assert routing.gates[same].unique().numel() > 1


def test_learned_noise():
    gate, tokens = router(learned_noise=True), tokens_of()
    assert torch.equal(gate.noise_weight, torch.zeros(E, D, dtype=DOUBLE))
    with torch.no_grad():
        gate.noise_weight.normal_()
    noise = torch.randn(T, E, dtype=DOUBLE, generator=seeded(3))
    spread = torch.log1p(torch.exp(tokens @ gate.noise_weight.T))
    truth = route(tokens @ gate.weight.T + noise * spread, 2)
    found = gate(tokens, generator=seeded(3))
    assert torch.equal(found.experts, truth.experts)
    check(weights(found), weights(truth), [tokens, gate.weight, gate.noise_weight])


def test_learned_noise_with_jitter_and_noise_of_one_size():
    gate, tokens = router(learned_noise=True, jitter=0.1, gating=Gating(noise_std=2.0)), tokens_of()
    draw = seeded(5)
    moved = tokens * (0.9 + 0.2 * torch.rand(T, D, dtype=DOUBLE, generator=draw))
    logits = moved @ gate.weight.T + torch.randn(T, E, dtype=DOUBLE, generator=draw) * torch.log(torch.tensor(2.0))
    logits = logits + torch.randn(T, E, dtype=DOUBLE, generator=draw) * 2 / E
    found = gate(tokens, generator=seeded(5))
    truth = logits.softmax(1).topk(2)
    torch.testing.assert_close(found.gates, truth.values, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.experts, truth.indices)


# ---- Experts that are left out ---------------------------------------------------------------------------------------


def test_experts_are_left_out_of_the_choice():
    gate, tokens = router(k=2, expert_dropout=0.4), tokens_of()
    chance = torch.rand(T, E, dtype=DOUBLE, generator=seeded(2))
    kept = (chance >= 0.4) | (chance >= chance.sort(1).values[:, -2:-1])
    truth = route(tokens @ gate.weight.T, 2, allowed=kept)
    found = gate(tokens, generator=seeded(2))
    assert not torch.equal(found.experts, route(tokens @ gate.weight.T, 2).experts)
    check(weights(found), weights(truth), [tokens, gate.weight])


def test_at_least_k_experts_stay_of_those_that_are_allowed():
    gate = router(k=2, expert_dropout=0.99)
    allowed = torch.rand(T, E, generator=seeded(4)) < 0.6
    allowed[0], allowed[1] = False, torch.arange(E) == 3
    found = gate(tokens_of(), allowed=allowed)
    assert torch.equal((found.experts >= 0).sum(1), allowed.sum(1).clamp_max(2))
    assert found.experts[1].tolist() == [3, -1]
    there = found.experts.clamp_min(0)
    assert (allowed.gather(1, there) | (found.experts < 0)).all()


def test_each_expert_is_left_out_as_often_as_was_asked_for():
    gate = moe.Router(1, 6, 1, expert_dropout=0.25)
    with torch.no_grad():
        gate.weight.copy_(torch.arange(6.0)[:, None])
    chosen = gate(torch.ones(20_000, 1), generator=seeded()).experts[:, 0]
    share = torch.bincount(chosen, minlength=6).double() / 20_000  # the best that stays
    truth = torch.tensor([0.75 * 0.25 ** (5 - expert) for expert in range(6)], dtype=DOUBLE)
    assert ((share - truth).abs() < 5 * (truth * (1 - truth) / 20_000).sqrt() + 2e-3).all()


def test_tokens_that_are_given_their_experts_keep_them():
    gate, given = router(k=1, expert_dropout=0.9), torch.randint(E, (T,), generator=seeded())
    assert torch.equal(gate(tokens_of(), allowed=given).experts[:, 0], given)


# ---- Choices that are kept by chance ---------------------------------------------------------------------------------


def slots_of(chosen, first, capacity):
    """Places in the order of choices and, for one choice, of tokens by their first gate."""
    order = first.argsort(descending=True, stable=True).tolist()
    taken, kept = [0] * E, torch.zeros_like(chosen, dtype=torch.bool)
    for j in range(chosen.shape[1]):
        for t in order:
            expert = int(chosen[t, j])
            if expert >= 0:
                kept[t, j] = capacity is None or taken[expert] < capacity
                taken[expert] += 1
    return kept


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("capacity", [None, 8])
@pytest.mark.parametrize("k", [2, 3])
def test_a_second_expert_by_chance(backend, k, capacity, renormalize):
    logits = torch.randn(T, E, dtype=DOUBLE, generator=seeded(9), requires_grad=True)
    asked = {"capacity": capacity, "losses": ["importance"], "backend": backend}
    found = route(logits, k, gating=Gating(renormalize=renormalize, sampled=True), generator=seeded(1), **asked)
    every = route(logits, k, gating=Gating(renormalize=renormalize), **asked)
    gates, experts = logits.softmax(1).topk(k)
    keep = torch.rand(T, k, dtype=DOUBLE, generator=seeded(1)) < k * gates / gates.sum(1, keepdim=True)
    keep[:, 0] = True
    assert torch.equal(found.experts, experts) and 0 < (~keep).sum() < keep[:, 1:].numel()
    assert torch.equal(found.kept, slots_of(torch.where(keep, experts, -1), gates[:, 0].detach(), capacity))
    check(found.gates, every.gates, [logits])  # as they were before any was dropped
    torch.testing.assert_close(found.losses["importance"], every.losses["importance"])
    assert torch.equal(found.metrics["choices"], every.metrics["choices"])
    torch.testing.assert_close(found.metrics["success_rate"], found.kept.float().mean()[None], check_dtype=False)


def test_how_often_a_second_expert_is_kept():
    gates = torch.tensor([0.7, 0.2, 0.1])
    logits = gates.log().expand(20_000, 3)
    found = route(logits, 2, gating=Gating(sampled=True), generator=seeded())
    share, truth = found.kept[:, 1].double().mean(), 2 * 0.2 / 0.9
    assert found.kept[:, 0].all() and abs(share - truth) < 5 * (truth * (1 - truth) / 20_000) ** 0.5


def test_a_token_without_numbers_keeps_its_first_choice():
    logits = torch.randn(T, E)
    logits[3] = torch.nan
    found = route(logits, 2, gating=Gating(sampled=True))
    assert found.kept[:, 0].all() and not found.kept[3, 1]


# ---- Training, evaluation, recomputation -----------------------------------------------------------------------------

EVERYTHING = {
    "jitter": 0.2,
    "learned_noise": True,
    "expert_dropout": 0.3,
    "gating": Gating(sampled=True, noise_std=1.0),
}


def test_nothing_is_random_in_evaluation():
    gate, tokens = router(**EVERYTHING).eval(), tokens_of()
    truth = route(tokens @ gate.weight.T, 2)
    before = torch.get_rng_state()
    found = gate(tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.experts, truth.experts) and found.kept.all()
    check(weights(found), weights(truth), [tokens, gate.weight])
    assert not torch.equal(gate.train()(tokens).gates, found.gates)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer", [moe.SparseMoE, moe.ExpertChoice])
def test_recomputation_draws_the_same(layer, use_reentrant):
    if layer is moe.SparseMoE:
        module = layer(D, 8, E, 2, router={**EVERYTHING, "capacity": 1.5}, dtype=DOUBLE)
    else:  # in which every expert takes as many tokens, whoever is sampled
        module = layer(D, 8, E, router={**EVERYTHING, "gating": Gating(noise_std=1.0)}, dtype=DOUBLE)
    tokens = tokens_of()
    with torch.no_grad():
        module.gate.noise_weight.normal_()
    found = []
    for again in (False, True):
        torch.manual_seed(5)
        run = lambda x: module(x)[0]  # noqa: E731
        out = checkpoint(run, tokens, use_reentrant=use_reentrant) if again else run(tokens)
        module.zero_grad()
        tokens.grad = None
        out.square().sum().backward()
        found.append([out.detach(), tokens.grad.clone(), *(each.grad.clone() for each in module.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_padding_reaches_nothing():
    gate, tokens = router(**EVERYTHING), tokens_of()
    valid = torch.arange(T) % 3 != 0
    with torch.no_grad():
        tokens[~valid] = torch.nan
        gate.noise_weight.normal_()
    found = gate(tokens, valid=valid, generator=seeded())
    found.gates.sum().backward()
    assert found.gates[valid].isfinite().all() and (found.experts[~valid] == -1).all()
    for each in (tokens, gate.weight, gate.noise_weight):
        assert each.grad.isfinite().all()


def test_a_router_that_learns_its_noise_can_be_saved():
    gate = router(learned_noise=True)
    assert "noise_weight" in gate.state_dict() and "noise_weight" not in router().state_dict()
    other = router(learned_noise=True)
    other.load_state_dict(gate.state_dict())
    gate.reset_parameters()
    assert not gate.noise_weight.any()


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: moe.Router(3, 4, jitter=-0.1), ValueError, "Router: jitter must be in [0, 1], got -0.1"),
        (lambda: moe.Router(3, 4, expert_dropout=1.0), ValueError, "Router: expert_dropout must be in [0, 1), got 1.0"),
        (lambda: moe.Router(3, 4, learned_noise=1), TypeError, "Router: learned_noise must be True or False, got 1"),
        (
            lambda: route(torch.randn(3, 4), 2, gating=Gating(sampled="yes")),
            TypeError,
            "route: gating.sampled must be True or False, got 'yes'",
        ),
        (
            lambda: expert_choice(torch.randn(3, 4), 1.0, gating=Gating(sampled=True)),
            ValueError,
            "expert_choice: gating must have no bias, no groups, no renormalisation and no sampled choices",
        ),
        (
            lambda: moe.Router(3, 4, jitter=0.1)(torch.randn(2, 3), generator=1),
            TypeError,
            "Router: generator must be a torch.Generator or None, got int",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
