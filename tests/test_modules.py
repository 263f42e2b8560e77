"""Every module of the package: FSDP, the meta device, checkpoints of scalars, what a call or a configuration gives.

Modules are found by a search over all subclasses of `torch.nn.Module` that the package defines. One that needs
arguments is made by `ARGUMENTS`; one that is not made there, and cannot be made without arguments, fails the tests.
"""

import copy
import math
import pickle

import pytest
import torch
from test_nn import IDS, OTHERS

import contrastive_ops
from contrastive_ops import distributed, nn
from contrastive_ops.losses.decorrelation import RunningCovariance
from contrastive_ops.losses.negative_sampling import UnigramSampler
from contrastive_ops.losses.prototypes import RunningPrototypes
from contrastive_ops.losses.self_distillation import RunningCentre
from contrastive_ops.mining import MemoryBank
from contrastive_ops.moe import ExpertChoice, Experts, Router, SoftMoE, SparseMoE

COUNTS = torch.tensor([5, 0, 3, 9])
ARGUMENTS = {
    nn.CosFaceLoss: ((3, 8), {}),
    nn.ArcFaceLoss: ((3, 8), {}),
    nn.SogCLRLoss: ((10,), {}),
    nn.MatryoshkaInfoNCELoss: ((), {"dims": (4, 8)}),
    nn.MatryoshkaCLIPLoss: ((), {"dims": (4, 8)}),
    nn.MatryoshkaNTXentLoss: ((), {"dims": (4, 8)}),
    nn.RunningDenominator: ((10,), {}),
    RunningCentre: ((8,), {}),
    RunningCovariance: ((8,), {}),
    RunningPrototypes: ((3, 8), {}),
    UnigramSampler: ((COUNTS,), {}),
    MemoryBank: ((16, 8), {}),
    Experts: ((8, 4, 3), {"bias": True}),
    Router: ((8, 3), {"balance": "sign"}),
    SparseMoE: ((8, 4, 3), {"gated": True, "shared": 1}),
    ExpertChoice: ((8, 4, 3), {}),
    SoftMoE: ((8, 4, 3), {}),
}
INPUTS = {module: inputs for module, inputs, _ in OTHERS} | {
    nn.SogCLRLoss: lambda a, b: (a, b, torch.arange(6)),
    nn.CosFaceLoss: lambda a, b: (a, IDS),
    nn.ArcFaceLoss: lambda a, b: (a, IDS),
    Router: lambda a, b: (a,),
    Experts: lambda a, b: (a, torch.tensor([0, 2, 4, 6])),
    SparseMoE: lambda a, b: (a,),
    ExpertChoice: lambda a, b: (a,),
    SoftMoE: lambda a, b: (a[None],),
}
# Without a process group those of `distributed` are the same.
INPUTS |= {getattr(distributed, m.__name__): inputs for m, inputs in INPUTS.items() if hasattr(distributed, m.__name__)}


def subclasses(kind):
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


def is_made(module):
    """Not what is only there to be derived from."""
    own = module.__module__.startswith("contrastive_ops.") and not module.__name__.startswith("_")
    # Those are made with models, by the constructors of other packages; tests/test_integrations*.py has them.
    own = own and not module.__module__.startswith("contrastive_ops.integrations.")
    abstract = issubclass(module, nn.Loss) and not hasattr(module, "function")
    return own and not abstract and module.__name__ not in ("State", "Scalars")


MODULES = sorted({m for m in subclasses(torch.nn.Module) if is_made(m)}, key=lambda m: (m.__name__, m.__module__))
LOSSES = [m for m in MODULES if issubclass(m, nn.Loss)]
SCALED = [m for m in LOSSES if issubclass(m, nn.ScaledLoss)]


def make(module, **more):
    positional, options = ARGUMENTS.get(module, ((), {}))
    return module(*positional, **options, **more)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_search_finds_modules_of_every_room():
    assert {nn.CLIPLoss, MemoryBank, SparseMoE, UnigramSampler, RunningCovariance} <= set(MODULES)
    assert len(LOSSES) >= 40 and contrastive_ops.nn.CLIPLoss in SCALED


@pytest.mark.parametrize("module", MODULES)
def test_meta_device_then_reset_is_a_plain_construction(module):
    more = {"learnable": True} if module in SCALED else {}
    torch.manual_seed(3)
    expected = state_of(make(module, **more))
    with torch.device("meta"):
        made = make(module, **more)
    made.to_empty(device="cpu")
    for each in made.state_dict().values():
        each.copy_(torch.full_like(each, 77))
    torch.manual_seed(3)
    # A plain construction draws the parameters of a part before those of the next.
    for part in made.modules():
        part.reset_parameters()
    got = state_of(made)
    assert list(got) == list(expected)
    drawn = {"weight", "prototypes", "slots", "gate_up_proj", "up_proj", "down_proj", "up_bias", "down_bias"}
    for name, value in expected.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype
        if name.split(".")[-1] in drawn:
            assert abs(got[name].std() - value.std()) < 0.5 * value.std() + 1e-6 and got[name].abs().max() < 10
        else:
            torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def loaded(module):
    made = make(type(module))
    made.load_state_dict(module.state_dict())
    return made


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def value_of(module):
    """What a module computes, and its state."""
    torch.manual_seed(5)
    a, b = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
    found = module(*INPUTS[type(module)](a, b)) if type(module) in INPUTS else ()
    tensors = [each for each in torch.utils._pytree.tree_leaves(found) if isinstance(each, torch.Tensor)]
    return [each.detach() for each in tensors] + list(state_of(module).values())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, loaded])
@pytest.mark.parametrize("module", MODULES)
def test_copies_compute_the_same(module, copied):
    made = make(module)
    with torch.no_grad():
        for each in made.parameters():
            each.mul_(1.25)  # not what a construction gives
    other = copied(made)
    assert other is not made and type(other) is module
    for mine, theirs in zip(value_of(other), value_of(made), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    if torch.distributed.is_initialized():
        pytest.skip("a process group is there already")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class Model(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.tower, self.part = torch.nn.Linear(8, 8), part

    def is_rows(self, t):
        return isinstance(t, torch.Tensor) and t.is_floating_point() and t.shape[-1:] == (8,)

    def forward(self, *tensors):
        out = self.part(*(self.tower(t) if self.is_rows(t) else t for t in tensors))
        out = out[0] if isinstance(out, tuple) and isinstance(out[0], torch.Tensor) else out
        return (out.gates if hasattr(out, "gates") else out).sum()


SHARDED = [m for m in MODULES if m in SCALED or list(make(m).parameters())]


@pytest.mark.parametrize("module", SHARDED)
def test_fully_shard_takes_every_module_with_parameters(module, mesh):
    from torch.distributed.fsdp import fully_shard

    part = make(module, learnable=True) if module in SCALED else make(module)
    model = fully_shard(Model(part), mesh=mesh)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    assert all(p.dim() >= 1 for p in before.values())
    a, b = torch.randn(2, 6, 8).unbind()
    inputs = INPUTS.get(module, lambda a, b: (a, b))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tensors = inputs(a, b)
    loss = model(*tensors)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.full_tensor(), before[name])}
    of_loss = {name for name in before if name.startswith("part.logit")}
    if module is nn.GE2ELoss:  # a softmax does not see a bias of all its logits
        of_loss.remove("part.logit_bias")
    assert of_loss <= moved
    assert "tower.weight" in moved or not any(model.is_rows(t) for t in tensors)


@pytest.mark.parametrize("module", [*SCALED, SoftMoE])
def test_checkpoints_with_scalars_of_other_shapes_load(module):
    make_one = (lambda: make(module)) if module is SoftMoE else lambda: make(module, learnable=True)
    fresh, state = make_one(), state_of(make_one())
    scalars = [name for name, p in fresh.named_parameters() if p.shape == (1,)]
    assert scalars
    for shape in ((), (1, 1)):
        other = {k: v.reshape(shape) + 0.5 if k in scalars else v for k, v in state.items()}
        fresh.load_state_dict(copy.deepcopy(other))
        for name in scalars:
            torch.testing.assert_close(fresh.state_dict()[name], state[name] + 0.5)


@pytest.mark.parametrize("module", [m for m in SCALED if m.owned])
def test_a_call_with_an_argument_that_the_module_learns_says_so(module):
    a, b = torch.randn(2, 6, 8).unbind()
    tensors = INPUTS.get(module, lambda a, b: (a, b))(a, b)
    loss = make(module, learnable=True)
    for key in loss.owned:
        with pytest.raises(TypeError, match=f"^{module.__name__}: {key} must not be given at a call"):
            loss(*tensors, **{key: torch.tensor(1.0)})
    with pytest.raises(TypeError, match=f"^{module.__name__}: tensors must be \\("):
        loss(*tensors, *[torch.tensor(10.0)] * 9)
    with pytest.raises(TypeError, match=f"^{module.__name__}: arguments must be among .*, got logit_scale"):
        loss(*tensors, logit_scale=1.0)


@pytest.mark.parametrize("module", SCALED)
def test_a_fixed_temperature_may_be_another_one_at_a_call(module):
    a, b = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=2).unbind()
    if module is nn.LateInteractionLoss:
        a, b = a.view(6, 2, 4), b.view(6, 2, 4)
    tensors = INPUTS.get(module, lambda a, b: (a, b))(a, b) if a.dim() == 2 else (a, b)
    loss, other = make(module, learnable=False), make(module, learnable=False, temperature=0.25)
    if isinstance(loss, nn.PrototypeLoss):
        other.prototypes = loss.prototypes
    scale = torch.full((1,), 4.0, requires_grad=True)
    expected = other(*tensors)
    torch.testing.assert_close(loss.eval()(*tensors, temperature=0.25), other.eval()(*tensors))
    got = make_like(loss)(*tensors, scale=scale)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got, scale)
    assert gradient.shape == (1,) and gradient.isfinite().all()


def make_like(loss):
    if isinstance(loss, nn.SogCLRLoss):
        loss.state.reset()
    return loss.train()


WRONG = {"temperature": "1e-2", "max_scale": [100.0], "learnable": "true", "normalize": "false", "margin": "0.1",
         "reduction": 3, "memory_budget": "1e9", "label_smoothing": True, "bias": "-10"}  # fmt: skip


def options_of(module):
    own = {"temperature", "learnable", "max_scale"} if module in SCALED else set()
    return own | ({"bias"} if issubclass(module, nn.BiasedLoss) else set()) | (set(module.known) - set(module.owned))


@pytest.mark.parametrize("module,option", [(m, option) for m in LOSSES for option in WRONG if option in options_of(m)])
def test_a_wrong_type_of_a_configuration_is_refused(module, option):
    positional, options = ARGUMENTS.get(module, ((), {}))
    with pytest.raises(TypeError, match=f"^{module.__name__}: {option} must be "):
        module(*positional, **{**options, option: WRONG[option]})


@pytest.mark.parametrize("module", [Experts, Router, SparseMoE, ExpertChoice, SoftMoE, MemoryBank, nn.ArcFaceLoss])
@pytest.mark.parametrize("wrong", ["8", 8.0, True, [8]])
def test_a_wrong_type_of_a_size_is_refused(module, wrong):
    (first, *rest), options = ARGUMENTS[module]
    with pytest.raises(TypeError, match=r"^\w+: \w+ must be an int, got"):
        module(wrong, *rest, **options)


@pytest.mark.parametrize("option,wrong", [("gated", "true"), ("bias", 1), ("shared", "1"),
                                          ("router", {"balance_rate": "1e-3"}), ("router", {"capacity": "1.25"}),
                                          ("router", {"losses": "switch"})])  # fmt: skip
def test_a_wrong_type_of_a_layer_is_refused(option, wrong):
    with pytest.raises(TypeError, match=" must be "):
        SparseMoE(8, 4, 3, **{option: wrong})


def test_a_bounded_scale_leaves_its_parameter_alone():
    """Also compiled, copied, pickled, twice differentiated, and where another term has the parameter too."""
    a, b = torch.nn.functional.normalize(torch.randn(2, 16, 8, dtype=torch.float64), dim=2).unbind()
    loss = nn.CLIPLoss(max_scale=20.0).double()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for start in (2.0, math.log(20.0), 5.0):
        loss.logit_scale.data.fill_(start)
        prior = (loss.logit_scale.exp() * loss.logit_scale).sum()
        (loss(a, b) + 1e-3 * prior).backward()
        assert loss.logit_scale.item() == start
        expected = loss.scale()
        assert expected.item() == pytest.approx(min(math.exp(start), 20.0))
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert other.scale().item() == expected.item()
        for x, y in ((a, b), (a, a)):
            gradients = [torch.autograd.grad(f(x, y), loss.logit_scale)[0] for f in (loss, compiled)]
            torch.testing.assert_close(*gradients)
            assert gradients[0] >= 0 or start < math.log(20.0)
        (first,) = torch.autograd.grad(loss(a, b), loss.logit_scale, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), loss.logit_scale)
        assert second.isfinite().all()
