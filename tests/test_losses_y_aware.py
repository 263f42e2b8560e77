"""InfoNCE with continuous labels, against the dense matrix of its weights."""

import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import info_nce, sup_con
from contrastive_ops.losses import y_aware_info_nce
from contrastive_ops.testing.compare import check, leaf, number, reduced

DOUBLE = torch.float64
N, D = 8, 5


def dense(query, key, labels, bandwidth, scale, normalize=True):
    x, y = (F.normalize(each) if normalize else each for each in (query, key))
    places = labels.double().view(N, -1)
    w = torch.exp(-(places[:, None] - places).square().sum(2) / (2 * bandwidth**2))
    return -((w / w.sum(1, keepdim=True)) * (scale * x @ y.T).log_softmax(1)).sum(1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("labels", [1950 + 40 * torch.rand(N), torch.rand(N, 2) * 9, torch.arange(N) % 3], ids=str)
def test_y_aware_info_nce(backend, labels, normalize, reduction):
    query, key, scale = leaf(N, D), leaf(N, D), number(3.0)
    weight = (torch.rand(N, dtype=DOUBLE) + 0.1).requires_grad_()
    truth = reduced(dense(query, key, labels, 4.0, scale, normalize), reduction, weight)
    options = {"bandwidth": 4.0, "scale": scale, "weight": weight, "reduction": reduction, "normalize": normalize}
    check(y_aware_info_nce(query, key, labels, backend=backend, **options), truth, [query, key, scale, weight])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("given", ["kernel", "negative_weight", "both"])
def test_any_function_of_the_distance_of_labels(given, normalize, reduction, monkeypatch):
    monkeypatch.setattr("contrastive_ops.losses._one_pass.ELEMENTS", 3 * N)  # chunks of a few rows
    query, key, scale, labels = leaf(N, D), leaf(N, D), number(3.0), 1950 + 40 * torch.rand(N)
    weight = torch.rand(N, dtype=DOUBLE)
    weight[2] = 0.0
    near, far = (lambda d: (9 - d).relu()), (lambda d: 1 + d)
    functions = {"kernel": near, "negative_weight": far}
    functions = functions if given == "both" else {given: functions[given]}
    x, y = (F.normalize(each) if normalize else each for each in (query, key))
    apart, logits = (labels.double()[:, None] - labels.double()).abs(), scale * x @ y.T
    w = near(apart) if "kernel" in functions else torch.exp(-(apart**2) / 32)
    log_below = (far(apart) if "negative_weight" in functions else torch.ones_like(apart)).log()
    lse = (logits + log_below).logsumexp(1, keepdim=True)
    truth = reduced(-((w / w.sum(1, keepdim=True)) * (logits - lse)).sum(1), reduction, weight)
    options = {"bandwidth": 4.0, "scale": scale, "weight": weight, "reduction": reduction, "normalize": normalize}
    check(y_aware_info_nce(query, key, labels, **functions, **options), truth, [query, key, scale])


def test_rows_without_a_positive_and_what_functions_refuse():
    query, key, labels = leaf(N, D), leaf(N, D), torch.arange(N)
    none = y_aware_info_nce(query, key, labels, kernel=torch.zeros_like)
    assert none == 0 and not torch.autograd.grad(none, query)[0].any()
    for options in ({"reduction": "none"}, {"weight": torch.ones(N, dtype=DOUBLE, requires_grad=True)}):
        with pytest.raises((NotImplementedError, ValueError), match="y_aware_info_nce: "):
            y_aware_info_nce(query, key, labels, kernel=torch.ones_like, **options)


def test_ends_of_the_bandwidth(backend):
    query, key, labels = leaf(N, D), leaf(N, D), torch.arange(N) % 3
    options = {"temperature": 0.5, "backend": backend}
    alone = info_nce(query, key, **options)
    check(y_aware_info_nce(query, key, torch.arange(N), bandwidth=1e-3, **options), alone, [query, key])
    # Keys of equal labels are positives of one weight.
    classes = sup_con(query, labels, key, labels, **options)
    check(y_aware_info_nce(query, key, labels, bandwidth=1e-3, **options), classes, [query, key])
    even = -(2 * F.normalize(query) @ F.normalize(key).T).log_softmax(1).mean()
    check(y_aware_info_nce(query, key, labels, bandwidth=1e9, **options), even, [query, key])


def test_16_bits_are_rounded_once(backend):
    query, key = (torch.randn(N, D).to(torch.bfloat16).requires_grad_() for _ in range(2))
    labels = torch.rand(N)
    truth = dense(query.double(), key.double(), labels, 0.3, 10.0).mean()
    value = y_aware_info_nce(query, key, labels, bandwidth=0.3, scale=10.0, backend=backend)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    for each, wanted in zip(*(torch.autograd.grad(v, (query, key)) for v in (value, truth)), strict=True):
        torch.testing.assert_close(each, wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    "labels, options, error, message",
    [
        (torch.rand(3), {}, ValueError, "labels must have shape (4,) or (4, L), got (3,)"),
        (torch.rand(4).to(torch.complex64), {}, TypeError, "labels must be real numbers"),
        (torch.rand(4), {"bandwidth": 0.0}, ValueError, "bandwidth must be in (0, inf)"),
    ],
)
def test_what_does_not_fit(labels, options, error, message):
    with pytest.raises(error, match="y_aware_info_nce: " + re.escape(message)):
        y_aware_info_nce(torch.randn(4, 3), torch.randn(4, 3), labels, **options)
