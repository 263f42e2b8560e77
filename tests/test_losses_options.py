"""Rules, biases, weights and diagnostics: which loss has them, and what they mean, against dense formulas."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import losses
from contrastive_ops.core.rules import Guide, Pairs
from contrastive_ops.losses import RunningDenominator
from contrastive_ops.testing import LOSSES
from contrastive_ops.testing.compare import check, leaf, number, reduced

DOUBLE = torch.float64
N, D = 7, 5


# ---- Which loss has which option -------------------------------------------------------------------------------------

OPTIONS = {"pairs", "col_bias", "weight", "diagnostics"}
SEVERAL = "a row has several positives, or graded ones, and no one rank"
ALL = "every key is a positive to some extent, and the sum of these extents is no sweep over the logits"
AVERAGED = "its negatives are averaged, and a bias would be one more weight of this average"
BLOCKS = "columns are queries and documents in four blocks, of which one has what is retrieved"
PREFIXES = "the sweep of all prefixes has one fold and knows the rules diagonal and differ only"
CLASSES = "its columns are classes, all of which take part"
# What a loss of a batch against itself lacks, and why. All others have all of OPTIONS.
MISSING = {
    "multi_positive_siglip": {"diagnostics": SEVERAL},
    "y_aware_info_nce": {"pairs": ALL, "col_bias": ALL, "diagnostics": SEVERAL},
    "sup_con": {"diagnostics": SEVERAL},
    "multi_positive_info_nce": {"diagnostics": SEVERAL},
    "soft_info_nce": {"diagnostics": SEVERAL},
    "bixse": {"diagnostics": SEVERAL},
    "debiased": {"col_bias": AVERAGED},
    "hcl": {"col_bias": AVERAGED},
    "hn_nce": {"col_bias": AVERAGED},
    "gte": {"col_bias": BLOCKS, "diagnostics": BLOCKS},
    "gist": {"col_bias": BLOCKS, "diagnostics": BLOCKS},
    "matryoshka_info_nce": {"col_bias": PREFIXES, "diagnostics": PREFIXES},
    "matryoshka_clip": {"col_bias": PREFIXES, "diagnostics": PREFIXES},
    "matryoshka_nt_xent": {"col_bias": PREFIXES, "diagnostics": PREFIXES},
    "mined_info_nce": {"diagnostics": "each row has columns of its own"},
    "cos_face": {"pairs": CLASSES, "col_bias": CLASSES, "diagnostics": CLASSES},
    "arc_face": {"pairs": CLASSES, "col_bias": CLASSES, "diagnostics": CLASSES},
    "margin_softmax": {"pairs": CLASSES, "col_bias": CLASSES, "diagnostics": CLASSES},
}
IN_BATCH = {"info_nce", "clip", "nt_xent", "dcl", "sog_clr", "moco", "siglip", *MISSING}


def test_every_softmax_or_sigmoid_loss_of_a_batch_has_every_option_or_a_reason():
    for name in IN_BATCH:
        found = OPTIONS & set(inspect.signature(LOSSES[name].function).parameters)
        assert found == OPTIONS - set(MISSING.get(name, ())), name


@pytest.mark.parametrize("name", sorted(IN_BATCH))
def test_words_of_options_are_the_same_everywhere(name):
    """In one order, and described wherever they are."""
    function = LOSSES[name].function
    parameters = list(inspect.signature(function).parameters)
    order = ["temperature", "scale", "pairs", "col_bias", "weight", "reduction", "normalize", "diagnostics", "backend"]
    given = [each for each in order if each in parameters]
    assert [each for each in parameters if each in given] == given
    for each in given:
        assert f"\n        {each}: " in function.__doc__, each


# ---- The dense truth -------------------------------------------------------------------------------------------------

IDS = torch.tensor([0, 1, 0, 2, -1, 3, 1])
VIEW_IDS = IDS.repeat(2)
GUIDE = torch.randn(2 * N, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))


def rules(ids, similarity=None, guide=None):
    """Pairs with ids, a bound and a guide, and the N x M mask of what they keep."""
    same = (ids[:, None] == ids) & (ids[:, None] != -1)
    keep = ~same & (similarity <= 0.6)
    given = {"differ": (ids, ids), "below": 0.6}
    if guide is not None:
        given["guide"] = Guide(guide, None, below=1.0)
        keep = keep & (guide @ guide.T <= 1.0)
    return Pairs(**given), keep


def unit(*rows):
    return [F.normalize(each) for each in rows]


def check_all(values, truth, leaves, tolerance=1e-9):
    """Every value and its gradients against one truth."""
    inputs, cotangent = [each for each in leaves if each is not None], torch.randn_like(truth)
    expected = torch.autograd.grad(truth, inputs, cotangent)
    for value in values:
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)
        for got, wanted in zip(torch.autograd.grad(value, inputs, cotangent), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def ranks(similarity, keep, target):
    """The rank of each row's target among what is kept; keep says nothing of the target."""
    own = similarity.gather(1, target[:, None])
    others = keep.scatter(1, target[:, None], False)
    return ((similarity >= own) & others).sum(1) + 1


def views(scale):
    z0, z1 = leaf(N, D), leaf(N, D)
    (z,) = unit(torch.cat([z0, z1]))
    target = torch.arange(2 * N).roll(N)
    pairs, keep = rules(VIEW_IDS, z @ z.T, GUIDE)
    keep = keep.fill_diagonal_(False).scatter(1, target[:, None], False)
    return z0, z1, z, target, pairs, keep, scale * z @ z.T


def of_two_views(name, logits, target, keep, scale, bias):
    """The row losses by the papers' formulas, and which rows count."""
    logits = logits + bias
    own, counted = logits.gather(1, target[:, None]).squeeze(1), keep.any(1)
    others = torch.where(keep, logits, -torch.inf).logsumexp(1)
    if name == "nt_xent":
        everything = keep.scatter(1, target[:, None], True)
        return -torch.where(everything, logits, -torch.inf).log_softmax(1).gather(1, target[:, None]).squeeze(1), None
    if name == "dcl":
        return torch.where(counted, others - own, 0.0), counted
    count, beta, tau_plus = keep.sum(1).double(), 0.5 if name == "hcl" else 0.0, 0.1
    share = (torch.where(keep, beta * logits, -torch.inf)).softmax(1)
    mass = count * (torch.where(keep, share, 0.0) * logits.exp()).sum(1)
    mass = (mass - tau_plus * count * own.exp()) / (1 - tau_plus)
    mass = torch.maximum(mass, count * torch.exp(-scale))
    return -(own.exp() / (own.exp() + mass)).log(), counted


@pytest.mark.parametrize("of_rows", [False, True], ids=["weights of samples", "weights of rows"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["nt_xent", "dcl", "debiased", "hcl"])
def test_two_views(backend, name, reduction, of_rows):
    scale = number(2.0)
    z0, z1, z, target, pairs, keep, logits = views(scale)
    weight = torch.rand(2 * N if of_rows else N, dtype=DOUBLE, requires_grad=True)
    given = {"scale": scale, "pairs": pairs, "weight": weight, "reduction": reduction, "backend": backend}
    bias = leaf(2 * N) if name in ("nt_xent", "dcl") else None
    if bias is not None:
        given["col_bias"] = bias
    if name == "hcl":
        given["beta"] = 0.5
    rows, counted = of_two_views(name, logits, target, keep, scale, 0.0 if bias is None else bias)
    truth = reduced(rows, reduction, weight if of_rows else weight.repeat(2), counted)
    leaves = [z0, z1, scale, weight, bias]
    value, found = getattr(losses, name)(z0, z1, diagnostics=True, **given)
    check_all([getattr(losses, name)(z0, z1, **given), value], truth, leaves)
    assert torch.equal(found.rank, ranks(z @ z.T, keep, target))


def test_label_smoothing_of_two_views(backend):
    scale, share = number(2.0), torch.rand(2 * N, dtype=DOUBLE, requires_grad=True)
    z0, z1, _, target, pairs, keep, logits = views(scale)
    keep = keep.scatter(1, target[:, None], True)
    log_p = torch.where(keep, logits, -torch.inf).log_softmax(1)
    spread = torch.where(keep, log_p, 0.0).sum(1) / keep.sum(1)
    own = log_p.gather(1, target[:, None]).squeeze(1)
    truth = -((1 - share) * own + share * spread).mean()
    value = losses.nt_xent(z0, z1, scale=scale, pairs=pairs, label_smoothing=share, backend=backend)
    check(value, truth, [z0, z1, scale, share])


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (0.5, 0.75), (0.0, 0.5)])
def test_hn_nce(backend, alpha, beta):
    image, text, scale, weight = leaf(N, D), leaf(N, D), number(1.5), torch.rand(N, dtype=DOUBLE, requires_grad=True)
    x, y = unit(image, text)
    pairs, keep = rules(IDS, x @ y.T)
    keep = keep.fill_diagonal_(False)
    keep[:, 1], keep[1, :] = False, False  # a pair without negatives
    ids = torch.arange(N)
    pairs = Pairs(differ=pairs.differ, below=0.6, same=(torch.where(ids == 1, -1, 0), torch.where(ids == 1, -1, 0)))
    truth = 0.0
    for logits, kept in ((scale * x @ y.T, keep), (scale * y @ x.T, keep.T)):
        own, count = logits.diagonal(), kept.sum(1)
        share = torch.where(kept, torch.where(kept, beta * logits, -torch.inf).softmax(1), 0.0)
        mass = count * (share * logits.exp()).sum(1)
        each = (alpha * own.exp() + torch.where(count > 0, mass, 1.0)).log() - own
        truth = truth + torch.where(count > 0, each, 0.0) / 2
    counted = keep.any(1) | keep.any(0)
    assert not counted[1] and counted[0]
    given = {"alpha": alpha, "beta": beta, "scale": scale, "pairs": pairs, "weight": weight, "backend": backend}
    value, found = losses.hn_nce(image, text, diagnostics=True, **given)
    truth = reduced(truth, "mean", weight, counted)
    check_all([value, losses.hn_nce(image, text, **given)], truth, [image, text, scale, weight])
    for each, similarity, kept in ((found[0], x @ y.T, keep), (found[1], y @ x.T, keep.T)):
        assert torch.equal(each.rank, ranks(similarity, kept, torch.arange(N)))


def test_sog_clr(backend):
    image, text, scale, text_scale = leaf(N, D), leaf(N, D), number(1.5), number(2.5)
    weight, bias = torch.rand(N, dtype=DOUBLE, requires_grad=True), leaf(N)
    x, y = unit(image, text)
    pairs, keep = rules(IDS, x @ y.T)
    keep = keep.fill_diagonal_(False)
    state, gamma, eps = RunningDenominator(30, gamma=0.7), 0.7, 1e-3
    index = torch.arange(N) * 3
    with torch.no_grad():
        state.log_u[:, ::2] = torch.randn(2, 15)
    old = state.log_u[:, index].double()
    truth = 0.0
    for side, (logits, kept) in enumerate(((scale * x @ y.T + bias, keep), (text_scale * y @ x.T, keep.T))):
        g = (kept * (logits - logits.diagonal()[:, None]).exp()).sum(1) / kept.sum(1).clamp_min(1)
        u = torch.where(old[side] == -torch.inf, g, (1 - gamma) * old[side].exp() + gamma * g).detach() + eps
        each = u.log() + (g - g.detach()) / u
        truth = truth + torch.where(kept.any(1), each, 0.0) / 2
    truth = reduced(truth, "mean", weight, keep.any(1) | keep.any(0))
    given = {"scale": scale, "text_scale": text_scale, "pairs": pairs, "col_bias": bias, "weight": weight, "eps": eps}
    state.eval()
    leaves = [image, text, scale, text_scale, weight, bias]
    value, found = losses.sog_clr(image, text, index, state, backend=backend, diagnostics=True, **given)
    check_all([value, losses.sog_clr(image, text, index, state, backend=backend, **given)], truth, leaves, 1e-6)
    assert torch.equal(found[1].rank, ranks(y @ x.T, keep.T, torch.arange(N)))


def test_siglip_diagnostics(backend):
    image, text, scale, bias = leaf(N, D), leaf(N, D), number(1.5), number(-1.0)
    weight, of_texts = torch.rand(N, dtype=DOUBLE, requires_grad=True), leaf(N)
    x, y = unit(image, text)
    pairs, keep = rules(IDS, x @ y.T)
    keep = keep.fill_diagonal_(False)
    logits = scale * x @ y.T + bias + of_texts
    truth = torch.where(keep, F.softplus(logits), 0.0).sum(1) + F.softplus(-logits.diagonal())
    given = {"scale": scale, "bias": bias, "pairs": pairs, "col_bias": of_texts, "weight": weight, "backend": backend}
    value, found = losses.siglip(image, text, diagnostics=True, **given)
    leaves = [image, text, scale, bias, weight, of_texts]
    check_all([value, losses.siglip(image, text, **given)], reduced(truth, "mean", weight), leaves)
    for each, similarity, kept in ((found[0], x @ y.T, keep), (found[1], y @ x.T, keep.T)):
        assert torch.equal(each.rank, ranks(similarity, kept, torch.arange(N)))
        torch.testing.assert_close(each.accuracy, (each.rank == 1).double().mean())
        torch.testing.assert_close(each.negative_similarity, similarity[kept].mean())


@pytest.mark.parametrize("lists", [False, True], ids=["one grade", "lists"])
def test_bixse(backend, lists):
    query, key, scale, bias = leaf(N, D), leaf(N, D), number(1.5), leaf(N)
    grades = torch.rand(N, dtype=DOUBLE, requires_grad=True)
    x, y = unit(query, key)
    pairs, keep = rules(IDS, x @ y.T)
    target = torch.arange(N).roll(1)
    logits, label = scale * x @ y.T - 2.0 + bias, torch.zeros(N, N, dtype=DOUBLE)
    label = label.scatter(1, target[:, None], grades[:, None])
    each = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    truth = torch.where(keep.scatter(1, target[:, None], True), each, 0.0).sum(1).mean()
    given = {"target": target, "indptr": torch.arange(N + 1) if lists else None, "pairs": pairs, "col_bias": bias}
    value = losses.bixse(query, key, grades, scale=scale, bias=-2.0, backend=backend, **given)
    check(value, truth, [query, key, scale, bias, grades])


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, -1, 3, 1])], ids=["bounds alone", "labels"])
def test_moco(backend, labels):
    entries = 9
    query, key, queue, scale, bias = leaf(N, D), leaf(N, D), torch.randn(entries, D, dtype=DOUBLE), number(1.5), leaf(9)
    of_queue, share = torch.arange(entries) % 4, torch.rand(N, dtype=DOUBLE, requires_grad=True)
    weight = torch.rand(N, dtype=DOUBLE, requires_grad=True)
    x, k, q = unit(query, key, queue)
    keep = x @ q.T <= 0.5
    indptr, listed = torch.arange(N + 1), torch.arange(N)
    keep[torch.arange(N), listed] = False
    if labels is not None:
        keep = keep & (labels[:, None] != of_queue)
    logits = torch.cat([(x * k).sum(1, keepdim=True), x @ q.T], 1) * scale + torch.cat([bias.new_zeros(1), bias])
    keep = torch.cat([keep.new_ones(N, 1), keep], 1)
    log_p = torch.where(keep, logits, -torch.inf).log_softmax(1)
    spread = torch.where(keep, log_p, 0.0).sum(1) / keep.sum(1)
    truth = reduced(-((1 - share) * log_p[:, 0] + share * spread), "mean", weight)
    given = {"pairs": Pairs(below=0.5, exclude=(indptr, listed)), "col_bias": bias, "scale": scale, "weight": weight}
    if labels is not None:
        given |= {"labels": labels, "queue_labels": of_queue}
    value, found = losses.moco(query, key, queue, label_smoothing=share, backend=backend, diagnostics=True, **given)
    check(value, truth, [query, key, scale, bias, share, weight])
    similarity = torch.cat([(x * k).sum(1, keepdim=True), x @ q.T], 1)
    assert torch.equal(found.rank, ranks(similarity, keep, torch.zeros(N, dtype=torch.int64)))
    torch.testing.assert_close(found.negative_similarity, similarity[:, 1:][keep[:, 1:]].mean())


LABELS = torch.tensor([0, 1, 0, 2, 1, 0, -1])


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("name", ["sup_con", "multi_positive_info_nce", "multi_positive_siglip"])
def test_several_positives(backend, name, two_sided):
    if name == "multi_positive_siglip" and not two_sided:
        pytest.skip("has two sides")
    x, y, scale, bias = leaf(N, D), leaf(N, D) if two_sided else None, number(1.5), leaf(N)
    u = F.normalize(x)
    similarity = u @ (F.normalize(y) if two_sided else u).T
    same = (LABELS[:, None] == LABELS) & (LABELS[:, None] != -1)
    others = ~same & (similarity <= 0.4) & (similarity >= -0.8)
    own = torch.zeros(N, N, dtype=torch.bool) if two_sided else torch.eye(N, dtype=torch.bool)
    same, others, logits = same & ~own, others & ~own, scale * similarity + bias
    number_of = same.sum(1).double()
    if name == "multi_positive_siglip":
        truth = torch.where(same, F.softplus(-logits), 0.0) + torch.where(others, F.softplus(logits), 0.0)
        truth = truth.sum(1).mean()
    else:
        if name == "sup_con":
            lse = torch.where(same | others, logits, -torch.inf).logsumexp(1, keepdim=True)
            each = lse - logits
        else:
            lse = torch.where(others, logits, -torch.inf).logsumexp(1, keepdim=True)
            each = torch.logaddexp(logits, lse) - logits
        rows = torch.where(same, each, 0.0).sum(1) / number_of.clamp_min(1)
        truth = reduced(rows, "mean", None, number_of > 0)
    arguments = (x, LABELS, y, LABELS) if two_sided and name != "multi_positive_siglip" else (x, LABELS)
    arguments = (x, y, LABELS) if name == "multi_positive_siglip" else arguments
    given = {"bias": 0.0} if name == "multi_positive_siglip" else {}
    given |= {"scale": scale, "col_bias": bias, "pairs": Pairs(below=0.4, above=-0.8), "backend": backend}
    check(getattr(losses, name)(*arguments, **given), truth, [x, y, scale, bias])


def test_soft_info_nce(backend):
    """Quick-Thought: targets beside the diagonal, which is filled with 0."""
    query, key, scale, bias = leaf(N, D), leaf(N, D), number(1.5), leaf(N)
    share = torch.rand(N, dtype=DOUBLE, requires_grad=True)
    x, y = unit(query, key)
    own = torch.eye(N, dtype=torch.bool)
    logits = (scale * x @ y.T + bias).masked_fill(own, 0.0)
    t = torch.zeros(N, N, dtype=DOUBLE)
    columns = torch.stack([torch.arange(N).roll(1), torch.arange(N).roll(-1)], 1)
    weights = torch.tensor([0.7, 0.3], dtype=DOUBLE).expand(N, 2)
    t = t.scatter(1, columns, weights)
    t = (1 - share[:, None]) * t + share[:, None] / N
    lists = (torch.arange(N + 1) * 2, columns.flatten(), weights.flatten())
    given = {"scale": scale, "col_bias": bias, "label_smoothing": share, "backend": backend}
    value = losses.soft_info_nce(query, key, lists, pairs=Pairs(diagonal=0, fill=0.0), **given)
    check(value, F.cross_entropy(logits, t), [query, key, scale, bias, share])


@pytest.mark.parametrize("of_rows", [False, True])
def test_matryoshka_nt_xent(backend, of_rows):
    if backend not in ("reference", "cpu"):
        pytest.skip("has no prefixes")
    z0, z1, scale = leaf(N, D), leaf(N, D), number(1.5)
    weight = torch.rand(2 * N if of_rows else N, dtype=DOUBLE, requires_grad=True)
    given = {"scale": scale, "pairs": Pairs(differ=(VIEW_IDS, VIEW_IDS)), "weight": weight, "backend": backend}
    truth = sum(losses.nt_xent(z0[:, :d], z1[:, :d], **given) for d in (2, D))
    check(losses.matryoshka_nt_xent(z0, z1, dims=(2, D), **given), truth, [z0, z1, scale, weight])


@pytest.mark.parametrize("hard", [False, True], ids=["pairs", "negatives"])
@pytest.mark.parametrize(
    "blocks", [(0, 1, 2, 3), (0, 1, 3), (0, 2), (0,)], ids=["all", "not backwards", "rectangle", "one"]
)
def test_blocks(backend, blocks, hard):
    query, document, negatives, scale = leaf(N, D), leaf(N, D), leaf(4, D), number(1.5)
    q, d, h = unit(query, document, negatives)
    eye = torch.eye(N, dtype=torch.bool)
    differ = ~((IDS[:, None] == IDS) & (IDS[:, None] != -1))
    own, others = differ | eye, differ & ~eye
    found = [(q @ d.T, own), (q @ q.T, others), (d @ q.T, own), (d @ d.T, others)]
    logits = [torch.where(keep, scale * s, -torch.inf) for s, keep in (found[each] for each in blocks)]
    if hard:
        logits.append(scale * q @ h.T)
        if 3 in blocks:
            logits.append(scale * d @ h.T)
    truth = (torch.cat(logits, 1).logsumexp(1) - scale * (q * d).sum(1)).mean()
    directions = tuple(("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")[each] for each in blocks)
    given = {"directions": directions, "scale": scale, "pairs": Pairs(differ=(IDS, IDS)), "backend": backend}
    value = losses.gte(query, document, negatives if hard else None, **given)
    check(value, truth, [query, document, scale, *([negatives] if hard else [])])


def test_guided_blocks(backend):
    query, key, scale = leaf(N, D), leaf(N, D), number(1.5)
    gq, gk = unit(torch.randn(N, 3, dtype=DOUBLE), torch.randn(N, 3, dtype=DOUBLE))
    q, k = unit(query, key)
    eye = torch.eye(N, dtype=torch.bool)
    differ = ~((IDS[:, None] == IDS) & (IDS[:, None] != -1))
    bound = (gq * gk).sum(1, keepdim=True) + 0.2
    pairs = [(q @ k.T, gq @ gk.T, eye), (q @ q.T, gq @ gq.T, ~eye & eye), (k @ k.T, gk @ gk.T, ~eye & eye)]
    logits = [
        torch.where((differ & (guide <= bound) & ~eye) | own, scale * similarity, -torch.inf)
        for similarity, guide, own in pairs
    ]
    truth = F.cross_entropy(torch.cat(logits, 1), torch.arange(N))
    given = {"margin": -0.2, "scale": scale, "pairs": Pairs(differ=(IDS, IDS)), "backend": backend}
    check(losses.gist(query, key, gq, gk, **given), truth, [query, key, scale])


# ---- Bad input -------------------------------------------------------------------------------------------------------

X = torch.randn(4, 3)
WRONG = {
    "diagonal": (
        lambda: losses.nt_xent(X, X, pairs=Pairs(diagonal=1)),
        ValueError,
        "nt_xent: pairs.diagonal must be None, got 1",
    ),
    "fill": (lambda: losses.dcl(X, X, pairs=Pairs(fill=0.0)), ValueError, "dcl: pairs.fill must be None, got 0.0"),
    "no rules": (lambda: losses.hcl(X, X, pairs=1), TypeError, "hcl: pairs must be Pairs or None, got int"),
    "weight": (
        lambda: losses.debiased(X, X, weight=torch.ones(5)),
        ValueError,
        r"debiased: weight must have shape (4,), of samples, or (8,), of their views, got (5,)",
    ),
    "bias": (
        lambda: losses.nt_xent(X, X, col_bias=torch.ones(4)),
        ValueError,
        "nt_xent: col_bias must have shape (8,)",
    ),
    "negative weight": (
        lambda: losses.dcl(X, X, weight=-torch.ones(8)),
        ValueError,
        "dcl: weight must not be negative, got -1.0",
    ),
    "gte rules": (
        lambda: losses.gte(X, X, pairs=Pairs(below=0.1)),
        ValueError,
        "gte: pairs must have no rule but differ, got below",
    ),
    "labels and ids": (
        lambda: losses.sup_con(X, torch.arange(4), pairs=Pairs(differ=(torch.arange(4),) * 2)),
        ValueError,
        "sup_con: pairs.differ must be None, got tuple: labels take its place",
    ),
    "queue of others": (
        lambda: losses.moco(X, X, X, pairs=Pairs(fill=0.0)),
        ValueError,
        "moco: pairs.fill must be None, got 0.0: each row would meet",
    ),
    "lists twice": (
        lambda: losses.bixse(
            X, X, torch.ones(4), target=torch.arange(4), indptr=torch.arange(5), pairs=Pairs(fill=0.0)
        ),
        ValueError,
        "bixse: pairs.fill must be None with indptr",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    call, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)
