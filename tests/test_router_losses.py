"""Balance losses and metrics of a router: against formulas written token by token, their gradients in closed form.

Notation of the papers: n tokens of a segment, E experts, p the probabilities of a token without noise.
"""

import itertools
import math

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from contrastive_ops import route
from contrastive_ops.ops import Capacity, Gating, RouterLoss
from contrastive_ops.testing import relative_error
from contrastive_ops.testing.compare import check_derivatives

DOUBLE = torch.float64
LOSSES = ["importance", "load", "switch", "z", "local_entropy", "global_entropy"]
WITHOUT_NOISE = [name for name in LOSSES if name != "load"]
NOISY = Gating(noise_std=1.5)


def draw(shape, seed=5):
    """The noise that `route` draws from this generator, and the generator."""
    noise = torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return noise, torch.Generator().manual_seed(seed)


def probabilities(z, score="softmax"):
    p = z.softmax(1) if score == "softmax" else z.sigmoid()
    return p / p.sum(1, keepdim=True)


def variation(v):
    return v.var(unbiased=False) / v.mean().square()


def formula(name, z, noisy=None, k=1, sigma=1.0, score="softmax"):
    """One loss of one segment, from its definition."""
    noisy = z if noisy is None else noisy
    tokens, experts = z.shape
    p = probabilities(z, score)
    if name == "importance":
        return variation(p.sum(0))
    if name == "load":
        threshold = noisy.topk(k, dim=1).values[:, -1:]
        return variation((1 - torch.distributions.Normal(0, 1).cdf((threshold - z) / sigma)).mean(0))
    if name == "switch":
        share = noisy.topk(k, dim=1).indices.flatten().bincount(minlength=experts).to(z.dtype) / (tokens * k)
        return experts * (share * probabilities(noisy, score).mean(0)).sum()
    if name == "z":
        return z.exp().sum(1).log().square().mean()
    entropy = torch.special.entr(p).sum(1).mean() if name == "local_entropy" else -torch.special.entr(p.mean(0)).sum()
    return entropy


def problem(tokens=60, experts=7, segments=3, dtype=DOUBLE):
    logits = torch.randn(tokens, experts, dtype=DOUBLE).to(dtype)
    return logits, torch.randint(segments, (tokens,))


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("noise_std", [0.0, 1.5])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_losses_are_their_formulas(k, noise_std, score, backend):
    logits, segments = problem()
    noise, generator = draw(logits.shape)
    sigma = noise_std / 7
    names = LOSSES if noise_std else WITHOUT_NOISE
    z = logits.clone().requires_grad_()
    gating = Gating(noise_std=noise_std, score=score)
    routing = route(z, k, gating=gating, segments=segments, losses=names, generator=generator, backend=backend)
    truth = logits.clone().requires_grad_()
    assert list(routing.losses) == names
    for name in names:
        rows = [segments == s for s in range(3)]
        expected = torch.stack([formula(name, truth[r], (truth + sigma * noise)[r], k, sigma, score) for r in rows])
        torch.testing.assert_close(routing.losses[name], expected, rtol=1e-12, atol=1e-12)
        weight = torch.randn(3, dtype=DOUBLE)
        got, want = (
            torch.autograd.grad((v * weight).sum(), x, retain_graph=True)[0]
            for v, x in ((routing.losses[name], z), (expected, truth))
        )
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(routing.loss, sum(value.sum() for value in routing.losses.values()))


def test_pooled_losses_do_not_see_segments(backend):
    """Importance and load over all tokens beside entropies of each segment, as LIMoE has them, in their order."""
    logits, segments = problem()
    noise, _ = draw(logits.shape)
    common = {"gating": NOISY, "noise": noise, "backend": backend}
    pooled = [RouterLoss(name, 0.3, pooled=True) for name in ("load", "z", "switch", "importance")]
    local = RouterLoss("local_entropy", [0.0, 0.1, 0.2])
    z, truth = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    both = route(z, 2, segments=segments, losses=[*pooled[:2], local, *pooled[2:]], **common)
    assert list(both.losses) == ["load", "z", "local_entropy", "switch", "importance"]
    blind = route(truth, 2, losses=[RouterLoss(loss.name, loss.weight) for loss in pooled], **common)
    alone = route(truth, 2, segments=segments, losses=[local], **common)
    for name, value in (blind.losses | alone.losses).items():
        torch.testing.assert_close(both.losses[name], value, rtol=1e-12, atol=0)
    assert both.losses["importance"].shape == (1,) and both.losses["local_entropy"].shape == (3,)
    torch.testing.assert_close(both.loss, blind.loss + alone.loss, rtol=1e-12, atol=0)
    (found,), (expected,) = (
        torch.autograd.grad(loss, x) for loss, x in ((both.loss, z), (blind.loss + alone.loss, truth))
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    # A segment of its own experts is balanced when all tokens are, and far from it on its own.
    apart = torch.full((8, 4), -30.0, dtype=DOUBLE)
    apart[torch.arange(8), torch.arange(4).repeat_interleave(2)] = 30.0
    side = torch.arange(2).repeat_interleave(4)
    seen, unseen = (
        route(apart, segments=side, losses=[RouterLoss("importance", pooled=p)], backend=backend).loss
        for p in (False, True)
    )
    assert unseen < 1e-12 and seen == pytest.approx(2.0)


def test_published_values_of_v_moe(backend, monkeypatch):
    """The numbers that V-MoE's own tests expect of its three losses."""
    gates = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]], dtype=DOUBLE)
    losses = route(gates.log(), 1, losses=["importance", "switch"], backend=backend).losses
    assert losses["importance"].item() == pytest.approx(0.03874999, abs=1e-6)
    assert losses["switch"].item() == pytest.approx(1.0875, abs=1e-6)
    logits = torch.tensor([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]], dtype=DOUBLE)
    noise = torch.tensor([[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]], dtype=DOUBLE)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise / 0.1)
    load = route(logits, 2, gating=Gating(noise_std=0.3), losses=["load"], backend=backend).losses["load"]
    assert load.item() == pytest.approx(0.48573864, abs=1e-6)


# What d loss / dz is, by the table: one segment.
def closed_form(name, z, noisy, k, sigma):
    n, experts = z.shape
    p, lse = z.softmax(1), z.logsumexp(1, keepdim=True)
    if name == "importance":
        total = p.sum(0)
        a = 2 / experts * (total - n / experts) / (n / experts) ** 2
        return p * (a - (p * a).sum(1, keepdim=True))
    if name == "load":
        threshold, at = noisy.topk(k, dim=1)
        u = (z - threshold[:, -1:]) / sigma
        chance = torch.special.ndtr(u).mean(0)
        mean, variance = chance.mean(), chance.var(unbiased=False)
        a = 2 * (chance - mean) / (experts * mean**2) - 2 * variance / (experts * mean**3)
        part = a / n * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi) / sigma
        return part.scatter_add(1, at[:, -1:], -part.sum(1, keepdim=True))
    if name == "switch":
        q = noisy.softmax(1)
        f = noisy.topk(k, dim=1).indices.flatten().bincount(minlength=experts).to(z.dtype) / (n * k)
        return experts / n * q * (f - (q * f).sum(1, keepdim=True))
    if name == "z":
        return 2 / n * lse * p
    if name == "local_entropy":
        return -p / n * (p.log() - (p * p.log()).sum(1, keepdim=True))
    mean = p.mean(0).log()
    return p / n * (mean - (p * mean).sum(1, keepdim=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [1, 3])
def test_gradients_in_closed_form(name, k, backend):
    logits, _ = problem(40, 6)
    noise, generator = draw(logits.shape)
    z, sigma = logits.clone().requires_grad_(), 1.5 / 6
    loss = route(z, k, gating=NOISY, losses=[name], generator=generator, backend=backend).loss
    (found,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(found, closed_form(name, logits, logits + sigma * noise, k, sigma), rtol=0, atol=1e-12)
    assert found.abs().max() > 1e-4


def test_load_has_a_gradient_at_trained_logits(backend):
    """Tutel compares probabilities with a logit: its loss and gradient are 0 as soon as logits spread."""
    logits = torch.randn(256, 32, dtype=DOUBLE, requires_grad=True)
    loss = route(logits, 2, gating=Gating(noise_std=1.0), losses=["load"], backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss > 0.01 and gradient.norm() > 0.01


def test_one_choice_has_a_gradient_through_its_gate(backend):
    """Softmax after top-k, or renormalising, makes the only gate 1 whatever the router says."""
    logits = torch.randn(20, 5, dtype=DOUBLE, requires_grad=True)
    gates = route(logits, 1, backend=backend).gates
    (found,) = torch.autograd.grad(gates.sum(), logits)
    (expected,) = torch.autograd.grad(logits.softmax(1).max(1).values.sum(), logits)
    torch.testing.assert_close(found, expected)
    assert found.abs().min() > 0


# ---- Derivatives of everything together ------------------------------------------------------------------------------

DERIVATIVES = {
    "softmax": {},
    "sigmoid": {"gating": Gating(score="sigmoid")},
    "renormalised": {"gating": Gating(renormalize=True)},
    "renormalised sigmoid": {"gating": Gating(score="sigmoid", renormalize=True)},
    "noise": {"gating": NOISY},
    "noisy sigmoid": {"gating": Gating(score="sigmoid", noise_std=1.5)},
    "bias": {"gating": Gating(bias=torch.tensor([0.3, 0.0, -0.3, 0.1]))},
    "allowed": {"allowed": torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool(),
                "gating": NOISY},
    "given": {"allowed": torch.tensor([[0, 1], [3, -1], [-1, -1], [-1, 2], [1, 1]])},
    "padding": {"valid": torch.tensor([True, False, True, True, True])},
    "sigmoid, allowed": {"allowed": torch.tensor([[1, 1, 0, 1]] * 5).bool(), "gating": Gating(score="sigmoid")},
}  # fmt: skip


@pytest.mark.parametrize("name", DERIVATIVES)
def test_gradcheck_and_gradgradcheck(name, backend):
    options = {"segments": torch.tensor([0, 1, 1, 0, 0]), "num_segments": 3, "backend": backend, **DERIVATIVES[name]}
    noisy = options.get("gating", Gating()).noise_std > 0
    losses = [RouterLoss(each) for each in (LOSSES if noisy else WITHOUT_NOISE)]

    def function(logits):
        routing = route(logits, 2, losses=losses, generator=draw((1, 1))[1], **options)
        return routing.gates, *routing.losses.values(), routing.loss

    logits = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    check_derivatives(function, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_lower_precision_is_near_float64(score, dtype, backend):
    """16-bit logits are exact inputs: only float32 arithmetic and the rounding of the gradient are lost."""
    logits, segments = problem(600, 37, dtype=dtype)
    noise, gating = draw(logits.shape)[0].float(), Gating(noise_std=1.5, score=score)
    results = []
    for x in (logits, logits.double()):
        x = x.detach().requires_grad_()
        found = torch.ops.contrastive_ops.expert_routing_scores(
            x, noise.to(torch.float64 if x.dtype == DOUBLE else torch.float32), None, None, None, segments, None,
            [2, int(score == "sigmoid"), 0, 1, 1, 0, 3, 1], gating.noise_std / 37, backend)  # fmt: skip
        outputs = [found[1], found[3], found[4]]
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
        assert results == [] or torch.equal(found[0], results[0][-1])
        results.append([*outputs, torch.autograd.grad(outputs, x, upstream)[0], found[0]])
    for value, truth in zip(results[0][:3], results[1][:3], strict=True):
        assert relative_error(value, truth) <= 1e-6
    bound = 2e-6 if dtype == torch.float32 else 3e-3
    assert results[0][3].dtype == dtype and relative_error(results[0][3], results[1][3]) <= bound


def test_probabilities_of_zero(backend):
    """p log p without a guard is NaN where p is 0, and so is its derivative."""
    logits = torch.tensor([[1000.0, -1000.0, 0.0], [0.0, 800.0, -800.0]], requires_grad=True)
    for score in ("softmax", "sigmoid"):
        routing = route(logits, 1, gating=Gating(score=score), losses=WITHOUT_NOISE, backend=backend)
        assert routing.loss.isfinite()
        assert torch.autograd.grad(routing.loss, logits)[0].isfinite().all()
    assert route(logits, 1, losses=["local_entropy"], backend=backend).loss == 0


# ---- Segments, weights, thresholds -----------------------------------------------------------------------------------


def test_one_segment_is_no_segments(backend):
    logits, _ = problem(dtype=torch.float32)
    segments = torch.zeros(len(logits), dtype=torch.int64)
    pooled, labelled = (
        route(logits, 2, segments=s, num_segments=1, losses=WITHOUT_NOISE, backend=backend) for s in (None, segments)
    )
    for name in ("losses", "metrics"):
        for key, value in getattr(pooled, name).items():
            assert torch.equal(value, getattr(labelled, name)[key]), key


def test_a_segment_has_the_losses_and_metrics_of_its_tokens_alone(backend):
    logits, segments = problem()
    together = route(logits, 2, segments=segments, losses=WITHOUT_NOISE, backend=backend)
    for s in range(3):
        alone = route(logits[segments == s], 2, losses=WITHOUT_NOISE, backend=backend)
        for name in ("losses", "metrics"):
            for key, value in getattr(alone, name).items():
                if value.dim():
                    torch.testing.assert_close(getattr(together, name)[key][s : s + 1], value, rtol=1e-12, atol=1e-14)


def test_empty_segments_have_no_loss_and_no_metrics(backend):
    logits, segments = problem(20, 5, 2)
    z = logits.requires_grad_()
    losses = [*WITHOUT_NOISE[:-1], RouterLoss("global_entropy", threshold=1.0)]
    routing = route(z, 2, segments=2 * segments + 1, num_segments=5, losses=losses, capacity=1.0, backend=backend)
    empty = torch.tensor([True, False, True, False, True])
    assert all((value[empty] == 0).all() and value.isfinite().all() for value in routing.losses.values())
    assert routing.metrics["tokens"][empty].tolist() == [0, 0, 0]
    assert (routing.metrics["choices"][empty] == 0).all()
    for name, value in routing.metrics.items():
        if value.is_floating_point() and value.dim():
            assert value[empty].isnan().all() and value[~empty].isfinite().all(), name
        else:
            assert value.isfinite().all()
    assert torch.autograd.grad(routing.loss, z)[0].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weight", [0.0, 0.3, [0.0, 2.0, -1.0]], ids=str)
def test_weights(name, weight, backend):
    logits, segments = problem()
    options = {"gating": NOISY, "segments": segments, "backend": backend}
    loss = RouterLoss(name, weight=weight)
    routing = route(logits, 2, losses=[loss, "z"] if name != "z" else [loss], generator=draw((1, 1))[1], **options)
    plain = route(logits, 2, losses=[name], generator=draw((1, 1))[1], **options).losses[name]
    assert torch.equal(routing.losses[name], plain)
    expected = (torch.tensor(weight, dtype=DOUBLE) * plain).sum()
    torch.testing.assert_close(routing.loss, expected + (routing.losses["z"].sum() if name != "z" else 0.0))


def test_weights_and_thresholds_in_tensors(backend):
    """Are those in numbers, and have gradients of their own."""
    logits, segments = problem()
    z, weight = logits.requires_grad_(), torch.tensor([2.0, 0.0, 0.5], dtype=DOUBLE, requires_grad=True)
    results = []
    for w, t in ((weight.tolist(), [0.5, 2.0, 9.0]), (weight, torch.tensor([0.5, 2.0, 9.0]))):
        losses = ["importance", RouterLoss("z", w), RouterLoss("global_entropy", threshold=t)]
        routing = route(z, 2, capacity=1.0, segments=segments, losses=losses, backend=backend)
        (gradient,) = torch.autograd.grad(routing.loss, z, retain_graph=True)
        results.append([routing.slots, routing.loss, gradient, *routing.losses.values()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (found,) = torch.autograd.grad(routing.loss, weight)
    torch.testing.assert_close(found, routing.losses["z"].detach() * (weight != 0))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("number", [math.nan, 1e30])
def test_numbers_that_are_none_reach_the_same_losses(number, dtype):
    """In C++ as in the reference, with segments that have no tokens, pooled losses and weights of 0."""
    logits, segments = problem(dtype=dtype)
    logits[segments == 1, 2] = number
    losses = [RouterLoss(name, weight=[1.0, 0.0, 0.5, 2.0]) for name in LOSSES[:4]]
    losses += [RouterLoss("local_entropy", pooled=True), RouterLoss("global_entropy", threshold=1.0)]
    results = []
    for backend in ("cpu", "reference"):
        z = logits.clone().requires_grad_()
        options = {"gating": NOISY, "noise": draw(logits.shape)[0], "segments": segments, "num_segments": 4}
        routing = route(z, 2, losses=losses, backend=backend, **options)
        of_segments = torch.cat([value[[0, 2]] for name, value in routing.losses.items() if name != "local_entropy"])
        gradient = torch.autograd.grad(of_segments.sum() + routing.gates[segments != 1].sum(), z)[0]
        results.append([*routing.losses.values(), routing.loss, gradient[segments != 1]])
    assert results[0][-1].isfinite().all()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("threshold", [-5.0, math.log(5), 50.0, [0.1, math.log(7), 1.9]], ids=str)
def test_a_threshold_is_the_entropy_that_is_enough(threshold, backend):
    """max(0, threshold - H): code that adds H, or clamps the other way round, punishes what it should reward."""
    logits, segments = problem()
    z = logits.requires_grad_()
    losses = [RouterLoss("global_entropy", threshold=threshold)]
    routing = route(z, 2, segments=segments, losses=losses, backend=backend)
    entropy = [torch.special.entr(z[segments == s].softmax(1).mean(0)).sum() for s in range(3)]
    expected = (torch.tensor(threshold, dtype=DOUBLE) - torch.stack(entropy)).clamp_min(0)
    torch.testing.assert_close(routing.losses["global_entropy"], expected, rtol=1e-12, atol=1e-12)
    got, want = (torch.autograd.grad(v.sum(), z)[0] for v in (routing.loss, expected))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    reached = torch.tensor([e.item() for e in entropy]) > torch.tensor(threshold)
    assert (got[reached[segments]] == 0).all()


def test_uniform_use_of_s_experts_meets_the_threshold_of_log_s(backend):
    logits = torch.full((40, 8), -100.0)
    logits[torch.arange(40), torch.arange(40) % 4] = 0.0
    for experts, enough in ((3, True), (4, True), (5, False)):
        loss = route(
            logits, 1, losses=[RouterLoss("global_entropy", threshold=math.log(experts))], backend=backend
        ).loss
        assert loss.item() == pytest.approx(0.0 if enough else math.log(5 / 4), abs=1e-6)


# ---- Metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("capacity", [None, Capacity(factor=0.7), Capacity(limit=0)], ids=str)
def test_metrics(capacity, score, backend):
    logits, segments = problem()
    valid = torch.rand(60) < 0.8
    gating = Gating(score=score)
    routing = route(logits, 2, segments=segments, valid=valid, gating=gating, capacity=capacity, backend=backend)
    joint = torch.zeros(3, 7, dtype=DOUBLE)
    for s in range(3):
        rows = (segments == s) & valid
        p, chosen = probabilities(logits[rows], score), routing.experts[rows]
        joint[s] = chosen.flatten().bincount(minlength=7)
        top = p.topk(2).values
        expected = {
            "tokens": rows.sum(),
            "choices": joint[s].long(),
            "success_rate": routing.kept[rows].double().mean(),
            "load": joint[s] / joint[s].sum(),
            "entropy": torch.special.entr(p).sum(1).mean(),
            "effective_experts": torch.special.entr(p.mean(0)).sum().exp(),
            "top1_margin": (top[:, 0] - top[:, 1]).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(routing.metrics[name][s], value, rtol=1e-12, atol=1e-12)
    joint /= joint.sum()
    of_segment, of_expert = joint.sum(1, keepdim=True), joint.sum(0)
    information = (joint * (joint / (of_segment * of_expert)).log().nan_to_num(neginf=0.0)).sum()
    least = min(torch.special.entr(of_segment).sum(), torch.special.entr(of_expert).sum())
    torch.testing.assert_close(routing.metrics["mutual_information"], information, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(routing.metrics["normalized_mutual_information"], information / least)
    assert set(routing.metrics) == {*expected, "mutual_information", "normalized_mutual_information"}


def test_information_of_segments_and_experts(backend):
    """1 where the segment follows from the expert, 0 where they are independent, however often experts are chosen."""
    segments = torch.arange(40) % 2
    half = torch.arange(40) // 20
    for expert, information in ((segments, 1.0), (2 * segments + half, 1.0), (half, 0.0)):
        logits = torch.nn.functional.one_hot(expert, 4).float()
        metrics = route(logits, 1, segments=segments, backend=backend).metrics
        assert metrics["normalized_mutual_information"].item() == pytest.approx(information, abs=1e-6)
        assert metrics["mutual_information"].item() == pytest.approx(information * math.log(2), abs=1e-6)
        assert metrics["mutual_information"] >= 0


def test_metrics_have_no_gradient(backend):
    logits = torch.randn(10, 4, requires_grad=True)
    routing = route(logits, 2, losses=LOSSES, gating=NOISY, backend=backend)
    assert not any(value.requires_grad for value in routing.metrics.values())
    assert all(value.requires_grad for value in (routing.gates, routing.loss, *routing.losses.values()))


def test_metrics_are_computed_when_they_are_read(backend, monkeypatch):
    from contrastive_ops.ops.expert_routing import Statistics

    computed, metrics = [], Statistics.metrics
    monkeypatch.setattr(Statistics, "metrics", lambda *all_of_it: computed.append(1) or metrics(*all_of_it))
    logits = torch.randn(10, 4, requires_grad=True)
    routing = route(logits, 2, losses=WITHOUT_NOISE, backend=backend)
    (routing.gates.sum() + routing.loss).backward()
    assert not computed
    assert routing.metrics is routing.metrics and len(computed) == 1


def test_metrics_of_a_routing_that_was_taken_apart(backend):
    """By pytrees, as a compiled, an exported and a checkpointed function hand it on."""
    logits, segments = problem(dtype=torch.float32)

    def function(logits):
        return route(logits, 2, segments=segments, num_segments=3, losses=["z"], backend=backend)

    expected = function(logits).metrics
    leaves, spec = tree_flatten(function(logits))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Caller(function), (logits,)).module()
    for found in (tree_unflatten(leaves, spec), compiled(logits.requires_grad_()), exported(logits.detach())):
        torch.testing.assert_close(found.metrics, expected)
        assert not any(value.requires_grad for value in found.metrics.values())


class Caller(torch.nn.Module):
    """A function as a module, which torch.export takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, logits):
        return self.function(logits)


# ---- Nothing is remembered -------------------------------------------------------------------------------------------


def test_losses_survive_recomputation_and_chunks(backend):
    """megablocks collects losses in a list of its module, where a recomputed step puts them twice."""
    x, w = torch.randn(30, 6, dtype=DOUBLE), torch.randn(6, 4, dtype=DOUBLE, requires_grad=True)

    def step(x, w):
        routing = route(x @ w, 2, losses=WITHOUT_NOISE, backend=backend)
        return routing.gates.square().sum() + routing.loss

    expected = torch.autograd.grad(step(x, w), w)[0]
    assert torch.equal(torch.autograd.grad(checkpoint(step, x, w, use_reentrant=False), w)[0], expected)
    assert torch.equal(torch.autograd.grad(step(x, w), w)[0], expected)
    parts = [torch.autograd.grad(step(part, w), w)[0] for part in x.split(10)]
    total = sum(step(part, w) for part in x.split(10))
    torch.testing.assert_close(torch.autograd.grad(total, w)[0], sum(parts))


@pytest.mark.parametrize("names", list(itertools.combinations(LOSSES, 2)), ids=str)
def test_a_loss_is_the_same_whatever_else_is_asked_for(names, backend):
    logits, segments = problem(dtype=torch.float32)
    options = {"gating": NOISY, "segments": segments, "backend": backend}
    pair = route(logits, 2, losses=names, generator=draw((1, 1))[1], **options)
    for name in names:
        alone = route(logits, 2, losses=[name], generator=draw((1, 1))[1], **options)
        assert torch.equal(alone.losses[name], pair.losses[name])
        assert torch.equal(alone.gates, pair.gates)


@pytest.mark.parametrize("loss", ["importance", "switch", "load", "global_entropy"])
def test_a_loss_that_nobody_asks_for_reaches_no_gradient(loss, backend):
    """A token with NaN makes the sums of the losses NaN, and only its own gates."""
    logits = torch.randn(12, 5)
    logits[4, 2] = torch.nan
    gating = Gating(noise_std=0.5) if loss == "load" else Gating()
    leaf, others = logits.requires_grad_(), torch.arange(12) != 4
    routing = route(leaf, 2, gating=gating, losses=[loss, "z"], backend=backend)
    weight = torch.randn(12, 2)
    found = torch.autograd.grad((routing.gates * weight).sum(), leaf, retain_graph=True)[0]
    assert found[others].isfinite().all() and found[others].any(1).all()
    assert torch.autograd.grad(routing.loss, leaf)[0].isnan().any()
