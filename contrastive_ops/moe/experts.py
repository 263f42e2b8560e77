"""Feed-forward networks of all experts at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks
from ..ops import Routing
from ..ops.grouped_matmul import grouped_matmul

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}

# What checkpoints call the matrices of an expert, by whether it is gated: those of the first layer, and the second's.
# Of each expert (``0.w1.weight``), or one tensor of all (``w1``, ``w1.weight``).
NAMES: Mapping[bool, tuple[tuple[str, ...], ...]] = {
    True: (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")),
    False: (("up_proj", "down_proj"), ("w1", "w2"), ("wi", "wo"), ("fc1", "fc2")),
}


class Experts(nn.Module):
    """E feed-forward networks on rows grouped by expert, ``experts(rows, offsets)``, or ``experts(tokens, routing)``.

    Args:
        dim: D.
        hidden: F, of each expert.
        experts: E.
        gated: ``activation(gate) * up`` instead of ``activation(up)``; the names and layout of the weights are those of
            Mixtral in transformers. Checkpoints load too that have one matrix per expert (``0.w1.weight``, ...,
            ``0.gate_proj.weight``, ...) or gate and up apart (``gate_proj`` (E, F, D), ``up_proj``, ``down_proj``).
        activation: "gelu", "relu", "silu" or a function; by default "silu" where gated, else "gelu".
        bias: whether there are biases.

    Attributes:
        gate_up_proj: (E, 2 F, D) where gated; else up_proj: (E, F, D).
        down_proj: (E, D, F).
        up_bias: (E, 2 F) or (E, F), with `bias`.
        down_bias: (E, D), with `bias`.
    """

    activation: Callable[[Tensor], Tensor]
    up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        *,
        gated: bool = False,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, hidden = checks.integer("Experts", "dim", dim, 0), checks.integer("Experts", "hidden", hidden, 0)
        experts = checks.integer("Experts", "experts", experts, 0)
        checks.flag("Experts", "gated", gated)
        checks.flag("Experts", "bias", bias)
        activation = activation or ("silu" if gated else "gelu")
        if isinstance(activation, str):
            checks.check_choice("Experts", "activation", activation, tuple(ACTIVATIONS))
            activation = ACTIVATIONS[activation]
        self.activation, self.gated = activation, gated

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        rows = 2 * hidden if gated else hidden
        self.up_name = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self.up_name, parameter(experts, rows, dim))
        self.down_proj = parameter(experts, dim, hidden)
        self.up_bias = parameter(experts, rows) if bias else None
        self.down_bias = parameter(experts, dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear` does, each expert on its own."""
        for name, parameter in self.named_parameters():
            fan_in = self.up.shape[2] if name in (self.up_name, "up_bias") else self.down_proj.shape[2]
            bound = 1 / math.sqrt(max(fan_in, 1))
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def up(self) -> Tensor:
        """The weight of the first layer."""
        weight: Tensor = getattr(self, self.up_name)  # not get_parameter: torch.func.functional_call puts in tensors
        return weight

    def forward(self, rows: Tensor, offsets: Tensor | Routing, backend: str = "auto") -> Tensor:
        """Apply expert e to the rows (R, D) from offsets[e] to offsets[e + 1]; rows beyond are 0.

        With a routing, `rows` are its tokens (T, D), which are read where they are, and the output (R, D) is in the
        layout of `dispatch`.
        """
        hidden = grouped_matmul(rows, self.up.transpose(1, 2), offsets, self.up_bias, backend=backend)
        bounds = offsets.offsets if isinstance(offsets, Routing) else offsets
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=1)
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        return grouped_matmul(hidden, self.down_proj.transpose(1, 2), bounds, self.down_bias, backend=backend)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Join what other layouts keep apart: see `NAMES`."""
        for names in NAMES[self.gated]:
            for ending, up, down in (("weight", self.up_name, "down_proj"), ("bias", "up_bias", "down_bias")):
                found = [_keys(state_dict, prefix, name, ending, len(self.down_proj)) for name in names]
                if getattr(self, up) is None or not all(found) or found[0] == [prefix + up]:
                    continue
                stacked = [torch.stack([state_dict.pop(key) for key in keys]) for keys in found]
                stacked = [each[0] if each.dim() > (3 if ending == "weight" else 2) else each for each in stacked]
                state_dict[prefix + up], state_dict[prefix + down] = torch.cat(stacked[:-1], 1), stacked[-1]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Sizes."""
        experts, dim, hidden = self.down_proj.shape
        return f"{dim}, {hidden}, {experts}, gated={self.gated}, bias={self.down_bias is not None}"


def _keys(state_dict: Mapping[str, Any], prefix: str, name: str, ending: str, experts: int) -> list[str]:
    """Where a checkpoint has a matrix or bias of all experts: of each one, or one tensor of all; empty if nowhere."""
    of_all = [f"{prefix}{name}", f"{prefix}{name}.{ending}"] if ending == "weight" else [f"{prefix}{name}.{ending}"]
    for keys in ([f"{prefix}{e}.{name}.{ending}" for e in range(experts)], *([key] for key in of_all)):
        if keys and all(key in state_dict for key in keys):
            return keys
    return []
