"""Late interaction, grouped products, routing and layers of experts."""

from __future__ import annotations

from typing import Any

import test_expert_routing
import test_grouped_matmul
import test_xtr
import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive_ops import moe, route
from contrastive_ops.ops import (
    Capacity,
    Gating,
    TokenSets,
    combine,
    dispatch,
    grouped_matmul,
    maxsim,
    maxsim_pairs,
    xtr,
)

from .cases import One, Refused, Subject
from .judge import Call, size_of
from .layouts import BACKENDS, DEPTHS, DTYPES, Numbers, affordable, laid_out, needing

FEW = One((1, 2, 3, 0, 5, 7, 9))
LENGTHS = affordable(1, 2, 3, 5, 8, 17, 33, 70)


class Sets(Numbers):
    """Queries and documents with masks, some of them of no token."""

    def __init__(self, n: int, m: int, lengths: tuple[int, int], d: int, kind: str, dtype: torch.dtype, seed: int):
        super().__init__(0, 0, d, kind, seed=seed)
        self.padded = [self.leaf(b, length, d, dtype=dtype) for b, length in zip((n, m), lengths, strict=True)]
        self.masks = [torch.rand(t.shape[:2], generator=self.generator) < 0.8 for t in self.padded]
        for mask in self.masks:
            mask[2:3] = False


def _scores(g: dict[str, Any], k: int, reduce: str) -> Tensor:
    """As the docstring of `maxsim` says; of equal products the first."""
    rows = []
    for query, query_mask in zip(g["queries"], g["query_mask"], strict=True):
        row = [query.new_zeros(0)]
        for document, mask in zip(g["documents"], g["document_mask"], strict=True):
            best = (query[query_mask] @ document[mask].T).sort(dim=1, descending=True, stable=True).values[:, :k].sum(1)
            score = best.sum() if reduce == "sum" or not len(best) else best.mean()
            row.append((score if mask.any() or not query_mask.any() else torch.full_like(score, -torch.inf))[None])
        rows.append(torch.cat(row))
    return torch.stack(rows) if rows else g["queries"].new_zeros(0, len(g["documents"]))


def _sets(g: dict[str, Any], packed: bool) -> list[TokenSets]:
    sides = [(g["queries"], g["query_mask"]), (g["documents"], g["document_mask"])]
    return [test_xtr.packed(t, mask) if packed and len(t) else TokenSets(t, mask) for t, mask in sides]


class MaxSim(Subject):
    """maxsim, maxsim_pairs and xtr in both layouts of token sets."""

    name = "maxsim"
    weight = 3
    space = {
        "n": FEW,
        "m": FEW,
        "query_length": LENGTHS,
        "document_length": LENGTHS,
        "d": DEPTHS,
        "k": affordable(1, 2, 3, 10, 100),
        "call": One(("maxsim", "pairs", "xtr", "xtr impute")),
        "reduce": One(("sum", "mean")),
        "packed": One((False, True)),
        "numbers": One(("grid", "normal", "equal")),
        "backend": BACKENDS,
    }

    def build(self, *, seed, dtype, layout, needs, n, m, query_length, document_length, d, k, call, reduce, packed,
              numbers, backend) -> Call:  # fmt: skip
        made = Sets(n, m, (query_length, document_length), d, numbers, DTYPES[dtype], seed)
        given = {"queries": made.padded[0], "documents": made.padded[1]}
        given |= {"query_mask": made.masks[0], "document_mask": made.masks[1]}
        given = needing(laid_out(given, layout), needs)
        options = {"k": k, "reduce": reduce, "backend": backend}
        if call != "maxsim" and not (n and m):
            raise Refused
        if call == "pairs":
            size = 2 * n + 1
            pairs = tuple(torch.randint(b, (size,), generator=made.generator) for b in (n, m))
            return Call(
                given,
                lambda g: [maxsim_pairs(*_sets(g, packed), pairs, **options)],
                lambda g: [_scores(g, k, reduce)[pairs]],
            )
        if call == "maxsim":
            return Call(given, lambda g: [maxsim(*_sets(g, packed), **options)], lambda g: [_scores(g, k, reduce)])
        missing = "impute" if "impute" in call else "skip"
        names = ("queries", "documents", "query_mask", "document_mask")
        return Call(
            given,
            lambda g: [xtr(*_sets(g, packed), missing=missing, **options)],
            lambda g: [test_xtr.formula(*(g[name] for name in names), k, missing, reduce)],
        )


class Grouped(Subject):
    """grouped_matmul: a loop over groups, rows of no group, weights in both layouts."""

    name = "grouped_matmul"
    weight = 2
    space = {
        "sizes": One(((1,), (0,), (3, 0, 5), (0, 0, 33, 1, 0), (129, 7), (1, 1, 1, 1), (64, 64), (65, 63, 17), (300,))),
        "d": DEPTHS,
        "f": affordable(1, 2, 3, 8, 15, 16, 17, 33, 64, 130),
        "around": One((0, 3)),
        "bias": One((False, True)),
        "transposed": One((False, True)),
        "numbers": One(("grid", "normal")),
        "backend": BACKENDS,
    }

    def build(self, *, seed, dtype, layout, needs, sizes, d, f, around, bias, transposed, numbers, backend) -> Call:
        made, kind = Numbers(0, 0, 1, numbers, seed=seed), DTYPES[dtype]
        offsets = torch.tensor([around, *sizes]).cumsum(0)
        b = made.leaf(len(sizes), f, d, dtype=kind) if transposed else made.leaf(len(sizes), d, f, dtype=kind)
        given: dict[str, Any] = {"a": made.leaf(int(offsets[-1]) + around, d, dtype=kind), "b": b, "offsets": offsets}
        given |= {"bias": made.leaf(len(sizes), f, dtype=kind)} if bias else {}
        with torch.no_grad():
            given["a"][:around] = torch.nan
        given = needing(laid_out(given, layout), needs)

        def matrices(g: dict[str, Any]) -> dict[str, Any]:
            return {**g, "b": g["b"].transpose(1, 2)} if transposed else g

        return Call(
            given,
            lambda g: [grouped_matmul(**matrices(g), backend=backend)],
            lambda g: [test_grouped_matmul.loop(**matrices(g))],
        )


class Route(Subject):
    """route, dispatch and combine: choices by a stable sort, places by loops, losses by the reference in float64."""

    name = "route"
    weight = 3
    space = {
        "tokens": affordable(1, 2, 3, 0, 12, 20, 33, 64, 130),
        "experts": One((1, 2, 3, 5, 8, 16, 17, 33)),
        "k": affordable(1, 2, 3, 8),
        "d": DEPTHS,
        "limit": One((None, 0, 1, 3, 1000)),
        "factor": One((None, 0.5, 1.0, 1.3)),
        "padded": One((False, True)),
        "priority": One(("position", "gate")),
        "score": One(("softmax", "sigmoid")),
        "renormalize": One((False, True)),
        "segments": One((1, 3)),
        "valid": One((False, True)),
        "losses": One(((), ("importance", "switch"), ("z", "local_entropy", "global_entropy"))),
        "backend": BACKENDS,
    }

    def build(self, *, seed, dtype, layout, needs, tokens, experts, k, d, limit, factor, padded, priority, score,
              renormalize, segments, valid, losses, backend) -> Call:  # fmt: skip
        if k > experts or (limit is not None and factor is not None) or (padded and limit is None and factor is None):
            raise Refused
        kind, made = DTYPES[dtype], Numbers(0, 0, 1, "grid", seed=seed)
        torch.manual_seed(seed)
        given: dict[str, Any] = {"logits": test_expert_routing.tied(tokens, experts, kind).requires_grad_()}
        given["rows"] = made.leaf(tokens, d, dtype=kind)
        marks: dict[str, Any] = {"valid": torch.rand(tokens) < 0.8} if valid else {}
        if segments > 1:
            marks |= {"segments": torch.randint(segments, (tokens,)), "num_segments": segments}
        given = needing(laid_out({**given, **marks}, layout), needs)
        capacity = Capacity(factor=factor, limit=limit, padded=padded)
        options = {"capacity": capacity, "priority": priority, "gating": Gating(score, renormalize), "losses": losses}

        def ours(g: dict[str, Any]) -> list[Tensor]:
            rest = {name: value for name, value in g.items() if name != "rows"}
            routing = route(k=k, **rest, **options, backend=backend)
            test_expert_routing.check_layout(routing, experts)
            taken, size = capacity.slots("fuzz", tokens, experts, k) if tokens else (0, 1)
            if taken is not None and taken >= 0 and tokens:
                first = routing.gates[:, 0].tolist() if not renormalize else None
                if first is not None or priority == "position":
                    place = test_expert_routing.positions(routing.experts, first, taken, priority, size)
                    assert torch.equal(routing.kept, place >= 0), "places"
            out = combine(dispatch(g["rows"], routing, backend=backend), routing, backend=backend)
            kept.append(routing.kept)
            return [routing.experts, routing.gates, routing.loss, out]

        kept: list[Tensor] = []

        def dense(g: dict[str, Any]) -> list[Tensor]:
            p = g["logits"].softmax(1) if score == "softmax" else g["logits"].sigmoid()
            chosen = p.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
            gates = p.gather(1, chosen)
            if renormalize:
                gates = gates / gates.sum(1, keepdim=True)
            if "valid" in g:
                out_of = ~g["valid"][:, None]
                chosen, gates = chosen.masked_fill(out_of, -1), gates.masked_fill(out_of, 0.0)
            rest = {name: value for name, value in g.items() if name != "rows"}
            loss = route(k=k, **rest, **options, backend="reference").loss
            mixed = (gates * kept[0]).sum(1, keepdim=True) * g["rows"]
            return [chosen, gates, loss, mixed]

        # The unit of a logit is 1, however large all of them are: one more makes a probability e times as large.
        units = {id(given["logits"]): max(tokens, 1) ** 0.5}
        return Call(given, ours, dense, length=lambda t: units.get(id(t)) or size_of([t]))


class Layers(Subject):
    """SparseMoE and SoftMoE: every token through its experts."""

    name = "layers"
    space = {
        "tokens": One((1, 2, 3, 7, 20, 33)),
        "d": One((1, 2, 6, 8, 17)),
        "hidden": One((1, 3, 8, 17, 33)),
        "experts": One((1, 2, 4, 7)),
        "k": One((1, 2)),
        "gated": One((False, True)),
        "soft": One((False, True)),
        "backend": BACKENDS,
    }

    def build(self, *, seed, dtype, layout, needs, tokens, d, hidden, experts, k, gated, soft, backend) -> Call:
        kind = DTYPES[dtype]
        if k > experts or kind.itemsize == 2:
            raise Refused  # 16 bits decide between experts by other digits
        torch.manual_seed(seed)
        options = {"gated": gated, "dtype": kind}
        layer = (
            moe.SoftMoE(d, hidden, experts, 2, **options) if soft else moe.SparseMoE(d, hidden, experts, k, **options)
        )
        given = {"tokens": torch.randn(2, tokens, d, dtype=kind).requires_grad_()}
        given |= {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
        given = needing(laid_out(given, layout), needs)
        activation = F.silu if gated else F.gelu

        def ours(g: dict[str, Any]) -> list[Tensor]:
            weights = {name: value for name, value in g.items() if name != "tokens"}
            out = torch.func.functional_call(layer, weights, (g["tokens"],), {"backend": backend})
            return [out if soft else out[0]]

        def expert(g: dict[str, Any], e: int, rows: Tensor) -> Tensor:
            names = ("experts.up_proj", "experts.up", "experts.gate_up_proj")
            up = next(g[name] for name in names if name in g)[e]
            inner = rows @ up.T
            if gated:
                gate, inner = inner.chunk(2, -1)
                return (activation(gate) * inner) @ g["experts.down_proj"][e].T
            return activation(inner) @ g["experts.down_proj"][e].T

        def dense(g: dict[str, Any]) -> list[Tensor]:
            x = g["tokens"]
            if soft:
                keys = g["scale"] * F.normalize(g["slots"].flatten(1), dim=0)
                logits = F.normalize(x, dim=-1) @ keys
                mixed = (logits.softmax(1).transpose(1, 2) @ x).unflatten(1, (experts, 2))
                seen = torch.stack([expert(g, e, mixed[:, e]) for e in range(experts)], 1).flatten(1, 2)
                return [logits.softmax(2) @ seen]
            gates, chosen = (x @ g["gate.weight"].T).softmax(-1).topk(k, dim=-1)
            every = torch.stack([expert(g, e, x) for e in range(experts)], 2)
            picked = every.gather(2, chosen[..., None].expand(*chosen.shape, d))
            return [(gates[..., None] * picked).sum(2)]

        return Call(given, ours, dense)


TOKENS = (MaxSim(), Grouped(), Route(), Layers())
