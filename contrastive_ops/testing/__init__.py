"""What tests and benchmarks share: dense truth, sample inputs, tolerances."""

from .dense import dense_keep, dense_reduce
from .samples import (
    GRADIENT_ERROR_16_BIT,
    TOLERANCE,
    Problem,
    clustered_pairs,
    dense,
    relative_error,
    sample_problem,
)

__all__ = [
    "GRADIENT_ERROR_16_BIT",
    "TOLERANCE",
    "Problem",
    "clustered_pairs",
    "dense",
    "dense_keep",
    "dense_reduce",
    "relative_error",
    "sample_problem",
]
