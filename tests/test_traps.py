"""What went wrong elsewhere and must not go wrong here: one test for each trap, with its story in the first line."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

from contrastive_ops import Fold, Pairs, clip, info_nce, nt_xent, similarity_reduce
from contrastive_ops.losses import gist, moco, multi_positive_info_nce, siglip, sup_con
from contrastive_ops.ops import Guide, stream_rows
from contrastive_ops.testing import LOSSES, clustered_pairs, leaves, relative_error, saved_bytes

DOUBLE = torch.float64
ONE_EACH = [name for name, case in LOSSES.items() if name == case.function.__name__]


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, dtype=DOUBLE), dim=-1).to(dtype).requires_grad_()


def gradients(value, tensors, cotangent=None):
    return torch.autograd.grad(value, tensors, torch.ones_like(value) if cotangent is None else cotangent)


def as_double(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


# By intent, the gradient of sog_clr is an estimator, and swav's codes are constants of the views that they are made of.
@pytest.mark.parametrize("name", [name for name in ONE_EACH if name not in ("sog_clr", "swav")])
@pytest.mark.parametrize("rows", [5, 40])
def test_a_gradient_is_the_derivative_of_the_returned_loss(name, rows):
    """memeff: `stable=True`, its default, returned gradients scaled by sqrt(B tau), which no optimiser knows about."""
    case = LOSSES[name]
    inputs = case.inputs(rows, 6, DOUBLE, seed=1)
    direction = [torch.randn_like(t) for t in leaves(inputs)]
    step = 1e-6
    values = []
    for sign in (1, -1):
        moved = iter(t.detach() + sign * step * d for t, d in zip(leaves(inputs), direction, strict=True))
        values.append(case({n: next(moved) if t.requires_grad else t for n, t in inputs.items()}))
    slope = sum((g * d).sum() for g, d in zip(gradients(case(inputs), leaves(inputs)), direction, strict=True))
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
def test_every_row_has_its_own_upstream_gradient(backend, weighted):
    """Liger #968: with reduction='none', gradients formed in forward met their upstream factors after the sum."""
    query, key = unit(30, 8, dtype=DOUBLE), unit(30, 8, dtype=DOUBLE)
    cotangent = torch.randn(30, dtype=DOUBLE)
    weight = torch.rand(30, dtype=DOUBLE) if weighted else None
    logits, factor = 5.0 * query @ key.T, 1.0 if weight is None else weight
    sign = 2 * torch.eye(30, dtype=DOUBLE) - 1
    options = {"scale": 5.0, "weight": weight, "reduction": "none", "backend": backend}
    for value, truth in (
        (info_nce(query, key, normalize=False, **options), F.cross_entropy(logits, torch.arange(30), reduction="none")),
        (siglip(query, key, bias=-2.0, normalize=False, **options), -F.logsigmoid(sign * (logits - 2.0)).sum(1)),
    ):
        expected = torch.autograd.grad(truth * factor, [query, key], cotangent, retain_graph=True)
        for got, want in zip(gradients(value, [query, key], cotangent), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_compile_counts_the_rows_of_each_batch():
    """Liger #1338: torch.compile returned a wrong loss without a word where some rows are ignored."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, labels: sup_con(x, labels), fullgraph=True, backend="aot_eager")
    x = unit(24, 8)
    for ignored in (0, 5, 23, 24):
        labels = torch.arange(24) % 4
        labels[:ignored] = -1
        value, expected = compiled(x, labels), sup_con(x, labels)
        torch.testing.assert_close(value, expected)
        for got, want in zip(gradients(value, [x]), gradients(expected, [x]), strict=True):
            torch.testing.assert_close(got, want)


def test_chunks_are_not_kept_for_backward(backend):
    """open_clip #1145 computed SigLIP in chunks, whose logits autograd kept all the same: #1214."""

    def own_and_others(logits, rows):
        return F.softplus(logits).sum(1) - logits.diagonal(rows.start)

    sizes = []
    for rows in (1100, 4400):  # more than what the reference computes at once
        image, text = unit(rows, 16), unit(rows, 16)
        fused, _ = saved_bytes(lambda x=image, y=text: siglip(x, y, memory_budget=0, backend=backend))
        streamed, _ = saved_bytes(lambda x=image, y=text: stream_rows(own_and_others, x, y, chunk_rows=100).sum())
        sizes.append((fused, streamed))
    for small, large in zip(*sizes, strict=True):
        assert large <= 4.4 * small
        assert large < 4400 * 4400


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_never_negative_at_convergence(backend, dtype):
    """Inf-CL: lse from TF32 products, positives from float32 ones; half of the converged rows had a negative loss."""
    query, key = clustered_pairs(200, 64, 0.001, dtype=dtype, scale=100.0)
    rows = info_nce(query, key, scale=100.0, reduction="none", backend=backend, normalize=False)
    assert (rows >= 0).all()
    # Exact logits of these inputs; float32 ones are off by about 1e-5 at this scale.
    logits = 100.0 * query.double() @ key.double().T
    truth = F.cross_entropy(logits, torch.arange(200), reduction="none")
    torch.testing.assert_close(rows.double(), truth, rtol=1e-3, atol=1e-9)
    assert clip(query, query, scale=100.0, backend=backend, normalize=False) >= 0


def test_similarities_far_below_1_do_not_underflow(backend):
    """memeff took 1 / tau for the maximum: at tau = 0.005 rows without a similarity above 0.563 became log(0)."""
    query = F.normalize(torch.randn(40, 16), dim=1)
    key = F.normalize(torch.randn(40, 16), dim=1) * 0.3
    query, key = query.requires_grad_(), key.requires_grad_()
    assert (query @ key.T).max() < 0.563
    value = clip(query, key, temperature=0.005, backend=backend, normalize=False)
    x, y = as_double(query, key)
    logits, labels = x @ y.T / 0.005, torch.arange(40)
    truth = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert relative_error(value, truth) <= 1e-5
    for got, want in zip(gradients(value, [query, key]), gradients(truth, [x, y]), strict=True):
        assert relative_error(got, want) <= 1e-4
    # Nor does it overflow to take the other end, 0, for the maximum.
    for dtype, scale in ((torch.float32, 200.0), (DOUBLE, 2000.0)):
        x, y = torch.ones(3, 1, dtype=dtype), -torch.ones(5, 1, dtype=dtype)
        lse = similarity_reduce(x, y, scale=scale, dim=(0, 1), backend=backend)
        torch.testing.assert_close(lse.rows, torch.full((3,), math.log(5) - scale, dtype=dtype))
        torch.testing.assert_close(lse.cols, torch.full((5,), math.log(3) - scale, dtype=dtype))


def test_many_small_gradients_are_not_dropped(backend):
    """CCE skips tiles whose probabilities are below 2.4e-4: in a large batch that is nearly all of the gradient."""
    query, key = unit(32, 16), unit(8192, 16)
    value = info_nce(query, key, scale=0.5, backend=backend, normalize=False)
    x, y = as_double(query, key)
    logits = 0.5 * x @ y.T
    assert logits.softmax(1).max() < 2.4e-4
    truth = F.cross_entropy(logits, torch.arange(32))
    for got, want in zip(gradients(value, [query, key]), gradients(truth, [x, y]), strict=True):
        assert relative_error(got, want) <= 1e-5
        assert relative_error(got[32:], want[32:]) <= 1e-5


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_logits_sums_and_the_loss_stay_in_float32(name, backend):
    """siglip-kernel rounded logits and loss to bfloat16, and Liger #512 diverged from sums over chunks in it."""
    errors = []
    for rows in (200, 1300):
        image, text = (t.requires_grad_() for t in clustered_pairs(rows, 32, 0.3, dtype=torch.bfloat16, scale=20.0))
        loss = {"clip": clip, "siglip": siglip}[name]
        value = loss(image, text, scale=20.0, backend=backend)
        x, y = as_double(image, text)
        truth = loss(x, y, scale=20.0, backend="reference")
        assert value.dtype == torch.float32
        assert relative_error(value, truth) <= 1e-5
        got = gradients(value, [image, text])
        errors.append(max(relative_error(g, w) for g, w in zip(got, gradients(truth, [x, y]), strict=True)))
    assert max(errors) <= 4e-3 and errors[1] <= 1.5 * errors[0]


def test_positives_out_of_reach_do_not_saturate(backend):
    """pytorch-metric-learning's log(num / den + tiny): at tau = 0.01 a loss of 39.4 was reported as 23.6."""
    # The first two belong together and are orthogonal; the third lies on the first.
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2])
    options = {"temperature": 0.01, "reduction": "none", "backend": backend}
    for rows in (
        sup_con(x, labels, **options),
        multi_positive_info_nce(x, labels, **options),
        nt_xent(x[::2] * 1.0, x[1::2] * 1.0, **options),
        info_nce(x, x.roll(1, 0), **options),
    ):
        torch.testing.assert_close(rows[:1], torch.tensor([100.0]), rtol=0.01, atol=0)
        (dx,) = torch.autograd.grad(rows[0], [x])
        assert dx.norm() > 50


def test_the_mean_over_ranks_is_the_mean_over_the_batch(backend):
    """lightly #1977, pytorch-metric-learning #363, open_clip #616: gradients off by a factor of the world size."""
    query, key = unit(24, 8, dtype=DOUBLE), unit(24, 8, dtype=DOUBLE)
    whole = info_nce(query, key, scale=5.0, backend=backend)
    target = torch.arange(24)
    ranks = [
        info_nce(query[part], key, target=target[part], scale=5.0, backend=backend)
        for part in (slice(0, 12), slice(12, 24))
    ]
    torch.testing.assert_close(sum(ranks) / 2, whole, rtol=1e-12, atol=0)
    # What DistributedDataParallel does: every rank differentiates its own loss, and gradients are averaged.
    by_rank = zip(*(gradients(loss, [query, key]) for loss in ranks), strict=True)
    for (first, second), expected in zip(by_rank, gradients(whole, [query, key]), strict=True):
        torch.testing.assert_close((first + second) / 2, expected, rtol=1e-12, atol=1e-15)


def test_a_rank_says_which_columns_are_its_own(backend):
    """lightly #1176: a rank's rows were labelled 0, 1, 2, ... among the columns of all ranks."""
    query, key = unit(24, 8), unit(24, 8)
    part, options = slice(16, 24), {"scale": 5.0, "reduction": "none", "backend": backend}
    whole = info_nce(query, key, **options)
    torch.testing.assert_close(info_nce(query[part], key, target=torch.arange(16, 24), **options), whole[part])
    torch.testing.assert_close(info_nce(query[part], key, **options), info_nce(query[part], key[:24], **options))
    assert not torch.allclose(info_nce(query[part], key, **options), whole[part])
    # Rows compared with themselves: the diagonal is offset.
    lse = similarity_reduce(query, scale=5.0, pairs=Pairs(diagonal=0), backend=backend)
    of_rank = similarity_reduce(query[part], query, scale=5.0, pairs=Pairs(diagonal=16), backend=backend)
    torch.testing.assert_close(of_rank, lse[part])


def test_a_queue_may_hold_the_keys_of_the_batch(backend):
    """pytorch-metric-learning #24: keys enqueued before the loss were compared with their own queries as negatives."""
    query, key, old = unit(6, 8), unit(6, 8), unit(20, 8).detach()
    ids = torch.arange(6) + 100
    queue, queue_ids = (
        torch.cat([old[:9], key.detach(), old[9:]]),
        torch.cat([torch.arange(9), ids, torch.arange(9, 20)]),
    )
    options = {"temperature": 0.1, "reduction": "none", "backend": backend}
    rows = moco(query, key, queue, labels=ids, queue_labels=queue_ids, **options)
    for row in range(6):
        others = torch.cat([queue[:9], queue[9:15][torch.arange(6) != row], queue[15:]])
        expected = moco(query[row : row + 1], key[row : row + 1], others, **options)
        torch.testing.assert_close(rows[row : row + 1], expected)
    assert (moco(query, key, queue, **options) > rows).all()
    # The order of a queue says nothing.
    order = torch.randperm(26)
    shuffled = moco(query, key, queue[order], labels=ids, queue_labels=queue_ids[order], **options)
    torch.testing.assert_close(shuffled, rows)


def test_gradients_cached_between_two_passes(backend):
    """sentence-transformers #3862: cached losses had other gradients, from random numbers or values that had moved."""
    encoder = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 8))
    chunks = torch.randn(4, 2, 5, 6)

    def encode(index):
        torch.manual_seed(index)
        both = encoder(chunks[index])
        return both[0], both[1]

    def loss_of(encoded):
        x, y = (torch.cat(side) for side in zip(*encoded, strict=True))
        return clip(x, y, scale=2.0, normalize=True, backend=backend), x, y

    one_step = torch.autograd.grad(loss_of([encode(i) for i in range(4)])[0], list(encoder.parameters()))
    with torch.no_grad():
        cached = [tuple(side.clone() for side in encode(i)) for i in range(4)]
    cached = [tuple(side.requires_grad_() for side in each) for each in cached]
    of_embeddings = torch.autograd.grad(loss_of(cached)[0], [side for each in cached for side in each])
    for index in range(4):
        torch.autograd.backward(encode(index), of_embeddings[2 * index : 2 * index + 2])
    for parameter, expected in zip(encoder.parameters(), one_step, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_draws_no_random_numbers_and_changes_no_input(name):
    """sentence-transformers #3862, the cause: what a second pass computes must be what the first one did."""
    inputs = LOSSES[name].inputs(12, 6)
    before = {key: t.detach().clone() for key, t in inputs.items()}
    generator = torch.get_rng_state()
    LOSSES[name](inputs).backward()
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t.detach(), before[key]) for key, t in inputs.items())


def test_the_batch_size_is_no_constant_of_a_compiled_step():
    """siglip-kernel made the batch size a compile-time constant: every last batch of an epoch compiled again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    step = torch.compile(lambda x, y: siglip(x, y, reduction="none").sum(), fullgraph=True, backend=counter)
    for rows in (32, 31, 7, 64):
        image, text = unit(rows, 8), unit(rows, 8)
        if rows == 32:
            torch._dynamo.mark_dynamic(image, 0)
            torch._dynamo.mark_dynamic(text, 0)
        torch.testing.assert_close(step(image, text), siglip(image, text, reduction="none").sum())
    assert counter.frame_count == 1


def test_importing_asks_no_device():
    """siglip-kernel fails to import without a driver, and late-interaction-kernels where Triton has none."""
    code = """
import sys, torch
sys.modules["triton"] = None  # an import of it raises
def refused(*arguments, **options):
    raise AssertionError("a device was asked")
for name in ("_lazy_init", "get_device_capability", "get_device_properties", "device_count", "is_available"):
    setattr(torch.cuda, name, refused)
import contrastive_ops, contrastive_ops.losses, contrastive_ops.nn
x = torch.randn(8, 4, requires_grad=True)
contrastive_ops.clip(x, x.detach().clone()).backward()
assert not torch.cuda.is_initialized()
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_positions_beyond_32_bits():
    """CuBlaze numbers pairs in int32, and so did CCE until #39: above 2^31 of them it read other rows."""
    n, m = 50_000, 43_000
    assert n * m > 1 << 31
    x, y = torch.linspace(0.5, 1.0, n)[:, None], torch.linspace(0.5, 1.0, m)[:, None]
    labels, col_labels = torch.zeros(n, dtype=torch.int64), torch.ones(m, dtype=torch.int64)
    col_labels[-1] = 0  # drops the last column of every row
    largest = Fold("max", pairs=Pairs(differ=(labels, col_labels)))
    found = similarity_reduce(x, y, reduce=largest, dim=(0, 1), backend="cpu")
    assert (found.row_argmax == m - 2).all()
    assert (found.col_argmax[:-1] == n - 1).all() and found.col_argmax[-1] == -1
    torch.testing.assert_close(found.rows, x[:, 0] * y[-2, 0])


def test_ties_take_part(backend):
    """memeff left ties out of its comparisons with the truth; here a pair on a bound takes part, in every rule."""
    generator = torch.Generator().manual_seed(0)
    x, y, gx, gy = (torch.randint(-2, 3, (n, 6), generator=generator).double() for n in (20, 20, 20, 20))
    similarity, guide = x @ y.T, gx @ gy.T  # whole numbers, exact in any order
    bound, guide_bound = similarity.diagonal(), guide.diagonal()
    assert (similarity == bound[:, None]).sum() > 25 and (guide == guide_bound[:, None]).sum() > 25
    for pairs, keep in (
        (Pairs(below=bound), similarity <= bound[:, None]),
        (Pairs(above=bound), similarity >= bound[:, None]),
        (Pairs(below=bound[None]), similarity <= bound),
        (Pairs(guide=Guide(gx, gy, below=guide_bound)), guide <= guide_bound[:, None]),
    ):
        count = similarity_reduce(x, y, reduce="count", pairs=pairs, backend=backend)
        assert torch.equal(count, keep.sum(1).double())
    own = torch.eye(20, dtype=torch.bool)
    options = {"scale": 1.0, "normalize": False, "contrast_anchors": False, "contrast_positives": False}
    value = gist(x, y, gx, gy, **options, backend=backend)
    logits = similarity.masked_fill((guide > guide_bound[:, None]) & ~own, -torch.inf)
    torch.testing.assert_close(value, F.cross_entropy(logits, torch.arange(20)), rtol=1e-12, atol=0)
