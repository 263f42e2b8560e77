"""A primitive's operators from one declaration: what it takes and returns, and what its derivative reads.

Schemas, fake tensors, what is kept for the derivative, the order of gradients and the second derivative follow from it.

    declare(Declaration("similarity_values", takes="Tensor x, ...", differentiable=6, returns="Tensor sums, ...",
                        reads="x y ... sums lse d_sums kept", shapes=..., reference=...), BACKENDS)

defines contrastive_ops::similarity_values_forward and similarity_values_backward. The derivative of the backward is
that of the reference, whatever the backend was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import autocast
from .backends import Backend
from .checks import accumulator
from .derivatives import alias, grad, needed, second_derivative, to_inputs
from .operators import call, define

# Arguments by their names in the schema.
Named = dict[str, Any]
Shapes = Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Declaration:
    """Two operators, the second of which is the derivative of the first.

    Attributes:
        stem: the primitive.
        takes: the schema of what forward takes. The last argument, the backend, is added.
        differentiable: how many arguments have gradients, from the first on; backward returns them in this order.
        returns: the schema of what forward returns.
        reads: the names of what backward takes: arguments, outputs, and ``d_<output>`` for what arrives at those that
            are differentiable. The bits of the gradients that are needed and the backend are added.
        shapes: of the outputs.
        dtypes: of outputs that are not in the dtype of accumulation.
        reference: the module whose ``backward`` is differentiated for second derivatives.
        value: a function of the differentiable and the other arguments that is differentiated twice instead; the
            output that has a gradient.
        check: what is checked when the operator runs, where tensors have values.
        clean: what of the arguments, by name, is to be replaced before backward (True) or forward (False) runs on them.
        finish: changes gradients before they get the dtypes of the inputs.
    """

    stem: str
    takes: str
    differentiable: int
    returns: str
    reads: str
    shapes: Callable[[Named], Shapes]
    reference: Any
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    value: Callable[..., Tensor] | None = None
    check: Callable[[Named], None] | None = None
    clean: Callable[[Named, bool], Named] | None = None
    finish: Callable[[Named, Any], Any] | None = None

    def cleaned(self, names: Sequence[str], arguments: Sequence[Any], backward: bool) -> Sequence[Any]:
        """The arguments as backends get them; these are the names of the first of them."""
        if self.clean is None:
            return arguments
        given = dict(zip(names, arguments, strict=False))
        return [*(given | self.clean(given, backward)).values(), *arguments[len(names) :]]


def declare(declaration: Declaration, backends: Mapping[str, Backend], name: str = "forward") -> None:
    """Define ``<stem>_<name>``, and its derivative with the first of a stem."""
    pair = _Operators(declaration, backend_function(backends, name), f"{declaration.stem}_backward")
    schema = f"({declaration.takes}, str backend) -> ({declaration.returns})"
    define(f"{declaration.stem}_{name}", schema, pair.forward, pair.forward_fake, pair.setup, pair.derivative)
    if name == "forward":
        derivative = _Derivative(pair)
        function = backend_function(backends, "backward")

        def backward(*arguments: Any) -> Any:
            return function(*declaration.cleaned(pair.reads, arguments, True))

        define(pair.backward, derivative.schema, backward, derivative.fake, derivative.setup, derivative.derivative)


def backend_function(backends: Mapping[str, Backend], name: str) -> Callable[..., Any]:
    """The function `name` of the backend that the last argument names, outside of any autocast region."""

    def function(*arguments: Any) -> Any:
        *problem, backend = arguments
        run = getattr(backends[backend].functions(), name)
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return run(*problem)
        with autocast.disabled(problem[0]):
            return run(*problem)

    return function


class _Places:
    """Where some of an operator's values stand among all of them, so that a context can keep them."""

    def __init__(self, kept: Sequence[str], among: Sequence[str], kinds: Mapping[str, str]) -> None:
        places = [(slot, among.index(name), kinds[name]) for slot, name in enumerate(kept) if name in among]
        self.size = len(kept)
        self.tensors = [(slot, place) for slot, place, kind in places if kind in ("Tensor", "Tensor?")]
        self.tensor_places = [place for _, place in self.tensors]
        self.lists = [(slot, place) for slot, place, kind in places if kind == "Tensor[]"]
        self.numbers = [(slot, place) for slot, place, kind in places if not kind.startswith("Tensor")]
        self.number_places = [place for _, place in self.numbers]

    def save(self, ctx: Any, values: Sequence[Any]) -> None:
        tensors, ctx.lengths = list(map(values.__getitem__, self.tensor_places)), []
        for _, place in self.lists:
            tensors += values[place]
            ctx.lengths.append(len(values[place]))
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # a gradient of zeros for kept products would be as large as the matrix
        ctx.numbers = list(map(values.__getitem__, self.number_places))

    def load(self, ctx: Any) -> list[Any]:
        """All that is kept, with None where nothing was."""
        tensors = iter(ctx.saved_tensors)
        found: list[Any] = [None] * self.size
        for slot, _ in self.tensors:
            found[slot] = next(tensors)
        for (slot, _), length in zip(self.lists, ctx.lengths, strict=True):
            found[slot] = [next(tensors) for _ in range(length)]
        for (slot, _), number in zip(self.numbers, ctx.numbers, strict=True):
            found[slot] = number
        return found


class _Operators:
    """The first operator of a declaration; places are worked out here, not at every call."""

    def __init__(self, declaration: Declaration, function: Callable[..., Any], backward: str) -> None:
        self.declaration, self.backward = declaration, backward
        self.kinds = {argument: kind for kind, argument in (part.split() for part in declaration.takes.split(", "))}
        self.names = list(self.kinds)
        self.outputs = [output.split()[1] for output in declaration.returns.split(", ")]
        self.leading = self.names[: declaration.differentiable]
        self.reads = declaration.reads.split()
        # Where backward takes what arrives at an output: the slot and the output.
        self.upstream = [
            (slot, self.outputs.index(name[2:]))
            for slot, name in enumerate(self.reads)
            if name[:2] == "d_" and name[2:] in self.outputs
        ]
        self.kinds |= dict.fromkeys(self.outputs, "Tensor")
        arriving = "Tensor?" if len(self.upstream) > 1 else "Tensor"
        self.kinds |= dict.fromkeys((self.reads[slot] for slot, _ in self.upstream), arriving)
        differentiable = {place for _, place in self.upstream}
        self.constants = [place for place in range(len(self.outputs)) if place not in differentiable]
        self.lists = [place for place, argument in enumerate(self.names) if self.kinds[argument] == "Tensor[]"]
        self.places = _Places(self.reads, [*self.names, *self.outputs], self.kinds)
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        if self.declaration.check is not None:
            self.declaration.check(dict(zip(self.names, arguments, strict=False)))
        if self.declaration.clean is None:
            return self.function(*arguments)
        return self.function(*self.declaration.cleaned(self.names, arguments, False))

    def forward_fake(self, x: Tensor, *arguments: Any) -> Any:
        shapes = self.declaration.shapes(dict(zip(self.names, (x, *arguments), strict=False)))
        dtypes = [self.declaration.dtypes.get(output, accumulator(x.dtype)) for output in self.outputs]
        found = tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        return found if len(found) > 1 else found[0]

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        output = (output,) if isinstance(output, Tensor) else output
        self.places.save(ctx, (*inputs[:-1], *output))
        ctx.mark_non_differentiable(*map(output.__getitem__, self.constants))
        # An output that was not asked for is empty, and so is whatever gradient arrives for it.
        ctx.asked = [len(self.upstream) == 1 or output[place].numel() > 0 for _, place in self.upstream]
        ctx.counts, ctx.backend = [len(inputs[place]) for place in self.lists], inputs[-1]

    def derivative(self, ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
        rest: list[Any] = [None] * (len(self.names) + 1)
        for place, count in zip(self.lists, ctx.counts, strict=True):
            rest[place] = [None] * count
        if all(d_outputs[place] is None for _, place in self.upstream):
            return tuple(rest)
        values = self.places.load(ctx)
        for (slot, place), asked in zip(self.upstream, ctx.asked, strict=True):
            values[slot] = d_outputs[place] if asked else None
        needs = needed(ctx, len(self.leading))
        gradients = getattr(call, self.backward)(*values, needs, ctx.backend)
        if self.declaration.finish is not None:
            gradients = self.declaration.finish(dict(zip(self.reads, values, strict=True)), gradients)
        return (*to_inputs(values, gradients, needs), *rest[len(self.leading) :])


class _Derivative:
    """The second operator of a declaration, and its own derivative."""

    def __init__(self, pair: _Operators) -> None:
        self.declaration, self.names, self.kinds, self.leading = pair.declaration, pair.reads, pair.kinds, pair.leading
        takes = ", ".join(f"{pair.kinds[name]} {name}" for name in pair.reads)
        returns = ", ".join(f"Tensor d{name}" for name in pair.leading)
        self.schema = f"({takes}, int needs, str backend) -> ({returns})"
        # Outputs do not count as inputs where a function of the arguments is differentiated.
        by_value = pair.declaration.value is not None
        self.kept = [name for name in pair.reads if not by_value or name not in pair.outputs]
        self.places = _Places(self.kept, pair.reads, pair.kinds)
        self.arriving = pair.reads[pair.upstream[0][0]]

    def fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        given, needs = dict(zip(self.names, arguments, strict=False)), arguments[-2]
        x, second = arguments[0], given[self.leading[1]]
        columns = x if second is None else second
        ends = {"row_bias": (x.shape[0],), "col_bias": (columns.shape[0],)}
        found = []
        for bit, name in enumerate(self.leading):
            tensor = x if given[name] is None else given[name]
            shape = ends.get(name, tuple(tensor.shape))
            wanted = needs >> bit & 1 and not (bit == 1 and second is None)
            found.append(x.new_empty(shape if wanted else (0, *shape[1:]), dtype=accumulator(x.dtype)))
        return tuple(found)

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.places.save(ctx, inputs)
        ctx.needs = inputs[-2]

    def derivative(self, ctx: Any, *d_gradients: Tensor | None) -> tuple[Any, ...]:
        values = self.places.load(ctx)
        by_name: Named = {
            name: [None] * len(value) if self.kinds[name] == "Tensor[]" else None
            for name, value in zip(self.kept, values, strict=True)
        }
        by_name |= (self._by_backward if self.declaration.value is None else self._by_value)(ctx, values, d_gradients)
        return (*(by_name.get(name) for name in self.names), None, None)

    def _by_backward(self, ctx: Any, values: list[Any], d_gradients: tuple[Tensor | None, ...]) -> Named:
        with torch.enable_grad(), autocast.disabled(values[0]):
            # Aliases: only what this operator itself does with an input counts, not how outputs came from inputs.
            leaves = [alias(value) if isinstance(value, Tensor) else value for value in values]
            names = [
                name
                for name, leaf in zip(self.kept, leaves, strict=True)
                if isinstance(leaf, Tensor) and leaf.requires_grad
            ]
            wanted = [leaves[self.kept.index(name)] for name in names]
            gradients = self.declaration.reference.backward(
                *self.declaration.cleaned(self.kept, leaves, True), ctx.needs
            )
            both = [(g, d) for g, d in zip(gradients, d_gradients, strict=True) if d is not None and g.requires_grad]
            found = grad([g for g, _ in both], wanted, [d for _, d in both])
        return dict(zip(names, found, strict=True))

    def _by_value(self, ctx: Any, values: list[Any], d_gradients: tuple[Tensor | None, ...]) -> Named:
        of_value, cleaned = self.declaration.value, self.declaration.cleaned
        given = dict(zip(self.kept, values, strict=True))
        inputs = [given.pop(name) for name in self.leading]
        arriving = given.pop(self.arriving)
        rest = [given[name] for name in self.kept if name in given]
        names = [*self.leading, *(name for name in self.kept if name in given)]

        def value(*tensors: Any) -> Tensor:
            return of_value(*cleaned(names, [*tensors, *rest], True))  # type: ignore[misc]

        found = second_derivative(value, inputs, arriving, d_gradients, ctx.needs)
        return dict(zip((*self.leading, self.arriving), found, strict=True))
