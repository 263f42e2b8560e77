"""Adapters of open_clip, lightly and pytorch-metric-learning against the classes that they replace."""

import copy
import importlib
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.integrations import _originals

# Relative, of gradients; both sides round in the dtype of the features.
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-11}


def adapter(name):
    """The adapter and the package it is for."""
    original = {"open_clip": "open_clip.loss", "lightly": "lightly.loss"}.get(name, f"{name}.losses")
    found = pytest.importorskip(original)
    return importlib.import_module(f"contrastive_ops.integrations.{name}"), found


def value_and_gradients(loss, *inputs, trained=()):
    leaves = [value.clone().requires_grad_(value.is_floating_point()) for value in inputs]
    out = loss(*leaves)
    total = sum(out) if isinstance(out, tuple) else out
    total.backward()
    return [total.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad), *(p.grad for p in trained)]


def check_same(ours, original, *inputs, tolerance=None, trained=((), ())):
    found = value_and_gradients(ours, *inputs, trained=trained[0])
    expected = value_and_gradients(original, *inputs, trained=trained[1])
    tolerance = CLOSE[inputs[0].dtype] if tolerance is None else tolerance
    for mine, theirs in zip(found, expected, strict=True):
        scale = max(theirs.abs().max().item(), 1e-2)  # what is 0 but for rounding
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=0, atol=tolerance * scale)


def features(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("count", [1, 37])
def test_open_clip(dtype, count):
    ours, original = adapter("open_clip")
    image, text = features(2, count, 24, dtype=dtype)
    scale, bias = torch.tensor(12.0, dtype=dtype), torch.tensor(-4.0, dtype=dtype)
    check_same(ours.ClipLoss(), original.ClipLoss(), image, text, scale)
    check_same(ours.ClipLoss(), original.ClipLoss(), image, text, scale, bias)
    check_same(ours.SigLipLoss(), original.SigLipLoss(), image, text, scale, bias)
    teacher = features(2, count, 16, dtype=dtype)

    def distilled(loss):
        return lambda image, text, scale: loss(image, text, scale, *teacher, 20.0)

    check_same(distilled(ours.DistillClipLoss()), distilled(original.DistillClipLoss()), image, text, scale)
    logits, labels = torch.randn(count, 5, 11, dtype=dtype), torch.randint(0, 11, (count, 5))
    caption = labels.masked_fill(torch.rand(count, 5) < 0.2, 0)  # 0 is padding
    check_same(ours.CoCaLoss(2.0, 0.5), original.CoCaLoss(2.0, 0.5), image, text, logits, caption, scale)


def test_open_clip_takes_a_dict_and_a_teacher_that_is_trained():
    ours, original = adapter("open_clip")
    image, text = features(2, 9, 8)
    for loss in (ours.ClipLoss(), ours.SigLipLoss()):
        keywords = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(5.0)}
        found = loss(**keywords, logit_bias=torch.tensor(-1.0), output_dict=True)
        assert list(found) == ["contrastive_loss"]
    inputs = (image, text, torch.tensor(5.0), *features(2, 9, 8), torch.tensor(7.0))
    with pytest.warns(UserWarning, match="DistillClipLoss: a teacher with gradients"):
        _originals._warn_once.cache_clear()
        check_same(ours.DistillClipLoss(), original.DistillClipLoss(), *inputs)


def test_open_clip_makes_its_losses_of_ours():
    ours, original = adapter("open_clip")
    args = types.SimpleNamespace(
        distill=False,
        model="ViT-B-32",
        siglip=False,
        local_loss=False,
        gather_with_grad=False,
        rank=0,
        world_size=1,
        horovod=False,
        loss_dist_impl=None,
    )
    assert type(ours.create_loss(args)) is ours.ClipLoss
    assert type(original.ClipLoss()) is not ours.ClipLoss and ours.open_clip.factory.ClipLoss is original.ClipLoss
    args.siglip = True
    assert type(ours.create_loss(args)) is ours.SigLipLoss


def test_open_clip_is_patched_once_for_all(monkeypatch):
    ours, original = adapter("open_clip")
    for name in ours.LOSSES:  # given back at the end
        monkeypatch.setattr(ours.open_clip.factory, name, getattr(original, name))
    names = ("distill", "siglip", "local_loss", "gather_with_grad", "horovod")
    args = types.SimpleNamespace(
        **dict.fromkeys(names, False), model="ViT-B-32", rank=0, world_size=1, loss_dist_impl=None
    )
    assert ours.patch() is None
    assert type(ours.open_clip.create_loss(args)) is ours.ClipLoss
    args.siglip = True
    assert type(ours.patch(args)) is ours.SigLipLoss


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_lightly(dtype):
    ours, original = adapter("lightly")
    views = torch.randn(2, 19, 12, dtype=dtype)
    check_same(ours.NTXentLoss(0.2), original.NTXentLoss(0.2), *views)
    check_same(ours.DCLLoss(), original.DCLLoss(), *views)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the original: it copies a tensor by torch.tensor
        check_same(ours.DCLWLoss(sigma=0.7), original.DCLWLoss(sigma=0.7), *views)
    views = views + 0.5 * views.flip(0)
    check_same(ours.VICRegLoss(9.0, 8.0, 2.0), original.VICRegLoss(9.0, 8.0, 2.0), *views)
    check_same(ours.BarlowTwinsLoss(0.1), original.BarlowTwinsLoss(0.1), *views, tolerance=2e-4)  # its eps
    wide = torch.randn(2, 7, 40, dtype=dtype)  # of which the matrix of rows is the smaller one
    wide = wide + 0.5 * wide.flip(0)
    check_same(ours.BarlowTwinsLoss(0.1), original.BarlowTwinsLoss(0.1), *wide, tolerance=2e-4)
    with pytest.warns(UserWarning, match=r"VICRegLoss: eps=0.01 has no fused form"):
        _originals._warn_once.cache_clear()
        check_same(ours.VICRegLoss(eps=0.01), original.VICRegLoss(eps=0.01), *views)


def test_lightly_keeps_the_same_memory_bank():
    ours, original = adapter("lightly")
    before, after = (module.NTXentLoss(0.1, memory_bank_size=(20, 12)) for module in (original, ours))
    after.memory_bank = copy.deepcopy(before.memory_bank)  # random rows at first, in no state dict
    for _ in range(4):
        check_same(after, before, *torch.randn(2, 7, 12))
        assert torch.equal(after.memory_bank.bank, before.memory_bank.bank)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("distance", ["CosineSimilarity", "DotProductSimilarity"])
@pytest.mark.parametrize("reducer", ["MeanReducer", "AvgNonZeroReducer", "DoNothingReducer"])
def test_pytorch_metric_learning_pairs(dtype, distance, reducer):
    ours, _ = adapter("pytorch_metric_learning")
    options = {"distance": getattr(ours.distances, distance)(), "reducer": getattr(ours.reducers, reducer)()}
    if distance == "DotProductSimilarity":
        options["distance"].normalize_embeddings = False
    x, labels = torch.randn(31, 8, dtype=dtype), torch.randint(-1, 4, (31,))
    y, ref_labels = torch.randn(17, 8, dtype=dtype), torch.randint(-1, 4, (17,))
    for name in ("SupConLoss", "NTXentLoss"):
        if reducer == "DoNothingReducer" or (name == "NTXentLoss" and distance != "CosineSimilarity"):
            continue  # no number to differentiate; probabilities below 1e-7, where the original stops
        mine, theirs = (getattr(module, name)(0.2, **options) for module in (ours, ours.losses))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_same(mine, theirs, x, labels, tolerance=max(CLOSE[dtype], 2e-6))
            both = [
                lambda x, y, loss=loss: loss(x, labels, ref_emb=y, ref_labels=ref_labels) for loss in (mine, theirs)
            ]
            check_same(*both, x, y, tolerance=max(CLOSE[dtype], 2e-6))
    rows = ours.SupConLoss(0.2, **options).compute_loss(x, labels, None, x, labels)["loss"]["losses"]
    assert rows.shape == (31,)


def test_pytorch_metric_learning_of_one_class_and_of_none():
    ours, _ = adapter("pytorch_metric_learning")
    x = torch.randn(6, 4, requires_grad=True)
    for labels in (torch.zeros(6, dtype=torch.long), torch.arange(6)):
        for name in ("SupConLoss", "NTXentLoss"):
            assert getattr(ours, name)()(x, labels) == getattr(ours.losses, name)()(x, labels) == 0


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("name", ["ArcFaceLoss", "CosFaceLoss"])
def test_pytorch_metric_learning_prototypes(dtype, name):
    ours, _ = adapter("pytorch_metric_learning")
    mine, theirs = (getattr(module, name)(7, 12) for module in (ours, ours.losses))
    mine.W.data = theirs.W.data = theirs.W.data.to(dtype)
    mine.W.data = mine.W.data.clone()
    x, labels = torch.randn(23, 12, dtype=dtype), torch.randint(0, 7, (23,))
    check_same(mine, theirs, x, labels, trained=([mine.W], [theirs.W]))
    picked = (torch.tensor([0, 1, 1]), torch.tensor([2, 3, 4]), torch.tensor([0, 5]), torch.tensor([6, 7]))
    both = [lambda x, loss=loss: loss(x, labels, picked) for loss in (mine, theirs)]
    mine.W.grad = theirs.W.grad = None
    check_same(*both, x, trained=([mine.W], [theirs.W]))


def test_what_is_not_fused_runs_the_original_and_says_so_once():
    ours, _ = adapter("pytorch_metric_learning")
    x, labels = torch.randn(12, 8), torch.randint(0, 3, (12,))
    _originals._warn_once.cache_clear()
    loss = ours.SupConLoss(0.5, distance=ours.distances.LpDistance())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        values = [loss(x, labels), loss(x, labels)]
    assert [str(warning.message) for warning in seen] == [
        "SupConLoss: distance=LpDistance has no fused form; the original runs"
    ]
    expected = ours.losses.SupConLoss(0.5, distance=ours.distances.LpDistance())(x, labels)
    assert values[0] == values[1] == expected
    miner = importlib.import_module("pytorch_metric_learning.miners").MultiSimilarityMiner()
    picked = miner(x, labels)
    assert ours.SupConLoss()(x, labels, picked) == ours.losses.SupConLoss()(x, labels, picked)


@pytest.mark.parametrize("name", ["open_clip", "lightly", "pytorch_metric_learning"])
def test_classes_are_those_of_the_package_and_the_rest_is_passed_on(name):
    ours, original = adapter(name)
    made = {"CoCaLoss": (1.0, 1.0), "ArcFaceLoss": (5, 8), "CosFaceLoss": (5, 8)}
    for attribute, loss in vars(ours).items():
        theirs = getattr(original, attribute, None)
        if not isinstance(loss, type) or theirs is None or loss.__module__ != ours.__name__:
            continue
        arguments = made.get(attribute, ())
        assert issubclass(loss, theirs) and loss.__name__ == theirs.__name__
        assert loss(*arguments).state_dict().keys() == theirs(*arguments).state_dict().keys()
    other = {"open_clip": "gather_features", "lightly": "DINOLoss", "pytorch_metric_learning": "CircleLoss"}
    assert getattr(ours, other[name]) is getattr(original, other[name])
    with pytest.raises(AttributeError):
        _ = ours.no_such_loss


def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it():
    code = (
        "import sys; sys.modules['lightly'] = None\n"
        "class Gone:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] == 'lightly':\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "del sys.modules['lightly']; sys.meta_path.insert(0, Gone())\n"
        "import contrastive_ops.integrations.lightly"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = ran.stderr.strip().splitlines()[-1]
    assert last == (
        "ModuleNotFoundError: contrastive_ops.integrations: lightly must be installed, got none: pip install lightly"
    )
