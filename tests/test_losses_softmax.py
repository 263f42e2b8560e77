"""InfoNCE, CLIP and NT-Xent against torch.nn.functional.cross_entropy in float64."""

import pytest
import torch
from pairwise import pairwise
from torch.nn import functional as F

from contrastive_ops import clip, info_nce, nt_xent
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, TOLERANCE, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64


def dense_info_nce(query, key, scale, target=None, negatives=None, row_negatives=None, label_smoothing=0.0):
    columns = key if negatives is None else torch.cat([key, negatives])
    by_row = scale[:, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale
    logits = by_row * (query @ columns.T)
    if row_negatives is not None:
        logits = torch.cat([logits, by_row * torch.einsum("nd,nkd->nk", query, row_negatives)], 1)
    target = torch.arange(len(query)) if target is None else target
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)


def dense_clip(image, text, scale):
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    each = [F.cross_entropy(v, labels, reduction="none") for v in (logits, logits.T)]
    return (each[0] + each[1]) / 2


def dense_nt_xent(z0, z1, scale, normalize=True):
    z = torch.cat([z0, z1])
    z = F.normalize(z) if normalize else z
    logits = (scale * z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z0)), reduction="none")


@pairwise(
    reduction=["mean", "sum", "none"],
    weighted=[False, True],
    label_smoothing=[0.0, 0.1, 1.0],
    negatives=["", "shared", "row", "shared row"],
)
def test_info_nce(backend, reduction, weighted, label_smoothing, negatives):
    query, key, scale = leaf(37, 12), leaf(41, 12), torch.tensor(1.7, dtype=DOUBLE, requires_grad=True)
    options = {}
    if "shared" in negatives:
        options["negatives"] = leaf(13, 12)
    if "row" in negatives:
        options["row_negatives"] = leaf(37, 3, 12)
    weight = torch.rand(37, dtype=DOUBLE, requires_grad=True) if weighted else None
    value = info_nce(
        query,
        key,
        scale=scale,
        weight=weight,
        reduction=reduction,
        label_smoothing=label_smoothing,
        backend=backend,
        normalize=False,
        **options,
    )
    truth = reduced(dense_info_nce(query, key, scale, label_smoothing=label_smoothing, **options), reduction, weight)
    check(value, truth, [query, key, scale, *options.values(), *([weight] if weighted else [])])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_with_targets_that_repeat(backend, reduction):
    query, key = leaf(30, 8), leaf(9, 8)
    target = torch.randint(0, 9, (30,))
    value = info_nce(query, key, target=target, temperature=0.5, reduction=reduction, backend=backend, normalize=False)
    check(value, reduced(dense_info_nce(query, key, 2.0, target), reduction), [query, key])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scale_per_row(backend, reduction):
    query, key, scale = leaf(30, 8), leaf(31, 8), torch.rand(30, dtype=DOUBLE, requires_grad=True)
    value = info_nce(
        query, key, leaf(3, 8).detach(), scale=scale, reduction=reduction, backend=backend, normalize=False
    )
    assert value.isfinite().all()
    value = info_nce(query, key, scale=scale, reduction=reduction, backend=backend, normalize=False)
    check(value, reduced(dense_info_nce(query, key, scale), reduction), [query, key, scale])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_clip(backend, reduction, weighted):
    image, text, scale = leaf(37, 12), leaf(37, 12), torch.tensor(1.7, dtype=DOUBLE, requires_grad=True)
    weight = torch.rand(37, dtype=DOUBLE, requires_grad=True) if weighted else None
    value = clip(image, text, scale=scale, weight=weight, reduction=reduction, backend=backend, normalize=False)
    truth = reduced(dense_clip(image, text, scale), reduction, weight)
    check(value, truth, [image, text, scale, *([weight] if weighted else [])])


@pairwise(reduction=["mean", "sum", "none"], normalize=[False, True], count=[1, 2, 70, 300])
def test_nt_xent(backend, reduction, normalize, count):
    z0, z1, temperature = leaf(count, 12), leaf(count, 12), torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    value = nt_xent(z0, z1, temperature=temperature, reduction=reduction, normalize=normalize, backend=backend)
    check(value, reduced(dense_nt_xent(z0, z1, 1 / temperature, normalize), reduction), [z0, z1, temperature])


@pytest.mark.parametrize("loss", [info_nce, clip])
def test_normalize_inside(backend, loss):
    a, b = leaf(20, 6), leaf(20, 6)
    inside = loss(a, b, backend=backend)
    check(inside, loss(F.normalize(a), F.normalize(b), normalize=False, backend=backend), [a, b])


def test_normalize_of_row_negatives(backend):
    query, key, own = leaf(20, 6), leaf(20, 6), leaf(20, 2, 6)
    value = info_nce(query, key, row_negatives=own, backend=backend)
    rows = dense_info_nce(F.normalize(query), F.normalize(key), 1 / 0.07, row_negatives=F.normalize(own, dim=-1))
    check(value, rows.mean(), [query, key, own])


def test_an_infinite_lse_of_own_negatives_is_a_row_without_any(backend):
    query, key = leaf(5, 6), leaf(5, 6)
    none = torch.zeros(5, 0, 6, dtype=DOUBLE)
    value = info_nce(query, key, row_negatives=none, backend=backend, normalize=False)
    check(value, info_nce(query, key, backend=backend, normalize=False), [query, key])


def test_one_pair_has_loss_zero_and_gradient_zero(backend):
    for loss in (info_nce, clip, nt_xent):
        a, b = leaf(1, 4), leaf(1, 4)
        value = loss(a, b, backend=backend)
        assert value == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(value, [a, b]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradient_of_one_tower_alone(backend, reduction, wanted):
    every = [leaf(20, 6), leaf(20, 6), torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)]
    chosen = [t if k in wanted else t.detach() for k, t in enumerate(every)]
    value = info_nce(chosen[0], chosen[1], scale=chosen[2], reduction=reduction, backend=backend, normalize=False)
    check(value, reduced(dense_info_nce(*chosen), reduction), [chosen[k] for k in wanted])


@pytest.mark.parametrize("loss,reduction", [(info_nce, "mean"), (info_nce, "none"), (clip, "mean"), (nt_xent, "mean")])
def test_gradcheck(backend, loss, reduction):
    a, b, scale = leaf(5, 3), leaf(5, 3), torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)

    def function(a, b, scale):
        return loss(a, b, scale=scale, reduction=reduction, backend=backend)

    check_derivatives(function, (a, b, scale))


def test_gradgradcheck_with_every_option(backend):
    weight = torch.rand(4, dtype=DOUBLE, requires_grad=True)

    def function(query, key, negatives, own, weight):
        return info_nce(
            query,
            key,
            negatives,
            row_negatives=own,
            weight=weight,
            label_smoothing=0.2,
            scale=1.5,
            backend=backend,
            normalize=False,
        )

    leaves = (leaf(4, 3), leaf(4, 3), leaf(2, 3), leaf(4, 2, 3), weight)
    check_derivatives(function, leaves)


# ---- Near convergence -----------------------------------------------------------------------------------------

LOW = [torch.bfloat16, torch.float16]
PAIRED = {"info_nce": (info_nce, dense_info_nce), "clip": (clip, dense_clip), "nt_xent": (nt_xent, dense_nt_xent)}


@pairwise(dtype=[*LOW, torch.float32], level=[0.3, 0.01, 0.001], name=PAIRED, reduction=["mean", "none"])
def test_gradient_error_in_three_regimes(backend, dtype, level, name, reduction):
    loss, dense = PAIRED[name]
    a, b = (t.requires_grad_() for t in clustered_pairs(512, 96, level, dtype=dtype))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    truth = dense(*exact, 50.0, **({"normalize": False} if name == "nt_xent" else {})).mean()
    value = loss(a, b, scale=50.0, reduction=reduction, normalize=False, backend=backend).mean()
    assert relative_error(value, truth) <= 1e-3
    bound = GRADIENT_ERROR_16_BIT if dtype in LOW else 1e-4
    gradients = zip(torch.autograd.grad(value, [a, b]), torch.autograd.grad(truth, exact), strict=True)
    for got, expected in gradients:
        assert got.dtype == dtype
        assert relative_error(got, expected) <= bound


@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
def test_no_row_is_ever_negative(backend, dtype):
    """lse and the positive's logit from different precisions gave half of the rows a negative loss elsewhere."""
    a, b = clustered_pairs(256, 64, 1e-5, dtype=dtype, scale=100.0)
    for loss in (info_nce, clip, nt_xent):
        assert (loss(a, b, scale=100.0, reduction="none", backend=backend) >= 0).all()


def test_small_losses_are_exact_in_float32(backend):
    """log(x + tiny) and lse - logit both lose losses below 1e-7; softplus does not."""
    query = torch.eye(8)
    truth = 7 * torch.exp(torch.tensor(-30.0, dtype=DOUBLE))
    assert relative_error(info_nce(query, query, scale=30.0, backend=backend, normalize=False), truth) <= 1e-5


def test_large_logits_do_not_saturate(backend):
    """A temperature of 0.01 on cosines: exp underflows without a maximum, and log(0 + tiny) is a wrong constant."""
    query = F.normalize(torch.randn(64, 16, dtype=DOUBLE))
    truth = dense_info_nce(query, -query, 100.0).mean()
    assert truth > 100
    assert (
        relative_error(
            info_nce(query.float(), -query.float(), temperature=0.01, backend=backend, normalize=False), truth
        )
        <= 1e-6
    )


def test_gradient_survives_float16_mean_over_many_rows(backend):
    """1 / N is applied in float32 after accumulation: in float16 it would make every weight subnormal."""
    a, b = (t.half().requires_grad_() for t in (torch.randn(3000, 8), torch.randn(3000, 8)))
    value = info_nce(a, b, scale=1.0, backend=backend, normalize=False) * 65536.0
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    truth = torch.autograd.grad(dense_info_nce(*exact, 1.0).mean() * 65536.0, exact)
    for got, expected in zip(torch.autograd.grad(value, [a, b]), truth, strict=True):
        assert relative_error(got, expected) <= TOLERANCE[torch.float16]


def test_training_follows_plain_torch(backend):
    """A hundred steps of a two-tower model: the same loss curve."""

    def curve(loss):
        torch.manual_seed(1)
        towers = torch.nn.Linear(16, 24), torch.nn.Linear(12, 24)
        log_scale = torch.nn.Parameter(torch.tensor(2.0))
        inputs = torch.randn(128, 16), torch.randn(128, 12)
        optimizer = torch.optim.SGD([*towers[0].parameters(), *towers[1].parameters(), log_scale], lr=0.05)
        values = []
        for _ in range(100):
            a, b = (F.normalize(tower(x)) for tower, x in zip(towers, inputs, strict=True))
            value = loss(a, b, log_scale.exp())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        return torch.tensor(values)

    plain = curve(lambda a, b, s: dense_clip(a, b, s).mean())
    ours = curve(lambda a, b, s: clip(a, b, scale=s, backend=backend, normalize=False))
    assert plain[0] - plain[-1] > 0.1
    assert (plain - ours).abs().max() <= 1e-3
