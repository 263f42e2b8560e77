"""Ties and near ties: which pairs a bound, a guide or a list of the best keeps, in every backend, by random problems.

Of integers, powers of two as scales and integer biases all arithmetic is exact: backends agree to the bit, also about
pairs that meet a bound exactly. Else a logit is ``dot * scale + (row_bias + col_bias)``, rounded once or twice, and
two backends may order, or drop, differently only what float64 says is nearer than these roundings.
"""

import pytest
import torch

from contrastive_ops import Fold, Pairs, similarity_reduce, similarity_topk
from contrastive_ops.core import extension
from contrastive_ops.ops import Guide

EPS = torch.finfo(torch.float32).eps / 2  # what one rounding may take
SEEDS = range(30)
KINDS = ("logsumexp", "max", "sum_relu", "sum", "count")


class Problem:
    """Small integers, so that many logits and bounds are equal; `exact`: scales and biases too."""

    def __init__(self, seed, exact):
        self.generator = torch.Generator().manual_seed(seed)
        self.N, self.M, D = (self.draw(1, most, ()).int().item() for most in (40, 150, 12))
        self.x, self.y = self.draw(-3, 3, (self.N, D)), self.draw(-3, 3, (self.M, D))
        many_scales = bool(self.draw(0, 1, ()))
        shape = (self.N,) if many_scales else ()
        self.scale = 2.0 ** self.draw(-2, 2, shape) if exact else self.uniform(shape) + 0.1
        self.row_bias, self.col_bias = (
            (self.draw(-2, 2, (size,)) if exact else self.uniform((size,)) - 0.5) if bool(self.draw(0, 1, ())) else None
            for size in (self.N, self.M)
        )

    def draw(self, low, high, shape):
        return torch.randint(low, high + 1, shape, generator=self.generator).float()

    def uniform(self, shape):
        return torch.rand(shape, generator=self.generator)

    def pairs(self):
        """Rules that meet similarities exactly."""
        below = (self.draw(2, 6, (self.N,)), self.draw(2, 6, (1, self.M)))
        guide = Guide(self.draw(-2, 2, (self.N, 3)), self.draw(-2, 2, (self.M, 3)), below=self.draw(0, 3, (self.N, 1)))
        classes = (self.draw(-2, 2, (3, 2)), self.draw(-1, 2, (self.N,)).long(), self.draw(-1, 1, (self.M,)).long())
        options = {"below": below, "above": self.draw(-6, -2, (self.N,)), "guide": guide, "log_weight": classes}
        return Pairs(**{name: value for name, value in options.items() if bool(self.draw(0, 2, ()))})

    def options(self):
        return {"scale": self.scale, "row_bias": self.row_bias, "col_bias": self.col_bias}

    def logits(self):
        """(N, M) in float64, and what a backend may be off."""
        scale = self.scale.double().reshape(-1, 1)
        biases = [
            torch.zeros(()) if each is None else each.double().reshape(shape)
            for each, shape in ((self.row_bias, (-1, 1)), (self.col_bias, (1, -1)))
        ]
        product = (self.x.double() @ self.y.double().T) * scale
        logits = product + biases[0] + biases[1]
        # The product, the sum of the biases or a sum with one of them, and the result: one rounding each.
        return logits, EPS * (product.abs() + biases[0].abs() + biases[1].abs() + logits.abs()) * 1.01


@pytest.mark.parametrize("seed", SEEDS)
def test_exact_ties_are_decided_alike(seed, backend):
    problem = Problem(seed, exact=True)
    pairs, options = problem.pairs(), problem.options()
    k = max(1, problem.M // 3)
    lists = [
        similarity_topk(problem.x, problem.y, k, pairs=pairs, **options, backend=each)
        for each in ("reference", backend)
    ]
    for name in ("values", "indices", "counts"):
        assert torch.equal(getattr(lists[0], name), getattr(lists[1], name)), name
    folds = tuple(Fold(kind, pairs=pairs) for kind in KINDS)
    found = [
        similarity_reduce(problem.x, problem.y, reduce=folds, dim=(0, 1), **options, backend=each)
        for each in ("reference", backend)
    ]
    for kind, *both in zip(KINDS * 2, *((*each.rows, *each.cols) for each in found), strict=True):
        if kind == "logsumexp":
            torch.testing.assert_close(*both)
        else:
            assert torch.equal(*both), kind
    assert torch.equal(found[0].row_argmax[1], found[1].row_argmax[1])
    assert torch.equal(found[0].col_argmax[1], found[1].col_argmax[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_near_ties_are_decided_by_float64_up_to_two_roundings(seed, backend):
    problem = Problem(seed, exact=False)
    truth, off = problem.logits()
    k = max(1, problem.M // 3)
    found = similarity_topk(problem.x, problem.y, k, **problem.options(), backend=backend)
    at = found.indices
    assert ((found.values.double() - truth.gather(1, at)).abs() <= off.gather(1, at)).all()
    # Whatever is listed reaches the k-th of the truth, and what clearly exceeds it is listed.
    last = truth.sort(1, descending=True).values[:, k - 1 : k]
    most = off.amax(1, keepdim=True)
    assert (truth.gather(1, at) >= last - 2 * most).all()
    listed = torch.zeros_like(truth, dtype=torch.bool).scatter_(1, at, True)
    assert (listed | (truth <= last + 2 * most)).all()
    # Descending, but for what is as near.
    assert (truth.gather(1, at).diff(dim=1) <= 2 * most).all()


def _torch_fuses():
    """Whether torch rounds a product and a sum once."""
    a = torch.full((64,), 1 + 2.0**-23)
    return bool((torch.addcmul(-(a * a), a, a) != 0).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_reference_and_cpu_round_alike(seed, backend):
    if not _torch_fuses() or backend != "cpu" or extension.load().cpu_capability() == "default":
        pytest.skip("rounds products and sums apart, or the reference itself")
    problem = Problem(seed, exact=False)
    one, other = (
        similarity_topk(problem.x, problem.y, problem.M, **problem.options(), backend=each)
        for each in ("reference", backend)
    )
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_and_guides_decide_by_float64_up_to_the_sums(seed, backend):
    """Products are rounded, and bounds are similarities themselves, so that every row has a pair at its own."""
    generator = torch.Generator().manual_seed(seed)
    x, y, gx, gy = (torch.randn(size, 9, generator=generator) for size in (20, 30, 20, 30))
    truth = {"similarity": x.double() @ y.double().T, "guide": gx.double() @ gy.double().T}
    off = {
        "similarity": 9 * EPS * (x.double().abs() @ y.double().abs().T),
        "guide": 9 * EPS * (gx.double().abs() @ gy.double().abs().T),
    }
    below, above, of_guide = (
        truth["similarity"][:, 3].float(),
        truth["similarity"][:, 4].float() - 2,
        truth["guide"][:, 5],
    )
    pairs = Pairs(below=below, above=above, guide=Guide(gx, gy, below=of_guide.float()))
    found = similarity_topk(x, y, 30, pairs=pairs, backend=backend).indices
    kept = torch.zeros(20, 31, dtype=torch.bool).scatter_(1, torch.where(found < 0, 30, found), True)[:, :30]
    gaps = [
        below.double()[:, None] - truth["similarity"],
        truth["similarity"] - above.double()[:, None],
        of_guide.float().double()[:, None] - truth["guide"],
    ]
    offs = [off["similarity"], off["similarity"], off["guide"]]
    surely = torch.stack([gap > width for gap, width in zip(gaps, offs, strict=True)]).all(0)
    never = torch.stack([gap < -width for gap, width in zip(gaps, offs, strict=True)]).any(0)
    assert (kept | ~surely).all()
    assert not (kept & never).any()
    assert int(surely.sum()) > 0
    assert int(never.sum()) > 0
