"""Which pairs (row, column) of a similarity matrix take part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pairs:
    """Rules for the pairs that take part in a fold; all rules are ANDed and none needs an N x M tensor.

    Equivalent to::

        keep = torch.ones(N, M, dtype=torch.bool)
        keep &= torch.arange(N)[:, None] + diagonal != torch.arange(M)      # diagonal
        logits = logits.masked_fill(~keep, -torch.inf)

    Args:
        diagonal: drop column ``i + diagonal`` of row ``i`` (0 drops each row's own column). None drops nothing.
    """

    diagonal: int | None = None

    def __post_init__(self) -> None:
        """Check the rules."""
        if self.diagonal is not None and (isinstance(self.diagonal, bool) or not isinstance(self.diagonal, int)):
            raise TypeError(f"Pairs: diagonal must be an int or None, got {type(self.diagonal).__name__}")
