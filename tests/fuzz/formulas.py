"""Losses of the registry as their papers write them, with whole matrices: nothing here calls the package.

A formula takes the tensors of an entry of `LOSSES` and its options, and returns a number for each row of the loss,
before weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import test_losses_distillation
import test_losses_hardness
import test_losses_linear_targets
import test_losses_margin
import test_losses_multi_positive
import test_losses_partition
import test_losses_preference
import test_losses_rank_distillation
import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = dict[str, Tensor]
Options = Mapping[str, Any]
Formula = Callable[[Inputs, Options], Tensor]
INF = torch.inf


def unit(t: Tensor) -> Tensor:
    return F.normalize(t, dim=-1)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.bool)


def by_row(scale: Tensor) -> Tensor:
    return scale[:, None] if scale.dim() else scale


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Which ids are equal; -1 equals nothing."""
    return (a[:, None] == b) & (a[:, None] >= 0)


def cross_entropy(logits: Tensor, target: Tensor | None = None, share: Any = 0.0) -> Tensor:
    """By rows; with a share that is spread over all columns that take part, its own among them."""
    target = torch.arange(len(logits)) if target is None else target
    keep = logits > -INF
    lse, own = logits.logsumexp(1), logits.gather(1, target[:, None])[:, 0]
    mean = logits.masked_fill(~keep, 0.0).sum(1) / keep.sum(1)
    return lse - (1 - share) * own - share * mean


# ---- A softmax over columns ----------------------------------------------------------------------------------------


def info_nce(i: Inputs, o: Options) -> Tensor:
    normalize, n = o.get("normalize", True), len(i["query"])
    query, key = (unit(i[name]) if normalize else i[name] for name in ("query", "key"))
    own, target = (query * key[:n]).sum(1, keepdim=True), i.get("target")
    columns = unit(i["negatives"]) if normalize and "negatives" in i else i.get("negatives")
    dots = query @ key.T if o.get("in_batch", True) else own
    target = (torch.arange(n) if dots is not own else torch.zeros(n, dtype=torch.int64)) if target is None else target
    drop = torch.zeros_like(dots, dtype=torch.bool)
    is_own = F.one_hot(target, dots.shape[1]).bool()
    if "ids" in i:  # equal ids, or alike, are no negatives
        drop = (equal(i["ids"], i["ids"]) | (dots > 0.8)) & ~is_own
    if "pairs" in o:
        drop = (dots > 0.9) & ~is_own
    dots = dots - o.get("margin", 0.0) * is_own.to(dots.dtype)
    parts, drops = [by_row(i["scale"]) * dots], [drop]
    if columns is not None:
        found = query @ columns.T
        parts.append(by_row(i["scale"]) * found)
        drops.append(found < -0.9 if "negative_pairs" in o else torch.zeros_like(found, dtype=torch.bool))
        if o.get("hardness"):  # importance of shared negatives: their logits' softmax, times their number
            raise NotImplementedError
    if "row_negatives" in i:
        rows = unit(i["row_negatives"]) if normalize else i["row_negatives"]
        found = by_row(i["scale"]) * (rows * query[:, None]).sum(-1)
        parts.append(found + i["row_negative_bias"][:, None] if "row_negative_bias" in i else found)
        drops.append(torch.zeros_like(found, dtype=torch.bool))
    logits = torch.cat(parts, 1).masked_fill(torch.cat(drops, 1), -INF)
    share = i.get("label_smoothing", o.get("label_smoothing", 0.0))
    if o.get("smooth") == "others":
        keep = (logits > -INF).scatter(1, target[:, None], False)
        mean = logits.masked_fill(~keep, 0.0).sum(1) / keep.sum(1)
        rows = cross_entropy(logits, target) * (1 - share) + share * (logits.logsumexp(1) - mean)
    else:
        rows = cross_entropy(logits, target, share)
    return rows + o.get("z_loss", 0.0) * logits.logsumexp(1).square()


def clip(i: Inputs, o: Options) -> Tensor:
    image, text = unit(i["image"]), unit(i["text"])
    dots = image @ text.T
    drop = (equal(i["ids"], i["ids"]) | (dots > 0.8)) & ~eye(len(dots)) if "ids" in i else torch.zeros_like(dots) > 0
    logits = (i["scale"] * dots).masked_fill(drop, -INF)
    share = i.get("label_smoothing", o.get("label_smoothing", 0.0))
    rows, cols = logits, logits.T
    if "text_negatives" in i:
        rows = torch.cat([rows, i["scale"] * image @ unit(i["text_negatives"]).T], 1)
        cols = torch.cat([cols, i["scale"] * text @ unit(i["image_negatives"]).T], 1)
    return (cross_entropy(rows, share=share) + cross_entropy(cols, share=share)) / 2


def _both_views(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of two views, the number of each partner, and which pairs take part: not a row with itself."""
    z = unit(torch.cat([i["z0"], i["z1"]]))
    dots, n = z @ z.T, len(i["z0"])
    partner = torch.arange(2 * n).roll(n)
    keep = ~eye(2 * n)
    if "ids" in i:
        ids = i["ids"].repeat(2)
        keep = keep & (~(equal(ids, ids) | (dots > 0.8)) | F.one_hot(partner, 2 * n).bool())
    return i["scale"] * dots, partner, keep, dots


def nt_xent(i: Inputs, o: Options) -> Tensor:
    logits, partner, keep, _ = _both_views(i)
    return cross_entropy(logits.masked_fill(~keep, -INF), partner)


def _labelled(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, positives and all other columns."""
    x, columns = unit(i["x"]), unit(i.get("y", i["x"]))
    same = equal(i["labels"], i.get("col_labels", i["labels"]))
    own = torch.zeros_like(same) if "y" in i else eye(len(x))
    return x @ columns.T, same & ~own, ~same & ~own


def sup_con(i: Inputs, o: Options) -> Tensor:
    dots, positive, negative = _labelled(i)
    logits = (by_row(i["scale"]) * dots).masked_fill(~(positive | negative), -INF)
    log_p = logits - logits.logsumexp(1, keepdim=True)
    count = positive.sum(1)
    if o.get("positives") == "log_mean":
        rows = count.to(log_p.dtype).log() - log_p.masked_fill(~positive, -INF).logsumexp(1)
    else:
        rows = -log_p.masked_fill(~positive, 0.0).sum(1) / count.clamp_min(1)
    return torch.where(count > 0, rows, 0.0)


def multi_positive_info_nce(i: Inputs, o: Options) -> Tensor:
    dots, positive, negative = _labelled(i)
    columns = [[torch.nonzero(row).flatten().tolist() for row in mask] for mask in (positive, negative)]
    return test_losses_multi_positive.dense_multi_positive(by_row(i["scale"]) * dots, *columns)


def soft_info_nce(i: Inputs, o: Options) -> Tensor:
    logits = by_row(i["scale"]) * unit(i["query"]) @ unit(i["key"]).T
    shares = torch.zeros_like(logits).scatter(1, i["indices"], i["shares"].to(logits.dtype))
    share = i["label_smoothing"][:, None]
    return -(((1 - share) * shares + share / logits.shape[1]) * logits.log_softmax(1)).sum(1)


def moco(i: Inputs, o: Options) -> Tensor:
    query = unit(i["query"])
    others = query @ unit(i["queue"]).T
    drop = equal(i["labels"], i["queue_labels"]) if "labels" in i else torch.zeros_like(others) > 0
    logits = by_row(i["scale"]) * torch.cat([(query * unit(i["key"])).sum(1, keepdim=True), others], 1)
    drop = F.pad(drop, (1, 0))
    return cross_entropy(logits.masked_fill(drop, -INF), torch.zeros(len(query), dtype=torch.int64))


def gte(i: Inputs, o: Options) -> Tensor:
    directions = o.get("directions", ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"))
    options = {"partition": o.get("partition", "joint"), "margin": o.get("false_negative_margin")}
    given = i["query"], i["document"], i.get("negatives"), i["scale"]
    return test_losses_partition.dense_gte(*given, directions, **options)


def gist(i: Inputs, o: Options) -> Tensor:
    guides = i["guide_query"], i["guide_key"], i.get("guide_negatives")
    relative = o.get("margin_strategy") == "relative"
    given = i["query"], i["key"], guides, i.get("negatives"), i["scale"], o["margin"], relative
    return test_losses_partition.dense_gist(*given, True, True)


def matryoshka(kind: Callable[[Inputs, Options], Tensor]) -> Formula:
    """The sum over prefixes; `dims` as the registry chooses them."""

    def formula(i: Inputs, o: Options) -> Tensor:
        depth = next(iter(i.values())).shape[1]
        dims = sorted({1, depth // 3, max(depth - 1, 0)} - {0})
        rows = 0.0
        for d in dims:
            cut = {n: t[:, :d] if n in ("query", "key", "image", "text", "z0", "z1") else t for n, t in i.items()}
            rows = rows + kind(cut, o)
        return rows

    return formula


def _prefix_clip(i: Inputs, o: Options) -> Tensor:
    logits = i["scale"] * unit(i["image"]) @ unit(i["text"]).T
    if "ids" in i:
        logits = logits.masked_fill(equal(i["ids"], i["ids"]) & ~eye(len(logits)), -INF)
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


# ---- Negatives that weigh what they are like -----------------------------------------------------------------------


def dcl(i: Inputs, o: Options) -> Tensor:
    return test_losses_hardness.dense_dcl(i["z0"], i["z1"], i["scale"], sigma=o.get("sigma"))


def debiased(i: Inputs, o: Options) -> Tensor:
    return test_losses_hardness.dense_hcl(i["z0"], i["z1"], i["scale"], 0.0, 0.1)


def hcl(i: Inputs, o: Options) -> Tensor:
    return test_losses_hardness.dense_hcl(i["z0"], i["z1"], i["scale"], 1.0, 0.1)


def hn_nce(i: Inputs, o: Options) -> Tensor:
    return test_losses_hardness.dense_hn_nce(i["image"], i["text"], i["scale"], 1.0, 0.25, normalize=True)


# ---- Sigmoids ------------------------------------------------------------------------------------------------------


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.softplus(logits, threshold=1e9) - labels * logits


def siglip(i: Inputs, o: Options) -> Tensor:
    dots = unit(i["image"]) @ unit(i["text"]).T
    own = eye(len(dots))
    losses = bce(i["scale"] * dots + i["bias"], own.to(dots.dtype))
    if "ids" in i:
        losses = losses.masked_fill((equal(i["ids"], i["ids"]) | (dots > 0.8)) & ~own, 0.0)
    return losses.sum(1)


def multi_positive_siglip(i: Inputs, o: Options) -> Tensor:
    dots = unit(i["x"]) @ unit(i["y"]).T
    positive = equal(i["labels"], i["col_labels"])
    losses = bce(by_row(i["scale"]) * dots + i["bias"], positive.to(dots.dtype))
    counts = torch.where(positive, positive.sum(1, keepdim=True), (~positive).sum(1, keepdim=True))
    return (losses / counts.clamp_min(1)).sum(1)


def bixse(i: Inputs, o: Options) -> Tensor:
    dots = unit(i["query"]) @ unit(i["key"]).T
    target = i.get("target", torch.arange(len(dots))[:, None])
    grades = i["grades"].view(len(target), -1).to(dots.dtype)
    logits = by_row(i["scale"]) * dots + i.get("bias", -10.0)
    return bce(logits, torch.zeros_like(dots).scatter(1, target, grades)).sum(1)


def pair_bce(i: Inputs, o: Options) -> Tensor:
    dots = (i["x"][i["rows"]] * i["y"][i["cols"]]).sum(1)
    return bce(i["scale"] * dots + i["bias"], i["labels"].to(dots.dtype))


def negative_sampling(i: Inputs, o: Options) -> Tensor:
    own = (i["center"] * i["table"][i["context"]]).sum(1)
    others = (i["center"][:, None] * i["table"][i["negatives"]]).sum(-1)
    return F.softplus(-own, threshold=1e9) + F.softplus(others, threshold=1e9).sum(1)


# ---- Margins and distances -----------------------------------------------------------------------------------------


def triplet(i: Inputs, o: Options) -> Tensor:
    a, p, n = (i[name] for name in ("anchor", "positive", "negative"))
    return F.relu((a - p + 1e-6).norm(dim=1) - (a - n + 1e-6).norm(dim=1) + 1.0)


def contrastive(i: Inputs, o: Options) -> Tensor:
    d = 1 - (unit(i["x"]) * unit(i["y"])).sum(1)
    return 0.5 * torch.where(i["labels"] == 1, d.square(), F.relu(0.5 - d).square())


def multi_similarity(i: Inputs, o: Options) -> Tensor:
    dots, positive, negative = _labelled(i)
    pulled = F.pad((-2.0 * (dots - 0.5)).masked_fill(~positive, -INF), (1, 0)).logsumexp(1) / 2.0
    return pulled + F.pad((o["beta"] * (dots - 0.5)).masked_fill(~negative, -INF), (1, 0)).logsumexp(1) / o["beta"]


def energy_hinge(i: Inputs, o: Options) -> Tensor:
    negatives = i.get("negatives", i["key"][:0])
    return test_losses_margin.dense_energy(i["query"], i["key"], negatives, 0.2, o.get("hardest", True))


def koleo(i: Inputs, o: Options) -> Tensor:
    x = unit(i["x"])
    nearest = (x @ x.T).detach().masked_fill(eye(len(x)), -INF).argmax(1)
    return -((x - x[nearest]).norm(dim=1) + 1e-8).log()


def late_interaction(i: Inputs, o: Options) -> Tensor:
    queries, documents = unit(i["queries"]), unit(i["documents"])
    scores = torch.einsum("nad,mbd->nmab", queries, documents).amax(3).sum(2)
    return cross_entropy(by_row(i["scale"]) * scores)


def vse(i: Inputs, o: Options) -> Tensor:
    return test_losses_margin.dense_vse(i["image"], i["text"], 0.2, o.get("hardest", False), i.get("labels"))


def pair_mse(i: Inputs, o: Options) -> Tensor:
    return ((unit(i["x"]) * unit(i["y"])).sum(1) - i["labels"]).square()


def alignment(i: Inputs, o: Options) -> Tensor:
    return (unit(i["x"]) - unit(i["y"])).norm(dim=1) ** o["power"]


def dpo(i: Inputs, o: Options) -> Tensor:
    reference = (i["reference_chosen"], i["reference_rejected"]) if "reference_chosen" in i else None
    options = {"kind": o.get("kind", "sigmoid"), "label_smoothing": o.get("label_smoothing", 0.0)}
    return test_losses_preference.dense_dpo(i["chosen"], i["rejected"], reference, **options)


def margin_softmax(kind: str, margin: float) -> Formula:
    def formula(i: Inputs, o: Options) -> Tensor:
        dots = unit(i["x"]) @ unit(i["prototypes"]).T
        own, m = (
            dots.gather(1, i["labels"][:, None]),
            i["margin"][:, None] if "margin" in i else dots.new_tensor(margin),
        )
        moved = own - m
        if kind == "arcface":
            angle = own.clamp(-1, 1).acos()
            moved = torch.where(angle <= torch.pi - m, (angle + m).cos(), own - m * m.sin())
        scale = by_row(i["scale"]) if "scale" in i else 64.0
        return cross_entropy(scale * dots.scatter(1, i["labels"][:, None], moved), i["labels"])

    return formula


# ---- Classes, lists ------------------------------------------------------------------------------------------------


def linear_cross_entropy(i: Inputs, o: Options) -> Tensor:
    given = i["hidden"], i["head"], i["labels"]
    return test_losses_linear_targets.dense(*given, **{**o, "reduction": "none"})


def lists_of(formula: Callable[..., Tensor], **known: str) -> Formula:
    """Row by row, of what the mask and the teacher leave."""

    def each(i: Inputs, o: Options) -> Tensor:
        rows = []
        options = {n: v for n, v in o.items() if n != "kind" or "kind" in known}
        if "temperature" in i:
            options["temperature"] = i["temperature"]
        for row, (s, t) in enumerate(zip(i["scores"], i["teacher_scores"], strict=True)):
            there = t > -INF
            if "mask" in i:
                there = there & i["mask"][row]
            rows.append(formula(s[there], t[there].to(s.dtype), **options))
        return torch.stack(rows)

    return each


def similarity_distillation(i: Inputs, o: Options) -> Tensor:
    change = unit if o.get("normalize", True) else (lambda t: t)
    x, teacher_x = change(i["x"]), change(i["teacher_x"])
    y = change(i["y"]) if "y" in i else x
    teacher_y = change(i["teacher_y"]) if "teacher_y" in i else teacher_x
    student = by_row(i["scale"]) * x @ y.T
    teacher = o["teacher_scale"] * teacher_x @ teacher_y.T
    keep = torch.ones_like(student, dtype=torch.bool)
    if "ids" in i:
        keep = ~(equal(i["ids"], i["ids"]) | (x @ y.T > 0.8))
    kind, rows = test_losses_distillation.DIVERGENCES[o.get("divergence", "kl")], 0.0
    for s, t, k in ((student, teacher, keep), (student.T, teacher.T, keep.T))[: 1 + o.get("symmetric", False)]:
        rows = rows + torch.stack([kind(a[None, k], b[None, k])[0] for a, b, k in zip(s, t, k, strict=True)])
    return rows / (1 + o.get("symmetric", False))


of = test_losses_rank_distillation
FORMULAS: dict[str, Formula] = {
    **{f"info_nce{v}": info_nce for v in ("", " columns", " negatives", " pairs", " z_loss", " smoothing",
                                          " diagnostics", " given", " two sets of rules")},
    **{f"clip{v}": clip for v in ("", " smoothing", " pairs", " negatives")},
    **{f"nt_xent{v}": nt_xent for v in ("", " pairs")},
    **{f"sup_con{v}": sup_con for v in ("", " two-sided", " log_mean")},
    **{f"multi_positive_info_nce{v}": multi_positive_info_nce for v in ("", " two-sided")},
    "soft_info_nce": soft_info_nce,
    **{f"moco{v}": moco for v in ("", " labels")},
    **{f"gte{v}": gte for v in ("", " per_direction", " negatives", " margin")},
    **{f"gist{v}": gist for v in ("", " relative")},
    **{f"dcl{v}": dcl for v in ("", " sigma")},
    "debiased": debiased,
    "hcl": hcl,
    "hn_nce": hn_nce,
    **{f"siglip{v}": siglip for v in ("", " pairs")},
    "multi_positive_siglip": multi_positive_siglip,
    **{f"bixse{v}": bixse for v in ("", " lists")},
    "pair_bce": pair_bce,
    "negative_sampling": negative_sampling,
    "triplet": triplet,
    **{f"vse{v}": vse for v in ("", " hardest")},
    "pair_mse": pair_mse,
    "contrastive": contrastive,
    **{f"multi_similarity{v}": multi_similarity for v in ("", " two-sided")},
    **{f"energy_hinge{v}": energy_hinge for v in ("", " sum")},
    **{f"koleo{v}": koleo for v in ("", " weight")},
    "late_interaction": late_interaction,
    "alignment": alignment,
    **{f"dpo{v}": dpo for v in ("", " ipo")},
    "cos_face": margin_softmax("cosface", 0.35),
    "arc_face": margin_softmax("arcface", 0.5),
    "margin_softmax": margin_softmax("arcface", 0.0),
    **{f"linear_cross_entropy{v}": linear_cross_entropy for v in ("", " weighted", " smoothing")},
    **{f"margin_mse{v}": lists_of(of.of_margins) for v in ("", " masked")},
    **{f"listwise_distillation{v}": lists_of(of.of_kl) for v in ("", " temperatures")},
    "listwise_distillation listnet": lists_of(of.of_listnet),
    "listwise_distillation listmle": lists_of(of.of_listmle),
    **{f"pairwise_rank_distillation{v}": lists_of(of.of_pairs, kind="") for v in ("", " hinge", " lambda")},
    **{f"similarity_distillation{v}": similarity_distillation for v in ("", " symmetric")},
    "matryoshka_info_nce": matryoshka(info_nce),
    "matryoshka_info_nce columns": matryoshka(info_nce),
    "matryoshka_clip": matryoshka(_prefix_clip),
    "matryoshka_clip pairs": matryoshka(_prefix_clip),
    "matryoshka_nt_xent": matryoshka(nt_xent),
}  # fmt: skip
