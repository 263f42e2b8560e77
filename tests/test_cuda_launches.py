"""How many kernels a training step starts on a GPU: library products, kernels of torch, and our own.

A step with few rows takes as long as the host needs to start them. The numbers are counted where there is no GPU: the
kernels run on the processor, and what torch does there is what it would start on a device. One of torch's is always
that of the upstream gradient, which autograd makes.
"""

import contextlib
import ctypes

import cuda_host
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contrastive_ops import clip, info_nce, route, siglip
from contrastive_ops.core import checks, cuda_kernels, eager, operators, unit_rows
from contrastive_ops.cuda import _products
from contrastive_ops.moe import Router
from contrastive_ops.ops import Capacity, RouterLoss, _similarity_loss_autograd

if cuda_host.why_missing() is not None:
    pytest.skip(cuda_host.why_missing(), allow_module_level=True)

# What allocates, or makes another tensor of the same memory, starts nothing.
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
VIEWS = ("detach", "alias", "view", "_unsafe_view", "_reshape_alias", "lift_fresh")


class Started(TorchDispatchMode):
    """Counts the operations of torch that start a kernel, the library's products and our kernels beside them."""

    def __init__(self):
        super().__init__()
        self.products, self.torch, self.ours = 0, [], 0
        self._hidden = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, result = function.overloadpacket.__name__, function(*args, **(kwargs or {}))
        starts = not (function.is_view or name in ALLOCATIONS or name in VIEWS)
        tensors = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        if starts and not self._hidden and any(each.numel() for each in tensors):
            self.torch.append(name)
        return result

    @contextlib.contextmanager
    def hidden(self):
        """A region that stands for one call on a GPU."""
        self._hidden = True
        try:
            yield
        finally:
            self._hidden = False

    def counts(self):
        return self.products, len(self.torch), self.ours


def count_products(monkeypatch, started):
    """One each; the processor has none that widens, so torch converts operands of 16 bits first."""

    def counted(multiply):
        def run(*arguments, **options):
            started.products += 1
            with started.hidden():
                multiply(*arguments, **options)

        return run

    for name in ("inner_products", "set_or_add"):
        monkeypatch.setattr(_products, name, counted(getattr(_products, name)))


def count_kernels(monkeypatch, started, kernels):
    call = kernels.call

    def counted(*arguments):
        before = kernels.launches
        with started.hidden():
            call(*arguments)
        started.ours += kernels.launches - before

    monkeypatch.setattr(kernels, "call", counted)


@pytest.fixture(scope="module")
def kernels():
    host = cuda_host.HostKernels()
    yield host
    host.close()


def inputs(dtype):
    """Two sides, and a scale that is trained, too."""
    torch.manual_seed(0)
    x, y = (torch.randn(24, 64).to(dtype).requires_grad_() for _ in range(2))
    return x, y, torch.tensor(3.0, requires_grad=True)


def started_by(monkeypatch, kernels, loss, dtype, normalize):
    """(products, kernels of torch, our kernels) of a step."""
    # Operators that are not opened hide what they start.
    monkeypatch.setattr(operators, "seen_by_autograd_alone", lambda arguments: True)
    # Nobody waits for a device to look at numbers.
    for module in (checks, unit_rows, _similarity_loss_autograd):
        monkeypatch.setattr(module, "may_read", lambda tensor, waits=False: waits)
    with cuda_kernels.on_host(kernels):
        started, (x, y, scale) = Started(), inputs(dtype)
        count_products(monkeypatch, started)
        count_kernels(monkeypatch, started, kernels)
        with started:
            loss(x, y, scale=scale, normalize=normalize, backend="cuda").backward()
    return started.counts()


# Products, kernels of torch, our kernels; no more than these. Of rows as they are, and of unit rows.
STEPS = {
    "clip": (clip, torch.float32, (3, 30, 7), (3, 56, 7)),
    "clip in 16 bits": (clip, torch.bfloat16, (3, 33, 10), (3, 115, 10)),
    "info_nce": (info_nce, torch.float32, (3, 27, 6), (3, 53, 6)),
    "siglip": (siglip, torch.float32, (3, 31, 6), (3, 57, 6)),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_through_python(monkeypatch, kernels, name, normalize):
    loss, dtype, *expected = STEPS[name]
    found = started_by(monkeypatch, kernels, loss, dtype, normalize)
    assert all(number <= most for number, most in zip(found, expected[normalize], strict=True)), found


# ---- Routers ---------------------------------------------------------------------------------------------------------

ROUTER_LOSSES = ["importance", "switch", "z", RouterLoss("local_entropy", [0.1, 0.5]),
                 RouterLoss("global_entropy", threshold=1.5, pooled=True)]  # fmt: skip
ROUTERS = {
    "dropless": {},
    "capacity": {"capacity": 0.8},
    "by position": {"capacity": 0.8, "priority": "position"},
    "groups": {"capacity": Capacity(factor=0.8, group_size=12)},
    "padded": {"capacity": Capacity(factor=0.8, group_size=12, padded=True)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_three_launches_and_its_gradient_one(monkeypatch, kernels, name, dtype):
    """Scores, their sums with all losses, and slots; torch starts the upstream gradient alone, and metrics wait."""
    monkeypatch.setattr(operators, "seen_by_autograd_alone", lambda arguments: True)
    logits = torch.randn(48, 6).to(dtype).requires_grad_()
    segments = torch.arange(48) % 2
    with cuda_kernels.on_host(kernels):
        started = Started()
        count_kernels(monkeypatch, started, kernels)
        monkeypatch.setattr(checks, "check_index_values", lambda *arguments, **options: None)
        with started:
            routed = route(logits, 2, segments=segments, num_segments=2, losses=ROUTER_LOSSES, backend="cuda",
                           **ROUTERS[name])  # fmt: skip
            assert (started.torch, started.ours) == ([], 3)
            routed.loss.backward()
        assert (started.torch, started.ours) == (["ones_like"], 4)
    assert logits.grad.dtype == dtype and logits.grad.ne(0).any()


def test_the_router_of_a_layer(monkeypatch, kernels):
    """Beside the three launches there is the product that makes logits, and for its gradients two."""
    monkeypatch.setattr(operators, "seen_by_autograd_alone", lambda arguments: True)
    router = Router(16, 6, k=2, capacity=1.0, losses=["importance", "z"])
    tokens = torch.randn(48, 16, requires_grad=True)
    with cuda_kernels.on_host(kernels):
        started = Started()
        count_kernels(monkeypatch, started, kernels)
        with started:
            routed = router(tokens, backend="cuda")
            forward = list(started.torch)
            assert started.ours == 3
            routed.loss.backward()
        backward = started.torch[len(forward) :]
        assert started.ours == 4
    assert forward.count("mm") == 1 and backward.count("mm") == 2, (forward, backward)
    assert len(forward) <= 2 and len(backward) <= 4, (forward, backward)


# ---- Launches from C++ -----------------------------------------------------------------------------------------------


@pytest.fixture
def library():
    if eager.reason() is not None:
        pytest.skip(eager.reason())
    found = cuda_host.library()
    eager.on_host(found.loss_kernels())
    yield found
    eager.on_host(0)


def started_from_cpp(library, loss, dtype, normalize):
    """The same of a step in C++, which is not for calls that a mode sees: it is entered at the first launch."""
    started, (x, y, scale) = Started(), inputs(dtype)
    entered = []

    @ctypes.CFUNCTYPE(None)
    def listener():
        if not entered:
            entered.append(started.__enter__())

    before = library.launches()
    library.set_listener(listener)
    try:
        loss(x, y, scale=scale, normalize=normalize, backend="cuda").backward()
    finally:
        library.set_listener(None)
        if entered:
            started.__exit__(None, None, None)
    # The processor has no products that widen.
    names = [name for name in started.torch if dtype == torch.float32 or name != "_to_copy"]
    products = names.count("mm")
    return products, len(names) - products, library.launches() - before


def own_target(x, y, **options):
    return info_nce(x, y, target=torch.arange(24), **options)


# Of rows as they are, and of unit rows.
STEPS_FROM_CPP = {
    "clip": (clip, torch.float32, (3, 1, 5), (3, 1, 5)),
    "clip in bfloat16": (clip, torch.bfloat16, (3, 1, 5), (3, 1, 6)),
    "clip in float16": (clip, torch.float16, (3, 1, 5), (3, 1, 6)),
    "info_nce": (info_nce, torch.float32, (3, 1, 5), (3, 1, 5)),
    "info_nce in bfloat16": (info_nce, torch.bfloat16, (3, 1, 5), (3, 1, 6)),
    "info_nce with a target in bfloat16": (own_target, torch.bfloat16, (3, 2, 6), (3, 2, 7)),
    "siglip": (siglip, torch.float32, (3, 1, 5), (3, 1, 5)),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", STEPS_FROM_CPP)
def test_a_step_in_cpp(library, name, normalize):
    loss, dtype, *expected = STEPS_FROM_CPP[name]
    assert started_from_cpp(library, loss, dtype, normalize) == expected[normalize]
