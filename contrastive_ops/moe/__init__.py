"""Mixture-of-experts layers on `route`, `dispatch`, `grouped_matmul` and `combine`.

A layer returns its output and the `Routing` that led to it: the losses are in ``routing.loss``. Nothing is collected on
modules, so that checkpointed, chunked and compiled steps see pure functions of tokens and weights.
"""

from .experts import Experts
from .layers import ExpertChoice, SparseMoE
from .router import Router, balanced_bias
from .soft import SoftMoE

__all__ = ["ExpertChoice", "Experts", "Router", "SoftMoE", "SparseMoE", "balanced_bias"]
