"""The losses of all processes as modules: those of `nn` with ``group``, ``schedule``, ``average`` and ``check``."""

from __future__ import annotations

from .. import nn
from .clip import clip
from .gte import gte
from .info_nce import info_nce
from .moco import moco
from .nt_xent import nt_xent
from .siglip import siglip
from .sup_con import sup_con


class CLIPLoss(nn.CLIPLoss):
    """`distributed.clip` as a module with a learnable temperature: ``CLIPLoss(group=mesh["dp"])(image, text)``."""

    function = staticmethod(clip)  # type: ignore[assignment]


class SigLIPLoss(nn.SigLIPLoss):
    """`distributed.siglip` as a module with a learnable temperature and bias."""

    function = staticmethod(siglip)


class InfoNCELoss(nn.InfoNCELoss):
    """`distributed.info_nce` as a module: ``InfoNCELoss(0.05, schedule="ring")(query, key)``."""

    function = staticmethod(info_nce)


class NTXentLoss(nn.NTXentLoss):
    """`distributed.nt_xent` as a module: ``NTXentLoss(0.1)(view0, view1)``."""

    function = staticmethod(nt_xent)


class SupConLoss(nn.SupConLoss):
    """`distributed.sup_con` as a module: ``SupConLoss(0.1)(embeddings, labels)``."""

    function = staticmethod(sup_con)


class MoCoLoss(nn.MoCoLoss):
    """`distributed.moco` as a module: ``MoCoLoss(0.07)(query, key, queue)``."""

    function = staticmethod(moco)


class GTELoss(nn.GTELoss):
    """`distributed.gte` as a module: ``GTELoss(0.05)(query, document, hard_negatives)``."""

    function = staticmethod(gte)
