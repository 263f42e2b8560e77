"""Who computes a case: this package, plain torch, and other packages, imported when built.

A provider's ``build(inputs)`` returns a step, one forward and backward from fresh leaves. Peers are
called the way their own users call them; where a peer lacks an argument (a scale), the step pays
for the work-around a user would write, and the docstring says so.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import OURS, Inputs, Outcome, Provider, Step

MATMUL = "torch.mm"


def differentiate(loss_of: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> Step:
    """A step that calls ``loss_of(**leaves)`` and differentiates every leaf."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}

    def step() -> Outcome:
        loss = loss_of(**leaves)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return Outcome(loss.detach(), dict(zip(leaves, grads, strict=True)))

    return step


def _rows(inputs: Inputs) -> list[Tensor]:
    return [tensor for tensor in inputs.tensors.values() if tensor.ndim == 2]


# ---------------------------------------------------------------------------------------------
# This package


def of_backend(backend: str) -> str:
    """The name of this package's provider that runs on one backend."""
    return f"{OURS} {backend}"


def insist_on(backend: str | None, stem: str, x: Tensor) -> dict[str, str]:
    """The argument that names a backend; ImportError, as for a package that is missing, where it cannot run."""
    if backend is None:
        return {}
    table = importlib.import_module(f"contrastive_ops.ops.{stem}").BACKENDS
    reasons = table[backend].unsupported(x) if backend in table else [f"{stem} has no backend {backend!r}"]
    if reasons:
        raise ImportError("; ".join(reasons))
    return {"backend": backend}


# Losses whose opponents take rows as they are.
AS_GIVEN = ("clip", "info_nce", "siglip")


def ours(
    function: str,
    name: str = OURS,
    *,
    cache: bool | None = None,
    backend: str | None = None,
    as_given: bool | None = None,
) -> Provider:
    """``contrastive_ops.losses.<function>`` on the case's tensors and constants.

    ``cache``: None leaves ``memory_budget`` at its default, False gives it no byte, True enough to
    keep one float32 matrix of all logits. ``backend``: None leaves the choice to the package.
    ``as_given``: whether rows are taken as they are; None: those of ``AS_GIVEN`` are.
    """

    def build(inputs: Inputs) -> Step:
        import contrastive_ops

        options = {**inputs.arguments, **insist_on(backend, "similarity_reduce", _rows(inputs)[0])}
        if as_given or (as_given is None and function in AS_GIVEN):
            options["normalize"] = False
        if cache is not None:
            first, last = _rows(inputs)[0], _rows(inputs)[-1]
            options["memory_budget"] = 4 * len(first) * len(last) if cache else 0
        loss = getattr(contrastive_ops.losses, function)
        return differentiate(lambda **leaves: loss(**leaves, **options), inputs.tensors)

    return Provider(name, build, kind="ours", package="contrastive_ops")


# ---------------------------------------------------------------------------------------------
# The machine: the case's own matrix products and nothing else


def matmuls(products: str, *, self_similarity: bool = False) -> Provider:
    """``torch.mm`` over the products of a loss, with outputs allocated once.

    Args:
        products: one letter pair each: "NT" makes logits from x and y, "NN" a gradient of x from
            logits and y, "TN" a gradient of y from logits and x. "GG" makes the similarities of all
            embeddings of a guide.
        self_similarity: x and y are both the concatenation of all inputs.
    """

    def build(inputs: Inputs) -> Step:
        x, y = _rows(inputs)[0], _rows(inputs)[-1]
        if self_similarity:
            x = y = torch.cat(_rows(inputs))
        guides = [tensor for tensor in inputs.frozen.values() if tensor.ndim == 2]
        guide = torch.cat(guides) if guides else x
        logits = torch.empty(len(x), len(y), dtype=x.dtype, device=x.device)
        dx, dy = torch.empty_like(x), torch.empty_like(y)
        calls = {
            "NT": lambda: torch.mm(x, y.T, out=logits),
            "NN": lambda: torch.mm(logits, y, out=dx),
            "TN": lambda: torch.mm(logits.T, x, out=dy),
            "GG": lambda: torch.mm(guide, guide.T, out=logits),
        }
        order = [calls[pair] for pair in products.split()]

        def step() -> None:
            for call in order:
                call()

        return step

    return Provider(MATMUL, build, kind="matmul")


# ---------------------------------------------------------------------------------------------
# Plain torch


def torch_eager(name: str, loss_of: Callable[..., Tensor], *, compiled: bool = False) -> Provider:
    """``loss_of(**tensors, **arguments)`` in eager torch, or under ``torch.compile``."""

    def build(inputs: Inputs) -> Step:
        loss = torch.compile(loss_of) if compiled else loss_of
        return differentiate(lambda **leaves: loss(**leaves, **inputs.arguments), inputs.tensors)

    return Provider(name, build, kind="torch", optional=compiled)


def eager_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CLIP with one matrix product: the columns' direction reads the same logits transposed."""
    logits = scale * (image @ text.T)
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def eager_info_nce(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """InfoNCE from queries to keys."""
    logits = scale * (query @ key.T)
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def eager_cosine_info_nce(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """InfoNCE of cosines."""
    return eager_info_nce(F.normalize(query, dim=1), F.normalize(key, dim=1), scale)


def eager_nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent with one matrix product and the diagonal filled with -inf."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z0)))


def eager_sup_con(x: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SupCon as its authors write it: one matrix product, masks, the mean of log p over positives."""
    z = F.normalize(x, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~own
    log_p = (z @ z.T / temperature).masked_fill(own, -math.inf).log_softmax(1)
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def eager_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP with one matrix product and a matrix of signs."""
    logits = scale * (image @ text.T) + bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype, device=image.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def eager_gte(query: Tensor, document: Tensor, scale: float) -> Tensor:
    """GTE with the products that differ: the two between queries and documents are one."""
    q, d = F.normalize(query, dim=1), F.normalize(document, dim=1)
    between = scale * (q @ d.T)
    alike = [(scale * (each @ each.T)).fill_diagonal_(-math.inf) for each in (q, d)]
    return (torch.cat([between, between.T, *alike], 1).logsumexp(1) - between.diagonal()).mean()


def eager_gist(
    query: Tensor, key: Tensor, guide_query: Tensor, guide_key: Tensor, temperature: float, margin: float
) -> Tensor:
    """GISTEmbed with three matrix products, and three more of the guide."""
    (q, k), (gq, gk) = (
        [F.normalize(each, dim=1) for each in pair] for pair in ((query, key), (guide_query, guide_key))
    )
    own = torch.eye(len(q), dtype=torch.bool, device=q.device)
    bound = (gq * gk).sum(1, keepdim=True) - margin
    blocks = [
        (q @ k.T).masked_fill((gq @ gk.T > bound) & ~own, -math.inf),
        (q @ q.T).masked_fill((gq @ gq.T > bound) | own, -math.inf),
        (k @ k.T).masked_fill((gk @ gk.T > bound) | own, -math.inf),
    ]
    return F.cross_entropy(torch.cat(blocks, 1) / temperature, torch.arange(len(q), device=q.device))


def linear_cross_entropy(acc_policy: str) -> Provider:
    """torch's chunked ``F.linear_cross_entropy``; it takes no scale, so the keys are multiplied."""

    def build(inputs: Inputs) -> Step:
        options_class = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if options_class is None:
            raise ImportError("torch.nn.LinearCrossEntropyOptions needs torch 2.13 or newer")
        options = options_class(acc_policy=acc_policy)
        scale = inputs.constants["scale"]

        def loss_of(query: Tensor, key: Tensor) -> Tensor:
            labels = torch.arange(len(query), device=query.device)
            return F.linear_cross_entropy(query, scale * key, labels, options=options)

        return differentiate(loss_of, inputs.tensors)

    return Provider(f"torch linear_cross_entropy {acc_policy}", build, kind="torch")


# ---------------------------------------------------------------------------------------------
# Other packages


def open_clip_loss() -> Provider:
    """open_clip's ClipLoss on one process."""

    def build(inputs: Inputs) -> Step:
        from open_clip.loss import ClipLoss

        loss = ClipLoss()
        return differentiate(lambda image, text, scale: loss(image, text, scale), inputs.tensors)

    return Provider("open_clip ClipLoss", build, package="open_clip_torch")


def lightly_nt_xent() -> Provider:
    """lightly's NTXentLoss without a memory bank; it normalises its inputs."""

    def build(inputs: Inputs) -> Step:
        from lightly.loss import NTXentLoss

        loss = NTXentLoss(temperature=inputs.constants["temperature"])
        return differentiate(lambda z0, z1: loss(z0, z1), inputs.tensors)

    return Provider("lightly NTXentLoss", build, package="lightly")


def sentence_transformers_mnrl() -> Provider:
    """sentence-transformers' MultipleNegativesRankingLoss with the dot product, without a model."""

    def build(inputs: Inputs) -> Step:
        from sentence_transformers import util
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        loss = MultipleNegativesRankingLoss(
            model=torch.nn.Module(),
            scale=inputs.constants["scale"],
            similarity_fct=util.dot_score,
        )
        return differentiate(
            lambda query, key: loss.compute_loss_from_embeddings([query, key], None),
            inputs.tensors,
        )

    return Provider("sentence-transformers MNRL", build, package="sentence-transformers")


def sentence_transformers_gte() -> Provider:
    """The same loss in all four directions with one denominator; it normalises its inputs."""

    def build(inputs: Inputs) -> Step:
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        loss = MultipleNegativesRankingLoss(
            model=torch.nn.Module(),
            scale=inputs.constants["scale"],
            directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
            partition_mode="joint",
        )
        return differentiate(
            lambda query, document: loss.compute_loss_from_embeddings([query, document], None),
            inputs.tensors,
        )

    return Provider("sentence-transformers GTE", build, package="sentence-transformers")


def sentence_transformers_gist() -> Provider:
    """sentence-transformers' CachedGISTEmbedLoss: the stage between both runs of the model.

    Its constructor demands a model and a guide with tokenizers, which this stage never uses, so the
    attributes are set without it, to its defaults where the case has no other value.
    """

    def build(inputs: Inputs) -> Step:
        from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss

        loss = CachedGISTEmbedLoss.__new__(CachedGISTEmbedLoss)
        torch.nn.Module.__init__(loss)
        loss.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
        loss.cross_entropy_loss = torch.nn.CrossEntropyLoss()
        loss.mini_batch_size = 32
        loss.show_progress_bar = loss.gather_across_devices = False
        loss.contrast_anchors = loss.contrast_positives = True
        loss.margin_strategy, loss.margin = "absolute", inputs.constants["margin"]
        loss.temperature = inputs.constants["temperature"]
        guides = [[inputs.frozen["guide_query"]], [inputs.frozen["guide_key"]]]

        def step() -> Outcome:
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
            value = loss.calculate_loss([[leaf] for leaf in leaves.values()], guides, with_backward=True)
            return Outcome(value, {name: leaf.grad for name, leaf in leaves.items()})

        return step

    return Provider("sentence-transformers CachedGIST", build, package="sentence-transformers")


def info_nce_pytorch() -> Provider:
    """info-nce-pytorch's InfoNCE, whose negatives are the other keys; it normalises its inputs."""

    def build(inputs: Inputs) -> Step:
        from info_nce import InfoNCE

        loss = InfoNCE(temperature=1 / inputs.constants["scale"])
        return differentiate(lambda query, key: loss(query, key), inputs.tensors)

    return Provider("info-nce-pytorch InfoNCE", build, package="info-nce-pytorch")


def open_clip_siglip() -> Provider:
    """open_clip's SigLipLoss on one process."""

    def build(inputs: Inputs) -> Step:
        from open_clip.loss import SigLipLoss

        loss = SigLipLoss()
        return differentiate(lambda image, text, scale, bias: loss(image, text, scale, bias), inputs.tensors)

    return Provider("open_clip SigLipLoss", build, package="open_clip_torch")


def metric_learning_sup_con() -> Provider:
    """pytorch-metric-learning's SupConLoss; it normalises its inputs."""

    def build(inputs: Inputs) -> Step:
        from pytorch_metric_learning.losses import SupConLoss

        loss, labels = SupConLoss(temperature=inputs.constants["temperature"]), inputs.frozen["labels"]
        return differentiate(lambda x: loss(x, labels), inputs.tensors)

    return Provider("pytorch-metric-learning SupConLoss", build, package="pytorch-metric-learning")
