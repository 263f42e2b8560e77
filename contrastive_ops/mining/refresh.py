"""When to mine again, which queries, and which lists are still right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.ordered import in_float64
from ..ops.similarity_topk import TopK


class RefreshSchedule:
    """Every how many steps hard negatives are mined again, and for which part of the queries.

    A refresh is due at ``start``, ``start + every``, ... and stays due until `done`: a step that was skipped, or a
    refresh that took many steps, loses none. Each refresh takes the next of ``parts`` parts of the queries, so that
    all of them are mined again in ``parts`` refreshes.

    Args:
        every: steps from one refresh to the next, at least 1.
        start: the step of the first one.
        parts: how many refreshes it takes to mine all queries again.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Xiong et al., Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval, 2021.

    Examples:
        >>> schedule = RefreshSchedule(100, parts=2)
        >>> for step in range(250):
        ...     if schedule.due(step):
        ...         print(step, schedule.rows(1000))                # mine the negatives of these queries here
        ...         schedule.done(step)
        0 slice(0, 500, None)
        100 slice(500, 1000, None)
        200 slice(0, 500, None)
    """

    def __init__(self, every: int, *, start: int = 0, parts: int = 1) -> None:
        self.every = checks.integer("RefreshSchedule", "every", every, 1)
        self.start = checks.integer("RefreshSchedule", "start", start, 0)
        self.parts = checks.integer("RefreshSchedule", "parts", parts, 1)
        self._next, self._part = self.start, 0

    def due(self, step: int) -> bool:
        """Whether a refresh is due at this step, or has been since an earlier one."""
        return checks.integer("RefreshSchedule", "step", step, 0) >= self._next

    def rows(self, count: int) -> slice:
        """Which of `count` queries this refresh mines: ``queries[schedule.rows(len(queries))]``."""
        count = checks.integer("RefreshSchedule", "count", count, 0)
        return slice(count * self._part // self.parts, count * (self._part + 1) // self.parts)

    def done(self, step: int) -> None:
        """The refresh that was due is done, at this step: the next one takes the next part.

        Args:
            step: the step at which it was done, which may be later than that at which it was due. The next refresh is
                the first of the schedule after it.

        Raises:
            ValueError: nothing was due. A refresh that is done twice would leave out a part.
        """
        step = checks.integer("RefreshSchedule", "step", step, 0)
        if not self.due(step):
            raise ValueError(
                f"RefreshSchedule.done: step must be one at which a refresh is due, got {step} before {self._next}"
            )
        self._next = self.start + self.every * ((step - self.start) // self.every + 1)
        self._part = (self._part + 1) % self.parts

    def state_dict(self) -> dict[str, int]:
        """What a run that is resumed needs to go on."""
        return {"next": self._next, "part": self._part, "parts": self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; `every` may have changed, the number of parts may not.

        Raises:
            ValueError: not a state of a schedule with as many parts.
        """
        if set(state) != {"next", "part", "parts"} or state["parts"] != self.parts:
            raise ValueError(
                f"RefreshSchedule.load_state_dict: state must be one of a schedule with parts={self.parts}, got "
                f"{checks.shown(state)}"
            )
        self._next, self._part = int(state["next"]), int(state["part"])

    def __repr__(self) -> str:
        """The arguments, and what is next."""
        given = f"every={self.every}, start={self.start}, parts={self.parts}"
        return f"RefreshSchedule({given}): part {self._part} at step {self._next}"


def still_exact(
    top: TopK,
    query: Tensor,
    new_query: Tensor,
    *,
    corpus_shift: float = 0.0,
    corpus_length: float = 1.0,
) -> Tensor:
    """Which lists need not be mined again after queries and corpus have moved a little.

    Equivalent to::

        moved = (new_query - query).norm(dim=1) * corpus_length + new_query.norm(dim=1) * corpus_shift
        gap = top.values[:, -2] - top.values[:, -1]                     # k + 1 columns, of which k are in use
        (gap > 2 * moved) | (top.counts < top.values.shape[1])

    An inner product changes by ``<q', y'> - <q, y> = <q' - q, y> + <q', y' - y>``, which is at most `moved`. So every
    column of the first k stays above every column that is not among them, if their scores were apart by more than
    twice that.

    Args:
        top: the k + 1 best inner products (``metric="dot"``, scale 1) of `query`, k >= 1, as they were mined. Their
            rules must not depend on the similarity: no bounds.
        query: (N, D) the queries that were mined for.
        new_query: (N, D) the queries as they are now.
        corpus_shift: how far any row of the corpus has moved since; 0 where it is frozen.
        corpus_length: the length of the longest row that the corpus had; 1 where rows are unit rows.

    Returns:
        (N,) bool: the first k columns of the list are still the k best, as a set. Rounding of float32 scores is
        accounted for, so True is certain; False may be too careful. A list that was not full had all columns that take
        part and still has them.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Examples:
        >>> from contrastive_ops import similarity_topk
        >>> corpus = torch.nn.functional.normalize(torch.randn(100, 16), dim=1)
        >>> top = similarity_topk(corpus, corpus, 2)                    # each row finds itself, k = 1
        >>> bool(still_exact(top, corpus, corpus + 1e-4).all())
        True
    """
    name = "still_exact"
    checks.check_matrices(name, "query", query, "new_query", new_query)
    if query.shape != new_query.shape:
        raise ValueError(
            f"{name}: new_query must have the same shape as query, "
            f"got query {checks.shape(query)} and new_query {checks.shape(new_query)}"
        )
    if top.values.dim() != 2 or top.values.shape[0] != query.shape[0] or top.values.shape[1] < 2:
        raise ValueError(
            f"{name}: top must have values of shape ({query.shape[0]}, k + 1) with k >= 1, "
            f"got {checks.shape(top.values)}"
        )
    corpus_shift = checks.number(name, "corpus_shift", corpus_shift, "[0, inf)")
    corpus_length = checks.number(name, "corpus_length", corpus_length, "[0, inf)")
    before, after = in_float64(query.detach()), in_float64(new_query.detach())
    moved = (after - before).norm(dim=1) * corpus_length + after.norm(dim=1) * corpus_shift
    # Scores are sums of D products in the accumulation dtype, then and now.
    unit = (query.shape[1] + 8) * torch.finfo(checks.accumulator(query.dtype)).eps
    rounding = unit * (before.norm(dim=1) * corpus_length + after.norm(dim=1) * (corpus_length + corpus_shift))
    values = in_float64(top.values.detach())
    gap = values[:, -2] - values[:, -1]
    short = top.counts.to(values.device) < values.shape[1]
    return ((gap > 2 * (moved + rounding)) | (short & moved.isfinite())).to(query.device)
