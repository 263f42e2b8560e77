"""No kernel of the extension reads or writes behind the end of a tensor (tests/guarded_cases.py)."""

import os
import sys

import guarded_cases
import pytest

from contrastive_ops.core import extension

if extension.load() is None:
    pytest.skip("needs the C++ extension", allow_module_level=True)
if not sys.platform.startswith("linux"):
    pytest.skip("protects pages as Linux does", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("is of the extension", allow_module_level=True)


@pytest.mark.parametrize("dtype", guarded_cases.DTYPES)
def test_nothing_is_read_behind_the_end_of_a_tensor(dtype):
    guarded_cases.ends_well("cpu", guarded_cases.CASES, [dtype])
