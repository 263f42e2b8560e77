"""Given negatives: of each direction of CLIP, without the batch, harder ones; labels spread over the others."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import Pairs, clip, info_nce, nt_xent
from contrastive_ops.losses import gte, mined_info_nce, moco
from contrastive_ops.ops.similarity_reduce import fold as ops_fold
from contrastive_ops.testing import saved_bytes
from contrastive_ops.testing.compare import check, leaf, number, reduced

DOUBLE = torch.float64
N, K, MORE, D = 6, 4, 3, 5
IDS = torch.tensor([0, 1, 0, 2, -1, 1])


def smoothed(logits, target, share, smooth):
    """Cross-entropy with a share spread over all columns that take part, or over the others."""
    log_p, part = logits.log_softmax(1), logits != -torch.inf
    own = F.one_hot(target, logits.shape[1]).bool()
    spread = part if smooth == "all" else part & ~own
    even = torch.where(spread, log_p, 0.0).sum(1) / spread.sum(1)
    return -(1 - share) * log_p.gather(1, target[:, None]).squeeze(1) - share * even


def harder(similarity, scale, strength):
    """Logits whose negatives have a bonus without a gradient."""
    return scale * similarity + strength * similarity.detach() * (1 - torch.eye(*similarity.shape, dtype=DOUBLE))


# ---- Both directions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)], ids=["texts", "images", "both"])
@pytest.mark.parametrize("smooth", [None, "all", "others"])
@pytest.mark.parametrize("ruled", [False, True], ids=["all pairs", "ids"])
def test_clip_with_negatives(backend, sides, smooth, ruled, normalize):
    image, text, scale, weight = leaf(N, D), leaf(N, D), number(1.7), torch.rand(N, dtype=DOUBLE, requires_grad=True)
    texts, images = leaf(K, D) if sides[0] else None, leaf(MORE, D) if sides[1] else None
    bias, share = leaf(N + (K if sides[0] else 0)), torch.rand(N, dtype=DOUBLE, requires_grad=True)
    unit = F.normalize if normalize else lambda z: z
    x, y = unit(image), unit(text)
    drop = (IDS[:, None] == IDS) & (IDS[:, None] != -1) & ~torch.eye(N, dtype=torch.bool) & ruled
    of_images = torch.cat([x @ y.T, x @ unit(texts).T], 1) if sides[0] else x @ y.T
    of_texts = torch.cat([y @ x.T, y @ unit(images).T], 1) if sides[1] else y @ x.T
    truth, target = 0.0, torch.arange(N)
    for similarity, biases in ((of_images, bias), (of_texts, 0.0)):
        logits = scale * similarity + biases
        logits = logits.masked_fill(F.pad(drop, (0, logits.shape[1] - N)), -torch.inf)
        truth = truth + smoothed(logits, target, share if smooth else 0.0, smooth or "all") / 2
    given = {"scale": scale, "weight": weight, "col_bias": bias, "normalize": normalize, "backend": backend}
    given |= {"pairs": Pairs(differ=(IDS, IDS))} if ruled else {}
    given |= {"label_smoothing": share, "smooth": smooth} if smooth else {}
    value = clip(image, text, texts, images, **given)
    leaves = [image, text, texts, images, scale, weight, bias, *([share] if smooth else [])]
    check(value, reduced(truth, "mean", weight), leaves)
    _, found = clip(image, text, texts, images, diagnostics=True, **given)
    for measures, similarity in zip(found, (of_images, of_texts), strict=True):
        keep = ~F.pad(drop, (0, similarity.shape[1] - N))
        others = keep.clone().fill_diagonal_(False)
        assert torch.equal(measures.rank, ((similarity >= similarity.diagonal()[:, None]) & others).sum(1) + 1)
        torch.testing.assert_close(measures.negative_similarity, similarity[others].mean())


@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["below", "columns", "fill"])
@pytest.mark.parametrize("hardness", [0.0, 2.0])
def test_rules_of_the_pairs_leave_negatives_alone(backend, rule, hardness, dtype):
    drawn = [torch.randn(size, D).to(dtype).requires_grad_() for size in (N, N, K, MORE)]
    x, y, texts, images = (F.normalize(each.detach().double()).requires_grad_() for each in drawn)
    mask = torch.arange(N) != 2
    s = x @ y.T
    keep = {"below": s <= 0.2, "columns": mask.expand(N, N), "fill": s <= 0.2}[rule] | torch.eye(N, dtype=torch.bool)
    truth = 0.0
    for of_pairs, of_more, taken in ((s, x @ texts.T, keep), (s.T, y @ images.T, keep.T)):
        found = torch.cat([of_pairs, of_more], 1)
        logits = harder(found, 3.0, hardness)
        # In place of a dropped pair `fill` is a constant.
        instead = 0.5 if rule == "fill" else -torch.inf
        logits = torch.where(F.pad(taken, (0, of_more.shape[1]), value=True), logits, instead)
        truth = truth + F.cross_entropy(logits, torch.arange(N)) / 2
    pairs = {"below": Pairs(below=0.2), "columns": Pairs(columns=mask), "fill": Pairs(below=0.2, fill=0.5)}[rule]
    value = clip(*drawn, scale=3.0, pairs=pairs, hardness=hardness, backend=backend)
    tolerance = 1e-9 if dtype == DOUBLE else 1e-5
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=0)
    wanted = torch.autograd.grad(truth, (x, y, texts, images))
    for each, gradient, unit in zip(drawn, wanted, (x, y, texts, images), strict=True):
        (got,) = torch.autograd.grad(value, each, retain_graph=True)
        gradient = gradient - (gradient * unit).sum(1, keepdim=True) * unit  # of the length
        gradient = gradient / each.detach().double().norm(dim=1, keepdim=True)
        error = (got.double() - gradient).norm() / gradient.norm()
        assert error < (1e-9 if dtype == DOUBLE else 5e-3)


def test_negatives_of_each_direction_are_sweeps_of_their_blocks_alone():
    shapes = []
    image, text, texts, images = (torch.randn(size, D, requires_grad=True) for size in (9, 9, 5, 4))

    def fold(problem, **options):
        shapes.append((problem.x.shape[0], problem.columns.shape[0]))
        return ops_fold(problem, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("contrastive_ops.losses._sweep.fold", fold)
        clip(image, text, texts, images)
    assert shapes == [(9, 9), (9, 5), (9, 4)]


def test_neg_clip_and_confit_are_two_losses_of_one_direction(backend):
    image, text, texts, images = leaf(N, D), leaf(N, D), leaf(N, D), leaf(N, D)
    both = info_nce(image, text, texts, backend=backend) + info_nce(text, image, images, backend=backend)
    check(clip(image, text, texts, images, backend=backend), both / 2, [image, text, texts, images])


def test_no_negatives_are_none(backend):
    image, text = leaf(N, D), leaf(N, D)
    check(clip(image, text, image[:0], image[:0], backend=backend), clip(image, text, backend=backend), [image, text])


# ---- Without the batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_given_negatives_alone_agree_with_lists_of_a_corpus(backend, dtype):
    query, key, own = (torch.randn(*s).to(dtype).requires_grad_() for s in ((N, D), (N, D), (N, 2, D)))
    lists = torch.arange(2 * N).view(N, 2)
    ours = info_nce(query, key, row_negatives=own, in_batch=False, backend=backend)
    theirs = mined_info_nce(query, key, own.flatten(0, 1), indices=lists, in_batch=False, backend=backend)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(v, [query, key, own]) for v in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parts", [("negatives",), ("row_negatives",), ("negatives", "row_negatives")], ids=str)
def test_diagnostics_without_the_batch(backend, parts):
    query, key, shared, own = leaf(N, D), leaf(N, D), leaf(K, D), leaf(N, 2, D)
    given = {"negatives": shared, "row_negatives": own}
    given = {name: given[name] for name in parts} | {"normalize": False, "in_batch": False, "backend": backend}
    similarity = [(query * key).sum(1, keepdim=True)]
    similarity += [query @ shared.T] if "negatives" in parts else []
    similarity += [torch.einsum("nd,nkd->nk", query, own)] if "row_negatives" in parts else []
    similarity = torch.cat(similarity, 1)
    value, found = info_nce(query, key, diagnostics=True, temperature=0.5, **given)
    check(value, F.cross_entropy(2 * similarity, torch.zeros(N, dtype=torch.int64)), [query, key])
    assert torch.equal(found.rank, (similarity >= similarity[:, :1]).sum(1))
    torch.testing.assert_close(found.negative_similarity, similarity[:, 1:].mean())


def test_the_batch_costs_nothing_where_it_takes_no_part():
    """What is kept for backward, and the products, do not grow with N^2: N = 4,096 would be 64 MiB of them."""
    query, key, own = (torch.randn(*s, requires_grad=True) for s in ((4096, 8), (4096, 8), (4096, 2, 8)))
    size, _ = saved_bytes(lambda: info_nce(query, key, row_negatives=own, in_batch=False))
    assert size < 8 * 4 * (query.numel() + key.numel() + own.numel())


def test_a_row_of_weight_0_may_hold_anything_without_the_batch(backend):
    query, key, own = leaf(N, D), leaf(N, D), leaf(N, 2, D)
    with torch.no_grad():
        query[2], key[2], own[2] = torch.nan, torch.nan, torch.nan
    weight = torch.ones(N, dtype=DOUBLE)
    weight[2] = 0.0
    value = info_nce(query, key, row_negatives=own, in_batch=False, weight=weight, backend=backend)
    assert value.isfinite()
    for gradient in torch.autograd.grad(value, [query, key, own]):
        assert gradient.isfinite().all() and not gradient[2].any()


# ---- Harder negatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("in_batch", [True, False])
def test_hardness_of_info_nce(backend, in_batch, per_row):
    query, key, shared, own = leaf(N, D), leaf(N, D), leaf(K, D), leaf(N, 2, D)
    scale = (torch.rand(N, dtype=DOUBLE) + 0.5).requires_grad_() if per_row else number(1.5)
    bias = torch.randn(N + K, dtype=DOUBLE)
    x, y, h, o = (F.normalize(each, dim=-1) for each in (query, key, shared, own))
    similarity = torch.cat([x @ y.T, x @ h.T, torch.einsum("nd,nkd->nk", x, o)], 1)
    logits = harder(similarity, scale[:, None] if per_row else scale, 3.0) + F.pad(bias, (0, 2))
    if not in_batch:
        logits[:, :N] = logits[:, :N].masked_fill(~torch.eye(N, dtype=torch.bool), -torch.inf)
    given = {"row_negatives": own, "scale": scale, "col_bias": bias, "hardness": 3.0, "in_batch": in_batch}
    value = info_nce(query, key, shared, backend=backend, **given)
    check(value, F.cross_entropy(logits, torch.arange(N)), [query, key, shared, own, scale])


def test_hardness_of_clip(backend):
    image, text, texts, scale = leaf(N, D), leaf(N, D), leaf(K, D), number(1.5)
    x, y, h = (F.normalize(each) for each in (image, text, texts))
    pairs = [harder(torch.cat([x @ y.T, x @ h.T], 1), scale, 9.0), harder(y @ x.T, scale, 9.0)]
    truth = sum(F.cross_entropy(logits, torch.arange(N)) for logits in pairs) / 2
    value = clip(image, text, texts, scale=scale, hardness=9.0, backend=backend)
    check(value, truth, [image, text, texts, scale])


def test_hardness_is_that_of_sentence_transformers(backend):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    loss = losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(), hardness_mode="all_negatives", hardness_strength=5.0
    )
    a, p, n = leaf(N, D), leaf(N, D), leaf(N, D)
    check(
        info_nce(a, p, n, scale=20.0, hardness=5.0, backend=backend),
        loss.compute_loss_from_embeddings([a, p, n], None),
        [a, p, n],
    )


# ---- Labels spread over the others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ruled", [False, True])
def test_smooth_over_the_others(backend, ruled):
    a, b, share = leaf(N, D), leaf(N, D), torch.rand(N, dtype=DOUBLE, requires_grad=True)
    drop = (IDS[:, None] == IDS) & (IDS[:, None] != -1) & ~torch.eye(N, dtype=torch.bool) & ruled
    given = {"label_smoothing": share, "smooth": "others", "temperature": 0.5, "backend": backend}
    rules = {"pairs": Pairs(differ=(IDS, IDS))} if ruled else {}
    logits = (2 * F.normalize(a) @ F.normalize(b).T).masked_fill(drop, -torch.inf)
    target = torch.arange(N)
    check(info_nce(a, b, **given, **rules), smoothed(logits, target, share, "others").mean(), [a, b, share])
    logits = (2 * F.normalize(a) @ F.normalize(b).T).masked_fill(drop, -torch.inf)
    both = sum(smoothed(each, target, share, "others").mean() for each in (logits, logits.T)) / 2
    check(clip(a, b, **given, **rules), both, [a, b, share])
    whole = torch.ones(N, dtype=DOUBLE)  # a share of 1: nothing on the target
    assert info_nce(a, b, **{**given, "label_smoothing": whole}, **rules).isfinite()


def test_smooth_of_views_and_of_a_queue(backend):
    a, b, queue, share = leaf(N, D), leaf(N, D), torch.randn(9, D, dtype=DOUBLE), number(0.3)
    z = F.normalize(torch.cat([a, b]))
    logits = (2 * z @ z.T).fill_diagonal_(-torch.inf)
    truth = smoothed(logits, torch.arange(2 * N).roll(N), share, "others").mean()
    given = {"label_smoothing": share, "smooth": "others", "temperature": 0.5, "backend": backend}
    check(nt_xent(a, b, **given), truth, [a, b, share])
    x, k = F.normalize(a), F.normalize(b)
    logits = 2 * torch.cat([(x * k).sum(1, keepdim=True), x @ F.normalize(queue).T], 1)
    truth = smoothed(logits, torch.zeros(N, dtype=torch.int64), share, "others").mean()
    check(moco(a, b, queue, **given), truth, [a, b, share])


def with_bonus(similarity, own, scale, strength):
    """Logits of all pairs but the own ones with a bonus without a gradient; what is -inf stays."""
    left_out = similarity == -torch.inf
    finite = similarity.masked_fill(left_out, 0.0)
    logits = scale * finite + (strength * finite.detach()).masked_fill(own, 0.0)
    return logits.masked_fill(left_out, -torch.inf)


@pytest.mark.parametrize("ruled", [False, True], ids=["all pairs", "ids"])
def test_hardness_of_two_views(backend, ruled):
    a, b, scale = leaf(N, D), leaf(N, D), number(1.4)
    z, partner, ids = F.normalize(torch.cat([a, b])), torch.arange(2 * N).roll(N), IDS.repeat(2)
    own, similarity = F.one_hot(partner, 2 * N).bool(), (z @ z.T).fill_diagonal_(-torch.inf)
    if ruled:
        similarity = similarity.masked_fill((ids[:, None] == ids) & (ids != -1) & ~own, -torch.inf)
    pairs = Pairs(differ=(ids, ids)) if ruled else None
    value = nt_xent(a, b, scale=scale, hardness=2.5, pairs=pairs, backend=backend)
    check(value, F.cross_entropy(with_bonus(similarity, own, scale, 2.5), partner), [a, b, scale])


@pytest.mark.parametrize("margin", [None, 0.3])
@pytest.mark.parametrize("hard", [False, True], ids=["", "hard negatives"])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_hardness_of_gte(backend, partition, hard, margin):
    q, d, h, scale = leaf(N, D), leaf(N, D), leaf(N, 2, D), number(1.4)
    x, y, z = F.normalize(q), F.normalize(d), F.normalize(h.flatten(0, 1))
    eye = torch.eye(N, dtype=torch.bool)
    of_others = torch.cat([eye, eye.repeat_interleave(2, 1)], 1) if hard else eye
    more = (lambda s, r: torch.cat([s, r @ z.T], 1)) if hard else (lambda s, r: s)
    blocks = [more(x @ y.T, x), y @ x.T]
    if partition == "joint":
        blocks[1:1] = [(x @ x.T).masked_fill(eye, -torch.inf)]
        blocks += [more(y @ y.T, y).masked_fill(of_others, -torch.inf)]
    own = [F.pad(eye, (0, block.shape[1] - N)) for block in blocks]
    positive = (x * y).sum(1)
    if margin is not None:
        bound = positive.detach()[:, None] + margin
        blocks = [block.masked_fill((block > bound) & ~e, -torch.inf) for block, e in zip(blocks, own, strict=True)]
    logits = [with_bonus(block, e, scale, 2.5) for block, e in zip(blocks, own, strict=True)]
    lse = [torch.cat(logits, 1).logsumexp(1)] if partition == "joint" else [each.logsumexp(1) for each in logits]
    truth = sum((each - scale * positive).mean() for each in lse) / len(lse)
    names = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc") if partition == "joint" else None
    given = {"directions": names or ("query_to_doc", "doc_to_query"), "false_negative_margin": margin}
    value = gte(q, d, h if hard else None, partition=partition, hardness=2.5, scale=scale, **given, backend=backend)
    check(value, truth, [q, d, scale, *([h] if hard else [])])


# ---- Rules of two blocks ---------------------------------------------------------------------------------------------

RULES = {
    "none": (None, lambda s: s == s),
    "ids": (lambda m: {"differ": (torch.arange(N) % 3, torch.arange(m) % 4)}, None),
    "bound": (lambda m: {"below": 0.3}, lambda s: s <= 0.3),
    "diagonal": (lambda m: {"diagonal": 1}, None),
}


def kept(name, similarity):
    m = similarity.shape[1]
    if name == "ids":
        return (torch.arange(N) % 3)[:, None] != torch.arange(m) % 4
    if name == "diagonal":
        return torch.arange(N)[:, None] + 1 != torch.arange(m)
    return RULES[name][1](similarity)


@pytest.mark.parametrize("of_keys, of_negatives", list(itertools.product(RULES, RULES)))
def test_rules_of_keys_and_of_negatives(backend, of_keys, of_negatives):
    query, key, shared, share = leaf(N, D), leaf(N + 2, D), leaf(K, D), number(0.2)
    x, y, h = (F.normalize(each) for each in (query, key, shared))
    blocks = [x @ y.T, x @ h.T]
    keep = torch.cat([kept(each, s) for each, s in zip((of_keys, of_negatives), blocks, strict=True)], 1)
    keep = keep | F.one_hot(torch.arange(N), keep.shape[1]).bool()
    similarity = torch.cat(blocks, 1)
    logits = (3 * similarity).masked_fill(~keep, -torch.inf)
    rules = [
        None if each == "none" else Pairs(**RULES[each][0](m)) for each, m in ((of_keys, N + 2), (of_negatives, K))
    ]
    given = {"pairs": rules[0], "negative_pairs": rules[1], "scale": 3.0, "label_smoothing": share, "backend": backend}
    value, found = info_nce(query, key, shared, diagnostics=True, **given)
    check(value, smoothed(logits, torch.arange(N), share, "all").mean(), [query, key, shared, share])
    own = similarity.gather(1, torch.arange(N)[:, None])
    others = keep & ~F.one_hot(torch.arange(N), keep.shape[1]).bool()
    assert torch.equal(found.rank, ((similarity >= own) & others).sum(1) + 1)
    torch.testing.assert_close(found.negative_similarity, similarity[others].mean())


# ---- Bad input -------------------------------------------------------------------------------------------------------

X = torch.randn(4, 3)
WRONG = [
    (lambda: info_nce(X, X, in_batch=False), "info_nce: negatives or row_negatives must be given with in_batch=False"),
    (lambda: info_nce(X, X, X, in_batch=False, pairs=Pairs(diagonal=0)), "info_nce: pairs must be None with in_batch"),
    (lambda: info_nce(X, X, negative_pairs=Pairs(diagonal=0)), "info_nce: negatives must be given with negative_pairs"),
    (lambda: info_nce(X, X, row_negative_bias=1.0), "info_nce: row_negatives must be given with row_negative_bias"),
    (
        lambda: info_nce(X, X, row_negatives=X, row_negative_bias=torch.ones(3)),
        "info_nce: row_negative_bias must be a number or have shape (4,) or (4, 1), got (3,)",
    ),
    (lambda: info_nce(X, X, smooth="some"), "info_nce: smooth must be one of 'all', 'others', got 'some'"),
    (lambda: info_nce(X, X, hardness=-1.0), "info_nce: hardness must be in [0, inf)"),
    (lambda: info_nce(X, X, hardness=1.0, label_smoothing=0.1), "info_nce: hardness must be 0 with label smoothing"),
    (
        lambda: info_nce(X, X, hardness=1.0, col_bias=torch.ones(4, requires_grad=True)),
        "info_nce: hardness must be 0 where col_bias requires a gradient",
    ),
    (lambda: nt_xent(X, X, hardness=1.0, label_smoothing=0.1), "nt_xent: hardness must be 0 with label smoothing"),
    (lambda: gte(X, X, hardness=1.0, scale=torch.ones(4)), "gte: hardness must be 0 with a scale for each row"),
    (lambda: clip(X, X, hardness=1.0, scale=torch.ones(4)), "clip: hardness must be 0 with a scale for each row"),
    (
        lambda: clip(X, X, X, pairs=Pairs(below=0.1), label_smoothing=0.1),
        "clip: pairs.below must be None, got 0.1: not with label smoothing, diagnostics",
    ),
    (lambda: clip(X, X, X, col_bias=torch.ones(4)), "clip: col_bias must have shape (8,)"),
    (
        lambda: info_nce(X, X, X, pairs=Pairs(below=0.1, fill=0.0)),
        "info_nce: pairs.fill must be None, got 0.0: each row would meet",
    ),
]


@pytest.mark.parametrize("call, message", WRONG)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message)
