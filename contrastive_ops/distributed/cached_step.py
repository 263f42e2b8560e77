"""GradCache: a step with a batch whose activations do not fit, exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ..core import checks


def cached_step(
    encoders: Any,
    batches: Any,
    loss: Callable[..., Tensor],
    *,
    chunk: int,
    scaler: Any = None,
) -> Tensor:
    """Forward and backward of a loss over a whole batch, with the activations of one chunk of it at a time.

    Equivalent to::

        embeddings = [torch.cat([encoder(part) for part in batch.split(chunk)]) for encoder, batch in ...]
        value = loss(*embeddings)
        (value if scaler is None else scaler.scale(value)).backward()

    Chunks are encoded without a graph, the loss of all embeddings gives their gradients, and each chunk is encoded once
    more, with the random numbers of the first time, to take its part of them on to the parameters.

    Args:
        encoders: a module or a function, or a tuple of them, one for each tower. Each takes a chunk of its batch and
            returns a tensor with a row for each row of the chunk, or a tuple of such tensors. DDP and FSDP2 modules
            exchange gradients with the last chunk alone.
        batches: what the encoder takes, a tensor or a structure of tensors (dict, tuple, ...) with the same number of
            rows, or a tuple of them, one for each tower.
        loss: takes all embeddings, in order; returns one number. `distributed.clip` and the like see the batches of all
            ranks. A module with parameters of its own needs its own DDP.
        chunk: rows to encode at a time.
        scaler: a `torch.amp.GradScaler`; unscaling and stepping are left to the caller.

    Returns:
        0-d: the loss, detached. Gradients are added to ``.grad``, as backward does.

    Raises:
        ValueError: towers and batches that do not fit.
        TypeError: encoders that do not return tensors.

    Note:
        Work: one more forward pass of the encoders. What a module changes in forward, such as the statistics of batch
        normalisation, it changes twice. FSDP2, and DDP for modules with buffers, exchange something in each forward
        pass: there all ranks must have the same number of chunks.

    Source:
        Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021.
    """
    name = "cached_step"
    chunk = checks.integer(name, "chunk", chunk, 1)
    several = isinstance(encoders, (tuple, list))
    if several and (not isinstance(batches, (tuple, list)) or len(batches) != len(encoders)):
        got = len(batches) if isinstance(batches, (tuple, list)) else type(batches).__name__
        raise ValueError(f"{name}: batches must be {len(encoders)}, one for each encoder, got {got}")
    pairs = zip(encoders, batches, strict=True) if several else [(encoders, batches)]
    towers = [_Tower(encoder, _chunks(name, batch, chunk)) for encoder, batch in pairs]
    leaves = [leaf for tower in towers for leaf in tower.embed(name)]
    value = loss(*leaves)
    (value if scaler is None else scaler.scale(value)).backward()
    for tower in towers:
        tower.replay()
    return value.detach()


@dataclass
class _Tower:
    """An encoder and its chunks."""

    encoder: Any
    chunks: list[Any]
    states: list[Any] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)

    def embed(self, function: str) -> list[Tensor]:
        """The embeddings of all chunks, as leaves."""
        parts = []
        with torch.no_grad():
            for part in self.chunks:
                self.states.append(_random_states(part))
                parts.append(_tensors(function, self.encoder(part)))
        self.leaves = [torch.cat(each).requires_grad_() for each in zip(*parts, strict=True)]
        return self.leaves

    def replay(self) -> None:
        """Encode once more, with gradients, and take those of the embeddings on."""
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        begin, last = 0, len(self.chunks) - 1
        for place, (part, states) in enumerate(zip(self.chunks, self.states, strict=True)):
            with _as_before(states), _exchange_of_gradients(self.encoder, place == last):
                found = _tensors("cached_step", self.encoder(part))
                end = begin + found[0].shape[0]
                arriving = [gradient[begin:end] for gradient in gradients]
                used = [pair for pair in zip(found, arriving, strict=True) if pair[0].requires_grad]
                if used:
                    torch.autograd.backward([out for out, _ in used], [d.to(out.dtype) for out, d in used])
            begin = end


def _chunks(function: str, batch: Any, size: int) -> list[Any]:
    """The structure once for each chunk of rows; one without rows where there are none."""
    tensors = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]
    rows = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    if len(rows) != 1 or None in rows:
        shapes = ", ".join(checks.shape(tensor) for tensor in tensors) or "none"
        raise ValueError(f"{function}: batches must be tensors with the same number of rows, got {shapes}")
    (count,) = rows

    def part(begin: int) -> Any:
        return tree_map(lambda leaf: leaf[begin : begin + size] if isinstance(leaf, Tensor) else leaf, batch)

    return [part(begin) for begin in range(0, max(count or 0, 1), size)]


def _tensors(function: str, found: Any) -> list[Tensor]:
    tensors = list(found) if isinstance(found, (tuple, list)) else [found]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise TypeError(f"{function}: encoders must return tensors with rows, got {checks.shown(found)}")
    return tensors


# ---- Random numbers --------------------------------------------------------------------------------------------------


def _random_states(batch: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """Of the CPU, and of the GPUs on which the chunk is or that are current."""
    if not torch.cuda.is_available():
        return torch.get_rng_state(), {}
    here = {leaf.get_device() for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.is_cuda}
    devices = here | {torch.cuda.current_device()}
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in sorted(devices)}


@contextlib.contextmanager
def _as_before(states: tuple[Tensor, dict[int, Tensor]]) -> Iterator[None]:
    """A region with the generators of an earlier time; afterwards they are as now."""
    of_cpu, of_gpus = states
    with torch.random.fork_rng(devices=list(of_gpus)):
        torch.set_rng_state(of_cpu)
        for device, state in of_gpus.items():
            torch.cuda.set_rng_state(state, device)
        yield


@contextlib.contextmanager
def _exchange_of_gradients(encoder: Any, wanted: bool) -> Iterator[None]:
    """DDP and FSDP2 exchange gradients in this region, or add them up on each rank."""
    if not wanted and hasattr(encoder, "no_sync"):
        with encoder.no_sync():
            yield
    elif not wanted and hasattr(encoder, "set_requires_gradient_sync"):
        encoder.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            encoder.set_requires_gradient_sync(True)
    else:
        yield
