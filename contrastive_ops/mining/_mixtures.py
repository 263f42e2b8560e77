"""Mixtures of rows: negatives that lie between those that there are."""

from __future__ import annotations

from torch import Tensor

from ..core import autocast, checks


def mixtures(rows: Tensor, partners: Tensor, shares: float | Tensor = 0.5, anchors: Tensor | None = None) -> Tensor:
    """Mix rows with each other, or with anchors: synthetic negatives (MoCHi), or mixed inputs (i-Mix).

    Equivalent to::

        shares[..., None] * rows[partners[..., 0]] + (1 - shares[..., None]) * rows[partners[..., 1]]
        shares[..., None] * anchors[:, None] + (1 - shares[..., None]) * rows[partners]             # with anchors

    Args:
        rows: (M, D) float32, bfloat16, float16 or float64, such as unit rows of negatives.
        partners: (N, K, 2) int64, the two rows of each mixture; with anchors (N, K), the row that each of K mixtures of
            an anchor is made of.
        shares: of the first partner, or of the anchor: float in [0, 1], or (N, K) numbers. Differentiable.
        anchors: (N, D) of the dtype of ``rows``.

    Returns:
        (N, K, D) in the dtype of ``rows``, as ``row_negatives`` of a loss. Neither detached nor scaled to length 1: a
        loss with ``normalize`` does the one, and for constants, as the papers have them, rows are detached before.

    Raises:
        ValueError: shapes that do not fit, partners that do not exist or are -1, shares outside of [0, 1].
        TypeError: dtypes that do not fit.

    Note:
        Where fewer than K partners were found, name any row in place of -1
        and give ``row_negative_mask=partners >= 0`` to the loss. A mixture of positives, as in mixup, has two targets:
        ``soft_info_nce``.

    Source:
        Kalantidis et al., Hard Negative Mixing for Contrastive Learning, 2020 (MoCHi): among the hardest negatives of a
        query, with shares drawn from (0, 1), and with the query itself, whose share is below 0.5. Lee et al., i-Mix: A
        Domain-Agnostic Strategy for Contrastive Representation Learning, 2021.

    Examples:
        >>> from contrastive_ops import info_nce, similarity_topk
        >>> query, key, queue = torch.randn(4, 8), torch.randn(4, 8), torch.randn(100, 8)
        >>> hard = similarity_topk(query, queue, 16, metric="cosine").indices
        >>> pairs = hard[torch.arange(4)[:, None, None], torch.randint(16, (4, 5, 2))]
        >>> mixed = mixtures(torch.nn.functional.normalize(queue), pairs, torch.rand(4, 5))
        >>> mixed.shape, info_nce(query, key, queue, row_negatives=mixed).shape
        (torch.Size([4, 5, 8]), torch.Size([]))
    """
    name = "mixtures"
    rows, anchors = autocast.cast(rows, anchors)
    checks.check_matrix(name, "rows", rows)
    partners = checks.as_index(name, "partners", partners)
    if anchors is not None:
        checks.check_matrices(name, "anchors", anchors, "rows", rows)
        if partners.dim() != 2 or partners.shape[0] != anchors.shape[0]:
            raise ValueError(
                f"{name}: partners must have shape ({anchors.shape[0]}, K) with anchors, got {checks.shape(partners)}"
            )
    elif partners.dim() != 3 or partners.shape[2] != 2:
        raise ValueError(f"{name}: partners must have shape (N, K, 2) without anchors, got {checks.shape(partners)}")
    checks.check_device(name, "rows", rows, "partners", partners)
    _check_partners(name, partners, rows.shape[0])
    share = _checked_shares(name, shares, rows, partners.shape[0], partners.shape[1])
    wide = checks.accumulator(rows.dtype)
    # The gradient of index_select is summed in order, that of rows[partners] is not.
    found = rows.index_select(0, partners.reshape(-1)).view(*partners.shape, rows.shape[1]).to(wide)
    first, second = (anchors[:, None].to(wide), found) if anchors is not None else found.unbind(2)
    return (share * first + (1 - share) * second).to(rows.dtype)


def _check_partners(function: str, partners: Tensor, rows: int) -> None:
    if checks.may_read(partners, waits=True) and bool((partners == -1).any()):
        raise ValueError(
            f"{function}: partners must name two rows for each mixture, got -1, which stands for none\n"
            "  name any row there, and leave the mixture out with row_negative_mask"
        )
    checks.check_index_values(function, "partners", partners, rows)


def _checked_shares(function: str, shares: float | Tensor, rows: Tensor, n: int, k: int) -> float | Tensor:
    """A number, or (N, K, 1) in the accumulation dtype."""
    if not isinstance(shares, Tensor):
        return checks.number(function, "shares", shares, "[0, 1]")
    checks.check_tensor(function, "shares", shares)
    if shares.dim() and shares.shape != (n, k):
        raise ValueError(f"{function}: shares must be one number or have shape ({n}, {k}), got {checks.shape(shares)}")
    if not shares.is_floating_point():
        raise TypeError(f"{function}: shares must be floating numbers, got {shares.dtype}")
    checks.check_device(function, "rows", rows, "shares", shares)
    if checks.may_read(shares):
        wrong = shares.detach()[~((shares >= 0) & (shares <= 1))]
        if wrong.numel() > 0:
            raise ValueError(f"{function}: shares must be in [0, 1], got {float(wrong[0])}")
    return shares.to(checks.accumulator(rows.dtype))[..., None]
