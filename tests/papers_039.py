# ruff: noqa: E501
"""Papers S039 to S073: their calls, an independent dense expression of each, and the longer formulas."""

import torch
import torch.nn.functional as F
from papers_shared import DOUBLE, INF, D, N, cos, equal, info, off, unit


def batch_hard(x, labels, margin):
    d = 1 - cos(x, x)
    farthest = d.masked_fill(~(equal(labels) & off), -INF).amax(1)
    return (margin + farthest - d.masked_fill(equal(labels), INF).amin(1)).relu().mean()


def curl_dense(x, y, private):
    v = (x * y).sum(1, keepdim=True) - (x[:, None] * private).sum(2)
    return torch.log2(1 + (-v).exp().sum(1)).mean()


def self_softmax(x, teacher, temperature):
    p = (cos(teacher, teacher) / temperature).masked_fill(~off, -INF).softmax(1)
    log_q = (cos(x, x) / temperature).masked_fill(~off, -INF).log_softmax(1)
    return -(p * log_q.masked_fill(~off, 0)).sum(1).mean()


def promcse_dense(x, y, z):
    s = cos(x, y, z)
    hardest = s.masked_fill(torch.eye(N, 2 * N) == 1, -INF).amax(1)
    return info(s / 0.05) + 10 * (0.2 + hardest - s.diagonal()).relu().mean()


def simlm_dense(x, groups, teacher=None):
    q, k = unit(x), unit(groups).flatten(0, 1)
    p = k[::4]
    blocks = [q @ k.T, *((a @ b.T).masked_fill(~off, -INF) for a, b in ((p, q), (q, q), (p, p)))]
    loss = F.cross_entropy(torch.cat(blocks, 1) / 0.02, 4 * torch.arange(N))
    if teacher is None:
        return loss
    own = (q[:, None] * k.view(N, 4, D)).sum(2) / 0.02
    return 0.2 * loss + F.kl_div(own.log_softmax(1), teacher.softmax(1), reduction="batchmean")


def costa_dense(x, spans, ids, shared):
    s, same = cos(x, spans, x) / 0.1, torch.cat([equal(torch.arange(N), ids), ~off], 1)
    others = s.masked_fill(same, -INF).logsumexp(1, keepdim=True)
    own = s[:, : 3 * N][same[:, : 3 * N]].view(N, 3)
    bottom = torch.logaddexp(others, own.logsumexp(1, keepdim=True)) if shared else torch.logaddexp(others, own)
    return (bottom - own).mean()


def simctg_dense(x, sequences):
    s, counted = cos(x, x), equal(sequences) & off
    return (0.5 - 1 + s)[counted].relu().sum() / counted.sum()


def splade_dense(q, d, n):
    def price(rows):
        return rows.mean(0).square().sum()

    loss = info(torch.cat([q @ d.T, (q * n).sum(1, keepdim=True)], 1))
    return loss + 3e-4 * price(q) + 1e-4 * (price(d) + price(n)) / 2


def head_words(hidden, vocabulary, bias, there):
    return torch.log1p((hidden @ vocabulary.T + bias).relu()) * there[:, :, None]


def mclrec_dense(x, y):
    s, rows = torch.cat([x, y]) @ torch.cat([x, y]).T, torch.arange(2 * N)
    own, others = s[rows, rows.roll(N)], torch.ones(2 * N, 2 * N, dtype=torch.bool)
    others[rows, rows] = others[rows, rows.roll(N)] = False
    n = s[others].view(2 * N, 2 * N - 2)
    low, high = torch.minimum(own, n.amax(1)), torch.maximum(own, n.amax(1))
    return (own - low).relu().mean() + (high[:, None] - n).relu().mean()


def bitext_dense(x, y, k):
    s = cos(x, y)
    ratio = s / ((s.topk(k, 1).values.mean(1)[:, None] + s.topk(k, 0).values.mean(0)) / 2)
    return ratio.gather(1, s.topk(k, 1).indices).sort(1, descending=True).values


def vicreg_dense(x, y):
    def spread(z):
        covariance = torch.cov(z.T)
        return (
            25 * (1 - (z.var(0) + 1e-4).sqrt()).relu().mean() / 2
            + covariance.masked_fill(torch.eye(D) == 1, 0).square().sum() / D
        )

    return 25 * F.mse_loss(x, y) + spread(x) + spread(y)


def barlow_dense(x, y):
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (x, y))
    c = a.T @ b / N
    return (c.diagonal() - 1).square().sum() + 0.0051 * c.masked_fill(torch.eye(D) == 1, 0).square().sum()


def corinfomax_dense(pairs):
    state = [(torch.zeros(D, dtype=DOUBLE), torch.eye(D, dtype=DOUBLE)) for _ in range(2)]
    loss = 0
    for each in pairs:
        loss = loss + 2000 * F.mse_loss(*each)
        for i, z in enumerate(each):
            mean = 0.01 * state[i][0] + 0.99 * z.mean(0)
            covariance = 0.01 * state[i][1] + 0.99 * (z - mean).T @ (z - mean) / N
            loss = loss - 0.2 / D * torch.logdet(covariance + 1e-6 * torch.eye(D))
            state[i] = (mean.detach(), covariance.detach())
    return loss


def cluster_dense(x, y, centroids):
    s = cos(x, y)
    nearest = cos(x, centroids).topk(2, 1).indices
    near = (equal(nearest[:, 0]) & off).double()
    d = s - s.diagonal()[:, None]
    bounds = (near * d + 0.2).relu() + (-near * d - 0.5).relu()
    return info(cos(x, y, centroids[nearest[:, 1]]) / 0.05) + bounds.mean()


def mined(x, corpus, positives, k, keep):
    s, rows = cos(x, corpus), torch.arange(N)
    kept = keep(s, s[rows, positives][:, None])
    kept[rows, positives] = False
    return s.masked_fill(~kept, -INF).topk(k, 1).values


def ranksyn_dense(a):
    target = a.clone()
    for i in range(N):
        ordered = a[i, i:].sort(descending=True).values
        for j in range(i, N):
            rank = int((a[i, i:] > a[i, j]).sum())
            b = (a[i, j] - ordered[j - i]).abs() * (-1 if rank < j else 1)
            target[i, j] = a[i, j] + b.sign() * (0.5 * b.abs() + 1).log()
            target[j, i] = a[j, i] + b.sign() * (0.5 * b.abs() + 1).log()
    return target


def listmle(s, target):
    s = s.gather(1, target.argsort(1, descending=True))
    return sum(s[:, i:].logsumexp(1) - s[:, i] for i in range(N)).mean()


def diffalign_dense(x, y, sets, other_sets):
    s = cos(x, y).masked_fill(~equal(sets, other_sets), -INF)
    return torch.cat([1 - s.amax(1), 1 - s.amax(0)])


def clp_dense(x, y, private, other):
    s = torch.cat([F.cosine_similarity(x, y)[:, None], F.cosine_similarity(x[:, None], private, dim=2)], 1) / 0.02
    pull = (1 - F.cosine_similarity(other, private, dim=2)).mean()
    return 0.9 * (s.logsumexp(1) - s[:, 0]).mean() + 0.1 * pull


def best_of_queue(x, y, queue):
    own, best = (unit(x) * unit(y)).sum(1, keepdim=True) / 0.07, (cos(x, queue) / 0.07).topk(5, 1).values
    return (torch.cat([own, best], 1).logsumexp(1) - own[:, 0]).mean()


def rcmd_dense(x, y):
    s = torch.einsum("nad,mbd->nmab", x, y)
    return info((s.amax(3).mean(2) + s.amax(2).mean(2)) / 2 / 0.05)


def diht_dense(s, alpha, beta):
    def direction(s):
        w = (beta * s).exp().masked_fill(~off, 0)
        w = (N - 1) * w / w.sum(1, keepdim=True)
        return (torch.log(alpha * s.diagonal().exp() + (w * s.exp()).sum(1)) - s.diagonal()).mean()

    return direction(s) + direction(s.T)


# Number, title, what it needs, how sure the formula is, calls and expressions.
# fmt: off
ROWS = [
    ("S039", "A Statistical Theory of Contrastive Learning via Approximate Sufficient Statistics",
     "contrast by an f-divergence: chi squared, Donsker-Varadhan, Jensen-Shannon", "PAPER", [
        ("spectral_contrastive(x, y)",
         "-2 * (x @ y.T).diagonal().mean() + (x @ y.T)[off].square().mean()"),
        ("spectral_contrastive(x, y, divergence='kl')",
         "(x @ y.T)[off].exp().mean().log() - (x @ y.T).diagonal().mean()"),
        ("spectral_contrastive(x, y, divergence='js')",
         "F.softplus(-(x @ y.T).diagonal()).mean() + F.softplus((x @ y.T)[off]).mean()"),
    ]),
    ("S040", "Contrast Is All You Need",
     "pair regression, SupCon, batch-hard triplets (SetFit)", "CODE", [
        ("pair_mse(x, y, grades)",
         "((unit(x) * unit(y)).sum(1) - grades).square().mean()"),
        ("sup_con(x, labels, temperature=0.07)",
         "supcon_self(x, labels, 0.07)"),
        ("batch_hard_triplet(x, labels, margin=0.25, distance='cosine')",
         "batch_hard(x, labels, 0.25)"),
    ]),
    ("S041", "Exploring Contrast Consistency of Open-Domain Question Answering Systems on Minimally Edited Questions",
     "DPR and contrast of questions with questions", "CODE", [
        ("dpr(x, passages, group=2) + 0.5 * dpr(x, torch.cat([y, z]))",
         "info(x @ passages.T, 2 * torch.arange(N)) + 0.5 * info(x @ torch.cat([y, z]).T)"),
    ]),
    ("S042", "A Theoretical Analysis of Contrastive Unsupervised Representation Learning",
     "logistic loss or hinge of private negatives, raw inner products", "PAPER", [
        ("curl(x, y, private)",
         "curl_dense(x, y, private)"),
        ("curl(x, y, private, loss='hinge')",
         "(1 + (private * x[:, None]).sum(2).amax(1) - (x * y).sum(1)).relu().mean()"),
    ]),
    ("S043", "Static Word Embeddings for Sentence Semantic Representation",
     "cross-entropy of two similarity matrices; both directions added", "CODE", [
        ("static_embedding_kd(x, wide_teacher)",
         "self_softmax(x, wide_teacher, 0.05)"),
        ("2 * clip(x, y, temperature=0.05)",
         "2 * both(cos(x, y) / 0.05)"),
    ]),
    ("S044", "Improved Universal Sentence Embeddings with Prompt-based Contrastive Learning and Energy-based Learning",
     "supervised SimCSE and a hinge of the hardest negative", "CODE", [
        ("promcse(x, y, z)",
         "promcse_dense(x, y, z)"),
    ]),
    ("S045", "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
     "weights mixed with pre-trained ones; nothing here serves it", "-", []),
    ("S046", "A Contrastive Pre-training Approach to Learn Discriminative Autoencoder for Dense Retrieval",
     "InfoNCE over divergences of distributions", "INFERRED", [
        ("info_nce(x.softmax(1), y.log_softmax(1), temperature=0.5, normalize=False)",
         "info(-kl(x, y) / 0.5)"),
        ("info_nce(torch.cat([x.softmax(1), x.log_softmax(1)], 1), torch.cat([y.log_softmax(1), y.softmax(1)], 1), col_bias=-(y.softmax(1) * y.log_softmax(1)).sum(1) / 0.5, temperature=0.5, normalize=False)  # both ways",
         "info(-(kl(x, y) + kl(y, x).T) / 0.5)"),
    ]),
    ("S047", "SimLM: Pre-training with Representation Bottleneck for Dense Passage Retrieval",
     "one denominator of four blocks; a teacher's lists", "CODE", [
        ("simlm(x, private)",
         "simlm_dense(x, private)"),
        ("simlm(x, private, teacher_scores[:, :4])",
         "simlm_dense(x, private, teacher_scores[:, :4])"),
    ]),
    ("S048", "Distributed Representations of Words and Phrases and their Compositionality",
     "skip-grams with drawn negatives, NCE, hierarchical softmax", "PAPER", [
        ("negative_sampling(x, table, context, drawn, reduction='sum')",
         "sgns(x, table, context, drawn, 0)"),
        ("negative_sampling(x, table, context, drawn, log_expected=expected, reduction='sum')",
         "sgns(x, table, context, drawn, expected)"),
        ("pair_bce(x, table, path_rows, path_nodes, signs, reduction='sum')",
         "F.binary_cross_entropy_with_logits((x[path_rows] * table[path_nodes]).sum(1), signs, reduction='sum')"),
    ]),
    ("S049", "Pre-train a Discriminative Text Encoder for Dense Retrieval via Contrastive Span Prediction",
     "a text against spans of its own as positives, other texts and spans as negatives", "INFERRED", [
        ("multi_positive_info_nce(torch.cat([x, views]), torch.cat([torch.arange(N), view_ids]), weight=torch.cat([torch.ones(N), torch.zeros(3 * N)]).double(), temperature=0.1)",
         "costa_dense(x, views, view_ids, False)"),
        ("sup_con(torch.cat([x, views]), torch.cat([torch.arange(N), view_ids]), weight=torch.cat([torch.ones(N), torch.zeros(3 * N)]).double(), temperature=0.1)",
         "costa_dense(x, views, view_ids, True)"),
    ]),
    ("S050", "Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding",
     "regression of scores of a network over pairs", "CODE", [
        ("F.mse_loss(x[:, 0], scores[:, 0].detach())  # plain torch: |u - v| is no inner product",
         "(x[:, 0] - scores[:, 0].detach()).square().mean()"),
    ]),
    ("S051", "Eliciting Critical Reasoning in Retrieval-Augmented Language Models via Contrastive Explanations",
     "prompting; `similarity_topk` retrieves, `linear_cross_entropy` fine-tunes", "-", []),
    ("S052", "A Contrastive Framework for Neural Text Generation",
     "hinge of tokens of one sequence; contrastive search", "CODE", [
        ("simctg(near_rows, sequences, margin=0.5)",
         "simctg_dense(near_rows, sequences)"),
        ("decoding.contrastive_search(candidates, chances, contexts, alpha=0.6).score",
         "0.4 * chances - 0.6 * (unit(candidates) @ unit(contexts).mT).amax(2)"),
    ]),
    ("S053", "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
     "alignment and uniformity, with a queue", "CODE", [
        ("align_uniform(x, y)",
         "align(x, y) + (uniform(x) + uniform(y)) / 2"),
        ("align_uniform(x, y, queue)",
         "3 * align(x, y) + uniform(x, queue, 3.0)"),
    ]),
    ("S054", "The Short Text Matching Model Enhanced with Knowledge via Contrastive Learning",
     "InfoNCE with complement sentences; form not known", "INFERRED", [
        ("info_nce(x, y, temperature=0.05)",
         "info(cos(x, y) / 0.05)"),
    ]),
    ("S055", "DeCLUTR: Deep Contrastive Learning for Unsupervised Textual Representations",
     "NT-Xent of anchors and means of positives", "CODE", [
        ("nt_xent(x, private.mean(1), temperature=0.05)",
         "ntx(x, private.mean(1), 0.05)"),
    ]),
    ("S056", "SPLADE: Sparse Lexical and Expansion Model for First Stage Ranking",
     "sparse rows over a vocabulary; in-batch softmax and a price of words", "CODE", [
        ("splade(words_x, words_y, words_z)",
         "splade_dense(words_x, words_y, words_z)"),
        ("splade_head(hidden, vocabulary, word_bias, there)  # v2",
         "head_words(hidden, vocabulary, word_bias, there).amax(1)"),
        ("splade_head(hidden, vocabulary, word_bias, there, pooling='sum')",
         "head_words(hidden, vocabulary, word_bias, there).sum(1)"),
        ("margin_mse(scores[:, :2], teacher_scores[:, :2])",
         "((scores[:, 0] - scores[:, 1]) - (teacher_scores[:, 0] - teacher_scores[:, 1])).square().mean()"),
    ]),
    ("S057", "NevIR: Negation in Neural Information Retrieval",
     "evaluation: accuracy of two by two scores", "CODE", [
        ("metrics.contrast_accuracy(quads)",
         "((quads[:, 0, 0] > quads[:, 0, 1]) & (quads[:, 1, 1] > quads[:, 1, 0])).double().mean()"),
    ]),
    ("S058", "Meta-optimized Contrastive Learning for Sequential Recommendation",
     "NT-Xent of raw rows, a regulariser by maxima, cross-entropy over items", "CODE", [
        ("nt_xent(x, y, temperature=1.0, normalize=False) + 0.1 * mclrec_regularizer(x, y)",
         "ntx(x, y, 1.0, norm=False) + 0.1 * mclrec_dense(x, y)"),
        ("linear_cross_entropy(x, table, context)",
         "F.cross_entropy(x @ table.T, context)"),
    ]),
    ("S059", "Beyond Contrastive Learning: A Variational Generative Model for Multilingual Retrieval",
     "generative; evaluation by ratio margins and hubness", "PAPER", [
        ("bitext_margin(fixed, queue, 3).values",
         "bitext_dense(fixed, queue, 3)"),
    ]),
    ("S060", "Unsupervised Contrast-Consistent Ranking with Language Models",
     "consistency of probes on scores; formulas not verified, nothing here serves it; `pairwise_rank_distillation` where an order is known", "INFERRED", []),
    ("S061", "Evaluation Benchmarks and Learning Criteria for Discourse-Aware Sentence Representations",
     "linear heads; soft targets over 50,000 words", "CODE", [
        ("soft_info_nce(x, table, bags, col_bias=table_bias, temperature=1.0, normalize=False)",
         "F.cross_entropy(x @ table.T + table_bias, dense_bags)"),
    ]),
    ("S062", "DefSent+: Improving sentence embeddings of language models by projecting definition sentences into a quasi-isotropic or isotropic vector space of unlimited dictionary entries",
     "cross-entropy over a frozen table of entries", "CODE", [
        ("info_nce(x, queue, target=first, temperature=1.0, normalize=False)",
         "F.cross_entropy(x @ queue.T, first)"),
    ]),
    ("S063", "UNSEE: Unsupervised Non-contrastive Sentence Embeddings",
     "VICReg, Barlow Twins, BYOL or CorInfoMax against an averaged encoder", "CODE", [
        ("unsee(x, y, teacher, queue[:N])",
         "vicreg_dense(x, queue[:N]) + vicreg_dense(y, teacher)"),
        ("unsee(x, y, teacher, queue[:N], kind='barlow')",
         "barlow_dense(x, queue[:N]) + barlow_dense(y, teacher)"),
        ("unsee(x, y, teacher, queue[:N], kind='byol')",
         "(2 - 2 * F.cosine_similarity(x, queue[:N])).mean() + (2 - 2 * F.cosine_similarity(y, teacher)).mean()"),
        ("unsee(x, y, teacher, queue[:N], kind='corinfomax', states=(RunningCovariance(D), RunningCovariance(D)))",
         "corinfomax_dense(((x, queue[:N]), (y, teacher)))"),
    ]),
    ("S064", "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation",
     "second-nearest centroids as negatives, a margin on both sides for rows of one cluster", "CODE", [
        ("cluster_ns(x, y, queue[:4], weight=1.0)",
         "cluster_dense(x, y, queue[:4])"),
    ]),
    ("S065", "Neural Passage Quality Estimation for Static Pruning",
     "passages pruned by a score; `mining.search` of `corpus[keep]`", "-", []),
    ("S066", "NV-Retriever: Improving text embedding models with effective hard-negative mining",
     "negatives bounded by the positive's score", "PAPER", [
        ("mine_hard_negatives(fixed, corpus, positives, 4, rules=positive_aware_rules()).scores",
         "mined(fixed, corpus, positives, 4, lambda s, p: s <= p - 0.05 * p.abs())"),
        ("mine_hard_negatives(fixed, corpus, positives, 4, rules=positive_aware_rules('margin')).scores",
         "mined(fixed, corpus, positives, 4, lambda s, p: s <= p - 0.05)"),
        ("mine_hard_negatives(fixed, corpus, positives, 4, rules=positive_aware_rules('absolute', 0.2)).scores",
         "mined(fixed, corpus, positives, 4, lambda s, p: s <= 0.2)"),
    ]),
    ("S067", "Refining Sentence Embedding Model through Ranking Sentences Generation with Large Language Models",
     "likelihood of a teacher's order of a list", "CODE", [
        ("listwise_distillation(F.normalize(x) @ F.normalize(x).T, ranksyn_targets(square), kind='listmle', temperature=0.05)",
         "listmle(cos(x, x) / 0.05, ranksyn_dense(square))"),
        ("ranksyn_targets(square)",
         "ranksyn_dense(square)"),
    ]),
    ("S068", "Towards Unsupervised Recognition of Semantic Differences in Related Documents",
     "distance of each token to the nearest one of the other document", "CODE", [
        ("torch.cat(token_differences(fixed, queue, sets, queue_sets))",
         "diffalign_dense(fixed, queue, sets, queue_sets)"),
    ]),
    ("S069", "Efficient fine-tuning methodology of text embedding models for information retrieval: contrastive learning penalty (clp)",
     "contrast within one's group, a pull of negatives to queries of theirs; experts by their own logits", "CODE", [
        ("clp(x, y, private, other_private)",
         "clp_dense(x, y, private, other_private)"),
        ("route(logits, 2, gating=Gating(renormalize=True)).gates",
         "logits.topk(2, 1).values.softmax(1)"),
    ]),
    ("S070", "Momentum Contrastive Learning with Enhanced Negative Sampling and Hard Negative Filtering",
     "best columns of a queue in the denominator, of both sides", "INFERRED", [
        ("mined_info_nce(x, y, queue, 5, in_batch=False, temperature=0.07) + mined_info_nce(y, x, queue, 5, in_batch=False, temperature=0.07)",
         "best_of_queue(x, y, queue) + best_of_queue(y, x, queue)"),
    ]),
    ("S071", "Toward Interpretable Semantic Textual Similarity via Optimal Transport-based Contrastive Sentence Learning",
     "InfoNCE over the mean of both sides' MaxSim", "CODE", [
        ("rcmd(some_tokens, other_tokens)",
         "rcmd_dense(unit(some_tokens), unit(other_tokens))"),
    ]),
    ("S072", "Reducing Distraction in Long-Context Language Models by Focused Learning",
     "language modelling and InfoNCE of outputs", "INFERRED", [
        ("info_nce(x, y, temperature=0.05)",
         "info(cos(x, y) / 0.05)"),
    ]),
    ("S073", "Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training",
     "negatives weighted by their similarity, both directions added", "PAPER", [
        ("diht(x, y, alpha=0.9, scale=scale)",
         "diht_dense(cos(x, y) * scale, 0.9, 0.25)"),
    ]),
]
# fmt: on
