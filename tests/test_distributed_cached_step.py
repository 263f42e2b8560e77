"""A step in chunks is the step of the whole batch: gradients, random numbers, DDP, FSDP2 and GradScaler."""

import copy
import functools

import pytest
import torch
from distributed_cases import SIZES
from ranks import ranks
from torch import nn

import contrastive_ops as co
from contrastive_ops import distributed


def tower():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 8))


def whole_step(encoders, batches, loss, chunk):
    """The same with the graph of all chunks kept."""
    embeddings = [torch.cat([f(c) for c in b.split(chunk)]) for f, b in zip(encoders, batches, strict=True)]
    value = loss(*embeddings)
    value.backward()
    return value.detach()


def both(encoders, batches, loss, chunk, cached=None):
    """(value, gradients) of the whole step, and of that in chunks, from the same random numbers."""
    other = cached or copy.deepcopy(encoders)
    found = []
    for step, modules in ((whole_step, encoders), (distributed.cached_step, other)):
        torch.manual_seed(3)
        value = step(modules, batches, loss, chunk=chunk)
        drawn = torch.rand(())
        gradients = [p.grad for module in modules for p in module.parameters()]
        found.append((value, drawn, gradients))
    return found


def check_same(found):
    (value, drawn, gradients), (cached, drawn_cached, cached_gradients) = found
    assert torch.equal(value, cached) and torch.equal(drawn, drawn_cached)
    for one, other in zip(gradients, cached_gradients, strict=True):
        other = other.full_tensor() if hasattr(other, "full_tensor") else other
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_towers(chunk):
    batches = (torch.randn(10, 6), torch.randn(10, 6))
    check_same(both((tower(), tower()), batches, functools.partial(co.clip, scale=5.0), chunk))


class Joint(nn.Module):
    """One model of both towers, which takes a dict and returns both embeddings."""

    def __init__(self):
        super().__init__()
        self.image, self.text = tower(), tower()

    def forward(self, batch):
        return self.image(batch["image"]), self.text(batch["text"])


def test_one_encoder_of_a_structure():
    model, (image, text) = Joint().double(), torch.randn(2, 9, 6, dtype=torch.float64)
    batch = {"image": image, "text": text, "name": "pairs"}
    whole = copy.deepcopy(model)
    value = distributed.cached_step(model.eval(), batch, co.clip, chunk=4)
    truth = co.clip(*whole.eval()(batch))
    truth.backward()
    torch.testing.assert_close(value, truth.detach())
    for one, other in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-7)


def test_scaler():
    plain, scaled = tower().eval(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch, other = torch.randn(6, 6), copy.deepcopy(plain)
    loss = functools.partial(co.info_nce, key=torch.randn(6, 8))
    distributed.cached_step(plain, batch, loss, chunk=4)
    distributed.cached_step(other, batch, loss, chunk=4, scaler=scaled)
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, 1024 * one.grad)


def test_errors():
    with pytest.raises(ValueError, match="batches must be 2, one for each encoder, got 1"):
        distributed.cached_step((tower(), tower()), (torch.ones(2, 6),), co.clip, chunk=1)
    with pytest.raises(ValueError, match="same number of rows, got \\(2, 6\\), \\(3, 6\\)"):
        distributed.cached_step(tower(), {"a": torch.ones(2, 6), "b": torch.ones(3, 6)}, co.clip, chunk=1)
    with pytest.raises(TypeError, match="encoders must return tensors with rows, got 'x'"):
        distributed.cached_step(lambda part: "x", torch.ones(2, 6), co.clip, chunk=1)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        distributed.cached_step(tower(), torch.ones(2, 6), co.clip, chunk=0)


def on_ranks(rank, size, wrap):
    """The loss of all ranks; gradients that DDP and FSDP2 average are those of whole steps, averaged."""
    encoders = (tower().eval(), tower().eval())
    rows = SIZES[size][rank] if wrap == "ddp" else 7
    torch.manual_seed(rank)
    batches = (torch.randn(rows, 6), torch.randn(rows, 6))
    cached = copy.deepcopy(encoders)
    if wrap == "ddp":
        cached = tuple(nn.parallel.DistributedDataParallel(each) for each in cached)
        encoders = tuple(nn.parallel.DistributedDataParallel(each) for each in encoders)
    else:
        from torch.distributed.fsdp import fully_shard

        cached = tuple(fully_shard(each) for each in cached)
        encoders = tuple(nn.parallel.DistributedDataParallel(each) for each in encoders)
    (value, _, gradients), (other, _, found) = both(encoders, batches, distributed.clip, 3, cached)
    torch.testing.assert_close(other, value)
    for one, two in zip(gradients, found, strict=True):
        two = two.full_tensor() if hasattr(two, "full_tensor") else two
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_on_ranks(wrap):
    ranks(3).run(on_ranks, wrap)
