# ruff: noqa: E501
"""Papers S074 to S119: their calls, an independent dense expression of each, and the longer formulas."""

import torch
import torch.nn.functional as F
from papers_shared import DOUBLE, INF, D, N, cos, equal, info, ntx, off, unit


def ranked(x, corpus, positives, low, high):
    s = cos(x, corpus)
    s[torch.arange(N), positives] = -INF
    return s.topk(high, 1).values[:, low:]


def mrl_dense(mean, variance, means, variances, teacher):
    v, w = F.softplus(variance)[:, None], F.softplus(variances)
    s = -0.5 * ((w / v).log() - 1 + v / w + (mean[:, None] - means) ** 2 / w).sum(2)
    rank = (teacher[:, :, None] < teacher[:, None]).sum(2).double() + 1
    above = (teacher[:, :, None] > teacher[:, None]) * (1 / rank[:, :, None] - 1 / rank[:, None]).abs()
    return (above * F.softplus(s[:, None] - s[:, :, None])).sum((1, 2)).mean()


def consert_dense(x, y):
    def others(a):
        return (cos(a, a) / 0.1).masked_fill(~off, -INF)

    return info(torch.cat([cos(x, y) / 0.1, others(x)], 1)) + info(torch.cat([cos(y, x) / 0.1, others(y)], 1))


def csr_dense(x, encoder, bias, centre, k):
    a = (x - centre) @ encoder.T + bias
    z = [torch.where(a >= a.topk(n, 1).values[:, -1:], a, 0).relu() for n in (k, 4 * k)]
    error = [((each @ encoder + centre - x) ** 2).mean() for each in z]
    return error[0] + error[1] / 8 + 0.1 * ntx(z[0], z[0], 0.2)


def entropy_of_spectrum(x):
    p = torch.linalg.eigvalsh(x.T @ x)
    return torch.special.entr(p / p.sum()).sum()


def of_own_bank(x, y, queue, labels, of_queue):
    own, others = (unit(x) * unit(y)).sum(1) / 0.07, (cos(x, queue) / 0.07).masked_fill(~equal(labels, of_queue), -INF)
    return (torch.cat([own[:, None], others], 1).logsumexp(1) - own).mean()


def rank_hinge(scores, teacher):
    above = (teacher[:, :, None] > teacher[:, None]).double()
    hinge = (1 - (scores[:, :, None] - scores[:, None])).relu()
    return ((above * hinge).sum((1, 2)) / above.sum((1, 2))).mean()


def supremix_dense(x, y, shares, window):
    u, temperature, losses = unit(x), 0.3, []
    fixed = u.detach()
    for i in range(N):
        logits, weights, positives = [], [], []
        for j in range(N):
            if j != i:
                logits.append(u[i] @ u[j] / temperature)
                weights.append((y[i] - y[j]).abs() + 1)
                positives += logits[-1:] if y[i] == y[j] else []
            if y[j] != y[i]:
                c = shares[i, j]
                logits.append(u[i] @ (c * fixed[i] + (1 - c) * fixed[j]) / temperature)
                weights.append((y[i] - (c * y[i] + (1 - c) * y[j])).abs() + 1)
            for k in range(N):
                if y[j] < y[i] < y[k] and y[i] - y[j] <= window and y[k] - y[i] <= window:
                    a = (y[k] - y[i]) / (y[k] - y[j])
                    logits.append(u[i] @ (a * fixed[j] + (1 - a) * fixed[k]) / temperature)
                    weights.append(torch.ones((), dtype=DOUBLE))
                    positives.append(logits[-1])
        if positives:
            bottom = (torch.stack(logits) + torch.stack(weights).log()).logsumexp(0)
            losses.append(bottom - torch.stack(positives).mean())
    return torch.stack(losses).mean()


def lambda_rank(scores, grades):
    found = []
    for s, g in zip(scores, grades, strict=True):
        rank, gain = s.argsort(descending=True).argsort() + 1, 2**g - 1
        discount = 1 / torch.log2(rank.double() + 1)
        ideal = (gain.sort(descending=True).values / torch.log2(torch.arange(6).double() + 2)).sum()
        pairs = [(i, j) for i in range(6) for j in range(6) if g[i] > g[j]]
        terms = [
            (gain[i] - gain[j]) * (discount[i] - discount[j]).abs() / ideal * F.softplus(s[j] - s[i]) for i, j in pairs
        ]
        found += [sum(terms)] if terms else []
    return torch.stack(found).mean()


def whitened_dense(x, y, z, groups):
    generator = torch.Generator().manual_seed(7)

    def whiten(v):
        places, out = torch.randperm(D, generator=generator), torch.empty_like(v)
        for part in places.chunk(groups):
            centred = v[:, part] - v[:, part].mean(0)
            values, vectors = torch.linalg.eigh(centred.T @ centred / N + 1e-5 * torch.eye(len(part), dtype=DOUBLE))
            out = out.index_copy(1, part, centred @ vectors @ torch.diag(values.rsqrt()) @ vectors.T)
        return out

    x, y, z = whiten(x), whiten(y), whiten(z)
    return info(cos(x, y) / 0.05) + info(cos(x, z) / 0.05)


def gte_dense(x, y, temperature):
    def others(a):
        return cos(a, a).masked_fill(~off, -INF)

    s = torch.cat([cos(x, y), others(x), cos(y, x), others(y)], 1) / temperature
    return (s.logsumexp(1) - s.diagonal()).mean()


def unicoil_dense(query, weights, documents, of_documents):
    match = query[:, None, :, None] == documents[None, :, None, :]
    s = (match * weights[:, None, :, None] * of_documents[None, :, None, :]).amax(3).sum(2)
    return info(s, 2 * torch.arange(N))


def coil_dense(x, words, y, other_words):
    match = words[:, None, :, None] == other_words[None, :, None, :]
    return info((torch.einsum("nad,mbd->nmab", x, y) * match).amax(3).sum(2))


def vse_dense(s):
    own = s.diagonal()
    hinges = (0.2 + s - own[:, None]).relu() + (0.2 + s - own).relu()
    return hinges[off].sum()


# Number, title, what it needs, how sure the formula is, calls and expressions.
# fmt: off
ROWS = [
    ("S074", "Multivariate Representation Learning for Information Retrieval",
     "divergence of Gaussians as an inner product; pairs ordered by a teacher", "PAPER", [
        ("mrl(gaussian_features(x, y), gaussian_features(private, other_private, document=True), teacher_scores[:, :4])",
         "mrl_dense(x, y, private, other_private, teacher_scores[:, :4])"),
    ]),
    ("S075", "ConSERT: A Contrastive Framework for Self-Supervised Sentence Representation Transfer",
     "NT-Xent as a sum of both views", "CODE", [
        ("consert(x, y)",
         "0.15 * consert_dense(x, y)"),
    ]),
    ("S076", "Beyond Matryoshka: Revisiting Sparse Coding for Adaptive Representation",
     "a sparse autoencoder and contrast of its codes", "CODE", [
        ("csr(x, table, table_bias, z[0], k=2)",
         "csr_dense(x, table, table_bias, z[0], 2)"),
    ]),
    ("S077", "Efficient and Interpretable Information Retrieval for Product Question Answering with Heterogeneous Data",
     "softmax of sparse and of dense rows; search by a weighted sum", "CODE", [
        ("info_nce(words_x, words_y, temperature=0.5, normalize=False) + info_nce(x, y, temperature=0.5, normalize=False) + 3e-2 * sparsity(words_x)",
         "info(words_x @ words_y.T / 0.5) + info(x @ y.T / 0.5) + 3e-2 * words_x.mean(0).square().sum()"),
        ("similarity_topk(torch.cat([0.5 * fixed, 0.5 * teacher], 1), torch.cat([corpus, corpus.roll(1, 1)], 1), 5).values",
         "(0.5 * fixed @ corpus.T + 0.5 * teacher @ corpus.roll(1, 1).T).topk(5).values"),
    ]),
    ("S078", "Contrastive Search Is What You Need For Neural Text Generation",
     "contrastive search; isotropy", "CODE", [
        ("decoding.contrastive_search(candidates, chances, contexts, alpha=0.6).score",
         "0.4 * chances - 0.6 * (unit(candidates) @ unit(contexts).mT).amax(2)"),
        ("metrics.isotropy(fixed, sequences)",
         "1 - (cos(fixed, fixed)[equal(sequences) & off]).mean()"),
    ]),
    ("S079", "Precise Zero-Shot Dense Retrieval without Relevance Labels",
     "search with the mean of a query and of written documents", "CODE", [
        ("similarity_topk(hyde_query(fixed, documents), corpus, 3).values",
         "(((fixed + documents.sum(1)) / 9) @ corpus.T).topk(3).values"),
    ]),
    ("S080", "Context-Adaptive Multi-Prompt Embedding with Large Language Models for Vision-Language Alignment",
     "CLIP with one's own negative text; forms not known", "INFERRED", [
        ("(info_nce(x, y, row_negatives=z, temperature=0.07) + info_nce(y, x, temperature=0.07)) / 2",
         "(info(torch.cat([cos(x, y), (unit(x) * unit(z)).sum(1, keepdim=True)], 1) / 0.07) + info(cos(y, x) / 0.07)) / 2"),
    ]),
    ("S081", "Unsupervised Document Embedding via Contrastive Augmentation",
     "SimCLR, MoCo, BYOL or SimSiam; which ones is not verified", "INFERRED", [
        ("nt_xent(x, y, temperature=0.5)",
         "ntx(x, y, 0.5)"),
        ("moco(x, y, queue, temperature=0.07)",
         "own_and_queue(unit(x), unit(y), unit(queue), 0.07)"),
        ("alignment(x, y.detach()) / 2 - 1  # SimSiam",
         "-F.cosine_similarity(x, y.detach()).mean()"),
    ]),
    ("S082", "Supervised Fine-Tuning or Contrastive Learning? Towards Better Multimodal LLM Reranking",
     "cross-entropy or binary cross-entropy of a group's scores", "PAPER", [
        ("listwise_cross_entropy(scores, torch.zeros(N, dtype=torch.int64))",
         "(scores.logsumexp(1) - scores[:, 0]).mean()"),
    ]),
    ("S083", "Unveiling Key Aspects of Fine-Tuning in Sentence Embeddings: A Representation Rank Analysis",
     "InfoNCE and the logarithm of the effective rank; which spectrum is not verified", "PAPER", [
        ("info_nce(x, y, temperature=0.05) + 0.1 * effective_rank(x).log()",
         "info(cos(x, y) / 0.05) + 0.1 * entropy_of_spectrum(x)"),
    ]),
    ("S084", "Unsupervised Context Aware Sentence Representation Pretraining for Multi-lingual Dense Retrieval",
     "both directions against a bank of one's own language", "INFERRED", [
        ("info_nce(x, y, queue, in_batch=False, negative_pairs=Pairs(same=(labels, queue_sets)), temperature=0.07) + info_nce(y, x, queue, in_batch=False, negative_pairs=Pairs(same=(labels, queue_sets)), temperature=0.07)",
         "of_own_bank(x, y, queue, labels, queue_sets) + of_own_bank(y, x, queue, labels, queue_sets)"),
    ]),
    ("S085", "Some Like It Small: Czech Semantic Embedding Models for Industry Applications",
     "squared distances to a teacher and SimCSE", "PAPER", [
        ("alignment(x, teacher, normalize=False) + simcse(x, y)",
         "(x - teacher).square().sum(1).mean() + info(cos(x, y) / 0.05)"),
    ]),
    ("S086", "A Compass for Navigating the World of Sentence Embeddings for the Telecom Domain",
     "evaluation; `metrics.retrieval_metrics` has accuracy at k, `metrics.isotropy`, `metrics.iso_score` and `metrics.similarity_histogram` the rest", "-", []),
    ("S087", "Joint Learning of Sentence Embeddings for Relevance and Entailment",
     "binary cross-entropy of a ratio of sums; pairs of lists", "CODE", [
        ("evidence_bce(scores, scores.roll(1, 1), grades)",
         "F.binary_cross_entropy((scores.sigmoid() * scores.roll(1, 1).sigmoid()).sum(1) / scores.roll(1, 1).sigmoid().sum(1), grades)"),
        ("pairwise_rank_distillation(scores, teacher_scores, kind='hinge', margin=1.0)",
         "rank_hinge(scores, teacher_scores)"),
    ]),
    ("S088", "Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval",
     "mined negatives without the batch; documents by their best chunk", "CODE", [
        ("ance(x, y, z)",
         "F.softplus((x * z).sum(1) - (x * y).sum(1)).mean()"),
        ("late_interaction(x[:, None], TokenSets(private, chunks), normalize=False)  # MaxP",
         "info(torch.einsum('nd,mcd->nmc', x, private).masked_fill(~chunks, -torch.inf).amax(2))"),
        ("mining.search(fixed, corpus, 3, documents=torch.arange(60) // 4).values",
         "(fixed @ corpus.T).view(N, 15, 4).amax(2).topk(3).values"),
    ]),
    ("S089", "Contrastive Loss is All You Need to Recover Analogies as Parallel Lines",
     "hinge of cosines of drawn negatives", "CODE", [
        ("triplet(x, y, z, margin=0.15, distance='cosine', reduction='sum')",
         "(0.15 - F.cosine_similarity(x, y) + F.cosine_similarity(x, z)).relu().sum()"),
        ("triplet(F.normalize(x), 0.8 * F.normalize(y), 1.2 * F.normalize(z), margin=0.15, distance='dot')  # a weight of either side",
         "(0.15 - 0.8 * F.cosine_similarity(x, y) + 1.2 * F.cosine_similarity(x, z)).relu().mean()"),
    ]),
    ("S090", "ConFit v2: Improving Resume-Job Matching using Hypothetical Resume Embedding and Runner-Up Hard-Negative Mining",
     "both directions with negatives of their own; negatives from a band of ranks", "CODE", [
        ("confit(x, y, z, queue)",
         "(info(cos(x, y, z) / 0.05) + info(cos(y, x, queue) / 0.05)) / 2"),
        ("confit(x, y, z, queue, weight=0.3)",
         "0.3 * info(cos(x, y, z) / 0.05) + 0.7 * info(cos(y, x, queue) / 0.05)"),
        ("mine_hard_negatives(fixed, corpus, positives, 3, rules=runner_up_rules(0.1, 0.15)).scores",
         "ranked(fixed, corpus, positives, 6, 9)"),
    ]),
    ("S091", "BiXSE: Improving Dense Retrieval via Probabilistic Graded Relevance Distillation",
     "binary cross-entropy of all pairs with a graded diagonal", "PAPER", [
        ("bixse(x, y, grades, scale=scale, bias=bias)",
         "F.binary_cross_entropy_with_logits(scale * cos(x, y) + bias, torch.diag(grades), reduction='none').sum(1).mean()"),
    ]),
    ("S092", "NER Retriever: Zero-Shot Named Entity Retrieval with Type-Aware Embeddings",
     "triplets of cosines of one anchor", "CODE", [
        ("triplet(x[:1].expand(N, D), y, z, margin=0.5, distance='cosine')",
         "(0.5 - F.cosine_similarity(x[:1], y) + F.cosine_similarity(x[:1], z)).relu().mean()"),
    ]),
    ("S093", "Mixup Your Own Pairs",
     "supervised contrastive regression with mixtures", "CODE", [
        ("supremix(x, values, shares, window=3.5)",
         "supremix_dense(x, values, shares, 3.5)"),
    ]),
    ("S094", "Blending Learning to Rank and Dense Representations for Efficient and Effective Cascades",
     "cascades and LambdaMART", "PAPER", [
        ("pairwise_rank_distillation(scores, graded, pair_weight='lambda', pair_reduction='sum')",
         "lambda_rank(scores, graded)"),
    ]),
    ("S095", "Query-as-context Pre-training for Dense Passage Retrieval",
     "NT-Xent of neighbouring rows, raw inner products", "CODE", [
        ("nt_xent(x[0:6:2], x[1:6:2], temperature=1.0, normalize=False)",
         "ntx(x[0:6:2], x[1:6:2], 1.0, norm=False)"),
    ]),
    ("S096", "CoRe: Context-Regularized Text Embedding Learning for Text-to-Image Personalization",
     "cosines along tokens; squared error of attention", "CODE", [
        ("alignment(hidden.mT.flatten(0, 1), other_tokens.mT.flatten(0, 1)) / 2",
         "(1 - F.cosine_similarity(hidden, other_tokens, dim=1)).mean()"),
    ]),
    ("S097", "PAIR: Leveraging Passage-Centric Similarity Relation for Improving Dense Passage Retrieval",
     "queries among passages, and passages among queries", "CODE", [
        ("pair(x, y, z)",
         "0.9 * info(x @ torch.cat([y, z]).T) + 0.1 * info(y @ torch.cat([x, z]).T)"),
    ]),
    ("S098", "Whitening-based Contrastive Learning of Sentence Embeddings",
     "whitening in shuffled groups; one InfoNCE for each positive", "CODE", [
        ("whitened_cse(x, y, z, groups=3, generator=torch.Generator().manual_seed(7))",
         "whitened_dense(x, y, z, 3)"),
    ]),
    ("S099", "Factorising Meaning and Form for Intent-Preserving Paraphrasing",
     "soft assignment to a codebook", "CODE", [
        ("similarity_values(x, table, scale=2.0, col_bias=-table.square().sum(1))",
         "(-(x[:, None] - table).square().sum(2)).softmax(1) @ table"),
        ("F.mse_loss(x, RunningPrototypes(3, D).double()(x, labels)[labels])  # codes by averages, and their commitment",
         "F.mse_loss(x, torch.stack([x[labels == c].mean(0) for c in range(3)]).detach()[labels])"),
    ]),
    ("S100", "A Primer on Contrastive Pretraining in Language Processing: Methods, Lessons Learned and Perspectives",
     "survey; binary cross-entropy of texts and their labels", "PAPER", [
        ("pair_bce(x, table, path_rows, path_nodes, signs, reduction='sum')",
         "F.binary_cross_entropy_with_logits((x[path_rows] * table[path_nodes]).sum(1), signs, reduction='sum')"),
    ]),
    ("S101", "Efficient Domain Adaptation of Sentence Embeddings using Adapters",
     "supervised SimCSE of adapters, presumably", "INFERRED", [
        ("simcse(x, y, z)",
         "info(cos(x, y, z) / 0.05)"),
    ]),
    ("S102", "Lexical Generalization Improves with Larger Models and Longer Training",
     "evaluation: gap of accuracy between subsets; a mean of `metrics.contrast_accuracy` of each", "-", []),
    ("S103", "Repurposing Language Models into Embedding Models: Finding the Compute-Optimal Recipe",
     "InfoNCE, scale 40", "PAPER", [
        ("info_nce(x, y, scale=40.0)",
         "info(40 * cos(x, y))"),
    ]),
    ("S104", "Dwell in the Beginning: How Language Models Embed Long Documents for Dense Retrieval",
     "InfoNCE with mined negatives", "INFERRED", [
        ("info_nce(x, y, z, temperature=0.05)",
         "info(cos(x, y, z) / 0.05)"),
    ]),
    ("S105", "Unsupervised Dense Information Retrieval with Contrastive Learning",
     "one's key against a queue, raw; positives and negatives of the batch in fine-tuning", "CODE", [
        ("contriever(x, y, queue, label_smoothing=0.1)",
         "own_and_queue(x, y, queue, 0.05, label_smoothing=0.1)"),
        ("info_nce(x, y, z, temperature=0.05, normalize=False)",
         "info(x @ torch.cat([y, z]).T / 0.05)"),
    ]),
    ("S106", "Towards General Text Embeddings with Multi-stage Contrastive Learning",
     "one denominator of queries and documents against each other and themselves", "CODE", [
        ("gte(x, y, temperature=0.05)",
         "gte_dense(x, y, 0.05)"),
    ]),
    ("S107", "Contrastive Learning for Prompt-Based Few-Shot Language Learners",
     "SupCon of two views", "CODE", [
        ("sup_con(torch.cat([x, y]), labels.repeat(2), temperature=0.07)",
         "supcon_self(torch.cat([x, y]), labels.repeat(2), 0.07)"),
    ]),
    ("S108", "VTechAGP: An Academic-to-General-Audience Text Paraphrase Dataset and Benchmark Models",
     "a contrast of keywords that is not known; the candidate that resembles all others", "INFERRED", [
        ("(F.one_hot(consensus(fixed), N) * fixed[:, 0]).sum()",
         "fixed[(cos(fixed, fixed) * off).sum(1).argmax(), 0]"),
    ]),
    ("S109", "RankGen: Improving Text Generation with Large Ranking Models",
     "continuations and generations as columns; ranks of continuations", "CODE", [
        ("info_nce(x, y, z, temperature=1.0, normalize=False)",
         "info(x @ torch.cat([y, z]).T)"),
        ("rank_continuations(fixed, corpus).values",
         "(fixed @ corpus.T).topk(2).values"),
    ]),
    ("S110", "A Few Brief Notes on DeepImpact, COIL, and a Conceptual Framework for Information Retrieval Techniques",
     "weights of shared words, or vectors of shared words", "CODE", [
        ("unicoil(query_words, query_weights, document_words, document_weights, vocabulary=12, group=2)",
         "unicoil_dense(query_words, query_weights, document_words, document_weights)"),
        ("F.cross_entropy(coil_scores(some_tokens, some_words, other_tokens, other_words), torch.arange(3))",
         "coil_dense(some_tokens, some_words, other_tokens, other_words)"),
    ]),
    ("S111", "Contrastive Prompting Enhances Sentence Embeddings in LLMs through Inference-Time Steering",
     "activations of two prompts contrasted; nothing here serves it, but `metrics.spearman` for its evaluation", "-", []),
    ("S112", "Encouraging Paragraph Embeddings to Remember Sentence Identity Improves Classification",
     "binary cross-entropy of a network over pairs", "PAPER", [
        ("F.binary_cross_entropy_with_logits(scores[:, 0], signs[:N])  # plain torch: a network is no inner product",
         "(F.softplus(scores[:, 0]) - signs[:N] * scores[:, 0]).mean()"),
    ]),
    ("S113", "How to Train Your DRAGON: Diverse Augmentation Towards Generalizable Dense Retrieval",
     "DPR without padded passages; positives and negatives from bands of a teacher's ranks", "CODE", [
        ("dpr(x, passages, group=2, pairs=Pairs(columns=padded == 0))",
         "info((x @ passages.T).masked_fill(padded == 1, -torch.inf), 2 * torch.arange(N))"),
        ("mining.search(fixed, corpus, 50).values[:, 45:50]",
         "(fixed @ corpus.T).topk(50).values[:, 45:50]"),
    ]),
    ("S114", "Contrastive Learning of User Behavior Sequence for Context-Aware Document Ranking",
     "NT-Xent", "CODE", [
        ("nt_xent(x, y, temperature=0.1)",
         "ntx(x, y, 0.1)"),
    ]),
    ("S115", "Customizing Language Model Responses with Contrastive In-Context Learning",
     "prompting; `similarity_topk(..., pairs=Pairs(same=(wanted, labels)))` finds demonstrations of a label", "-", []),
    ("S116", "Bad Form: Comparing Context-Based and Form-Based Few-Shot Learning in Distributional Semantic Models",
     "skip-grams with drawn negatives; a least-squares map", "INFERRED", [
        ("negative_sampling(x, table, context, drawn, reduction='sum')",
         "sgns(x, table, context, drawn, 0)"),
    ]),
    ("S117", "Evaluation of sentence embeddings in downstream and linguistic probing tasks",
     "evaluation; hinge of both directions", "CODE", [
        ("vse(x, y, margin=0.2, reduction='sum')",
         "vse_dense(cos(x, y))"),
    ]),
    ("S118", "Bridging Language and Items for Retrieval and Recommendation",
     "InfoNCE; false negatives with logit 0; cross-entropy over a catalogue", "CODE", [
        ("info_nce(x, y, temperature=0.05)",
         "info(cos(x, y) / 0.05)"),
        ("unisrec(x, y, ids)",
         "info((cos(x, y) / 0.07).masked_fill(equal(ids) & off, 0.0))"),
        ("linear_cross_entropy(x, table, context)",
         "F.cross_entropy(x @ table.T, context)"),
    ]),
    ("S119", "Which Features are Learnt by Contrastive Learning? On the Role of Simplicity Bias in Class Collapse and Feature Suppression",
     "spectral contrastive loss; SupCon and SimCLR together", "PAPER", [
        ("spectral_contrastive(x, y)",
         "-2 * (x @ y.T).diagonal().mean() + (x @ y.T)[off].square().mean()"),
        ("0.3 * sup_con(torch.cat([x, y]), labels.repeat(2), temperature=0.5) + 0.7 * nt_xent(x, y, temperature=0.5)",
         "0.3 * supcon_self(torch.cat([x, y]), labels.repeat(2), 0.5) + 0.7 * ntx(x, y, 0.5)"),
    ]),
]
# fmt: on
