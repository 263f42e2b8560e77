"""expert_choice: which tokens experts take, against loops over experts."""

import math

import pytest
import torch

from contrastive_ops import route
from contrastive_ops.ops import Capacity, Gating, RouterLoss, combine, dispatch, expert_choice

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def loop(p, eligible, count, size):
    """Each expert's best tokens of each group, ties by token: {(token, expert)}."""
    taken = set()
    for begin in range(0, len(p), size):
        for expert in range(p.shape[1]):
            tokens = [t for t in range(begin, begin + size) if eligible[t, expert]]
            tokens.sort(key=lambda t, expert=expert: -p[t, expert])  # stable
            taken |= {(t, expert) for t in tokens[:count]}
    return taken


def pairs(routing):
    tokens, experts = (routing.experts >= 0).nonzero(as_tuple=True)
    assert torch.equal(routing.experts[tokens, experts], experts)
    return set(zip(tokens.tolist(), experts.tolist(), strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("capacity, groups", [(1.0, 1), (0.4, 2), (3, 4), (100, 1), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_take_their_best_tokens(dtype, capacity, groups, padded, backend):
    logits = torch.randint(-2, 3, (40, 5)).to(dtype)  # many ties
    logits[7], logits[9, 2] = -torch.inf, -torch.inf
    valid = torch.arange(40) % 6 != 5
    size = 40 // groups
    limits = {"limit" if isinstance(capacity, int) else "factor": capacity}
    routing = expert_choice(logits, Capacity(**limits, group_size=size, padded=padded), valid=valid, backend=backend)
    count = capacity if isinstance(capacity, int) else math.ceil(capacity * size / 5)
    p = logits.double().softmax(1).to(routing.gates.dtype)
    eligible = (logits != -torch.inf) & valid[:, None]
    # Equal logits of two tokens may differ in the last bit of their probabilities, by the order of a sum.
    expected = loop((p * 2**20).round(), eligible, count, size)
    assert pairs(routing) == expected
    assert torch.equal(routing.kept, routing.experts >= 0)
    torch.testing.assert_close(routing.gates[routing.kept], p[routing.kept], rtol=1e-5, atol=1e-6)
    assert (routing.gates[~routing.kept] == 0).all()
    counts = [sum(expert == e for _, expert in expected) for e in range(5)]
    if padded:
        assert routing.offsets.tolist() == [groups * count * e for e in range(6)]
    else:
        assert routing.offsets.diff().tolist() == counts
    rows = dispatch(torch.arange(1.0, 41.0)[:, None], routing, backend=backend)
    for e in range(5):
        mine = rows[routing.offsets[e] : routing.offsets[e + 1]].flatten()
        assert sorted(mine[mine > 0].tolist()) == sorted(t + 1.0 for t, expert in expected if expert == e)


def test_a_token_sums_all_experts_that_took_it(backend):
    logits, tokens = torch.randn(12, 4).double(), torch.randn(12, 3).double()
    logits.requires_grad_()
    routing = expert_choice(logits, 2.0, backend=backend)
    out = combine(dispatch(tokens, routing, backend=backend), routing, backend=backend)
    p, expected = logits.softmax(1), torch.zeros(12, 3).double()
    for e in range(4):
        best = p[:, e].topk(6).indices
        expected = expected.index_add(0, best, p[best, e, None] * tokens[best])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), logits) for o in (out, expected)))


def test_losses_and_metrics(backend):
    logits, segments = torch.randn(30, 5).double(), torch.arange(30) % 2
    losses = ["importance", "z", RouterLoss("global_entropy", threshold=1.0)]
    options = {"segments": segments, "losses": losses, "backend": backend}
    routing, like = expert_choice(logits, 0.5, **options), route(logits, 1, **options)
    torch.testing.assert_close(routing.losses, like.losses)
    served = routing.kept.any(1)
    for s in range(2):
        rows = segments == s
        assert routing.metrics["success_rate"][s].item() == pytest.approx(served[rows].double().mean().item())
        assert torch.equal(routing.metrics["choices"][s], routing.kept[rows].sum(0))
        torch.testing.assert_close(routing.metrics["load"][s].sum(), torch.tensor(1.0).double())


def test_allowed_experts_and_sigmoid_scores(backend):
    logits, allowed = torch.randn(20, 4), torch.rand(20, 4) < 0.5
    allowed[3] = False
    routing = expert_choice(logits, 5, gating=Gating(score="sigmoid"), allowed=allowed, backend=backend)
    assert pairs(routing) == loop(logits.sigmoid(), allowed, 5, 20)


def test_nan_comes_after_every_number(backend):
    logits = torch.randn(8, 3)
    logits[2] = torch.nan
    routing = expert_choice(logits, 7, backend=backend)
    assert not routing.kept[2].any() and routing.kept.sum() == 21
    assert expert_choice(logits, 8, backend=backend).kept.all()


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 1)])
def test_small_problems(shape, backend):
    routing = expert_choice(torch.randn(shape), 1.0, losses=["importance"], backend=backend)
    assert routing.kept.all() and routing.loss.isfinite()
    assert routing.offsets[-1] == (shape[0] if shape[1] == 1 else 0)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"capacity": Capacity()}, ValueError, "capacity must have a factor or a limit"),
        (
            {"gating": Gating(renormalize=True)},
            ValueError,
            "gating must have no bias, no groups, no renormalisation and no sampled choices",
        ),
        ({"gating": Gating(bias=torch.zeros(3))}, ValueError, "gating must have no bias"),
        ({"losses": ["load"], "gating": Gating(noise_std=1.0)}, ValueError, 'losses must not have "load"'),
        ({"allowed": torch.zeros(6, 3, dtype=torch.int64)}, TypeError, r"allowed must be bool \(T, E\)"),
        ({"logits": torch.zeros(6)}, ValueError, "logits must have two dimensions"),
        ({"valid": torch.ones(5, dtype=torch.bool)}, ValueError, "valid must have shape"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"expert_choice: {message}"):
        expert_choice(**{"logits": torch.zeros(6, 3), "capacity": 1.0, **change})
