"""One view of whatever holds the rows of a corpus: in memory, mapped, or read slice by slice."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..core import checks
from ._ranges import Range, missing

if TYPE_CHECKING:
    from .state import TopKState

# Bytes of a block that is read, searched and forgotten; large enough that a block costs more to search than to begin.
BLOCK_BYTES = 64 << 20
# Bytes read at once to pick single rows: what lies between two of them is cheaper to read than to skip.
SLAB_BYTES = 256 << 10

SUPPORTED = (
    "a torch.Tensor, a numpy array or memmap, a safetensors slice (get_slice), or an object with a shape of two "
    "numbers and [a:b] slicing that returns one of the first two; of float32, float64, bfloat16 or float16, without "
    "bfloat16 in numpy"
)

T = TypeVar("T")


class Corpus:
    """Rows of a corpus, read by blocks or picked one by one. Made by `as_corpus`.

    Args:
        source: see `as_corpus`.
        function: the function to name in errors.
        device: where rows are delivered; that of the source by default.

    Attributes:
        rows: M.
        depth: D.
        dtype: torch dtype of the rows.
        device: where rows are delivered.

    Note:
        Rows of a tensor are views of it; all others are copies in memory of their own. A memory-mapped file leaves no
        page in the resident set of the process but for the time of a copy, and one that was cut short after it was
        mapped is an error, not a signal that ends the process.

    Examples:
        >>> corpus = Corpus(torch.arange(12.0).view(6, 2))
        >>> [begin for begin, _ in corpus.blocks(4)], corpus.take(torch.tensor([5, 0]))
        ([0, 4], tensor([[10., 11.],
                [ 0.,  1.]]))
    """

    def __init__(self, source: Any, function: str = "Corpus", device: torch.device | None = None) -> None:
        self._source, self._function = source, function
        self.rows, self.depth = _shape(function, source)
        self._map = None if isinstance(source, Tensor) else _mapped(source)
        probe = source if isinstance(source, Tensor) else self._read(0, min(1, self.rows))
        if probe.dtype not in checks.FLOATING:
            raise TypeError(f"{function}: corpus must be {SUPPORTED}; got {probe.dtype}")
        self.dtype: torch.dtype = probe.dtype
        self.device: torch.device = probe.device if device is None else device

    # What a corpus does that several processes have: see `PartedCorpus`.
    place = (0, 1)

    def reading(self) -> contextlib.AbstractContextManager[object]:
        """A region that reads what this process has."""
        return contextlib.nullcontext()

    def compare(self, *arguments: object) -> None:
        """All processes must be given the same."""

    def seen_by_all(self, seen: list[Range]) -> list[Range]:
        """The ranges that this process or another has seen."""
        return seen

    def complete(self, state: TopKState) -> None:
        """Add what other processes saw."""

    def block(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end): (end - begin, D)."""
        return self._read(begin, end).to(self.device)

    def blocks(self, block_rows: int) -> Iterator[tuple[int, Tensor]]:
        """(index of the first row, rows) of one block after another."""
        for begin in range(0, self.rows, block_rows):
            yield begin, self.block(begin, min(begin + block_rows, self.rows))

    def unseen(self, seen: list[Range], step: int, base: int = 0) -> Generator[tuple[int, Tensor]]:
        """Blocks of what was not seen of rows that begin at `base`; nothing else is read."""
        for begin, end in missing(seen, base, base + self.rows):
            for first in range(begin, end, step):
                yield first, self.block(first - base, min(first + step, end) - base)

    def take(self, index: Tensor) -> Tensor:
        """The rows that `index` (int64, of any shape) names: (*index.shape, D).

        Each row is read once, in ascending order, however often it is named.
        """
        index = checks.as_index(self._function, "index of corpus rows", index)
        checks.check_index_values(self._function, "index of corpus rows", index, self.rows)
        if isinstance(self._source, Tensor):
            return self._source.detach()[index.to(self._source.device)].to(self.device)
        wanted, place = index.reshape(-1).cpu().unique(return_inverse=True)
        slab = wanted // rows_in_block(self.depth, self.dtype, SLAB_BYTES)
        found = torch.empty((len(wanted), self.depth), dtype=self.dtype)
        at = 0
        for count in slab.unique_consecutive(return_counts=True)[1].tolist():
            rows = wanted[at : at + count]
            first = int(rows[0])
            found[at : at + count] = self._read(first, int(rows[-1]) + 1)[rows - first]
            at += count
        return found[place].view(*index.shape, self.depth).to(self.device)

    def _read(self, begin: int, end: int) -> Tensor:
        if isinstance(self._source, Tensor):
            return self._source.detach()[begin:end]
        if self._map is not None:
            self._check_file(self._map)
        rows = as_rows(self._function, self._source[begin:end])
        if self._map is not None:
            _forget_pages(self._map)
        if tuple(rows.shape) != (end - begin, self.depth):
            raise ValueError(
                f"{self._function}: corpus must have ({self.rows}, {self.depth}) numbers as its shape says, got "
                f"{checks.shape(rows)} for the rows {begin} to {end}"
            )
        return rows

    def _check_file(self, mapped: Any) -> None:
        """Touching a page behind the end of the file would end the process."""
        needed, size = mapped.offset + mapped.nbytes, mapped.base.size()
        if size < needed:
            raise ValueError(
                f"{self._function}: corpus must be a file of at least {needed} bytes as its shape says, got {size}: "
                f"{mapped.filename} was cut short after it was mapped"
            )


def as_corpus(function: str, corpus: object, like: Tensor) -> Corpus:
    """One view of a corpus, checked against the matrix `like` that will be compared with it.

    Args:
        function: the function to name in errors.
        corpus: (M, D): a tensor, a numpy array or memmap, a safetensors slice (``safe_open(...).get_slice(name)``), or
            any object with a shape of two numbers and [a:b] slicing that returns tensors or arrays (h5py, zarr).
        like: (N, D) the query. Blocks are brought to its device.

    Returns:
        `Corpus`.

    Raises:
        TypeError: something else, or another dtype than that of `like`.
        ValueError: another D.
    """
    view = corpus if isinstance(corpus, Corpus) else Corpus(corpus, function, like.device)
    if view.depth != like.shape[1]:
        raise ValueError(
            f"{function}: corpus must have the same last dimension as query, got query {checks.shape(like)} and "
            f"corpus {(view.rows, view.depth)}"
        )
    if view.dtype != like.dtype:
        raise TypeError(
            f"{function}: corpus must have the same dtype as query, got query {like.dtype} and corpus {view.dtype}\n"
            "  convert the query, which is the smaller one"
        )
    return view


def has_shape(corpus: object) -> bool:
    """Whether this is one object with a shape, which an iterable of blocks is not."""
    return isinstance(corpus, Corpus) or hasattr(corpus, "shape") or hasattr(corpus, "get_shape")


def as_rows(function: str, block: object) -> Tensor:
    """A copy of rows, which are a tensor or an array, as a tensor in memory of its own."""
    if isinstance(block, Tensor):
        return block.detach().clone(memory_format=torch.contiguous_format)
    copy: Any = getattr(block, "copy", None)
    if hasattr(block, "__array_interface__") and copy is not None:
        # What numpy cannot tell torch is a matter of its dtype: bfloat16, or another order of bytes.
        with contextlib.suppress(TypeError, ValueError):
            return torch.from_numpy(copy())
        raise TypeError(f"{function}: corpus must be {SUPPORTED}; got {type(block).__name__} of {block.dtype}")  # type: ignore[attr-defined]
    raise TypeError(f"{function}: corpus must be {SUPPORTED}; got rows of type {type(block).__name__}")


def rows_in_block(depth: int, dtype: torch.dtype, size: int = BLOCK_BYTES) -> int:
    """How many rows of a corpus are about `size` bytes."""
    return max(1, size // max(1, depth * dtype.itemsize))


def read_ahead(blocks: Iterable[T]) -> Generator[T, None, None]:
    """The same items, each read by a second thread while the one before is in use. Close it to end the thread."""
    items = iter(blocks)
    end = object()
    with ThreadPoolExecutor(1, "corpus") as reader:
        pending = reader.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = reader.submit(next, items, end)
            yield item  # type: ignore[misc]


def _shape(function: str, source: Any) -> tuple[int, int]:
    known = hasattr(source, "shape") or hasattr(source, "get_shape")
    if not known or not hasattr(source, "__getitem__"):
        raise TypeError(f"{function}: corpus must be {SUPPORTED}; got {type(source).__name__}")
    shape = tuple(source.shape if hasattr(source, "shape") else source.get_shape())
    if len(shape) != 2:
        raise ValueError(f"{function}: corpus must have two dimensions (M, D), got {shape}")
    return int(shape[0]), int(shape[1])


def _mapped(source: Any) -> Any:
    """The numpy.memmap whose memory `source` shows, if any."""
    array = source
    while array is not None and not isinstance(getattr(array, "base", None), mmap.mmap):
        array = getattr(array, "base", None)
    return array if hasattr(array, "filename") and hasattr(array, "offset") else None


def _forget_pages(mapped: Any) -> None:
    """Take the pages of a mapped file out of the resident set; they stay in the page cache.

    Not for a map in mode "c", whose changed pages exist nowhere else.
    """
    if mapped.mode in ("r", "r+", "w+") and hasattr(mmap, "MADV_DONTNEED"):
        mapped.base.madvise(mmap.MADV_DONTNEED)
