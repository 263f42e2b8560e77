"""Experts that see mixtures of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import autocast, checks
from ..core.masks import left_out
from ..core.scalars import Scalars
from .experts import Experts


class SoftMoE(Scalars):
    """A layer whose experts see mixtures of all tokens of a sequence: nothing is chosen and nothing dropped.

    Equivalent to::

        logits = F.normalize(tokens, dim=-1) @ (scale * F.normalize(slots, dim=0))     # (B, L, E P)
        mixed = logits.softmax(1).transpose(1, 2) @ tokens                              # (B, E P, D)
        out = logits.softmax(2) @ experts(mixed)                                        # P slots for each expert

    Args:
        dim: D of the tokens.
        hidden: F of each expert.
        experts: E.
        slots: P, slots of each expert.
        options: gated, activation, bias, as in `Experts`.

    Note:
        Memory O(B L E P). Sequences share nothing; their tokens do, so not for causal models: take `SparseMoE`.

    Source:
        Puigcerver et al., From Sparse to Soft Mixtures of Experts, 2023.

    Examples:
        >>> SoftMoE(16, 32, experts=4, slots=2)(torch.randn(3, 10, 16)).shape
        torch.Size([3, 10, 16])
    """

    scalars = ("scale",)

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        slots: int = 1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.experts = Experts(dim, hidden, experts, device=device, dtype=dtype, **options)
        _, dim, _ = self.experts.down_proj.shape
        slots = checks.integer("SoftMoE", "slots", slots, 1)
        self.slots = nn.Parameter(torch.empty(dim, len(self.experts.down_proj), slots, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Slots of unit length on average, and scale 1."""
        nn.init.normal_(self.slots, std=1 / math.sqrt(self.slots.shape[0]))
        nn.init.ones_(self.scale)

    def forward(self, tokens: Tensor, *, valid: Tensor | None = None, backend: str = "auto") -> Tensor:
        """Return the output (..., L, D) of tokens (..., L, D); padding, where valid (..., L) is False, is left out."""
        checks.check_floating("SoftMoE", "tokens", tokens)
        shape = tokens.shape
        tokens = tokens if valid is None else left_out(tokens, valid)
        x = tokens.reshape(math.prod(shape[:-2]), *shape[-2:])
        dtype = checks.accumulator(tokens.dtype)
        with autocast.disabled(tokens):
            keys = self.scale.to(dtype) * F.normalize(self.slots.to(dtype).flatten(1), dim=0)
            logits = F.normalize(x.to(dtype), dim=2) @ keys
            into, back = logits, logits.softmax(2)
            if valid is not None:
                padding = ~valid.reshape(x.shape[0], shape[-2], 1)
                # The least number, not -inf, so that a sequence of padding alone has finite weights.
                into = into.masked_fill(padding, torch.finfo(dtype).min)
                back = back.masked_fill(padding, 0.0)
            mixed = into.softmax(1).transpose(1, 2) @ x.to(dtype)
        experts, slots = self.slots.shape[1:]
        # Rows of one expert in succession, those of all sequences.
        rows = mixed.to(x.dtype).unflatten(1, (experts, slots)).transpose(0, 1).reshape(-1, shape[-1])
        offsets = torch.arange(experts + 1, device=x.device) * (x.shape[0] * slots)
        rows = self.experts(rows, offsets, backend)
        of_sequence = rows.view(experts, x.shape[0], slots, shape[-1]).transpose(0, 1).flatten(1, 2)
        return (back.to(of_sequence.dtype) @ of_sequence).view(shape)
