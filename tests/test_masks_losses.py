"""Rows of weight 0 are left out: value, gradients, NaN and impossible labels, in every loss of the registry.

What belongs to a row alone is found out: where other numbers in rows of weight 0 change no result, NaN, infinities and
labels that do not exist must change none either. What other rows are compared with does change results, and stays.
"""

import pytest
import torch

from contrastive_ops.losses import late_interaction, simctg
from contrastive_ops.ops import TokenSets, maxsim, xtr
from contrastive_ops.testing import LOSSES, leaves

WEIGHT = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 1.5, 0.0])
LEFT = WEIGHT == 0
WEIGHTED = [name for name, case in LOSSES.items() if "weight" in case.function.__kwdefaults__]
# The arguments that belong to rows alone, which the search below must find.
ALONE = {
    "info_nce columns": {"query", "target", "scale"},
    "info_nce negatives": {"query", "row_negatives"},
    "info_nce smoothing": {"query", "label_smoothing"},
    "sup_con two-sided": {"x"},
    "soft_info_nce": {"query", "indices", "shares", "label_smoothing"},
    "arc_face": {"x", "labels", "scale"},
    "margin_softmax": {"x", "labels", "margin"},
    "moco": {"query", "key"},
    "mined_info_nce": {"query"},
    "mined_info_nce pairs": {"query", "positive", "scale"},
    "mined_info_nce labels": {"query", "indices"},
    "late_interaction negatives": {"queries", "target", "row_negatives", "scale"},
    "similarity_distillation": {"x", "teacher_x"},
    "matryoshka_info_nce columns": {"query", "target"},
    "siglip": {"image"},
    "multi_positive_siglip": {"x"},
    "bixse": {"query", "grades"},
    "bixse lists": {"query", "target", "grades", "scale"},
    "pair_bce": {"rows", "cols", "labels"},
    "triplet": {"anchor", "positive", "negative"},
    "batch_hard_triplet soft": {"x"},
    "batch_semi_hard_triplet two-sided": {"x", "target"},
    "contrastive": {"x", "y", "labels"},
    "energy_hinge": {"query"},
    "ge2e contrast": {"x", "labels"},
    "alignment": {"x", "y"},
    "dino": {"student", "teacher"},
    "dino sinkhorn": {"student", "teacher", "scale"},
    "swav": {"x", "y"},
    "dpo": {"chosen", "rejected", "reference_chosen", "reference_rejected"},
    "linear_cross_entropy": {"hidden", "labels"},
    "margin_mse": {"scores", "teacher_scores"},
    "y_aware_info_nce": {"query"},
    "listwise_cross_entropy": {"scores", "relevance"},
    "listwise_distillation": {"scores", "teacher_scores"},
    "pairwise_rank_distillation lambda": {"scores", "teacher_scores"},
    "negative_sampling": {"center", "context", "negatives"},
    "sog_clr": {"index"},
}


def result(name, inputs, reduction):
    """The loss, and the gradients of everything."""
    case = LOSSES[name]
    inputs = {key: t.detach().clone().requires_grad_(t.requires_grad) for key, t in inputs.items()}
    count = inputs["rows"].shape[0] if name == "pair_bce" else len(WEIGHT)
    weight = WEIGHT.repeat(count)[:count].requires_grad_()
    value = case({key: t for key, t in inputs.items() if key != "weight"}, reduction, weight=weight)
    total = (value * torch.linspace(1, 2, value.numel()).view_as(value)).sum()
    given = [*(t for key, t in inputs.items() if t.requires_grad and key != "weight"), weight]
    return [value.detach(), *torch.autograd.grad(total, given, allow_unused=True)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None)


def filled(tensor, left, value):
    return tensor.detach().masked_fill(left.view(-1, *(1,) * (tensor.dim() - 1)), value)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_rows_of_weight_0(name, reduction):
    inputs = LOSSES[name].inputs(len(WEIGHT), 16)
    draws = [LOSSES[name].inputs(len(WEIGHT), 16, seed=seed) for seed in range(1, 6)]
    clean, alone = result(name, inputs, reduction), set()
    assert all(each is None or each.isfinite().all() for each in clean)
    count = inputs["rows"].shape[0] if name == "pair_bce" else len(WEIGHT)
    left = (WEIGHT == 0).repeat(count)[:count]
    if reduction == "none":
        assert not clean[0][left.repeat(clean[0].numel() // count)].any()
    assert not clean[-1][left].any()  # the gradient of the weight itself
    for key, tensor in inputs.items():
        if key in ("ids", "weight", "mask") or tensor.shape[:1] != left.shape:
            continue
        # Several draws: another row may happen not to be the hardest negative of any.
        changes = [torch.where(left.view(-1, *(1,) * (tensor.dim() - 1)), each[key], tensor) for each in draws]
        if torch.equal(changes[0], tensor):  # labels that are the same in every draw
            changes = [filled(tensor, left, int(tensor.max()))]
        changes = [each.detach().requires_grad_(tensor.requires_grad) for each in changes]
        if not all(same(result(name, {**inputs, key: changed}, reduction), clean) for changed in changes):
            continue
        alone.add(key)
        impossible = (torch.nan, torch.inf, -torch.inf) if tensor.is_floating_point() else (-100, 10**9)
        for value in impossible:
            broken = filled(tensor, left, value).requires_grad_(tensor.requires_grad)
            found = result(name, {**inputs, key: broken}, reduction)
            for a, b in zip(found, clean, strict=True):
                assert (a is None and b is None) or torch.equal(a, b), (key, value)
    assert alone >= ALONE.get(name, set())


def test_the_table_names_weighted_losses():
    assert set(ALONE) <= set(WEIGHTED)


@pytest.mark.parametrize("name", ["info_nce columns", "margin_softmax", "moco", "bixse", "soft_info_nce", "margin_mse"])
def test_rows_of_weight_0_compiled(name):
    inputs = LOSSES[name].inputs(len(WEIGHT), 16)
    inputs.pop("weight", None)
    key = next(iter(inputs))
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: LOSSES[name](given, weight=WEIGHT), fullgraph=True, backend="aot_eager")
    results = []
    for value in (0.0, torch.nan):
        given = {**inputs, key: filled(inputs[key], LEFT, value).requires_grad_()}
        loss = compiled(given)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves(given))])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_all_rows_of_weight_0():
    for name in WEIGHTED:
        inputs = LOSSES[name].inputs(4, 16)
        inputs.pop("weight", None)
        value = LOSSES[name](inputs, weight=torch.zeros(4 if name != "pair_bce" else inputs["rows"].shape[0]))
        assert value == 0, name
        assert all(g is None or not g.any() for g in torch.autograd.grad(value, leaves(inputs), allow_unused=True)), (
            name
        )


@pytest.mark.parametrize("name", ["matryoshka_info_nce", "matryoshka_clip", "matryoshka_nt_xent"])
def test_a_prefix_of_weight_0(name):
    inputs, case = LOSSES[name].inputs(6, 8), LOSSES[name]
    first, second = (key for key, t in inputs.items() if t.dim() == 2)
    given = {**inputs, first: inputs[first].detach().clone(), second: inputs[second].detach().clone()}
    given[first][1, 6] = torch.nan  # in the longest prefix alone
    given = {key: t.requires_grad_() if t.is_floating_point() else t for key, t in given.items()}
    found = case(given, dims=[2, 4, 8], dim_weights=[1.0, 0.5, 0.0])
    alone = case(inputs, dims=[2, 4], dim_weights=[1.0, 0.5])
    torch.testing.assert_close(found, alone)
    for a, b in zip(*(torch.autograd.grad(v, leaves(g)) for v, g in ((found, given), (alone, inputs))), strict=True):
        torch.testing.assert_close(a, b)


# ---- Other masks of losses and primitives --------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_padding_of_segments(value, normalize):
    segments = torch.tensor([0, 0, -1, 1, 1, -1, 1])
    results = []
    for filling in (0.0, value):
        x = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
        x = x.masked_fill((segments == -1)[:, None], filling).requires_grad_()
        loss = simctg(x, segments, normalize=normalize)
        results.append([loss.detach(), *torch.autograd.grad(loss, x)])
    assert results[0][0].isfinite() and same(*results)


def scores(function, q, d, packing):
    queries = TokenSets(q[0], q[1])
    documents = TokenSets(d[0], d[1])
    if packing:
        queries, documents = (
            TokenSets(t.flatten(0, 1), m.flatten(), offsets=torch.arange(t.shape[0] + 1) * t.shape[1])
            for t, m in (q, d)
        )
    return function(queries, documents)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "function",
    [
        maxsim,
        lambda q, d: xtr(q, d, k=4),
        late_interaction,
        lambda q, d: late_interaction(q, d, normalize=True),
        lambda q, d: late_interaction(q, d, retrieved=4, normalize=True),
    ],
    ids=["maxsim", "xtr", "late_interaction", "normalize", "retrieved"],
)
def test_padding_of_tokens(function, value, packing):
    masks = torch.rand(4, 3) < 0.7, torch.rand(4, 5) < 0.7
    masks[0][:, 0], masks[1][:, 0] = True, True
    results = []
    for filling in (0.0, value):
        torch.manual_seed(0)
        tokens = [torch.randn(4, mask.shape[1], 8).masked_fill(~mask[..., None], filling) for mask in masks]
        tokens = [t.requires_grad_() for t in tokens]
        found = scores(function, (tokens[0], masks[0]), (tokens[1], masks[1]), packing)
        total = (found * found.detach().cos()).sum()
        results.append([found.detach(), *torch.autograd.grad(total, tokens)])
    assert all(each.isfinite().all() for each in results[0]) and same(*results)
