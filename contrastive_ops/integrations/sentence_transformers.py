"""sentence-transformers' losses on fused kernels.

    from contrastive_ops.integrations.sentence_transformers import MatryoshkaLoss, MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model)
    loss = MatryoshkaLoss(model, loss, matryoshka_dims=[768, 256, 64])
    trainer = SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss)

Nothing of size N x N is kept, so the cached losses take their whole batch at once and cache the encoder alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..losses import gist, gte, info_nce, matryoshka_info_nce
from ._originals import runs_original, third_party
from ._sentence_transformers_pairs import (
    INSTALL,
    CoSENTLoss,
    FlopsLoss,
    SparseCoSENTLoss,
    SpladeLoss,
    losses,
    sparse,
    util,
)
from ._sentence_transformers_search import (
    InformationRetrievalEvaluator,
    NanoBEIREvaluator,
    evaluation,
    mine_hard_negatives,
    paraphrase_mining,
    paraphrase_mining_embeddings,
    semantic_search,
)

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CoSENTLoss",
    "FlopsLoss",
    "GISTEmbedLoss",
    "InformationRetrievalEvaluator",
    "Matryoshka2dLoss",
    "MatryoshkaLoss",
    "MultipleNegativesRankingLoss",
    "NanoBEIREvaluator",
    "SparseCoSENTLoss",
    "SparseMultipleNegativesRankingLoss",
    "SpladeLoss",
    "mine_hard_negatives",
    "paraphrase_mining",
    "paraphrase_mining_embeddings",
    "semantic_search",
]

embed_columns = third_party("sentence_transformers.base.losses.merged_forward", INSTALL).embed_columns

# Similarities that are inner products, and whether of rows of length 1.
NORMALIZED = {util.cos_sim: True, util.dot_score: False}


def _gathers(loss: Any) -> bool:
    """Whether candidates of other ranks are asked for, and there are any."""
    return loss.gather_across_devices and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` (InfoNCE, symmetric InfoNCE, GTE) without a matrix of similarities.

    Equivalent to, for the default directions::

        scores = scale * F.normalize(queries) @ F.normalize(torch.cat([positives, *negatives])).T
        F.cross_entropy(scores, torch.arange(N))

    Args:
        model: see `sentence_transformers.losses.MultipleNegativesRankingLoss`, as all arguments.
        scale: 1 / temperature.
        similarity_fct: `util.cos_sim` or `util.dot_score`; the original runs with any other.
        gather_across_devices: documents are those of all ranks, which may have unequal numbers of rows; with other
            directions than the default the original runs.
        directions: any of them.
        partition_mode: "joint" or "per_direction".
        hardness_mode: None, or "all_negatives" with the default direction on one rank; the original runs with others.
        hardness_strength: of it.
    """

    def unfused(self) -> str:
        """Say which option has no fused form; empty where all have one."""
        if self.similarity_fct not in NORMALIZED:
            return f"similarity_fct={util.similarity_fct_name(self.similarity_fct)}"
        default = set(self.directions) == {"query_to_doc"}
        if self._hardness() and (self.hardness_mode != "all_negatives" or not default or _gathers(self)):
            return f"hardness_mode={self.hardness_mode!r}"
        across = _gathers(self) and not default
        return "gather_across_devices=True with these directions" if across else ""

    def _hardness(self) -> float:
        """The factor of the bonus of close negatives."""
        return 0.0 if self.hardness_mode is None else float(self.hardness_strength)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Return the loss of queries, positives and any number of negatives, (N, D) each; `labels` are not used."""
        reason = self.unfused()
        if reason or len(embeddings) < 2:
            if reason:
                runs_original(self, reason)
            loss: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return loss
        query, document, *negatives = embeddings
        normalize = NORMALIZED[self.similarity_fct]
        if set(self.directions) == {"query_to_doc"}:
            others = torch.cat(negatives) if negatives else None
            if _gathers(self):
                return distributed.info_nce(query, document, others, scale=self.scale, normalize=normalize)
            hardness = self._hardness()
            return info_nce(query, document, others, scale=self.scale, hardness=hardness, normalize=normalize)
        return gte(
            query,
            document,
            torch.stack(negatives, 1) if negatives else None,
            partition=self.partition_mode,
            directions=tuple(dict.fromkeys(self.directions)),
            scale=self.scale,
            normalize=normalize,
        )


class SparseMultipleNegativesRankingLoss(sparse.SparseMultipleNegativesRankingLoss, MultipleNegativesRankingLoss):
    """`SparseMultipleNegativesRankingLoss` on `MultipleNegativesRankingLoss` of this module."""


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """`CachedMultipleNegativesRankingLoss` whose loss takes the whole batch at once, in memory linear in it.

    The encoder runs in mini-batches, without a graph first and again with one, as in the original.

    Args:
        *args: see `sentence_transformers.losses.CachedMultipleNegativesRankingLoss`.
        **kwargs: the same.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = {name: getattr(self, name) for name in self._delegated_to_wrapped_loss}
        self.loss = MultipleNegativesRankingLoss(self.model, **options)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of the embeddings of all mini-batches; their gradients are set `with_backward`."""
        if reason := self.loss.unfused():
            runs_original(self, reason)
            loss: Tensor = super().calculate_loss(reps, labels, with_backward=with_backward)
            return loss
        loss = self.loss.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        return _backward(loss, with_backward)


class GISTEmbedLoss(losses.GISTEmbedLoss):
    """`GISTEmbedLoss` without a matrix of similarities, of the model or of the guide.

    Equivalent to: see `contrastive_ops.losses.gist`. A row is never its own negative; the original keeps it where the
    guide's bound is 1 or more.

    Args:
        model: see `sentence_transformers.losses.GISTEmbedLoss`, as all arguments.
        guide: whose similarities say what is no negative.
        temperature: divides the cosines.
        margin_strategy: "absolute" or "relative".
        margin: of it.
        contrast_anchors: whether anchors are negatives of each other.
        contrast_positives: whether positives are negatives of each other.
        gather_across_devices: the original runs where there is more than one rank.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Return the loss of (anchor, positive) or (anchor, positive, negative) texts; `labels` are not used."""
        columns = list(sentence_features)
        if _gathers(self) or not 2 <= len(columns) <= 3:
            if _gathers(self):
                runs_original(self, "gather_across_devices=True")
            loss: Tensor = super().forward(columns, labels)
            return loss
        copies = [dict(column) for column in columns]  # both models write into what they are given
        embeddings = embed_columns(self.model, columns)
        with torch.no_grad():
            guides = embed_columns(self.guide, [self._for_guide(column) for column in copies])
        return _gist(self, embeddings, guides)

    def _for_guide(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features of a column in the words of the guide's tokenizer."""
        if not self.must_retokenize:
            return column
        words: Any = column["input_ids"]
        if "cu_seq_lens_q" in column:  # texts follow each other without padding
            words = [part.tolist() for part in words[0].tensor_split(column["cu_seq_lens_q"][1:-1].cpu())]
        texts = self.tokenizer.batch_decode(words, skip_special_tokens=True)
        features: dict[str, Tensor] = util.batch_to_device(self.guide.preprocess(texts), self.guide.device)
        return features


class CachedGISTEmbedLoss(losses.CachedGISTEmbedLoss):
    """`CachedGISTEmbedLoss` whose loss takes the whole batch at once, in memory linear in it; see `GISTEmbedLoss`.

    Args:
        *args: see `sentence_transformers.losses.CachedGISTEmbedLoss`.
        **kwargs: the same.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of the embeddings of all mini-batches; their gradients are set `with_backward`."""
        if _gathers(self) or len(reps) != len(reps_guided):
            if _gathers(self):
                runs_original(self, "gather_across_devices=True")
            loss: Tensor = super().calculate_loss(reps, reps_guided, with_backward=with_backward)
            return loss
        embeddings, guides = ([torch.cat(column) for column in columns] for columns in (reps, reps_guided))
        return _backward(_gist(self, embeddings, guides), with_backward)


def _gist(loss: Any, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
    """`gist` of embeddings of anchors, positives and negatives, with the options of a GIST loss."""
    query, key, *negatives = embeddings
    guide_query, guide_key, *guide_negatives = guides
    return gist(
        query,
        key,
        guide_query,
        guide_key,
        torch.cat(negatives) if negatives else None,
        torch.cat(guide_negatives) if negatives else None,
        margin_strategy=loss.margin_strategy,
        margin=loss.margin,
        contrast_anchors=loss.contrast_anchors,
        contrast_positives=loss.contrast_positives,
        temperature=loss.temperature,
    )


def _backward(loss: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return loss
    loss.backward()
    return loss.detach()


class MatryoshkaLoss(losses.MatryoshkaLoss):
    """`MatryoshkaLoss`; around `MultipleNegativesRankingLoss` of this module all dimensions take one sweep.

    Equivalent to::

        sum(w * loss([e[:, :d] for e in embeddings]) for d, w in zip(matryoshka_dims, matryoshka_weights))

    Around any other loss, and around cached ones, that loss runs once a dimension, as in the original.

    Args:
        *args: see `sentence_transformers.losses.MatryoshkaLoss`.
        **kwargs: the same.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Return the weighted sum of the losses of all dimensions, or of `n_dims_per_step` random ones."""
        columns, inner = list(sentence_features), self.loss
        fused = isinstance(inner, MultipleNegativesRankingLoss) and not inner.unfused() and len(columns) > 1
        fused = fused and not _gathers(inner) and not inner._hardness()
        if not fused or set(inner.directions) != {"query_to_doc"} or not NORMALIZED[inner.similarity_fct]:
            loss: Tensor = super().forward(columns, labels)
            return loss
        weights = list(zip(self.matryoshka_dims, self.matryoshka_weights, strict=True))
        if 0 < self.n_dims_per_step < len(weights):
            weights = random.sample(weights, self.n_dims_per_step)
        summed: dict[int, float] = defaultdict(float)  # of a dimension that is given twice
        for size, weight in weights:
            summed[size] += weight
        query, *documents = embed_columns(self.model, columns)
        dims = sorted(summed)
        return matryoshka_info_nce(
            query, torch.cat(documents), dims=dims, dim_weights=[summed[size] for size in dims], scale=inner.scale
        )


class Matryoshka2dLoss(losses.Matryoshka2dLoss):
    """`Matryoshka2dLoss` on `MatryoshkaLoss` of this module: all dimensions of a layer take one sweep.

    Args:
        *args: see `sentence_transformers.losses.Matryoshka2dLoss`.
        **kwargs: the same.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inner: Any = self.get_submodule("loss")
        if not inner.uses_gradient_cache:  # whose calculate_loss the original has wrapped already
            options = (inner.matryoshka_dims, inner.matryoshka_weights, inner.n_dims_per_step)
            self.loss = MatryoshkaLoss(self.model, inner.loss, *options)


def __getattr__(name: str) -> Any:
    for namespace in (losses, sparse, evaluation, util):
        if hasattr(namespace, name):
            return getattr(namespace, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
