"""Recipes of control and of preferences."""

from __future__ import annotations

from torch import Tensor

from ..core import checks
from ..losses import dpo, info_nce, kl_estimate, siglip


def laeo(x: Tensor, future: Tensor, *, kind: str = "nce") -> Tensor:
    """LAEO's critic: which future state follows a state and an action; raw inner products.

    Equivalent to::

        s = x @ future.T
        F.binary_cross_entropy_with_logits(s, torch.eye(N))                                     # "nce"
        F.cross_entropy(s, torch.arange(N)) + 0.01 * s.logsumexp(1).square().mean()             # "cpc"

    Args:
        x: (N, D) states with actions.
        future: (N, D) states later in the same trajectory.
        kind: "nce", the default of the released code, or "cpc". Twin critics: the mean of two calls. Of the actor:
            ``similarity_reduce(x, goals, reduce="max")`` or "logsumexp".

    Source:
        Hatch et al., Contrastive Example-Based Control, 2023 (S004); released code.
    """
    checks.check_choice("laeo", "kind", kind, ("nce", "cpc"))
    if kind == "cpc":
        return info_nce(x, future, temperature=1.0, z_loss=0.01, normalize=False)
    return siglip(x, future, scale=1.0, bias=0.0, normalize=False) / x.shape[0]


def hypo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    sampled: Tensor,
    reference_sampled: Tensor,
    *,
    beta: float = 0.05,
    kl: float = 1e-4,
) -> Tensor:
    """HyPO: DPO of given pairs, and a reverse KL of answers that the policy drew itself.

    Equivalent to::

        preference = (chosen - reference_chosen) - (rejected - reference_rejected)
        ratio = sampled - reference_sampled
        -F.logsigmoid(beta * preference).mean() + kl * (ratio.detach() * sampled).mean()        # its gradient

    Args:
        chosen: (N,) log-probabilities by the policy, for example of `linear_log_prob`.
        rejected: as `chosen`.
        sampled: as `chosen`.
        reference_chosen: (N,) by the reference.
        reference_rejected: as `reference_chosen`.
        reference_sampled: as `reference_chosen`.
        beta: 0.05 and 1e-4, from memory of the paper.
        kl: as `beta`.

    Returns:
        0-d; the second term's value is half the squared ratio, its gradient that of the estimate above.

    Source:
        Song et al., The Importance of Online Data, 2024 (S003).
    """
    given = dpo(chosen, rejected, reference_chosen, reference_rejected, beta=beta)
    return given + kl * kl_estimate(sampled, reference_sampled, kind="k2").mean()
