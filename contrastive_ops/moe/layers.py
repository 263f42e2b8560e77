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
    ) -> None:
        super().__init__()
        experts, dim = gate.weight.shape
        shared = checks.integer(type(self).__name__, "shared", shared, 0)
        options: dict[str, Any] = {"gated": gated, "activation": activation, "bias": bias, "device": device}
        self.gate = gate
        self.experts = Experts(dim, hidden, experts, dtype=dtype, **options)
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
        checks.check_floating(type(self).__name__, "tokens", tokens)
        shape = tokens.shape[:-1]
        # Not -1, which is ambiguous where there are no tokens.
        flat, name = tokens.reshape(math.prod(shape), tokens.shape[-1]), type(self).__name__
        valid = _token_label(name, "valid", valid, shape)
        flat = flat if valid is None else left_out(flat, valid)
        if allowed is not None:
            last = allowed.shape[-1:] if allowed.dtype == torch.bool or self.gate.k > 1 else ()
            allowed = _token_label(name, "allowed", allowed, shape, last)
        routing = self.route(
            flat,
            {
                "segments": _token_label(name, "segments", segments, shape),
                "num_segments": num_segments,
                "valid": valid,
                "allowed": allowed,
                "generator": generator,
                "backend": backend,
            },
        )
        rows = self.experts(flat, routing, backend)
        out = combine(rows, routing, backend=backend)
        if self.shared_experts is not None:
            everything = torch.arange(2, device=flat.device) * flat.shape[0]
            shared = self.shared_experts(flat, everything, backend)
            out = out + (shared if valid is None else shared.masked_fill(~valid[:, None], 0.0))
        return out.view(*shape, out.shape[1]), routing


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

    Note:
        Gates are the router's probabilities, not renormalised: with k = 1 that alone gives the router a gradient. Ask
        for ``router={"gating": Gating(renormalize=True)}`` where a checkpoint expects it, as Mixtral's do, whose
        ``block_sparse_moe`` state loads as it is. Memory: rows of the chosen experts only, (T k, F); tokens are read
        where they are, and no copy of them is made.

        Causal models: with a capacity, ``priority="gate"``, the default, lets a later token take the place of an
        earlier one, so that outputs depend on what comes after; see `route` for what does not.

    Example:
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
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        gate = Router(dim, experts, k, device=device, dtype=dtype, **(router or {}))
        super().__init__(gate, hidden, device=device, dtype=dtype, **options)

    def route(self, tokens: Tensor, labels: dict[str, Any]) -> Routing:
        """Tokens choose experts."""
        return self.gate(tokens, **labels)


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

    Example:
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
        gate = Router(dim, experts, capacity=capacity, device=device, dtype=dtype, **(router or {}))
        if gate.balance is not None:
            raise ValueError(f"ExpertChoice: router must have no balance, got {gate.balance!r}: experts are balanced")
        super().__init__(gate, hidden, device=device, dtype=dtype, **options)

    def route(self, tokens: Tensor, labels: dict[str, Any]) -> Routing:
        """Experts choose tokens."""
        return expert_choice(self.gate.scored(tokens, labels), **self.gate.options(), **labels)
