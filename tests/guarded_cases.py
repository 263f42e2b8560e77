"""Calls whose tensors end where their memory does: who reads or writes behind one ends with a segmentation fault.

A process of its own runs them: ``python guarded_cases.py BACKEND NAMES DTYPES``, with commas. Results are compared
with those of tensors that lie anywhere.
"""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import torch
from similarity_cases import KINDS, Inputs, flat, leaves, mapped
from similarity_topk_cases import RULES, integers, rules_of, select

from contrastive_ops import grouped_matmul, maxsim, route, similarity_reduce
from contrastive_ops.ops import TokenSets, combine, dispatch, similarity_distill, similarity_prefix, similarity_values

PAGE = mmap.PAGESIZE
KEPT = []  # the memory of tensors


def guarded(tensor):
    """A copy that ends right before a page that must not be touched."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    KEPT.append(memory)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    copy = copy.view(tensor.shape).copy_(tensor.detach())
    return copy.requires_grad_(tensor.requires_grad)


def both(call, options):
    """The results and gradients of a call, with tensors anywhere and with guarded ones."""
    for change in (lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad), guarded):
        known = {}
        changed = mapped(
            options, lambda tensor, change=change, known=known: known.setdefault(id(tensor), change(tensor))
        )
        values = [value for value in call(**changed) if value is not None]
        total = sum(torch.where(value.isfinite(), value, 0.0).sum() for value in values if value.requires_grad)
        inputs = leaves(changed) if isinstance(total, torch.Tensor) else []
        yield [*values, *(torch.autograd.grad(total, inputs, allow_unused=True) if inputs else [])]


def same(call, options):
    anywhere, ours = both(call, options)
    for a, b in zip(anywhere, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# Sizes that are no multiple of a vector, a tile or a block; the last is less than any of them.
SIZES = [(19, 37, 13), (33, 66, 5), (3, 2, 1)]


def reduce_cases(backend, dtype):
    for n, m, d in SIZES:
        for itself in (False, True):
            inputs = Inputs(n, m, d, itself=itself, dtype=dtype)
            options = {
                "x": inputs.x,
                "y": inputs.y,
                "row_bias": inputs.leaf(inputs.n),
                "col_bias": inputs.leaf(inputs.m),
                "target": inputs.target(),
                "linear": inputs.lists(3, weights=True),
            }
            rules = ("differ", "same", "exclude", "below", "above", "guide", "log_weight")
            for of, size in (("scale", inputs.n), ("col_scale", inputs.m)):
                same(
                    lambda **given: flat(
                        similarity_reduce(**given, reduce=KINDS, dim=(0, 1), memory_budget=0, backend=backend)
                    ),
                    {**options, "pairs": inputs.pairs(*rules), of: inputs.leaf(size)},
                )


def vector_cases(backend, dtype):
    """One number for each row or column, in a single fold: soon done where an interpreter is slow."""
    n, m, d = SIZES[0]
    inputs = Inputs(n, m, d, dtype=dtype)
    vectors = {"row_bias": torch.randn(n), "col_bias": torch.randn(m)}
    for of, size in (("scale", n), ("col_scale", m)):
        same(
            lambda **given: [similarity_reduce(**given, backend=backend)],
            {"x": inputs.x.detach(), "y": inputs.y.detach(), **vectors, of: torch.rand(size) + 0.5},
        )


def persistent_cases(backend, dtype):
    """Calls that persistent sweeps have; rows are whole steps of 16 bytes."""
    for n, m, d in ((19, 37, 24), (3, 2, 8)):
        inputs = Inputs(n, m, d, dtype=dtype)
        options = {
            "x": inputs.x,
            "y": inputs.y,
            "scale": inputs.leaf(n),
            "row_bias": inputs.leaf(n),
            "col_bias": inputs.leaf(m),
            "target": inputs.target(),
            "pairs": inputs.pairs("differ", "same", "below", "above"),
        }
        for kind in ("logsumexp", "sum_softplus"):
            same(
                lambda kind=kind, **given: flat(
                    similarity_reduce(**given, reduce=(kind,), dim=(0, 1), backend=backend)
                ),
                options,
            )


def topk_cases(backend, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    for n, m, d in SIZES:
        for k in (1, 4):
            options = {
                "x": integers(n, d, dtype),
                "y": integers(m, d, dtype, seed=1),
                "row_bias": torch.randn(n),
                "col_bias": torch.randn(m),
                "pairs": rules_of(n, m, RULES, 2),
                "floor": torch.full((n,), -50.0, dtype=wide),
                "count_above": torch.zeros(n, dtype=wide),
            }

            def call(k=k, **given):
                found = select(k=k, backend=backend, **given)
                return [*found.top[:3], *found.statistics.values()]

            same(call, options)


def routing_cases(backend, dtype):
    for tokens, depth, experts in ((37, 13, 5), (70, 5, 17), (3, 1, 2)):
        options = {
            "logits": torch.randn(tokens, experts).to(dtype).requires_grad_(),
            "x": torch.randn(tokens, depth).to(dtype).requires_grad_(),
            "segments": torch.arange(tokens) % 3,
            "valid": torch.arange(tokens) % 7 != 3,
        }

        def call(logits, x, segments, valid, tokens=tokens):
            routing = route(
                logits, 2, capacity=tokens // 2 + 1, segments=segments, num_segments=3, valid=valid, backend=backend
            )
            rows = dispatch(x, routing, backend=backend)
            return [routing.gates, rows, combine(rows, routing, backend=backend)]

        same(call, options)


def grouped_cases(backend, dtype):
    for rows, depth, columns in ((37, 13, 19), (5, 1, 3), (70, 33, 65)):
        options = {
            "a": torch.randn(rows, depth).to(dtype).requires_grad_(),
            "b": torch.randn(3, depth, columns).to(dtype).requires_grad_(),
            "offsets": torch.tensor([1, rows // 3, rows // 2, rows]),
            "bias": torch.randn(3, columns).to(dtype).requires_grad_(),
        }
        same(lambda **given: [grouped_matmul(**given, backend=backend)], options)


def maxsim_cases(backend, dtype):
    for queries, documents, depth in ((7, 11, 13), (33, 17, 5), (1, 1, 1)):
        options = {
            "q": torch.randn(3, queries, depth).to(dtype).requires_grad_(),
            "d": torch.randn(2, documents, depth).to(dtype).requires_grad_(),
            "mask": torch.rand(2, documents) < 0.8,
        }
        same(lambda q, d, mask: [maxsim(q, TokenSets(d, mask), k=2 if d.shape[1] > 1 else 1, backend=backend)], options)


def stored_cases(backend, dtype):
    for n, m, d in SIZES:
        x, y = (torch.randn(size, d).to(dtype).requires_grad_() for size in (n, m))
        values, teachers = (torch.randn(size, 3).to(dtype) for size in (m, n))
        inputs = Inputs(n, m, d)
        same(
            lambda **given: [similarity_values(**given, scale=0.5, backend=backend)],
            {"x": x, "y": y, "values": values, "col_bias": torch.randn(m), "pairs": inputs.pairs("differ")},
        )
        same(
            lambda **given: [similarity_distill(**given, scale=0.5, backend=backend)],
            {"x": x, "y": y, "teacher_x": teachers, "teacher_y": values},
        )
        dims = sorted({1, (d + 1) // 2, d})
        same(
            lambda dims=dims, **given: [*similarity_prefix(**given, dims=dims, backend=backend)][:1],
            {"x": x, "y": y, "target": inputs.target()},
        )


CASES = {
    "vectors": vector_cases,
    "reduce": reduce_cases,
    "topk": topk_cases,
    "routing": routing_cases,
    "grouped": grouped_cases,
    "maxsim": maxsim_cases,
    "stored": stored_cases,
}
# Of one backend alone.
PERSISTENT = {"persistent": persistent_cases}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def ends_well(backend, names, dtypes):
    """Run cases in a process of their own."""
    command = [sys.executable, "-X", "faulthandler", str(Path(__file__)), backend, ",".join(names), ",".join(dtypes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"in {done.stdout.splitlines()[-1:]}\n{done.stderr[-3000:]}"


if __name__ == "__main__":
    for case in sys.argv[2].split(","):
        for kind in sys.argv[3].split(","):
            print(case, kind, flush=True)
            torch.manual_seed(0)
            {**CASES, **PERSISTENT}[case](sys.argv[1], DTYPES[kind])
