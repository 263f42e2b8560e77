"""What losses of many processes share: arguments, the loss of one process with another sweep, the share of a rank."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from ..losses import _arguments
from ..losses._sweep import Prepared, Sweep
from ._agreement import Agreement
from ._groups import Group, Team, find_team, local_tensor
from ._rows import local_reduction, rank_share

if TYPE_CHECKING:
    from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class RankOptions(TypedDict, total=False):
    """What losses take beside the options of the same loss on one process."""

    group: Group
    schedule: str
    average: bool
    check: bool


class BiasedOptions(_arguments.BiasedOptions, RankOptions, total=False):
    """All of them, of a loss with rules and a bias of columns."""


class FilteredOptions(_arguments.FilteredOptions, RankOptions, total=False):
    """All of them, of a loss with rules, a bias of columns and label smoothing."""


# Of every loss over ranks, and what they are by default.
DEFAULTS = {"group": (Any, None), "schedule": ("str", "auto"), "average": ("bool", True), "check": ("bool", True)}


def over_ranks(single: Callable[..., Any], without: Sequence[str] = (), **more: tuple[str, Any]) -> Callable[[F], F]:
    """A function of tensors and `options` gets those of `single` and of ranks, all of them, as its signature says.

    Args:
        single: the loss of one process; what it takes is documented there.
        without: its arguments that there are not over ranks.
        more: other options, (annotation, default).
    """
    own = inspect.signature(single)
    kept = [each for each in own.parameters.values() if each.name not in without]
    named = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, named, default=default, annotation=annotation)
        for name, (annotation, default) in {**more, **DEFAULTS}.items()
    ]
    signature = own.replace(parameters=[*kept, *added])
    defaults = {each.name: each.default for each in (*kept, *added) if each.kind is named}

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def loss(*tensors: Any, **options: Any) -> Any:
            for name in options:
                if name not in signature.parameters:
                    known = ", ".join(defaults)
                    raise TypeError(f"{function.__name__}: options must be among {known}, got {name}")
            return function(*tensors, **{**defaults, **options})

        loss.__signature__ = signature  # type: ignore[attr-defined]
        return loss  # type: ignore[return-value]

    return decorate


def team_of(function: str, tensors: Sequence[Any], options: dict[str, Any]) -> tuple[Team | None, list[Any]]:
    """The processes, whose group is taken out of the options, and what this one has of the tensors."""
    return find_team(function, options.pop("group"), *tensors), [local_tensor(each) for each in tensors]


def loss_over_ranks(
    single: Callable[..., Any], prepare: Callable[..., Prepared], tensors: Sequence[Any], options: dict[str, Any]
) -> Any:
    """The share of this rank in `single` of the rows of all ranks, and Diagnostics of all where they are asked for.

    Args:
        single: the loss of one process.
        prepare: it again, with its arguments checked and nothing swept.
        tensors: of this rank.
        options: all of both.
    """
    name = single.__name__
    team, tensors = team_of(name, tensors, options)
    of_ranks = {each: options.pop(each) for each in ("schedule", "average", "check")}
    if team is None:
        return single(*tensors, **options)
    reduction, asked = options["reduction"], options["diagnostics"]
    with Agreement(name, team, of_ranks.pop("check")) as agreed:
        _arguments.check_reduction(name, reduction)
        problem = prepare(*tensors, **{**options, "reduction": local_reduction(reduction)})
        columns = problem.x if problem.y is None else problem.y
        shown = {each: value for each, value in options.items() if each != "pairs"}
        agreed.compare(problem.x, columns, problem.sweep.pairs, **of_ranks, **shown)
    x, columns = agreed.with_gradients(problem.x, columns)
    filtered = asked or problem.options.get("share") is not None  # means of logits are folds of all ranks
    sweep = agreed.spread(problem.sweep, of_ranks["schedule"], columns, filtered)
    found = problem.function(sweep, x, None if problem.y is None else columns, **problem.options)
    loss, measures = found if asked else (found, None)
    share = rank_share(loss, agreed.rows, problem.options["weight"], reduction, of_ranks["average"])
    return (share, measures) if asked else share


@dataclasses.dataclass(frozen=True, eq=False)
class MergedSweep(Sweep):
    """The sweep of rows whose columns are all here, and whose measures are those of the rows of all ranks."""

    merge: Callable[[Tensor], Tensor] = lambda sums: sums

    def sums_of_all(self, sums: Tensor) -> Tensor:
        """See `Sweep.sums_of_all`."""
        return self.merge(sums)
