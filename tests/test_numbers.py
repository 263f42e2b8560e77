"""One number is one number: of Python or numpy, or in a tensor of any shape; and no temperature is 0 or below.

The losses are those of `contrastive_ops.testing.losses`; their options are found by their annotations.
"""

import inspect

import pytest
import torch

from contrastive_ops import moe, similarity_reduce, similarity_topk
from contrastive_ops.core import checks
from contrastive_ops.losses import _arguments
from contrastive_ops.ops import similarity_prefix
from contrastive_ops.testing import LOSSES

ONE_EACH = [name for name, case in LOSSES.items() if name == case.function.__name__]
FACTORS = ("temperature", "scale", "bias", "text_temperature", "text_scale", "teacher_temperature", "teacher_scale")


def options_of(name):
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    return [p.name for p in parameters if p.name in FACTORS and "float" in str(p.annotation)]


def call(name, **options):
    case = LOSSES[name]
    inputs = case.inputs(6, 8)
    given = {**case.options, **case.arrange(inputs), "reduction": "mean"}
    for key in options:
        other = key.replace("temperature", "scale") if "temperature" in key else key.replace("scale", "temperature")
        given.pop(other, None)
    value = case.function(**{**given, **options})
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("name,option", [(n, o) for n in ONE_EACH for o in options_of(n)])
def test_one_number_of_any_shape(name, option):
    np = pytest.importorskip("numpy")
    expected = call(name, **{option: 0.5})
    scalar = torch.tensor(0.5, requires_grad=True)
    learned = call(name, **{option: scalar}).requires_grad
    for shape in ((), (1,), (1, 1), (1, 1, 1)):
        value = torch.full(shape, 0.5, requires_grad=True)
        got = call(name, **{option: value})
        assert got.dim() == 0 and got.requires_grad == learned
        torch.testing.assert_close(got, expected)
        if learned and not option.startswith("teacher"):
            (gradient,) = torch.autograd.grad(got, value)
            (of_scalar,) = torch.autograd.grad(call(name, **{option: scalar}), scalar)
            assert gradient.shape == shape
            torch.testing.assert_close(gradient.reshape(()), of_scalar, rtol=0, atol=0)
    for value in (np.float32(0.5), np.float64(0.5), np.array([0.5])):
        torch.testing.assert_close(call(name, **{option: value}), expected, rtol=0, atol=0)
    for wrong in ("0.5", True, [0.5]):
        with pytest.raises(TypeError, match=f"{option} must be"):
            call(name, **{option: wrong})


@pytest.mark.parametrize("name,option", [(n, o) for n in ONE_EACH for o in options_of(n) if "temperature" in o])
def test_a_temperature_that_is_not_positive_is_refused_as_a_float_is(name, option):
    for value in (0.0, -0.1):
        for kind in (float, torch.tensor, lambda v: torch.tensor([v], requires_grad=True)):
            with pytest.raises(ValueError, match=rf"{option} must be in \(0, inf\], got {value}"):
                call(name, **{option: kind(value)})


def test_a_temperature_that_cannot_be_read_makes_the_scale_nan(monkeypatch):
    """On a GPU a check would wait for the value; the condition is the same in traced code."""
    monkeypatch.setattr(checks, "may_read", lambda tensor, **_: False)
    values = torch.tensor([0.5, 0.0, -0.1], requires_grad=True)
    scale = _arguments.inverse("f", "temperature", values)
    assert scale[0] == 2 and scale[1:].isnan().all()
    assert call("info_nce", temperature=torch.tensor(-0.1)).isnan()
    (gradient,) = torch.autograd.grad(scale[0], values)
    assert gradient[0] == -4


@pytest.mark.parametrize("rows", [1, 5])
def test_primitives(rows):
    x, y = torch.randn(rows, 8), torch.randn(7, 8)
    for call in (
        lambda s: similarity_reduce(x, y, scale=s),
        lambda s: similarity_topk(x, y, 3, scale=s).values,
        lambda s: similarity_topk(x, y, 3, scale=s, coarse=torch.bfloat16).values,
        lambda s: similarity_prefix(x, y, dims=(4, 8), scale=s).rows,
    ):
        expected = call(2.0)
        for shape in ((), (1,), (1, 1)):
            value = torch.full(shape, 2.0, requires_grad=True)
            torch.testing.assert_close(call(value), expected)
            assert torch.autograd.grad(call(value).sum(), value)[0].shape == shape


def test_number_and_integer():
    np = pytest.importorskip("numpy")
    for value in (3, 3.0, np.float32(3), np.int64(3), torch.tensor(3), torch.tensor([[3.0]]), np.array([3])):
        assert checks.number("f", "a", value) == 3.0 and type(checks.number("f", "a", value)) is float
    for value in (3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3]), np.array([3])):
        assert checks.integer("f", "k", value, 1, 3) == 3 and type(checks.integer("f", "k", value)) is int
    for wrong in (True, np.bool_(True), "3", None, [3], torch.ones(2), torch.tensor(True), 3j, np.ones(2)):
        for check in (checks.number, checks.integer):
            with pytest.raises(TypeError, match="^f: a must be (a number|an int), got "):
                check("f", "a", wrong)
    for wrong in (2.0, np.float32(2), torch.tensor(2.0)):
        with pytest.raises(TypeError, match="^f: k must be an int, got "):
            checks.integer("f", "k", wrong)
    for value, interval in ((0, "(0, 1]"), (1.5, "(0, 1]"), (float("nan"), "(-inf, inf)"), (float("inf"), "[0, inf)")):
        with pytest.raises(ValueError, match="^f: a must be in "):
            checks.number("f", "a", value, interval)
    with pytest.raises(ValueError, match="^f: k must be at least 2, got 1"):
        checks.integer("f", "k", 1, 2)
    with pytest.raises(ValueError, match=r"^f: k must be in \[2, 4\], got 5"):
        checks.integer("f", "k", 5, 2, 4)
    with pytest.raises(ValueError, match="^f: a must not require a gradient"):
        checks.number("f", "a", torch.tensor(1.0, requires_grad=True))


LAYOUTS = {"w": ("w1", "w3", "w2"), "proj": ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("names", LAYOUTS)
@pytest.mark.parametrize("form", ["each", "stacked", "stacked.weight"])
def test_experts_load_the_layouts_of_checkpoints(names, form):
    layer = moe.SparseMoE(8, 4, 3, gated=True, shared=1)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for prefix, count in (("experts.", 3), ("shared_experts.", 1)):
        gate, up = state.pop(f"{prefix}gate_up_proj").chunk(2, 1)
        for name, value in zip(LAYOUTS[names], (gate, up, state.pop(f"{prefix}down_proj")), strict=True):
            if form == "each":
                state |= {f"{prefix}{e}.{name}.weight": value[e] for e in range(count)}
            else:
                state[prefix + name + form.removeprefix("stacked")] = value
    other = moe.SparseMoE(8, 4, 3, gated=True, shared=1)
    other.load_state_dict(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    # A shared expert is one matrix in hub layouts.
    state = {k: v[0] if k.startswith("shared") and v.dim() == 3 else v for k, v in state.items()}
    moe.SparseMoE(8, 4, 3, gated=True, shared=1).load_state_dict(state)


def test_experts_without_gates_load_each_matrix():
    layer, other = moe.Experts(8, 4, 3, bias=True), moe.Experts(8, 4, 3, bias=True)
    parts = [("up_proj", layer.up_proj, layer.up_bias), ("down_proj", layer.down_proj, layer.down_bias)]
    state = {f"{e}.{n}.weight": w[e] for n, w, _ in parts for e in range(3)}
    other.load_state_dict(state | {f"{e}.{n}.bias": b[e] for n, _, b in parts for e in range(3)})
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_what_needs_float64_is_computed_on_the_cpu_where_a_device_has_none(monkeypatch):
    from contrastive_ops.core import ordered

    x = torch.randn(3, 4, requires_grad=True)
    torch.testing.assert_close(ordered.in_float64(x), x.double(), rtol=0, atol=0)
    monkeypatch.setattr(ordered, "wide_dtype", lambda like: torch.float32)
    wide = ordered.in_float64(x)
    assert wide.device.type == "cpu" and wide.dtype == torch.float64
    assert torch.autograd.grad(wide.sum(), x)[0].dtype == torch.float32
