"""Functions of the compiled extension called with anything: an error, never the end of the process.

Calls that primitives make are recorded, and one argument after another is replaced by what does not belong there. Every
call runs in a child that says beforehand what it is about to do, so that a signal has a name.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import Pairs, losses, ops, similarity_reduce
from contrastive_ops.core import eager, extension
from contrastive_ops.ops import Capacity, Fold, Gating, Guide, TokenSets

Call = tuple[str, tuple[Any, ...]]
# Sizes whose products leave 64 bits, and numbers beside those that are allowed.
INTEGERS = (-(2**63), -(2**62), -2, -1, 0, 1, 2, 7, 2**31, 2**32 + 1, 2**62 - 1, 2**62, 2**63 - 1, 2**64)
STRANGERS = (None, 1.5, "kl", b"", (), [], [None], object(), float("nan"), 2**70, {}, torch.float32)
SECONDS_OF_A_CALL = 20
# Not SystemError, which is a result with an error set.
ERRORS = (TypeError, ValueError, RuntimeError, MemoryError, NotImplementedError, OverflowError, BufferError)
SPARE_BYTES = 2**28


def _matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def _calls_of_primitives() -> None:
    """Every compiled function at least once, with most of its optional arguments."""
    x, y, ids, col_ids = _matrix(5, 4), _matrix(6, 4), torch.arange(5) % 3, torch.arange(6) % 3
    lists = torch.tensor([0, 2, 2, 3, 3, 4]), torch.tensor([1, 4, 0, 5])
    guide = Guide(torch.randn(5, 3), torch.randn(6, 3), 0.5)
    table = torch.randn(3, 3), ids, col_ids
    pairs = Pairs(differ=(ids, col_ids), exclude=lists, below=1.0, guide=guide, log_weight=table)
    options: dict[str, Any] = {"scale": _matrix(5), "backend": "cpu"}
    for budget in (0, None):
        reduced = similarity_reduce(
            x, y, reduce=(Fold("logsumexp"), Fold("max", pairs=Pairs(diagonal=1))), dim=(0, 1), target=torch.arange(5),
            linear=lists, pairs=pairs, row_bias=_matrix(5), col_bias=_matrix(6), memory_budget=budget, **options
        )  # fmt: skip
        sum(v.sum() for v in (*reduced.rows, *reduced.cols, reduced.target, reduced.linear)).backward()
        ops.similarity_values(x, y, _matrix(6, 3), pairs=pairs, memory_budget=budget, backend="cpu").sum().backward()
        both = ops.similarity_distill(x, y, x, y, dim=(0, 1), memory_budget=budget, backend="cpu")
        both.rows.sum().backward()
    ops.similarity_topk(x, y, 3, pairs=pairs, **options).values.nan_to_num(neginf=0.0).sum().backward()
    folds = ops.similarity_prefix(
        x, y, dims=(2, 4), dim=(0, 1), target=torch.arange(5), pairs=Pairs(differ=(ids, col_ids)), backend="cpu"
    )
    (folds.rows.sum() + folds.cols.sum() + folds.target.sum()).backward()
    losses.info_nce(x, y, scale=3.0, weight=_matrix(5).abs(), backend="cpu").backward()
    losses.info_nce(x, y, scale=3.0, weight=_matrix(5).abs(), reduction="none", backend="cpu").sum().backward()
    sets = [TokenSets(_matrix(n, 3, 4), torch.rand(n, 3) < 0.7) for n in (2, 3)]
    ops.maxsim(*sets, k=2, backend="cpu").nan_to_num(neginf=0.0).sum().backward()
    ops.maxsim_pairs(*sets, (torch.tensor([0, 1]), torch.tensor([2, 0])), backend="cpu").sum().backward()
    logits, gating = _matrix(8, 6), Gating(bias=torch.zeros(6), expert_groups=3, kept_groups=2)
    routing = ops.route(
        logits, 2, capacity=Capacity(factor=1.0), gating=gating, segments=torch.arange(8) % 2, num_segments=2,
        valid=torch.arange(8) != 3, allowed=torch.rand(8, 6) < 0.9, losses=("importance", "z"), backend="cpu"
    )  # fmt: skip
    ops.route(logits, 2, gating=Gating(noise_std=0.5), losses=("load",), backend="cpu").loss.backward()
    rows = ops.dispatch(_matrix(8, 4), routing, backend="cpu")
    (ops.combine(rows, routing, backend="cpu").sum() + routing.loss.sum()).backward()
    ops.route(logits, 2, capacity=2, backend="cpu").gates.sum().backward()
    offsets = torch.tensor([0, 3, 3, 7])
    out = ops.grouped_matmul(_matrix(8, 4), _matrix(3, 4, 5), offsets, _matrix(3, 5), backend="cpu")
    out.sum().backward()
    ops.grouped_matmul(_matrix(8, 4), _matrix(6, 4, 5), routing, backend="cpu").sum().backward()


def recorded() -> list[Call]:
    """One call with valid arguments of every compiled function, or several; in a process that has made none."""
    calls: list[Call] = []
    compiled = extension.functions

    def functions(stem: str) -> SimpleNamespace:
        def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                calls.append((f"{stem}_{name}", arguments))
                return function(*arguments)

            return call

        return SimpleNamespace(**{name: watch(name, f) for name, f in vars(compiled(stem)).items()})

    extension.functions = functions
    try:
        with eager.closed():
            _calls_of_primitives()
    finally:
        extension.functions = compiled
    module: Any = extension.load()
    logits, experts = torch.randn(8, 6), torch.rand(8, 6).argsort(1)[:, :2]
    values, indices = torch.randn(4, 5), torch.arange(20).view(4, 5)
    calls += [
        ("similarity_loss_scale", (values, 2.0)),
        ("similarity_topk_merge", (values, indices, values, indices)),
        ("similarity_topk_order", (values, indices, 3)),
        ("expert_routing_scores", (logits, None, None, None, None, None, None, [2, 0, 0, 1, 1, 0, 1, 0], 0.0)),
        ("expert_routing_slots", (experts, torch.rand(8), torch.zeros(8, dtype=torch.int64), [6, 8, 2, 0, 1])),
        ("grouped_matmul_activate", (values, 0, False)),
        ("grouped_matmul_activate_backward", (torch.randn(4, 3), torch.randn(4, 6), 2, True)),
        ("virtual_cores", (0,)),
        ("read_tensors_by", (None,)),
    ]
    gradients = torch.randn(8, 2), torch.randn(3, 1, 6), torch.randn(2, 1)
    scores = (logits, None, None, None, None, None, [2, 0, 0, 1, 1, 0, 1, 0], 0.0, experts, *gradients)
    calls.append(("expert_routing_scores_backward", scores))
    search = next(arguments for name, arguments in calls if name == "similarity_topk_forward")
    calls.append(("similarity_topk_at", (*search[:7], torch.tensor([[0, 5], [1, -1], [3, 2], [4, 0], [2, 2]]))))
    names = {name for name, _ in calls}
    known = {name for name in dir(module) if name.split("_")[0] in {"expert", "grouped", "maxsim", "similarity"}}
    if known - names - {name for name in known if "_cuda_" in name}:
        raise AssertionError(f"no call of {sorted(known - names)}")
    return calls


def _tensors_like(t: Tensor, draw: random.Random) -> Iterator[tuple[str, Any]]:
    """Tensors that are not what was expected, and entries that address memory they should not."""
    t = t.detach()
    yield "meta", t.to("meta")
    yield "int8", t.to(torch.int8)
    yield "complex", t.to(torch.complex64)
    yield "double", t.double()
    yield "half", t.half()
    yield "integers", t.long()
    yield "scalar", torch.zeros((), dtype=t.dtype)
    yield "nothing", t.flatten()[:0]
    yield "unsqueezed", t[None]
    yield "five dimensions", t.reshape(1, 1, 1, 1, -1)
    yield "sparse", t.to_sparse() if t.dim() else t.new_zeros(1).to_sparse()
    if t.dim():
        yield (
            "expanded",
            t.flatten()[:1].reshape(*[1] * t.dim()).expand(2**31, *[1] * (t.dim() - 1)) if t.numel() else t,
        )
        yield "one row less", t[:-1]
        yield "one row more", torch.cat([t, t[:1]])
        yield "narrow", t[..., :-1]
        yield "gaps", torch.stack([t, t], -1)[..., 0]
        yield "reversed", t.transpose(0, -1)
    if t.dtype == torch.int64 and t.numel():
        for number in (-(2**63), -2, -1, 10**6, 2**31, 2**62, 2**63 - 1):
            changed = t.clone()
            changed.view(-1)[draw.randrange(t.numel())] = number
            yield f"an entry {number}", changed
            yield f"all {number}", torch.full_like(t, number)
    if t.is_floating_point() and t.numel():
        for value in (float("nan"), float("inf"), -float("inf"), 3e38, 1e-42):
            yield f"all {value}", torch.full_like(t, value)


def replacements(value: Any, draw: random.Random) -> Iterator[tuple[str, Any]]:
    """What an argument may be replaced by."""
    for stranger in STRANGERS:
        yield repr(stranger)[:40], stranger
    yield "a tensor", torch.randn(3, 2)
    if isinstance(value, Tensor):
        yield from _tensors_like(value, draw)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from ((str(number), number) for number in INTEGERS)
    elif isinstance(value, (list, tuple)):
        yield "shorter", value[:-1]
        yield "longer", [*value, *value[-1:]]
        for at, entry in enumerate(value):
            for name, other in replacements(entry, draw):
                yield f"[{at}] = {name}", [*value[:at], other, *value[at + 1 :]]
        for name, number in (("all -1", -1), ("all 2^62", 2**62), ("all 1", 1)):
            yield name, [number] * len(value)


def hostile_calls(calls: list[Call], draw: random.Random) -> Iterator[tuple[str, Call]]:
    """Each call with another number of arguments, and with each argument replaced."""
    for name, arguments in calls:
        yield f"{name}: one argument less", (name, arguments[:-1])
        yield f"{name}: one argument more", (name, (*arguments, None))
        for strange in (None, 2**62, 1.5):
            yield f"{name}: all {strange}", (name, (strange,) * len(arguments))
        yield f"{name}: all meta", (name, tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))
        for at, value in enumerate(arguments):
            for text, other in replacements(value, draw):
                yield f"{name}: argument {at} is {text}", (name, (*arguments[:at], other, *arguments[at + 1 :]))


def _attempt(text: str, call: Call, to: int) -> None:
    os.write(to, f"{text}\n".encode())
    signal.alarm(SECONDS_OF_A_CALL)
    name, arguments = call
    with contextlib.suppress(*ERRORS):
        getattr(extension.load(), name)(*arguments)
    signal.alarm(0)


def _limit_memory() -> None:
    """A little more than is in use: sizes that were not meant are refused, instead of filling the machine."""
    with open("/proc/self/statm") as numbers:
        used = int(numbers.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))


def _in_a_child(todo: list[tuple[str, Call]]) -> tuple[int, str | None]:
    """(how many calls were made, the one that ended the child or None)."""
    source, to = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        _limit_memory()
        code = 1
        try:
            for text, call in todo:
                _attempt(text, call, to)
            code = 0
        except BaseException as error:
            os.write(to, f"raised {type(error).__name__}: {str(error)[:200]}\n".encode())
        os._exit(code)
    os.close(to)
    with os.fdopen(source) as lines:
        said = lines.read().splitlines()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return len(said), None
    if said and said[-1].startswith("raised "):
        return len(said) - 1, f"{said[-2]}: {said[-1]}"
    return len(said), f"{said[-1] if said else 'start'}: signal {os.WTERMSIG(status)}"


def failures(seed: int, share: float = 1.0) -> tuple[int, list[str]]:
    """(calls made, what ended the process or raised what it should not); `share` of all calls are drawn."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # a child of a process with threads has none of them
    todo = [(text, call) for text, call in hostile_calls(recorded(), draw) if draw.random() < share]
    found: list[str] = []
    at = 0
    while at < len(todo):
        made, ended = _in_a_child(todo[at : at + 2000])
        at += made
        print(f"{at} of {len(todo)}", file=sys.stderr, flush=True)
        if ended is not None:
            found.append(ended)
    return len(todo), found


if __name__ == "__main__":
    count, ended = failures(int(sys.argv[1]), float(sys.argv[2]))
    print(f"{count} calls", *ended, sep="\n")
    sys.exit(bool(ended))
