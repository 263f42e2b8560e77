"""Means of classes, codes and centroids over steps, against a loop over classes."""

import copy

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import info_nce
from contrastive_ops.losses import RunningPrototypes

C, D = 4, 3


def followed(prototypes, seen, x, labels, momentum):
    prototypes, seen = prototypes.clone(), seen.clone()
    for c in range(C):
        if (labels == c).any():
            mean = x[labels == c].mean(0)
            prototypes[c] = momentum * mean + (1 - momentum) * prototypes[c] if seen[c] else mean
            seen[c] = True
    return prototypes, seen


def test_prototypes_follow_the_means_of_their_classes():
    running, truth, seen = RunningPrototypes(C, D, momentum=0.3), torch.zeros(C, D), torch.zeros(C, dtype=torch.bool)
    for labels in ([0, 0, 2, -1, 2, 0], [1, 0, 1, 1, -1, -1], [-1] * 6):
        x, labels = torch.randn(6, D, requires_grad=True), torch.tensor(labels)
        truth, seen = followed(truth, seen, x.detach(), labels, 0.3)
        found = running(x, labels)
        torch.testing.assert_close(found, truth)
        assert torch.equal(running.seen, seen) and not found.requires_grad
        found.zero_()  # what is returned is not the state
        torch.testing.assert_close(running.prototypes, truth)
    running.eval()
    torch.testing.assert_close(running(torch.randn(6, D), torch.arange(6) % C), truth)
    running.reset()
    assert not running.prototypes.any() and not running.seen.any()


def test_codes_are_those_of_the_nearest_rows():
    running, x, codes = RunningPrototypes(C, D, momentum=0.05), torch.randn(50, D), torch.randn(C, D)
    running.start(codes)
    nearest = (x[:, None] - codes).square().sum(2).argmin(1)
    truth, _ = followed(codes, torch.ones(C, dtype=torch.bool), x, nearest, 0.05)
    torch.testing.assert_close(running(x), truth)
    for _ in range(1000):
        running(x)
    nearest = (x[:, None] - running.prototypes).square().sum(2).argmin(1)
    means = torch.stack([x[nearest == c].mean(0) for c in range(C)])
    torch.testing.assert_close(running.prototypes, means, rtol=1e-3, atol=1e-3)  # k-means has come to rest


def test_a_class_whose_mean_is_not_finite_is_not_kept_and_others_are():
    running, x = RunningPrototypes(C, D), torch.randn(6, D)
    x[2] = torch.inf
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    found = running(x, labels)
    assert not running.seen[1] and not found[1].any()
    torch.testing.assert_close(found[0], x[:2].mean(0))


def test_a_prototype_classifier_learns():
    running, labels = RunningPrototypes(2, D, momentum=1.0), torch.arange(40) % 2
    x = torch.randn(40, D) + 3.0 * labels[:, None]
    options = {"temperature": 1.0, "metric": "sqeuclidean", "normalize": False}
    value = info_nce(x, running(x, labels), target=labels, **options)
    wanted = F.cross_entropy(-(x[:, None] - running.prototypes).square().sum(2), labels)
    torch.testing.assert_close(value, wanted)
    assert copy.deepcopy(running).seen.all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: RunningPrototypes(0, D), "RunningPrototypes: classes must be at least 1"),
        (lambda: RunningPrototypes(C, D, 0.0), "RunningPrototypes: momentum must be in"),
        (lambda: RunningPrototypes(C, D)(torch.zeros(2, D + 1)), "RunningPrototypes: x must have shape"),
        (
            lambda: RunningPrototypes(C, D)(torch.zeros(2, D), torch.tensor([0, C])),
            "RunningPrototypes: labels must be in",
        ),
        (
            lambda: RunningPrototypes(C, D).start(torch.zeros(C, 1)),
            "RunningPrototypes.start: prototypes must have shape",
        ),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
