"""Python threads that call everything at once get the bits of a single one, also without the interpreter's lock."""

import random
import re
import sys
import sysconfig
import threading

import pytest
import torch

from contrastive_ops import clip, ops
from contrastive_ops.core import extension

THREADS, ROUNDS = 8, 3
GENERATOR = torch.Generator().manual_seed(0)


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def with_gradients(make):
    """A call with leaves of its own: its outputs and what a random sum of them gives each leaf."""

    def call(backend, *tensors):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = make(backend, *leaves)
        total = sum((out.double() * (index + 1)).sin().sum() for index, out in enumerate(outputs) if out.requires_grad)
        return [out.detach() for out in outputs] + list(torch.autograd.grad(total, leaves, allow_unused=True))

    return call


def reduce(backend, x, y):
    pairs = ops.Pairs(diagonal=1, exclude=(torch.arange(301), torch.arange(300)))
    found = ops.similarity_reduce(x, y, reduce=("logsumexp", "max"), dim=(0, 1), pairs=pairs, backend=backend)
    return [*found.rows, *found.cols]


def topk(backend, x, y):
    found = ops.similarity_topk(x, y, 20, pairs=ops.Pairs(diagonal=0), backend=backend)
    return [found.values, found.indices]


def prefix(backend, x, y):
    found = ops.similarity_prefix(x, y, dims=(8, 40), dim=(0, 1), pairs=ops.Pairs(diagonal=0), backend=backend)
    return [part for part in found if torch.is_tensor(part)]


def distill(backend, x, y):
    teacher = x.detach()[:, :9], y.detach()[:, :9]
    return [ops.similarity_distill(x, y, *teacher, divergence="kl", dim=1, backend=backend)]


def experts(backend, logits, tokens):
    """There and back: rows of experts are multiplied by their number."""
    routing = ops.route(logits, 2, capacity=1.0, backend=backend)
    there = ops.dispatch(tokens, routing, backend=backend)
    return [there, ops.combine(there * torch.arange(len(there))[:, None], routing, backend=backend)]


def route(backend, logits):
    routing = ops.route(logits, 2, losses=("switch",), capacity=1.0, backend=backend)
    return [routing.gates, routing.losses["switch"], routing.experts, routing.slots]


BATCH = rows(300, 40), rows(520, 40)
CALLS = {
    "similarity_reduce": (reduce, *BATCH),
    "similarity_reduce bfloat16": (reduce, *(tensor.bfloat16() for tensor in BATCH)),
    "similarity_topk": (topk, *BATCH),
    "similarity_prefix": (prefix, *BATCH),
    "similarity_distill": (distill, *BATCH),
    "similarity_values": (
        lambda backend, x, y, v: [ops.similarity_values(x, y, v, backend=backend)],
        *BATCH,
        rows(520, 6),
    ),
    "maxsim": (lambda backend, q, d: [ops.maxsim(q, d, backend=backend)], rows(9, 7, 24), rows(30, 11, 24)),
    "grouped_matmul": (
        lambda backend, a, b: [ops.grouped_matmul(a, b, torch.tensor([0, 3, 3, 150, 200]), backend=backend)],
        rows(200, 40),
        rows(4, 40, 30),
    ),
    "route": (route, rows(900, 16)),
    "dispatch": (experts, rows(900, 16), rows(900, 12)),
    "clip": (lambda backend, x, y: [clip(x, y, backend=backend)], BATCH[0], rows(300, 40)),
}
BACKENDS = ["reference", *(["cpu"] if extension.load() is not None else [])]


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_in_eight_python_threads(backend):
    calls = {name: (with_gradients(make), tensors) for name, (make, *tensors) in CALLS.items()}
    alone = {name: call(backend, *tensors) for name, (call, tensors) in calls.items()}
    assert all(len(results) >= 2 for results in alone.values())
    start, wrong, done = threading.Barrier(THREADS), [], []

    def work(seed: int) -> None:
        order = list(calls) * ROUNDS
        random.Random(seed).shuffle(order)
        start.wait()
        for name in order:
            call, tensors = calls[name]
            try:
                if not same(call(backend, *tensors), alone[name]):
                    wrong.append((seed, name))
            except Exception as error:  # of another thread, which the test would not see
                wrong.append((seed, name, repr(error)))
            done.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]
    assert len(done) == THREADS * ROUNDS * len(calls)


def test_every_primitive_is_called():
    """Names of compiled functions begin with that of their primitive."""
    if extension.load() is None:
        pytest.skip("needs the C++ extension")
    by_other_names = {"expert_routing": "route", "similarity_loss": "clip"}
    found = (re.match(r"(?:similarity|expert|grouped)_[a-z]+|maxsim", name) for name in dir(extension.load()))
    compiled = {name[0] for name in found if name}
    assert len(compiled) >= 9
    assert {by_other_names.get(name, name) for name in compiled} <= {name.split()[0] for name in CALLS}


def test_the_lock_stays_off():
    """An import of a module that does not say it can do without would turn it on again for the whole process."""
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("needs a free-threaded Python")
    assert extension.load() is not None and not sys._is_gil_enabled()
