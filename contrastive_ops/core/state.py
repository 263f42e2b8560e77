"""Modules with state: tensors that keep their digits whatever the model is cast to, and that belong to one process.

Buffers of a module are cast with its weights: after ``model.bfloat16()`` a bias that grows by 1e-3 a step stops at
0.25. DistributedDataParallel also overwrites them at every step by those of rank 0, although each rank has seen other
samples.

One rule holds for all state that a batch updates: numbers that are not finite are not stored. A step that overflowed,
and that loss scaling skips, leaves the state as it was; what is returned for that batch shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class State(nn.Module):
    """A module some of whose tensors are state.

    They are in the state dict, are copied and pickled, and follow ``.to(device)`` and ``.to_empty``.

    Attributes:
        digits: names of tensors that no cast makes narrower: floating ones become at most wider, others stay.
        own: names of tensors that belong to this process: no buffers, so that nothing broadcasts or casts them.
            Subclasses assign them like any attribute.
    """

    digits: ClassVar[tuple[str, ...]] = ()
    own: ClassVar[tuple[str, ...]] = ()

    def reset(self) -> None:
        """Back to the start."""
        raise NotImplementedError(f"{type(self).__name__}.reset: the state must be made anew or loaded")

    def reset_parameters(self) -> None:
        """Put back what the constructor made: a module that was made on the meta device holds nothing until then."""
        self.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> State:
        before = {name: getattr(self, name) for name in {*self.digits, *self.own}}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if old is None:
                continue
            new = fn(old) if name in self.own else getattr(self, name)
            if name in self.digits and new.dtype != old.dtype:
                wider = old.is_floating_point() and torch.promote_types(old.dtype, new.dtype) == new.dtype
                new = old.to(device=new.device, dtype=new.dtype if wider else old.dtype)
            setattr(self, name, new)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.own:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in self.own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for name in self.own:
            own, key = getattr(self, name), prefix + name
            if key not in state_dict:
                missing_keys.extend([key] if strict else [])
            elif state_dict[key].shape != own.shape:
                error_msgs.append(
                    f"size mismatch for {key}: copying a tensor of shape {tuple(state_dict[key].shape)} from the "
                    f"checkpoint, the shape in this module is {tuple(own.shape)}."
                )
            elif local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, state_dict[key].to(own.dtype))
            else:
                own.copy_(state_dict[key])
