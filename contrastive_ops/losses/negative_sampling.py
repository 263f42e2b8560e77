"""Skip-gram with negative sampling: two tables of embeddings, and negatives from the unigram distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from ..core.problem import Problem
from ..core.recompute import random_options
from ..core.state import State
from ..ops._listed_logits import listed_logits
from . import _arguments


class UnigramSampler(State):
    """Draws words in proportion to a power of how often they occur: ``negatives = sampler(words, k)``.

    Args:
        counts: (V,) how often each word occurs: finite, >= 0 and not all 0.
        power: of the counts; 0.75 as in word2vec, 1 for the frequencies themselves, 0 for all words alike.

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
        power = checks.number(name, "power", power, "[0, inf)")
        if not isinstance(counts, Tensor) or counts.dim() != 1 or not counts.numel():
            raise ValueError(f"{name}: counts must be a tensor of shape (V,), got {checks.shown(counts)}")
        wrong = ~((counts >= 0) & (counts < torch.inf))
        if bool(wrong.any()):
            raise ValueError(f"{name}: counts must be finite and >= 0, got {counts[wrong][0].item()}")
        if not bool((counts > 0).any()):
            raise ValueError(f"{name}: counts must be >= 0 and not all 0, got {counts.tolist()[:5]}")
        # A word that never occurs is never drawn, whatever the power. Of shares, since the power of a count may be inf.
        share = torch.where(counts > 0, (counts.double() / counts.max().double()).pow(power), 0.0)
        cumulative = share.cumsum(0)
        self.cumulative = cumulative / cumulative[-1]
        self._made = self.cumulative.clone()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the counts that it was made of."""
        self.cumulative.copy_(self._made)

    def forward(self, avoid: Tensor, k: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw (N, k) words, none of row i equal to ``avoid[i]`` unless it is the only word that occurs.

        Args:
            avoid: (N,) int64, the word that is no negative of each row; -1 for none.
            k: how many for each row, as many as you like: words are drawn with replacement.
            generator: of the random numbers, on the device of ``avoid``.
        """
        name = "UnigramSampler"
        k = checks.integer(name, "k", k, 1)
        avoid = checks.check_index(name, "avoid", avoid, None, "counts", self.cumulative)
        checks.check_index_values(name, "avoid", avoid, len(self.cumulative), or_none=True)
        random = random_options(name, generator)
        uniform = torch.rand((avoid.shape[0], k), dtype=torch.float64, device=avoid.device, **random)
        # The word's own stretch of [0, 1) is cut out, so that nothing has to be drawn again.
        end = torch.where(avoid < 0, 0.0, self.cumulative[avoid.clamp_min(0)])[:, None]
        begin = torch.where(avoid <= 0, 0.0, self.cumulative[(avoid - 1).clamp_min(0)])[:, None]
        rest = 1 - (end - begin)
        point = uniform * torch.where(rest > 0, rest, 1.0)
        beyond = (point >= begin) & (rest > 0)
        # Rounding must lead neither into the stretch nor out of the table.
        point = torch.where(beyond, torch.maximum(point + (end - begin), end), point)
        last = torch.nextafter(self.cumulative[-1], self.cumulative.new_zeros(()))
        return torch.searchsorted(self.cumulative, torch.minimum(point, last), right=True)


def negative_sampling(
    center: Tensor,
    table: Tensor,
    context: Tensor,
    negatives: Tensor,
    *,
    log_expected: Tensor | None = None,
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
        log_expected: (V,) log of the expected number of times that a word is drawn for a row, k times its share: this
            makes it NCE, whose scores are log-probabilities. None for negative sampling.
        weight: (N,) weight >= 0 of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        backend: "auto", "reference", "cpu", "triton" or "cuda"; as in `similarity_topk`.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_topk`.

    Note:
        Memory O(N D + N k) and the gradient of ``table``; the (N, k, D) rows of the words are not copied. The same bits
        in every run.

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
    center, table = autocast.cast(center, table)
    checks.check_matrices(name, "center", center, "table", table)
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
    if log_expected is not None:
        checks.check_vector(name, "log_expected", log_expected, V, "center", center)
    words = torch.cat([_arguments.of_weighted(weight, context, -1)[:, None], negatives], 1)
    dtype = checks.accumulator(center.dtype)
    with autocast.disabled(center):
        one = torch.ones((), dtype=dtype, device=center.device)
        problem = Problem((name, "center", "table"), center.to(dtype), table)
        logits = listed_logits(problem, words, one, None, backend)
        if log_expected is not None:
            logits = logits - log_expected.to(dtype)[words.clamp_min(0)]
        of_noise = torch.where(negatives >= 0, logits[:, 1:], -torch.inf)
        losses = softplus(-logits[:, 0]) + softplus(of_noise).sum(1)
    return _arguments.reduce_rows(losses, weight, reduction)
