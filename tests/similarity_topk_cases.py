"""Cases that tests of the kernels of similarity_topk share: small integers, whose products and sums are exact."""

import dataclasses

import torch

from contrastive_ops import Pairs
from contrastive_ops.core.problem import Problem
from contrastive_ops.ops import Guide
from contrastive_ops.ops.similarity_topk import logits_at as logits_of_problem
from contrastive_ops.ops.similarity_topk import select as select_of_problem


def problem(x, y, row_bias=None, col_bias=None):
    names = ("similarity_topk", "x", "y")
    make = Problem if y.dtype == torch.int8 else Problem.of  # codes are the library's own, and not checked
    return make(names, x, y, row_bias, col_bias)


def select(x, y, k, *, row_bias=None, col_bias=None, **arguments):
    """With lists and statistics, as mining calls it."""
    return select_of_problem(problem(x, y, row_bias, col_bias), k, **arguments)


def logits_at(x, y, indices, *, row_bias=None, col_bias=None, **arguments):
    return logits_of_problem(problem(x, y, row_bias, col_bias), indices, **arguments)


RULES = ("diagonal", "differ", "same", "exclude", "below", "above", "guide", "log_weight")


def on_device(value, device):
    """The same with every tensor in it on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(on_device(each, device) for each in value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: on_device(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def integers(rows, depth, dtype=torch.float32, seed=0):
    """A matrix of integers from -3 to 3."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (rows, depth), generator=generator).to(dtype)


def rules_of(rows, columns, chosen, seed):
    """Each rule drops some pairs and keeps some, and bounds are often met exactly."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 4, (rows,), generator=g), torch.randint(-1, 4, (columns,), generator=g)
    bound = torch.randint(-4, 12, (rows,), generator=g).float()
    column_bound = torch.randint(-4, 12, (1, columns), generator=g).float()
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(6, (rows,), generator=g).cumsum(0)])
    guide = integers(rows, 3, seed=seed), integers(columns, 3, seed=seed + 1)
    every = {
        "diagonal": 2,
        "differ": ids,
        "same": tuple(each // 2 for each in ids),
        "exclude": (indptr, torch.randint(columns, (int(indptr[-1]),), generator=g)),
        "below": (bound, column_bound),
        "above": (-bound, -column_bound),
        "guide": Guide(*guide, (bound, 9.0, column_bound)),
        "log_weight": (torch.arange(8.0).reshape(2, 4), ids[0].clamp_max(1), ids[1]),
    }
    return Pairs(**{name: every[name] for name in chosen})


def assert_selects_as_reference(backend, device, x, y, k, **arguments):
    """The same lists and statistics as the reference; returns them."""
    x, y = on_device((x, y), device)
    arguments = {name: on_device(value, device) for name, value in arguments.items()}
    found = select(x, y, k, backend=backend, **arguments)
    expected = select(x, y, k, backend="reference", **arguments)
    assert torch.equal(found.top.indices, expected.top.indices)
    assert torch.equal(found.top.values, expected.top.values)
    assert torch.equal(found.top.counts, expected.top.counts)
    assert found.statistics.keys() == expected.statistics.keys()
    for name, counted in expected.statistics.items():
        assert torch.equal(found.statistics[name], counted), name
    return found


def listed_gradients(dtype, backend, x, y, scale, row_bias, col_bias, upstream, indices, table):
    """Logits of listed pairs, and their gradients by everything that they depend on."""
    inputs = [t.to(dtype).requires_grad_() for t in (x, y)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs += [t.to(wide).requires_grad_() for t in (scale, row_bias, col_bias)]
    rows, columns = (torch.arange(len(t), device=t.device) for t in (x, y))
    pairs = Pairs(log_weight=(table.to(wide), rows % 2, columns % 3 - 1))
    named = dict(zip(("x", "y", "scale", "row_bias", "col_bias"), inputs, strict=True))
    values = logits_at(indices=indices, pairs=pairs, backend=backend, **named)
    finite = values.masked_fill(indices < 0, 0.0)
    return values.detach(), torch.autograd.grad((finite * upstream).sum(), inputs)
