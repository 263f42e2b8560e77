"""Recipes of papers by family: a call of each, and the folds that it rests on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_ops import Pairs, recipes, similarity_topk
from contrastive_ops.losses import group_whiten
from contrastive_ops.losses._sweep import Sweep
from contrastive_ops.ops import Guide, TokenSets, maxsim, stream_rows

DEPTH = 256

Side = Callable[[], Tensor]
Steps = dict[str, tuple[Side, Side]]


def inputs(rows: int) -> dict[str, Tensor]:
    """Unit rows that learn, labels, and rows of a teacher."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    found = {name: drawn(rows, DEPTH).requires_grad_() for name in ("x", "y", "z")}
    found["private"] = drawn(rows, 4, DEPTH).requires_grad_()
    # Of a few hundred texts.
    found["tokens"], found["others"] = (drawn(rows // 32, 16, DEPTH).requires_grad_() for _ in range(2))
    found |= {"teacher": drawn(rows, DEPTH), "queue": drawn(rows, DEPTH)}
    found["scores"] = torch.rand(rows, generator=generator)
    found["shares"] = torch.rand(64, 64, generator=generator)
    found["labels"] = torch.randint(rows // 8, (rows,), generator=generator)
    return found


def fold(x: Tensor, y: Tensor | None = None, *, reduce: str = "logsumexp", pairs: Pairs | None = None) -> Tensor:
    """One sweep, and a gradient for every row."""
    return Sweep(("fold", "x", "y"), 20.0, pairs).fold(x, y, reduce).rows[0].sum()


def both_ways(x: Tensor, y: Tensor) -> Tensor:
    """One sweep of rows and columns."""
    found = Sweep(("fold", "x", "y"), 20.0).fold(x, y, "logsumexp", dim=(0, 1))
    return found.rows[0].sum() + found.cols[0].sum()


def of_sentences(t: dict[str, Tensor]) -> Steps:
    """SimCSE and what came of it."""
    x, y, z, private, teacher, queue = (t[name] for name in ("x", "y", "z", "private", "teacher", "queue"))
    labels, scores = t["labels"], t["scores"]
    guided = Pairs(guide=Guide(teacher, torch.cat([queue, torch.zeros_like(queue)]), below=0.9))

    def two() -> Tensor:
        return fold(x, torch.cat([y, z]))

    def near() -> Tensor:
        return fold(x, y, reduce="sum_relu", pairs=Pairs(diagonal=0, same=(labels, labels)))

    def every_view() -> Tensor:
        return fold(x, private.flatten(0, 1)) + fold(x, private.flatten(0, 1))

    def guided_two() -> Tensor:
        return fold(x, torch.cat([y, z]), pairs=guided)

    def whitened() -> Tensor:
        a, b, c = (group_whiten(each, 32) for each in (x, y, z))
        return fold(a, b) + fold(a, c)

    return {
        "simcse": (lambda: recipes.simcse(x, y), lambda: fold(x, y)),
        "simcse hard": (lambda: recipes.simcse(x, y, z), two),
        "simcse weighted": (lambda: recipes.simcse(x, y, z, hard_weight=0.5), two),
        "promcse": (lambda: recipes.promcse(x, y, z), lambda: two() + fold(x, torch.cat([y, z]), reduce="max")),
        "mcse": (lambda: recipes.mcse(x, y, y, z, x), lambda: fold(x, y) + fold(torch.cat([y, z]), x)),
        "sg_opt": (lambda: recipes.sg_opt(x, private), every_view),
        "clhaif": (lambda: recipes.clhaif(x, y, z, scores), two),
        "clhaif all": (lambda: recipes.clhaif(x, y, z, scores, smooth="all"), two),
        "quick_thought": (lambda: recipes.quick_thought(x, y), lambda: fold(x, y)),
        "cluster_ns": (lambda: recipes.cluster_ns(x, y, queue[:128]), lambda: two() + near() + near()),
        "consert": (lambda: recipes.consert(x, y), lambda: fold(torch.cat([x, y]))),
        "whitened_cse": (lambda: recipes.whitened_cse(x, y, z, groups=32), whitened),
        "dclr": (lambda: recipes.dclr(x, y, z, teacher, queue), guided_two),
        "dclr released": (lambda: recipes.dclr(x, y, z, teacher, queue, released=True), guided_two),
    }


def of_retrieval(t: dict[str, Tensor]) -> Steps:
    """Queries, passages and their negatives."""
    x, y, z, private, queue, scores = (t[name] for name in ("x", "y", "z", "private", "queue", "scores"))

    def targets() -> Tensor:
        both = torch.cat([x, y], 1).detach()
        for bias in (None, scores):
            similarity_topk(both, both, 1, col_bias=bias)
        return fold(x, y) + fold(y, x) + fold(both)

    def of_lists() -> Tensor:
        # What one product of each row with its own negatives takes, there and back.
        return torch.einsum("nd,nkd->nk", x, private).logsumexp(1).sum() + (x * y).sum()

    def pulled() -> Tensor:
        a, b = (F.normalize(each.flatten(0, 1), dim=1) for each in (private, private.flip(1)))
        return of_lists() + (a - b).square().sum()

    return {
        "dpr": (lambda: recipes.dpr(x, y), lambda: fold(x, y)),
        "ance": (lambda: recipes.ance(x, y, private), of_lists),
        "clp": (lambda: recipes.clp(x, y, private, private.flip(1)), pulled),
        "contriever": (lambda: recipes.contriever(x, y, queue), lambda: fold(x, queue)),
        "simlm": (
            lambda: recipes.simlm(x, private[:, :2]),
            lambda: fold(torch.cat([x, private[:, 0]])) + fold(x, private[:, 1]),
        ),
        "pair": (lambda: recipes.pair(x, y, z), lambda: fold(x, torch.cat([y, z])) + fold(y, torch.cat([x, z]))),
        "confit": (
            lambda: recipes.confit(x, y, z, private[:, 0]),
            lambda: both_ways(x, y) + fold(x, z) + fold(y, private[:, 0]),
        ),
        "mnr_plus": (lambda: recipes.mnr_plus(x, y), targets),
        "superflow": (
            lambda: recipes.superflow(x, y, torch.arange(len(x)), torch.arange(len(x)), len(x)),
            lambda: fold(x, y),
        ),
    }


def of_tokens(t: dict[str, Tensor]) -> Steps:
    """Words of a vocabulary, and tokens that meet."""
    x, y, z, queue, tokens, others = (t[name] for name in ("x", "y", "z", "queue", "tokens", "others"))
    words, of_others = (
        torch.randint(64, each.shape[:2], generator=torch.Generator().manual_seed(1)) for each in (tokens, others)
    )
    texts = torch.randint(4096, (2, len(x) // 4, 16), generator=torch.Generator().manual_seed(2))
    weights = [each[: len(x) // 4, :16].detach().abs().requires_grad_() for each in (x, y)]
    pair_of = torch.arange(tokens.shape[0]).repeat_interleave(tokens.shape[1])
    flat = tokens.flatten(0, 1), others.flatten(0, 1)

    def best_of_documents(dots: Tensor, _: slice) -> Tensor:
        return dots.unflatten(1, others.shape[:2]).amax(2)

    def differences() -> Tensor:
        return sum((each.sum() for each in recipes.token_differences(*flat, pair_of, pair_of)), x.new_zeros(()))

    @torch.no_grad()
    def both_nearest() -> Tensor:
        sweep = Sweep(("fold", "x", "y"), 1.0, Pairs(same=(pair_of, pair_of)))
        found = sweep.fold(*(F.normalize(each, dim=1) for each in flat), "max", dim=(0, 1))
        return found.rows[0].sum() + found.cols[0].sum()

    def over_words() -> Tensor:
        rows, columns = (each.new_zeros(len(each), 4096) for each in weights)
        return fold(rows.scatter_add(1, texts[0], weights[0]), columns.scatter_reduce(1, texts[1], weights[1], "amax"))

    return {
        "splade": (lambda: recipes.splade(x.abs(), y.abs(), z.abs()), lambda: fold(x, y)),
        "splade_head": (
            lambda: recipes.splade_head(tokens, queue.requires_grad_()).sum(),
            lambda: maxsim(queue.requires_grad_()[:, None], TokenSets(tokens)).sum(),
        ),
        "unicoil": (
            lambda: recipes.unicoil(texts[0], weights[0], texts[1], weights[1], vocabulary=4096, group=1),
            over_words,
        ),
        "coil_scores": (
            lambda: recipes.coil_scores(tokens, words, others, of_others).sum(),
            lambda: stream_rows(best_of_documents, *flat).sum(),
        ),
        "rcmd": (
            lambda: recipes.rcmd(tokens, others),
            lambda: maxsim(tokens, others).sum() + maxsim(others, tokens).sum(),
        ),
        "token_differences": (differences, both_nearest),
    }


def of_labels(t: dict[str, Tensor]) -> Steps:
    """Classes, items, and labels that are numbers."""
    x, y, queue, labels = (t[name] for name in ("x", "y", "queue", "labels"))
    few, shares = 64, t["shares"][:64, :64]

    def all_mixtures() -> Tensor:
        # The mixed positives, all at once: N^2 columns of each row.
        u, y = F.normalize(x[:few], dim=1), (labels[:few] % 16).float()
        logits, gap = (u @ u.detach().T) / 0.3, y[:, None] - y
        between = (gap > 0)[:, :, None] & (gap < 0)[:, None]
        part = (-gap[:, None] / (gap[:, :, None] - gap[:, None])).masked_fill(~between, 0.5)
        mixed = part * logits[:, :, None] + (1 - part) * logits[:, None]
        return mixed.masked_fill(~between, -torch.inf).flatten(1).logsumexp(1)[1:].sum() + (mixed * between).sum()

    return {
        "cosine_contrastive": (
            lambda: recipes.cosine_contrastive(x, labels),
            lambda: fold(x, reduce="sum_relu", pairs=Pairs(differ=(labels, labels))),
        ),
        "fedsa": (
            lambda: recipes.fedsa(x, labels % 128, queue[:128].requires_grad_(), 0.5),
            lambda: fold(x, queue[:128].requires_grad_()) + F.mse_loss(x, queue[labels % 128]),
        ),
        "supremix": (lambda: recipes.supremix(x[:few], labels[:few] % 16, shares), all_mixtures),
        "unisrec": (lambda: recipes.unisrec(x, y, labels), lambda: fold(x, y)),
        "mclrec": (
            lambda: recipes.mclrec_regularizer(x, y),
            lambda: fold(torch.cat([x, y]), reduce="max") + fold(torch.cat([x, y]), reduce="sum"),
        ),
    }


def of_others(t: dict[str, Tensor]) -> Steps:
    """Teachers, regularisers, goals."""
    x, y, z, teacher, queue = (t[name] for name in ("x", "y", "z", "teacher", "queue"))

    def autoencoder() -> Tensor:
        codes = (x - queue[0]) @ queue.T + queue[:, 0]
        values, places = codes.topk(32, 1)
        kept = [torch.zeros_like(codes).scatter(1, places[:, :n], values[:, :n]).relu() for n in (8, 32)]
        return sum((F.mse_loss(each @ queue + queue[0], x) for each in kept), fold(F.normalize(kept[0])))

    def statistics() -> Tensor:
        # Distances, and of each side of both terms the spread of the dimensions and their products.
        found = 25 * (F.mse_loss(x, teacher) + F.mse_loss(y, queue))
        for each in (x, teacher, y, queue):
            centred = each - each.mean(0)
            products = centred.T @ centred / (len(each) - 1)
            spread = (1 - (products.diagonal() + 1e-4).sqrt()).relu().mean()
            found = found + spread + (products.square().sum() - products.diagonal().square().sum()) / DEPTH
        return found

    return {
        "proclip": (lambda: recipes.proclip(x, teacher), lambda: fold(x) + fold(teacher.requires_grad_())),
        "static_embedding_kd": (
            lambda: recipes.static_embedding_kd(x, teacher),
            lambda: fold(x) + fold(teacher.requires_grad_()),
        ),
        "csr": (lambda: recipes.csr(x, queue, queue[:, 0], queue[0], k=8), autoencoder),
        "unsee": (lambda: recipes.unsee(x, y, queue, teacher), statistics),
        "align_uniform": (lambda: recipes.align_uniform(x, y), lambda: fold(x) + fold(y)),
        "laeo": (lambda: recipes.laeo(x, y), lambda: fold(x, y, reduce="sum_softplus")),
        "laeo cpc": (lambda: recipes.laeo(x, y, kind="cpc"), lambda: fold(x, y)),
    }


def steps(t: dict[str, Tensor]) -> Steps:
    """Each recipe whose code was read, and its folds; for those that compare no rows, the products they rest on."""
    return of_sentences(t) | of_retrieval(t) | of_tokens(t) | of_labels(t) | of_others(t)
