"""Primitives that fold, search or compare a similarity matrix."""

from __future__ import annotations

from typing import Any

import test_mining_state
import test_similarity_distill
import test_similarity_prefix
import test_similarity_values
import torch
from similarity_cases import KINDS, RULES, flat, winners
from torch import Tensor
from torch.nn.functional import normalize

from contrastive_ops import Fold, similarity_reduce
from contrastive_ops.mining import TopKState
from contrastive_ops.ops import similarity_distill, similarity_prefix, similarity_topk, similarity_values
from contrastive_ops.testing import dense_keep, dense_reduce

from .cases import One, Refused, Some, Subject
from .judge import Call
from .layouts import BACKENDS, COLUMNS, DEPTHS, DTYPES, ROWS, Numbers, affordable, laid_out, needing

SIZES = {"n": ROWS, "m": COLUMNS, "d": DEPTHS, "backend": BACKENDS}
BUDGET = One((0, None, 5000))
# Logits of 1e4 are whole numbers, too.
SCALE = One((1.0, 0.5, 2.0, 4096.0))


def _number(value: float, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.tensor(value, dtype=wide, requires_grad=True)


def _widened(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Scales, biases and tables of float64 inputs are float64."""
    if dtype != torch.float64:
        return options
    from .judge import converted

    return dict(converted(options, torch.float64))


class Reduce(Subject):
    """similarity_reduce with all of its rules, folds and options at once."""

    name = "similarity_reduce"
    weight = 5
    space = {
        **SIZES,
        "itself": One((False, True)),
        "folds": Some((*KINDS, *(f"{k} of its own" for k in KINDS), *(f"-{k}" for k in KINDS)), 3, 1),
        "dim": One(((1,), (0,), (0, 1))),
        "rules": Some(RULES, 4),
        "own_rules": Some(("diagonal", "differ", "same", "exclude", "below", "above", "log_weight"), 2),
        "options": Some(("row_bias", "col_bias", "target", "linear", "col_scale"), 5),
        "scale": SCALE,
        "scale_of": One(("number", "tensor", "rows")),
        "budget": BUDGET,
        "numbers": One(("grid", "normal", "equal", "tiny", "broken")),
    }

    def build(self, *, seed, dtype, layout, needs, n, m, d, backend, itself, folds, dim, rules, own_rules, options,
              scale, scale_of, budget, numbers) -> Call:  # fmt: skip
        kind = DTYPES[dtype]
        discontinuous = {"below", "above", "guide"} & {*rules, *own_rules} or any(
            "max" in f or "relu" in f for f in folds
        )
        made = Numbers(n, m, d, "grid" if numbers == "normal" and discontinuous else numbers,
                       itself=itself, dtype=kind, seed=seed)  # fmt: skip
        if "fill" in rules and {"rows", "columns"} & {*rules}:
            raise Refused
        if ("target" in options and not made.m) or (dtype == "float16" and scale > 2):
            raise Refused  # a target among no columns, and gradients that float16 has no number for
        if numbers in ("broken", "tiny") and (discontinuous or "linear" in options):
            raise Refused  # whether NaN is above a bound, and a weight of 0 times NaN
        given: dict[str, Any] = {"x": made.x, "y": made.y, "scale": scale}
        if scale_of != "number":
            given["scale"] = _number(scale, kind) if scale_of == "tensor" else (2.0 ** made.ids(n, 2)).requires_grad_()
        if rules:
            given["pairs"] = made.pairs(*rules)
        own = made.pairs(*own_rules) if own_rules else None
        given["reduce"] = tuple(
            Fold(f.split()[0].removeprefix("-"), negate=f[0] == "-",
                 scale=(2.0 ** made.ids(n, 2)).requires_grad_() if " " in f else None, pairs=own if " " in f else None)
            for f in folds
        )  # fmt: skip
        draws = {
            "row_bias": lambda: made.leaf(n),
            "col_bias": lambda: made.leaf(made.m),
            "col_scale": lambda: (2.0 ** made.ids(made.m, 2)).requires_grad_(),
            "target": made.target,
            "linear": lambda: made.lists(5, weights=True),
        }
        given |= {name: draws[name]() for name in options}
        given = needing(laid_out(_widened(given, kind) | {"x": made.x, "y": made.y}, layout), needs)

        def results(reduced: Any) -> list[Tensor]:
            return [*flat(reduced), *(w for w in winners(reduced) if w.numel())]

        return Call(
            given,
            lambda g: results(similarity_reduce(**g, dim=dim, memory_budget=budget, backend=backend)),
            lambda g: results(dense_reduce(**g, dim=dim)),
            finite=numbers != "broken",
        )


class TopK(Subject):
    """similarity_topk and, block by block, `TopKState`: lists of quarters, in which many scores are equal."""

    name = "similarity_topk"
    weight = 3
    space = {
        **SIZES,
        "k": affordable(1, 2, 3, 5, 8, 16, 17, 40, 64, 130, 400),
        "itself": One((False, True)),
        "rules": Some(tuple(r for r in RULES if r != "fill"), 3),
        "metric": One(("dot", "sqeuclidean", "cosine")),
        "blocks": One((0, 1, 2, 5)),
        "coarse": One((None, "bfloat16", "int8")),
        "options": Some(("scale", "row_bias", "col_bias"), 3),
        "numbers": One(("grid", "equal", "normal")),
    }

    def build(self, *, seed, dtype, layout, needs, n, m, d, backend, k, itself, rules, metric, blocks, coarse,
              options, numbers) -> Call:  # fmt: skip
        kind = DTYPES[dtype]
        made = Numbers(n, m, d, "normal" if metric == "cosine" else "grid" if rules else numbers, itself=itself,
                       dtype=kind, seed=seed)  # fmt: skip
        if (metric != "dot" and {"below", "above"} & set(rules)) or (metric == "cosine" and "log_weight" in rules):
            raise Refused
        if (metric == "cosine" and kind.itemsize == 2) or (options and blocks):
            raise Refused  # unit rows are rounded, and states have no scale
        given: dict[str, Any] = {"x": made.x, "y": made.y}
        draws = {
            "scale": lambda: (2.0 ** made.ids(n, 2)).requires_grad_(),
            "row_bias": lambda: made.leaf(n),
            "col_bias": lambda: made.leaf(made.m),
        }
        given |= {name: draws[name]() for name in options}
        if rules:
            given["pairs"] = made.pairs(*rules)
        given = needing(laid_out(_widened(given, kind) | {"x": made.x, "y": made.y}, layout), needs)
        exact = metric != "cosine" and made.kind != "normal"
        call = {"k": k, "metric": metric, "backend": backend}

        listed: list[Tensor] = []

        def ours(g: dict[str, Any]) -> list[Tensor]:
            if blocks:
                found = _in_blocks(g, blocks, call)
            elif coarse:
                found = similarity_topk(**g, **call, coarse=getattr(torch, coarse))
            else:
                found = similarity_topk(**g, **call)
            listed.append(found.indices)
            return [found.values, *([found.indices, found.counts] if exact else [])]

        def dense(g: dict[str, Any]) -> list[Tensor]:
            values, indices, counts = _listed(g, k, metric, None if exact else listed[0])
            return [values.detach() if blocks else values, *([indices, counts] if exact else [])]

        return Call(given, ours, dense, finite=not blocks)


def _in_blocks(g: dict[str, Any], blocks: int, options: dict[str, Any]) -> Any:
    """The last block first, by two states that are merged."""
    corpus = g["x"] if g["y"] is None else g["y"]
    rest = {name: value for name, value in options.items() if name != "k"}
    states = [TopKState(g["x"].detach(), options["k"], pairs=g.get("pairs"), rows=len(corpus), **rest) for _ in "12"]
    cuts = [len(corpus) * b // blocks for b in range(blocks + 1)]
    for b in reversed(range(blocks)):
        states[b % 2].update(corpus[cuts[b] : cuts[b + 1]].detach(), cuts[b])
    return states[0].merge(states[1]).finalize()


def _listed(g: dict[str, Any], k: int, metric: str, found: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and counts; of scores that float32 cannot tell apart, the order that was found."""
    x, y, pairs = g["x"], g["x"] if g["y"] is None else g["y"], g.get("pairs")
    if metric == "cosine":
        x, y = normalize(x, dim=1), normalize(y, dim=1)
    scores = test_mining_state.similarities(x, y, metric)
    scores = scores * g["scale"][:, None] if "scale" in g else scores
    scores = scores + (g["row_bias"][:, None] if "row_bias" in g else 0.0) + g.get("col_bias", 0.0)
    keep = dense_keep(pairs, x, y)
    if pairs is not None and pairs.log_weight is not None:
        table, row, column = pairs.log_weight
        weight = table.to(scores.dtype)[row.clamp_min(0)][:, column.clamp_min(0)]
        scores = scores + weight.masked_fill((row < 0)[:, None] | (column < 0), 0.0)
    scores = torch.cat([scores.masked_fill(~keep, -torch.inf), scores.new_full((len(x), k), -torch.inf)], 1)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k]
    if found is not None and found.numel() and found.shape == indices.shape and bool((found >= 0).all()):
        other = scores.gather(1, found)
        if torch.allclose(other, values, rtol=1e-6, atol=1e-6 * float(values.detach().abs().max())):
            values = other
    indices = indices.masked_fill(values == -torch.inf, -1)
    return values, indices, (indices >= 0).sum(1)


class Prefix(Subject):
    """similarity_prefix: a loop over prefixes."""

    name = "similarity_prefix"
    weight = 2
    space = {
        **SIZES,
        "itself": One((False, True)),
        "dims": One(((1,), (1, 2), (3,), (2, 5, 8), (8, 16, 32, 64), (64,), (1, 33, 130))),
        "dim": One((1, 0, (0, 1))),
        "rules": Some(("diagonal", "differ"), 2),
        "target": One((False, True)),
        "normalize": One((False, True)),
        "scale": SCALE,
        "numbers": One(("normal", "grid", "equal")),
    }

    def build(self, *, seed, dtype, layout, needs, n, m, d, backend, itself, dims, dim, rules, target, normalize, scale,
              numbers) -> Call:  # fmt: skip
        kind = DTYPES[dtype]
        if dims[-1] > d or (itself and dim != 1):
            raise Refused
        made = Numbers(n, m, d, numbers, itself=itself, dtype=kind, seed=seed)
        if (target and not made.m) or (normalize and (numbers != "normal" or dims[0] == 1)):
            raise Refused  # rows of zeros have no direction, and those of one number no gradient
        given: dict[str, Any] = {"x": made.x, "y": made.y, "scale": _number(scale, kind)}
        given |= {"target": made.target()} if target else {}
        given |= {"pairs": made.pairs(*rules)} if rules else {}
        given = needing(laid_out(given, layout), needs)
        wanted = {1: (0, 2), 0: (1, 2), (0, 1): (0, 1, 2)}[dim]

        def ours(g: dict[str, Any]) -> list[Tensor]:
            folds = similarity_prefix(**g, dims=dims, dim=dim, normalize=normalize, backend=backend)
            return [t for t in (folds.rows, folds.cols, folds.target) if t is not None]

        def dense(g: dict[str, Any]) -> list[Tensor]:
            y = g["x"] if g["y"] is None else g["y"]
            out = ~dense_keep(g.get("pairs"), g["x"], y)
            if "target" in g and len(g["x"]):
                out = out | (torch.arange(len(y)) == g["target"][:, None])
            own = g.get("target") if len(y) else None
            rows, cols, target_logits = test_similarity_prefix.dense(
                g["x"], y, dims, g["scale"], normalize, own, out
            ) if len(y) or not len(g["x"]) else _no_columns(g["x"], dims)  # fmt: skip
            found = (rows, cols, target_logits)
            return [found[part] for part in wanted if found[part] is not None]

        return Call(given, ours, dense)


def _no_columns(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, None]:
    return x.new_full((len(dims), len(x)), -torch.inf), x.new_zeros(len(dims), 0), None


class Distill(Subject):
    """similarity_distill: every divergence, with rules."""

    name = "similarity_distill"
    weight = 2
    space = {
        **SIZES,
        "itself": One((False, True)),
        "teacher_d": One((1, 3, 8, 33)),
        "divergence": One(("kl", "ce", "reverse_kl", "js")),
        "dim": One((1, 0, (0, 1))),
        "rules": Some(("diagonal", "differ", "same", "exclude", "below", "above", "guide"), 2),
        "scale": One((1.0, 0.5, 4.0)),
        "teacher_scale": One((1.0, 3.0)),
        "teacher_bias": One((False, True)),
        "budget": BUDGET,
    }

    def build(self, *, seed, dtype, layout, needs, n, m, d, backend, itself, teacher_d, divergence, dim, rules, scale,
              teacher_scale, teacher_bias, budget) -> Call:  # fmt: skip
        kind = DTYPES[dtype]
        made = Numbers(n, m, d, "grid", itself=itself, dtype=kind, seed=seed)
        if not n or not made.m:
            raise Refused
        shrink = 1 / max(d, 1) ** 0.5  # logits of a few units, where no probability is lost in rounding
        given: dict[str, Any] = {"x": made.x, "y": made.y, "scale": _number(scale * shrink, kind)}
        given["teacher_x"] = made.random(n, teacher_d).to(kind)
        given["teacher_y"] = None if itself else made.random(made.m, teacher_d).to(kind)
        if teacher_bias:
            wide = torch.float64 if kind == torch.float64 else torch.float32
            given["teacher_bias"] = made.random(made.m).to(wide)
        given |= {"pairs": _widened({"pairs": made.pairs(*rules)}, kind)["pairs"]} if rules else {}
        given = needing(laid_out(given, layout), needs)
        options = {"divergence": divergence, "dim": dim, "teacher_scale": teacher_scale / teacher_d**0.5}
        dims = (1, 0) if dim == (0, 1) else (dim,)

        def ours(g: dict[str, Any]) -> list[Tensor]:
            found = similarity_distill(**g, **options, memory_budget=budget, backend=backend)
            return [found.rows, found.cols] if dim == (0, 1) else [found]

        def dense(g: dict[str, Any]) -> list[Tensor]:
            y = g["x"] if g["y"] is None else g["y"]
            teacher_y = g["teacher_x"] if g["teacher_y"] is None else g["teacher_y"]
            keep = dense_keep(g.get("pairs"), g["x"], y)
            sides = g["x"], y, g["teacher_x"], teacher_y
            found = []
            for direction in dims:
                some = keep.any(direction, keepdim=True)
                s, t = test_similarity_distill.logits_of(
                    *sides, keep | ~some, g["scale"], options["teacher_scale"], g.get("teacher_bias", 0.0)
                )
                value = test_similarity_distill.divergence_of(s, t, divergence, direction)
                found.append(torch.where(some.squeeze(direction), value, 0.0))
            return found

        return Call(given, ours, dense, size=1.0)  # of probabilities


class Values(Subject):
    """similarity_values: a softmax over the columns."""

    name = "similarity_values"
    weight = 2
    space = {
        **SIZES,
        "itself": One((False, True)),
        "width": affordable(1, 2, 3, 8, 17, 64, 130),
        "rules": Some(("diagonal", "differ", "same", "exclude", "below", "above", "guide"), 2),
        "scale": One((1.0, 0.5, 4.0)),
        "col_bias": One((False, True)),
        "budget": BUDGET,
        "numbers": One(("grid", "normal")),
    }

    def build(self, *, seed, dtype, layout, needs, n, m, d, backend, itself, width, rules, scale, col_bias, budget,
              numbers) -> Call:  # fmt: skip
        kind = DTYPES[dtype]
        if (rules and numbers != "grid") or not n:
            raise Refused
        made = Numbers(n, m, d, numbers, itself=itself, dtype=kind, seed=seed)
        given: dict[str, Any] = {"x": made.x, "y": made.y, "values": made.leaf(made.m, width, dtype=kind)}
        wide = torch.float64 if kind == torch.float64 else torch.float32
        given["scale"] = _number(scale / max(d, 1) ** 0.5, kind)
        given |= {"col_bias": made.leaf(made.m, dtype=wide)} if col_bias else {}
        given |= {"pairs": _widened({"pairs": made.pairs(*rules)}, kind)["pairs"]} if rules else {}
        given = needing(laid_out(given, layout), needs)

        def dense(g: dict[str, Any]) -> list[Tensor]:
            y = g["x"] if g["y"] is None else g["y"]
            keep = dense_keep(g.get("pairs"), g["x"], y)
            args = g["x"], y, g["values"], keep, g["scale"], g.get("col_bias", 0.0)
            return [test_similarity_values.sums_of(*args)]

        call = {"memory_budget": budget, "backend": backend}
        return Call(given, lambda g: [similarity_values(**g, **call)], dense, rounds=kind == torch.bfloat16)
