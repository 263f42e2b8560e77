"""Every loss with inputs of any size, so that what is asked of one loss is asked of all of them."""

from __future__ import annotations

from .. import losses
from ..core.rules import Pairs
from .draws import Draw
from .loss_cases import (
    LossCase,
    graded_lists,
    masked,
    mean_over_positives,
    prefixes,
    rules,
    soft_targets,
    state,
    view_rules,
)

_QUERY_KEY = {"query": Draw.matrix, "key": Draw.matrix}
_IMAGE_TEXT = {"image": Draw.matrix, "text": Draw.matrix}
_VIEWS = {"z0": Draw.matrix, "z1": Draw.matrix, "scale": Draw.scale}
_LABELLED = {"x": Draw.matrix, "labels": Draw.labels}
_TWO_SIDED = {**_LABELLED, "y": Draw.columns, "col_labels": Draw.col_labels}
_SCALE, _WEIGHT = {"scale": Draw.scale}, {"weight": Draw.weight}
_CLASSES = {"x": Draw.matrix, "prototypes": Draw.columns, "labels": Draw.column}
_GTE = {"query": Draw.matrix, "document": Draw.matrix, **_SCALE}
_GIST = {**_QUERY_KEY, "guide_query": Draw.guide, "guide_key": Draw.guide, **_SCALE}
_MINED = {"query": Draw.matrix, "positive": Draw.matrix, "corpus": Draw.columns, **_SCALE}
_QWEN3 = ("query_to_doc", "query_to_query", "doc_to_doc")
_TRIPLET = {"anchor": Draw.matrix, "positive": Draw.matrix, "negative": Draw.matrix}
_TOKENS = {"queries": Draw.tokens, "documents": Draw.tokens, "scale": Draw.scale}
_LISTS = {"scores": Draw.list_scores, "teacher_scores": Draw.teacher_scores}
_LABELLED_LISTS = {"scores": Draw.list_scores, "relevance": Draw.relevance}
_MASKED_LISTS = {**_LISTS, "mask": Draw.list_mask, **_WEIGHT}
_TOKEN_LABELS = {"hidden": Draw.matrix, "head": Draw.columns, "labels": Draw.column}
_TAUGHT = {"x": Draw.matrix, "y": Draw.matrix, "teacher_x": Draw.teacher, "teacher_y": Draw.teacher}
_DINO = {"student": Draw.matrix, "prototypes": Draw.columns, "teacher": Draw.teacher}
_SWAV = {"x": Draw.matrix, "y": Draw.matrix, "prototypes": Draw.columns}
_SOFT = {"teacher_temperature": 0.3}
_PAIR_LIST = {"x": Draw.columns, "y": Draw.columns, "rows": Draw.own, "cols": Draw.column, "labels": Draw.grades}

# The entry with the name of its function is the one that tests take where one is enough.
LOSSES: dict[str, LossCase] = {
    "info_nce": LossCase(losses.info_nce, {**_QUERY_KEY, **_SCALE}),
    "info_nce columns": LossCase(
        losses.info_nce,
        {"query": Draw.matrix, "key": Draw.columns, "target": Draw.column, "scale": Draw.scale_of_rows, **_WEIGHT},
    ),
    "info_nce negatives": LossCase(
        losses.info_nce,
        {**_QUERY_KEY, **_SCALE, "negatives": Draw.columns, "row_negatives": Draw.of_each_row},
        {"normalize": False},
    ),
    "info_nce pairs": LossCase(losses.info_nce, {**_QUERY_KEY, **_SCALE, "ids": Draw.labels, **_WEIGHT}, arrange=rules),
    "info_nce z_loss": LossCase(losses.info_nce, {**_QUERY_KEY, **_SCALE}, {"z_loss": 0.1, "margin": 0.2}),
    "info_nce smoothing": LossCase(losses.info_nce, {**_QUERY_KEY, **_SCALE, "label_smoothing": Draw.share, **_WEIGHT}),
    "info_nce diagnostics": LossCase(losses.info_nce, {**_QUERY_KEY, **_SCALE}, {"diagnostics": True}),
    "info_nce given": LossCase(
        losses.info_nce,
        {
            **_QUERY_KEY,
            "negatives": Draw.columns,
            "row_negatives": Draw.of_each_row,
            "row_negative_bias": Draw.share,
            **_SCALE,
            **_WEIGHT,
        },
        {"in_batch": False},
    ),
    "info_nce hardness": LossCase(
        losses.info_nce, {**_QUERY_KEY, "negatives": Draw.columns, **_SCALE}, {"hardness": 2.0}
    ),
    "info_nce two sets of rules": LossCase(
        losses.info_nce,
        {**_QUERY_KEY, "negatives": Draw.columns, **_SCALE},
        {"pairs": Pairs(below=0.9), "negative_pairs": Pairs(above=-0.9), "label_smoothing": 0.1, "smooth": "others"},
    ),
    "clip": LossCase(losses.clip, {**_IMAGE_TEXT, **_SCALE}),
    "clip smoothing": LossCase(losses.clip, {**_IMAGE_TEXT, **_SCALE, **_WEIGHT}, {"label_smoothing": 0.1}),
    "clip pairs": LossCase(
        losses.clip,
        {**_IMAGE_TEXT, **_SCALE, "ids": Draw.labels, "label_smoothing": Draw.share},
        {"diagnostics": True},
        arrange=rules,
    ),
    "clip negatives": LossCase(
        losses.clip,
        {**_IMAGE_TEXT, "text_negatives": Draw.columns, "image_negatives": Draw.columns, **_SCALE, **_WEIGHT},
        {"diagnostics": True},
    ),
    "nt_xent": LossCase(losses.nt_xent, _VIEWS, copies=2),
    "nt_xent pairs": LossCase(
        losses.nt_xent, {**_VIEWS, "ids": Draw.labels}, {"diagnostics": True}, arrange=view_rules, copies=2
    ),
    "sup_con": LossCase(losses.sup_con, {**_LABELLED, **_SCALE}),
    "sup_con two-sided": LossCase(losses.sup_con, {**_TWO_SIDED, **_SCALE, **_WEIGHT}),
    "sup_con log_mean": LossCase(losses.sup_con, {**_LABELLED, **_SCALE}, {"positives": "log_mean"}),
    "multi_positive_info_nce": LossCase(losses.multi_positive_info_nce, {**_LABELLED, **_SCALE}),
    "multi_positive_info_nce pairs": LossCase(
        losses.multi_positive_info_nce, {**_LABELLED, **_SCALE}, {"mean_over": "pairs"}, mean=mean_over_positives
    ),
    "multi_positive_info_nce two-sided": LossCase(losses.multi_positive_info_nce, {**_TWO_SIDED, **_SCALE, **_WEIGHT}),
    "soft_info_nce": LossCase(
        losses.soft_info_nce,
        {
            "query": Draw.matrix,
            "key": Draw.columns,
            "indices": Draw.two_columns,
            "shares": Draw.shares_of_two,
            "label_smoothing": Draw.share,
            **_SCALE,
        },
        arrange=soft_targets,
    ),
    "dcl": LossCase(losses.dcl, _VIEWS, copies=2),
    "dcl sigma": LossCase(losses.dcl, _VIEWS, {"sigma": 0.5}, copies=2),
    "debiased": LossCase(losses.debiased, _VIEWS, copies=2),
    "hcl": LossCase(losses.hcl, _VIEWS, copies=2),
    "hcl pairs": LossCase(
        losses.hcl, {**_VIEWS, "ids": Draw.labels}, {"diagnostics": True}, arrange=view_rules, copies=2
    ),
    "hn_nce": LossCase(losses.hn_nce, {**_IMAGE_TEXT, **_SCALE, **_WEIGHT}),
    "sog_clr": LossCase(
        losses.sog_clr,
        {**_IMAGE_TEXT, **_SCALE, "index": Draw.sample, "log_u": Draw.log_u},
        arrange=state,
    ),
    "sog_clr temperatures": LossCase(
        losses.sog_clr,
        {
            **_IMAGE_TEXT,
            "scale": Draw.scale_of_rows,
            "text_scale": Draw.scale_of_rows,
            "index": Draw.sample,
            "log_u": Draw.log_u,
            **_WEIGHT,
        },
        arrange=state,
    ),
    "gte": LossCase(losses.gte, _GTE),
    "gte per_direction": LossCase(
        losses.gte,
        {**_GTE, "scale": Draw.scale_of_rows, **_WEIGHT},
        {"partition": "per_direction", "directions": ("query_to_doc", "doc_to_query")},
    ),
    "gte negatives": LossCase(losses.gte, {**_GTE, "negatives": Draw.of_each_row}),
    "gte margin": LossCase(losses.gte, _GTE, {"directions": _QWEN3, "false_negative_margin": 0.1}),
    "gist": LossCase(losses.gist, _GIST, {"margin": -0.05}),
    "gist relative": LossCase(
        losses.gist,
        {**_GIST, "negatives": Draw.columns, "guide_negatives": Draw.guide_columns, **_WEIGHT},
        {"margin_strategy": "relative", "margin": -0.5},
    ),
    "cos_face": LossCase(losses.cos_face, {**_CLASSES, **_SCALE}),
    "arc_face": LossCase(losses.arc_face, {**_CLASSES, "scale": Draw.scale_of_rows, **_WEIGHT}),
    "margin_softmax": LossCase(losses.margin_softmax, {**_CLASSES, "margin": Draw.share}, {"kind": "arcface"}),
    "moco": LossCase(losses.moco, {**_QUERY_KEY, "queue": Draw.queue, **_SCALE}),
    "moco labels": LossCase(
        losses.moco,
        {
            **_QUERY_KEY,
            "queue": Draw.queue,
            **_SCALE,
            "labels": Draw.labels,
            "queue_labels": Draw.col_labels,
            **_WEIGHT,
        },
    ),
    "mined_info_nce": LossCase(losses.mined_info_nce, _MINED, {"k": 3}),
    "mined_info_nce pairs": LossCase(
        losses.mined_info_nce,
        {**_MINED, "scale": Draw.scale_of_rows, "ids": Draw.labels, "col_ids": Draw.col_labels, **_WEIGHT},
        {"k": 2, "in_batch": False, "normalize": False},
        arrange=rules,
    ),
    "mined_info_nce labels": LossCase(
        losses.mined_info_nce, {**_MINED, "indices": Draw.two_columns, "labels": Draw.labels}
    ),
    "late_interaction": LossCase(losses.late_interaction, _TOKENS, keeps_scores=True),
    "late_interaction negatives": LossCase(
        losses.late_interaction,
        {
            "queries": Draw.tokens,
            "documents": Draw.more_tokens,
            "mask": Draw.token_mask,
            "target": Draw.column,
            "negatives": Draw.more_tokens,
            "row_negatives": Draw.lists_of_tokens,
            "scale": Draw.scale_of_rows,
            **_WEIGHT,
        },
        {"reduce": "mean", "normalize": False},
        arrange=masked,
        keeps_scores=True,
    ),
    "similarity_distillation": LossCase(
        losses.similarity_distillation,
        {"x": Draw.matrix, "y": Draw.columns, "teacher_x": Draw.teacher, "teacher_y": Draw.queue, **_SCALE, **_WEIGHT},
        {"teacher_scale": 4.0},
    ),
    "similarity_distillation symmetric": LossCase(
        losses.similarity_distillation,
        {**_TAUGHT, **_SCALE, "ids": Draw.labels},
        {"divergence": "ce", "symmetric": True, "teacher_scale": 4.0},
        arrange=rules,
    ),
    "similarity_distillation reverse": LossCase(
        losses.similarity_distillation, {**_TAUGHT, "scale": Draw.scale_of_rows}, {"divergence": "reverse_kl"}
    ),
    "similarity_distillation js": LossCase(
        losses.similarity_distillation, {**_TAUGHT, **_SCALE}, {"divergence": "js", "symmetric": True}
    ),
    "similarity_distillation self": LossCase(
        losses.similarity_distillation,
        {"x": Draw.matrix, "teacher_x": Draw.teacher, **_SCALE},
        {"y": None, "normalize": False},
    ),
    "distance_distillation": LossCase(losses.distance_distillation, {"x": Draw.matrix, "teacher_x": Draw.teacher}),
    "distance_distillation absolute": LossCase(
        losses.distance_distillation,
        {"x": Draw.matrix, "teacher_x": Draw.teacher, **_WEIGHT},
        {"relative": False, "delta": 0.1},
    ),
    "matryoshka_info_nce": LossCase(losses.matryoshka_info_nce, {**_QUERY_KEY, **_SCALE}, arrange=prefixes),
    "matryoshka_info_nce columns": LossCase(
        losses.matryoshka_info_nce,
        {"query": Draw.matrix, "key": Draw.columns, "target": Draw.column, **_SCALE, **_WEIGHT},
        {"normalize": False},
        arrange=prefixes,
    ),
    "matryoshka_clip": LossCase(losses.matryoshka_clip, {**_IMAGE_TEXT, **_SCALE}, arrange=prefixes),
    "matryoshka_clip pairs": LossCase(
        losses.matryoshka_clip, {**_IMAGE_TEXT, **_SCALE, "ids": Draw.labels, **_WEIGHT}, arrange=prefixes
    ),
    "matryoshka_nt_xent": LossCase(losses.matryoshka_nt_xent, _VIEWS, arrange=prefixes, copies=2),
    "siglip": LossCase(losses.siglip, {**_IMAGE_TEXT, **_SCALE, "bias": Draw.bias}),
    "siglip pairs": LossCase(
        losses.siglip,
        {**_IMAGE_TEXT, **_SCALE, "bias": Draw.bias, "ids": Draw.labels, **_WEIGHT},
        {"diagnostics": True},
        arrange=rules,
    ),
    "multi_positive_siglip": LossCase(
        losses.multi_positive_siglip,
        {
            "x": Draw.matrix,
            "y": Draw.columns,
            "labels": Draw.labels,
            "col_labels": Draw.col_labels,
            **_SCALE,
            "bias": Draw.bias,
            **_WEIGHT,
        },
        {"balanced": True},
    ),
    "bixse": LossCase(losses.bixse, {**_QUERY_KEY, "grades": Draw.grades, **_SCALE, "bias": Draw.bias}),
    "bixse lists": LossCase(
        losses.bixse,
        {
            "query": Draw.matrix,
            "key": Draw.columns,
            "target": Draw.two_columns,
            "grades": Draw.list_grades,
            "scale": Draw.scale_of_rows,
            **_WEIGHT,
        },
        arrange=graded_lists,
    ),
    "pair_bce": LossCase(losses.pair_bce, {**_PAIR_LIST, **_SCALE, "bias": Draw.bias, **_WEIGHT}),
    "pair_mse": LossCase(losses.pair_mse, {"x": Draw.matrix, "y": Draw.matrix, "labels": Draw.grades}),
    "multi_similarity": LossCase(losses.multi_similarity, _LABELLED, {"beta": 10.0}),
    "multi_similarity two-sided": LossCase(losses.multi_similarity, {**_TWO_SIDED, **_WEIGHT}, {"beta": 10.0}),
    "triplet": LossCase(losses.triplet, {**_TRIPLET, **_WEIGHT}),
    "batch_hard_triplet": LossCase(losses.batch_hard_triplet, _LABELLED),
    "batch_hard_triplet soft": LossCase(
        losses.batch_hard_triplet, {**_TWO_SIDED, **_WEIGHT}, {"soft": True, "distance": "cosine"}
    ),
    "batch_semi_hard_triplet": LossCase(
        losses.batch_semi_hard_triplet, {**_LABELLED, "target": Draw.successor}, permutes=False
    ),
    "batch_semi_hard_triplet two-sided": LossCase(
        losses.batch_semi_hard_triplet, {**_TWO_SIDED, "target": Draw.column, **_WEIGHT}, {"distance": "sqeuclidean"}
    ),
    "contrastive": LossCase(losses.contrastive, {"x": Draw.matrix, "y": Draw.matrix, "labels": Draw.zero_or_one}),
    "vse": LossCase(losses.vse, _IMAGE_TEXT),
    "vse hardest": LossCase(losses.vse, {**_IMAGE_TEXT, "labels": Draw.labels, **_WEIGHT}, {"hardest": True}),
    "energy_hinge": LossCase(losses.energy_hinge, {**_QUERY_KEY, "negatives": Draw.columns}),
    "energy_hinge sum": LossCase(losses.energy_hinge, {**_QUERY_KEY, **_WEIGHT}, {"hardest": False}),
    "simctg": LossCase(
        losses.simctg, {"x": Draw.matrix, "segments": Draw.labels}, {"margin": 1.0}, mean=mean_over_positives
    ),
    "ge2e": LossCase(losses.ge2e, {**_LABELLED, **_SCALE}),
    "ge2e contrast": LossCase(losses.ge2e, {**_LABELLED, **_WEIGHT}, {"kind": "contrast"}),
    "koleo": LossCase(losses.koleo, {"x": Draw.matrix}),
    "koleo weight": LossCase(losses.koleo, {"x": Draw.matrix, **_WEIGHT}),
    "dino": LossCase(losses.dino, {**_DINO, "teacher_prototypes": Draw.queue, **_SCALE}),
    "dino sinkhorn": LossCase(
        losses.dino, {**_DINO, "scale": Draw.scale_of_rows, **_WEIGHT}, {"assignment": "sinkhorn", **_SOFT}
    ),
    "swav": LossCase(losses.swav, {**_SWAV, **_SCALE}, {"epsilon": 0.3}),
    "swav queue": LossCase(losses.swav, {**_SWAV, "queue": Draw.queue, **_WEIGHT}, {"epsilon": 0.3}),
    "alignment": LossCase(losses.alignment, {"x": Draw.matrix, "y": Draw.matrix, **_WEIGHT}, {"power": 1.5}),
    "dpo": LossCase(
        losses.dpo,
        {
            "chosen": Draw.log_prob,
            "rejected": Draw.log_prob,
            "reference_chosen": Draw.log_prob,
            "reference_rejected": Draw.log_prob,
        },
        {"label_smoothing": 0.1},
    ),
    "dpo ipo": LossCase(losses.dpo, {"chosen": Draw.log_prob, "rejected": Draw.log_prob, **_WEIGHT}, {"kind": "ipo"}),
    "linear_cross_entropy": LossCase(losses.linear_cross_entropy, _TOKEN_LABELS),
    "linear_cross_entropy weighted": LossCase(losses.linear_cross_entropy, {**_TOKEN_LABELS, **_WEIGHT}),
    "linear_cross_entropy smoothing": LossCase(
        losses.linear_cross_entropy,
        {**_TOKEN_LABELS, **_WEIGHT},
        {"label_smoothing": 0.1, "z_loss": 0.1},
    ),
    "margin_mse": LossCase(losses.margin_mse, _LISTS),
    "margin_mse masked": LossCase(losses.margin_mse, _MASKED_LISTS),
    "y_aware_info_nce": LossCase(
        losses.y_aware_info_nce, {**_QUERY_KEY, "labels": Draw.labels, **_SCALE, **_WEIGHT}, {"bandwidth": 1.5}
    ),
    "listwise_cross_entropy": LossCase(losses.listwise_cross_entropy, _LABELLED_LISTS),
    "listwise_cross_entropy log_mean": LossCase(
        losses.listwise_cross_entropy,
        {**_LABELLED_LISTS, "mask": Draw.list_mask, "temperature": Draw.temperature, **_WEIGHT},
        {"positives": "log_mean"},
    ),
    "listwise_distillation": LossCase(losses.listwise_distillation, _LISTS),
    "listwise_distillation temperatures": LossCase(
        losses.listwise_distillation, {**_MASKED_LISTS, "temperature": Draw.temperature}, {"teacher_temperature": 0.3}
    ),
    "listwise_distillation listnet": LossCase(losses.listwise_distillation, _MASKED_LISTS, {"kind": "listnet"}),
    "listwise_distillation listmle": LossCase(
        losses.listwise_distillation, {**_MASKED_LISTS, "temperature": Draw.temperature}, {"kind": "listmle"}
    ),
    "pairwise_rank_distillation": LossCase(losses.pairwise_rank_distillation, _LISTS),
    "pairwise_rank_distillation hinge": LossCase(
        losses.pairwise_rank_distillation,
        {**_MASKED_LISTS, "temperature": Draw.temperature},
        {"kind": "hinge", "pair_weight": "reciprocal_rank", "pair_reduction": "sum"},
    ),
    "pairwise_rank_distillation lambda": LossCase(losses.pairwise_rank_distillation, _LISTS, {"pair_weight": "lambda"}),
    "negative_sampling": LossCase(
        losses.negative_sampling,
        {
            "center": Draw.matrix,
            "table": Draw.columns,
            "context": Draw.column,
            "negatives": Draw.two_columns,
            **_WEIGHT,
        },
    ),
}
