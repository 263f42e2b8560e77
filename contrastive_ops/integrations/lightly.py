"""lightly's losses on fused kernels.

from contrastive_ops.integrations.lightly import NTXentLoss

criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..losses import barlow_twins, dcl, moco, nt_xent, vicreg
from ._originals import runs_original, third_party

lightly = third_party("lightly.loss", "lightly")
negative_mises_fisher_weights = third_party("lightly.loss.dcl_loss", "lightly").negative_mises_fisher_weights


class NTXentLoss(lightly.NTXentLoss):
    """`lightly.loss.NTXentLoss` without the logits of all pairs: NT-Xent, or MoCo's loss with a memory bank.

    Equivalent to::

        z = F.normalize(torch.cat([out0, out1]))
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        F.cross_entropy(logits, torch.arange(2 * N).roll(N))

    and, with a memory bank::

        logits = torch.cat([(out0 * out1).sum(1, keepdim=True), out0 @ bank], 1) / temperature
        F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))

    Args:
        temperature: divides the cosines; the original runs where it is negative.
        memory_bank_size: rows of the bank, 0 for none, or (rows, dimension).
        gather_distributed: negatives are those of all ranks, which may have unequal numbers of rows.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the mean loss of (N, D) and (N, D) projections."""
        if self.temperature < 0:
            runs_original(self, f"temperature={self.temperature}")
            loss: Tensor = super().forward(out0, out1)
        elif self.memory_bank.size[0] == 0:
            function = distributed.nt_xent if self.gather_distributed else nt_xent
            loss = function(out0, out1, temperature=self.temperature)
        else:
            # The bank keeps what it is given: rows of length 1, as the original gives it.
            keys, bank = self.memory_bank(torch.nn.functional.normalize(out1, dim=1), update=out0.requires_grad)
            loss = moco(out0, keys, bank.T.to(out0), temperature=self.temperature)
        return loss


class DCLLoss(lightly.DCLLoss):
    """`lightly.loss.DCLLoss` without the logits of all pairs.

    Equivalent to::

        z = F.normalize(torch.cat([out0, out1]))
        logits = z @ z.T / temperature
        partner = torch.arange(2 * N).roll(N)
        positive = logits.gather(1, partner[:, None])[:, 0]
        logits.fill_diagonal_(-torch.inf).scatter_(1, partner[:, None], -torch.inf)
        (logits.logsumexp(1) - positive).mean()

    Args:
        temperature: divides the cosines.
        weight_fn: None, or `negative_mises_fisher_weights` with some sigma, as `DCLWLoss` has it; the original runs
            with any other.
        gather_distributed: the original runs where there is more than one rank.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the mean loss of (N, D) and (N, D) projections."""
        sigma, known = _sigma(self.weight_fn)
        if not known or _several_ranks(self):
            runs_original(self, "gather_distributed" if known else "weight_fn")
            loss: Tensor = super().forward(out0, out1)
            return loss
        return dcl(out0, out1, sigma=sigma, temperature=self.temperature)


class DCLWLoss(lightly.DCLWLoss, DCLLoss):
    """`lightly.loss.DCLWLoss`: `DCLLoss` of this module with von Mises-Fisher weights of the positives."""


def _several_ranks(loss: Any) -> bool:
    """Whether a loss is asked to gather over more than one rank."""
    apart = loss.gather_distributed and torch.distributed.is_initialized()
    return apart and torch.distributed.get_world_size() > 1


class VICRegLoss(lightly.VICRegLoss):
    """`lightly.loss.VICRegLoss`; see `contrastive_ops.losses.vicreg`.

    Args:
        *args: as of the original.
        **kwargs: the same; the original runs with another `eps` than 1e-4, over ranks, and with more than two
            dimensions.
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of (N, D) and (N, D) projections."""
        reason = "gather_distributed" if _several_ranks(self) else "" if self.eps == 1e-4 else f"eps={self.eps}"
        reason = f"projections of {z_a.dim()} dimensions" if z_a.dim() != 2 else reason
        if reason or len(z_a) < 2 or z_a.shape != z_b.shape:
            if reason:
                runs_original(self, reason)
            loss: Tensor = super().forward(z_a, z_b)
            return loss
        return vicreg(z_a, z_b, invariance=self.lambda_param, variance=self.mu_param, covariance=self.nu_param)


class BarlowTwinsLoss(lightly.BarlowTwinsLoss):
    """`lightly.loss.BarlowTwinsLoss`; see `contrastive_ops.losses.barlow_twins`.

    The original adds 1e-5 to variances. Of rows at least half as many as features nearly all time goes to three
    products with the matrix of features against features, which is the smaller one: nothing can be saved, and the
    original runs.

    Args:
        *args: as of the original.
        **kwargs: the same; the original runs over ranks.
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of (N, D) and (N, D) projections."""
        if _several_ranks(self) or len(z_a) < 2:
            if len(z_a) > 1:
                runs_original(self, "gather_distributed")
            loss: Tensor = super().forward(z_a, z_b)
            return loss
        if z_a.dim() == 2 and 2 * len(z_a) >= z_a.shape[1] and z_a.dtype == torch.float32:
            same: Tensor = super().forward(z_a, z_b)
            return same
        return barlow_twins(z_a, z_b, off_diagonal=self.lambda_param)


def _sigma(weight_fn: Any) -> tuple[float | None, bool]:
    """The sigma of von Mises-Fisher weights, None without weights; and whether these weights have a fused form."""
    if weight_fn is None:
        return None, True
    if weight_fn is negative_mises_fisher_weights:
        return 0.5, True
    known = isinstance(weight_fn, partial) and weight_fn.func is negative_mises_fisher_weights and not weight_fn.args
    return (weight_fn.keywords.get("sigma", 0.5), True) if known else (None, False)


def __getattr__(name: str) -> Any:
    return getattr(lightly, name)
