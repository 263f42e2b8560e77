"""Fused kernels for contrastive training in PyTorch.

    from contrastive_ops import clip, info_nce, siglip, sup_con

    loss = clip(image_features, text_features, scale=logit_scale.exp())

Every loss is short algebra on `similarity_reduce`, which folds the rows and columns of a similarity matrix without
storing it, and hard negatives come from `similarity_topk`, which finds the best columns of each row. `Pairs` says which
pairs take part, `Fold` what a row or column becomes.

Here are the names that most programs need. All losses are in `losses` and, as modules, in `nn`, all primitives in
`ops`, and the rest in `mining`, `moe`, `metrics` and `decoding`; `testing` is for tests. What `losses`, `ops` and
`mining` list can be imported from here, too. `distributed` has losses of the batch of many processes, and `recipes`
objectives of papers. `capture` makes a training step a CUDA graph.
"""

from typing import TYPE_CHECKING, Any

from . import decoding, losses, metrics, mining, moe, nn, ops
from .core import flops
from .graphs import capture
from .losses import clip, info_nce, nt_xent, siglip, sup_con, triplet
from .mining import mine_hard_negatives
from .ops import Fold, Pairs, route, similarity_reduce, similarity_topk

if TYPE_CHECKING:
    from . import distributed, recipes, testing

__version__ = "0.2.0"

__all__ = [
    "Fold",
    "Pairs",
    "__version__",
    "capture",
    "clip",
    "decoding",
    "distributed",
    "info_nce",
    "losses",
    "metrics",
    "mine_hard_negatives",
    "mining",
    "moe",
    "nn",
    "nt_xent",
    "ops",
    "recipes",
    "route",
    "siglip",
    "similarity_reduce",
    "similarity_topk",
    "sup_con",
    "testing",
    "triplet",
]

flops.register_when_imported()


def __getattr__(name: str) -> Any:
    """What few programs need of the namespaces, and what the others list, without their names."""
    if name in ("distributed", "recipes", "testing"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    for namespace in (losses, ops, mining):
        if name in namespace.__all__:
            return getattr(namespace, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
