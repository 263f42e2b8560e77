"""Objectives of papers that are more than one loss: a few lines over the package, with the defaults of their source.

    from contrastive_ops.recipes import simcse

    loss = simcse(first_pass, second_pass)

Each function says where its formula and its numbers come from. Where a paper and its released code differ, the paper is
the default and the code an option. Papers whose objective is one loss of `losses` have no function; `docs/papers.md`
lists the calls of all of them. Arguments are checked by the losses, under whose names errors appear.
"""

from .distillation import ranksyn_targets, static_embedding_kd
from .generation import consensus, rank_continuations, token_differences
from .labels import cosine_contrastive, curl, evidence_bce, fedsa, fedsa_margin, mclrec_regularizer, supremix, unisrec
from .regularizers import align_uniform, csr, unsee
from .reinforcement import hypo, laeo
from .retrieval import (
    ance,
    bitext_margin,
    clp,
    confit,
    contriever,
    dpr,
    gaussian_features,
    hyde_query,
    mnr_plus,
    mrl,
    pair,
    positive_aware_rules,
    runner_up_rules,
    simlm,
)
from .sentence import (
    attention_information,
    clhaif,
    cluster_ns,
    consert,
    dclr,
    dclr_noise,
    mcse,
    promcse,
    quick_thought,
    sg_opt,
    simcse,
    whitened_cse,
)
from .tokens import agrame, coil_scores, rcmd, splade, splade_head, unicoil
from .vision_language import diht, gcl, limoe_router_losses, proclip, segment_mean, superflow

__all__ = [
    "agrame",
    "align_uniform",
    "ance",
    "attention_information",
    "bitext_margin",
    "clhaif",
    "clp",
    "cluster_ns",
    "coil_scores",
    "confit",
    "consensus",
    "consert",
    "contriever",
    "cosine_contrastive",
    "csr",
    "curl",
    "dclr",
    "dclr_noise",
    "diht",
    "dpr",
    "evidence_bce",
    "fedsa",
    "fedsa_margin",
    "gaussian_features",
    "gcl",
    "hyde_query",
    "hypo",
    "laeo",
    "limoe_router_losses",
    "mclrec_regularizer",
    "mcse",
    "mnr_plus",
    "mrl",
    "pair",
    "positive_aware_rules",
    "proclip",
    "promcse",
    "quick_thought",
    "rank_continuations",
    "ranksyn_targets",
    "rcmd",
    "runner_up_rules",
    "segment_mean",
    "sg_opt",
    "simcse",
    "simlm",
    "splade",
    "splade_head",
    "static_embedding_kd",
    "superflow",
    "supremix",
    "token_differences",
    "unicoil",
    "unisrec",
    "unsee",
    "whitened_cse",
]
