"""Matrix products by the library behind torch: operands as they are, sums and results in float32.

Operands of 16 bits are never widened on a GPU, and float32 is never rounded to TF32, whatever a program has set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# What inner products of a chunk may take. Chunks that stay in the L2 cache were slower on an H200: starting products
# and kernels then takes the host longer than running them. A constant, because the order of sums depends on it.
CHUNK_BYTES = 256 << 20


def unsupported(x: Tensor) -> list[str]:
    """Reasons why matrices like `x` cannot be multiplied."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cuda":
        return []
    if hasattr(torch.ops.aten.mm, "dtype_out"):
        return []
    return [f"torch {torch.__version__} has no products of {x.dtype} with float32 results (supported: 2.8 and newer)"]


def inner_products(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Write x @ y.T, (rows, columns) float32, to `out`, whose rows may lie apart."""
    _into(out, x, y.T)


def set_or_add(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """Write a @ b to `out`, float32, or add it."""
    if not add:
        _into(out, a, b)
        return
    with _exactly(a):
        if _is_wide(a):
            torch.addmm(out, a.float(), b.float(), out=out)
        elif _adds_wide():
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            out += torch.mm(a, b, out_dtype=torch.float32)


def _into(out: Tensor, a: Tensor, b: Tensor) -> None:
    with _exactly(a):
        if _is_wide(a):
            torch.mm(a.float(), b.float(), out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)


def _is_wide(a: Tensor) -> bool:
    """Whether operands are float32 here; the CPU, where tests run, has no products that widen."""
    return a.dtype == torch.float32 or a.device.type != "cuda"


def _adds_wide() -> bool:
    """Whether addmm takes a float32 matrix to add beside operands of 16 bits; before torch 2.10 it did not."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


@contextlib.contextmanager
def _exactly(a: Tensor) -> Iterator[None]:
    """Hold off switches of torch that trade precision of such a product for speed."""
    matmul = torch.backends.cuda.matmul
    switch: str
    reduced: bool | str
    exact: bool | str
    if a.device.type != "cuda":
        switch, reduced, exact = "", True, False
    elif a.dtype == torch.float16:
        switch, reduced, exact = "allow_fp16_accumulation", True, False
    elif a.dtype == torch.float32 and hasattr(torch._C, "_get_fp32_precision_getter"):
        switch, reduced, exact = "fp32_precision", "tf32", "ieee"
    else:
        switch, reduced, exact = "allow_tf32" if a.dtype == torch.float32 else "", True, False
    if not switch or getattr(matmul, switch, exact) != reduced:
        yield
        return
    setattr(matmul, switch, exact)
    try:
        yield
    finally:
        setattr(matmul, switch, reduced)
