"""Who routes tokens to experts and multiplies them there: this package, plain torch, and other packages.

A step is one forward and backward from fresh leaves. The noise of a router is drawn before, for all alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import differentiate, insist_on
from benchmarks.registry import OURS, Inputs, Provider, Step

TORCH = "torch ops"
COPY = "read twice, write once"
GROUPED = "torch grouped_mm"
DENSE = "one dense matmul"
TRANSFORMERS = "transformers grouped_mm experts"
DENSE_LAYER = "one dense layer"
ST_MOE = "st-moe-pytorch"

LOSSES = ("importance", "load", "switch", "z", "local_entropy", "global_entropy")


# ---------------------------------------------------------------------------------------------
# A router with all its losses


def router_total(losses: Tensor, gates: Tensor, weight: Tensor) -> Tensor:
    """What is differentiated: all losses, and the gates as an upstream gradient meets them."""
    return losses + (gates * weight).sum()


def ours_route(name: str = OURS, *, backend: str | None = None) -> Provider:
    """``contrastive_ops.route`` with places for all choices."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops import route
        from contrastive_ops.ops import Gating, RouterLoss

        segments, weight = inputs.frozen["segments"], inputs.frozen["weight"]
        options, chosen = inputs.constants, insist_on(backend, "expert_routing", inputs.tensors["logits"])
        thresholds = {"global_entropy": options["threshold"]}
        names = LOSSES if options["noise_std"] else [name for name in LOSSES if name != "load"]
        losses = [RouterLoss(name, threshold=thresholds.get(name)) for name in names]
        gating = Gating(noise_std=options["noise_std"])

        def total(logits: Tensor) -> Tensor:
            routing = route(
                logits,
                weight.shape[1],
                capacity=options["capacity"],
                segments=segments,
                num_segments=int(options["segments"]),
                gating=gating,
                losses=losses,
                noise=inputs.frozen.get("noise"),
                **chosen,
            )
            return router_total(routing.loss, routing.gates, weight)

        return differentiate(total, inputs.tensors)

    return Provider(name, build, kind="ours", package="contrastive_ops")


def torch_route() -> Provider:
    """The same in torch's operations, in float32: losses, metrics, and places by cumulative sums as in V-MoE."""

    def build(inputs: Inputs) -> Step:
        segments, weight = inputs.frozen["segments"], inputs.frozen["weight"]

        def total(logits: Tensor) -> Tensor:
            noise, logits = inputs.frozen.get("noise"), logits.float()
            losses, gates, experts = dense_router(logits, noise, segments, weight.shape[1], **inputs.constants)
            slots, *_ = places(gates, experts, logits.shape[1], inputs.constants["capacity"])
            router_metrics(logits, experts, slots >= 0, segments, inputs.constants["segments"])
            return router_total(losses, gates, weight)

        return differentiate(total, inputs.tensors)

    return Provider(TORCH, build, kind="torch")


def dense_router(
    logits: Tensor,
    noise: Tensor | None,
    labels: Tensor,
    k: int,
    *,
    noise_std: float,
    threshold: float,
    segments: float,
    capacity: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of all losses over the segments, gates and experts; in the precision of the logits."""
    experts, sigma = logits.shape[1], noise_std / logits.shape[1]
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    noisy = logits if noise is None else logits + sigma * noise.to(logits.dtype)
    noisy_p = p if noise is None else noisy.softmax(1)
    gates, chosen = noisy_p.topk(k)
    chance = None
    if noise is not None:
        chance = torch.special.ndtr((logits - noisy.gather(1, chosen[:, -1:])) / sigma)
    entropy, lse_squared = -(p * log_p).sum(1), logits.logsumexp(1).square()
    total = logits.new_zeros(())
    for s in range(int(segments)):
        rows = (labels == s).nonzero().squeeze(1)
        mean = p[rows].mean(0)
        share = torch.bincount(chosen[rows].flatten(), minlength=experts).to(p.dtype) / (k * len(rows))
        spread = -torch.special.entr(mean).sum()
        total = total + _squared_variation(mean) + lse_squared[rows].mean() + entropy[rows].mean()
        total = total + experts * (share * noisy_p[rows].mean(0)).sum() + (threshold + spread).clamp_min(0)
        if chance is not None:
            total = total + _squared_variation(chance[rows].mean(0))
    return total, gates, chosen


def router_metrics(logits: Tensor, experts: Tensor, kept: Tensor, labels: Tensor, segments: float) -> list[Tensor]:
    """What a run of LIMoE logs for each modality: success rate, load, entropy, margin."""
    p = logits.detach().softmax(1)
    best, found = p.topk(2).values, []
    entropy, margin = torch.special.entr(p).sum(1), best[:, 0] - best[:, 1]
    for s in range(int(segments)):
        rows = (labels == s).nonzero().squeeze(1)
        load = torch.bincount(experts[rows].flatten(), minlength=logits.shape[1])
        found += [kept[rows].float().mean(), load / load.sum(), entropy[rows].mean(), margin[rows].mean()]
    return found


def _squared_variation(v: Tensor) -> Tensor:
    return v.var(correction=0) / v.mean().square()


def places(gates: Tensor, experts: Tensor, count: int, capacity: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch Priority Routing: the place of each choice, the choice of each row, and where each expert's rows begin."""
    tokens, k = experts.shape
    order = gates.detach()[:, 0].argsort(descending=True, stable=True)
    ordered = experts[order].T.reshape(-1)
    hot = F.one_hot(ordered, count)
    position = ((hot.cumsum(0) - 1) * hot).sum(1)
    kept = position < math.ceil(capacity * k * tokens / count)
    choice = (order * k + torch.arange(k, device=order.device)[:, None]).reshape(-1)
    flat = torch.zeros_like(kept).scatter(0, choice, kept).nonzero()[:, 0]
    rows = flat[experts.flatten()[flat].argsort(stable=True)]
    slots = torch.full_like(choice, -1).scatter(0, rows, torch.arange(len(rows), device=rows.device))
    offsets = torch.bincount(experts.flatten()[flat], minlength=count).cumsum(0)
    return slots.view(tokens, k), rows, offsets


def copy_logits() -> Provider:
    """What nobody can avoid: reading the logits twice and writing their gradient."""

    def build(inputs: Inputs) -> Step:
        logits = inputs.tensors["logits"]
        gradient = torch.empty_like(logits)

        def step() -> None:
            logits.sum()
            gradient.copy_(logits)

        return step

    return Provider(COPY, build, kind="read")


# ---------------------------------------------------------------------------------------------
# Rows of experts times their matrices


def _product(inputs: Inputs, function: Callable[[Tensor, Tensor], Tensor]) -> Step:
    upstream = inputs.frozen["upstream"]
    return differentiate(lambda rows, weight: (function(rows, weight) * upstream).sum(), inputs.tensors)


def ours_grouped() -> Provider:
    """``contrastive_ops.ops.grouped_matmul``."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops.ops import grouped_matmul

        offsets = inputs.frozen["offsets"]
        return _product(inputs, lambda rows, weight: grouped_matmul(rows, weight, offsets))

    return Provider(OURS, build, kind="ours", package="contrastive_ops")


def torch_grouped() -> Provider:
    """``F.grouped_mm``, which takes the ends of the groups as int32."""

    def build(inputs: Inputs) -> Step:
        if not hasattr(F, "grouped_mm"):
            raise ImportError("torch.nn.functional.grouped_mm is new in torch 2.10")
        ends = inputs.frozen["offsets"][1:].int()
        return _product(inputs, lambda rows, weight: F.grouped_mm(rows, weight, offs=ends))

    return Provider(GROUPED, build, kind="torch")


def dense_product() -> Provider:
    """All rows times one matrix of the same size: as many operations without groups. Not checked."""

    def build(inputs: Inputs) -> Step:
        rows, weight, g = inputs.tensors["rows"], inputs.tensors["weight"][0], inputs.frozen["upstream"]
        out, da, db = torch.empty_like(g), torch.empty_like(rows), torch.empty_like(weight)

        def step() -> None:
            torch.mm(rows, weight, out=out)
            torch.mm(g, weight.T, out=da)
            torch.mm(rows.T, g, out=db)

        return step

    return Provider(DENSE, build, kind="matmul")


# ---------------------------------------------------------------------------------------------
# A layer


def ours_layer() -> Provider:
    """``contrastive_ops.moe``'s parts on the weights of the case: gated experts, dropless."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops import route
        from contrastive_ops.ops import combine, grouped_matmul

        upstream = inputs.frozen["upstream"]

        def total(tokens: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
            routing = route(F.linear(tokens, router))
            hidden = grouped_matmul(tokens, up.transpose(1, 2), routing)
            gate, hidden = hidden.chunk(2, 1)
            rows = grouped_matmul(F.silu(gate) * hidden, down.transpose(1, 2), routing.offsets)
            return (combine(rows, routing) * upstream).sum()

        return differentiate(total, inputs.tensors)

    return Provider(OURS, build, kind="ours", package="contrastive_ops")


def transformers_layer() -> Provider:
    """``MixtralExperts`` of transformers with its grouped matmul, behind a router whose gates are not renormalised."""

    def build(inputs: Inputs) -> Step:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        upstream, (experts, hidden, dim) = inputs.frozen["upstream"], inputs.tensors["up"].shape
        config = MixtralConfig(hidden_size=dim, intermediate_size=hidden // 2, num_local_experts=experts)
        config._experts_implementation = "grouped_mm"
        layer = MixtralExperts(config)
        if layer.config._experts_implementation != "grouped_mm":
            raise ImportError("transformers without grouped_mm experts")

        def total(tokens: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
            gates, chosen = F.linear(tokens, router).softmax(1).topk(1)
            weights = {"gate_up_proj": up, "down_proj": down}
            out = torch.func.functional_call(layer, weights, (tokens, chosen, gates))
            return (out * upstream).sum()

        return differentiate(total, inputs.tensors)

    return Provider(TRANSFORMERS, build, package="transformers")


def dense_layer() -> Provider:
    """The matrix products of a dense layer of equal size, forward and backward. Not checked."""

    def build(inputs: Inputs) -> Step:
        x, up, down = inputs.tensors["tokens"], inputs.tensors["up"][0], inputs.tensors["down"][0]
        both, hidden, out = x.new_empty(len(x), len(up)), x.new_empty(len(x), down.shape[1]), torch.empty_like(x)
        d_up, d_down = torch.empty_like(up), torch.empty_like(down)

        def step() -> None:
            torch.mm(x, up.T, out=both)
            torch.mm(hidden, down.T, out=out)
            torch.mm(x, down, out=hidden)
            torch.mm(x.T, hidden, out=d_down)
            torch.mm(both, up, out=out)
            torch.mm(both.T, x, out=d_up)

        return step

    return Provider(DENSE_LAYER, build, kind="matmul")


def st_moe_layer() -> Provider:
    """``MoE`` of st-moe-pytorch on as many tokens in sequences of 512, by rules of its own, so not checked.

    It has no k = 1: two choices of which, by this threshold, the second is hardly ever used. Its experts are gated and
    of the same hidden size.
    """

    def build(inputs: Inputs) -> Step:
        from st_moe_pytorch import MoE

        tokens, (experts, hidden, dim) = inputs.tensors["tokens"], inputs.tensors["up"].shape
        layer = MoE(dim, num_experts=experts, threshold_train=1e9, expert_hidden_mult=1.5 * (hidden // 2) / dim)
        sequences = tokens.view(-1, min(512, len(tokens)), dim)
        upstream = inputs.frozen["upstream"].view_as(sequences)

        def step() -> None:
            leaf = sequences.detach().requires_grad_()
            out = layer(leaf)
            torch.autograd.grad((out.outputs * upstream).sum(), [leaf, *layer.parameters()], allow_unused=True)

        return step

    return Provider(ST_MOE, build, package="st-moe-pytorch")
