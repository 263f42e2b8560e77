"""Random calls of similarity_reduce with every rule and option, and what to compare of their results."""

import dataclasses
import functools

import torch

from contrastive_ops import Pairs
from contrastive_ops.ops import Guide

KINDS = ("logsumexp", "max", "sum_softplus", "sum_relu", "sum", "count")
RULES = ("diagonal", "differ", "same", "exclude", "below", "above", "guide", "log_weight", "fill", "rows", "columns")


class Inputs:
    """Random inputs of one call, with numbers that `dtype` holds exactly where they are operands of products.

    Numbers are made on the CPU, so that they are the same for every device.
    """

    def __init__(self, n, m, d, *, itself=False, dtype=torch.float32, seed=0, device="cpu"):
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.n, self.m = n, n if itself else m
        self.x = self.leaf(n, d, dtype=dtype)
        self.y = None if itself else self.leaf(m, d, dtype=dtype)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def leaf(self, *shape, dtype=torch.float32):
        return self.random(*shape).to(dtype).requires_grad_()

    def ids(self, size, kinds):
        return torch.randint(-1, kinds, (size,), generator=self.generator).to(self.device)

    def target(self):
        return torch.randint(self.m, (self.n,), generator=self.generator).to(self.device)

    def lists(self, longest, weights=False):
        lengths = torch.randint(0, min(longest, self.m) + 1, (self.n,), generator=self.generator)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        columns = [torch.randperm(self.m, generator=self.generator)[:k].sort().values for k in lengths.tolist()]
        indices = torch.cat([*columns, torch.zeros(0, dtype=torch.int64)])
        lists = indptr.to(self.device), indices.to(self.device)
        return (*lists, self.random(len(indices))) if weights else lists

    def pairs(self, *names):
        n, m = self.n, self.m
        rules = {
            "diagonal": lambda: {"diagonal": 1},
            "differ": lambda: {"differ": (self.ids(n, 4), self.ids(m, 4))},
            "same": lambda: {"same": (self.ids(n, 2), self.ids(m, 2))},
            "exclude": lambda: {"exclude": self.lists(9)},
            "below": lambda: {"below": (1.0, self.random(n), self.random(1, m).abs())},
            "above": lambda: {"above": (-2.0, self.random(n, 1) - 1, self.random(1, m) - 1)},
            "guide": lambda: {"guide": self.guide()},
            "log_weight": lambda: {"log_weight": (self.random(3, 4), self.ids(n, 3), self.ids(m, 4))},
            "fill": lambda: {"diagonal": 0, "differ": (self.ids(n, 3), self.ids(m, 3)), "fill": 0.3},
            "rows": lambda: {"rows": self.random(n) > -1},
            "columns": lambda: {"columns": self.random(m) > -1},
        }
        return Pairs(**{key: value for name in names for key, value in rules[name]().items()})

    def guide(self):
        gy = None if self.y is None else self.random(self.m, 3)
        return Guide(self.random(self.n, 3), gy, (self.random(self.n), self.random(1, self.m)))


def mapped(tree, change):
    """The same arguments with every tensor changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(mapped(value, change) for value in tree)
    if dataclasses.is_dataclass(tree):
        fields = {f.name: mapped(getattr(tree, f.name), change) for f in dataclasses.fields(tree)}
        return type(tree)(**fields)
    return tree


def exact(options):
    """The same numbers in float64."""

    @functools.cache
    def change(tensor):
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return mapped(options, change)


def leaves(options):
    found = []
    mapped(options, lambda t: found.append(t) if t.requires_grad and not any(t is f for f in found) else None)
    return found


def flat(reduced):
    return [p for p in (*(reduced.rows or ()), *(reduced.cols or ()), reduced.target, reduced.linear) if p is not None]


def winners(reduced):
    return [w for w in (*(reduced.row_argmax or ()), *(reduced.col_argmax or ())) if w is not None]


def weighted(values, cotangents):
    """A scalar that weighs every finite result; rows without a pair (-inf) have no say."""
    return sum(
        (torch.where(v.isfinite(), v, 0.0) * c.to(v.dtype)).sum() for v, c in zip(values, cotangents, strict=True)
    )


def gradients_of(values, cotangents, inputs):
    total = weighted(values, cotangents)
    found = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]
