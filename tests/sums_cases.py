"""Sums that a float32 accumulator loses: a large number, and then thousands that are less than half of its last place.

Where parts merge in float32 the small ones are gone, 4e-6 of the sum and more; what is right to 1e-6 keeps them. So a
few thousand numbers say what a sum of millions would.
"""

import math
from typing import NamedTuple

import torch

from contrastive_ops import similarity_reduce
from contrastive_ops.core.routing import ScoreSpec

BOUND = 1e-6


class Long(NamedTuple):
    """How long a sum is, and how many numbers a kernel adds up before it merges them."""

    size: int
    part: int

    def one_large(self):
        """A number, and others of which those of a part are less than half of its last place."""
        numbers = torch.full((self.size,), 3.9 / self.part)
        numbers[0] = 2.0**26
        return numbers

    def equal_and_small(self):
        """Logits whose logsumexp is near 0: 256 of the largest, and others that are as small next to these."""
        logits = torch.full((self.size,), math.log(1.4e-5 / self.part))
        logits[:256] = 0.0
        return logits - math.log(256)

    def rising(self):
        """Logits that exceed all before them again and again, so that a sum is rescaled with every part."""
        return torch.linspace(-0.5, 0.5, self.size) - math.log(self.size)


def relative(got, truth):
    return float(((got.detach().double().cpu() - truth) / truth).abs().max())


def sides(numbers, dim, device):
    """Few and many rows whose inner products are these numbers, as x and y, and which is the side of the many."""
    few, many = torch.ones(2, 1, device=device), numbers[:, None].to(device)
    return (few, many) if dim == 1 else (many, few)


def check_folds(backend, device, long, kind, dim, **options):
    """The fold of two rows (or columns) over many."""
    numbers = long.one_large()
    truth = numbers.double().sum()
    if kind == "sum_softplus":  # whose softplus is the number
        numbers = numbers + (-(-numbers).expm1()).log()
        truth = torch.nn.functional.softplus(numbers.double()).sum()
    x, y = sides(numbers, dim, device)
    got = similarity_reduce(x, y, reduce=kind, dim=dim, backend=backend, **options)
    assert relative(got, truth) < BOUND


def check_logsumexp(backend, device, logits, dim, **options):
    """Its sum is what it is made of: absolute errors of the logarithm."""
    x, y = sides(logits, dim, device)
    got = similarity_reduce(x, y, reduce="logsumexp", dim=dim, backend=backend, **options)
    assert float((got.double().cpu() - logits.double().logsumexp(0)).abs().max()) < BOUND


def check_lists(backend, device, long):
    """The weighted sum of a list's logits."""
    numbers = long.one_large()
    x, y = sides(numbers, 1, device)
    lists = torch.arange(2 * long.size, device=device) % long.size
    indptr = torch.tensor([0, long.size, 2 * long.size], device=device)
    found = similarity_reduce(x, y, reduce="sum", linear=(indptr, lists), backend=backend)
    assert relative(found.linear, numbers.double().sum()) < BOUND


def check_gradients(backend, device, long, dim, **options):
    """Gradients of biases and of scales, whose sums go along few rows (or columns) over many."""
    numbers = long.one_large()
    truth = numbers.double().sum()
    x, y = sides(torch.ones(long.size), dim, device)
    bias = torch.zeros(2, device=device, requires_grad=True)
    scale = torch.ones(2 if dim == 1 else (), device=device, requires_grad=True)
    options["row_bias" if dim == 1 else "col_bias"] = bias
    folded = similarity_reduce(x, y, reduce="sum", dim=(0, 1), scale=scale, backend=backend, **options)
    # What arrives at the many is what is summed up for the few.
    many = folded.cols if dim == 1 else folded.rows
    d_bias, d_scale = torch.autograd.grad(many @ numbers.to(device), (bias, scale))
    assert relative(d_bias, truth) < BOUND
    assert relative(d_scale, truth if dim == 1 else 2 * truth) < BOUND


def check_router(scores, device, experts, at_once, segments, *, first=256, then=400, square=0.4):
    """Sums over tokens of which a program has `at_once` at a time, `scores` being the operator's function of them.

    The squared logsumexp of one token is large; and the probability of an expert is 1 in many tokens, and then small.
    """
    label, tokens = None, (first + then) * at_once * segments
    if segments > 1:
        label = (torch.arange(tokens) % segments).to(device)
    spec = list(ScoreSpec(1, 0, 0, 1, 1, 0, segments, 0))
    squares = torch.full((tokens, experts), math.sqrt(square) - math.log(experts))
    squares[0] = 2.0**13 - math.log(experts)
    shares = torch.zeros(tokens, experts)
    shares[:, 0] = math.log(5e-8 * first * (experts - 1))
    shares[: first * at_once * segments, 0] = 40.0
    for logits, name in ((squares, "totals"), (shares, "sums")):
        found = scores((logits.to(device), None, None, None, None, label, None, spec, 0.5))[name]
        own = logits.double() if label is None else logits.double()[::segments]  # the first segment
        truth = own.logsumexp(1).square().sum() if name == "totals" else own.softmax(1)[:, 0].sum()
        # The large number is in one of the short sums, which rounds once for every token.
        assert relative(found[0].flatten()[0], truth) < 2 * BOUND
