"""State keeps its digits whatever a model is cast to, belongs to one process, and survives a batch that is not finite.

The modules with state are the subclasses of `core.state.State`, found by importing every module; a tensor
that is registered as a buffer anywhere must be one that such a class names.
"""

import contextlib
import copy
import importlib
import pathlib
import pickle
import pkgutil
import re

import pytest
import torch
from torch import nn

import contrastive_ops
from contrastive_ops import moe
from contrastive_ops.core.state import State
from contrastive_ops.losses import (
    RunningCentre,
    RunningCovariance,
    RunningDenominator,
    RunningPrototypes,
    UnigramSampler,
    sog_clr,
)
from contrastive_ops.mining import MemoryBank
from contrastive_ops.moe.router import balanced_bias

MAKE = {
    "MemoryBank": lambda: MemoryBank(6, 4),
    "Router": lambda: moe.Router(4, 3, balance="sign"),
    "RunningCentre": lambda: RunningCentre(4),
    "RunningCovariance": lambda: RunningCovariance(4),
    "RunningDenominator": lambda: RunningDenominator(5),
    "RunningPrototypes": lambda: RunningPrototypes(3, 4),
    "UnigramSampler": lambda: UnigramSampler(torch.tensor([5, 3, 2])),
}
every = pytest.mark.parametrize("name", MAKE)


def state_of(module):
    return {name: getattr(module, name) for name in {*module.digits, *module.own}}


def filled(name):
    """A module whose numbers no 16-bit type has."""
    module = MAKE[name]()
    for tensor in state_of(module).values():
        numbers = torch.arange(tensor.numel()).view(tensor.shape)
        tensor.copy_(70_001 + numbers if not tensor.is_floating_point() else 1 + 1e-3 * (1 + numbers))
    if isinstance(module, MemoryBank):  # counters that such a bank can have
        module.pointer.fill_(3)
        module.filled.fill_(5)
        module.step.fill_(80_001)
    return module


def packages():
    for each in pkgutil.walk_packages(contrastive_ops.__path__, "contrastive_ops."):
        if ".kernels" not in each.name and not each.name.endswith("__main__"):
            yield each.name


def test_all_state_is_known():
    for name in packages():
        with contextlib.suppress(ImportError) if ".integrations." in name else contextlib.nullcontext():
            importlib.import_module(name)
    found, todo = set(), [State]
    while todo:
        todo.extend(each for each in todo.pop().__subclasses__() if each.__module__.startswith("contrastive_ops"))
        found |= {each.__name__ for each in todo}
    assert found == set(MAKE)
    buffers = {name for make in MAKE.values() for name, _ in make().named_buffers()}
    assert buffers == {"expert_bias"}
    root = pathlib.Path(contrastive_ops.__file__).parent
    registered = {
        match for path in root.rglob("*.py") for match in re.findall(r"register_buffer\(\s*(.+?),", path.read_text())
    }
    assert registered == {'"expert_bias"'}


# ---- Digits --------------------------------------------------------------------------------------------------------


def cast_buffers(module):
    """As FSDP's mixed precision does: behind the module's back."""
    for buffer in module.buffers():
        buffer.data = buffer.data.to(torch.bfloat16)
    return module


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to("cpu", torch.float16),
    "to and back": lambda module: module.to(torch.bfloat16).to(torch.float32),
    "type": lambda module: module.type(torch.float16),
    "inside of a model": lambda module: nn.Sequential(nn.Linear(2, 2), module).half()[1],
    "FSDP": cast_buffers,
}


@every
@pytest.mark.parametrize("cast", CASTS)
def test_casts_keep_digits(name, cast):
    module = filled(name)
    before = {key: tensor.clone() for key, tensor in state_of(module).items()}
    after = state_of(CASTS[cast](module))
    for key in module.digits:
        if (cast, key) == ("FSDP", "expert_bias"):
            continue  # a buffer: what later steps add has its digits, which the next test asks for
        assert torch.equal(after[key].to(before[key].dtype), before[key]), key
        assert after[key].dtype in (before[key].dtype, torch.float64), key


@every
def test_default_dtype_narrows_nothing(name):
    expected = {key: tensor.dtype for key, tensor in state_of(MAKE[name]()).items()}
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {key: tensor.dtype for key, tensor in state_of(MAKE[name]()).items()} == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rule", ["sign", "zscore"])
@pytest.mark.parametrize("cast", CASTS)
def test_balance_goes_on_after_a_cast(cast, rule):
    routers = [moe.Router(4, 4, balance=rule, balance_rate=1e-3) for _ in range(2)]
    routers[1] = CASTS[cast](routers[1])
    for _ in range(1000):
        for router in routers:
            router.update_bias(torch.tensor([100, 0, 0, 0]))
    torch.testing.assert_close(*(router.expert_bias.double() for router in routers), rtol=1e-4, atol=1e-4)
    assert routers[0].expert_bias[0] < -0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float32])
def test_counts_are_not_rounded_to_the_dtype_of_a_bias(dtype, kind):
    bias = torch.tensor([0.5, -0.25, 0.0, 0.0], dtype=dtype)
    for counts in ([10_010, 10_000, 9_990, 10_000], [70_000, 10, 10, 10], [2**24 + 1, 2**24 - 1, 2**24, 2**24]):
        wide = torch.tensor(counts, dtype=kind).double()
        error = wide.mean() - wide
        for rule, step in (("sign", error.sign()), ("zscore", error / wide.std(correction=0))):
            found = balanced_bias(bias, torch.tensor(counts, dtype=kind), 0.125, rule)
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            if kind != torch.float32 or max(counts) < 2**24:
                torch.testing.assert_close(found.double(), bias.double() + 0.125 * step, rtol=1e-6, atol=1e-6)
    assert torch.equal(balanced_bias(bias, torch.full((2, 4), 3), 1.0, "zscore"), bias.to(found.dtype))


# ---- Saved, copied, moved ------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(name, assign):
    module, other = filled(name), nn.ModuleDict({"a": MAKE[name]()})
    saved = nn.ModuleDict({"a": module}).state_dict()
    assert {key.removeprefix("a.") for key in saved} >= set(state_of(module))
    other.load_state_dict({key: value.clone() for key, value in saved.items()}, assign=assign)
    for key, tensor in state_of(module).items():
        assert torch.equal(getattr(other["a"], key), tensor), key
    for key in state_of(module):
        with pytest.raises(RuntimeError, match=f'Missing key.*"a.{key}"'):
            other.load_state_dict({k: v for k, v in saved.items() if k != f"a.{key}"})
        with pytest.raises(RuntimeError, match=f"size mismatch for a.{key}"):
            other.load_state_dict({**saved, f"a.{key}": saved[f"a.{key}"].new_zeros(1, 2, 3)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**saved, "a.unknown": torch.zeros(1)})
    assert not other.load_state_dict({}, strict=False).unexpected_keys


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_independent(name, copied):
    module = filled(name)
    other = copied(module)
    for key, tensor in state_of(module).items():
        twin = getattr(other, key)
        assert torch.equal(twin, tensor) and twin.data_ptr() != tensor.data_ptr()


@every
def test_meta_and_back(name):
    module = MAKE[name]().to("meta")
    assert {tensor.device.type for tensor in state_of(module).values()} == {"meta"}
    module.to_empty(device="cpu")
    assert {tensor.device.type for tensor in state_of(module).values()} == {"cpu"}
    if name != "UnigramSampler":  # made of counts, which are gone
        getattr(module, "reset_parameters" if name == "Router" else "reset")()
        for key, tensor in state_of(MAKE[name]()).items():
            assert torch.equal(getattr(module, key), tensor), key


# ---- One bad batch -------------------------------------------------------------------------------------------------


def covariance(module, value):
    x = torch.randn(6, 4)
    x[2, 1] = value
    return module(x)


def denominator(module, value):
    return module(torch.tensor([0, 3, 3]), torch.tensor([[0.0, 1.0, value], [value, value, value]]))


def bank(module, value):
    rows = torch.randn(3, 4)
    rows[:, 2] = value
    return module.enqueue(rows)


def router(module, value):
    return module.update_bias(torch.tensor([1.0, value, 2.0]))


def centre(module, value):
    module(torch.full((3, 2), value), torch.randn(4, 2))


def prototypes(module, value):
    return module(torch.full((5, 4), value), torch.tensor([0, 1, 0, 2, -1]))


BATCHES = {
    "RunningCentre": centre,
    "RunningCovariance": covariance,
    "RunningDenominator": denominator,
    "RunningPrototypes": prototypes,
    "MemoryBank": bank,
    "Router": router,
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [name for name in MAKE if name != "UnigramSampler"])  # which nothing updates
def test_a_batch_that_is_not_finite_is_not_kept(name, value):
    module, truth = MAKE[name](), MAKE[name]()
    for number in range(3):
        torch.manual_seed(number)
        BATCHES[name](module, float(number))
        torch.manual_seed(number)
        BATCHES[name](truth, float(number))
        if number == 1:
            before = {key: tensor.clone() for key, tensor in state_of(module).items()}
            BATCHES[name](module, value)
            if name == "RunningDenominator":  # of the finite numbers in it the samples learn
                assert module.log_u.isfinite().sum() == before["log_u"].isfinite().sum()
                assert torch.equal(module.log_u[1], before["log_u"][1])
                return
    for key, tensor in state_of(truth).items():
        if key not in ("step", "born"):
            assert torch.equal(getattr(module, key), tensor), key


def test_a_sample_that_is_met_twice_keeps_what_is_finite():
    state = RunningDenominator(2, gamma=0.5)
    state(torch.tensor([0]), torch.full((2, 1), 9.0))
    state(torch.tensor([0, 0]), torch.tensor([[0.0, torch.nan], [torch.inf, 1.0]]))
    expected = torch.logaddexp(torch.tensor(9.0), torch.tensor([0.0, 1.0])) - torch.tensor(2.0).log()
    torch.testing.assert_close(state.log_u[:, 0], expected)


# ---- Processes -----------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.denominators, self.covariance = RunningDenominator(8), RunningCovariance(4, momentum=0.5)
        self.bank, self.router = MemoryBank(6, 4), moe.Router(4, 3, balance="sign")

    def forward(self, x, index):
        z = self.linear(x)
        loss = sog_clr(z, x, index, self.denominators) + self.covariance(z).sum() + self.router(z).gates.sum()
        self.bank.enqueue(z, index)
        return loss


def _process(rank, path, results):
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = Everything()
    parallel = nn.parallel.DistributedDataParallel(model)
    if rank == 1:
        with torch.no_grad():
            model.router.expert_bias.fill_(5.0)  # buffers are those of rank 0
    for step in range(3):
        torch.manual_seed(10 * rank + step)
        parallel(torch.randn(4, 4), torch.arange(4) + 4 * rank).backward()
    torch.save(model.state_dict(), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_each_process_has_its_own_state(tmp_path):
    torch.multiprocessing.spawn(_process, args=(tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for seen, saved in ((slice(0, 4), first), (slice(4, 8), second)):
        finite = saved["denominators.log_u"].isfinite()
        assert finite[:, seen].all() and finite.sum() == 8
        assert torch.equal(saved["bank.ids"].sort().values.unique(), torch.arange(8)[seen])
    assert not torch.equal(first["covariance.covariance"], second["covariance.covariance"])
    assert not second["router.expert_bias"].any()
