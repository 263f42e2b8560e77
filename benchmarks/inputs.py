"""Embeddings that look like those of a model in training, made from a fixed seed.

Independent normal vectors would not do: at D=512 their similarities are all near zero, the loss is
log N, every softmax weight is the same, and rounding errors have nothing to act on. Here the pairs
of a batch are correlated and negatives come in clusters, so the loss lies between 0.3 and 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Case, Inputs

CLUSTER_SIZE = 64
# Mean similarity of a query and the row of the corpus that answers it.
RELEVANT = 0.5
# Length of the rows that meet the unit rows of a vocabulary.
LOGIT_SIZE = 27.0
# Of search_with_rules: columns that each query excludes, and queries of which one has a wrong positive.
EXCLUDED, PER_WRONG = 8, 32
# Rows of +1 and -1: with a power of 4 their length is a power of 2, and cosines are exact in float32.
GUIDE_DIM = 256


def _unit_rows(n: int, d: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=generator), dim=1)


def views_of_things(n: int, d: int, *, cosine: float, views: int = 2, seed: int = 0) -> list[Tensor]:
    """Views (n, d) of n things, float32 with unit rows.

    Args:
        n: rows of each view.
        d: dimension.
        cosine: mean similarity of two views of one thing; members of one cluster, of about 64, have
            a third of it.
        views: how many.
        seed: of the generator; the things and their clusters depend on it, n and d alone.
    """
    generator = torch.Generator().manual_seed(seed)
    clusters = max(1, n // CLUSTER_SIZE)
    centres = _unit_rows(clusters, d, generator)
    labels = torch.randint(clusters, (n,), generator=generator)
    shared = (1 / 3) ** 0.5 * centres[labels] + (2 / 3) ** 0.5 * _unit_rows(n, d, generator)
    found = []
    for _ in range(views):
        noise = _unit_rows(n, d, generator)
        found.append(F.normalize(cosine**0.5 * shared + (1 - cosine) ** 0.5 * noise, dim=1))
    return found


def paired_case_inputs(
    case: Case,
    names: tuple[str, str],
    *,
    cosine: float,
    learned: dict[str, float] | None = None,
    constants: dict[str, float] | None = None,
    unit: bool = True,
) -> Inputs:
    """The two views under the case's argument names, in its dtype, on its device.

    Args:
        case: gives N, D, dtype, device and copies.
        names: argument names of the two views.
        cosine: see :func:`views_of_things`.
        learned: numbers that training learns (a scale): 0-d float32 tensors with a gradient.
        constants: numbers that it does not.
        unit: False gives rows of different lengths, for losses that normalise themselves.
    """
    views = views_of_things(_rows(case), case.shapes["D"], cosine=cosine)
    tensors: dict[str, Tensor] = {}
    for name, view in zip(names, views, strict=True):
        if not unit:
            view = _of_many_lengths(view)
        tensors[name] = view.repeat(case.copies, 1).to(case.device, case.dtype)
    for name, value in (learned or {}).items():
        tensors[name] = torch.tensor(value, device=case.device)
    return Inputs(tensors, dict(constants or {}), case.copies)


def taught_inputs(
    case: Case, names: tuple[str, str], *, cosine: float, teacher_cosine: float, constants: dict[str, float]
) -> Inputs:
    """The two views by a student under the argument names, and the same things by a teacher under ``teacher_<name>``.

    Args:
        case: gives N, D, dtype and device.
        names: argument names of the two views.
        cosine: mean similarity of the student's two views of one thing; see :func:`views_of_things`.
        teacher_cosine: that of the teacher's, of the same things.
        constants: numbers that training does not learn.
    """
    sides = [views_of_things(case.shapes["N"], case.shapes["D"], cosine=each) for each in (cosine, teacher_cosine)]
    student, teacher = (dict(zip(names, views, strict=True)) for views in sides)
    frozen = {f"teacher_{name}": view for name, view in teacher.items()}
    return Inputs(_on(case, student, case.dtype), constants, frozen=_on(case, frozen, case.dtype))


def labelled_case_inputs(
    case: Case, name: str, *, per_class: int, cosine: float, constants: dict[str, float] | None = None
) -> Inputs:
    """One matrix of rows of different lengths under the argument name, and their ``labels``.

    Args:
        case: gives N, D, dtype, device and copies.
        name: argument name of the matrix.
        per_class: views of each thing, which share its label.
        cosine: see :func:`views_of_things`.
        constants: numbers that training does not learn.
    """
    things = _rows(case) // per_class
    views = views_of_things(things, case.shapes["D"], cosine=cosine, views=per_class)
    x = _of_many_lengths(torch.cat(views)).repeat(case.copies, 1).to(case.device, case.dtype)
    labels = torch.arange(things, device=case.device).repeat(per_class * case.copies)
    return Inputs({name: x}, dict(constants or {}), case.copies, {"labels": labels})


def guide_embeddings(case: Case, names: tuple[str, str], *, cosine: float) -> dict[str, Tensor]:
    """Embeddings (N, 256) of the case's pairs by another model, under the argument names.

    They are the signs of random projections of two more views of the same things. So all cosines
    are multiples of 1/128 and exact in every order of summation: who compares them with a bound
    decides as all others do, where one pair decided otherwise would spoil the comparison of errors.
    """
    generator = torch.Generator().manual_seed(1)
    projection = torch.randn(case.shapes["D"], GUIDE_DIM, generator=generator)
    # The first two views have the noise of the case's own.
    views = views_of_things(_rows(case), case.shapes["D"], cosine=cosine, views=4)[2:]
    signs = (torch.where(view @ projection > 0, 1.0, -1.0) for view in views)
    return {name: each.to(case.device) for name, each in zip(names, signs, strict=True)}


def search_inputs(case: Case) -> Inputs:
    """Unit rows: a ``corpus`` (M, D) in clusters and a ``query`` (N, D) for each of N different rows of it."""
    query, corpus, _ = _search(case)
    tensors = {"query": query.to(case.device, case.dtype), "corpus": corpus.to(case.device, case.dtype)}
    return Inputs(tensors, {"k": case.shapes["k"]})


def search_with_rules(case: Case, *, margin: float) -> Inputs:
    """A search for hard negatives: each query excludes its relevant rows and has a bound from its positive.

    ``excluded`` (N, 8) are the positive of each query and the seven rows that are most similar to it
    otherwise, ``bound`` (N,) is the similarity p of the positive less ``margin`` times ``|p|``. One query
    in 32 has a row as its positive that 10 k others or more outrank, as labels of real data have:
    who searches for 10 k columns and filters then finds too few for it, though half the corpus is left.

    Rows are rounded so that inner products are exact (see :func:`_on_grid`): everybody sees the
    same pairs below the bound.
    """
    k = case.shapes["k"]
    query, corpus, positive = _search(case)
    query, corpus = _on_grid(query), _on_grid(corpus)
    scores = query @ corpus.T
    wrong = torch.arange(0, len(query), PER_WRONG)
    ranks = torch.linspace(10 * k, len(corpus) // 2, len(wrong)).long()
    positive[wrong] = scores[wrong].sort(dim=1, descending=True).indices.gather(1, ranks[:, None]).squeeze(1)
    p = scores.gather(1, positive[:, None])
    others = scores.scatter(1, positive[:, None], -torch.inf).topk(EXCLUDED - 1).indices
    excluded = torch.cat([positive[:, None], others], 1).sort(1).values
    bound = (p - margin * p.abs()).squeeze(1)
    tensors = {"query": query.to(case.device, case.dtype), "corpus": corpus.to(case.device, case.dtype)}
    return Inputs(tensors, {"k": k}, frozen={"excluded": excluded.to(case.device), "bound": bound.to(case.device)})


def router_inputs(case: Case, constants: dict[str, float]) -> Inputs:
    """``logits`` (T, E) and the ``segments`` of the tokens; ``weight`` (T, k) stands for what follows the gates."""
    generator = torch.Generator().manual_seed(0)
    tokens, experts, k = (case.shapes[letter] for letter in "TEk")
    logits = (2 * torch.randn(tokens, experts, generator=generator)).to(case.dtype)
    while len(rows := _ties_of_the_best(logits, k)):  # who comes first is a matter of taste, and of gradients
        logits[rows] = (2 * torch.randn(len(rows), experts, generator=generator)).to(case.dtype)
    frozen = {
        "segments": (torch.arange(tokens) % 57 >= 49).long(),
        "weight": torch.randn(tokens, k, generator=generator),
    }
    if constants["noise_std"]:
        frozen["noise"] = torch.randn(tokens, experts, generator=generator)
    return Inputs({"logits": logits.to(case.device)}, dict(constants), frozen=_on(case, frozen))


def _ties_of_the_best(logits: Tensor, k: int) -> Tensor:
    """The rows in which two of the k + 1 largest numbers are equal, as rounding to 16 bits makes them."""
    best = logits.float().topk(min(k + 1, logits.shape[1]), dim=1).values
    return (best.diff(dim=1) == 0).any(1).nonzero().squeeze(1)


def grouped_inputs(case: Case) -> Inputs:
    """``rows`` (E T, D), a ``weight`` (E, D, F) for each group of T, their ``offsets``, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    experts, each, dim, hidden = (case.shapes[letter] for letter in "ETDF")
    tensors = {
        "rows": torch.randn(experts * each, dim, generator=generator),
        "weight": torch.randn(experts, dim, hidden, generator=generator) / dim**0.5,
    }
    frozen = {
        "offsets": each * torch.arange(experts + 1),
        "upstream": torch.randn(experts * each, hidden, generator=generator),
    }
    return Inputs(_on(case, tensors, case.dtype), frozen=_on(case, frozen))


def layer_inputs(case: Case) -> Inputs:
    """``tokens`` (T, D), the weight of a ``router`` (E, D), gated experts ``up`` (E, 2 F, D) and ``down`` (E, D, F)."""
    generator = torch.Generator().manual_seed(0)
    tokens, dim, hidden, experts = (case.shapes[letter] for letter in "TDFE")
    tensors = {
        "tokens": torch.randn(tokens, dim, generator=generator),
        "router": torch.randn(experts, dim, generator=generator) / dim**0.5,
        "up": torch.randn(experts, 2 * hidden, dim, generator=generator) / dim**0.5,
        "down": torch.randn(experts, dim, hidden, generator=generator) / hidden**0.5,
    }
    upstream = torch.randn(tokens, dim, generator=generator)
    return Inputs(_on(case, tensors, case.dtype), frozen=_on(case, {"upstream": upstream}))


def token_inputs(case: Case, *, ragged: bool) -> Inputs:
    """``queries`` (N, A, D) and ``documents`` (M, B, D) in unit tokens, and the ``weight`` (N, M) of each score.

    Tokens are views of things in clusters, those of query i views of tokens of document i. ``ragged``: a ``mask``
    (M, B) of documents of 10% to all of B tokens, in no order.
    """
    generator = torch.Generator().manual_seed(0)
    n, of_query, m, of_document, d = (case.shapes[letter] for letter in "NAMBD")
    tokens, like_it = views_of_things(m * of_document, d, cosine=RELEVANT)
    documents, others = tokens.view(m, of_document, d), like_it.view(m, of_document, d)
    tensors = {"queries": others[:n, :of_query].contiguous(), "documents": documents}
    own = torch.eye(n, m)
    frozen = {"weight": torch.rand(n, m, generator=generator) / m - own}
    if ragged:
        length = torch.randint(of_document // 10, of_document + 1, (m, 1), generator=generator)
        frozen["mask"] = torch.arange(of_document) < length
    return Inputs(_on(case, tensors, case.dtype), frozen=_on(case, frozen))


def vocabulary_inputs(case: Case, *, reference: bool = False, constants: dict[str, float] | None = None) -> Inputs:
    """``hidden`` (T, D), ``weight`` (V, D) and ``labels`` (T,) of a language model that has learned: a loss near 1.

    ``reference``: also ``reference_hidden`` and ``reference_weight`` of the model that it was a while ago, which nobody
    differentiates.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, words, d = (case.shapes[letter] for letter in "TVD")
    labels = torch.randint(words, (tokens,), generator=generator)
    weight = _unit_rows(words, d, generator)
    hidden = LOGIT_SIZE * F.normalize(weight[labels] / 2 + _unit_rows(tokens, d, generator), dim=1)
    tensors = {"hidden": hidden, "weight": weight}
    before = {}
    if reference:
        before = {
            f"reference_{name}": rows + rows.norm(dim=1, keepdim=True) * _unit_rows(rows.shape[0], d, generator) / 8
            for name, rows in tensors.items()
        }
    frozen = {"labels": labels.to(case.device), **_on(case, before, case.dtype)}
    return Inputs(_on(case, tensors, case.dtype), dict(constants or {}), frozen=frozen)


def _on(case: Case, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: tensor.to(case.device, dtype or tensor.dtype) for name, tensor in tensors.items()}


def _search(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, corpus, and the row of the corpus that answers each query."""
    rows = case.shapes["M"]
    corpus, like_it = views_of_things(rows, case.shapes["D"], cosine=RELEVANT)
    answer = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[: case.shapes["N"]]
    return like_it[answer], corpus, answer


def _on_grid(rows: Tensor) -> Tensor:
    """Unit rows rounded to multiples of 1/2048: float32 adds their products without error in every order.

    Products are multiples of 2^-22, and sums of them stay below 4, which is 2^24 such units.
    """
    return (2048 * rows).round() / 2048


def _rows(case: Case) -> int:
    """Rows of the case before they are copied."""
    if case.shapes["N"] % case.copies:
        raise ValueError(f"N must be a multiple of copies, got {case.shapes['N']} and {case.copies}")
    return case.shapes["N"] // case.copies


def _of_many_lengths(rows: Tensor) -> Tensor:
    return rows * torch.linspace(0.5, 2.0, len(rows))[:, None]
