"""Feed-forward networks of all experts at once."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..ops import Routing
from ..ops._activation import activate
from ..ops.grouped_matmul import grouped_matmul
from ..reference.grouped_matmul import ACTIVATIONS

if TYPE_CHECKING:
    from ..distributed._experts import Spread

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
        group: spread the experts over its ranks, each of which gives rows of its own and gets theirs back: a
            ProcessGroup or a DeviceMesh of one dimension. Parameters are then DTensors, Shard(0) of the shapes below; a
            checkpoint of all experts loads on each rank, which takes its part.
        average: with `group`: gradients are the mean over ranks, as DDP and FSDP make them of other parameters; False:
            their sum.
        check: with `group`: compare D and dtypes of all ranks before rows travel.

    Note:
        With `group`, rows go to the rank of their expert and back by all-to-alls, and so do gradients, which are those
        of one process with the rows of all ranks. Initial values are too, where ranks have the same seed.

    Attributes:
        gate_up_proj: (E, 2 F, D) where gated; else up_proj: (E, F, D).
        down_proj: (E, D, F).
        up_bias: (E, 2 F) or (E, F), with `bias`.
        down_bias: (E, D), with `bias`.
        spread: which rank has which experts; None where this process has all.
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
        group: Any = None,
        average: bool = True,
        check: bool = True,
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
        self.spread = _spread(group, experts, average, check, device)

        def parameter(*shape: int) -> nn.Parameter:
            if self.spread is not None:
                return self.spread.parameter(shape, device=device, dtype=dtype)
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
            if self.spread is None:
                nn.init.uniform_(parameter, -bound, bound)
                continue
            local, here = parameter.to_local().detach(), self.spread.here  # type: ignore[attr-defined]
            for expert in range(parameter.shape[0]):  # all, because ranks of one seed must not have the same experts
                drawn = nn.init.uniform_(local.new_empty(local.shape[1:]), -bound, bound)
                if expert in here:
                    local[expert - here.start] = drawn

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
        if self.spread is None:
            return self._applied(rows, offsets, backend)
        from ..distributed._experts import apply_experts

        return apply_experts(functools.partial(self._applied, backend=backend), rows, offsets, self.spread, backend)

    def _applied(self, rows: Tensor, offsets: Tensor | Routing, backend: str) -> Tensor:
        """The experts of this process."""
        part = (lambda weight: weight) if self.spread is None else self.spread.part
        up, down = part(self.up), part(self.down_proj)
        up_bias, down_bias = (None if bias is None else part(bias) for bias in (self.up_bias, self.down_bias))
        hidden = grouped_matmul(rows, up.transpose(1, 2), offsets, up_bias, backend=backend)
        bounds = offsets.offsets if isinstance(offsets, Routing) else offsets
        hidden = self._activated(hidden, backend)
        return grouped_matmul(hidden, down.transpose(1, 2), bounds, down_bias, backend=backend)

    def _activated(self, hidden: Tensor, backend: str) -> Tensor:
        known = next((name for name, function in ACTIVATIONS.items() if function is self.activation), None)
        if known is not None:
            return activate(hidden, known, self.gated, backend)
        if not self.gated:
            return self.activation(hidden)
        gate, hidden = hidden.chunk(2, dim=1)
        return self.activation(gate) * hidden

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Join what other layouts keep apart: see `NAMES`. Of experts on other ranks nothing need be there."""
        count = self.down_proj.shape[0]
        here = range(count) if self.spread is None else self.spread.here
        for names in NAMES[self.gated]:
            for ending, up, down in (("weight", self.up_name, "down_proj"), ("bias", "up_bias", "down_bias")):
                found = [_keys(state_dict, prefix, name, ending, here) for name in names]
                if getattr(self, up) is None or not all(found) or found[0] == [prefix + up]:
                    continue
                stacked = [torch.stack([state_dict.pop(key) for key in keys]) for keys in found]
                stacked = [each[0] if each.dim() > (3 if ending == "weight" else 2) else each for each in stacked]
                state_dict[prefix + up], state_dict[prefix + down] = torch.cat(stacked[:-1], 1), stacked[-1]
                for expert, name in itertools.product(range(count), names):  # those of other ranks
                    state_dict.pop(f"{prefix}{expert}.{name}.{ending}", None)
        if self.spread is not None:
            for name, parameter in self.named_parameters():
                if not len(here):  # a checkpoint of each expert has nothing for this rank
                    state_dict.setdefault(prefix + name, parameter.detach())
                given = state_dict.get(prefix + name)
                if isinstance(given, Tensor) and type(given) is not type(parameter.data):
                    given = given[here.start : here.stop] if given.shape == parameter.shape else given
                    state_dict[prefix + name] = self.spread.spread(given.to(parameter.device), tuple(parameter.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Sizes."""
        experts, dim, hidden = self.down_proj.shape
        text = f"{dim}, {hidden}, {experts}, gated={self.gated}, bias={self.down_bias is not None}"
        return text if self.spread is None else f"{text}, here={self.spread.here}"


def _spread(group: Any, experts: int, average: bool, check: bool, device: Any) -> Spread | None:
    if group is None:
        return None
    from ..distributed._experts import find_spread

    return find_spread("Experts", group, experts, average, check, device)


def _keys(state_dict: Mapping[str, Any], prefix: str, name: str, ending: str, experts: range) -> list[str]:
    """Where a checkpoint has a matrix or bias of all experts: of each one, or one tensor of all; empty if nowhere."""
    of_all = [f"{prefix}{name}", f"{prefix}{name}.{ending}"] if ending == "weight" else [f"{prefix}{name}.{ending}"]
    for keys in ([f"{prefix}{e}.{name}.{ending}" for e in experts], *([key] for key in of_all)):
        if keys and all(key in state_dict for key in keys):
            return keys
    return []
