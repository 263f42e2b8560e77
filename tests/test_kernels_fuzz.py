"""The fuzzer on the Triton kernels in their interpreter; `make fuzz ARGS="--backend triton"` draws larger calls."""

import pytest
from fuzz import SUBJECTS, run

from contrastive_ops.core import triton_kernels

if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)
if not triton_kernels.interprets():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# Tails of tiles; the interpreter takes seconds for larger ones.
SMALL = {"n": 17, "m": 9, "d": 8, "tokens": 12, "query_length": 5, "document_length": 8, "sizes": (3, 0, 5), "rows": 5}
KERNELS = [name for name in SUBJECTS if name.startswith("similarity_")] + ["maxsim", "grouped_matmul", "route"]


@pytest.mark.parametrize("name", KERNELS)
def test_a_short_run(name):
    drawn = 24 if name in ("route", "similarity_prefix") else 8  # of which most have no kernel
    counts, failed = run({name: SUBJECTS[name]}, drawn, 20261130, {**SMALL, "backend": "triton"})
    assert not failed, "\n".join(f"{case.reproducer()}: {said}" for case, said in failed)
    assert counts[name] > 1
