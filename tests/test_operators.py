"""Eager calls go direct; wherever somebody beside autograd would see a call, it is the registered operator."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from contrastive_ops import similarity_reduce
from contrastive_ops.core import operators

X, Y = torch.randn(5, 8), torch.randn(6, 8)


class Seen(TorchDispatchMode):
    """Names of the operators of this package that it saw."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "contrastive_ops":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """The names of the operators that were called through the dispatcher outside of any mode."""
    names = []
    direct = operators.seen_by_autograd_alone

    def recorded(arguments):
        alone = direct(arguments)
        names.append(alone)
        return alone

    monkeypatch.setattr(operators, "seen_by_autograd_alone", recorded)
    return names


def nodes(function, found=None):
    """The names of all nodes of a graph."""
    found = set() if found is None else found
    if function is not None:
        found.add(type(function).__name__)
        for following, _ in function.next_functions:
            nodes(following, found)
    return found


def test_an_eager_call_is_one_function_of_autograd(dispatched):
    value = similarity_reduce(X.clone().requires_grad_(), Y)
    assert "similarity_reduce_forwardBackward" in nodes(value.grad_fn)
    assert not any("Generated" in name for name in nodes(value.grad_fn))
    assert dispatched == [True]
    assert similarity_reduce(X, Y).grad_fn is None and dispatched == [True, True]


@pytest.mark.parametrize(
    "run",
    [
        lambda: similarity_reduce(X.to("meta"), Y.to("meta")),
        lambda: torch.func.grad(lambda x: similarity_reduce(x, Y).sum())(X),
        lambda: torch.func.vmap(lambda x: similarity_reduce(x, Y))(X.expand(2, 5, 8)),
        lambda: torch.jit.trace(lambda x: similarity_reduce(x, Y), X, check_trace=False),
        lambda: similarity_reduce(torch._neg_view(X), Y),
        lambda: similarity_reduce(X, Y, row_bias=torch._neg_view(torch.ones(5))),
    ],
    ids=["meta", "grad", "vmap", "trace", "negative bit", "negative bit of a bias"],
)
def test_others_see_the_operator(run, dispatched):
    run()
    assert dispatched and not any(dispatched)


def test_modes_see_the_operator():
    with Seen() as seen:
        similarity_reduce(X.clone().requires_grad_(), Y).sum().backward()
    assert seen.names == ["similarity_reduce_forward", "similarity_reduce_backward"]
    with FlopCounterMode(display=False) as counter:
        similarity_reduce(X, Y)
    assert counter.get_total_flops() == 2 * 5 * 6 * 8
    with torch.device("meta"):  # a mode of functions
        assert similarity_reduce(X, Y).device.type == "cpu"


def test_a_profile_has_the_names_of_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        similarity_reduce(X, Y)
    assert "contrastive_ops::similarity_reduce_forward" in {event.key for event in profile.key_averages()}


def test_a_negative_bit_changes_nothing():
    torch.testing.assert_close(similarity_reduce(torch._neg_view(X), Y), similarity_reduce(-X, Y))


def test_both_ways_give_the_same_bits(monkeypatch):
    def step():
        x = X.clone().requires_grad_()
        y = Y.clone().requires_grad_()
        value = similarity_reduce(x, y, dim=0, scale=3.0)
        first = torch.autograd.grad(value.square().sum(), (x, y), create_graph=True)
        return value, *first, *torch.autograd.grad(first[0].square().sum() + first[1].sum(), (x, y))

    direct = step()
    monkeypatch.setattr(operators, "seen_by_autograd_alone", lambda arguments: False)
    assert all(torch.equal(a, b) for a, b in zip(direct, step(), strict=True))


def test_an_operator_that_is_not_there():
    with pytest.raises(AttributeError, match="no operator similarity"):
        operators.call.similarity  # noqa: B018


@pytest.mark.parametrize("release", ["this", "older"])
def test_whether_an_argument_requires_a_gradient(release):
    """torch 2.6 has no function for it; both see tensors and lists of them."""
    asked = operators._one_requires_grad if release == "older" else operators._any_requires_grad
    constant, variable = torch.zeros(2), torch.zeros(2, requires_grad=True)
    for arguments, expected in (((1, None, variable), True), ((constant, [constant, variable]), True)):
        assert asked(*arguments) is expected
    assert not asked(constant, [constant], "text", [1, 2], None)
