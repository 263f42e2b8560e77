"""A training step as a CUDA graph, for batches for which Python takes longer than the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .core import checks

__all__ = ["capture"]

# The type of device that has graphs.
DEVICE = "cuda"


def capture(step: Callable[..., Any], *samples: Tensor) -> Callable[..., Any]:
    """Record a step, forward and backward, as CUDA graphs, which are replayed without the time that Python takes.

    Equivalent to::

        step                                                   # for arguments like `samples`, and without its overhead

    Args:
        step: called with tensors; returns a loss, or a tuple of tensors. A function, or an `nn.Module` whose parameters
            receive gradients too; a function's gradients are those of its arguments alone. It is called a few times
            here, and never again: what it decides in Python stays as it was then.
        samples: CUDA tensors like the arguments: shapes, dtypes, and which of them require a gradient; at least one.

    Returns:
        A function of as many tensors. The memory of its result and of the gradients is that of the graph: the next call
        overwrites it, so read or copy what you want to keep before.

    Raises:
        TypeError: a step that cannot be called, samples or arguments that are no tensors or have another dtype.
        ValueError: samples that are none or on another device; arguments of another number, shape or device, or that
            require a gradient where the sample does not, or the other way round.
        NotImplementedError: no CUDA device.

    Note:
        Built on `torch.cuda.make_graphed_callables`, whose conditions hold: nothing in the step may wait for the GPU,
        forward and backward come in this order on each call, and there are no second derivatives.

        The losses do not wait for a GPU, except that lists such as ``Pairs(exclude=...)`` are checked, and that the
        reference of `maxsim` reads offsets: these cannot be captured. The same bits as without a graph.

    Examples:
        >>> import contrastive_ops
        >>> def step(image, text):
        ...     return contrastive_ops.clip(image, text, scale=20.0)
        >>> if torch.cuda.is_available():
        ...     image, text = (torch.randn(64, 32, device="cuda", requires_grad=True) for _ in range(2))
        ...     step = contrastive_ops.capture(step, image, text)
        ...     step(image, text).backward()
    """
    name = "capture"
    if not callable(step):
        raise TypeError(f"{name}: step must be a function or a module, got {type(step).__name__}")
    if not samples:
        raise ValueError(f"{name}: samples must be one tensor for each argument of the step, got none")
    for position, sample in enumerate(samples):
        if not isinstance(sample, Tensor):
            raise TypeError(f"{name}: samples must be tensors, got {type(sample).__name__} at position {position}")
    if not torch.cuda.is_available():
        raise NotImplementedError(
            f"{name}: a CUDA graph must have a CUDA device, got torch {torch.__version__}, which sees none\n"
            "  call the step itself"
        )
    for position, sample in enumerate(samples):
        if sample.device.type != DEVICE:
            raise ValueError(f"{name}: samples must be on a CUDA device, got {sample.device} at position {position}")
    graphed: Any = torch.cuda.make_graphed_callables(step, samples, allow_unused_input=True)
    kinds = [(sample.shape, sample.dtype, sample.device, sample.requires_grad) for sample in samples]

    def replay(*arguments: Tensor) -> Any:
        _check_arguments(name, arguments, kinds)
        return graphed(*arguments)

    return replay


def _check_arguments(function: str, arguments: tuple[Any, ...], kinds: list[tuple[Any, ...]]) -> None:
    """A graph reads what lies where the samples lay: arguments that are not like them would be read wrongly."""
    if len(arguments) != len(kinds):
        raise ValueError(
            f"{function}: the step must be given {len(kinds)} tensors as its samples, got {len(arguments)}"
        )
    for position, (argument, (shape, dtype, device, requires_grad)) in enumerate(zip(arguments, kinds, strict=True)):
        where = f"at position {position}"
        if not isinstance(argument, Tensor):
            raise TypeError(f"{function}: arguments must be tensors, got {type(argument).__name__} {where}")
        if argument.dtype != dtype:
            raise TypeError(
                f"{function}: arguments must have the dtype of the sample, {dtype}, got {argument.dtype} {where}"
            )
        if argument.shape != shape:
            raise ValueError(
                f"{function}: arguments must have the shape of the sample, {tuple(shape)}, "
                f"got {checks.shape(argument)} {where}\n  capture the step once for each shape"
            )
        if argument.device != device:
            raise ValueError(
                f"{function}: arguments must be on the sample's device, {device}, got {argument.device} {where}"
            )
        if argument.requires_grad != requires_grad:
            raise ValueError(
                f"{function}: arguments must require a gradient where the sample does, "
                f"got requires_grad={argument.requires_grad} {where}"
            )
