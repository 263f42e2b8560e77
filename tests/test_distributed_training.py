"""Twenty steps on many processes leave the parameters where one process with all rows leaves them."""

import functools

import pytest
import torch
from distributed_cases import SIZES
from ranks import ranks
from torch import nn

import contrastive_ops as co
from contrastive_ops import distributed


class Towers(nn.Module):
    """Two encoders and the loss with its temperature."""

    def __init__(self, loss):
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2))
        self.loss = loss

    def forward(self, image, text):
        return self.loss(self.image(image), self.text(text))


def trained(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for image, text in batches:
        optimizer.zero_grad()
        model(image, text).backward()
        optimizer.step()


def train(rank, size, wrap, loss):
    """The parameters of a wrapped model after its steps against those of one process."""
    sizes, steps = SIZES[size], 20
    batches = torch.randn(steps, 2, sum(sizes), 6)
    begin = sum(sizes[:rank])
    shards = batches[:, :, begin : begin + sizes[rank]]
    single = Towers(getattr(co.nn, loss)(learnable=True))
    model = Towers(getattr(distributed, loss)(learnable=True))
    model.load_state_dict(single.state_dict())
    trained(single, batches)
    trained(WRAPPERS[wrap](model), shards)
    for name, found in model.named_parameters():
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(found, single.get_parameter(name), rtol=1e-4, atol=1e-5)


def _ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def _fsdp(model):
    from torch.distributed.fsdp import fully_shard

    for part in (model.image, model.text, model):
        fully_shard(part)
    return model


WRAPPERS = {"ddp": _ddp, "fsdp": _fsdp}


@pytest.mark.parametrize(
    ("size", "wrap", "loss"),
    [(2, "ddp", "CLIPLoss"), (3, "ddp", "SigLIPLoss"), (3, "ddp", "NTXentLoss"), (3, "fsdp", "CLIPLoss")],
)
def test_parameters_are_those_of_one_process(size, wrap, loss):
    ranks(size).run(train, wrap, loss)


def checkpoint_and_accumulate(rank, size):
    """Activation checkpointing around the loss, and two batches added up, change no bit of gradients."""
    from torch.utils.checkpoint import checkpoint

    x, y = torch.randn(4 + rank, 8, requires_grad=True), torch.randn(4 + rank, 8, requires_grad=True)
    for schedule in ("gather", "ring"):
        plain = torch.autograd.grad(distributed.clip(x, y, schedule=schedule), (x, y))
        for reentrant in (True, False):
            x.grad = y.grad = None
            function = functools.partial(distributed.clip, schedule=schedule)
            checkpoint(function, x, y, use_reentrant=reentrant).backward()
            assert torch.equal(x.grad, plain[0]) and torch.equal(y.grad, plain[1])
        x.grad = y.grad = None
        for _ in range(2):
            distributed.clip(x, y, schedule=schedule).backward()
        assert torch.equal(x.grad, 2 * plain[0])


def test_checkpointing_and_accumulation():
    ranks(3).run(checkpoint_and_accumulate)


def compiled(rank, size):
    """Without the check "gather" is one graph; with it, and as a ring, a model is compiled around the exchange."""
    import torch._dynamo

    x, y = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    layer = nn.Linear(8, 8)

    def model(x, y, **options):
        return distributed.clip(layer(x).tanh(), layer(y).tanh(), **options)

    for options, whole in (({"check": False}, True), ({"schedule": "ring"}, False)):
        torch._dynamo.reset()
        function = functools.partial(model, **options)
        found = torch.compile(function, backend="aot_eager", fullgraph=whole)(x, y)
        truth = function(x, y)
        torch.testing.assert_close(found, truth)
        inputs = (x, y, *layer.parameters())
        for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs), strict=True):
            torch.testing.assert_close(one, other)


def test_compiled():
    ranks(2).run(compiled)


def frozen_on_some(rank, size):
    """A rank whose rows need no gradient, such as an empty shard, takes part in backward."""
    rows = (4, 0, 3)[rank]
    x, y = (torch.randn(rows, 8, requires_grad=rows > 0) for _ in range(2))
    for schedule in ("gather", "ring"):
        loss = distributed.clip(x, y, schedule=schedule)
        loss.backward()
        assert rows == 0 or (x.grad.isfinite().all() and y.grad.abs().sum() > 0)


def test_ranks_without_gradients_take_part():
    ranks(3).run(frozen_on_some)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", ["gather", "ring"])
def test_low_precision(dtype, schedule):
    """Not further from the truth than twice the single process in that precision, and its last place."""
    for found, alone in ranks(3).run(low_precision, dtype, schedule):
        assert all(error <= 2 * other + 4e-3 for error, other in zip(found, alone, strict=True)), (found, alone)


def low_precision(rank, size, dtype, schedule):
    rows, centres = 8, torch.randn(6, 16).repeat(4, 1)  # partners and rows close to them are on different ranks
    x, y = ((centres + 0.05 * torch.randn(24, 16)).to(dtype) for _ in range(2))
    here = slice(rows * rank, rows * (rank + 1))

    def gradients(function, x, y, **options):
        leaves = [each.clone().requires_grad_() for each in (x, y)]
        return torch.autograd.grad(function(*leaves, scale=30.0, **options), leaves)

    truth = gradients(co.clip, x.double(), y.double())
    alone = gradients(co.clip, x, y)
    found = gradients(distributed.clip, x[here], y[here], schedule=schedule)
    largest = [each.abs().max() for each in truth]

    def errors(values, scale):
        return [
            float((v / scale - t[here]).abs().max() / top) for v, t, top in zip(values, truth, largest, strict=True)
        ]

    return errors(found, size), errors([each[here] for each in alone], 1)
