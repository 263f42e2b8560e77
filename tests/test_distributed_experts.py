"""Experts over ranks are the experts of one process that has the tokens of all ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_cases import SIZES
from ranks import ranks
from torch import nn

from contrastive_ops import distributed, moe, route
from contrastive_ops.ops import Capacity, Gating, RouterLoss

LOSSES = ["importance", "load", "switch", "z", RouterLoss("local_entropy", pooled=True), "global_entropy"]
CASES = {
    "free": (1, {}, {}),
    "two": (2, {"losses": ["switch"]}, {"gated": True, "bias": True, "shared": 1}),
    "tight": (2, {"capacity": 0.7, "losses": ["importance", "z"]}, {"bias": True}),
    "turns": (2, {"capacity": 3, "priority": "position"}, {}),
    "groups": (2, {"capacity": Capacity(factor=0.6, group_size=1)}, {}),
    "empty": (1, {"capacity": 0}, {"bias": True}),
}


def _shares(rank, size, *whole):
    begin = sum(SIZES[size][:rank])
    return [each[begin : begin + SIZES[size][rank]] for each in whole]


def layers(rank, size, name):
    """Output, routing and gradients of one layer over all ranks, against those of one process."""
    k, router, options = CASES[name]
    tokens, upstream = torch.randn(sum(SIZES[size]), 8), torch.randn(sum(SIZES[size]), 8)
    torch.manual_seed(1)
    single = moe.SparseMoE(8, 12, 5, k, router=router, **options)
    torch.manual_seed(1)
    layer = moe.SparseMoE(8, 12, 5, k, router=router, group=dist.group.WORLD, **options)
    for one, spread in zip(single.parameters(), layer.parameters(), strict=True):
        assert torch.equal(spread.full_tensor() if hasattr(spread, "full_tensor") else spread, one)
    whole, part = tokens.clone().requires_grad_(), _shares(rank, size, tokens)[0].clone().requires_grad_()
    (truth, routed), (out, found) = single(whole), layer(part)
    cut = lambda each: _shares(rank, size, each)[0]  # noqa: E731
    assert torch.equal(found.experts, cut(routed.experts)) and torch.equal(found.kept, cut(routed.kept))
    torch.testing.assert_close(out, cut(truth), rtol=0, atol=1e-6)
    for metric, value in routed.metrics.items():
        torch.testing.assert_close(found.metrics[metric], value, equal_nan=True)
    for loss, value in routed.losses.items():
        torch.testing.assert_close(found.losses[loss], value)
    expected = torch.autograd.grad((truth * upstream).sum() + routed.loss, [whole, *single.parameters()])
    # The same of what ranks add up to: W times one loss.
    got = torch.autograd.grad((out * cut(upstream)).sum() + found.loss / size, [part, *layer.parameters()])
    torch.testing.assert_close(got[0], cut(expected[0]), rtol=0, atol=1e-6)
    for one, gradient in zip(expected[1:], got[1:], strict=True):
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor() * size
        elif size > 1:
            dist.all_reduce(gradient := gradient.clone())
        torch.testing.assert_close(gradient, one, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_layer_is_that_of_one_process(size):
    for name in CASES:
        ranks(size).run(layers, name)


def labelled(rank, size):
    """Noise, segments, padding and given experts belong to tokens; sums are merged before a loss is made of them."""
    total, logits = sum(SIZES[size]), torch.randn(sum(SIZES[size]), 5)
    noise, segments, valid = torch.randn(total, 5), torch.arange(total) % 3, torch.rand(total) < 0.8
    given = torch.randint(-1, 5, (total, 2))
    options = {"gating": Gating(noise_std=1.0), "losses": LOSSES, "num_segments": 4, "capacity": 1.0}
    for labels in ({"segments": segments, "valid": valid, "noise": noise}, {"allowed": given, "segments": segments}):
        for over in ("group", "rank"):
            whole, part = logits.clone().requires_grad_(), _shares(rank, size, logits)[0].clone().requires_grad_()
            mine = dict(zip(labels, _shares(rank, size, *labels.values()), strict=True))
            more = {**options, **({} if "noise" in labels else {"gating": Gating(), "losses": LOSSES[2:]})}
            truth = route(whole, 2, **{**labels, **more})
            found = distributed.route(part, 2, capacity_over=over, **{**mine, **more})
            (expected,) = torch.autograd.grad(truth.loss, whole)
            (gradient,) = torch.autograd.grad(found.loss / size, part)
            torch.testing.assert_close(found.loss, truth.loss)
            torch.testing.assert_close(gradient, _shares(rank, size, expected)[0])
            assert torch.equal(found.gates, _shares(rank, size, truth.gates)[0])
            if over == "group":
                assert torch.equal(found.kept, _shares(rank, size, truth.kept)[0])
                assert torch.equal(
                    found.metrics["success_rate"].nan_to_num(), truth.metrics["success_rate"].nan_to_num()
                )
            else:
                own = route(part, 2, **{**mine, **more})
                assert torch.equal(found.slots, own.slots) and torch.equal(found.offsets, own.offsets)


def test_labels_and_losses_of_all_ranks():
    ranks(3).run(labelled)


def checkpoints(rank, size, folder):
    """A state of four ranks loads on two, and that of one process on four: each rank takes its part."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    single = moe.SparseMoE(4, 6, 6, gated=True, bias=True)
    four = moe.SparseMoE(4, 6, 6, gated=True, bias=True, group=dist.group.WORLD)
    four.load_state_dict(single.state_dict())
    here = range(2 * rank, min(2 * rank + 2, 6))
    assert torch.equal(four.experts.down_proj.to_local(), single.experts.down_proj[here.start : here.stop])
    each = {f"{e}.{name}.weight": torch.randn(shape) for e in here for name, shape in SHAPES.items()}
    plain = moe.Experts(4, 6, 6, gated=True, group=dist.group.WORLD)  # files with the experts of this rank alone
    plain.load_state_dict(each)
    for e in here:
        assert torch.equal(plain.down_proj.to_local()[e - here.start], each[f"{e}.w2.weight"])
    dcp.save(four.state_dict(), checkpoint_id=folder)
    two = moe.SparseMoE(4, 6, 6, gated=True, bias=True, group=mesh["expert"])
    state = two.state_dict()
    dcp.load(state, checkpoint_id=folder)
    two.load_state_dict(state)
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    assert all(torch.equal(whole[name], value) for name, value in single.state_dict().items())
    assert two.experts.down_proj.to_local().shape[0] == 3
    assert copy.deepcopy(two).experts.spread is two.experts.spread and "range(" in repr(two)


SHAPES = {"w1": (6, 4), "w3": (6, 4), "w2": (4, 6)}


def test_checkpoints(tmp_path):
    ranks(4).run(checkpoints, str(tmp_path))


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layer = moe.SparseMoE(8, 12, 5, 2, router={"capacity": 0.8, "losses": ["importance", "z"]}, **options)

    def forward(self, x):
        out, routing = self.layer(self.first(x).tanh())
        return self.last(out), routing.loss


def train(rank, size, wrap):
    """Parameters after ten steps of Adam are those of one process with all rows, also where shards differ in size."""
    batches, sizes = torch.randn(10, sum(SIZES[size]), 6), SIZES[size]
    single, model = Model(), Model(group=dist.group.WORLD)
    wrapped = WRAPPERS[wrap](model)
    for module, share in ((single, 1.0), (wrapped, size / sum(sizes))):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for batch in batches:
            x = batch if module is single else _shares(rank, size, batch)[0]
            optimizer.zero_grad()
            out, loss = module(x)
            (out.square().sum() * (1 / len(batch) if module is single else share) + 0.1 * loss).backward()
            optimizer.step()
    for (name, one), other in zip(single.named_parameters(), model.parameters(), strict=True):
        other = other.full_tensor() if hasattr(other, "full_tensor") else other
        torch.testing.assert_close(other, one, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def _ddp(model):
    names = distributed.spread_parameters(model)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))
    return nn.parallel.DistributedDataParallel(model)


def _fsdp(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, ignored_params=set(distributed.spread_parameters(model).values()))


WRAPPERS = {"ddp": _ddp, "fsdp": _fsdp}


@pytest.mark.parametrize("wrap", list(WRAPPERS))
def test_training(wrap):
    ranks(3).run(train, wrap)


def refused(rank, size):
    """What one rank gets wrong is an error on all, and the group goes on."""
    layer = moe.SparseMoE(8, 4, 3, group=dist.group.WORLD)
    for call, words in (
        (lambda: layer(torch.randn(2, 7 if rank else 8)), "rank 1 raised|cannot be multiplied"),
        (lambda: layer(torch.randn(2, 8, dtype=torch.float64 if rank else torch.float32)), "float64"),
        (lambda: layer(torch.randn(2, 8), segments=torch.zeros(2, dtype=torch.int64)), "num_segments must be given"),
        (lambda: distributed.route(torch.randn(4, 3), 1 + rank), "k=2"),
        (lambda: distributed.route(torch.randn(4, 3), capacity=Capacity(limit=2, padded=True)), "must not be padded"),
        (lambda: distributed.route(torch.randn(4, 3), capacity_over="world"), "'group', 'rank'"),
    ):
        with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError), match=words):
            call()
        dist.all_reduce(torch.ones(()))


def test_what_one_rank_refuses_all_refuse():
    ranks(2).run(refused)


def test_experts_of_one_process():
    with pytest.raises(ValueError, match="group must be None where there is no process group"):
        moe.SparseMoE(8, 4, 3, group=object())
    with pytest.raises(TypeError, match="ExpertChoice: group must not be given"):
        moe.ExpertChoice(8, 4, 3, group=object())
    logits = torch.randn(6, 3)
    assert torch.equal(distributed.route(logits, 2, capacity=1.0).slots, route(logits, 2, capacity=1.0).slots)
