"""Skip-gram with negative sampling: two tables of embeddings, and negatives from the unigram distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from ..core.ordered import in_float64
from ..core.problem import Problem
from ..core.recompute import random_options
from ..core.state import State
from ..ops._listed_logits import listed_logits
from . import _arguments
from ._columns import check_expected, less_expected


class UnigramSampler(State):
    """Draws words in proportion to a power of how often they occur: ``negatives = sampler(words, k)``.

    Args:
        counts: (V,) how often each word occurs: finite, >= 0 and not all 0.
        power: of the counts; 0.75 as in word2vec, 1 for the frequencies themselves, 0 for all words alike, and below 0
            for rare words more often than frequent ones. A word that never occurs is never drawn.

    Note:
        Memory O(V): cumulative shares in float64, searched for each number. State, which moves with a model and keeps
        its digits whatever that is cast to.

    Source:
        Mikolov et al., Distributed Representations of Words and Phrases and their Compositionality, 2013.

    Examples:
        >>> sampler = UnigramSampler(torch.tensor([100, 10, 0, 1]))
        >>> negatives = sampler(torch.tensor([0, 1]), 5)
        >>> negatives.shape, bool((negatives != 2).all()), bool((negatives != torch.tensor([[0], [1]])).all())
        (torch.Size([2, 5]), True, True)
    """

    digits = own = ("cumulative",)
    cumulative: Tensor

    def __init__(self, counts: Tensor, power: float = 0.75) -> None:
        super().__init__()
        name = "UnigramSampler"
        power = checks.number(name, "power", power, "(-inf, inf)")
        if not isinstance(counts, Tensor) or counts.dim() != 1 or counts.numel() == 0:
            raise ValueError(f"{name}: counts must be a tensor of shape (V,), got {checks.shown(counts)}")
        wrong = ~((counts >= 0) & (counts < torch.inf))
        if bool(wrong.any()):
            raise ValueError(f"{name}: counts must be finite and >= 0, got {counts[wrong][0].item()}")
        if not bool((counts > 0).any()):
            raise ValueError(f"{name}: counts must be >= 0 and not all 0, got {counts.tolist()[:5]}")
        # Of ratios to the count whose power is largest, since the power of a count may be inf.
        occurs, number = counts > 0, in_float64(counts)
        largest = number.max() if power >= 0 else number[occurs].min()
        cumulative = torch.where(occurs, (number / largest).pow(power), 0.0).cumsum(0)
        self.cumulative = (cumulative / cumulative[-1]).to(counts.device)
        self._made = self.cumulative.clone()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the counts that it was made of."""
        self.cumulative.copy_(self._made)

    def forward(self, avoid: Tensor, k: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw (N, k) words, none of row i among ``avoid[i]`` unless no other word occurs.

        Args:
            avoid: (N,) int64, the word that is no negative of each row, or (N, A), several of them, such as all items
                that a user knows; -1 for none. They are sets: a word that is named twice is left out once.
            k: how many for each row, as many as you like: words are drawn with replacement.
            generator: of the random numbers, on the device of ``avoid``.
        """
        name = "UnigramSampler"
        k = checks.integer(name, "k", k, 1)
        gaps = self._gaps(avoid)
        random = random_options(name, generator)
        uniform = torch.rand((gaps.begin.shape[0], k), dtype=torch.float64, device=gaps.begin.device, **random)
        return torch.searchsorted(self.cumulative, gaps.beyond(uniform), right=True)

    def log_expected(
        self, k: int, words: Tensor | None = None, *, avoid: Tensor | None = None, unique: bool = False
    ) -> Tensor:
        """Logarithms of how often words are expected among k draws, for `negative_sampling` and `mined_info_nce`.

        Equivalent to::

            share = counts**power / (counts**power).sum()
            share = share.masked_fill(avoided, 0)[words] / (1 - share[avoided].sum())
            torch.log(1 - (1 - share) ** k if unique else k * share)

        Args:
            k: how many words are drawn for each row.
            words: (N, P) int64, -1 for none; a word that is named twice has its number twice. None: all words.
            avoid: with words: the words (N,) or (N, A) that the draws of each row avoid.
            unique: of being drawn at all, where a list is a set, as in `mined_info_nce`; else how often.

        Returns:
            (V,), or shaped as ``words``, float64; -inf for a word that is never drawn.
        """
        name = "UnigramSampler.log_expected"
        k = checks.integer(name, "k", k, 1)
        checks.flag(name, "unique", unique)
        share = self.cumulative.diff(prepend=self.cumulative.new_zeros(1))
        if words is not None:
            words = checks.as_index(name, "words", words)
            if words.dim() != 2:
                raise ValueError(f"{name}: words must have shape (N, P), got {checks.shape(words)}")
            checks.check_device(name, "counts", self.cumulative, "words", words)
            checks.check_index_values(name, "words", words, len(share), or_none=True)
            share = torch.where(words < 0, 0.0, share[words.clamp_min(0)])
        if avoid is not None:
            if words is None:
                raise ValueError(f"{name}: words must be given with avoid, got None")
            gaps = self._gaps(avoid)
            if gaps.begin.shape[0] != words.shape[0]:
                raise ValueError(f"{name}: avoid must have {words.shape[0]} rows as words, got {checks.shape(avoid)}")
            named = _among(words, gaps.words) & gaps.some[:, None]
            share = torch.where(named, 0.0, share / gaps.left[:, None]).clamp_max(1.0)
        return (-torch.expm1(k * torch.log1p(-share))).log() if unique else math.log(k) + share.log()

    def _gaps(self, avoid: Tensor) -> _Gaps:
        """What is to be avoided by each row, checked, as stretches of [0, 1)."""
        name, V = "UnigramSampler", len(self.cumulative)
        avoid = checks.as_index(name, "avoid", avoid)
        if avoid.dim() not in (1, 2):
            raise ValueError(f"{name}: avoid must have shape (N,) or (N, A), got {checks.shape(avoid)}")
        checks.check_device(name, "counts", self.cumulative, "avoid", avoid)
        checks.check_index_values(name, "avoid", avoid, V, or_none=True)
        return _Gaps(self.cumulative, (avoid if avoid.dim() == 2 else avoid[:, None]).sort(1).values)


class _Gaps:
    """The stretches of [0, 1) that are cut out for each row, so that nothing has to be drawn again.

    Args:
        cumulative: (V,) shares.
        words: (N, A) what is cut out, in ascending order, -1 for none.
    """

    def __init__(self, cumulative: Tensor, words: Tensor) -> None:
        self.words = words
        end = cumulative[words.clamp_min(0)]
        begin = torch.where(words > 0, cumulative[(words - 1).clamp_min(0)], 0.0)
        nothing = (words < 0) | (begin == end)
        # No word is beyond 1, and of a word that is named twice the second stretch is empty.
        self.begin, end = (torch.where(nothing, 2.0, each).sort(1).values for each in (begin, end))
        again = torch.zeros_like(nothing)
        again[:, 1:] = self.begin[:, 1:] == self.begin[:, :-1]
        length = torch.where(again, 0.0, end - self.begin)
        before = length.cumsum(1) - length
        # Stretches that touch are one: where it begins is what decides about all of them.
        first = torch.ones_like(again)
        first[:, 1:] = self.begin[:, 1:] > end[:, :-1]
        at = torch.where(first, torch.arange(words.shape[1], device=words.device), 0).cummax(1).values
        self.closed = (self.begin - before).gather(1, at).cummax(1).values
        self.end, self.skipped = end, length.cumsum(1)
        whole = (self.begin.gather(1, at) == 0) & (end == 1)
        # Whether anything else occurs.
        self.some = ~whole.any(1)
        left = 1 - length.sum(1)
        self.left = torch.where(self.some & (left > 0), left, 1.0)
        closing = torch.where(end == 1, self.closed, 1.0)
        self.limit = closing.amin(1) if words.shape[1] > 0 else torch.ones_like(left)

    def beyond(self, uniform: Tensor) -> Tensor:
        """(N, k) numbers in [0, 1) outside of the stretches, in proportion to those that are given."""
        below = torch.nextafter(torch.where(self.some, self.limit, 1.0), self.limit.new_zeros(()))
        point = torch.minimum(uniform * self.left[:, None], below[:, None])
        passed = torch.searchsorted(self.closed, point, right=True)
        passed = torch.where(self.some[:, None], passed, 0)

        def of_passed(values: Tensor, otherwise: float, at: Tensor) -> Tensor:
            return torch.nn.functional.pad(values, (1, 1), value=otherwise).gather(1, at)

        # Rounding must lead neither into a stretch nor out of the table.
        point = torch.maximum(point + of_passed(self.skipped, 0.0, passed), of_passed(self.end, 0.0, passed))
        following = torch.where(self.some[:, None], of_passed(self.begin, 1.0, passed + 1), 1.0)
        return torch.minimum(point, torch.nextafter(following.clamp_max(1.0), point.new_zeros(())))


def _among(words: Tensor, listed: Tensor) -> Tensor:
    """(N, P) bool: whether each word is in the ascending list (N, A) of its row."""
    if listed.shape[1] == 0:
        return torch.zeros_like(words, dtype=torch.bool)
    at = torch.searchsorted(listed, words).clamp_max(listed.shape[1] - 1)
    return listed.gather(1, at) == words


def negative_sampling(
    center: Tensor,
    table: Tensor,
    context: Tensor,
    negatives: Tensor,
    *,
    log_expected: Tensor | None = None,
    sparse: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Skip-gram with negative sampling, or noise-contrastive estimation: one context against k words from noise.

    Equivalent to::

        logits = torch.einsum("nd,nkd->nk", center, table[torch.cat([context[:, None], negatives], 1)])
        logits = logits - log_expected[words]                                 # NCE only
        -F.logsigmoid(logits[:, 0]) - F.logsigmoid(-logits[:, 1:]).sum(1)

    Args:
        center: (N, D) float32, bfloat16, float16 or float64: embedding of each center word.
        table: (V, D) output embeddings, of the same dtype.
        context: (N,) int64, the word near each center.
        negatives: (N, k) int64, words from `UnigramSampler`; -1 for none. They are draws: a word that was drawn twice
            counts twice.
        log_expected: log of the expected number of times that a word is drawn for a row, k times its share, as
            `UnigramSampler.log_expected` has it: this makes it NCE, whose scores are log-probabilities. (V,) of all
            words, or (N, 1 + k) of the context and the negatives of each row. None for negative sampling.
        sparse: the gradient of ``table`` is a sparse tensor of the rows that are named, as `torch.optim.SparseAdam` and
            `torch.optim.SGD` take it. For a leaf, such as a parameter; without second derivatives.
        weight: (N,) weight >= 0 of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        backend: "auto", "reference", "cpu", "triton" or "cuda"; as in `similarity_topk`.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_topk`.

    Note:
        Memory O(N D + N k) and the gradient of ``table``; the (N, k, D) rows of the words are not copied, but with
        ``sparse`` those of different words, each once. The same bits in every run.

    Source:
        Mikolov et al., Distributed Representations of Words and Phrases and their Compositionality, 2013; Gutmann and
        Hyvärinen, Noise-Contrastive Estimation, 2010.

    Examples:
        >>> center, table = torch.zeros(2, 4), torch.zeros(9, 4)
        >>> negative_sampling(center, table, torch.tensor([1, 2]), torch.tensor([[3, 4], [5, -1]]), reduction="none")
        tensor([2.0794, 1.3863])
    """
    name = "negative_sampling"
    _arguments.check_reduction(name, reduction)
    checks.flag(name, "sparse", sparse)
    if sparse:
        _check_leaf(name, table)
        (center,) = autocast.cast(center)
    else:
        center, table = autocast.cast(center, table)
    checks.check_matrices(name, "center", center, "table", autocast.cast(table)[0] if sparse else table)
    N, V = center.shape[0], table.shape[0]
    context = checks.check_index(name, "context", context, N, "center", center)
    negatives = checks.as_index(name, "negatives", negatives)
    if weight is not None:
        _arguments.check_weight(name, weight, N, "center", center)
        center, context = (_arguments.of_weighted(weight, each) for each in (center, context))
        negatives = _arguments.of_weighted(weight, negatives, -1)
    checks.check_index_values(name, "context", context, V)
    if negatives.dim() != 2 or negatives.shape[0] != N:
        raise ValueError(f"{name}: negatives must have shape ({N}, k), got {checks.shape(negatives)}")
    checks.check_device(name, "center", center, "negatives", negatives)
    checks.check_index_values(name, "negatives", negatives, V, or_none=True)
    words = torch.cat([_arguments.of_weighted(weight, context, -1)[:, None], negatives], 1)
    if log_expected is not None:
        check_expected(name, log_expected, words, V, "center", center, "context and negatives")
    dtype = checks.accumulator(center.dtype)
    with autocast.disabled(center):
        rows, places = _named_rows(table, words, center.dtype) if sparse else (table, words)
        one = torch.ones((), dtype=dtype, device=center.device)
        problem = Problem((name, "center", "table"), center.to(dtype), rows)
        logits = listed_logits(problem, places, one, None, backend)
        if log_expected is not None:
            logits = less_expected(logits, log_expected, words)
        of_noise = torch.where(negatives >= 0, logits[:, 1:], -torch.inf)
        losses = softplus(-logits[:, 0]) + softplus(of_noise).sum(1)
    return _arguments.reduce_rows(losses, weight, reduction)


def _check_leaf(function: str, table: Tensor) -> None:
    """A sparse gradient is for what an optimiser sees: operations that made a table have none for it."""
    checks.check_matrix(function, "table", table)
    if torch.is_grad_enabled() and not (table.is_leaf and table.requires_grad):
        made = "one that other operations made" if table.requires_grad else "one that does not require a gradient"
        raise ValueError(
            f"{function}: table must be a leaf that requires a gradient with sparse=True, got {made}\n"
            "  use sparse=False, or torch.no_grad() where nothing is trained"
        )


def _named_rows(table: Tensor, words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows of the table that are named, each once, and where each word's is; their gradient is sparse."""
    # For none one that is named anyhow: an optimiser moves a row that has a gradient, be it 0.
    some = words.amax().clamp_min(0) if words.numel() > 0 else 0
    named, places = torch.where(words < 0, some, words).unique(return_inverse=True)
    rows = torch.nn.functional.embedding(named, table, sparse=True).to(dtype)
    return rows, torch.where(words < 0, -1, places)
