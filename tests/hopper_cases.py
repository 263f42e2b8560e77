"""What tests of the kernels for Hopper GPUs share: the device that they run on, and the schedule where that is none.

Without such a GPU the kernels run on the processor, under sanitizers, with the instructions of tests/cuda_host and in a
schedule that each test names: how threads are ordered, and when copies, products and stores happen. A file of tests
imports the fixtures `schedule`, which all tests use, and `close_kernels`.
"""

import contextlib
import functools

import cuda_host
import pytest
import torch

from contrastive_ops.core import cuda_kernels
from contrastive_ops.cuda import hopper

ON_GPU = (
    torch.cuda.is_available()
    and cuda_kernels.why_missing() is None
    and not hopper.unsupported(torch.empty(0, 64, device="cuda", dtype=torch.bfloat16))
)
if not ON_GPU and cuda_host.why_missing() is not None:
    pytest.skip(cuda_host.why_missing(), allow_module_level=True)

DEVICE = "cuda" if ON_GPU else "cpu"
SCHEDULES = ("gpu",) if ON_GPU else ("ascending", "descending", "shuffled")
DTYPES = (torch.bfloat16, torch.float16)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, indirect=True)


@functools.cache
def kernels(schedule):
    return None if ON_GPU else cuda_host.HostKernels(schedule)


def running(schedule):
    """Runs kernels on the GPU, or on the processor in this schedule."""
    return contextlib.nullcontext() if ON_GPU else cuda_kernels.on_host(kernels(schedule))


@pytest.fixture(autouse=True)
def schedule(request):
    """Tests that do not name a schedule get a shuffled one."""
    name = getattr(request, "param", SCHEDULES[-1])
    torch.manual_seed(0)
    with running(name):
        yield name


@pytest.fixture(scope="module", autouse=True)
def close_kernels():
    """Ends the programs that ran kernels."""
    yield
    for name in SCHEDULES:
        if not ON_GPU:
            kernels(name).close()
