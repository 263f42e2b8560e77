"""No Triton kernel reads or writes behind the end of a tensor, as its interpreter shows (tests/guarded_cases.py)."""

import sys

import guarded_cases
import pytest

from contrastive_ops.core import triton_kernels

if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)
if not triton_kernels.interprets() or not sys.platform.startswith("linux"):
    pytest.skip("needs TRITON_INTERPRET=1 and Linux", allow_module_level=True)


@pytest.mark.parametrize("name", guarded_cases.CASES)
def test_nothing_is_read_behind_the_end_of_a_tensor(name):
    guarded_cases.ends_well("triton", [name], ["float32"])


def test_persistent_sweeps_read_nothing_behind_the_end_of_a_tensor():
    guarded_cases.ends_well("triton_persistent", guarded_cases.PERSISTENT, ["bfloat16"])
