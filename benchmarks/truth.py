"""The float64 truth of each op: dense mathematics and autograd, sharing no code with the package.

All three softmax losses are one formula, ``logsumexp over a row - logit of the positive``, applied
to rows and columns (clip), to rows (info_nce), or to a batch against itself without the diagonal
(nt_xent). Rows go through in checkpointed chunks so that a matrix of 8192 x 8192 float64 logits
and its temporaries need not all live at once.

Batches of copies: repeat every row ``r`` times and each row's sum has every column ``r`` times, its
own ``r - 1`` times. So the truth of the large batch comes from the small one with ``log r`` and
``log (r - 1)`` added to the logits; by symmetry each copy gets ``1 / r`` of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.registry import Inputs, Outcome

CHUNK_BYTES = 128 * 2**20


def _row_losses(x: Tensor, y: Tensor, target: Tensor, scale: Tensor, copies: int, own: int | None) -> Tensor:
    """Sum over the rows of one chunk; ``own``: its first row's own column in a self-similarity."""
    logits = scale * (x @ y.T)
    positive = logits.gather(1, target[:, None]).squeeze(1)
    if own is not None:
        rows = torch.arange(len(x), device=x.device)
        without_self = torch.zeros_like(logits)
        without_self[rows, own + rows] = torch.tensor(1 - 1 / copies, dtype=x.dtype).log()
        logits = logits + without_self
    lse = logits.logsumexp(1) + torch.tensor(float(copies), dtype=x.dtype).log()
    return (lse - positive).sum()


def _mean_row_loss(
    x: Tensor, y: Tensor, target: Tensor, scale: Tensor, copies: int, self_similarity: bool = False
) -> Tensor:
    rows = max(1, CHUNK_BYTES // (8 * len(y)))
    total = x.new_zeros(())
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        arguments = (x[part], y, target[part], scale, copies, first if self_similarity else None)
        if len(x) > rows:
            total = total + checkpoint(_row_losses, *arguments, use_reentrant=False)
        else:
            total = total + _row_losses(*arguments)
    return total / len(x)


def _differentiate(loss_of: Callable[..., Tensor], inputs: Inputs) -> Outcome:
    """Loss and gradients in float64 from the values the providers get, rounding included."""
    leaves = {}
    for name, tensor in inputs.tensors.items():
        base = tensor if tensor.ndim == 0 else tensor[: len(tensor) // inputs.copies]
        leaves[name] = base.detach().double().requires_grad_()
    loss = loss_of(**leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    spread = {
        name: grad if grad.ndim == 0 else grad.repeat(inputs.copies, 1) / inputs.copies
        for name, grad in zip(leaves, grads, strict=True)
    }
    return Outcome(loss.detach(), spread)


def _same_row(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def clip_truth(inputs: Inputs) -> Outcome:
    """CLIP: the mean of both directions, with a learned scale."""

    def loss_of(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        rows = _mean_row_loss(image, text, _same_row(image), scale, inputs.copies)
        columns = _mean_row_loss(text, image, _same_row(text), scale, inputs.copies)
        return (rows + columns) / 2

    return _differentiate(loss_of, inputs)


def info_nce_truth(inputs: Inputs) -> Outcome:
    """InfoNCE from queries to keys, with a fixed scale."""
    scale = torch.tensor(inputs.constants["scale"], dtype=torch.float64)

    def loss_of(query: Tensor, key: Tensor) -> Tensor:
        return _mean_row_loss(query, key, _same_row(query), scale, inputs.copies)

    return _differentiate(loss_of, inputs)


def nt_xent_truth(inputs: Inputs) -> Outcome:
    """NT-Xent (SimCLR): both views against both views without the diagonal, rows normalised."""
    scale = torch.tensor(1 / inputs.constants["temperature"], dtype=torch.float64)

    def loss_of(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]), dim=1)
        partner = _same_row(z).roll(len(z0))
        return _mean_row_loss(z, z, partner, scale, inputs.copies, self_similarity=True)

    return _differentiate(loss_of, inputs)


def errors(outcome: Outcome, truth: Outcome) -> tuple[float, float]:
    """Relative errors of the loss and of the worst gradient, in the 2-norm."""
    loss_error = _relative(outcome.loss, truth.loss)
    missing = truth.grads.keys() - outcome.grads.keys()
    if missing:
        raise ValueError(f"the provider returns no gradient for {sorted(missing)}")
    return loss_error, max(_relative(outcome.grads[name], grad) for name, grad in truth.grads.items())


def _relative(value: Tensor, truth: Tensor) -> float:
    difference = value.detach().to(truth.device, torch.float64) - truth
    norm = truth.norm().item()
    return difference.norm().item() / norm if norm else difference.norm().item()
