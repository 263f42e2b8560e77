"""Histograms, IsoScore and contrast sets against loops over their definitions."""

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.metrics import contrast_accuracy, iso_score, similarity_histogram

DOUBLE = torch.float64


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("two_sided", [True, False])
def test_histogram_of_all_pairs(two_sided, normalize):
    x, y = torch.randn(17, 5, dtype=DOUBLE), torch.randn(11, 5, dtype=DOUBLE)
    other = y if two_sided else x
    s = F.normalize(x) @ F.normalize(other).T if normalize else x @ other.T
    s = s.flatten() if two_sided else s[~torch.eye(17, dtype=torch.bool)]
    counts, edges = similarity_histogram(x, y if two_sided else None, bins=7, low=-0.8, high=0.9, normalize=normalize)
    expected, bounds = torch.histogram(s.clamp(-0.8, 0.9), 7, range=(-0.8, 0.9))
    assert counts.tolist() == expected.long().tolist()
    torch.testing.assert_close(edges, bounds)


def test_histogram_in_chunks(monkeypatch):
    x = torch.randn(23, 5)
    whole = similarity_histogram(x)[0]
    monkeypatch.setattr("contrastive_ops._similarity_metrics.CHUNK_ELEMENTS", 50)
    assert similarity_histogram(x)[0].tolist() == whole.tolist() and int(whole.sum()) == 23 * 22


def test_iso_score():
    x = torch.randn(40, 6, dtype=DOUBLE) * torch.tensor([5.0, 2.0, 1.0, 1.0, 0.5, 0.1])
    v = torch.linalg.svdvals(x - x.mean(0)) ** 2
    v = v / v.norm() * 6**0.5
    defect = (v - 1).norm() / (2 * (6 - 6**0.5)) ** 0.5
    share = (6 - defect**2 * (6 - 6**0.5)) ** 2 / 36
    torch.testing.assert_close(iso_score(x), (6 * share - 1) / 5)
    torch.testing.assert_close(iso_score(x @ torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE))[0] + 3), iso_score(x))
    line = torch.arange(5.0)[:, None] * torch.ones(1, 4)
    assert abs(float(iso_score(line))) < 1e-6 and iso_score(torch.ones(5, 4)).isnan()


def test_contrast_sets():
    scores = torch.tensor([[[2, 1], [1, 2]], [[2, 1], [2, 1]], [[1, 1], [0, 3]], [[5, 0], [0, 1]]])
    assert contrast_accuracy(scores) == 0.5 and contrast_accuracy(scores[:0]).isnan()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: similarity_histogram(torch.randn(3, 4), low=1.0, high=1.0), "low must be below high, got 1.0 and 1.0"),
        (lambda: similarity_histogram(torch.randn(3, 4), bins=0), "bins must be"),
        (lambda: iso_score(torch.randn(3, 1)), r"x must have at least 2 rows of 2 numbers, got \(3, 1\)"),
        (lambda: contrast_accuracy(torch.randn(3, 2)), r"scores must have shape \(N, 2, 2\), got \(3, 2\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
