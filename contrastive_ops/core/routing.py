"""What the backends of expert_routing agree on: numbers of scores, and the integers that operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch

# csrc/expert_routing.h has the same numbers.
SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("top2", "max")


class ScoreSpec(NamedTuple):
    """The integers that the scores of a router depend on, in the order in which operators take them."""

    k: int
    score: int
    renormalize: int
    expert_groups: int  # 1: experts are in no groups
    kept_groups: int
    group_score: int
    segments: int
    load: int  # whether the statistics of the load loss are asked for


class SlotSpec(NamedTuple):
    """The integers that slots depend on."""

    experts: int
    group_size: int
    capacity: int  # of an expert in each group; -1 for no limit
    padded: int
    segments: int

    def groups(self, tokens: int) -> int:
        """How many groups of tokens there are."""
        return tokens // self.group_size if self.group_size else 1

    def rows(self, tokens: int, k: int) -> int:
        """Rows of the dispatched layout, whatever the router decides."""
        choices = tokens * k
        if self.capacity < 0:
            return choices
        slots = self.experts * self.groups(tokens) * self.capacity
        return slots if self.padded else smaller(choices, slots)


def smaller(a: int, b: int) -> int:
    """``min(a, b)``, which does not bind a traced program to the smaller one."""
    # The compiler reads min as torch.sym_min, which torch 2.6 does not know there; export needs the latter.
    return min(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_min(a, b)  # type: ignore[return-value]
