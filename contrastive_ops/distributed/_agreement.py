"""Before rows are exchanged: do all ranks call the same, and did none of them refuse its arguments?"""

from __future__ import annotations

import zlib
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import checks
from ..core.rules import RULES, Pairs, given, resolve
from ..losses._sweep import FIELDS, Sweep
from ._collectives import gather_rows
from ._groups import Shards, Team, eager
from ._sweep import GATHERED_BYTES, SCHEDULES, ShardedSweep


class Agreement:
    """A region in which a rank checks its arguments; at its end all ranks compare them.

    An error in the region, or a difference, is raised on every rank; without that, the others would wait for rows that
    never come. It is one small collective whose result is read. With ``check=False`` there is none: the ranks must
    have the same number of rows, and whoever refuses its arguments leaves the others waiting.

    Attributes:
        rows: where the rows of x are, after the region.
        columns: where the rows of y are.
        learns: whether any rank needs gradients of x, and of y.
    """

    def __init__(self, function: str, team: Team, check: bool) -> None:
        self.function, self.team = function, team
        self.check = checks.flag(function, "check", check)
        self.text, self.sizes = "", (0, 0)
        self.learns = (False, False)

    def __enter__(self) -> Agreement:
        return self

    def compare(self, x: Tensor, y: Tensor, pairs: Pairs | None = None, **options: Any) -> None:
        """What must be the same on all ranks: D, dtype and options. Of tensors only that they are given counts."""
        checks.check_choice(self.function, "schedule", options.get("schedule", "auto"), SCHEDULES)
        check_local_rules(self.function, pairs, x, y)
        self.sizes = (x.shape[0], y.shape[0])
        learns = torch.is_grad_enabled()
        self.learns = (learns and x.requires_grad, learns and y.requires_grad)
        if self.check:
            options["pairs"] = [rule.name for rule, _ in given(pairs or Pairs())]
            shown = (f"{name}={_shown(value)}" for name, value in options.items())
            self.text = f"{self.function}(D={x.shape[1]}, dtype={x.dtype}, {', '.join(shown)})"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.check and (error is None or isinstance(error, Exception)):
            every = self._exchange(error)
        elif error is None:
            every = [(*self.sizes, *self.learns)] * self.team.size
        if error is None:
            sizes, columns, of_x, of_y = zip(*every, strict=True)
            self.rows, self.columns = Shards(self.team, sizes), Shards(self.team, columns)
            self.learns = (any(of_x), any(of_y))

    def _exchange(self, error: BaseException | None) -> list[tuple[int, ...]]:
        """(rows, columns, x needs a gradient, y needs one) of each rank."""
        text = self.text if error is None else f"{type(error).__name__}: {error}"
        here = [error is not None, zlib.crc32(text.encode()), *self.sizes, *self.learns]
        found = gathered_numbers(here, self.team)
        if len({tuple(each[:2]) for each in found}) > 1:
            self._refuse(text, [bool(each[0]) for each in found], error)
        return [tuple(each[2:]) for each in found]

    def _refuse(self, text: str, failed: list[bool], error: BaseException | None) -> None:
        texts: list[Any] = [None] * self.team.size
        dist.all_gather_object(texts, text, group=self.team.group)
        if error is not None:  # which is raised on this rank as it is
            return
        if any(failed):
            rank = failed.index(True)
            raise ValueError(
                f"{self.function}: all ranks must get through their checks, rank {rank} raised {texts[rank]}"
            )
        other = next(rank for rank, each in enumerate(texts) if each != texts[0])
        raise ValueError(
            f"{self.function}: all ranks must make the same call with the same D, dtype and options, "
            f"got rank 0 {texts[0]} and rank {other} {texts[other]}"
        )

    def sweep(
        self, schedule: str, x: Tensor, names: tuple[str, str, str], scale: float | Tensor, **shared: Any
    ) -> ShardedSweep:
        """How rows and columns meet; "auto" gathers what is not too large for that. Names and the rest: `Sweep`."""
        if schedule == "auto":
            gathered = self.columns.total * x.shape[1] * 2 * x.dtype.itemsize  # with the gradient
            schedule = "ring" if gathered > GATHERED_BYTES else "gather"
        return ShardedSweep(names, scale, **shared, rows=self.rows, columns=self.columns, schedule=schedule)

    def spread(self, sweep: Sweep, schedule: str, columns: Tensor, filtered: bool) -> ShardedSweep:
        """The sweep of one process over all ranks. `filtered`: with rules, even if none, so that nothing is no fold."""
        shared = {name: getattr(sweep, name) for name in FIELDS}
        if filtered and sweep.pairs is None:
            shared["pairs"] = Pairs()
        return self.sweep(schedule, columns, **shared)

    def with_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both; one without a gradient, of which another rank needs one, takes part in backward nevertheless."""
        pairs = zip((x, y), self.learns, strict=True)
        return tuple(  # type: ignore[return-value]
            each.detach().requires_grad_() if learns and not each.requires_grad else each for each, learns in pairs
        )


def check_local_rules(function: str, pairs: Pairs | None, x: Tensor, y: Tensor) -> None:
    """Rules are for the rows and columns of one rank; only lists of columns name those of all."""
    if pairs is not None:
        resolve(function, pairs, x, y, [rule for name, rule in RULES.items() if name != "exclude"])


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else checks.shown(value)


@eager
def gathered_numbers(numbers: list[Any], team: Team) -> list[list[int]]:
    """The numbers of each rank; on the CPU where the group can, so that no GPU is waited for."""
    kinds = {device.type for device in team.group._device_types}
    device = "cpu" if "cpu" in kinds else next(iter(kinds))
    here = torch.tensor([[int(each) for each in numbers]], dtype=torch.int64, device=device)
    found: list[list[int]] = gather_rows(here, Shards(team, (1,) * team.size)).tolist()
    return found
