"""What programs do around a loss, asked of the whole registry: checkpointing, scaling, defaults, export, workers."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

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


def distances_of_a_batch(rows):
    x = torch.stack(rows)
    return x, LOSSES["clip"].function(x, x), torch.get_num_threads()


def test_workers_of_a_data_loader():
    """Forked after threads of this process have run."""
    data = list(torch.randn(8, 6))
    here = LOSSES["clip"].function(torch.stack(data[:4]), torch.stack(data[:4]))  # threads are warm
    loader = DataLoader(data, 4, num_workers=1, collate_fn=distances_of_a_batch, multiprocessing_context="fork")
    found = list(loader)
    assert len(found) == 2 and torch.equal(found[0][1], here)
