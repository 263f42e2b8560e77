"""A hash of arguments, by which a file or another process knows them."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib

import torch
from torch import Tensor

from ..core.rules import Guide, Pairs


def fingerprint(*things: object) -> str:
    """A hash of the bytes of tensors, alone or in Pairs, and of other arguments."""
    digest = hashlib.blake2b(digest_size=16)

    def add(thing: object) -> None:
        if isinstance(thing, (Pairs, Guide)):
            for field in dataclasses.fields(thing):
                add(getattr(thing, field.name))
        elif isinstance(thing, tuple):
            digest.update(f"{len(thing)} ".encode())
            for each in thing:
                add(each)
        elif isinstance(thing, Tensor):
            digest.update(f"{thing.dtype} {tuple(thing.shape)} ".encode())
            data = bytes_of(thing.detach().cpu())
            digest.update((ctypes.c_ubyte * data.numel()).from_address(data.data_ptr()))
        else:
            digest.update(f"{thing!r} ".encode())

    add(things)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as bytes."""
    # A tensor of one number is contiguous whatever its strides are, but not for a view as bytes.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
