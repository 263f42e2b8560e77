"""NT-Xent over the views of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..core.rules import Pairs
from ..losses import _arguments
from ._agreement import Agreement
from ._groups import Group, find_team, local_tensor
from ._rows import local_reduction, rank_share


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
    group: Group = None,
    schedule: str = "auto",
    average: bool = True,
    check: bool = True,
) -> Tensor:
    """`losses.nt_xent` of the two views of the samples of all ranks.

    Equivalent to::

        losses.nt_xent(all_gather(z0), all_gather(z1), ...)      # the mean over ranks of what is returned

    Args:
        z0: (N, D) the first view of this rank's samples; see `clip` for what all ranks share.
        z1: (N, D) the second view.
        temperature: as in `losses.nt_xent`, the same on all ranks; scale too.
        scale: 1 / temperature instead; not both.
        reduction: "mean" or "sum" over the views of all ranks, or "none": the losses of this rank's.
        normalize: scale all rows to length 1 first.
        memory_budget: as in `losses.nt_xent`; of "ring" for each block.
        backend: as in `losses.nt_xent`.
        group: as in `clip`; ``schedule``, ``average`` and ``check`` too.
        schedule: "auto", "gather" or "ring".
        average: for gradients that are averaged over ranks afterwards, as DDP and FSDP do.
        check: compare shapes, dtypes and options of all ranks first.

    Returns:
        0-d, or (2 N,) for ``reduction="none"`` (first the rows of ``z0``), in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.

    Note:
        6 (2 N_local) (2 N_all) D operations for "gather", 8 for "ring": a pair of samples on different ranks is
        computed on both of them.
    """
    name = "nt_xent"
    team = find_team(name, group, z0, z1)
    z0, z1 = local_tensor(z0), local_tensor(z1)
    common: dict[str, Any] = {"temperature": temperature, "scale": scale, "reduction": reduction}
    if team is None:
        return losses.nt_xent(z0, z1, normalize=normalize, memory_budget=memory_budget, backend=backend, **common)
    with Agreement(name, team, check) as agreed:
        sides = (("z0", z0), ("z1", z1))
        z0, z1, scale = _arguments.two_sides(
            name, sides, default_temperature=0.5, normalize=normalize, partners=True, **common
        )
        z = torch.cat([z0, z1])
        agreed.compare(z, z, schedule=schedule, average=average, **common)
    z, _ = agreed.with_gradients(z, z)
    sweep = agreed.sweep(
        schedule,
        z,
        (name, "z0", "z1"),
        scale,
        pairs=Pairs(diagonal=0),
        unit=_arguments.in_sweep(normalize, z),
        memory_budget=memory_budget,
        backend=backend,
    )
    loss = sweep.loss("softmax", z, None, reduction=local_reduction(reduction))
    return rank_share(loss, agreed.rows, None, reduction, average)
