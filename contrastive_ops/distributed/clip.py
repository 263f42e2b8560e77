"""CLIP's loss over the images and texts of all ranks."""

from __future__ import annotations

from torch import Tensor

from .. import losses
from ..core.rules import Pairs
from ..losses import _arguments
from ..losses._columns import check_filters, smoothing_share
from ..losses._row_softmax import both_softmaxes
from ._agreement import Agreement
from ._groups import Group, find_team, local_tensor
from ._rows import local_reduction, rank_share


def clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
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
    """`losses.clip` of the images and texts of all ranks, of which each has its own.

    Equivalent to::

        images, texts = all_gather(image), all_gather(text)      # with gradients
        losses.clip(images, texts, ...)                          # the mean over ranks of what is returned

    Args:
        image: (N, D) this rank's images, any number of them; D and dtype are those of all ranks. A DTensor that is
            Shard(0) names its mesh.
        text: (N, D); row i belongs to row i of ``image``.
        temperature: as in `losses.clip`, the same on all ranks; scale too.
        scale: 1 / temperature instead; not both.
        pairs: rules for this rank's rows; ids, bounds and guides of columns are those of this rank's texts, ``exclude``
            and ``diagonal`` count the columns of all ranks, one rank after another.
        col_bias: (N,) of this rank's texts.
        label_smoothing: as in `losses.clip`.
        weight: (N,) of this rank's pairs; the mean divides by the sum over all ranks.
        reduction: "mean" or "sum" over the pairs of all ranks, or "none": the losses of this rank's.
        normalize: scale all rows to length 1 first.
        memory_budget: as in `losses.clip`, on each rank; of "ring" for each block.
        backend: as in `losses.clip`.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for all processes; where torch.distributed is not
            initialised, or of one process, this is `losses.clip`.
        schedule: "gather", "ring", or "auto": "ring" from 4 GiB of gathered columns and their gradient on.
        average: return (number of ranks) / (rows of all) times the sum of this rank's losses, so that the mean of
            gradients, as DDP and FSDP take it, is the gradient of the loss of all. False: without the number of ranks,
            where gradients are summed.
        check: compare shapes, dtypes and options of all ranks first: one small collective, which is waited for. False:
            all ranks have the same number of rows.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError: as `losses.clip`; what one rank raises, or has else than the
            others, is raised on every rank.
        RuntimeError: a rank has ended, or does not take part before the group's timeout.

    Note:
        Each similarity is computed on one rank for both directions: 8 N_local N_all D operations, 6 if kept. Memory of
        "gather" is O(N_all D), of "ring" O(N_local D). Every rank must run backward.
    """
    name = "clip"
    team = find_team(name, group, image, text)
    image, text = local_tensor(image), local_tensor(text)
    if team is None:
        return losses.clip(
            image,
            text,
            temperature=temperature,
            scale=scale,
            pairs=pairs,
            col_bias=col_bias,
            label_smoothing=label_smoothing,
            weight=weight,
            reduction=reduction,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )
    with Agreement(name, team, check) as agreed:
        given = {"temperature": temperature, "scale": scale, "reduction": reduction, "weight": weight}
        image, text, scale = _arguments.two_sides(
            name,
            (("image", image), ("text", text)),
            default_temperature=0.07,
            normalize=normalize,
            partners=True,
            **given,  # type: ignore[arg-type]
        )
        check_filters(name, pairs, col_bias, text.shape[0], "image", image)
        share = smoothing_share(name, _arguments.of_weighted(weight, label_smoothing), "image", image)
        agreed.compare(
            image, text, pairs, col_bias=col_bias, smoothing=share, schedule=schedule, average=average, **given
        )
    image, text = agreed.with_gradients(image, text)
    sweep = agreed.sweep(
        schedule,
        text,
        (name, "image", "text"),
        scale,
        pairs=Pairs() if pairs is None and share is not None else pairs,  # means of logits are folds
        col_bias=col_bias,
        unit=_arguments.in_sweep(normalize, image),
        memory_budget=memory_budget,
        backend=backend,
    )
    part = local_reduction(reduction)
    loss = both_softmaxes(sweep, image, text, share=share, weight=weight, reduction=part, diagnostics=False)
    return rank_share(loss, agreed.rows, weight, reduction, average)
