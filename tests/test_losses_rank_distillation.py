"""Distillation from scores of candidates, against formulas of one list at a time in float64, and published code."""

import itertools
import math
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import (
    _rank_lists,
    listwise_cross_entropy,
    listwise_distillation,
    margin_mse,
    pairwise_rank_distillation,
)
from contrastive_ops.testing.compare import check

DOUBLE = torch.float64


# ---- One list at a time: only what is there, in a list of its own -------------------------------------------------


def of_margins(s, t):
    return torch.stack([((s[0] - a) - (t[0] - b)) ** 2 for a, b in zip(s[1:], t[1:], strict=True)]).mean()


def of_kl(s, t, temperature=1.0, teacher_temperature=None):
    log_p = (s / temperature).log_softmax(0)
    log_q = (t / (teacher_temperature or temperature)).log_softmax(0)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum()


def of_listnet(s, t, temperature=1.0, teacher_temperature=None):
    q = (t / (teacher_temperature or temperature)).softmax(0)
    return -(q * (s / temperature).log_softmax(0)).sum()


def of_listmle(s, t, temperature=1.0):
    """Minus the logarithm of the probability to draw the teacher's order without replacement."""
    left, loss = s / temperature, 0.0
    for best in sorted(range(len(t)), key=lambda i: (-t[i].item(), i)):
        loss = loss - (left[best] - torch.cat([left[:best], left[best:]]).logsumexp(0))
        left = torch.cat([left[:best], torch.full_like(left[:1], -1e9), left[best + 1 :]])
    return loss


def ranks_of(values, ties):
    """Ranks by decreasing value: equal values share the best of theirs, or are ranked as they come."""
    values = values.tolist()
    return [
        1 + sum(w > v or (not ties and w == v and j < i) for j, w in enumerate(values)) for i, v in enumerate(values)
    ]


def of_pairs(s, t, kind="logistic", pair_weight="none", pair_reduction="mean", k=None, margin=1.0, temperature=1.0):
    by_teacher, by_student = ranks_of(t, ties=True), ranks_of(s, ties=False)
    gain = [2 ** v.item() - 1 for v in t]
    ideal = sum(g / math.log2(2 + i) for i, g in enumerate(sorted(gain, reverse=True)[:k]))
    costs = []
    for i, j in itertools.permutations(range(len(t)), 2):
        if not t[i] > t[j]:
            continue
        lead = (s[i] - s[j]) / temperature
        cost = torch.log1p(torch.exp(-lead)) if kind == "logistic" else torch.clamp(margin - lead, min=0)
        if pair_weight == "reciprocal_rank":
            cost = cost * abs(1 / by_teacher[i] - 1 / by_teacher[j])
        elif pair_weight == "lambda":
            ranks = [by_student[at] for at in (i, j)]
            discounts = [1 / math.log2(1 + rank) if k is None or rank <= k else 0.0 for rank in ranks]
            cost = cost * abs(gain[i] - gain[j]) / ideal * abs(discounts[0] - discounts[1])
        costs.append(cost)
    return sum(costs) / (len(costs) if pair_reduction == "mean" else 1)


CASES = [
    (margin_mse, of_margins, {}),
    (listwise_distillation, of_kl, {}),
    (listwise_distillation, of_kl, {"temperature": 0.5, "teacher_temperature": 3.0}),
    (listwise_distillation, of_listnet, {"kind": "listnet", "temperature": 2.0, "teacher_temperature": 1.5}),
    (listwise_distillation, of_listmle, {"kind": "listmle"}),
    (listwise_distillation, of_listmle, {"kind": "listmle", "temperature": 0.3}),
    *(
        (pairwise_rank_distillation, of_pairs, {"kind": kind, "pair_weight": pair_weight, "pair_reduction": over})
        for kind in ("logistic", "hinge")
        for pair_weight in ("none", "reciprocal_rank", "lambda")
        for over in ("mean", "sum")
    ),
    (pairwise_rank_distillation, of_pairs, {"kind": "hinge", "margin": 0.2, "temperature": 0.5}),
    (pairwise_rank_distillation, of_pairs, {"pair_weight": "lambda", "k": 1}),
    (pairwise_rank_distillation, of_pairs, {"kind": "hinge", "pair_weight": "lambda", "k": 3, "pair_reduction": "sum"}),
]
each_case = pytest.mark.parametrize("function,formula,options", CASES, ids=lambda v: getattr(v, "__name__", str(v)))


def formula_of(formula, options):
    known = {name: value for name, value in options.items() if name != "kind" or formula is of_pairs}
    return lambda s, t: formula(s, t, **known)


def lists(rows=9, size=6, dtype=DOUBLE):
    """Scores, a teacher's scores with equal ones among them, and a mask; no list is without a pair in order."""
    scores = (2 * torch.randn(rows, size, dtype=dtype)).requires_grad_()
    teacher = torch.randint(5, (rows, size)).to(dtype)
    teacher[:, 0], teacher[:, 1] = 5, 0
    mask = torch.rand(rows, size) < 0.7
    mask[:, :2] = True
    return scores, teacher, mask


@each_case
@pytest.mark.parametrize("how", ["whole", "mask", "teacher", "both"])
def test_lists_of_any_length(function, formula, options, how):
    scores, teacher, mask = lists()
    there, given = torch.ones_like(mask), {}
    if how in ("mask", "both"):
        there, given = mask, {"mask": mask}
    if how in ("teacher", "both"):
        dropped = torch.rand(teacher.shape) < 0.2
        dropped[:, :2] = False
        there, teacher = there & ~dropped, teacher.masked_fill(dropped, -torch.inf)
    with torch.no_grad():
        scores[~there] = torch.nan  # what is not there is not looked at
        if how == "mask":
            teacher[~there] = torch.nan
    rows = function(scores, teacher, reduction="none", **options, **given)
    expected = torch.stack(
        [formula_of(formula, options)(s[m], t[m]) for s, t, m in zip(scores, teacher, there, strict=True)]
    )
    torch.testing.assert_close(rows, expected)
    cotangent = torch.randn_like(rows)
    (got,) = torch.autograd.grad(rows, scores, cotangent, retain_graph=True)
    (want,) = torch.autograd.grad(expected, scores, cotangent, retain_graph=True)
    torch.testing.assert_close(got, torch.where(there, want, 0.0))
    weight = torch.rand(9, dtype=DOUBLE).requires_grad_()
    mean = function(scores, teacher, weight=weight, **options, **given)
    wanted = (weight * expected).sum() / weight.sum()
    torch.testing.assert_close(mean, wanted)
    for a, b in zip(
        torch.autograd.grad(mean, (scores, weight)), torch.autograd.grad(wanted, (scores, weight)), strict=True
    ):
        torch.testing.assert_close(a, b.masked_fill(~there, 0.0) if b.dim() == 2 else b)


@each_case
def test_gradcheck_once_and_twice(function, formula, options):
    scores, teacher, mask = lists(3, 4)
    if "temperature" in options and options["temperature"] != 1:
        options = {**options, "temperature": torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)}
    leaves = [scores, *(v for v in options.values() if isinstance(v, torch.Tensor))]

    def rows(s, *temperature):
        learned = {"temperature": temperature[0]} if temperature else {}
        return function(s, teacher, mask=mask, reduction="none", **{**options, **learned})

    assert torch.autograd.gradcheck(rows, leaves)
    if options.get("pair_weight") != "lambda" and options.get("kind") != "hinge":
        assert torch.autograd.gradgradcheck(rows, leaves)


@each_case
def test_chunks_do_not_matter(function, formula, options, monkeypatch):
    scores, teacher, mask = lists(17)
    results = []
    for elements in (1 << 20, 40):
        monkeypatch.setattr(_rank_lists, "CHUNK_ELEMENTS", elements)
        rows = function(scores, teacher, mask=mask, reduction="none", **options)
        results.append((rows, *torch.autograd.grad(rows.sum(), scores)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_case
def test_lists_without_anything_to_compare_do_not_count(function, formula, options):
    scores, teacher, mask = lists(4)
    mask[1] = False
    value = function(scores, teacher, mask=mask, **options)
    (gradient,) = torch.autograd.grad(value, scores)
    kept = torch.tensor([0, 2, 3])
    expected = function(scores[kept], teacher[kept], mask=mask[kept], **options)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0])
    assert not gradient[1].any()
    for absent in (function(scores, teacher - torch.inf, **options), function(scores[:0], teacher[:0], **options)):
        assert absent == 0
        assert not torch.autograd.grad(absent, scores)[0].any()


@pytest.mark.parametrize(
    "call", [margin_mse, pairwise_rank_distillation], ids=["a positive alone", "candidates that are equal"]
)
def test_nothing_to_order(call):
    scores = torch.randn(2, 3, requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]]) if call is margin_mse else None
    rows = call(scores, teacher, mask=mask, reduction="none")
    assert rows[0] == 0 and rows[1] != 0
    torch.testing.assert_close(call(scores, teacher, mask=mask), rows[1])


@each_case
@pytest.mark.parametrize("where", ["scores", "teacher"])
def test_nan_stays_in_its_list(function, formula, options, where):
    scores, teacher, _ = lists(4)
    with torch.no_grad():
        (scores if where == "scores" else teacher)[2, 0] = torch.nan
    rows = function(scores, teacher, reduction="none", **options)
    assert rows.isnan().tolist() == [False, False, True, False]
    assert function(scores, teacher, **options).isnan()
    (gradient,) = torch.autograd.grad(rows.sum(), scores)
    assert gradient[[0, 1, 3]].isfinite().all()
    assert where == "teacher" or gradient[2].isnan().any()


@each_case
def test_extreme_scores(function, formula, options):
    scores, teacher, _ = lists(4, dtype=torch.float32)
    scores = (1e4 * scores.detach()).requires_grad_()
    rows = function(scores, teacher, reduction="none", **options)
    (gradient,) = torch.autograd.grad(rows.sum(), scores)
    assert rows.isfinite().all() and (rows >= 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_case
def test_sixteen_bits_are_widened_first(function, formula, options, dtype):
    scores, teacher, _ = lists(dtype=torch.float32)
    scores = scores.detach().to(dtype).requires_grad_()
    wide = scores.detach().float().requires_grad_()
    value, expected = function(scores, teacher.to(dtype), **options), function(wide, teacher, **options)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    (gradient,) = torch.autograd.grad(value, scores)
    assert torch.equal(gradient, torch.autograd.grad(expected, wide)[0].to(dtype))


def test_a_student_that_agrees_has_no_loss():
    scores, _, _ = lists(dtype=torch.float32)
    assert margin_mse(scores + 3, scores) < 1e-10
    found = listwise_distillation(scores + 3, scores, reduction="none")
    assert (found >= 0).all() and (found < 1e-10).all()


def test_the_teacher_gets_no_gradient():
    scores, teacher, _ = lists()
    teacher.requires_grad_()
    for function in (margin_mse, listwise_distillation, pairwise_rank_distillation):
        assert torch.autograd.grad(function(scores, teacher), teacher, allow_unused=True) == (None,)


# ---- Published code -----------------------------------------------------------------------------------------------


def embeddings():
    query, *candidates = (torch.randn(7, 8, dtype=DOUBLE).requires_grad_() for _ in range(5))
    scores = torch.einsum("nd,nkd->nk", query, torch.stack(candidates, 1))
    return [query, *candidates], scores, torch.randn(7, 4, dtype=DOUBLE)


def assert_same(found, expected, leaves):
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_margin_mse_is_that_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    columns, scores, teacher = embeddings()
    peer = losses.MarginMSELoss(torch.nn.Module())
    expected = peer.compute_loss_from_embeddings(columns, teacher)
    assert_same(margin_mse(scores, teacher), expected, columns)
    margins = teacher[:, :1] - teacher[:, 1:]
    as_scores = torch.cat([torch.zeros(7, 1, dtype=DOUBLE), -margins], 1)
    torch.testing.assert_close(margin_mse(scores, as_scores), peer.compute_loss_from_embeddings(columns, margins))


@pytest.mark.parametrize("temperatures", [(1.0, None), (2.0, None), (0.5, 3.0)])
def test_listwise_distillation_is_that_of_sentence_transformers(temperatures):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    columns, scores, teacher = embeddings()
    own, of_teacher = temperatures
    peer = losses.DistillKLDivLoss(torch.nn.Module(), temperature=own, teacher_temperature=of_teacher)
    found = listwise_distillation(scores, teacher, temperature=own, teacher_temperature=of_teacher)
    assert_same(found, peer.compute_loss_from_embeddings(columns, teacher), columns)


def test_lambda_weights_are_those_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    scores, grades, _ = lists(1)
    order = scores.detach()[0].argsort(descending=True)
    by_student, ideal = grades[:, order], grades.sort(1, descending=True).values
    discount = torch.log2(torch.arange(6, dtype=DOUBLE) + 2)[None]
    gain = (2**by_student - 1) / ((2**ideal - 1) / discount).sum()
    weights = losses.LambdaRankScheme()(gain, discount, by_student)
    lead = scores[:, order][:, :, None] - scores[:, order][:, None]
    better = by_student[:, :, None] > by_student[:, None]
    expected = -(weights * F.logsigmoid(lead))[better].mean()
    assert_same(pairwise_rank_distillation(scores, grades, pair_weight="lambda"), expected, [scores])


# ---- Errors -------------------------------------------------------------------------------------------------------

S = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: margin_mse(S[0], S[0]), ValueError, "margin_mse: scores must have shape (N, K) with K >= 1, got (3,)"),
        (lambda: margin_mse(S[:, :0], S[:, :0]), ValueError, "scores must have shape (N, K) with K >= 1, got (2, 0)"),
        (
            lambda: margin_mse(S, S[:, 1:]),
            ValueError,
            "teacher_scores must have the shape of scores, got (2, 3) and (2, 2)",
        ),
        (lambda: margin_mse(S.long(), S), TypeError, "margin_mse: scores must be a floating tensor, got torch.int64"),
        (lambda: margin_mse(S, [1.0]), TypeError, "margin_mse: teacher_scores must be a tensor, got list"),
        (lambda: margin_mse(S, S, mask=S), TypeError, "margin_mse: mask must be a bool tensor, got torch.float32"),
        (lambda: margin_mse(S, S, mask=S[:1] > 0), ValueError, "margin_mse: mask must have shape (2, 3), got (1, 3)"),
        (lambda: margin_mse(S, S, weight=S[0]), ValueError, "margin_mse: weight must have shape (2,), got (3,)"),
        (lambda: margin_mse(S, S, reduction="max"), ValueError, "margin_mse: reduction must be one of"),
        (lambda: listwise_distillation(S, S, kind="js"), ValueError, "kind must be one of 'kl', 'listnet', 'listmle'"),
        (lambda: listwise_distillation(S, S, temperature=0), ValueError, "temperature must be in (0, inf], got 0"),
        (
            lambda: listwise_distillation(S, S, teacher_temperature=S),
            ValueError,
            "teacher_temperature must be one number, got a tensor of shape (2, 3)",
        ),
        (lambda: pairwise_rank_distillation(S, S, kind="exp"), ValueError, "kind must be one of 'logistic', 'hinge'"),
        (
            lambda: pairwise_rank_distillation(S, S, pair_weight="lambda", k=0),
            ValueError,
            "k must be at least 1, got 0",
        ),
        (lambda: pairwise_rank_distillation(S, S, k=3), ValueError, 'k must be None for pair_weight="none", got 3'),
        (lambda: pairwise_rank_distillation(S, S, pair_weight="r"), ValueError, "pair_weight must be one of 'none'"),
        (
            lambda: pairwise_rank_distillation(S, S, pair_reduction="max"),
            ValueError,
            "pair_reduction must be one of 'mean', 'sum'",
        ),
        (
            lambda: pairwise_rank_distillation(S, S, margin=-1),
            ValueError,
            "margin must be in [0, inf), got -1",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    "options", [{}, {"kind": "hinge", "pair_reduction": "sum", "pair_weight": "reciprocal_rank"}], ids=str
)
def test_long_lists_go_by_blocks_of_pairs(monkeypatch, options):
    """Blocks of a few candidates of one list give what all of its pairs at once give, value and gradients."""
    scores, teacher = torch.randn(3, 50, dtype=DOUBLE), torch.randint(0, 4, (3, 50)).double()
    mask = torch.rand(3, 50) > 0.2
    found = []
    for pairs in (1 << 30, 120, 1):
        monkeypatch.setattr(_rank_lists, "PAIRS", pairs)
        own = scores.clone().requires_grad_()
        value = pairwise_rank_distillation(own, teacher, mask=mask, reduction="none", **options)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), own)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grade", [1.0, 100.0, 128.0, 1e4, 1e30])
def test_lambda_weights_of_grades_of_any_size(grade):
    """Gains are divided by those of the best order, whatever 2**grade is."""
    scores = torch.tensor([[0.3, 0.9, -0.2]], requires_grad=True)
    loss = pairwise_rank_distillation(scores, torch.tensor([[grade, 0.0, 0.0]]), pair_weight="lambda")
    loss.backward()
    # Only the first has a gain, which is the whole of the best order's.
    discount = [1 / math.log2(rank + 1) for rank in (2, 1, 3)]
    cost = [math.log1p(math.exp(s - 0.3)) for s in (0.9, -0.2)]
    truth = sum(c * abs(discount[0] - d) for c, d in zip(cost, discount[1:], strict=True)) / 2
    assert math.isclose(float(loss), truth, rel_tol=1e-5) and bool(scores.grad.isfinite().all())


# ---- Lists with labels ---------------------------------------------------------------------------------------------


def of_labels(s, w, positives, temperature):
    p, q = (s / temperature).softmax(0), w / w.sum()
    return -(q[q > 0] * p[q > 0].log()).sum() if positives == "mean_log" else -(q * p).sum().log()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("positives", ["mean_log", "log_mean"])
def test_lists_with_labels(positives, reduction):
    scores = (5 * torch.randn(9, 6, dtype=DOUBLE)).requires_grad_()
    relevance = torch.rand(9, 6, dtype=DOUBLE) * (torch.rand(9, 6) < 0.5)
    mask = torch.rand(9, 6) < 0.7
    relevance[:, 1], mask[:, 1], relevance[4] = 0.6, True, 0.0
    mask[5], relevance[6, 0], mask[6, 0] = False, 9.0, False
    temperature = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    weight = torch.rand(9, dtype=DOUBLE)
    rows = {
        i: of_labels(scores[i][mask[i]], relevance[i][mask[i]], positives, temperature)
        for i in range(9)
        if i not in (4, 5)
    }
    truth = torch.stack([rows[i] * weight[i] if i in rows else 0 * scores[i, 0] for i in range(9)])
    truth = truth if reduction == "none" else truth.sum()
    truth = truth / weight[list(rows)].sum() if reduction == "mean" else truth
    options = {"positives": positives, "temperature": temperature, "weight": weight, "reduction": reduction}
    value = listwise_cross_entropy(scores, relevance, mask=mask, **options)
    check(value, truth, [scores, temperature])


def test_one_relevant_candidate_is_a_number_or_a_weight():
    scores, target = torch.randn(7, 5, dtype=DOUBLE, requires_grad=True), torch.tensor([0, 3, 4, 4, 1, -1, 2])
    weights = F.one_hot(target.clamp_min(0), 5).double() * (target >= 0)[:, None]
    for positives, relevance in itertools.product(("mean_log", "log_mean"), (target, weights, weights > 0)):
        truth = F.cross_entropy(scores, target, ignore_index=-1)
        check(listwise_cross_entropy(scores, relevance, positives=positives), truth, [scores])


def test_a_list_that_is_decided_keeps_its_digits():
    scores = torch.tensor([[30.0, 0.0, 30.0], [60.0, -40.0, 0.0]], requires_grad=True)
    value = listwise_cross_entropy(
        scores, torch.tensor([[1.0, 0.0, 1.0], [1, 0, 0]]), positives="log_mean", reduction="none"
    )
    torch.testing.assert_close(value, torch.tensor([math.log(2) + math.exp(-30) / 2, math.exp(-60)]), rtol=1e-6, atol=0)
    (slopes,) = torch.autograd.grad(value[1], scores)
    torch.testing.assert_close(slopes[1, 2], torch.tensor(math.exp(-60)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "relevance, options, error, message",
    [
        (torch.full((2, 3), -1.0), {}, ValueError, "relevance must be >= 0, got -1.0"),
        (torch.ones(2, 4), {}, ValueError, "relevance must have the shape of scores"),
        (torch.tensor([0, 3]), {}, ValueError, "relevance must be in [-1, 3), got 3"),
        (torch.tensor([0, 1, 2]), {}, ValueError, "relevance must have shape (2,)"),
        (torch.ones(2, 3), {"positives": "all"}, ValueError, "positives must be one of 'mean_log', 'log_mean'"),
        (torch.ones(2, 3), {"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor"),
    ],
)
def test_labels_that_do_not_fit(relevance, options, error, message):
    with pytest.raises(error, match="listwise_cross_entropy: " + re.escape(message)):
        listwise_cross_entropy(torch.randn(2, 3), relevance, **options)
