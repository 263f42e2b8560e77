"""Embeddings of earlier batches as a ring: negatives for MoCo-like losses, and what to mine among them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.column_lists import check_lists, joined
from ..core.records import changed
from ..core.rules import Pairs
from ..core.state import State
from ..ops.similarity_topk import TopK, similarity_topk


class Entries(NamedTuple):
    """What a `MemoryBank` holds, in the order of its slots.

    Attributes:
        rows: (K, D) the embeddings.
        ids: (K,) int64 the sample of each, -1 for none.
        labels: (K,) int64 the class of each, -1 for none.
        ages: (K,) int64 how many batches were enqueued after that of each entry.
    """

    rows: Tensor
    ids: Tensor
    labels: Tensor
    ages: Tensor


class MemoryBank(State):
    """The embeddings of the last batches, with the sample, the class and the age of each.

    Equivalent to, for a batch that fits::

        slots = (pointer + torch.arange(len(batch))) % capacity
        rows[slots], ids[slots], labels[slots] = batch.detach().to(rows.dtype), batch_ids, batch_labels
        pointer = (pointer + len(batch)) % capacity

    Args:
        capacity: how many entries it holds, at least 1; new ones replace the oldest.
        dim: D, the size of an embedding.
        dtype: of the stored rows: float32, bfloat16, float16 or float64. What is enqueued is rounded to it.
        device: where the entries are kept.

    Attributes:
        rows: (capacity, D), the slots; those after the filled ones are 0.
        ids: (capacity,) int64, -1 for none.
        labels: (capacity,) int64, -1 for none.
        born: (capacity,) int64, the step of each entry, -1 where there is none.
        pointer: 0-d int64, the slot that is written next.
        filled: 0-d int64, how many slots hold an entry.
        step: 0-d int64, how many batches were enqueued.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory capacity (D + 3) numbers: they are saved in the state dict, follow ``.to(device)`` and get no gradient.
        The rows follow a cast of the module as its weights do, ids and counters stay int64. `entries` returns views
        where it can, so that a large bank is not copied at each step; therefore call `enqueue` after ``backward()``, as
        autograd refuses to go through rows that were overwritten. Call `enqueue` outside of a compiled region. They are
        no buffers: under DistributedDataParallel each rank has its own. With ``enqueue(..., group=...)`` they agree.

    Source:
        He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020;
        Wang et al., Cross-Batch Memory for Embedding Learning, 2020.

    Examples:
        >>> from contrastive_ops.losses import moco
        >>> bank = MemoryBank(capacity=256, dim=16)
        >>> for step in range(3):
        ...     ids = torch.arange(8) + 8 * step
        ...     query, key = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        ...     queue = bank.entries()
        ...     moco(query, key, queue.rows, labels=ids, queue_labels=queue.ids).backward()
        ...     bank.enqueue(key, ids)
        >>> len(bank), bank.topk(query, 5, ids=ids).indices.shape
        (24, torch.Size([8, 5]))
    """

    digits = ("ids", "labels", "born", "pointer", "filled", "step")
    own = ("rows", *digits)
    rows: Tensor
    ids: Tensor
    labels: Tensor
    born: Tensor
    pointer: Tensor
    filled: Tensor
    step: Tensor

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        capacity = checks.integer("MemoryBank", "capacity", capacity, 1)
        dim = checks.integer("MemoryBank", "dim", dim, 1)
        checks.check_choice("MemoryBank", "dtype", dtype, checks.FLOATING)
        self.rows = torch.zeros(capacity, dim, dtype=dtype, device=device)
        for name in ("ids", "labels", "born"):
            setattr(self, name, torch.full((capacity,), -1, dtype=torch.int64, device=device))
        for name in ("pointer", "filled", "step"):
            setattr(self, name, torch.zeros((), dtype=torch.int64, device=device))

    @property
    def capacity(self) -> int:
        """How many entries it can hold."""
        return self.rows.shape[0]

    def __len__(self) -> int:
        """How many entries it holds."""
        return int(self.filled)

    @property
    def ages(self) -> Tensor:
        """(K,) int64: how many batches were enqueued after that of each entry."""
        return self.step - self.born[: len(self)]

    @torch.no_grad()
    def enqueue(
        self, rows: Tensor, ids: Tensor | None = None, labels: Tensor | None = None, *, group: Any = None
    ) -> None:
        """Store a batch in place of the oldest entries.

        Args:
            rows: (N, D) floating, on the bank's device. Detached and rounded to the bank's dtype. Of more than
                `capacity` rows the last are kept; no rows are a batch too, after which all entries are older by one.
                A row with a number that is not finite, then or after rounding, is not stored: one batch that overflowed
                would make every loss NaN until it has left the bank.
            ids: (N,) int64, the sample of each row. None: -1. A sample that is enqueued again has two entries, of
                different age, until the older one is replaced.
            labels: (N,) int64, the class of each row. None: -1.
            group: store the rows of all ranks, one rank after another, so that banks that are equal stay equal. A
                ProcessGroup or a DeviceMesh of one dimension. Ids must then differ over ranks, as
                `distributed.unique_ids` makes them. None: this rank's alone.

        Raises:
            ValueError, TypeError: arguments that do not fit, with `group` on all ranks.
        """
        name = "MemoryBank.enqueue"
        if group is not None:
            from ..distributed._bank import of_all_ranks

            rows, ids, labels = of_all_ranks(name, rows, ids, labels, group)
        checks.check_matrix(name, "rows", rows)
        if rows.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"{name}: rows must have the bank's dimension {self.rows.shape[1]}, got {checks.shape(rows)}"
            )
        checks.check_device(name, "the bank", self.rows, "rows", rows)
        for argument, index in (("ids", ids), ("labels", labels)):
            if index is not None:
                index = checks.check_index(name, argument, index, rows.shape[0], "rows", rows)
        rows = rows.to(self.rows.dtype)
        # Those that are finite come last, in their order, so that slots need not wait for their number.
        finite, order = rows.isfinite().all(1).sort(stable=True)
        end = self.pointer + finite.sum()
        # As if the rows came one by one: of two for one slot the later stays, and the pointer counts both.
        count = min(rows.shape[0], self.capacity)
        finite, order = finite[rows.shape[0] - count :], order[rows.shape[0] - count :]
        slots = (end - count + torch.arange(count, device=rows.device)) % self.capacity
        none = torch.full((), -1, dtype=torch.int64, device=rows.device)
        entries = (
            (self.rows, rows[order]),
            (self.ids, none if ids is None else ids[order]),
            (self.labels, none if labels is None else labels[order]),
            (self.born, self.step + 1),
        )
        counters = (
            (self.step, self.step + 1),
            (self.pointer, end % self.capacity),
            (self.filled, (self.filled + finite.sum()).clamp_max(self.capacity)),
        )
        _write(slots, finite, entries, counters)

    def entries(self, max_age: int | None = None) -> Entries:
        """What the bank holds.

        Args:
            max_age: only entries that are no older than this; 0 is the last batch. None: all.

        Returns:
            `Entries`. Slices of the buffers, no copies, unless `max_age` leaves entries on both ends of the ring.
        """
        ages = self.ages
        slots: slice | Tensor = slice(0, len(ages))
        if max_age is not None:
            slots = self._fresh(max_age, ages).nonzero().squeeze(1)
            first, last = (int(slots[0]), int(slots[-1])) if len(slots) else (0, -1)
            if last - first + 1 == len(slots):
                slots = slice(first, last + 1)
        return Entries(self.rows[slots], self.ids[slots], self.labels[slots], ages[slots])

    def topk(
        self,
        query: Tensor,
        k: int,
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        max_age: int | None = None,
        metric: str = "cosine",
        pairs: Pairs | None = None,
        backend: str = "auto",
    ) -> TopK:
        """Find the k entries that are most similar to each query.

        Equivalent to::

            keep = (ids[:, None] != bank.ids) & (labels[:, None] != bank.labels) & (bank.ages <= max_age)
            similarity_topk(query, bank.rows[:len(bank)], k, metric=metric, ...)    # of the entries to keep

        Args:
            query: (N, D) of the bank's dtype.
            k: length of the lists.
            ids: (N,) int64: a query never gets an entry of its own sample; -1 equals nothing.
            labels: (N,) int64: nor one of its own class.
            max_age: nor an entry that is older than this.
            metric: as in `similarity_topk`.
            pairs: more rules, for a matrix of N rows and ``len(bank)`` columns.
            backend: as in `similarity_topk`.

        Returns:
            `TopK`; indices are slots: ``bank.rows[top.indices]``. -1, and value -inf, where fewer entries take part.
            The values are differentiable in `query`. ``mining.collapse(top, bank.ids)`` leaves one entry of a sample.

        Raises:
            ValueError, TypeError, NotImplementedError: as `similarity_topk`.

        Note:
            Work 2 N K D. With ids and labels, or with a rule ``differ`` in `pairs`, the entries of equal ids become
            lists, which take memory for each such pair.
        """
        name = "MemoryBank.topk"
        ages = self.ages
        rows = self.rows[: len(ages)]
        query, rows = autocast.cast(query, rows)
        checks.check_matrices(name, "query", query, "bank", rows)
        for argument, index, stored in (("labels", labels, self.labels), ("ids", ids, self.ids)):
            if index is not None:
                index = checks.check_index(name, argument, index, query.shape[0], "query", query)
                pairs = _with_unequal(pairs or Pairs(), index, stored[: len(ages)], query, rows)
        bias = None
        if max_age is not None:  # a score of -inf takes no part
            bias = query.new_zeros(ages.shape, dtype=checks.accumulator(query.dtype))
            bias = bias.masked_fill(~self._fresh(max_age, ages), -torch.inf)
        return similarity_topk(query, rows, k, metric=metric, col_bias=bias, pairs=pairs, backend=backend)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all entries, and start to count batches again."""
        self.rows.zero_()
        for each in (self.ids, self.labels, self.born):
            each.fill_(-1)
        for each in (self.pointer, self.filled, self.step):
            each.zero_()

    clear = reset

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse counters that no bank has: entries would be read where there are none."""
        wrong = self._wrong_in({name: state_dict.get(prefix + name) for name in self.own})
        if wrong is None:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        else:  # the last of the arguments are messages for `load_state_dict` to raise
            rest[-1].append(f"{prefix}{wrong}")

    def _wrong_in(self, given: dict[str, Any]) -> str | None:
        """What is wrong in tensors of a file; those that are missing, or of another shape, the caller names."""
        for name, each in given.items():
            if each is None:
                continue
            own = getattr(self, name)
            if not isinstance(each, Tensor):
                return f"{name}: must be a tensor, got {type(each).__name__}"
            if each.is_floating_point() != own.is_floating_point() or each.is_complex():
                return f"{name}: must be of {own.dtype}, got {each.dtype}"
        step = given["step"]
        last = torch.iinfo(torch.int64).max if step is None or step.numel() != 1 else int(step)
        bounds = {
            "pointer": (0, self.capacity - 1),
            "filled": (0, self.capacity),
            "step": (0, torch.iinfo(torch.int64).max),
            "born": (-1, last),
        }
        for name, (least, most) in bounds.items():
            each = given[name]
            if each is not None and each.numel() > 0 and not (least <= int(each.min()) and int(each.max()) <= most):
                return f"{name}: must be in [{least}, {most}], got {int(each.min())} to {int(each.max())}"
        return None

    @staticmethod
    def _fresh(max_age: object, ages: Tensor) -> Tensor:
        return ages <= checks.integer("MemoryBank", "max_age", max_age, 0)

    def extra_repr(self) -> str:
        """The size, the dtype and how much is filled."""
        capacity, dim = self.rows.shape
        return f"capacity={capacity}, dim={dim}, dtype={self.rows.dtype}, filled={len(self)}"


Written = tuple[tuple[Tensor, Tensor], ...]


def _write(slots: Tensor, finite: Tensor, entries: Written, counters: Written) -> None:
    """Put entries into slots, where they are finite, and set counters: all or, if Ctrl-C comes between, nothing."""
    before: list[tuple[Tensor, Any, Tensor]] = [(stored, slots, stored[slots]) for stored, _ in entries]
    before += [(counter, ..., counter.clone()) for counter, _ in counters]
    try:
        for (stored, _, old), (_, given) in zip(before, entries, strict=False):
            stored[slots] = torch.where(finite.view(-1, *(1,) * (old.dim() - 1)), given, old)
        for counter, value in counters:
            counter.copy_(value)
    except BaseException:
        for stored, at, old in before:
            stored[at] = old
        raise


# ---- Two rules of one kind -----------------------------------------------------------------------------------------


def _with_unequal(pairs: Pairs, row_ids: Tensor, col_ids: Tensor, x: Tensor, y: Tensor) -> Pairs:
    """The rules, and that ids must differ: as `Pairs.differ`, or as lists where there is such a rule already."""
    if pairs.differ is None:
        return changed(pairs, differ=(row_ids, col_ids))
    lists = _equal(row_ids, col_ids)
    if pairs.exclude is not None:
        lists = joined(lists, check_lists("MemoryBank.topk", "exclude", pairs.exclude, x, y)[:2])
    return changed(pairs, exclude=lists)


def _equal(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(indptr, indices): the columns with the id of each row; -1 equals nothing."""
    ordered, order = col_ids.sort(stable=True)
    first, last = (torch.searchsorted(ordered, row_ids.contiguous(), right=right) for right in (False, True))
    lengths = torch.where(row_ids == -1, 0, last - first)
    indptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    row = torch.repeat_interleave(lengths)
    place = torch.arange(row.shape[0], device=row.device) - indptr[row] + first[row]
    return indptr, order[place]
