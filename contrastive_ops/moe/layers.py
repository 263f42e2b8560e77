"""Layers that route tokens to experts and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.masks import left_out
from ..ops import Capacity, Routing, combine
from ..ops.expert_choice import expert_choice
from .experts import Experts
from .router import Router


class _Layer(nn.Module):
    """What layers with a router and experts share: `gate`, `experts`, `shared_experts`, any leading dimensions."""

    def __init__(
        self,
        gate: Router,
        hidden: int,
        *,
        gated: bool = False,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        bias: bool = False,
        shared: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **spread: Any,
    ) -> None:
        super().__init__()
        experts, dim = gate.weight.shape
        shared = checks.integer(type(self).__name__, "shared", shared, 0)
        options: dict[str, Any] = {"gated": gated, "activation": activation, "bias": bias, "device": device}
        self.gate = gate
        self.experts = Experts(dim, hidden, experts, dtype=dtype, **options, **spread)
        self.shared_experts = Experts(dim, hidden * shared, 1, dtype=dtype, **options) if shared else None

    def reset_parameters(self) -> None:
        """Nothing: all parameters belong to the parts, which put back their own."""

    def route(self, tokens: Tensor, labels: dict[str, Any]) -> Routing:
        """Route tokens (T, D)."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        num_segments: int | None = None,
        valid: Tensor | None = None,
        allowed: Tensor | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Routing]:
        """Return (output, routing).

        Args:
            tokens: (..., D), such as (B, L, D).
            segments: int64 label of each token, shaped as the tokens' leading dimensions or the first of them: (B,)
                labels sequences.
            num_segments: as in `route`.
            valid: bool, shaped as `segments`; the output of padding is 0, and what padding holds reaches nothing.
            allowed: bool (..., E), the experts that a token may choose; or int64 (..., k), those it is given, without
                the last dimension for k = 1, such as the domain of each sequence (B,).
            generator: as in `route`.
            backend: as in `route`.
        """
        labels = {"segments": segments, "num_segments": num_segments, "valid": valid, "allowed": allowed}
        flat, valid, routing = self._routed(tokens, {**labels, "generator": generator, "backend": backend})
        shape = tokens.shape[:-1]
        rows = self.experts(flat, routing, backend)
        out = combine(rows, routing, backend=backend)
        if self.shared_experts is not None:
            everything = torch.arange(2, device=flat.device) * flat.shape[0]
            shared = self.shared_experts(flat, everything, backend)
            out = out + (shared if valid is None else shared.masked_fill(~valid[:, None], 0.0))
        return out.view(*shape, out.shape[1]), routing

    def _routed(self, tokens: Tensor, labels: dict[str, Any]) -> tuple[Tensor, Tensor | None, Routing]:
        """Tokens (T, D), which of them count, and where they go."""
        flat, labels = self._flat(tokens, labels)
        return flat, labels["valid"], self.route(flat, labels)

    def _flat(self, tokens: Tensor, labels: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Tokens (T, D) and a label of each."""
        name = type(self).__name__
        checks.check_floating(name, "tokens", tokens)
        shape = tokens.shape[:-1]
        # Not -1, which is ambiguous where there are no tokens.
        flat = tokens.reshape(math.prod(shape), tokens.shape[-1])
        valid, allowed = _token_label(name, "valid", labels["valid"], shape), labels["allowed"]
        flat = flat if valid is None else left_out(flat, valid)
        if allowed is not None:
            last = allowed.shape[-1:] if allowed.dtype == torch.bool or self.gate.k > 1 else ()
            allowed = _token_label(name, "allowed", allowed, shape, last)
        segments = _token_label(name, "segments", labels["segments"], shape)
        return flat, {**labels, "segments": segments, "valid": valid, "allowed": allowed}


def _token_label(
    function: str, name: str, label: Tensor | None, shape: torch.Size, last: Sequence[int] = ()
) -> Tensor | None:
    """A label of tokens or of whole sequences as one of each token: (T, *last)."""
    if label is None:
        return None
    own = label.shape[: label.dim() - len(last)]
    if own != shape[: len(own)]:
        wanted = " or ".join(checks.shape(torch.empty(*shape[:n], *last, device="meta")) for n in (len(shape), 1))
        raise ValueError(f"{function}: {name} must have shape {wanted}, got {checks.shape(label)}")
    spread = label.view(*own, *(1,) * (len(shape) - len(own)), *last).expand(*shape, *last)
    return spread.reshape(math.prod(shape), *last)


class SparseMoE(_Layer):
    """A feed-forward layer of which every token uses k experts: ``out, routing = layer(tokens)``.

    Args:
        dim: D of the tokens.
        hidden: F of each expert.
        experts: E.
        k: choices of each token.
        gated: as in `Experts`.
        activation: as in `Experts`.
        bias: as in `Experts`.
        shared: every token also passes through a network as large as this many experts.
        router: keyword arguments of `Router`: capacity, priority, gating, losses, balance, ...
        group: spread the experts over its ranks, each of which gives tokens of its own: a ProcessGroup or a DeviceMesh
            of one dimension. Output, losses, metrics and gradients are those of one process with the tokens of all
            ranks. None: no other process is asked.
        capacity_over: with `group`: experts take tokens of the whole "group", of which those with the highest gates go
            first wherever they are, as in V-MoE; or of each "rank", whose capacity is that of its tokens alone.
        average: as in `Experts`; `check` too.
        check: compare what all ranks call before anything travels.

    Note:
        With `group`, ``routing`` has the choices of this rank's tokens, and losses and metrics of the tokens of all
        ranks, from sums of all. ``num_segments`` must be given with segments. The gate is on all ranks and must have
        the same weights; DDP or FSDP average its gradients. They must leave the experts alone, whose parameters are
        DTensors: docs/distributed.md. Each rank must draw other noise: seed them differently, or give a generator.

        Gates are the router's probabilities, not renormalised: with k = 1 that alone gives the router a gradient. Ask
        for ``router={"gating": Gating(renormalize=True)}`` where a checkpoint expects it, as Mixtral's do, whose
        ``block_sparse_moe`` state loads as it is. Memory: rows of the chosen experts only, (T k, F); tokens are read
        where they are, and no copy of them is made.

        Causal models: with a capacity, ``priority="gate"``, the default, lets a later token take the place of an
        earlier one, so that outputs depend on what comes after; see `route` for what does not.

    Examples:
        >>> from contrastive_ops.ops import RouterLoss
        >>> losses = [RouterLoss("local_entropy", 0.04), RouterLoss("global_entropy", 0.04, threshold=1.0)]
        >>> layer = SparseMoE(16, 32, experts=4, router={"capacity": 1.25, "losses": losses})
        >>> modality = torch.tensor([0] * 6 + [1] * 3)                       # of the tokens in each sequence
        >>> out, routing = layer(torch.randn(2, 9, 16), segments=modality.expand(2, 9), num_segments=2)
        >>> out.shape, routing.losses["local_entropy"].shape
        (torch.Size([2, 9, 16]), torch.Size([2]))
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        k: int = 1,
        *,
        router: Mapping[str, Any] | None = None,
        group: Any = None,
        capacity_over: str = "group",
        average: bool = True,
        check: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        gate = Router(dim, experts, k, device=device, dtype=dtype, **(router or {}))
        spread = {"group": group, "average": average, "check": check}
        super().__init__(gate, hidden, device=device, dtype=dtype, **options, **spread)
        checks.check_choice("SparseMoE", "capacity_over", capacity_over, ("group", "rank"))
        self.capacity_over = capacity_over

    def route(self, tokens: Tensor, labels: dict[str, Any]) -> Routing:
        """Tokens choose experts."""
        return self.gate(tokens, **labels)

    def _routed(self, tokens: Tensor, labels: dict[str, Any]) -> tuple[Tensor, Tensor | None, Routing]:
        spread = self.experts.spread
        if spread is None:
            return super()._routed(tokens, labels)
        from ..distributed.route import route_agreed

        def asked() -> tuple[Tensor, dict[str, Any]]:
            flat.append(self._flat(tokens, labels))
            logits, given = self.gate.asked(*flat[0])
            return logits, {"priority": self.gate.priority, **self.gate.options(), **given}

        flat: list[tuple[Tensor, dict[str, Any]]] = []
        routing = route_agreed("SparseMoE", spread.team, asked, self.gate.k, self.capacity_over, spread.check)
        return flat[0][0], flat[0][1]["valid"], routing


class ExpertChoice(_Layer):
    """A layer whose experts choose tokens, each as many: ``out, routing = layer(tokens)``; see `expert_choice`.

    Args:
        dim: D of the tokens.
        hidden: F of each expert.
        experts: E.
        capacity: tokens that an expert takes: int, factor of T / E, or `Capacity`.
        router: keyword arguments of `Router`: gating, losses, eval_capacity.
        options: gated, activation, bias, shared, as in `SparseMoE`.

    Note:
        Not for causal models: whether an expert takes a token depends on the tokens after it. Take `SparseMoE` without
        a capacity or with ``router={"priority": "position"}``.

    Examples:
        >>> out, routing = ExpertChoice(16, 32, experts=4, capacity=1.0)(torch.randn(2, 10, 16))
        >>> routing.offsets.diff()
        tensor([5, 5, 5, 5])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        capacity: int | float | Capacity = 1.0,
        *,
        router: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if "group" in options:
            raise TypeError("ExpertChoice: group must not be given: experts choose among the tokens of one process")
        gate = Router(dim, experts, capacity=capacity, device=device, dtype=dtype, **(router or {}))
        if gate.balance is not None:
            raise ValueError(f"ExpertChoice: router must have no balance, got {gate.balance!r}: experts are balanced")
        super().__init__(gate, hidden, device=device, dtype=dtype, **options)

    def route(self, tokens: Tensor, labels: dict[str, Any]) -> Routing:
        """Experts choose tokens."""
        logits, labels = self.gate.asked(tokens, labels)
        return expert_choice(logits, **self.gate.options(), **labels)
