# ruff: noqa: E501
"""Papers S001 to S038: their calls, an independent dense expression of each, and the longer formulas."""

import math

import torch
import torch.nn.functional as F
from papers_shared import DOUBLE, INF, D, N, cos, equal, hadsell, info, off, own_maxsims, similar, unit


def limoe_losses(logits, modality, noise):
    def entropy(q):
        return torch.special.entr(q).sum(-1)

    def spread(v):
        return v.var(correction=0) / v.mean() ** 2

    p = logits.softmax(1)
    noisy = logits + noise / 5
    load = 1 - torch.special.ndtr((noisy.amax(1, keepdim=True) - logits) * 5)
    loss = spread(p.sum(0)) + spread(load.mean(0)) + logits.logsumexp(1).square().mean()
    loss = loss + entropy(p[modality == 1]).mean()
    for segment, experts in ((0, 4), (1, 3)):
        loss = loss + (math.log(experts) - entropy(p[modality == segment].mean(0))).relu()
    return 0.04 * loss


def fedsa_dense(x, labels, anchors):
    with torch.no_grad():
        between = (anchors[:, None] - anchors).norm(dim=2)
        margin = (between + 1e9 * torch.eye(3)).amin(1).mean()
    d = (x[:, None] - anchors).norm(dim=2)
    return F.mse_loss(x, anchors[labels]) + F.cross_entropy(-(d + margin * F.one_hot(labels, 3)), labels)


def hypo_dense(lp, ref):
    r = lp - ref
    return -F.logsigmoid(0.05 * (r[0] - r[1])).mean() + 0.3 * (r[2] ** 2 / 2).mean()


def superflow_dense(points, pixels, point_ids, pixel_ids):
    seen = [i for i in range(8) if (point_ids == i).any() and (pixel_ids == i).any()]
    k, q = (
        torch.stack([unit(v)[ids == i].mean(0) for i in seen]) for v, ids in ((points, point_ids), (pixels, pixel_ids))
    )
    return info(k @ q.T / 0.07)


def cosine_dense(x, labels):
    d = (x[:, None] - x).square().sum(2) / D
    return torch.where(equal(labels), d**2, (1 - d).relu() ** 2).sum()


def cosine_released(x, labels, partner):
    d = (x / D**0.5 - x[partner] / D**0.5 + 1e-6).norm(dim=1)  # as torch's pairwise_distance
    return hadsell(d, (labels == labels[partner]).long(), 1.0)


def proclip_dense(x, teacher):
    x, t = unit(x), unit(teacher)
    return (x - t).square().sum() + F.huber_loss(torch.pdist(x), torch.pdist(t), reduction="sum")


def nevlp_dense(s, omega):
    target = (omega[:, None] / (N - 1)).expand(N, N) * off + torch.diag(1 - omega)
    return -((target * s.log_softmax(1)).sum(1) + (target * s.T.log_softmax(1)).sum(1)).mean() / 2


def drawn_scores(x, corpus, positives):
    """What was drawn is a row of the corpus that is not the positive."""
    from contrastive_ops.mining import NegativeRules, Sampling, mine_hard_negatives

    rules, sampling = NegativeRules(rank_window=(0, 20)), Sampling("softmax", temperature=1.0)
    found = mine_hard_negatives(x, corpus, positives, 1, metric="dot", rules=rules, sampling=sampling).indices
    assert (found[:, 0] != positives).all()
    return (x @ corpus.T).gather(1, found)


def quick_thought_dense(x, y, width):
    place = torch.arange(N)
    near = ((place[:, None] - place).abs() <= width) & off
    return F.cross_entropy((x @ y.T).masked_fill(~off, 0.0), near / near.sum(1, keepdim=True).double())


def s021(x, y, z):
    own, others = (x * y).sum(1) / 0.2, (x @ z.T / 0.2).masked_fill(~off, -INF)
    return (torch.cat([own[:, None], others], 1).logsumexp(1) - own).mean()


def gcl_dense(s, weight, ids):
    s = s.masked_fill(equal(ids) & off, -INF)
    return weight * (info(s, reduction="none") + info(s.T, reduction="none")) / 2


def correlation_information(a, b):
    rho = [torch.corrcoef(torch.stack([a[i].log(), b[i].log()]))[0, 1] for i in range(N)]
    return -0.5 * (1 - torch.stack(rho) ** 2).log().mean()


def dclr_dense(x, y, z, guide_x, guide_y, threshold):
    return info((cos(x, y, z) / 0.05).masked_fill(similar(guide_x, guide_y, N, threshold), -INF))


def dclr_released(x, y, z, guide_x, guide_y, threshold):
    p = (cos(x, y, z) / 0.05).masked_fill(similar(guide_x, guide_y, N, threshold), 0.0).softmax(1)
    own = torch.eye(N, 2 * N, dtype=DOUBLE)
    return -(own * p.log() + (1 - own) * torch.log1p(-p)).mean()


def dclr_noise_dense(x, y, noise, step):
    for _ in range(4):
        noise = noise.detach().requires_grad_()
        (slope,) = torch.autograd.grad(info(cos(x, y, noise) / 0.05), noise)
        noise = noise + step * slope / slope.norm(dim=1, keepdim=True)
    return noise.detach()


def mnr_plus_dense(x, y):
    t = ((x @ x.T + y @ y.T) / 2).softmax(1)
    return (info(x @ y.T, t.argmax(1)) + info(y @ x.T, t.argmax(0))) / 2


def mutual_information(logits, segments):
    joint = torch.stack([logits.softmax(1)[segments == each].sum(0) for each in (0, 1)]) / 20
    return (joint * (joint / (joint.sum(1, keepdim=True) * joint.sum(0))).log()).sum()


def switch_dense(logits):
    p = logits.softmax(1)
    return 5 * (torch.bincount(p.argmax(1), minlength=5) / 20 * p.mean(0)).sum()


def agrame_dense(q, lists, t, q2, u):
    s, sentences = own_maxsims(q, lists), lists.view(3, 2, 3, 2, D)
    r = torch.stack([own_maxsims(q2, sentences[:, k]) for k in range(2)], 1)
    inner = (u.softmax(2) * (u.log_softmax(2) - r.log_softmax(2))).sum(2)
    outer = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    return (outer + (t.softmax(1) * inner).sum(1)).mean()


def clhaif_all(s, scores):
    own = torch.eye(N, 2 * N, dtype=DOUBLE)
    target = scores[:, None] * own + (1 - scores)[:, None] * (1 - own) / (2 * N - 1)
    return -(target * s.log_softmax(1)).sum(1).mean()


# Number, title, what it needs, how sure the formula is, calls and expressions.
# fmt: off
ROWS = [
    ("S001", "Multimodal Contrastive Learning with LIMoE: the Language-Image Mixture of Experts",
     "both directions of InfoNCE with a learned scale; router losses of each modality", "PAPER", [
        ("clip(x, y, scale=scale)",
         "both(cos(x, y) * scale)"),
        ("route(logits, 1, segments=modality, num_segments=2, gating=Gating(noise_std=1.0), noise=noise, losses=limoe_router_losses([4, 3])).loss",
         "limoe_losses(logits, modality, noise)"),
        ("siglip(x, y, scale=scale, bias=bias)  # released code",
         "sign_losses(cos(x, y) * scale + bias).sum(1).mean()"),
    ]),
    ("S002", "FedSA: A Unified Representation Learning via Semantic Anchors for Prototype-based Federated Learning",
     "squared distances to anchors; softmax over minus distances with a margin of the own class", "CODE", [
        ("fedsa(x, labels, anchors, fedsa_margin(anchors))",
         "fedsa_dense(x, labels, anchors)"),
        ("linear_cross_entropy(anchors, head, torch.arange(3), bias=head_bias)",
         "F.cross_entropy(anchors @ head.T + head_bias, torch.arange(3))"),
    ]),
    ("S003", "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage",
     "DPO and a reverse KL of own samples", "PAPER", [
        ("hypo(lp[0], lp[1], ref[0], ref[1], lp[2], ref[2], kl=0.3)",
         "hypo_dense(lp, ref)"),
    ]),
    ("S004", "Contrastive Example-Based Control",
     "binary cross-entropy of all pairs of raw inner products, or CPC with a z-loss", "CODE", [
        ("laeo(x, y)",
         "F.binary_cross_entropy_with_logits(x @ y.T, eye)"),
        ("laeo(x, y, kind='cpc')",
         "info(x @ y.T) + 0.01 * (x @ y.T).logsumexp(1).square().mean()"),
        ("similarity_reduce(x, y, reduce='logsumexp')  # of the actor, over goals; or 'max'",
         "(x @ y.T).logsumexp(1)"),
    ]),
    ("S005", "4D Contrastive Superflows are Dense 3D Representation Learners",
     "InfoNCE between means of superpixels", "CODE", [
        ("superflow(points, pixels, point_ids, pixel_ids, 8)",
         "superflow_dense(points, pixels, point_ids, pixel_ids)"),
    ]),
    ("S006", "SuperFlow++: Enhanced Spatiotemporal Consistency for Cross-Modal Data Pretraining",
     "as S005; votes over frames are inference", "INFERRED", [
        ("superflow(points, pixels, point_ids, pixel_ids, 8)",
         "superflow_dense(points, pixels, point_ids, pixel_ids)"),
    ]),
    ("S007", "ScatSimCLR: self-supervised contrastive learning with pretext task regularization for small-scale datasets",
     "NT-Xent and cross-entropy of a pretext task", "CODE", [
        ("nt_xent(x, y, temperature=0.5) + 0.3 * F.cross_entropy(x, labels)",
         "ntx(x, y, 0.5) + 0.3 * F.cross_entropy(x, labels)"),
    ]),
    ("S008", "DynaCLR: Contrastive Learning of Cellular Dynamics with Temporal Regularization",
     "triplets of distances, or NT-Xent with labels of tracks", "CODE", [
        ("triplet(x, y, z, margin=0.5)",
         "F.triplet_margin_loss(x, y, z, margin=0.5)"),
        ("multi_positive_info_nce(x, labels, mean_over='pairs', temperature=0.07)",
         "decoupled(x, x, labels, labels, 0.07, True)"),
        ("nt_xent(x, y, temperature=0.5, pairs=Pairs(differ=(ids.repeat(2), ids.repeat(2))))  # no negatives of one's own track",
         "ntx(x, y, 0.5, drop=equal(ids.repeat(2)))"),
    ]),
    ("S009", "Image2Sentence based Asymmetrical Zero-shot Composed Image Retrieval",
     "InfoNCE against a frozen encoder; the local term is not known", "INFERRED", [
        ("info_nce(x, y.detach(), temperature=0.07)",
         "info(cos(x, y.detach()) / 0.07)"),
    ]),
    ("S010", "Fine-Tuning Pre-trained Language Model with Weak Supervision: A Contrastive-Regularized Self-Training Approach",
     "pairs of one pseudo-label attract, others keep a margin", "PAPER", [
        ("cosine_contrastive(x, labels)",
         "cosine_dense(x, labels)"),
        ("cosine_contrastive(x, labels, permutation)  # released code",
         "cosine_released(x, labels, permutation)"),
        ("contrastive(x, y, labels % 2, margin=1.0)  # its cosine metric",
         "hadsell(1 - F.cosine_similarity(x, y), labels % 2, 1.0)"),
    ]),
    ("S011", "Regularized Contrastive Learning of Semantic Search",
     "several views of a target as positives; where they stand is not known", "INFERRED", [
        ("sup_con(x, torch.arange(N), views, view_ids, temperature=0.05)",
         "supcon(x, views, torch.arange(N)[:, None] == view_ids, 0.05)"),
    ]),
    ("S012", "ProCLIP: Progressive Vision-Language Alignment via LLM-based Embedder",
     "squared distances to a teacher and Huber loss of all distances; CLIP with label smoothing", "CODE", [
        ("proclip(x, teacher)",
         "proclip_dense(x, teacher)"),
        ("clip(x, y, scale=scale, label_smoothing=0.1)",
         "both(cos(x, y) * scale, label_smoothing=0.1)"),
    ]),
    ("S013", "Cross-Platform Hate Speech Detection with Weakly Supervised Causal Disentanglement",
     "as S010 next to an autoencoder; form not known", "INFERRED", [
        ("cosine_contrastive(x, labels)",
         "cosine_dense(x, labels)"),
    ]),
    ("S014", "Generative Kernel Continual learning",
     "SupCon as a regulariser", "INFERRED", [
        ("sup_con(x, labels, temperature=0.1)",
         "supcon_self(x, labels, 0.1)"),
    ]),
    ("S015", "NEVLP: Noise-Robust Framework for Efficient Vision-Language Pre-training",
     "CLIP with label smoothing of each row; hard negatives drawn from the batch", "INFERRED", [
        ("clip(x, y, scale=scale, label_smoothing=grades, smooth='others')",
         "nevlp_dense(cos(x, y) * scale, grades)"),
        ("mine_hard_negatives(fixed, queue, first, 1, metric='dot', rules=NegativeRules(rank_window=(0, 20)), sampling=Sampling('softmax', temperature=1.0)).scores",
         "drawn_scores(fixed, queue, first)"),
    ]),
    ("S016", "DenoSent: A Denoising Objective for Self-Supervised Sentence Representation Learning",
     "cross-entropy over a vocabulary and InfoNCE with hard negatives", "CODE", [
        ("linear_cross_entropy(hidden, vocabulary, words, bias=word_bias) + info_nce(x, y, z, temperature=0.05)",
         "F.cross_entropy((hidden @ vocabulary.T + word_bias).flatten(0, 1), words.flatten()) + info(cos(x, y, z) / 0.05)"),
    ]),
    ("S017", "CLEAR: Contrastive Learning for Sentence Representation",
     "NT-Xent and masked language modelling", "PAPER", [
        ("nt_xent(x, y, temperature=0.1) + linear_cross_entropy(hidden, vocabulary, words)",
         "ntx(x, y, 0.1) + F.cross_entropy((hidden @ vocabulary.T).flatten(0, 1), words.flatten())"),
    ]),
    ("S018", "SimCSE: Simple Contrastive Learning of Sentence Embeddings",
     "InfoNCE of two dropout passes, with hard negatives and a weight of the own one", "CODE", [
        ("simcse(x, y)",
         "info(cos(x, y) / 0.05)"),
        ("simcse(x, y, z)",
         "info(cos(x, y, z) / 0.05)"),
        ("simcse(x, y, z, hard_weight=0.7)",
         "info(cos(x, y, z) / 0.05 + 0.7 * F.pad(eye, (N, 0)))"),
    ]),
    ("S019", "An efficient framework for learning sentence representations",
     "neighbouring sentences as soft targets, one's own logit is 0", "CODE", [
        ("quick_thought(x, y, width=2)",
         "quick_thought_dense(x, y, 2)"),
    ]),
    ("S020", "Composition-contrastive Learning for Sentence Embeddings",
     "InfoNCE of slices that are normalised after cutting", "CODE", [
        ("info_nce(x[:, :4], y[:, :4], temperature=0.05)",
         "info(cos(x[:, :4], y[:, :4]) / 0.05)"),
    ]),
    ("S021", "Topic Modeling as Multi-Objective Contrastive Optimization",
     "sets pooled by extrema; positives and negatives of different tensors", "PAPER", [
        ("info_nce(x, y, z, in_batch=False, negative_pairs=Pairs(diagonal=0), temperature=0.2, normalize=False)",
         "s021(x, y, z)"),
    ]),
    ("S022", "DiffCSE: Difference-based Contrastive Learning for Sentence Embeddings",
     "SimCSE and detection of replaced tokens", "CODE", [
        ("simcse(x, y) + 0.005 * F.cross_entropy(z, labels)",
         "info(cos(x, y) / 0.05) + 0.005 * F.cross_entropy(z, labels)"),
    ]),
    ("S023", "SetCSE: Set Operations using Contrastive Learning of Sentence Embeddings",
     "rows of other sets in the denominator; training form not decided", "INFERRED", [
        ("(similarity_reduce(x, scale=2.0, pairs=Pairs(differ=(labels, labels))) - 2.0 * (x * y).sum(1)).sum()",
         "(lse(2 * x @ x.T, ~equal(labels)) - 2 * (x * y).sum(1)).sum()"),
        ("similarity_topk((queue.mean(0) - teacher.mean(0))[None], corpus, 5).values  # A and B, not C",
         "((queue.mean(0) - teacher.mean(0)) @ corpus.T).topk(5).values[None]"),
    ]),
    ("S024", "Generalized Contrastive Learning for Multi-Modal Retrieval and Ranking",
     "both directions weighted by score, other documents of a query left out", "PAPER", [
        ("gcl(x, y, weight, ids, scale=scale)",
         "gcl_dense(cos(x, y) * scale, weight, ids).sum() / weight.sum()"),
        ("gcl(x, y, weight, ids, scale=scale, mean_over='rows')",
         "gcl_dense(cos(x, y) * scale, weight, ids).mean()"),
    ]),
    ("S025", "Self-Guided Contrastive Learning for BERT Sentence Representations",
     "each layer of a frozen copy as a positive with a denominator of its own", "CODE", [
        ("sg_opt(x, layers)",
         "decoupled(x, layers.flatten(0, 1), torch.arange(N), torch.arange(N).repeat_interleave(3), 0.01)"),
    ]),
    ("S026", "miCSE: Mutual Information Contrastive Learning for Low-shot Sentence Embeddings",
     "SimCSE and mutual information of attention", "CODE", [
        ("simcse(x, y) - 5e-4 * attention_information(attention[0], attention[1])",
         "info(cos(x, y) / 0.05) - 5e-4 * correlation_information(*attention)"),
        ("attention_information(attention[0], attention[1])",
         "correlation_information(*attention)"),
    ]),
    ("S027", "Debiased Contrastive Learning of Unsupervised Sentence Representations",
     "negatives gated by a frozen model; noise moved up the slope", "PAPER", [
        ("dclr(x, y, z, teacher, queue[:N], threshold=0.1)",
         "dclr_dense(x, y, z, teacher, queue[:N], 0.1)"),
        ("dclr(x, y, z, teacher, queue[:N], threshold=0.1, released=True)",
         "dclr_released(x, y, z, teacher, queue[:N], 0.1)"),
        ("dclr_noise(fixed, teacher, queue, step_size=0.1)",
         "dclr_noise_dense(fixed, teacher, queue, 0.1)"),
    ]),
    ("S028", "Contrastive Representation Learning: A Framework and Review",
     "review; `losses` has what it describes, except the angular loss", "-", []),
    ("S029", "DebCSE: Rethinking Unsupervised Contrastive Sentence Embedding Learning in the Debiasing Perspective",
     "negatives drawn by two similarities; then InfoNCE", "INFERRED", [
        ("info_nce(x, y, z, temperature=0.05)",
         "info(cos(x, y, z) / 0.05)"),
        ("similarity_topk(torch.cat([fixed / 0.5, -teacher], 1), torch.cat([corpus, corpus.roll(1, 1)], 1), 5).values  # what to draw from",
         "(fixed @ corpus.T / 0.5 - teacher @ corpus.roll(1, 1).T).topk(5).values"),
    ]),
    ("S030", "MCSE: Multimodal Contrastive Learning of Sentence Embeddings",
     "SimCSE, and both views against an image in another space", "CODE", [
        ("mcse(x, y, z[:, :4], x[:, 2:], y[:, 2:])",
         "info(cos(x, y) / 0.05) + 0.05 * (info(cos(z[:, :4], y[:, 2:]) / 0.05) + info(cos(x[:, 2:], y[:, 2:]) / 0.05)) / 2"),
    ]),
    ("S031", "Phrase-BERT: Improved Phrase Embeddings from BERT with an Application to Corpus Exploration",
     "triplets of distances, margin 1", "CODE", [
        ("triplet(x, y, z, margin=1.0)",
         "F.triplet_margin_loss(x, y, z, margin=1.0)"),
    ]),
    ("S032", "Learning High-Quality and General-Purpose Phrase Representations",
     "NT-Xent and cross-entropy of types, or alignment and uniformity", "CODE", [
        ("nt_xent(x, y, temperature=0.07) + F.cross_entropy(z, labels)",
         "ntx(x, y, 0.07) + F.cross_entropy(z, labels)"),
        ("align_uniform(x, y)",
         "align(x, y) + (uniform(x) + uniform(y)) / 2"),
    ]),
    ("S033", "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings",
     "targets that are the largest of another Gram matrix; experts by domain", "CODE", [
        ("mnr_plus(x, y)",
         "mnr_plus_dense(x, y)"),
        ("route(logits, 1, segments=modality, num_segments=2, losses=[RouterLoss('global_entropy', pooled=True), RouterLoss('global_entropy', [-0.7, -0.3])]).loss",
         "-mutual_information(logits, modality)"),
        ("route(logits, 1, losses=['switch']).loss",
         "switch_dense(logits)"),
    ]),
    ("S034", "Text Transformations in Contrastive Self-Supervised Learning: A Review",
     "review; `nt_xent`, `triplet`, `alignment` and `uniformity` are what it compares", "-", []),
    ("S035", "AGRaME: Any-Granularity Ranking with Multi-Vector Embeddings",
     "divergences of MaxSim lists of passages and of their sentences", "PAPER", [
        ("agrame(some_tokens, lists, list_scores, other_tokens, TokenSets(lists.flatten(0, 2), offsets=torch.arange(0, 37, 2)), sentence_scores)",
         "agrame_dense(some_tokens, lists, list_scores, other_tokens, sentence_scores)"),
    ]),
    ("S036", "Sub-Sentence Encoder: Contrastive Learning of Propositional Semantic Representations",
     "SupCon; rows without positives leave the mean", "CODE", [
        ("sup_con(x, some, temperature=0.1)",
         "supcon_self(x, some, 0.1)"),
    ]),
    ("S037", "Contrastive Learning of Sentence Embeddings from Scratch",
     "supervised SimCSE, or each row's own hard negative alone", "CODE", [
        ("simcse(x, y, z)",
         "info(cos(x, y, z) / 0.05)"),
        ("info_nce(x, y, row_negatives=z, temperature=0.05)",
         "info(torch.cat([cos(x, y), (unit(x) * unit(z)).sum(1, keepdim=True)], 1) / 0.05)"),
    ]),
    ("S038", "Improving Contrastive Learning of Sentence Embeddings from AI Feedback",
     "cosines against scores; SimCSE weighted or smoothed by scores", "CODE", [
        ("pair_mse(x, y, grades)",
         "((unit(x) * unit(y)).sum(1) - grades).square().mean()"),
        ("clhaif(x, y, z, grades)",
         "(grades * F.cross_entropy(cos(x, y, z) / 0.05, torch.arange(N), reduction='none')).mean()"),
        ("clhaif(x, y, z, grades, smooth='all')",
         "clhaif_all(cos(x, y, z) / 0.05, grades)"),
    ]),
]
# fmt: on
