"""What a call on many processes refuses, on all of them, and what it finds out by itself."""

import datetime
import os
import signal

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, ranks

import contrastive_ops as co
from contrastive_ops import distributed


def refused(rank, size, call):
    """The words of the error on this rank; the group must still work afterwards."""
    try:
        call(rank)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = ""
    dist.all_reduce(torch.ones(()))
    return text


def _pair(rows=4, depth=8, dtype=torch.float32):
    return torch.randn(rows, depth, dtype=dtype), torch.randn(rows, depth, dtype=dtype)


def other_dimension(rank):
    distributed.clip(*_pair(depth=8 + rank))


def other_dtype(rank):
    distributed.siglip(*_pair(dtype=torch.float64 if rank else torch.float32))


def other_folds(rank):
    folds = ("logsumexp", "sum") if rank else ("logsumexp",)
    distributed.similarity_reduce(*_pair(), reduce=folds, dim=(0, 1))


def other_option(rank):
    distributed.info_nce(*_pair(), schedule="ring" if rank else "gather")


def other_rules(rank):
    ids = torch.arange(4)
    distributed.info_nce(*_pair(), pairs=co.Pairs(differ=(ids, ids)) if rank else None)


def wrong_labels(rank):
    x, _ = _pair()
    distributed.sup_con(x, torch.arange(4.0) if rank else torch.arange(4))


def wrong_shape(rank):
    x, y = _pair()
    distributed.clip(x, y[: 4 - rank])


def float_labels_of_a_queue(rank):
    x, y = _pair()
    labels = torch.arange(4)
    distributed.moco(x, y, x, labels=labels, queue_labels=labels.float() if rank else labels)


def weight_of_another_rank(rank):
    distributed.nt_xent(*_pair(), weight=torch.ones(4 + rank))


DIFFERENCES = {
    other_dimension: ("D=8", "rank 1", "D=9"),
    other_dtype: ("float32", "rank 1", "float64"),
    other_folds: ("'logsumexp']", "rank 1", "'sum'"),
    other_option: ("schedule='gather'", "rank 1", "schedule='ring'"),
    other_rules: ("pairs=[]", "rank 1", "pairs=['differ']"),
}


@pytest.mark.parametrize("call", list(DIFFERENCES), ids=lambda call: call.__name__)
def test_a_difference_is_an_error_on_every_rank(call):
    for text in ranks(3).run(refused, call):
        assert text.startswith("ValueError") and all(words in text for words in DIFFERENCES[call]), text


REFUSED = [wrong_labels, wrong_shape, float_labels_of_a_queue, weight_of_another_rank]


@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.__name__)
def test_what_one_rank_refuses_is_an_error_on_every_rank(call):
    first, second, _ = ranks(3).run(refused, call)
    assert "rank 1 raised" in first and second.split(": ", 1)[1] in first, (first, second)


def test_options_that_there_are_not():
    with pytest.raises(TypeError, match="clip: options must be among .*schedule.*, got labels"):
        distributed.clip(*_pair(), labels=torch.arange(4))
    with pytest.raises(TypeError, match="options must be among .*, got text_negatives"):
        distributed.CLIPLoss(text_negatives=torch.randn(2, 8))


def test_groups(tmp_path):
    x, y = _pair()
    assert torch.equal(distributed.clip(x, y), co.clip(x, y))  # no process group
    with pytest.raises(ValueError, match="clip: group must be None where there is no process group"):
        distributed.clip(x, y, group=object())
    for rank, text in enumerate(ranks(3).run(refused, _outside)):
        assert ("must be one that this process is in" in text) == (rank == 2), text
    assert all("must be a ProcessGroup" in text for text in ranks(3).run(refused, _no_group))


def _outside(rank):
    group = dist.new_group([0, 1])
    torch.manual_seed(rank)
    x, y = _pair()
    distributed.clip(x, y, group=group)


def _no_group(rank):
    distributed.clip(*_pair(), group="data")


def meshes(rank, size):
    """A mesh names a group; DTensors bring theirs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "data"))
    x, y = torch.randn(7, 8), torch.randn(7, 8)
    shards = [distribute_tensor(each, mesh["data"], [Shard(0)]).requires_grad_() for each in (x, y)]
    loss = distributed.clip(*shards)
    loss.backward()
    whole = x.clone().requires_grad_()
    truth = co.clip(whole, y)
    truth.backward()
    value = loss.detach().clone()
    dist.all_reduce(value, group=mesh["data"].get_group())
    torch.testing.assert_close(value / 2, truth.detach())
    torch.testing.assert_close(shards[0].grad.full_tensor() / 2, whole.grad)
    here = [each.to_local().detach() for each in shards]
    assert torch.equal(distributed.clip(*here, group=mesh["data"]), loss.detach())
    with pytest.raises(ValueError, match="DeviceMesh of one dimension, got 2 dimensions"):
        distributed.clip(*here, group=mesh)
    whole_tensors = [distribute_tensor(each, mesh["data"], [Replicate()]) for each in (x, y)]
    with pytest.raises(ValueError, match=r"must be Shard\(0\) in one dimension"):
        distributed.clip(*whole_tensors)


def test_meshes():
    ranks(4).run(meshes)


def conventions(rank, size):
    """Means and sums, averaged or summed afterwards; without a check; modules."""
    x, y = torch.randn(3 * size, 8), torch.randn(3 * size, 8)
    here = slice(3 * rank, 3 * rank + 3)
    for reduction in ("mean", "sum"):
        truth = co.clip(x, y, reduction=reduction)
        for average, factor in ((True, size), (False, 1)):
            share = distributed.clip(x[here], y[here], reduction=reduction, average=average, check=False)
            dist.all_reduce(share)
            torch.testing.assert_close(share / factor, truth)
    rows = distributed.clip(x[here], y[here], reduction="none")
    torch.testing.assert_close(rows, co.clip(x, y, reduction="none")[here])
    module = distributed.CLIPLoss(schedule="ring")
    assert "schedule='ring'" in repr(module)
    loss = module(x[here], y[here])
    loss.backward()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / size, co.nn.CLIPLoss()(x, y))
    assert module.logit_scale.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        low = distributed.clip(x[here], y[here], reduction="none")
        torch.testing.assert_close(low, co.clip(x, y, reduction="none")[here])


def test_conventions():
    ranks(3).run(conventions)


def winners(rank, size):
    """Maxima name rows and columns of all ranks; ties go to the first."""
    x, y = torch.randn(5 * size, 4).round(), torch.randn(5 * size, 4).round()
    here = slice(5 * rank, 5 * rank + 5)
    truth = co.similarity_reduce(x, y, reduce="max", dim=(0, 1))
    for schedule in ("gather", "ring"):
        found = distributed.similarity_reduce(x[here], y[here], reduce="max", dim=(0, 1), schedule=schedule)
        for name in ("rows", "cols", "row_argmax", "col_argmax"):
            assert torch.equal(getattr(found, name), getattr(truth, name)[here]), (schedule, name)


def test_winners():
    ranks(3).run(winners)


def biased(rank, size):
    """Folds with biases of their own: one for all rows, and those of this rank's rows."""
    x, y, bias = torch.randn(5 * size, 4), torch.randn(5 * size, 4), torch.randn(5 * size)
    here = slice(5 * rank, 5 * rank + 5)

    def folds(own):
        return co.Fold("sum_relu", bias=0.7, negate=True), co.Fold("logsumexp", bias=own), "logsumexp"

    truth = co.similarity_reduce(x, y, reduce=folds(bias), dim=(0, 1))
    for schedule in ("gather", "ring"):
        given = {"reduce": folds(bias[here]), "dim": (0, 1), "schedule": schedule}
        found = distributed.similarity_reduce(x[here], y[here], **given)
        for name in ("rows", "cols"):
            for one, other in zip(getattr(found, name), getattr(truth, name), strict=True):
                torch.testing.assert_close(one, other[here])


def test_biases_of_folds():
    ranks(3).run(biased)


def dies(rank, size, schedule):
    """Rank 1 ends in the middle of a step; what the others are told."""
    x, y = (each.requires_grad_() for each in _pair())
    distributed.clip(x, y, schedule=schedule).backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.clip(x, y, schedule=schedule).backward()


def raises(rank, size):
    """Rank 1 raises between forward and backward; what the others are told, and when."""
    x, y = (each.requires_grad_() for each in _pair())
    loss = distributed.clip(x, y, schedule="ring")
    if rank == 1:
        raise KeyError("batch")
    loss.backward()


def test_a_rank_that_raises_ends_the_others_with_the_timeout():
    group = Ranks(2, timeout=datetime.timedelta(seconds=3))
    try:
        (first, _), (second, _) = group.outcomes(raises)
    finally:
        group.close()
    assert "KeyError" in second
    assert "does not take part" in first and "rank 0" in first


@pytest.mark.parametrize("schedule", ["gather", "ring"])
def test_a_killed_rank_ends_the_others(schedule):
    group = Ranks(3, timeout=datetime.timedelta(seconds=30))
    try:
        (first, _), (second, _), (third, _) = group.outcomes(dies, schedule)
    finally:
        group.close()
    assert second == "ended"
    assert all("one of them has ended, raised an error or does not take part" in text for text in (first, third))


def balanced(rank, size):
    """Sinkhorn over the rows of all ranks, of which the last has none."""
    from contrastive_ops.losses import RunningCentre, dino
    from contrastive_ops.ops import sinkhorn

    generator, world = torch.Generator().manual_seed(1), torch.distributed.group.WORLD
    rows, prototypes = torch.randn(9, 5, generator=generator), torch.randn(4, 5, generator=generator)
    own, scores = (slice(0, 6), slice(6, 9), slice(9, 9))[rank], rows @ prototypes.T
    for epsilon in (0.5, 0.004):  # the second one is balanced by logarithms
        together = sinkhorn(scores, epsilon=epsilon)[own]
        torch.testing.assert_close(sinkhorn(scores[own], epsilon=epsilon, group=world), together, rtol=1e-3, atol=1e-3)
    options = {"assignment": "sinkhorn", "reduction": "none", "teacher_temperature": 0.3}
    together = dino(rows, prototypes, rows.flip(1), **options)[own]
    torch.testing.assert_close(dino(rows[own], prototypes, rows.flip(1)[own], group=world, **options), together)
    alone, of_all = RunningCentre(4), RunningCentre(4)
    alone(rows, prototypes)
    of_all(rows[own], prototypes, group=world)
    torch.testing.assert_close(of_all.centre, alone.centre)
    scores[7] = -torch.inf
    with pytest.raises(ValueError, match="must not be -inf in all of a row"):
        sinkhorn(scores[own], group=world)


def test_sinkhorn_of_all_ranks():
    ranks(3).run(balanced)
