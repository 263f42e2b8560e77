"""What ranks do in tests: their part of a batch, and how it differs from the single-process loss of all of it."""

import torch
import torch.distributed as dist

import contrastive_ops as co
from contrastive_ops import distributed

SIZES = {1: (9,), 2: (5, 9), 3: (5, 9, 2), 4: (6, 3, 8, 0)}


class Batch:
    """A batch of all ranks, and the part of one of them. Tensors by name: leaves, or fixed ones."""

    def __init__(self, rank, sizes, dtype=torch.float32):
        self.rank, self.sizes, self.dtype = rank, sizes, dtype
        self.total = sum(sizes)
        self.begin = sum(sizes[:rank])
        self.whole, self.part = {}, {}
        self.generator = torch.Generator().manual_seed(7)

    def rows(self, name, *shape, repeats=1):
        """A leaf with `repeats` rows for each of the batch."""
        whole = torch.randn(self.total * repeats, *shape, generator=self.generator, dtype=torch.float32)
        return self._leaf(name, whole.to(self.dtype), repeats)

    def fixed(self, whole, repeats=1):
        """(whole, part) of a tensor without a gradient."""
        return whole, self._cut(whole, repeats)

    def ids(self, high):
        """(whole, part) of random labels."""
        return self.fixed(torch.randint(-1, high, (self.total,), generator=self.generator))

    def number(self, name, value):
        """A leaf that is the same on all ranks."""
        self.whole[name] = torch.tensor(value, requires_grad=True)
        self.part[name] = torch.tensor(value, requires_grad=True)
        return self.whole[name], self.part[name]

    def positive(self, name):
        """A leaf with a number > 0 for each row."""
        return self._leaf(name, torch.rand(self.total, generator=self.generator) + 0.5)

    def _leaf(self, name, whole, repeats=1):
        self.whole[name] = whole.requires_grad_()
        self.part[name] = self._cut(whole.detach(), repeats).clone().requires_grad_()
        return self.whole[name], self.part[name]

    def _cut(self, whole, repeats=1):
        return whole[self.begin * repeats : (self.begin + self.sizes[self.rank]) * repeats]

    def errors(self, truth, share):
        """How far the mean over ranks and its gradients are from the truth, relative to the largest number of each."""
        expected = dict(zip(self.whole, torch.autograd.grad(truth, list(self.whole.values())), strict=True))
        found = dict(zip(self.part, torch.autograd.grad(share, list(self.part.values())), strict=True))
        ranks = len(self.sizes)
        errors = {"value": _distance(_mean(share.detach().clone()), truth.detach())}
        for name, gradient in found.items():
            if expected[name].dim() == 0:
                errors[name] = _distance(_mean(gradient.clone()), expected[name])
                continue
            repeats = len(expected[name]) // max(self.total, 1)
            errors[name] = _distance(gradient / ranks, self._cut(expected[name], repeats), expected[name])
        return errors


def _mean(value):
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value / dist.get_world_size()


def _distance(found, expected, among=None):
    if not expected.numel():
        return 0.0
    largest = (expected if among is None else among).double().abs().max().clamp_min(1e-3)
    return float((found.double() - expected.double()).abs().max() / largest)


# ---- The losses ------------------------------------------------------------------------------------------------------


def clip_plain(b):
    (x, xp), (y, yp), (s, sp) = b.rows("image", 16), b.rows("text", 16), b.number("scale", 9.0)
    return co.clip, (x, y, {"scale": s}), (xp, yp, {"scale": sp})


def clip_rules(b):
    (x, xp), (y, yp), (s, sp) = b.rows("image", 16), b.rows("text", 16), b.number("scale", 9.0)
    (w, wp), (c, cp), (i, ip) = b.positive("weight"), b.positive("col_bias"), b.ids(5)
    (u, up), offset = b.fixed(torch.linspace(0.1, 0.5, b.total)), {"scale": s}
    whole = {"pairs": co.Pairs(differ=(i, i), diagonal=2, below=(u, (u + 0.1)[None])), "weight": w, "col_bias": c}
    part = {"pairs": co.Pairs(differ=(ip, ip), diagonal=2, below=(up, (up + 0.1)[None])), "weight": wp, "col_bias": cp}
    return co.clip, (x, y, {**whole, **offset}), (xp, yp, {**part, "scale": sp})


def clip_smoothed(b):
    (x, xp), (y, yp), (i, ip) = b.rows("image", 16), b.rows("text", 16), b.ids(5)
    common = {"label_smoothing": 0.1, "temperature": 0.2}
    return (
        co.clip,
        (x, y, {**common, "pairs": co.Pairs(same=(i, i))}),
        (xp, yp, {**common, "pairs": co.Pairs(same=(ip, ip))}),
    )


def clip_smoothed_everywhere(b):
    (x, xp), (y, yp) = b.rows("image", 16), b.rows("text", 16)
    common = {"label_smoothing": 0.1, "temperature": 0.2, "reduction": "sum"}
    return co.clip, (x, y, common), (xp, yp, common)


CASES = {case.__name__: case for case in (clip_plain, clip_rules, clip_smoothed, clip_smoothed_everywhere)}


def errors(rank, size, name, dtype, schedule):
    """The errors of one loss on one rank, and whether a repetition has the same bits."""
    b = Batch(rank, SIZES[size], dtype)
    function, (*whole, options), (*part, part_options) = CASES[name](b)
    shared = getattr(distributed, function.__name__)
    share = shared(*part, **part_options, schedule=schedule)
    again = shared(*part, **part_options, schedule=schedule)
    leaves = list(b.part.values())
    gradients = [torch.autograd.grad(each, leaves, retain_graph=True) for each in (share, again)]
    same = torch.equal(share, again) and all(torch.equal(*each) for each in zip(*gradients, strict=True))
    return b.errors(function(*whole, **options), share), same
