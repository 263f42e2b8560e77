"""The only place that words errors about arguments: `function: argument must ..., got ...`."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Without uint64, half of which are no int64.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape(tensor: Tensor) -> str:
    """Return a shape as users write it: (4096, 512)."""
    return str(tuple(tensor.shape))


def shown(value: object) -> str:
    """Return a value for a message: of tensors and arrays only what they are, of anything else a line at most."""
    if isinstance(value, (list, tuple)) and any(hasattr(each, "shape") for each in value):
        return f"a {type(value).__name__} of {len(value)}, with tensors"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    if dataclasses.is_dataclass(value) or isinstance(value, dict):
        return f"{type(value).__name__}(...)"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(function: str, name: str, x: object) -> Tensor:
    """Return `x`, which must be a tensor of a kind that the operators can read."""
    kind = type(x)
    if (kind is Tensor or kind is torch.nn.Parameter) and x.layout is torch.strided and not x.is_nested:  # type: ignore[attr-defined]
        return x  # type: ignore[return-value]
    if not isinstance(x, Tensor):
        advice = "\n  torch.fx.symbolic_trace cannot trace it, torch.export can" if kind.__name__ == "Proxy" else ""
        raise TypeError(f"{function}: {name} must be a tensor, got {kind.__name__}{advice}")
    if (found := unreadable(x)) is not None:
        got, advice = found
        raise NotImplementedError(f"{function}: {name} must be a plain tensor, got {got}\n  {advice}")
    return x


def unreadable(x: Tensor) -> tuple[str, str] | None:
    """What kind of tensor `x` is and what to do with it, if no operator can read it."""
    kind = type(x)
    plain = (kind is Tensor or kind is torch.nn.Parameter) and x.layout is torch.strided and not x.is_nested
    if plain or torch.compiler.is_compiling():
        return None
    if x.is_nested:
        return "a nested tensor", "pad it, torch.nested.to_padded_tensor, or give its values() and offsets()"
    if x.layout is not torch.strided:
        return f"one of layout {x.layout}", "make it dense first: to_dense()"
    names = [each.__name__ for each in kind.__mro__]
    if "DTensor" in names:
        return (
            "a DTensor",
            "to_local() gives the loss of the rows of this process alone, full_tensor() that of the rows of all",
        )
    if "MaskedTensor" in names:
        return "a MaskedTensor", "give its get_data(), and what is masked as valid=, mask=, weight= or pairs="
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or "FakeTensor" in names:
        return None
    if kind not in _READABLE:
        try:
            _READABLE[kind] = isinstance(torch.ops.contrastive_ops.probe(x.detach()), Tensor)
        except Exception:
            _READABLE[kind] = False
    return None if _READABLE[kind] else (f"{kind.__name__}, which runs no operators but its own", "dequantize() it")


# Of the subclasses that have been seen, whether they run operators that they do not know.
_READABLE: dict[type, bool] = {}


def check_floating(function: str, name: str, x: object) -> Tensor:
    """Return `x`, which must be a floating tensor."""
    x = check_tensor(function, name, x)
    if x.dtype not in FLOATING:
        advice = "dequantize" if x.is_quantized else "float"
        raise TypeError(
            f"{function}: {name} must be float32, float64, bfloat16 or float16, got {x.dtype}\n"
            f"  convert it first: {name}.{advice}()"
        )
    return x


def check_matrix(function: str, name: str, x: object) -> None:
    """`x` must be a floating matrix."""
    kind = type(x)
    plain = (kind is Tensor or kind is torch.nn.Parameter) and x.layout is torch.strided  # type: ignore[attr-defined]
    if plain and x.dim() == 2 and x.dtype in FLOATING and not x.is_nested:  # type: ignore[attr-defined]
        return
    x = check_floating(function, name, x)
    if x.dim() != 2:
        raise ValueError(f"{function}: {name} must have two dimensions (rows, D), got {shape(x)}")


def check_matrices(function: str, x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """`y` must be a matrix that has inner products with the rows of `x`."""
    check_matrix(function, x_name, x)
    check_matrix(function, y_name, y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{function}: {y_name} must have the same last dimension as {x_name}, "
            f"got {x_name} {shape(x)} and {y_name} {shape(y)}"
        )
    if x.dtype != y.dtype:
        raise TypeError(
            f"{function}: {y_name} must have the same dtype as {x_name}, got {x_name} {x.dtype} and "
            f"{y_name} {y.dtype}\n  convert one of them, or use torch.autocast"
        )
    if x.device != y.device:
        check_device(function, x_name, x, y_name, y)


def check_device(function: str, x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """`y` must be on the device of `x`."""
    if x.device != y.device:
        raise ValueError(
            f"{function}: {y_name} must be on the same device as {x_name}, "
            f"got {x_name} on {x.device} and {y_name} on {y.device}"
        )


def check_vector(function: str, name: str, v: object, size: int, x_name: str, x: Tensor) -> None:
    """`v` must be a floating vector of `size` numbers on the device of `x`."""
    v = check_tensor(function, name, v)
    if v.dtype not in FLOATING:
        raise TypeError(f"{function}: {name} must be a floating tensor, got {v.dtype}")
    if v.dim() != 1 or v.shape[0] != size:
        raise ValueError(f"{function}: {name} must have shape ({size},), got {shape(v)}")
    check_device(function, x_name, x, name, v)


def from_array(function: str, name: str, value: Any) -> Any:
    """Return a numpy array as a tensor, copied where it may not be written to; everything else as it is."""
    if isinstance(value, Tensor) or not hasattr(value, "__array_interface__"):
        return value
    try:
        return torch.from_numpy(value if value.flags.writeable and min((*value.strides, 0)) >= 0 else value.copy())
    except (TypeError, ValueError, AttributeError):
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{function}: {name} must be a tensor or an array of numbers, got an array of {kind}") from None


def as_index(function: str, name: str, index: object) -> Tensor:
    """Return a tensor of labels, ids or places as int64; any integer dtype is one."""
    index = check_tensor(function, name, index)
    if index.dtype == torch.int64:
        return index
    if index.dtype not in INTEGERS:
        raise TypeError(f"{function}: {name} must be int64, got {index.dtype}\n  any integer dtype up to that will do")
    return index.to(torch.int64)


def check_index(function: str, name: str, index: object, rows: int | None, x_name: str, x: Tensor) -> Tensor:
    """Return a vector of integers, of `rows` where that is given, on the device of `x`, as int64."""
    kind: Any = index
    is_plain = type(index) is Tensor and kind.dtype == torch.int64 and kind.layout is torch.strided
    found: Tensor = kind if is_plain and not kind.is_nested else as_index(function, name, index)
    if found.dim() != 1 or (rows is not None and found.shape[0] != rows):
        raise ValueError(f"{function}: {name} must have shape ({'n' if rows is None else rows},), got {shape(found)}")
    if found.device != x.device:
        check_device(function, x_name, x, name, found)
    return found


def check_lists(
    function: str, name: str, lists: tuple[Tensor, ...], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Check lists of columns per row; return (indptr, indices) as int64, and whether the columns of each row ascend.

    Kernels search the lists, which is why a traced program sorts where it cannot look whether it must: then False.
    """
    columns = y.shape[0]
    indptr = check_index(function, f"{name} indptr", lists[0], x.shape[0] + 1, "x", x)
    indices = check_index(function, f"{name} indices", lists[1], None, "x", x)
    if not may_read(indptr, waits=True):
        return indptr, indices, False
    lengths = indptr.diff()
    falls, begin, end = bool((lengths < 0).any()), int(indptr[0]), int(indptr[-1])
    if falls or begin != 0 or end != indices.shape[0]:
        raise ValueError(
            f"{function}: {name} indptr must rise from 0 to the {indices.shape[0]} indices, "
            f"got {begin} to {end}" + (", not monotonic" if falls else "")
        )
    row = torch.repeat_interleave(lengths)
    low, high = map(int, indices.aminmax()) if end else (0, -1)
    if low < 0 or high >= columns:
        at = int(((indices < 0) | (indices >= columns)).nonzero()[0])
        raise ValueError(
            f"{function}: {name} indices must be in [0, {columns}), got {int(indices[at])} in the list of row "
            f"{int(row[at])}"
        )
    place = row * columns + indices  # in the matrix
    return indptr, indices, bool((place[1:] >= place[:-1]).all())


# Kinds of tensors without numbers.
_TRACED = ("FakeTensor", "FunctionalTensor")


def may_read(tensor: Tensor, *, waits: bool = False) -> bool:
    """Whether a check may look at numbers: a traced or meta tensor has none, and a GPU would have to be waited for.

    A step of training that waits for the GPU lets it idle until the next kernel is started, and cannot be captured as a
    CUDA graph; so a check that `waits` is only for what would be wrong without a word, or out of bounds, otherwise.
    """
    # torch 2.6 does not call it compiling where it traces a backward pass.
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or type(tensor).__name__ in _TRACED:
        return False
    if torch._C._are_functorch_transforms_active() and _in_vmap(tensor):
        return False
    if torch._C._functorch.is_legacy_batchedtensor(tensor):  # of torch.autograd.grad(..., is_grads_batched=True)
        return False
    return waits or tensor.device.type != "cuda"


def numbers_in(tensor: Tensor) -> list[Any]:
    """``tensor.tolist()``, also of one that `torch.func` has wrapped, which torch 2.6 cannot read."""
    if torch._C._are_functorch_transforms_active():
        return [each.item() for each in tensor]
    found: list[Any] = tensor.tolist()
    return found


def _in_vmap(tensor: Tensor) -> bool:
    """Whether `tensor` stands for a batch of tensors, none of which can be read on its own."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def check_index_values(
    function: str, name: str, index: Tensor, columns: int, or_none: bool = False, *, waits: bool = True
) -> None:
    """Every number must exist (or be -1 for none), where `may_read` says that it can be looked at."""
    if not may_read(index, waits=waits) or index.numel() == 0:
        return
    low, high = (int(extreme) for extreme in index.aminmax())
    lowest = -1 if or_none else 0
    if low < lowest or high >= columns:
        got = low if low < lowest else high
        raise ValueError(f"{function}: {name} must be in [{lowest}, {columns}), got {got}")


def check_constant(function: str, name: str, tensor: Tensor) -> None:
    """`tensor` must not ask for a gradient that nobody computes."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{function}: {name} must not require a gradient, got one that does; detach it")


def check_choice(function: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """`value` must be one of `choices`."""
    if isinstance(value, Tensor) or value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{function}: {name} must be one of {known}, got {shown(value)}")


def number(function: str, name: str, value: object, interval: str = "(-inf, inf)") -> float:
    """Return the option `value` as a float in `interval`, which is written as in mathematics: "[0, 1)".

    A number is one of Python or numpy, or a tensor or array of any shape with one element, which is read; a tensor that
    requires a gradient is refused, since an option has none. A bool or a string is no number.
    """
    found: Any = value if type(value) is float else plain(function, name, value)
    if type(found) is int:
        found = float(found)
    low, high = interval[1:-1].split(",")
    above = found >= float(low) if interval[0] == "[" else found > float(low)
    below = found <= float(high) if interval[-1] == "]" else found < float(high)
    if not (above and below):
        raise ValueError(f"{function}: {name} must be in {interval}, got {found}")
    return found


def integer(function: str, name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """`number` for options that are counted: an int, at least `low` and at most `high` where they are given.

    A size that is traced (torch.SymInt) stays one.
    """
    found: Any = value if type(value) is int else plain(function, name, value, "an int", numbers.Integral)
    if high is not None and not (found <= high and (low is None or low <= found)):
        raise ValueError(f"{function}: {name} must be in [{'-inf' if low is None else low}, {high}], got {found}")
    if low is not None and found < low:
        raise ValueError(f"{function}: {name} must be at least {low}, got {found}")
    return found


def plain(function: str, name: str, value: object, words: str = "a number", kind: type = numbers.Real) -> Any:
    """Return the number that `value` is or, as a tensor or array with one element, holds: an int or a float."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if kind is numbers.Real and (type(value) is float or isinstance(value, torch.SymFloat)):
        return value
    got = type(value).__name__
    if isinstance(value, Tensor):
        got = f"a tensor of {value.dtype} with shape {shape(value)}"
        if torch.compiler.is_compiling() or value.device.type == "meta":
            raise TypeError(f"{function}: {name} must be {words} of Python where it is traced, got {got}")
        if value.numel() == 1:
            check_constant(function, name, value)
            value = value.item()
    elif hasattr(value, "item") and hasattr(value, "dtype"):  # numpy's scalars and arrays
        if torch.compiler.is_compiling():
            raise TypeError(f"{function}: {name} must be {words} of Python where it is traced, got {got}")
        value = value.item() if getattr(value, "size", 0) == 1 else value
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{function}: {name} must be {words}, got {got}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)  # type: ignore[arg-type]


def listed(function: str, name: str, values: object) -> list[Any]:
    """Return the elements of a list, tuple, range, or tensor or array of one dimension."""
    if hasattr(values, "tolist") and getattr(values, "ndim", 0) == 1:  # of torch or numpy
        return values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(f"{function}: {name} must be a tuple or list of numbers, got {type(values).__name__}")
    return list(values)


def flag(function: str, name: str, value: object) -> bool:
    """`value` must be a bool: "false" would be true."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be True or False, got {shown(value)}")
    return value


def option(function: str, name: str, value: object, annotation: str) -> None:
    """An option from a configuration file must be of the kind that the function takes: "1e-2" and "true" are none."""
    kinds = {each.strip() for each in annotation.split("|")}
    if value is None or not kinds <= {"bool", "int", "float", "str", "Tensor", "None"}:
        return
    if isinstance(value, Tensor) and "Tensor" in kinds:
        return
    if kinds <= {"bool", "None"}:
        flag(function, name, value)
    elif "str" in kinds:
        if not isinstance(value, str) and not (isinstance(value, bool) and "bool" in kinds):
            raise TypeError(f"{function}: {name} must be a string, got {shown(value)}")
    elif "float" in kinds:
        plain(function, name, value)
    elif "int" in kinds:
        integer(function, name, value)
    else:
        check_tensor(function, name, value)


def factor(function: str, name: str, value: object) -> float | Tensor:
    """Return a scale, a temperature or a bias: a float, a 0-d tensor, or a tensor that has one of each row.

    A tensor with one element of any shape becomes 0-d, and its gradient has its own shape: parameters are often (1,),
    which FSDP can shard.
    """
    if not isinstance(value, Tensor):
        if type(value) is float:
            return value
        found = plain(function, name, value)
        return float(found) if type(found) is int else found
    check_tensor(function, name, value)
    if value.dim() and value.numel() == 1:
        value = value.reshape(())
    if value.is_floating_point():
        return value
    if value.dim() or value.dtype == torch.bool or value.is_complex() or value.is_quantized:
        raise TypeError(f"{function}: {name} must be a number or a floating tensor, got {value.dtype}")
    return value.to(torch.get_default_dtype())


def scale_tensor(function: str, scale: object, x_name: str, x: Tensor, name: str = "scale") -> Tensor:
    """Return `factor`, one or one per row of `x`, in the accumulation dtype on the device of `x`."""
    dtype = accumulator(x.dtype)
    found = scale if type(scale) is float else factor(function, name, scale)
    if not isinstance(found, Tensor):
        return torch.full((), found, dtype=dtype, device=x.device)
    if found.dim():
        if found.dim() > 1 or found.shape[0] != x.shape[0]:
            raise ValueError(f"{function}: {name} must be one number or have shape ({x.shape[0]},), got {shape(found)}")
        # A single number on the CPU may meet tensors of any device, as in plain PyTorch.
        check_device(function, x_name, x, name, found)
    return found.to(device=x.device, dtype=dtype)


def one_number(function: str, name: str, value: object, x_name: str, x: Tensor) -> Tensor:
    """`scale_tensor` for what is the same for all rows: 0-d."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{function}: {name} must be one number, got a tensor of shape {shape(value)}")
    return scale_tensor(function, value, x_name, x, name)
