"""SigLIP's loss over the images and texts of all ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import losses
from ..core.ordered import repeated
from ..core.rules import Pairs
from ..losses import _arguments
from ..losses._binary import shared_bias
from ..losses._columns import check_filters
from ._agreement import Agreement
from ._groups import Group, find_team, local_tensor
from ._rows import local_reduction, rank_share


def siglip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    bias: float | Tensor = -10.0,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
    group: Group = None,
    schedule: str = "auto",
    average: bool = True,
    check: bool = True,
) -> Tensor:
    """`losses.siglip` of the images and texts of all ranks, of which each has its own.

    Equivalent to::

        images, texts = all_gather(image), all_gather(text)      # with gradients
        losses.siglip(images, texts, ...)                        # the mean over ranks of what is returned

    Args:
        image: (N, D) this rank's images; see `clip` for what all ranks share.
        text: (N, D); row i belongs to row i of ``image``.
        temperature: as in `losses.siglip`, the same on all ranks; scale and bias too.
        scale: 1 / temperature instead; not both.
        bias: added to every logit.
        pairs: rules as in `clip`.
        col_bias: (N,) of this rank's texts.
        weight: (N,) of this rank's rows; the mean divides by the sum over all ranks.
        reduction: "mean" or "sum" over the rows of all ranks, or "none": the losses of this rank's.
        normalize: scale all rows to length 1 first.
        memory_budget: as in `losses.siglip`; of "ring" for each block.
        backend: as in `losses.siglip`.
        group: as in `clip`; ``schedule``, ``average`` and ``check`` too.
        schedule: "auto", "gather" or "ring".
        average: for gradients that are averaged over ranks afterwards, as DDP and FSDP do.
        check: compare shapes, dtypes and options of all ranks first.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.

    Note:
        6 N_local N_all D operations for "gather", which forms gradients in the forward pass, 8 for "ring".
    """
    name = "siglip"
    team = find_team(name, group, image, text)
    image, text = local_tensor(image), local_tensor(text)
    common: dict[str, Any] = {"temperature": temperature, "scale": scale, "weight": weight, "reduction": reduction}
    if team is None:
        return losses.siglip(
            image,
            text,
            bias=bias,
            pairs=pairs,
            col_bias=col_bias,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
            **common,
        )
    with Agreement(name, team, check) as agreed:
        image, text, scale = _arguments.two_sides(
            name,
            (("image", image), ("text", text)),
            default_temperature=0.1,
            normalize=normalize,
            partners=True,
            anchors=1,
            **common,
        )
        check_filters(name, pairs, col_bias, text.shape[0], "image", image)
        row_bias = repeated(shared_bias(name, bias, image), image.shape[0])
        agreed.compare(image, text, pairs, bias=bias, col_bias=col_bias, schedule=schedule, average=average, **common)
    image, text = agreed.with_gradients(image, text)
    sweep = agreed.sweep(
        schedule,
        text,
        (name, "image", "text"),
        scale,
        pairs=pairs,
        col_bias=col_bias,
        unit=_arguments.in_sweep(normalize, image),
        memory_budget=memory_budget,
        backend=backend,
    )
    part = local_reduction(reduction)
    loss = sweep.loss("sigmoid", image, text, row_bias=row_bias, weight=weight, reduction=part)
    return rank_share(loss, agreed.rows, weight, reduction, average)
