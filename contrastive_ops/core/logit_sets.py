"""From the arguments of a call to the logit sets that the operators take."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autocast, checks, unit_lengths
from .column_lists import check_lists
from .problem import LogitSet, ScaleOf, Slot
from .rules import Pairs, resolve


def prepare(
    names: tuple[str, str, str],
    x: Tensor,
    y: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Check what every operator of this stem takes and bring it to the dtypes that the backends expect."""
    function, x_name, y_name = names
    x, y = autocast.cast(x, y)
    if y is None:
        checks.check_matrix(function, x_name, x)
    else:
        checks.check_matrices(function, x_name, x, y_name, y)
    columns = x if y is None else y
    if row_bias is not None:
        checks.check_vector(function, "row_bias", row_bias, x.shape[0], x_name, x)
    if col_bias is not None:
        checks.check_vector(function, "col_bias", col_bias, columns.shape[0], x_name, x)
    if target is not None:
        checks.check_index(function, "target", target, x.shape[0], x_name, x)
    dtype = checks.accumulator(x.dtype)
    return (
        x,
        y,
        None if row_bias is None else row_bias.to(dtype),
        None if col_bias is None else col_bias.to(dtype),
    )


class LogitSets:
    """Logit sets of one call: folds that agree in scale, pairs and sign share one."""

    def __init__(self, names: tuple[str, str, str], x: Tensor, y: Tensor | None, unit: bool = False) -> None:
        self.names, self.x, self.y, self.unit = names, x, x if y is None else y, unit
        self.with_itself = y is None
        self.sets: list[LogitSet] = []
        self._scales: list[Tensor] = []
        self._known: list[tuple[float | Tensor, Pairs | None, bool, bool]] = []
        self._resolved: list[tuple[Pairs, dict[Slot, Tensor]]] = []

    def add(
        self,
        scale: float | Tensor,
        pairs: Pairs | None,
        negate: bool = False,
        of_columns: bool = False,
        linear: tuple[Tensor, ...] | None = None,
    ) -> int:
        """Return the number of the set, which is made if there is none like it."""
        for index, (known_scale, known_pairs, *known) in enumerate(self._known):
            # Identity of tensors by `is`: a traced program would be bound to the number that id() returns.
            same_number = isinstance(scale, (float, int)) and isinstance(known_scale, (float, int))
            same_scale = scale == known_scale if same_number else scale is known_scale
            if same_scale and pairs is known_pairs and tuple(known) == (negate, of_columns):
                return index
        function, x_name, y_name = self.names
        like, like_name = (self.y, y_name) if of_columns else (self.x, x_name)
        tensor = checks.scale_tensor(function, scale, like_name, like, "col_scale" if of_columns else "scale")
        per_item = ScaleOf.COLUMNS if of_columns else ScaleOf.ROWS
        data = unit_lengths.flag(self.x) if self.unit and not self.sets else {}
        data.update(self._rules(pairs))
        if linear is not None:
            data.update(_linear_lists(function, linear, self.x, self.y))  # not |=, which torch 2.6 cannot trace
        diagonal = None if pairs is None else pairs.diagonal
        self.sets.append(LogitSet(per_item if tensor.dim() else ScaleOf.ALL, negate, diagonal, data))
        self._scales.append(tensor.reshape(-1))
        self._known.append((scale, pairs, negate, of_columns))
        return len(self.sets) - 1

    def scale(self) -> Tensor:
        """The scales of all sets, one after another."""
        return self._scales[0] if len(self._scales) == 1 else torch.cat(self._scales)

    def _rules(self, pairs: Pairs | None) -> dict[Slot, Tensor]:
        if pairs is None:
            return {}
        if not isinstance(pairs, Pairs):
            raise TypeError(f"{self.names[0]}: pairs must be Pairs or None, got {type(pairs).__name__}")
        for known, data in self._resolved:
            if known is pairs:
                return data
        if self.with_itself and pairs.guide is not None and pairs.guide.gy is not None:
            raise ValueError(
                f"{self.names[0]}: guide.gy must be None where a matrix is compared with itself, "
                f"got {checks.shape(pairs.guide.gy)}"
            )
        data = resolve(self.names[0], pairs, self.x, self.y)
        guides = [known.guide for known, _ in self._resolved if known.guide is not None]
        if guides and pairs.guide is not None and pairs.guide.gx is not guides[0].gx:
            raise NotImplementedError(
                f"{self.names[0]}: pairs.guide must be one guide for all folds of a sweep, got another gx\n"
                "  call similarity_reduce once per guide"
            )
        self._resolved.append((pairs, data))
        return data


def _linear_lists(function: str, linear: object, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
    if not isinstance(linear, tuple) or len(linear) not in (2, 3):
        raise TypeError(
            f"{function}: linear must be (indptr, indices) or (indptr, indices, weights), got {type(linear).__name__}"
        )
    indptr, indices, order = check_lists(function, "linear", linear, x, y)
    dtype = checks.accumulator(x.dtype)
    if len(linear) == 2:
        weight = torch.ones(indices.shape, dtype=dtype, device=x.device)
    else:
        checks.check_vector(function, "linear weights", linear[2], indices.shape[0], "x", x)
        checks.check_constant(function, "linear weights", linear[2])
        weight = linear[2].to(dtype)[order]
    return {Slot.LINEAR_INDPTR: indptr, Slot.LINEAR_INDICES: indices, Slot.LINEAR_WEIGHT: weight}
