"""The torch.library operator similarity_loss: schema, fake, autograd.

Where what arrives at each row is known before the sweep its gradients are formed in forward. Elsewhere the slopes of
the rows are, and backward is that of `similarity_reduce`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import autocast, extension, unit_lengths
from ..core.backends import Backend
from ..core.checks import accumulator, check_index_values, may_read
from ..core.derivatives import alias, grad, gradient_shapes, to_inputs
from ..core.operators import call, define
from ..core.problem import Layout
from ..reference.row_losses import FOLDS, Terms, reduced, row_losses
from ..reference.similarity_loss import in_one_pass, usual_target
from ._idle_rows import cleaned

_SCHEMA = (
    "(Tensor x, Tensor? y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? target, Tensor[] pair_data,"
    " SymInt[] spec, Tensor? weight, Tensor? extra, Tensor? target_weight, Tensor? count, str kind, str reduction,"
    " int needs, SymInt kept_size, str backend)"
    " -> (Tensor loss, Tensor folds, Tensor slopes, Tensor kept, Tensor dx, Tensor dy, Tensor dscale,"
    " Tensor drow_bias, Tensor dcol_bias)"
)
# Bit b of `needs` stands for input b of these; pair_data and spec come after the target.
_SWEPT, _TERMS = slice(0, 5), slice(8, 11)
_X, _Y, _TARGET, _PAIR_DATA, _SPEC, _COUNT, _KIND = 0, 1, 5, 6, 7, 11, 12


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operator; `backends` says where each backend's functions are."""

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *problem, backend = arguments
        x, y, target = problem[_X], problem[_Y], problem[_TARGET]
        if target is not None:  # CUDA kernels give NaN for one that does not exist
            columns = (x if y is None else y).shape[0]
            check_index_values("similarity_loss", "target", target, columns, waits=backend != "cuda")
        with autocast.disabled(x):
            function = backends[backend].functions().forward
            kind, reduction, needs, _ = problem[_KIND:]
            if problem[_PAIR_DATA] and in_one_pass(kind, reduction, y is None, needs):
                own = usual_target(x, y) if target is None else target
                problem[_X], problem[_Y], *described = cleaned(x, y, own, *problem[_PAIR_DATA : _SPEC + 1])
                problem[_PAIR_DATA : _SPEC + 1] = described
            found: tuple[Tensor, ...] = unit_lengths.run(function, problem, backend == "reference", 4)
            return found

    define("similarity_loss", _SCHEMA, forward, _fake, _setup, _derivative)


def needed(*differentiable: Tensor | None) -> int:
    """`needs` for x, y, scale, row_bias, col_bias, weight, extra, target_weight: bit b stands for input b."""
    if not torch.is_grad_enabled():
        return 0
    return sum(1 << bit for bit, each in enumerate(differentiable) if each is not None and each.requires_grad)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, y, scale = arguments[:3]
    kind, reduction, needs, kept_size, _ = arguments[_KIND:]
    rows, like = x.shape[0], x.new_empty((0,), dtype=accumulator(x.dtype))
    one_pass = in_one_pass(kind, reduction, y is None, needs)
    of_folds = len(FOLDS[kind]) if needs and not one_pass else 0
    of_terms = sum(each is not None for each in arguments[_TERMS]) if needs else 0
    shapes = [
        (rows,) if reduction == "none" else (),
        (of_folds * rows,),
        ((of_terms + of_folds + bool(of_folds)) * rows,),
        (kept_size if of_folds else 0,),
        *gradient_shapes(x, y, scale, needs if one_pass else 0),
    ]
    return tuple(like.new_empty(shape) for shape in shapes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pair_data = inputs[_PAIR_DATA]
    ctx.save_for_backward(*inputs[:_PAIR_DATA], *pair_data, *inputs[_SPEC + 1 : _KIND], *output[1:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.spec, ctx.pair_count = inputs[_SPEC], len(pair_data)
    ctx.kind, ctx.reduction, ctx.needs, _, ctx.backend = inputs[_KIND:]


def _derivative(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    end = _PAIR_DATA + ctx.pair_count
    problem = [*tensors[:_PAIR_DATA], tensors[_PAIR_DATA:end], ctx.spec]
    *terms, count = tensors[end : end + 4]
    if d_loss is None:
        gradients, of_terms = (None,) * 5, (None,) * 3
    elif torch.is_grad_enabled():
        gradients, of_terms = _again(ctx, problem, terms, count, d_loss)
    else:
        gradients, of_terms = _gradients(ctx, problem, terms, tensors[end + 4 :], d_loss)
    return (*gradients, None, [None] * ctx.pair_count, None, *of_terms, *(None,) * 6)


def _gradients(
    ctx: Any, problem: list[Any], terms: list[Tensor | None], found: list[Tensor], d_loss: Tensor
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """From what forward found: scaled out of place, so that the graph can be retained."""
    folds, slopes, kept, *formed = found
    x, y, kind = problem[_X], problem[_Y], ctx.kind
    given = [each is not None for each in terms]
    one_pass = in_one_pass(kind, ctx.reduction, y is None, ctx.needs)
    lines, give = sum(given) + (0 if one_pass else len(FOLDS[kind]) + 1), may_give(d_loss)
    scaled = slopes if give else (slopes.view(lines, x.shape[0]) * d_loss).view(-1)
    # `extra` comes before `weight` in the operator's results.
    rows, places = x.shape[0], {at: place for place, at in enumerate(at for at in (1, 0, 2) if given[at])}
    of_terms = tuple(
        None if each is None or not ctx.needs >> 5 + at & 1 else scaled[places[at] * rows :][:rows].to(each.dtype)
        for at, each in enumerate(terms)
    )
    swept = ctx.needs & 31
    if not swept:
        return (None,) * 5, of_terms
    if one_pass:
        gradients = formed if give else [times(each, d_loss) for each in formed]
        return to_inputs(problem, gradients, swept), of_terms
    d_folds, d_target = scaled[sum(given) * rows :].split([folds.shape[0], rows])
    target = usual_target(x, y) if problem[_TARGET] is None else problem[_TARGET]
    again = (*problem[:_TARGET], target, *problem[_PAIR_DATA:])
    no_winners = torch.empty_like(target[:0])
    gradients = call.similarity_reduce_backward(
        *again, folds, no_winners, d_folds, d_target, None, kept, swept, ctx.backend
    )
    return to_inputs(problem, gradients, swept), of_terms


# From here on a product is worth tasks of our own: torch's take whole passes over fresh memory.
_WORTH_TASKS = 1 << 20


def times(gradient: Tensor, d_loss: Tensor) -> Tensor:
    """``gradient * d_loss``, in tasks where it is large and on the CPU."""
    kernels = extension.load() if gradient.numel() >= _WORTH_TASKS and gradient.device.type == "cpu" else None
    plain = type(gradient) is Tensor and type(d_loss) is Tensor and not torch._C._len_torch_dispatch_stack()
    if kernels is None or not plain or d_loss.dim() or not may_read(d_loss):
        return gradient * d_loss
    scaled: Tensor = kernels.similarity_loss_scale(gradient, d_loss.item())
    return scaled


def may_give(d_loss: Tensor) -> bool:
    """Whether what forward found may be given away as it is: the factor is 1, and no kept graph needs it again.

    The factor is looked at where that costs nothing: not in a traced program.
    """
    traced = type(d_loss) is not Tensor or torch._C._len_torch_dispatch_stack()
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return not d_loss.dim() and may_read(d_loss) and d_loss.item() == 1


def _again(
    ctx: Any, problem: list[Any], terms: list[Tensor | None], count: Tensor | None, d_loss: Tensor
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The same gradients as functions of the inputs, for second derivatives."""
    aliases = [alias(t) for t in (*problem[_SWEPT], *terms)]
    (x, y), target = aliases[:2], problem[_TARGET]
    target = usual_target(x, y) if target is None else target
    folds, _, logit, _, _ = call.similarity_reduce_forward(*aliases[:5], target, *problem[_PAIR_DATA:], 0, ctx.backend)
    each = folds.split(Layout.decode(*problem[_PAIR_DATA:]).sizes(x.shape[0], (x if y is None else y).shape[0]))
    weight, extra, target_weight = aliases[5:]
    of_rows = Terms(weight, extra, target_weight, count)
    loss = reduced(row_losses(ctx.kind, each, logit, of_rows), logit, of_rows, ctx.reduction)
    leaves = [a for a in aliases if a is not None and a.requires_grad]
    found = iter(grad([loss], leaves, [d_loss]))
    gradients = tuple(next(found) if a is not None and a.requires_grad else None for a in aliases)
    return gradients[:5], gradients[5:]
