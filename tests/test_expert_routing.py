"""route: experts, gates and places against loops over tokens; who is dropped; extreme logits.

Rows of the logits are drawn from a few rows of small integers: there are many ties, and they are exact ones.
"""

import collections

import pytest
import torch
from pairwise import pairwise

from contrastive_ops import route
from contrastive_ops.ops import Capacity, Gating, RouterLoss

NAN, INF = torch.nan, torch.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = ["importance", "switch", "z", "local_entropy", "global_entropy"]


def tied(tokens, experts, dtype=torch.float32, kinds=10):
    """(T, E) logits, each row one of a few whose best scores differ."""
    pool = torch.randint(-3, 4, (kinds, experts)) + 2 * torch.arange(kinds)[:, None] * (torch.arange(experts) == 0)
    return pool[torch.randint(kinds, (tokens,))].to(dtype)


def positions(experts, score, capacity, priority, size):
    """V-MoE's rule in loops: the place of each choice among those of its expert, -1 where it has none."""
    found = torch.full_like(experts, -1)
    for begin in range(0, len(experts), size):
        turn = list(range(begin, begin + size))
        if priority == "gate":
            turn.sort(key=lambda token: -score[token])  # stable
        taken = collections.Counter()
        for j in range(experts.shape[1]):
            for token in turn:
                expert = int(experts[token, j])
                if 0 <= taken[expert] < capacity and expert >= 0:
                    found[token, j] = taken[expert]
                taken[expert] += 1  # also where the choice is dropped
    return found


def check_layout(routing, experts):
    """`slots`, `order` and `offsets` describe one assignment, in which every kept choice has one row of its expert."""
    order, offsets, slots, kept = routing.order, routing.offsets, routing.slots, routing.kept
    assert offsets[0] == 0 and (offsets.diff() >= 0).all() and len(offsets) == experts + 1
    assert torch.equal(slots[~kept], torch.full_like(slots[~kept], -1))
    rows = slots[kept]
    assert len(rows.unique()) == len(rows) == int((order >= 0).sum())
    assert torch.equal(order[rows], torch.arange(slots.numel()).view_as(slots)[kept])
    owner = routing.experts[kept]
    assert (offsets[owner] <= rows).all() and (rows < offsets[owner + 1]).all()


def decisions(routing):
    return routing.experts, routing.slots, routing.order, routing.offsets


# ---- Who is kept -----------------------------------------------------------------------------------------------------

GATES = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]]
GOLDEN = {
    "position": [[0, 1], [1, -1], [-1, -1], [-1, -1], [0, 1], [0, -1]],
    "gate": [[-1, -1], [1, -1], [-1, -1], [0, 1], [0, 1], [0, -1]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("priority", GOLDEN)
def test_the_places_of_v_moe(priority, dtype, backend):
    """Six tokens, two choices each, two places of each of three experts; as V-MoE's own dispatcher assigns them."""
    logits = torch.tensor(GATES, dtype=dtype).log()
    routing = route(logits, 2, capacity=Capacity(limit=2, padded=True), priority=priority, backend=backend)
    assert routing.experts.tolist() == [[0, 1], [0, 1], [0, 1], [0, 1], [1, 2], [2, 0]]
    expected = torch.tensor(GOLDEN[priority])
    assert torch.equal(routing.slots, torch.where(expected < 0, -1, 2 * routing.experts + expected))
    torch.testing.assert_close(routing.gates, torch.tensor(GATES, dtype=dtype).gather(1, routing.experts))
    torch.testing.assert_close(routing.metrics["success_rate"], torch.tensor([0.5], dtype=dtype))


# Tokens, experts, choices, capacity.
PLACES = [
    (1, 1, 1, Capacity(limit=1)),
    (12, 4, 2, Capacity(factor=1.0)),
    (12, 4, 2, Capacity(factor=1.0, padded=True)),
    (40, 5, 3, Capacity(factor=0.6, multiple_of=4)),
    (60, 6, 2, Capacity(limit=3, group_size=12)),
    (60, 6, 2, Capacity(factor=1.05, group_size=20, multiple_of=4, padded=True)),
    (300, 8, 4, Capacity(factor=0.5)),
    (300, 8, 2, Capacity(factor=0.8, group_size=150, padded=True)),
    (17, 17, 17, Capacity(limit=9)),
    (20, 3, 2, Capacity(limit=0)),
    (20, 3, 2, Capacity(limit=0, padded=True)),
    (20, 3, 2, Capacity(limit=1000, padded=True)),
    *((37, 9, k, Capacity(factor=0.7)) for k in range(1, 9)),
]


@pairwise(dtype=[torch.float32, torch.float64], priority=GOLDEN, case=PLACES)
def test_places_are_those_of_loops(case, priority, dtype, backend):
    tokens, experts, k, capacity = case
    logits, valid = tied(tokens, experts, dtype), torch.rand(tokens) < 0.8
    routing = route(logits, k, capacity=capacity, priority=priority, valid=valid, backend=backend)
    taken, size = capacity.slots("test", tokens, experts, k)
    place = positions(routing.experts, routing.gates[:, 0].tolist(), taken, priority, size)
    assert torch.equal(routing.kept, place >= 0)
    check_layout(routing, experts)
    groups = tokens // size
    if capacity.padded:
        assert torch.equal(routing.offsets, torch.arange(experts + 1) * groups * taken)
        group = torch.arange(tokens)[:, None] // size
        expected = (routing.experts * groups + group) * taken + place
        assert torch.equal(routing.slots, torch.where(place < 0, -1, expected))
        assert len(routing.order) == experts * groups * taken
    else:
        assert len(routing.order) == min(tokens * k, experts * groups * taken)
        flat = routing.experts.flatten()[place.flatten() >= 0]
        assert torch.equal(routing.offsets.diff(), flat.bincount(minlength=experts))
        for begin, end in zip(routing.offsets[:-1], routing.offsets[1:], strict=True):
            assert (routing.order[begin:end].diff() > 0).all()


def test_without_a_capacity_nothing_is_dropped(backend):
    logits = tied(50, 5)
    routing = route(logits, 3, backend=backend)
    assert routing.kept.all() and len(routing.order) == 150
    check_layout(routing, 5)
    flat = routing.experts.flatten()
    assert torch.equal(routing.order, flat.argsort(stable=True))
    assert torch.equal(routing.offsets.diff(), flat.bincount(minlength=5))
    for priority in GOLDEN:
        assert torch.equal(route(logits, 3, priority=priority, backend=backend).slots, routing.slots)


@pytest.mark.parametrize("tokens,experts,k,factor,expected", [
    (10, 4, 1, 1.0, 3), (10, 4, 2, 1.0, 5), (3648, 32, 1, 1.05, 120), (100, 10, 1, 1.1, 11), (70, 7, 3, 0.1, 3),
    (10, 4, 1, 0.0, 0), (10, 4, 1, 1e-3, 1),
])  # fmt: skip
def test_a_float_is_a_share_rounded_up_and_an_int_a_number(tokens, experts, k, factor, expected):
    """100 * 1.1 / 10 is above 11 in floating point, which must not cost a place of every expert."""
    padded, number = (Capacity(factor=factor, padded=True), Capacity(limit=expected, padded=True))
    logits = torch.randn(tokens, experts)
    by_share, by_number = (route(logits, k, capacity=c) for c in (padded, number))
    assert int(by_share.offsets[1]) == expected
    assert all(torch.equal(a, b) for a, b in zip(decisions(by_share), decisions(by_number), strict=True))
    for given, described in ((factor, Capacity(factor=factor)), (expected, Capacity(limit=expected))):
        pair = [route(logits, k, capacity=c) for c in (given, described)]
        assert torch.equal(pair[0].slots, pair[1].slots)


def test_groups_share_nothing(backend):
    logits = tied(60, 5)
    whole = route(logits, 2, capacity=Capacity(limit=3, group_size=15), backend=backend)
    for part, kept in zip(logits.split(15), whole.kept.split(15), strict=True):
        assert torch.equal(route(part, 2, capacity=3, backend=backend).kept, kept)


@pytest.mark.parametrize("renormalize", [False, True])
def test_priority_is_the_score_of_the_first_choice(renormalize, backend):
    """A renormalised gate of 0.9 comes from a low score here, and would reverse the order of the tokens."""
    p = torch.tensor([[0.36, 0.04, 0.30, 0.30], [0.50, 0.49, 0.005, 0.005]])
    mask = torch.tensor([[True, True, False, False], [True, True, False, False]])
    gating = Gating(score="sigmoid", renormalize=renormalize)
    routing = route(p.logit(), 2, capacity=1, gating=gating, allowed=mask, backend=backend)
    assert routing.experts.tolist() == [[0, 1], [0, 1]]
    assert routing.kept.tolist() == [[False, False], [True, True]]


def test_position_keeps_the_first_tokens(backend):
    """Megatron asks topk, which orders equal values as it likes, for the first C tokens, and gets others."""
    logits = torch.zeros(4096, 8)
    logits[torch.arange(4096), torch.randint(8, (4096,))] = 1.0
    routing = route(logits, 1, capacity=256, priority="position", backend=backend)
    rank = torch.nn.functional.one_hot(routing.experts[:, 0], 8).cumsum(0).gather(1, routing.experts)
    assert torch.equal(routing.kept, rank <= 256)


def pairs_of_image_and_text(spread):
    """64 pairs of 49 image and 8 text tokens: images choose any of 32 experts, texts are sure of one of `spread`."""
    generator = torch.Generator().manual_seed(STARVATION_SEED)
    image, text = torch.randn(64 * 49, 32, generator=generator), torch.zeros(64 * 8, 32)
    text[torch.arange(len(text)), torch.arange(len(text)) % spread] = 6.0
    return torch.cat([image, text]), torch.arange(64 * 57) // (64 * 49)


# A draw in which the experts of the texts have as many images as in the experiment whose numbers are below.
STARVATION_SEED = 0
# Experts of the texts, priority, share of image and text tokens that are kept.
STARVATION = [
    (1, "position", 1.00, 0.02),
    (1, "gate", 0.965, 0.234),
    (8, "position", 1.00, 0.27),
    (8, "gate", 0.881, 1.00),
]


@pytest.mark.parametrize("spread,priority,image,text", STARVATION)
def test_a_collapsed_minority_starves(spread, priority, image, text, backend):
    """Priority and the entropy of a modality are complements: a collapsed text overflows whatever the priority."""
    logits, segments = pairs_of_image_and_text(spread)
    options = {"segments": segments, "num_segments": 2, "backend": backend}
    routing = route(logits, 1, capacity=1.05, priority=priority, **options)
    kept = routing.metrics["success_rate"].tolist()
    assert kept[0] == pytest.approx(image, abs=0.03) and kept[1] == pytest.approx(text, abs=0.05)
    # Exactly: texts get 120 places less those of the images before them, or all 120.
    images = routing.experts[segments == 0, 0].bincount(minlength=32)[:spread]
    places = torch.full_like(images, 120) if priority == "gate" else (120 - images).clamp_min(0)
    assert kept[1] == pytest.approx(int(places.clamp_max(512 // spread).sum()) / 512)
    # The balance of both together hardly shows it.
    pooled = route(logits, 1, losses=["importance"], backend=backend).losses["importance"]
    assert pooled.item() == pytest.approx(0.54 if spread == 1 else 0.055, abs=0.03)


# ---- Scores ----------------------------------------------------------------------------------------------------------


@pairwise(dtype=DTYPES, experts=[1, 2, 7, 8, 16, 33, 130], k=[1, 2, 16, 17, 130])
def test_experts_are_those_of_a_stable_sort(experts, k, dtype, backend):
    logits = tied(23, experts, dtype)
    k = min(k, experts)
    routing = route(logits, k, backend=backend)
    assert torch.equal(routing.experts, logits.double().sort(dim=1, descending=True, stable=True).indices[:, :k])
    expected = logits.double().softmax(1).gather(1, routing.experts)
    assert routing.gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(routing.gates.double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gates(score, renormalize, backend):
    logits = torch.randn(30, 11, dtype=torch.float64)
    routing = route(logits, 3, gating=Gating(score=score, renormalize=renormalize), backend=backend)
    gates = (logits.softmax(1) if score == "softmax" else logits.sigmoid()).topk(3)
    expected = gates.values / gates.values.sum(1, keepdim=True) if renormalize else gates.values
    assert torch.equal(routing.experts, gates.indices)
    torch.testing.assert_close(routing.gates, expected)


def test_gates_are_not_renormalised_after_a_drop(backend):
    logits = torch.randn(40, 4, dtype=torch.float64)
    gating = Gating(renormalize=True)
    whole, dropped = (route(logits, 2, capacity=c, gating=gating, backend=backend) for c in (None, 3))
    assert not dropped.kept.all() and torch.equal(whole.gates, dropped.gates)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_bias_changes_the_choice_and_no_gate(score, backend):
    logits, bias = torch.randn(40, 6, dtype=torch.float64), torch.linspace(0.5, -0.5, 6)
    routing = route(logits, 2, gating=Gating(score=score, bias=bias), backend=backend)
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    assert torch.equal(routing.experts, (scores + bias.double()).topk(2).indices)
    assert not torch.equal(routing.experts, scores.topk(2).indices)
    torch.testing.assert_close(routing.gates, scores.gather(1, routing.experts))


def limited(scores, k, groups, kept, group_score):
    """The k best experts of the best groups, in loops."""
    found = []
    for row in scores.tolist():
        size = len(row) // groups
        members = [sorted(row[g * size : (g + 1) * size], reverse=True) for g in range(groups)]
        value = [sum(m[:2]) if group_score == "top2" else m[0] for m in members]
        best = sorted(range(groups), key=lambda g: -value[g])[:kept]
        eligible = [e for e in range(len(row)) if e // size in best]
        found.append(sorted(eligible, key=lambda e: -row[e])[:k])
    return torch.tensor(found)


@pytest.mark.parametrize("group_score", ["top2", "max"])
@pytest.mark.parametrize("groups,kept", [(4, 2), (4, 1), (3, 2), (12, 5), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_groups_of_experts(groups, kept, group_score, bias, backend):
    logits = torch.randn(60, 12, dtype=torch.float64)
    added = torch.randn(12).double() / 4 if bias else None
    gating = Gating(bias=added, expert_groups=groups, kept_groups=kept, group_score=group_score)
    routing = route(logits, 3, gating=gating, backend=backend)
    scores = logits.softmax(1) + (0 if added is None else added)
    assert torch.equal(routing.experts, limited(scores, 3, groups, kept, group_score))
    torch.testing.assert_close(routing.gates, logits.softmax(1).gather(1, routing.experts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise(dtype, backend):
    logits = torch.randn(30, 5).to(dtype)

    def noisy(seed):
        generator = torch.Generator().manual_seed(seed)
        return route(logits, 2, gating=Gating(noise_std=2.0), generator=generator, backend=backend)

    first, again, other = noisy(1), noisy(1), noisy(2)
    assert torch.equal(first.gates, again.gates) and torch.equal(first.experts, again.experts)
    assert not torch.equal(first.gates, other.gates)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    noise = torch.randn(30, 5, dtype=wide, generator=torch.Generator().manual_seed(1))
    expected = (logits.to(wide) + 2.0 / 5 * noise).softmax(1).topk(2)
    assert torch.equal(first.experts, expected.indices)
    torch.testing.assert_close(first.gates, expected.values)
    torch.manual_seed(1)
    assert torch.equal(route(logits, 2, gating=Gating(noise_std=2.0), backend=backend).gates, first.gates)


# ---- Tokens and experts that take no part ----------------------------------------------------------------------------


def same(found, expected):
    for name in ("experts", "gates", "slots", "order", "offsets", "loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name)
    for name in ("losses", "metrics"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_an_expert_that_is_not_allowed_has_the_logit_of_minus_infinity(score, backend):
    logits, allowed = torch.randn(50, 7), torch.rand(50, 7) < 0.4
    allowed[[4, 9]] = False
    options = {"capacity": 6, "gating": Gating(score=score), "losses": LOSSES, "backend": backend}
    by_mask = route(logits, 3, allowed=allowed, **options)
    same(by_mask, route(logits.masked_fill(~allowed, -INF), 3, **options))
    same(by_mask, route(logits.masked_fill(~allowed, NAN), 3, allowed=allowed, **options))
    same(by_mask, route(logits, 3, allowed=allowed.T.contiguous().T, **options))
    counts = allowed.sum(1)
    assert counts.unique().tolist() == list(range(int(counts.max()) + 1)) and counts.max() > 3
    assert torch.equal((by_mask.experts >= 0).sum(1), counts.clamp_max(3))
    assert (by_mask.gates[by_mask.experts < 0] == 0).all()
    assert allowed.gather(1, by_mask.experts.clamp_min(0))[by_mask.experts >= 0].all()
    assert by_mask.metrics["tokens"].tolist() == [int((counts > 0).sum())]


def test_experts_that_are_given(backend):
    logits = torch.randn(20, 6, dtype=torch.float64)
    given = torch.rand(20, 6).argsort(1)[:, :2]
    given[3, 1] = given[5, 0] = -1
    routing = route(logits, 2, allowed=given, capacity=4, backend=backend)
    assert torch.equal(routing.experts, given)
    expected = logits.softmax(1).gather(1, given.clamp_min(0)).masked_fill(given < 0, 0.0)
    torch.testing.assert_close(routing.gates, expected)
    check_layout(routing, 6)
    place = positions(given, routing.gates[:, 0].tolist(), 4, "gate", 20)
    assert torch.equal(routing.kept, place >= 0)
    single = route(logits, allowed=given[:, 0].clamp_min(0), backend=backend)
    assert torch.equal(single.experts[:, 0], given[:, 0].clamp_min(0))


def test_a_token_that_is_given_no_expert_is_left_out(backend):
    logits, given = torch.randn(9, 4), torch.randint(4, (9, 1))
    left_out = torch.arange(9) % 3 == 0
    routing = route(logits, allowed=given.masked_fill(left_out[:, None], -1), losses=LOSSES, backend=backend)
    same(routing, route(logits, allowed=given, valid=~left_out, losses=LOSSES, backend=backend))
    assert routing.metrics["tokens"].tolist() == [6]
    valid = torch.arange(9) % 2 == 0
    both = route(logits, allowed=given.masked_fill(left_out[:, None], -1), valid=valid, losses=LOSSES, backend=backend)
    same(both, route(logits, allowed=given, valid=valid & ~left_out, losses=LOSSES, backend=backend))
    assert both.metrics["tokens"].tolist() == [3]


@pytest.mark.parametrize("live", [0, 1, 30], ids=str)
def test_many_tokens_in_a_row_that_are_not_routed(live, backend):
    """Gradients of whole blocks without a token that is."""
    logits, valid = torch.full((70, 5), NAN), torch.arange(70) >= 70 - live
    logits[valid] = torch.randn(live, 5)
    short, logits = logits[valid].requires_grad_(), logits.requires_grad_()
    options = {"gating": Gating(noise_std=0.0), "losses": LOSSES, "backend": backend}
    padded, alone = route(logits, 2, valid=valid, **options), route(short, 2, **options)
    found, expected = (
        torch.autograd.grad((each.gates * torch.tensor([1.0, 3.0])).sum() + each.loss, leaf)[0]
        for each, leaf in ((padded, logits), (alone, short))
    )
    assert (found[~valid] == 0).all()
    torch.testing.assert_close(found[valid], expected)


@pytest.mark.parametrize("priority", GOLDEN)
@pytest.mark.parametrize("padding", [NAN, 0.0, INF])
def test_padding_changes_nothing(padding, priority, backend):
    logits, valid = torch.randn(40, 5), torch.rand(40) < 0.6
    segments = torch.randint(3, (40,))
    options = {"capacity": 7, "priority": priority, "num_segments": 3, "losses": LOSSES, "backend": backend}
    filled = logits.masked_fill(~valid[:, None], padding).requires_grad_()
    short = logits[valid].requires_grad_()
    padded = route(filled, 2, valid=valid, segments=segments, **options)
    alone = route(short, 2, segments=segments[valid], **options)
    assert (padded.experts[~valid] == -1).all() and (padded.gates[~valid] == 0).all()
    assert not padded.kept[~valid].any()
    assert torch.equal(padded.slots[valid], alone.slots) and torch.equal(padded.offsets, alone.offsets)
    torch.testing.assert_close(padded.gates[valid], alone.gates, rtol=0, atol=0)
    for name in ("losses", "metrics"):
        torch.testing.assert_close(getattr(padded, name), getattr(alone, name), equal_nan=True)
    weight = torch.randn(40, 2)
    found = torch.autograd.grad((padded.gates * weight).sum() + padded.loss, filled)[0]
    expected = torch.autograd.grad((alone.gates * weight[valid]).sum() + alone.loss, short)[0]
    assert (found[~valid] == 0).all()
    torch.testing.assert_close(found[valid], expected)


# ---- Extreme logits --------------------------------------------------------------------------------------------------

# One row of logits, and its experts for k = 4: no expert twice, whatever the logits are.
ROWS = {
    "equal": ([1.0, 1.0, 1.0, 1.0], [0, 1, 2, 3]),
    "signed zeros": ([-0.0, 0.0, -0.0, 1.0], [3, 0, 1, 2]),
    "NaN": ([NAN, 1.0, NAN, 2.0], [3, 1, 0, 2]),
    "only NaN": ([NAN, NAN, NAN, NAN], [0, 1, 2, 3]),
    "NaN and minus infinity": ([-INF, NAN, -INF, 2.0], [3, 1, -1, -1]),
    "infinities": ([INF, -INF, INF, 3.0], [0, 2, 3, -1]),
    "minus infinity": ([-INF, -INF, -INF, 0.5], [3, -1, -1, -1]),
    "only minus infinity": ([-INF, -INF, -INF, -INF], [-1, -1, -1, -1]),
    "huge": ([3e38, -3e38, 1e30, 0.0], [0, 2, 3, 1]),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("width", [4, 20, 40])
def test_every_row_has_different_experts(name, width, backend):
    """TransformerEngine and vLLM return one expert several times where logits are NaN or masked."""
    row, expected = ROWS[name]
    logits = torch.full((3, width), -INF)
    logits[1, :4], logits[0, :4], logits[2, :4] = torch.tensor(row), torch.arange(4.0), torch.arange(4.0)
    for k in (1, 2, 4, width):
        routing = route(logits, k, capacity=2, backend=backend)
        want = torch.tensor(expected + [-1] * (width - 4))[:k]
        assert torch.equal(routing.experts[1], want)
        assert routing.experts[0, 0] == 3 and routing.gates[[0, 2]].isfinite().all()
        check_layout(routing, width)
        missing = want < 0
        assert (routing.gates[1][missing] == 0).all()
        bad = torch.tensor(row).isnan().any() or (torch.tensor(row) == INF).any()
        assert torch.equal(routing.gates[1].isnan(), ~missing & bad)


@pytest.mark.parametrize("extreme", [[INF], [INF, INF], [-INF, INF], [INF, NAN], [NAN], [-INF]])
def test_logsumexp_of_extreme_logits_is_that_of_torch(extreme, backend):
    logits = torch.randn(19, 37)
    logits[5, 2 : 2 + len(extreme)] = torch.tensor(extreme)
    found = route(logits, 2, losses=["z"], backend=backend).losses["z"]
    torch.testing.assert_close(found[0], logits.logsumexp(1).square().mean(), equal_nan=True)


def test_nan_tokens_come_last_and_spoil_the_losses_of_their_segment_only(backend):
    logits = torch.zeros(6, 2)
    logits[[0, 2]] = NAN
    logits[3:, 0] = torch.tensor([1.0, 2.0, 1.0])
    options = {"segments": torch.tensor([0, 1, 0, 1, 1, 1]), "num_segments": 2, "backend": backend}
    routing = route(logits, 1, capacity=4, losses=LOSSES, **options)
    assert routing.experts.flatten().tolist() == [0] * 6
    assert routing.kept.flatten().tolist() == [False, True, False, True, True, True]
    assert route(logits, 1, capacity=5, **options).kept.flatten().tolist() == [True, True, False, True, True, True]
    assert routing.loss.isnan()
    for value in routing.losses.values():
        assert value[0].isnan() and value[1].isfinite()


@pytest.mark.parametrize("capacity", [0, 0.0, Capacity(limit=0, padded=True)])
def test_every_token_may_be_dropped(capacity, backend):
    logits = torch.randn(8, 4, requires_grad=True)
    routing = route(logits, 2, capacity=capacity, losses=LOSSES, backend=backend)
    assert not routing.kept.any() and len(routing.order) == 0 and (routing.offsets == 0).all()
    assert routing.metrics["success_rate"].tolist() == [0.0] and (routing.gates > 0).all()
    routing.loss.backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "capacity", [None, 3, Capacity(limit=2, group_size=4), Capacity(limit=2, padded=True)], ids=str
)
def test_no_tokens(capacity, backend):
    logits = torch.zeros(0, 4, requires_grad=True)
    losses = [*LOSSES, RouterLoss("load")]
    routing = route(logits, 2, capacity=capacity, gating=Gating(noise_std=1.0), losses=losses, backend=backend)
    assert routing.experts.shape == routing.gates.shape == routing.slots.shape == (0, 2)
    assert (routing.order == -1).all() and len(routing.order) == int(routing.offsets[-1])
    assert all(value.tolist() == [0.0] for value in routing.losses.values())
    assert torch.autograd.grad(routing.loss, logits)[0].shape == (0, 4)


# ---- Backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"capacity": 0.8}, {"capacity": Capacity(limit=4, group_size=50, padded=True)},
                                     {"gating": Gating(score="sigmoid"), "capacity": 1.0}], ids=str)  # fmt: skip
def test_backends_decide_alike(options, dtype):
    logits = tied(200, 9, dtype)
    found = [decisions(route(logits, 3, backend=backend, **options)) for backend in ("reference", "cpu")]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
