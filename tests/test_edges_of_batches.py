"""Last batches of one row, impossible answers, and grades that are counts: a value and gradients, never NaN.

Regularisers are the public functions of the modules that hold them, and every loss of the registry.
"""

import inspect
import re

import pytest
import torch

from contrastive_ops.decoding import contrastive_search
from contrastive_ops.losses import (
    UnigramSampler,
    decorrelation,
    dpo,
    kl_estimate,
    pairwise_rank_distillation,
    regularizers,
    whitening,
)
from contrastive_ops.metrics import retrieval_metrics
from contrastive_ops.testing import LOSSES, leaves

INF = torch.inf
DOUBLE = torch.float64
REGULARISERS = {
    name: function
    for module in (decorrelation, regularizers, whitening)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
# What has a value for one row that is not 0: a distance of partners, a size of activations, a volume, a rank.
OF_ONE_ROW = {"alignment", "sparsity", "log_det", "effective_rank"}


@pytest.mark.parametrize("options", [{}, {"centre": True}, {"normalize": False}, {"shuffle": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REGULARISERS)
def test_regularisers_of_one_row(name, dtype, options):
    function = REGULARISERS[name]
    parameters = inspect.signature(function).parameters
    if not options.keys() <= parameters.keys():
        pytest.skip("no such option")
    given = [torch.randn(1, 6, dtype=dtype, requires_grad=True) for key in ("x", "y") if key in parameters]
    value = function(*given, **options)
    gradients = torch.autograd.grad(value.sum(), given)
    assert value.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    if name not in OF_ONE_ROW:
        assert not value.any()
    if name not in ("alignment", "sparsity"):
        assert not any(gradient.any() for gradient in gradients)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    if not options:
        torch.testing.assert_close(compiled(*given), value)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_one_row(name):
    inputs = LOSSES[name].inputs(1, 8)
    value = LOSSES[name](inputs)
    assert value.isfinite()
    assert all(g is None or g.isfinite().all() for g in torch.autograd.grad(value, leaves(inputs), allow_unused=True))


def test_a_queue_of_no_rows():
    queue = torch.zeros(0, 4, requires_grad=True)
    value = regularizers.uniformity(torch.randn(1, 4), queue)
    assert value == 0 and torch.autograd.grad(value, queue)[0].shape == (0, 4)
    x, queue = torch.randn(1, 4, requires_grad=True), torch.randn(5, 4)
    value = regularizers.uniformity(x, queue)
    unit = torch.nn.functional.normalize
    expected = torch.cdist(unit(x), unit(queue)).square().mul(-2.0).exp().mean().log()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], torch.autograd.grad(expected, x)[0])


# ---- Impossible answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("reference", [False, True])
def test_impossible_answers(kind, smoothing, reference):
    if smoothing and kind != "sigmoid":
        pytest.skip("label_smoothing is of the sigmoid")
    pairs = torch.tensor([(-4.0, -INF), (-INF, -4.0), (-4.0, -5.0), (-3e38, -2.0), (-2.0, -3e38)]).unbind(1)
    pairs = [each.clone().requires_grad_() for each in pairs]
    others = [torch.full((5,), -6.0), torch.full((5,), -7.0)] if reference else []
    losses = dpo(*pairs, *others, kind=kind, label_smoothing=smoothing, reduction="none")
    wide = [each.detach().double().requires_grad_() for each in (*pairs, *others)]
    ratio = (wide[0] - wide[2]) - (wide[1] - wide[3]) if reference else wide[0] - wide[1]
    z = 0.1 * ratio
    dense = {"ipo": (ratio - 5).square(), "hinge": (1 - z).relu()}.get(kind, -torch.nn.functional.logsigmoid(z))
    if smoothing:
        dense = 0.9 * dense - 0.1 * torch.nn.functional.logsigmoid(-z)
    torch.testing.assert_close(losses.double(), dense.where(dense < 3.4e38, INF), rtol=1e-5, atol=1e-5)
    got, expected = (torch.autograd.grad(each.sum(), given[:2]) for each, given in ((losses, pairs), (dense, wide)))
    for a, b in zip(got, expected, strict=True):
        if kind == "ipo":
            b = b.where(b.isfinite() & (b.abs() < 1e30), 0.0)  # the square is infinite
            a = a.where(a.abs() < 1e30, 0.0)
        assert not a.isnan().any()
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    # Where nothing can be said, a weight of 0 leaves the pair out.
    nothing = torch.full((5,), -INF).index_fill(0, torch.tensor([2]), -1.0).requires_grad_()
    weight = torch.zeros(5).index_fill(0, torch.tensor([2]), 2.0)
    value = dpo(nothing, nothing.detach(), kind=kind, label_smoothing=smoothing, weight=weight)
    (gradient,) = torch.autograd.grad(value, nothing)
    assert value.isfinite() and gradient.nonzero()[:, 0].tolist() == [2]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimates_of_impossible_tokens(kind):
    log_prob, other = torch.tensor([-INF, -1.0, -1.0, 0.0]).requires_grad_(), torch.tensor([-1.0, -INF, -2.0, 0.0])
    found = kl_estimate(log_prob, other, kind=kind)
    r = torch.tensor([INF, -INF, -1.0, 0.0])
    expected = {"k1": -r, "k2": r.square() / 2, "k3": torch.tensor([INF, INF, r[2].exp() - 1 - r[2], 0.0])}[kind]
    torch.testing.assert_close(found, expected)
    for counted in (slice(None), slice(1, None), slice(2, None)):
        (gradient,) = torch.autograd.grad(found[counted].sum(), log_prob, retain_graph=True)
        assert not gradient.isnan().any()


# ---- Grades that are counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["logistic", "hinge"])
@pytest.mark.parametrize("top", [1.0, 5.0, 127.0, 128.0, 1024.0, 1e6])
def test_lambda_weights_of_large_grades(top, kind, dtype):
    scores = torch.randn(3, 4, dtype=dtype).requires_grad_()
    grades = torch.tensor([[top, 1.0, 0.0, 0.0], [0.0, 2.0, 1.0, -INF], [top, top - 1, top - 2, 0.0]], dtype=DOUBLE)
    found = pairwise_rank_distillation(scores, grades.to(dtype), kind=kind, pair_weight="lambda", pair_reduction="sum")
    wide, grades = scores.detach().double().requires_grad_(), grades.to(dtype).double()
    there = grades > -INF
    largest = grades.amax(1, keepdim=True)
    gain = ((grades - largest).exp2() - (-largest).exp2()).where(there, 0.0)
    place = torch.arange(2, 6).log2()
    ideal = (gain.sort(1, descending=True).values / place).sum(1)
    rank = wide.detach().where(there, -INF).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    discount = 1 / (rank + 2.0).log2()
    total = 0.0
    for n in range(3):
        for i in range(4):
            for j in range(4):
                if there[n, i] and there[n, j] and grades[n, i] > grades[n, j]:
                    weight = (gain[n, i] - gain[n, j]).abs() / ideal[n] * (discount[n, i] - discount[n, j]).abs()
                    lead = wide[n, i] - wide[n, j]
                    total = total + weight * (
                        (1 - lead).relu() if kind == "hinge" else torch.nn.functional.softplus(-lead)
                    )
    torch.testing.assert_close(found.double(), total / 3, rtol=1e-5, atol=1e-6)
    got, expected = (torch.autograd.grad(each, by)[0] for each, by in ((found, scores), (total / 3, wide)))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("grade", [1000.0, 1024.0, 1e6])
def test_measures_of_large_grades(grade, gain):
    relevant = torch.tensor([0, 2, 4]), torch.tensor([7, 2, 7, 2]), torch.tensor([grade, 1.0, 2.0, 1.0])
    found = retrieval_metrics(torch.tensor([[7, 2, 3], [7, 2, 3]]), relevant, k=(3,), gain=gain)
    assert all(each.isfinite().all() and (each <= 1).all() for each in found.values())
    assert torch.equal(found["ndcg@3"], torch.ones(2, dtype=DOUBLE))


# ---- Samplers and candidates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF, -1.0])
def test_counts_that_are_no_counts(bad):
    with pytest.raises(ValueError, match=re.escape(f"UnigramSampler: counts must be finite and >= 0, got {bad}")):
        UnigramSampler(torch.tensor([1.0, bad, 2.0]))


@pytest.mark.parametrize("counts", [torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
def test_counts_of_nothing(counts):
    with pytest.raises(ValueError, match="UnigramSampler: counts must be >= 0 and not all 0"):
        UnigramSampler(counts)


@pytest.mark.parametrize("counts", [[5], [0, 5], [5, 0], [0, 5, 0]])
def test_a_sampler_of_one_word(counts):
    sampler, word = UnigramSampler(torch.tensor(counts)), counts.index(5)
    avoid = torch.tensor([-1, word, 0, len(counts) - 1])
    assert (sampler(avoid, 40) == word).all()


def test_powers_of_large_counts():
    counts = torch.tensor([1e200, 2e200, 1e200], dtype=DOUBLE)
    torch.testing.assert_close(UnigramSampler(counts, 2.0).cumulative, torch.tensor([1, 5, 6], dtype=DOUBLE) / 6)


@pytest.mark.parametrize("value", [torch.nan, INF])
def test_a_candidate_whose_score_is_nan_is_never_chosen(value):
    candidates, context = torch.randn(4, 3, 5), torch.randn(4, 6, 5)
    probabilities = torch.rand(4, 3)
    clean = contrastive_search(candidates[:, 1:], probabilities[:, 1:], context)
    candidates[:, 0] = value
    found = contrastive_search(candidates, probabilities, context)
    assert found.score[:, 0].isnan().all() and torch.equal(found.chosen, clean.chosen + 1)
    probabilities[0] = torch.nan
    assert contrastive_search(candidates, probabilities, context).chosen[0] == 0
    with pytest.raises(ValueError, match="contrastive_search: candidates must be one or more"):
        contrastive_search(candidates[:, :0], probabilities[:, :0], context)
