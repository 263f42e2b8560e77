"""Recipes of sentence embeddings: SimCSE and what was built on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core import checks
from ..losses import energy_hinge, group_whiten, info_nce, multi_positive_info_nce, nt_xent, soft_info_nce
from ..losses._columns import wide
from ..losses._one_pass import Part, binary_softmax, sum_of_rows
from ..losses._sweep import Sweep
from ..ops import Fold, Guide, Pairs, similarity_topk


def simcse(
    x: Tensor, y: Tensor, hard: Tensor | None = None, *, hard_weight: float | Tensor = 0.0, temperature: float = 0.05
) -> Tensor:
    """SimCSE: two dropout passes, or a premise with its entailed (y) and its contradicting sentence (hard).

    Equivalent to::

        s = F.normalize(x) @ F.normalize(torch.cat([y, hard])).T / temperature
        s[:, N:] += hard_weight * torch.eye(N)
        F.cross_entropy(s, torch.arange(N))

    Args:
        x: (N, D) the two views.
        y: as `x`.
        hard: (N, D) hard negatives; a column of every row.
        hard_weight: added to the logit of a row's own one: the logarithm of the paper's alpha.
        temperature: 0.05 in the paper.

    Source:
        Gao et al., SimCSE, 2021 (S018); the weight is ``hard_negative_weight`` of the released code.
    """
    if hard is None or (not isinstance(hard_weight, Tensor) and hard_weight == 0):
        return info_nce(x, y, hard, temperature=temperature)
    own: dict[str, object] = {"row_negatives": hard, "row_negative_bias": hard_weight}
    return info_nce(x, y, hard, negative_pairs=Pairs(diagonal=0), temperature=temperature, **own)  # type: ignore[call-overload]


def promcse(
    x: Tensor, y: Tensor, hard: Tensor, *, energy: float = 10.0, margin: float = 0.2, temperature: float = 0.05
) -> Tensor:
    """PromCSE: supervised SimCSE and a hinge of the hardest negative's cosine.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(torch.cat([y, hard])).T
        hardest = s.masked_fill(torch.eye(N, 2 * N) == 1, -torch.inf).amax(1)
        F.cross_entropy(s / temperature, torch.arange(N)) + energy * (margin + hardest - s.diagonal()).relu().mean()

    Args:
        x: (N, D) sentences, their positives and their hard negatives.
        y: as `x`.
        hard: as `x`.
        energy: weight of the hinge; 10 in the scripts.
        margin: of the hinge.
        temperature: divides the cosines.

    Source:
        Jiang et al., Improved Universal Sentence Embeddings with Prompt-based Contrastive Learning and Energy-based
        Learning, 2022 (S044); numbers of the released scripts.
    """
    return simcse(x, y, hard, temperature=temperature) + energy * energy_hinge(x, y, hard, margin=margin)


def mcse(
    x: Tensor,
    y: Tensor,
    grounded_x: Tensor,
    grounded_y: Tensor,
    image: Tensor,
    *,
    image_weight: float = 0.05,
    temperature: float = 0.05,
) -> Tensor:
    """MCSE: SimCSE, and both views of a caption against its image in a space of their own.

    Equivalent to::

        both = info_nce(grounded_x, image) + info_nce(grounded_y, image)
        info_nce(x, y) + image_weight * both / 2

    Args:
        x: (N, D) two views of the sentences.
        y: as `x`.
        grounded_x: (N, D') their projections next to the images.
        grounded_y: as `grounded_x`.
        image: (N, D') the images.
        image_weight: 0.05 in the paper; 0.01 in the script of wiki and flickr.
        temperature: divides the cosines.

    Source:
        Zhang et al., MCSE, 2022 (S030); released code.
    """
    target = torch.arange(image.shape[0], device=image.device).repeat(2)
    grounded = torch.cat([grounded_x, grounded_y])
    of_images = info_nce(grounded, image, target=target, temperature=temperature)
    return info_nce(x, y, temperature=temperature) + image_weight * of_images


def sg_opt(x: Tensor, hidden: Tensor, *, temperature: float = 0.01) -> Tensor:
    """Self-guided contrast: a sentence against the layers of a frozen copy, each layer with a denominator of its own.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(hidden.flatten(0, 1)).T / temperature       # (N, N L)
        others = s.masked_fill(own_layers, -torch.inf).logsumexp(1)
        F.softplus(others[:, None] - s[own_layers].view(N, L)).mean()

    Args:
        x: (N, D) projected sentence vectors of the model that learns.
        hidden: (N, L, D) projected hidden states of the frozen copy, one for each layer.
        temperature: 0.01 in the paper.

    Source:
        Kim et al., Self-Guided Contrastive Learning for BERT Sentence Representations, 2021 (S025). The pull of the
        parameters to their start, 0.1 times the squared distance, is the caller's.
    """
    ids = torch.arange(x.shape[0], device=x.device)
    columns, of_columns = hidden.flatten(0, 1), ids.repeat_interleave(hidden.shape[1])
    return multi_positive_info_nce(x, ids, columns, of_columns, mean_over="pairs", temperature=temperature)


def dclr(
    x: Tensor,
    y: Tensor,
    noise: Tensor,
    guide_x: Tensor,
    guide_y: Tensor,
    *,
    threshold: float = 0.9,
    temperature: float = 0.05,
    released: bool = False,
) -> Tensor:
    """DCLR: SimCSE with noise as negatives, without negatives that a frozen model finds similar.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(torch.cat([y, noise])).T / temperature
        similar = F.normalize(guide_x) @ F.normalize(guide_y).T > threshold          # never of noise, nor one's own
        F.cross_entropy(s.masked_fill(similar, -torch.inf), torch.arange(N))
        p = s.masked_fill(similar, 0).softmax(1)                                     # released=True
        F.binary_cross_entropy(p, torch.eye(N, N + K))

    Args:
        x: (N, D) two views of the sentences.
        y: as `x`.
        noise: (K, D) more negatives; see `dclr_noise`.
        guide_x: (N, D') the same sentences by a frozen model.
        guide_y: as `guide_x`.
        threshold: 0.9 for BERT, 0.85 for RoBERTa.
        released: as the released code, which sets logits to 0 and sums log(1 - p) of all negatives.
        temperature: divides the cosines.

    Source:
        Zhou et al., Debiased Contrastive Learning of Unsupervised Sentence Representations, 2022 (S027).
    """
    a, b = wide(guide_x, True), wide(guide_y, True)
    if not released:
        return info_nce(x, y, noise, pairs=Pairs(guide=Guide(a, b, below=threshold)), temperature=temperature)

    def binary(logits: Tensor, rows: slice, _: slice, needs: bool) -> Part:
        similar = a[rows] @ b.T > threshold
        similar.diagonal(rows.start).fill_(False)
        logits[:, : len(b)].masked_fill_(similar, 0.0)
        found = binary_softmax(logits, rows.start, needs)
        if found.slopes is not None:
            found.slopes[:, : len(b)].masked_fill_(similar, 0.0)
        return found

    u, columns = wide(x, True) / temperature, wide(torch.cat([y, noise]), True)
    return sum_of_rows("dclr", binary, u, columns) / (u.shape[0] * columns.shape[0])


def dclr_noise(
    x: Tensor, y: Tensor, noise: Tensor, *, steps: int = 4, step_size: float = 1e-3, temperature: float = 0.05
) -> Tensor:
    """The noise of `dclr`, moved up the slope of SimCSE's loss; detached.

    Equivalent to::

        for _ in range(steps):
            g = torch.autograd.grad(info_nce(x, y, noise), noise)
            noise = noise + step_size * F.normalize(g)

    Args:
        x: (N, D) two views of the sentences.
        y: as `x`.
        noise: (K, D) normal numbers; K is 1 to 5 times N.
        steps: 4 steps of length 1e-3.
        step_size: as `steps`.
        temperature: divides the cosines.

    Source:
        Zhou et al., 2022 (S027); released code, whose rows of NaN stay where they are.
    """
    x, y = x.detach(), y.detach()
    for _ in range(checks.integer("dclr_noise", "steps", steps, 0)):
        with torch.enable_grad():
            noise = noise.detach().requires_grad_()
            (slope,) = torch.autograd.grad(info_nce(x, y, noise, temperature=temperature), noise)
        noise = noise + step_size * normalize(slope).nan_to_num(0.0)
    return noise.detach()


def clhaif(
    x: Tensor, y: Tensor, hard: Tensor, scores: Tensor, *, smooth: str = "positive", temperature: float = 0.05
) -> Tensor:
    """CLHAIF: supervised SimCSE whose positives are as good as a language model says.

    Equivalent to::

        log_p = (F.normalize(x) @ F.normalize(torch.cat([y, hard])).T / temperature).log_softmax(1)
        own, others = log_p.diagonal(), (log_p.sum(1) - log_p.diagonal()) / (2 * N - 1)
        -(scores * own).mean()                                      # smooth="positive"
        -(scores * own + (1 - scores) * others).mean()              # smooth="all"

    Args:
        x: (N, D) sentences, their positives and hard negatives.
        y: as `x`.
        hard: as `x`.
        scores: (N,) in [0, 1]: of each positive pair; differentiable.
        smooth: "positive", the default of the scripts, or "all".
        temperature: divides the cosines.

    Source:
        Cheng et al., Improving Contrastive Learning of Sentence Embeddings from AI Feedback, 2023 (S038). The released
        code gives a score of exactly 0 to the own column as to the others.
    """
    checks.check_choice("clhaif", "smooth", smooth, ("positive", "all"))
    if smooth == "all":
        return info_nce(x, y, hard, label_smoothing=1 - scores, smooth="others", temperature=temperature)
    losses = info_nce(x, y, hard, temperature=temperature, reduction="none")
    return (scores * losses).mean()


def whitened_cse(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    groups: int = 128,
    head: Callable[[Tensor], Tensor] | None = None,
    temperature: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """WhitenedCSE: three views, each whitened in shuffled groups of dimensions; one InfoNCE for each positive.

    Equivalent to::

        x, first, second = (head(group_whiten(each, groups, shuffle=True)) for each in (x, first, second))
        info_nce(x, first) + info_nce(x, second)

    Args:
        x: (N, D) three views of the sentences.
        first: as `x`.
        second: as `x`.
        groups: 128 in the released code, 6 dimensions each.
        head: what comes between whitening and loss: a linear layer with tanh in the paper.
        generator: of the shuffles.
        temperature: divides the cosines.

    Source:
        Zhuo et al., WhitenedCSE, 2023 (S098). The paper has no eps; `group_whiten` adds 1e-5 to variances.
    """
    views = [group_whiten(each, groups, shuffle=True, generator=generator) for each in (x, first, second)]
    x, first, second = views if head is None else [head(each) for each in views]
    return info_nce(x, first, temperature=temperature) + info_nce(x, second, temperature=temperature)


def quick_thought(x: Tensor, y: Tensor, *, width: int = 1) -> Tensor:
    """Quick-Thought: a sentence must find its neighbours among consecutive sentences; raw inner products.

    Equivalent to::

        s = (x @ y.T).fill_diagonal_(0)                              # 0, not -inf: it stays in the denominator
        near = (abs(i - j) <= width) & (i != j)
        F.cross_entropy(s, near / near.sum(1, keepdim=True))

    Args:
        x: (N, D) consecutive sentences by two encoders.
        y: as `x`.
        width: how far neighbours are; 1 in the paper.

    Source:
        Logeswaran and Lee, An efficient framework for learning sentence representations, 2018 (S019); released code.
    """
    width, size = checks.integer("quick_thought", "width", width, 1), x.shape[0]
    steps = torch.tensor([step for step in range(-width, width + 1) if step], device=x.device)
    columns = torch.arange(size, device=x.device)[:, None] + steps
    inside = (columns >= 0) & (columns < size)
    counts = inside.sum(1)
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    shares = (1 / counts.to(torch.float64))[:, None].expand(columns.shape)[inside].to(x.dtype)
    zeros = Pairs(diagonal=0, fill=0.0)
    return soft_info_nce(x, y, (indptr, columns[inside], shares), pairs=zeros, temperature=1.0, normalize=False)


def cluster_ns(
    x: Tensor,
    y: Tensor,
    centroids: Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 0.5,
    weight: float = 1e-4,
    temperature: float = 0.05,
) -> Tensor:
    """ClusterNS: second-nearest centroids are hard negatives, and rows of one cluster stay within two margins.

    Equivalent to::

        nearest = (F.normalize(x) @ F.normalize(centroids).T).topk(2).indices
        d = s - s.diagonal()[:, None]                               # s: cosines of x and y
        near = (nearest[:, :1] == nearest[:, 0]) & ~torch.eye(N, dtype=torch.bool)
        bounds = (near * d + alpha).relu() + (-near * d - beta).relu()
        info_nce(x, y, centroids[nearest[:, 1]]) + weight * bounds.mean()

    Args:
        x: (N, D) two views of the sentences.
        y: as `x`.
        centroids: (K, D), 128 in the paper; they follow the rows by k-means with momentum. No gradient.
        alpha: 0.2, 0.5 and 1e-4 for RoBERTa; 0.1, 0.3 and 1e-5 for BERT with prompts.
        beta: as `alpha`.
        weight: as `alpha`.
        temperature: divides the cosines.

    Source:
        Deng et al., Clustering-Aware Negative Sampling for Unsupervised Sentence Representation, 2023 (S064). As in the
        released code the mean is over all N^2 pairs, of which those of other clusters give `alpha`.
    """
    a, b, centroids = wide(x, True), wide(y, True), centroids.detach()
    nearest = similarity_topk(x.detach(), centroids, 2, metric="cosine").indices
    loss = info_nce(x, y, centroids[nearest[:, 1]], temperature=temperature)
    cluster, own = nearest[:, 0], (a * b).sum(1)
    same, size = Pairs(diagonal=0, same=(cluster, cluster)), a.shape[0]
    folds = Fold("sum_relu", bias=alpha), Fold("sum_relu", bias=beta, negate=True)
    above, below = Sweep(("cluster_ns", "x", "y"), 1.0, same).fold(a, b, *folds, row_bias=-own).rows
    members = torch.bincount(cluster, minlength=centroids.shape[0])
    outside = size**2 - (members * (members - 1)).sum()
    return loss + weight * (above.sum() + below.sum() + alpha * outside) / size**2


def attention_information(first: Tensor, second: Tensor) -> Tensor:
    """miCSE's mutual information of two views' attention, by the correlation of its logarithms; subtracted from a loss.

    Equivalent to::

        rho = torch.stack([torch.corrcoef(torch.stack([a.log(), b.log()]))[0, 1] for a, b in zip(first, second)])
        -0.5 * (1 - rho**2).log().mean()

    Args:
        first: (N, T) positive attention weights of each sentence at the same T places (150 in the paper).
        second: as `first`.

    Source:
        Klein and Nabi, miCSE, 2023 (S026): ``simcse(x, y) - 5e-4 * scale * attention_information(a, b)``, where scale
        is the squared share of places that are not 0.
    """
    a, b = ((each.log() - each.log().mean(1, keepdim=True)) for each in (first, second))
    rho = (normalize(a) * normalize(b)).sum(1)
    return -0.5 * torch.log1p(-rho.square()).mean()


def consert(x: Tensor, y: Tensor, *, weight: float = 0.15, temperature: float = 0.1) -> Tensor:
    """ConSERT: NT-Xent as a sum of both views' means, next to a supervised loss.

    Equivalent to::

        s = lambda a, b: F.normalize(a) @ F.normalize(b).T / temperature
        others = lambda a: s(a, a).fill_diagonal_(-torch.inf)
        both = [torch.cat([s(x, y), others(x)], 1), torch.cat([s(y, x), others(y)], 1)]
        weight * sum(F.cross_entropy(each, torch.arange(N)) for each in both)

    Args:
        x: (N, D) two augmented views.
        y: as `x`.
        weight: 0.15, alone or next to cross-entropy on labels.
        temperature: divides the cosines.

    Source:
        Yan et al., ConSERT, 2021 (S075); released code, which adds both means, while `nt_xent` is the mean of all 2 N.
    """
    return 2 * weight * nt_xent(x, y, temperature=temperature)
