"""What programs do around a loss, asked of the whole registry: checkpointing, scaling, defaults, export, workers."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from contrastive_ops.mining import csls, first_of_each, mine_hard_negatives, search
from contrastive_ops.moe import ExpertChoice, Experts, Router, SoftMoE, SparseMoE
from contrastive_ops.ops import similarity_topk
from contrastive_ops.testing import LOSSES, leaves

ONE_EACH = [name for name, case in LOSSES.items() if name == case.function.__name__]
every = pytest.mark.parametrize("name", ONE_EACH)
both_kinds = pytest.mark.parametrize("use_reentrant", [False, True])


def step(name, run=lambda loss, inputs: loss(inputs), dtype=torch.float32):
    """The value of a loss and the gradients of its inputs."""
    case = LOSSES[name]
    inputs = case.inputs(10, 6, dtype)
    value = run(case, inputs)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves(inputs))]


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def recomputed(use_reentrant):
    def run(case, inputs):
        names = [name for name, each in inputs.items() if each.requires_grad]

        def again(*tensors):
            return case({**inputs, **dict(zip(names, tensors, strict=True))})

        return checkpoint(again, *(inputs[name] for name in names), use_reentrant=use_reentrant)

    return run


@every
@both_kinds
def test_activation_checkpointing(name, use_reentrant):
    assert_same(step(name, recomputed(use_reentrant)), step(name))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_step_under_autocast(name, dtype):
    """With a scale of a power of 2 no digit changes, and nothing overflows."""

    def scaled(case, inputs):
        with torch.autocast("cpu", dtype):
            return torch.amp.GradScaler("cpu", init_scale=2.0**10).scale(case(inputs))

    def plain(case, inputs):
        with torch.autocast("cpu", dtype):
            return case(inputs)

    found, expected = step(name, scaled), step(name, plain)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine / 2.0**10, theirs, rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_the_program_change_nothing(name, dtype):
    expected = step(name)

    def run(case, inputs):
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                value = case(inputs)
            value.backward(retain_graph=True)
            for leaf in leaves(inputs):
                leaf.grad = None
            return value
        finally:
            torch.set_default_dtype(torch.float32)

    assert_same(step(name, run), expected)


class Loss(torch.nn.Module):
    def __init__(self, name, fixed):
        super().__init__()
        self.name, self.fixed = name, fixed

    def forward(self, moving):
        return LOSSES[self.name]({**self.fixed, **moving})


# The strict way traces the code of a loss, which takes a second; these have most of what losses share.
STRICT = ("clip", "sup_con", "batch_hard_triplet", "linear_cross_entropy")


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in ONE_EACH), *((name, True) for name in STRICT)]
)
def test_export(name, strict):
    case = LOSSES[name]
    inputs = {key: value.detach() for key, value in case.inputs(10, 6).items()}
    module = Loss(name, {})
    program = torch.export.export(module, (inputs,), strict=strict)
    other = {key: value.detach() for key, value in case.inputs(10, 6, seed=1).items()}
    torch.testing.assert_close(program.module()(other), module(other), rtol=1e-6, atol=1e-6)


# ---- Layers and miners -----------------------------------------------------------------------------------------------

LAYERS = {
    "Router": (Router(6, 4), lambda layer, x: layer(x).gates),
    "Experts": (Experts(6, 8, 3, bias=True), lambda layer, x: layer(x, torch.tensor([0, 2, 6, 10]))),
    "SparseMoE": (SparseMoE(6, 8, 4, 2), lambda layer, x: layer(x)[0]),
    "ExpertChoice": (ExpertChoice(6, 8, 4), lambda layer, x: layer(x)[0]),
    "SoftMoE": (SoftMoE(6, 8, 4), lambda layer, x: layer(x[None])),
}
MINERS = {
    "similarity_topk": lambda x, y: similarity_topk(x, y, 3),
    "search": lambda x, y: search(x, y, 3),
    "mine_hard_negatives": lambda x, y: mine_hard_negatives(x, y, torch.arange(len(x), device="cpu"), 2),
    "csls": lambda x, y: csls(x, y, 3),
    "first_of_each": lambda x, y: first_of_each((x[:, :4] > 0).long()),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_miner = pytest.mark.parametrize("name", MINERS)


def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(10, 6, generator=generator), torch.randn(20, 6, generator=generator)


def tensors_of(value):
    return [each for each in torch.utils._pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]


def layer_step(name, wrap=lambda run, x: run(x), factor=1.0):
    """The output of a layer, and the gradients of its input and its parameters."""
    layer, run = LAYERS[name]
    x = rows()[0].requires_grad_()
    layer.zero_grad()
    out = wrap(lambda x: run(layer, x), x)
    (out.float().square().sum() * factor).backward()
    return [out.detach(), x.grad, *(each.grad for each in layer.parameters() if each.grad is not None)]


@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_step_of_a_layer_under_autocast(name, dtype):
    def autocast(run, x):
        with torch.autocast("cpu", dtype):
            return run(x)

    scale = torch.amp.GradScaler("cpu", init_scale=2.0**4).scale(torch.ones(()))
    found, expected = layer_step(name, autocast, scale), layer_step(name, autocast)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine / 2.0**4, theirs, rtol=1e-2, atol=1e-3)


@every_layer
@both_kinds
def test_activation_checkpointing_of_a_layer(name, use_reentrant):
    def again(run, x):
        return checkpoint(run, x, use_reentrant=use_reentrant)

    assert_same(layer_step(name, again), layer_step(name))


def under_other_defaults(run, *arguments):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            return run(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)


@every_layer
def test_defaults_change_no_layer(name):
    if name == "Experts":
        pytest.skip("its offsets are made by the test itself")
    assert_same(layer_step(name, under_other_defaults), layer_step(name))


@every_miner
def test_defaults_change_no_miner(name):
    assert_same(tensors_of(under_other_defaults(MINERS[name], *rows())), tensors_of(MINERS[name](*rows())))


def everything(_):
    """What each loss, layer and miner finds, one after the other."""
    found = {name: [LOSSES[name](LOSSES[name].inputs(10, 6)).detach()] for name in ONE_EACH}
    found |= {name: [run(layer, rows()[0]).detach()] for name, (layer, run) in LAYERS.items()}
    return found | {name: tensors_of(run(*rows())) for name, run in MINERS.items()}


def test_workers_of_a_data_loader():
    """Forked after threads of this process have run."""
    here = everything(None)  # threads are warm
    loader = DataLoader([0, 1], 1, num_workers=1, collate_fn=everything, multiprocessing_context="fork")
    for there in loader:
        assert list(there) == list(here)
        for name, found in there.items():
            assert_same(found, here[name])
