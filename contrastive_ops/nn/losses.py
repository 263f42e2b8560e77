"""Every loss as a module: the function, its default temperature, and what it owns."""

from __future__ import annotations

from typing import Any

from .. import losses
from ..losses import RunningDenominator
from ._base import BiasedLoss, Loss, PrototypeLoss, ScaledLoss


class InfoNCELoss(ScaledLoss):
    """`losses.info_nce` as a module: ``InfoNCELoss(0.05)(query, key, negatives)``."""

    function = staticmethod(losses.info_nce)
    default_temperature = 0.07


class CLIPLoss(ScaledLoss):
    """`losses.clip` as a module with a learnable temperature: ``CLIPLoss()(image, text)``."""

    function = staticmethod(losses.clip)
    default_temperature = 0.07
    default_learnable = True


class NTXentLoss(ScaledLoss):
    """`losses.nt_xent` as a module: ``NTXentLoss(0.1)(view0, view1)``."""

    function = staticmethod(losses.nt_xent)
    default_temperature = 0.5


class SupConLoss(ScaledLoss):
    """`losses.sup_con` as a module: ``SupConLoss(0.1)(embeddings, labels)``."""

    function = staticmethod(losses.sup_con)
    default_temperature = 0.1


class MultiPositiveInfoNCELoss(ScaledLoss):
    """`losses.multi_positive_info_nce` as a module: ``MultiPositiveInfoNCELoss()(embeddings, labels)``."""

    function = staticmethod(losses.multi_positive_info_nce)
    default_temperature = 0.07


class SoftInfoNCELoss(ScaledLoss):
    """`losses.soft_info_nce` as a module: ``SoftInfoNCELoss()(query, key, (indptr, indices, weights))``."""

    function = staticmethod(losses.soft_info_nce)
    default_temperature = 0.07


class YAwareInfoNCELoss(ScaledLoss):
    """`losses.y_aware_info_nce` as a module: ``YAwareInfoNCELoss(0.1, bandwidth=5.0)(query, key, labels)``."""

    default_temperature = 0.1
    function = staticmethod(losses.y_aware_info_nce)


class DCLLoss(ScaledLoss):
    """`losses.dcl` as a module: ``DCLLoss(0.1)(view0, view1)``; ``sigma=0.5`` weighs the positives (DCLW)."""

    function = staticmethod(losses.dcl)
    default_temperature = 0.1


class DebiasedLoss(ScaledLoss):
    """`losses.debiased` as a module: ``DebiasedLoss(0.5, tau_plus=0.1)(view0, view1)``."""

    function = staticmethod(losses.debiased)
    default_temperature = 0.5


class HCLLoss(ScaledLoss):
    """`losses.hcl` as a module: ``HCLLoss(0.5, beta=1.0, tau_plus=0.1)(view0, view1)``."""

    function = staticmethod(losses.hcl)
    default_temperature = 0.5


class HNNCELoss(ScaledLoss):
    """`losses.hn_nce` as a module with a learnable temperature: ``HNNCELoss()(image, text)``."""

    function = staticmethod(losses.hn_nce)
    default_temperature = 0.07
    default_learnable = True


class GTELoss(ScaledLoss):
    """`losses.gte` as a module: ``GTELoss()(query, document, hard_negatives)``."""

    function = staticmethod(losses.gte)
    default_temperature = 0.01


class GISTEmbedLoss(ScaledLoss):
    """`losses.gist` as a module: ``GISTEmbedLoss()(query, key, guide_query, guide_key)``."""

    function = staticmethod(losses.gist)
    default_temperature = 0.01


class MoCoLoss(ScaledLoss):
    """`losses.moco` as a module: ``MoCoLoss()(query, key, queue)``."""

    function = staticmethod(losses.moco)
    default_temperature = 0.07


class LateInteractionLoss(ScaledLoss):
    """`losses.late_interaction` as a module: ``LateInteractionLoss()(queries, documents, negatives)``."""

    function = staticmethod(losses.late_interaction)
    default_temperature = 1.0


class MatryoshkaInfoNCELoss(ScaledLoss):
    """`losses.matryoshka_info_nce` as a module: ``MatryoshkaInfoNCELoss(0.05, dims=dims)(query, key)``."""

    function = staticmethod(losses.matryoshka_info_nce)
    default_temperature = 0.07


class MatryoshkaCLIPLoss(ScaledLoss):
    """`losses.matryoshka_clip` with a learned temperature: ``MatryoshkaCLIPLoss(dims=dims)(image, text)``."""

    function = staticmethod(losses.matryoshka_clip)
    default_temperature = 0.07
    default_learnable = True


class MatryoshkaNTXentLoss(ScaledLoss):
    """`losses.matryoshka_nt_xent` as a module: ``MatryoshkaNTXentLoss(0.1, dims=dims)(view0, view1)``."""

    function = staticmethod(losses.matryoshka_nt_xent)
    default_temperature = 0.5


class MinedInfoNCELoss(ScaledLoss):
    """`losses.mined_info_nce` as a module: ``MinedInfoNCELoss(0.05)(query, positive, corpus, k)``."""

    function = staticmethod(losses.mined_info_nce)
    default_temperature = 0.07


class SimilarityDistillationLoss(ScaledLoss):
    """`losses.similarity_distillation` as a module with a learnable temperature.

    ``SimilarityDistillationLoss(symmetric=True)(image, text, teacher_image, teacher_text)``
    """

    function = staticmethod(losses.similarity_distillation)
    default_temperature = 0.07
    default_learnable = True


class DistanceDistillationLoss(Loss):
    """`losses.distance_distillation` as a module: ``DistanceDistillationLoss()(embeddings, teacher)``."""

    function = staticmethod(losses.distance_distillation)


class SogCLRLoss(ScaledLoss):
    """`losses.sog_clr` with the running denominators it needs: ``SogCLRLoss(size)(image, text, index)``.

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
    """`losses.cos_face` with its prototypes: ``CosFaceLoss(classes, dimension, margin=0.35)(x, labels)``."""

    function = staticmethod(losses.cos_face)


class ArcFaceLoss(PrototypeLoss):
    """`losses.arc_face` with its prototypes: ``ArcFaceLoss(classes, dimension, margin=0.5)(x, labels)``."""

    function = staticmethod(losses.arc_face)


class SigLIPLoss(BiasedLoss):
    """`losses.siglip` as a module with a learnable scale and bias: ``SigLIPLoss()(image, text)``."""

    function = staticmethod(losses.siglip)


class MultiPositiveSigLIPLoss(BiasedLoss):
    """`losses.multi_positive_siglip` as a module: ``MultiPositiveSigLIPLoss()(x, y, labels, col_labels)``."""

    function = staticmethod(losses.multi_positive_siglip)


class BiXSELoss(BiasedLoss):
    """`losses.bixse` as a module: ``BiXSELoss()(query, key, grades)``."""

    function = staticmethod(losses.bixse)


class PairBCELoss(BiasedLoss):
    """`losses.pair_bce` as a module: ``PairBCELoss()(x, y, rows, cols, labels)``."""

    function = staticmethod(losses.pair_bce)
    default_temperature = 1.0
    default_learnable = False
    default_bias = 0.0


class PairMSELoss(Loss):
    """`losses.pair_mse` as a module: ``PairMSELoss()(x, y, cosines)``."""

    function = staticmethod(losses.pair_mse)


class CoSENTLoss(ScaledLoss):
    """`losses.cosent` as a module: ``CoSENTLoss()(x, y, scores)``."""

    function = staticmethod(losses.cosent)
    default_temperature = 0.05


class AnglELoss(ScaledLoss):
    """`losses.angle` as a module: ``AnglELoss()(x, y, scores)``."""

    function = staticmethod(losses.angle)
    default_temperature = 0.05


class MultiSimilarityLoss(Loss):
    """`losses.multi_similarity` as a module: ``MultiSimilarityLoss(beta=40.0)(embeddings, labels)``."""

    function = staticmethod(losses.multi_similarity)


class BatchContrastiveLoss(Loss):
    """`losses.batch_contrastive` as a module: ``BatchContrastiveLoss()(embeddings, labels)``."""

    function = staticmethod(losses.batch_contrastive)


class LiftedStructureLoss(Loss):
    """`losses.lifted_structure` as a module: ``LiftedStructureLoss()(embeddings, labels)``."""

    function = staticmethod(losses.lifted_structure)


class SpectralContrastiveLoss(Loss):
    """`losses.spectral_contrastive` as a module: ``SpectralContrastiveLoss()(view0, view1)``."""

    function = staticmethod(losses.spectral_contrastive)


class TripletLoss(Loss):
    """`losses.triplet` as a module: ``TripletLoss(margin=1.0)(anchor, positive, negative)``."""

    function = staticmethod(losses.triplet)


class BatchHardTripletLoss(Loss):
    """`losses.batch_hard_triplet` as a module: ``BatchHardTripletLoss(margin=0.2)(embeddings, labels)``."""

    function = staticmethod(losses.batch_hard_triplet)


class BatchSemiHardTripletLoss(Loss):
    """`losses.batch_semi_hard_triplet` as a module: ``BatchSemiHardTripletLoss()(embeddings, labels)``."""

    function = staticmethod(losses.batch_semi_hard_triplet)


class ContrastiveLoss(Loss):
    """`losses.contrastive` as a module: ``ContrastiveLoss(margin=0.5)(x, y, labels)``."""

    function = staticmethod(losses.contrastive)


class VSELoss(Loss):
    """`losses.vse` as a module: ``VSELoss(margin=0.2, hardest=True)(image, text)``."""

    function = staticmethod(losses.vse)


class EnergyHingeLoss(Loss):
    """`losses.energy_hinge` as a module: ``EnergyHingeLoss(margin=0.2)(query, key)``."""

    function = staticmethod(losses.energy_hinge)


class SimCTGLoss(Loss):
    """`losses.simctg` as a module: ``SimCTGLoss(margin=0.5)(token_states, segments)``."""

    function = staticmethod(losses.simctg)


class AlignmentLoss(Loss):
    """`losses.alignment` as a module: ``AlignmentLoss(power=2.0)(x, y)``."""

    function = staticmethod(losses.alignment)


class KoLeoLoss(Loss):
    """`losses.koleo` as a module: ``KoLeoLoss()(embeddings)``."""

    function = staticmethod(losses.koleo)


class DINOLoss(ScaledLoss):
    """`losses.dino` as a module: ``DINOLoss()(student, prototypes, teacher, teacher_prototypes, centre=centre)``."""

    function = staticmethod(losses.dino)
    default_temperature = 0.1


class SwAVLoss(ScaledLoss):
    """`losses.swav` as a module: ``SwAVLoss()(view0, view1, prototypes)``."""

    function = staticmethod(losses.swav)
    default_temperature = 0.1


class GE2ELoss(BiasedLoss):
    """`losses.ge2e` as a module with a learnable scale and bias: ``GE2ELoss()(utterances, speakers)``."""

    function = staticmethod(losses.ge2e)
    default_bias = -5.0


class DPOLoss(Loss):
    """`losses.dpo` as a module: ``DPOLoss(beta=0.1)(chosen, rejected, ref_chosen, ref_rejected)``."""

    function = staticmethod(losses.dpo)


class MarginMSELoss(Loss):
    """`losses.margin_mse` as a module: ``MarginMSELoss()(scores, teacher_scores)``."""

    function = staticmethod(losses.margin_mse)


class ListwiseCrossEntropyLoss(Loss):
    """`losses.listwise_cross_entropy` as a module: ``ListwiseCrossEntropyLoss()(scores, relevance)``."""

    function = staticmethod(losses.listwise_cross_entropy)


class ListwiseDistillationLoss(Loss):
    """`losses.listwise_distillation` as a module: ``ListwiseDistillationLoss()(scores, teacher_scores)``."""

    function = staticmethod(losses.listwise_distillation)


class PairwiseRankDistillationLoss(Loss):
    """`losses.pairwise_rank_distillation` as a module: ``PairwiseRankDistillationLoss()(scores, teacher)``."""

    function = staticmethod(losses.pairwise_rank_distillation)


class LinearCrossEntropyLoss(Loss):
    """`losses.linear_cross_entropy` as a module: ``LinearCrossEntropyLoss()(hidden, head.weight, labels)``."""

    function = staticmethod(losses.linear_cross_entropy)


class NegativeSamplingLoss(Loss):
    """`losses.negative_sampling` as a module: ``NegativeSamplingLoss()(center, table, words, noise)``."""

    function = staticmethod(losses.negative_sampling)
