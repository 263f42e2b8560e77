"""Sets of token embeddings, padded or packed: what late interaction compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.masks import left_out
from ..core.results import pytree


@pytree
@dataclass(frozen=True, eq=False)
class TokenSets:
    """Token embeddings of queries or of documents, one set of tokens each.

    Two layouts: padded, ``TokenSets(tokens, mask)`` with (B, L, D) and (B, L); and packed without padding,
    ``TokenSets(tokens, offsets=offsets)`` with (T, D) and (B + 1,). A plain tensor (B, L, D) stands for sets that are
    all full.

    Attributes:
        tokens: (B, L, D), or (T, D) with `offsets`; float32, bfloat16, float16 or float64. Lists of documents of each
            query, which `maxsim_pairs` takes, are (N, K, L, D).
        mask: bool, in the shape of `tokens` without D: which tokens take part. Any tokens may be masked, not only the
            last ones; whatever they hold, NaN included, reaches no result, and their gradient is 0. An attention mask
            of integers is passed as ``mask.bool()``.
        offsets: (B + 1,) int64, ascending within [0, T]: set b is the tokens offsets[b] to offsets[b + 1]. Tokens
            outside of all sets are never read.

    Examples:
        >>> from contrastive_ops.ops import TokenSets, maxsim
        >>> mask = torch.tensor([[True, True, False], [True, False, False]])
        >>> padded = TokenSets(torch.randn(2, 3, 8), mask)
        >>> packed = TokenSets(padded.tokens[mask], offsets=torch.tensor([0, 2, 3]))
        >>> torch.allclose(maxsim(padded, padded), maxsim(packed, packed), atol=1e-6)
        True
    """

    tokens: Tensor
    mask: Tensor | None = None
    offsets: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Packed:
    """Sets as the operators take them.

    Attributes:
        tokens: (T, D).
        offsets: (B + 1,).
        mask: (T,) or None.
        shape: of the sets: (B,), or (N, K) for lists of each query.
        length: the number of tokens of every padded set; None for packed sets, which differ.
    """

    tokens: Tensor
    offsets: Tensor
    mask: Tensor | None
    shape: tuple[int, ...]
    length: int | None

    def counts(self) -> Tensor:
        """(B,) how many tokens of each set take part."""
        if self.mask is None:
            return self.offsets.diff()
        if self.length is not None:
            return self.mask.view(self.offsets.shape[0] - 1, self.length).sum(1)
        before = torch.cat([self.offsets.new_zeros(1), self.mask.cumsum(0)])
        return before[self.offsets].diff()

    def owners(self) -> Tensor:
        """(T,) the set of each token; -1 for tokens that are masked or in none."""
        token = torch.arange(self.tokens.shape[0], device=self.tokens.device)
        owner = torch.searchsorted(self.offsets, token, right=True) - 1
        outside = owner >= self.offsets.shape[0] - 1
        return owner.masked_fill(outside if self.mask is None else outside | ~self.mask, -1)

    def longest(self, function: str) -> int:
        """The number of tokens of the longest set. Reads the offsets of packed sets."""
        if self.length is not None:
            return self.length
        if not checks.may_read(self.offsets, waits=True):
            raise NotImplementedError(
                f"{function}: queries must be padded in a traced program, which does not know lengths of packed ones\n"
                "  pad them: TokenSets(tokens, mask)"
            )
        lengths = self.offsets.diff()
        return int(lengths.max()) if lengths.numel() > 0 else 0


def packed(function: str, name: str, sets: Tensor | TokenSets, lists: bool = False) -> Packed:
    """Check `sets`, whose argument is `name`, and bring them into one layout; `lists`: (N, K, L, D) is allowed."""
    if isinstance(sets, Tensor):
        sets = TokenSets(sets)
    if not isinstance(sets, TokenSets):
        raise TypeError(f"{function}: {name} must be a tensor or TokenSets, got {type(sets).__name__}")
    (tokens,) = autocast.cast(sets.tokens)
    tokens = checks.check_tensor(function, f"{name}.tokens", tokens)
    if sets.offsets is not None:
        checks.check_matrix(function, name, tokens)
        offsets = checks.check_index(function, f"{name}.offsets", sets.offsets, None, name, tokens)
        _check_offsets(function, name, offsets, tokens)
        _check_mask(function, name, sets.mask, tokens)
        tokens = tokens if sets.mask is None else left_out(tokens, sets.mask)
        return Packed(tokens, offsets, sets.mask, (offsets.shape[0] - 1,), None)
    if tokens.dim() != 3 and not (lists and tokens.dim() == 4):
        shapes = "(B, L, D) or (N, K, L, D)" if lists else "(B, L, D)"
        raise ValueError(
            f"{function}: {name} must have shape {shapes}, or (T, D) with offsets, got {checks.shape(tokens)}"
        )
    _check_mask(function, name, sets.mask, tokens)
    tokens = tokens if sets.mask is None else left_out(tokens, sets.mask)
    shape, length, depth = tuple(tokens.shape[:-2]), tokens.shape[-2], tokens.shape[-1]
    count = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    rows = tokens.reshape(count * length, depth)
    checks.check_matrix(function, name, rows)
    offsets = torch.arange(count + 1, device=tokens.device) * length
    mask = None if sets.mask is None else sets.mask.reshape(count * length)
    return Packed(rows, offsets, mask, shape, length)


def concatenated(first: Packed, second: Packed) -> Packed:
    """The sets of both, one after the other; tokens are copied."""
    sizes = [each.tokens.shape[0] for each in (first, second)]
    offsets = torch.cat([first.offsets, second.offsets[1:] + sizes[0]])
    # Tokens that lie before the first set of the second side would join the last set of the first one.
    tokens = torch.cat([first.tokens, second.tokens])
    mask = torch.cat([(each.owners() >= 0) for each in (first, second)])
    return Packed(tokens, offsets, mask, (offsets.shape[0] - 1,), None)


def check_two_sides(function: str, queries: Packed, documents: Packed, name: str = "documents") -> None:
    """Tokens of both sides must have inner products with each other."""
    q, d = queries.tokens, documents.tokens
    if q.shape[1] != d.shape[1]:
        raise ValueError(
            f"{function}: {name} must have the same last dimension as queries, got {d.shape[1]} and {q.shape[1]}"
        )
    if q.dtype != d.dtype:
        raise TypeError(
            f"{function}: {name} must have the same dtype as queries, got {d.dtype} and {q.dtype}\n"
            "  convert one of them, or use torch.autocast"
        )
    checks.check_device(function, "queries", q, name, d)


def _check_mask(function: str, name: str, mask: object, tokens: Tensor) -> None:
    if mask is None:
        return
    mask = checks.check_tensor(function, f"{name}.mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: {name}.mask must be bool, got {mask.dtype}\n  convert it: mask.bool()")
    if mask.shape != tokens.shape[:-1]:
        expected = str(tuple(tokens.shape[:-1]))
        raise ValueError(f"{function}: {name}.mask must have shape {expected}, got {checks.shape(mask)}")
    checks.check_device(function, name, tokens, f"{name}.mask", mask)


def _check_offsets(function: str, name: str, offsets: Tensor, tokens: Tensor) -> None:
    if offsets.shape[0] == 0:
        raise ValueError(f"{function}: {name}.offsets must have shape (B + 1,), got (0,)")
    # Only what is at hand is read: not a traced tensor, and not one on a GPU, which every call would have to wait for.
    if offsets.device.type != "cpu" or not checks.may_read(offsets):
        return
    falls = (offsets.diff() < 0).nonzero()
    if falls.numel() > 0:
        at = int(falls[0]) + 1
        raise ValueError(
            f"{function}: {name}.offsets must ascend, got {int(offsets[at])} at index {at} after {int(offsets[at - 1])}"
        )
    first, last = int(offsets[0]), int(offsets[-1])
    if first < 0 or last > tokens.shape[0]:
        raise ValueError(
            f"{function}: {name}.offsets must be within [0, {tokens.shape[0]}], got {first if first < 0 else last}"
        )
