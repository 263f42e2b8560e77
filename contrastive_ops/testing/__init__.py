"""What tests and benchmarks share: dense truth, sample inputs, tolerances, a registry of losses, memory."""

from .dense import dense_keep, dense_reduce
from .loss_cases import LossCase, leaves
from .losses import LOSSES
from .memory import reset_peak, resident_bytes, saved_bytes
from .samples import (
    GRADIENT_ERROR_16_BIT,
    TOLERANCE,
    Problem,
    clustered_pairs,
    dense,
    relative_error,
    sample_problem,
    sum_error,
    weight_error,
)

__all__ = [
    "GRADIENT_ERROR_16_BIT",
    "LOSSES",
    "TOLERANCE",
    "LossCase",
    "Problem",
    "clustered_pairs",
    "dense",
    "dense_keep",
    "dense_reduce",
    "leaves",
    "relative_error",
    "reset_peak",
    "resident_bytes",
    "sample_problem",
    "saved_bytes",
    "sum_error",
    "weight_error",
]
