"""Adapters over two processes: values as the originals return them, gradients of the loss of all rows."""

import importlib
import types

import pytest
import torch
from ranks import ranks
from torch.nn import functional as F

COUNT, DIM = 6, 12


def _batch(size):
    whole = F.normalize(torch.randn(3, size * COUNT, DIM, generator=torch.Generator().manual_seed(3)), dim=-1)
    return whole.unbind()


def _gradients(loss, rank, size, *features):
    """The value, and the gradients of all rows after the mean over ranks that DistributedDataParallel takes."""
    leaves = [rows[rank * COUNT : (rank + 1) * COUNT].clone().requires_grad_() for rows in features]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad / size for leaf in leaves]


def _truth(loss, rank, *features):
    leaves = [rows.clone().requires_grad_() for rows in features]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad[rank * COUNT : (rank + 1) * COUNT] for leaf in leaves]


def _apart(found, expected):
    return max(float((mine - theirs).abs().max()) for mine, theirs in zip(found, expected, strict=True))


def open_clip_errors(rank, size):
    """How far values are from the original's, and gradients from those of one process."""
    ours = importlib.import_module("contrastive_ops.integrations.open_clip")
    original = ours.open_clip.loss
    image, text, _ = _batch(size)
    scale, bias, errors = torch.tensor(9.0), torch.tensor(-3.0), {}
    truth = _truth(lambda x, y: original.ClipLoss()(x, y, scale), rank, image, text)
    for local in (False, True):
        for gather in (False, True):
            options = {"local_loss": local, "gather_with_grad": gather, "rank": rank, "world_size": size}
            found = _gradients(lambda x, y, o=options: ours.ClipLoss(**o)(x, y, scale), rank, size, image, text)
            theirs = _gradients(lambda x, y, o=options: original.ClipLoss(**o)(x, y, scale), rank, size, image, text)
            errors[f"clip {local} {gather}"] = max(_apart([found[0]], [theirs[0]]), _apart(found[1], truth[1]))
    truth = _truth(lambda x, y: original.SigLipLoss()(x, y, scale, bias), rank, image, text)
    for implementation in ("bidir", "gather"):
        options = {"rank": rank, "world_size": size, "dist_impl": implementation}
        found = _gradients(lambda x, y, o=options: ours.SigLipLoss(**o)(x, y, scale, bias), rank, size, image, text)
        theirs = original.SigLipLoss(**options)(
            *(rows[rank * COUNT : (rank + 1) * COUNT] for rows in (image, text)), scale, bias
        )
        errors[f"siglip {implementation}"] = max(_apart([found[0]], [theirs]), _apart(found[1], truth[1]))
    return errors


def lightly_errors(rank, size):
    """The same."""
    ours = importlib.import_module("contrastive_ops.integrations.lightly")
    views = _batch(size)[:2]
    options = {"temperature": 0.2, "gather_distributed": True}
    truth = _truth(ours.lightly.NTXentLoss(0.2), rank, *views)
    found = _gradients(ours.NTXentLoss(**options), rank, size, *views)
    theirs = _gradients(ours.lightly.NTXentLoss(**options), rank, size, *views)
    return {"nt_xent": max(_apart([found[0]], [theirs[0]]), _apart(found[1], truth[1]))}


def sentence_transformers_errors(rank, size):
    """The same."""
    ours = importlib.import_module("contrastive_ops.integrations.sentence_transformers")
    features, model = _batch(size), types.SimpleNamespace()
    plain, across = (
        [module.MultipleNegativesRankingLoss.__new__(module.MultipleNegativesRankingLoss) for module in modules]
        for modules in ((ours.losses,), (ours, ours.losses))
    )
    for loss, gathers in ((plain[0], False), (across[0], True), (across[1], True)):
        torch.nn.Module.__init__(loss)
        loss.model, loss.scale, loss.similarity_fct, loss.gather_across_devices = (
            model,
            20.0,
            ours.util.cos_sim,
            gathers,
        )
        loss.directions, loss.partition_mode = ("query_to_doc",), "joint"
        loss.hardness_mode, loss.hardness_strength = None, 0.0
    step = [lambda *e, loss=loss: loss.compute_loss_from_embeddings(list(e), None) for loss in (*plain, *across)]
    truth = _truth(step[0], rank, *features)
    found, theirs = (_gradients(one, rank, size, *features) for one in step[1:])
    return {"ranking": max(_apart([found[0]], [theirs[0]]), _apart(found[1], truth[1]))}


@pytest.mark.parametrize("package", ["open_clip", "lightly", "sentence_transformers"])
def test_adapters_over_processes(package):
    pytest.importorskip(package)
    for errors in ranks(2).run(globals()[f"{package}_errors"]):
        assert errors and max(errors.values()) < 2e-6, errors
