"""Every loss as a module: the function, its default temperature, and what it owns."""

from __future__ import annotations

from typing import Any

from .. import losses
from ..losses import RunningDenominator
from ._base import BiasedLoss, Loss, PrototypeLoss, ScaledLoss


class InfoNCELoss(ScaledLoss):
    """`contrastive_ops.info_nce` as a module: ``InfoNCELoss(0.05)(query, key, negatives)``."""

    function = staticmethod(losses.info_nce)
    default_temperature = 0.07


class CLIPLoss(ScaledLoss):
    """`contrastive_ops.clip` as a module with a learnable temperature: ``CLIPLoss()(image, text)``."""

    function = staticmethod(losses.clip)
    default_temperature = 0.07
    default_learnable = True


class NTXentLoss(ScaledLoss):
    """`contrastive_ops.nt_xent` as a module: ``NTXentLoss(0.1)(view0, view1)``."""

    function = staticmethod(losses.nt_xent)
    default_temperature = 0.5


class SupConLoss(ScaledLoss):
    """`contrastive_ops.sup_con` as a module: ``SupConLoss(0.1)(embeddings, labels)``."""

    function = staticmethod(losses.sup_con)
    default_temperature = 0.1


class MultiPositiveInfoNCELoss(ScaledLoss):
    """`contrastive_ops.multi_positive_info_nce` as a module: ``MultiPositiveInfoNCELoss()(embeddings, labels)``."""

    function = staticmethod(losses.multi_positive_info_nce)
    default_temperature = 0.07


class SoftInfoNCELoss(ScaledLoss):
    """`contrastive_ops.soft_info_nce` as a module: ``SoftInfoNCELoss()(query, key, (indptr, indices, weights))``."""

    function = staticmethod(losses.soft_info_nce)
    default_temperature = 0.07


class DCLLoss(ScaledLoss):
    """`contrastive_ops.dcl` as a module: ``DCLLoss(0.1)(view0, view1)``; ``sigma=0.5`` weighs the positives (DCLW)."""

    function = staticmethod(losses.dcl)
    default_temperature = 0.1


class DebiasedLoss(ScaledLoss):
    """`contrastive_ops.debiased` as a module: ``DebiasedLoss(0.5, tau_plus=0.1)(view0, view1)``."""

    function = staticmethod(losses.debiased)
    default_temperature = 0.5


class HCLLoss(ScaledLoss):
    """`contrastive_ops.hcl` as a module: ``HCLLoss(0.5, beta=1.0, tau_plus=0.1)(view0, view1)``."""

    function = staticmethod(losses.hcl)
    default_temperature = 0.5


class HNNCELoss(ScaledLoss):
    """`contrastive_ops.hn_nce` as a module with a learnable temperature: ``HNNCELoss()(image, text)``."""

    function = staticmethod(losses.hn_nce)
    default_temperature = 0.07
    default_learnable = True


class GTELoss(ScaledLoss):
    """`contrastive_ops.gte` as a module: ``GTELoss()(query, document, hard_negatives)``."""

    function = staticmethod(losses.gte)
    default_temperature = 0.01


class GISTEmbedLoss(ScaledLoss):
    """`contrastive_ops.gist` as a module: ``GISTEmbedLoss()(query, key, guide_query, guide_key)``."""

    function = staticmethod(losses.gist)
    default_temperature = 0.01


class MoCoLoss(ScaledLoss):
    """`contrastive_ops.moco` as a module: ``MoCoLoss()(query, key, queue)``."""

    function = staticmethod(losses.moco)
    default_temperature = 0.07


class LateInteractionLoss(ScaledLoss):
    """`contrastive_ops.late_interaction` as a module: ``LateInteractionLoss()(queries, documents, negatives)``."""

    function = staticmethod(losses.late_interaction)
    default_temperature = 1.0


class MatryoshkaInfoNCELoss(ScaledLoss):
    """`contrastive_ops.matryoshka_info_nce` as a module: ``MatryoshkaInfoNCELoss(0.05, dims=dims)(query, key)``."""

    function = staticmethod(losses.matryoshka_info_nce)
    default_temperature = 0.07


class MatryoshkaCLIPLoss(ScaledLoss):
    """`contrastive_ops.matryoshka_clip` with a learned temperature: ``MatryoshkaCLIPLoss(dims=dims)(image, text)``."""

    function = staticmethod(losses.matryoshka_clip)
    default_temperature = 0.07
    default_learnable = True


class MatryoshkaNTXentLoss(ScaledLoss):
    """`contrastive_ops.matryoshka_nt_xent` as a module: ``MatryoshkaNTXentLoss(0.1, dims=dims)(view0, view1)``."""

    function = staticmethod(losses.matryoshka_nt_xent)
    default_temperature = 0.5


class MinedInfoNCELoss(ScaledLoss):
    """`contrastive_ops.mined_info_nce` as a module: ``MinedInfoNCELoss(0.05)(query, positive, corpus, k)``."""

    function = staticmethod(losses.mined_info_nce)
    default_temperature = 0.07


class SimilarityDistillationLoss(ScaledLoss):
    """`contrastive_ops.similarity_distillation` as a module with a learnable temperature.

    ``SimilarityDistillationLoss(symmetric=True)(image, text, teacher_image, teacher_text)``
    """

    function = staticmethod(losses.similarity_distillation)
    default_temperature = 0.07
    default_learnable = True


class DistanceDistillationLoss(Loss):
    """`contrastive_ops.distance_distillation` as a module: ``DistanceDistillationLoss()(embeddings, teacher)``."""

    function = staticmethod(losses.distance_distillation)


class SogCLRLoss(ScaledLoss):
    """`contrastive_ops.sog_clr` with the running denominators it needs: ``SogCLRLoss(size)(image, text, index)``.

    Args:
        size: the number of samples in the data set.
        gamma: the share of a new estimate in the moving average.
        temperature: as in `ScaledLoss`.
        options: as in `ScaledLoss`.
    """

    function = staticmethod(losses.sog_clr)
    owned = ("temperature", "scale", "state")
    default_temperature = 0.07

    def __init__(self, size: int, gamma: float = 0.9, temperature: float | None = None, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.state = RunningDenominator(size, gamma)

    def provided(self) -> dict[str, Any]:
        """The scale and the running denominators."""
        return {**super().provided(), "state": self.state}


class CosFaceLoss(PrototypeLoss):
    """`contrastive_ops.cos_face` with its prototypes: ``CosFaceLoss(classes, dimension, margin=0.35)(x, labels)``."""

    function = staticmethod(losses.cos_face)


class ArcFaceLoss(PrototypeLoss):
    """`contrastive_ops.arc_face` with its prototypes: ``ArcFaceLoss(classes, dimension, margin=0.5)(x, labels)``."""

    function = staticmethod(losses.arc_face)


class SigLIPLoss(BiasedLoss):
    """`contrastive_ops.siglip` as a module with a learnable scale and bias: ``SigLIPLoss()(image, text)``."""

    function = staticmethod(losses.siglip)


class MultiPositiveSigLIPLoss(BiasedLoss):
    """`contrastive_ops.multi_positive_siglip` as a module: ``MultiPositiveSigLIPLoss()(x, y, row_ids, col_ids)``."""

    function = staticmethod(losses.multi_positive_siglip)


class BiXSELoss(BiasedLoss):
    """`contrastive_ops.bixse` as a module: ``BiXSELoss()(query, key, grades)``."""

    function = staticmethod(losses.bixse)


class PairBCELoss(BiasedLoss):
    """`contrastive_ops.pair_bce` as a module: ``PairBCELoss()(x, y, rows, cols, labels)``."""

    function = staticmethod(losses.pair_bce)
    default_temperature = 1.0
    default_learnable = False
    default_bias = 0.0


class TripletLoss(Loss):
    """`contrastive_ops.triplet` as a module: ``TripletLoss(margin=1.0)(anchor, positive, negative)``."""

    function = staticmethod(losses.triplet)


class BatchHardTripletLoss(Loss):
    """`contrastive_ops.batch_hard_triplet` as a module: ``BatchHardTripletLoss(margin=0.2)(embeddings, labels)``."""

    function = staticmethod(losses.batch_hard_triplet)


class BatchSemiHardTripletLoss(Loss):
    """`contrastive_ops.batch_semi_hard_triplet` as a module: ``BatchSemiHardTripletLoss()(embeddings, labels)``."""

    function = staticmethod(losses.batch_semi_hard_triplet)


class ContrastiveLoss(Loss):
    """`contrastive_ops.contrastive` as a module: ``ContrastiveLoss(margin=0.5)(x, y, labels)``."""

    function = staticmethod(losses.contrastive)


class VSELoss(Loss):
    """`contrastive_ops.vse` as a module: ``VSELoss(margin=0.2, hardest=True)(image, text)``."""

    function = staticmethod(losses.vse)


class EnergyHingeLoss(Loss):
    """`contrastive_ops.energy_hinge` as a module: ``EnergyHingeLoss(margin=0.2)(query, key)``."""

    function = staticmethod(losses.energy_hinge)


class SimCTGLoss(Loss):
    """`contrastive_ops.simctg` as a module: ``SimCTGLoss(margin=0.5)(token_states, segments)``."""

    function = staticmethod(losses.simctg)


class AlignmentLoss(Loss):
    """`contrastive_ops.alignment` as a module: ``AlignmentLoss(power=2.0)(x, y)``."""

    function = staticmethod(losses.alignment)


class DPOLoss(Loss):
    """`contrastive_ops.dpo` as a module: ``DPOLoss(beta=0.1)(chosen, rejected, ref_chosen, ref_rejected)``."""

    function = staticmethod(losses.dpo)


class MarginMSELoss(Loss):
    """`contrastive_ops.margin_mse` as a module: ``MarginMSELoss()(scores, teacher_scores)``."""

    function = staticmethod(losses.margin_mse)


class ListwiseDistillationLoss(Loss):
    """`contrastive_ops.listwise_distillation` as a module: ``ListwiseDistillationLoss()(scores, teacher_scores)``."""

    function = staticmethod(losses.listwise_distillation)


class PairwiseRankDistillationLoss(Loss):
    """`contrastive_ops.pairwise_rank_distillation` as a module: ``PairwiseRankDistillationLoss()(scores, teacher)``."""

    function = staticmethod(losses.pairwise_rank_distillation)


class LinearCrossEntropyLoss(Loss):
    """`contrastive_ops.linear_cross_entropy` as a module: ``LinearCrossEntropyLoss()(hidden, head.weight, labels)``."""

    function = staticmethod(losses.linear_cross_entropy)


class NegativeSamplingLoss(Loss):
    """`contrastive_ops.negative_sampling` as a module: ``NegativeSamplingLoss()(center, table, words, noise)``."""

    function = staticmethod(losses.negative_sampling)
