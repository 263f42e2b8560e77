"""Search of a corpus that streams through a `TopKState`: progress, checkpoints, resumption."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.rule_slices import columns_named
from ..core.rules import Pairs
from ..ops.similarity_topk import TopK
from ._fingerprint import fingerprint
from ._ranges import Range, covers
from .corpus import Corpus, as_corpus, has_shape, read_ahead, rows_in_block
from .state import TopKState

# Between two writes of a checkpoint, which is as large as the lists.
CHECKPOINT_SECONDS = 10.0
# Rows of the corpus that a checkpoint knows it by; all of them would take a pass.
SAMPLED_ROWS = 64

Blocks = Generator[tuple[int, Tensor], None, None]
Progress = bool | Callable[[int, int | None], object]


class _State(TopKState):
    _function = "search"


def search(
    query: Tensor,
    corpus: object,
    k: int,
    *,
    metric: str = "dot",
    pairs: Pairs | None = None,
    documents: Tensor | None = None,
    block_rows: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = False,
    backend: str = "auto",
) -> TopK:
    """Find the k best rows of a corpus for every query, reading the corpus block by block.

    Equivalent to::

        similarity_topk(query, torch.cat(list_of_blocks), k, metric=metric, pairs=pairs)

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        corpus: (M, D) of the same dtype, in memory or not: a tensor, a numpy array or memmap, a safetensors slice
            (``safe_open(...).get_slice(name)``), or any object with a shape of two numbers and [a:b] slicing. Or an
            iterable of blocks (m, D) one after another, or of (index of the first row, block) in any order.
        k: length of the lists.
        metric: "dot", "cosine" or "sqeuclidean", as in `similarity_topk`.
        pairs: which pairs take part, with columns numbered over the whole corpus; all rules but `fill`.
        documents: (M,) int64, the document of each row where rows are chunks of documents; any int64 but -1. Lists are
            then of the k best documents, each at its best chunk (MaxP), which is what an index names.
        block_rows: rows read at once; by default about 64 MiB.
        checkpoint: a file that the search writes every few seconds, when it ends and when an exception ends it. If it
            exists the search goes on from it, and rows that were searched are not searched again. Delete it to start
            anew.
        progress: True shows a bar where tqdm is installed; or a function that is called after each block with the
            rows that are done and the rows of the corpus (None where an iterable does not tell).
        backend: "auto", "reference", "cpu", "triton", "cuda" or "hopper", as in `similarity_topk`; "hopper" is for
            lists that are much shorter than a block.

    Returns:
        `TopK` (values (N, k), indices (N, k), counts (N,)), without gradients: `similarity_topk` on the rows that were
        found gives those.

    Raises:
        ValueError: shapes or values that do not fit; a corpus that is shorter than its shape or the rules say; a
            checkpoint of another problem.
        TypeError: dtypes that do not fit, a corpus of another kind.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        Memory: O(N k) and two blocks, one of which is read by a second thread while the other is searched. An iterable
        is read by the calling thread. A checkpoint is the size of the lists, 12 bytes an entry in float32; it knows
        query and rules by a hash of their bytes, and a corpus by its shape and a sample of rows.

    Examples:
        >>> blocks = (torch.randn(1000, 16) for _ in range(5))
        >>> found = search(torch.randn(3, 16), blocks, 10, metric="cosine")
        >>> found.values.shape, bool((found.indices < 5000).all())
        (torch.Size([3, 10]), True)
    """
    name = "search"
    query = checks.from_array(name, "query", query)
    checks.check_matrix(name, "query", query)
    if block_rows is not None:
        block_rows = checks.integer(name, "block_rows", block_rows, 1)
    step = rows_in_block(query.shape[1], query.dtype) if block_rows is None else block_rows
    parts = None if has_shape(corpus) or isinstance(corpus, (str, bytes, dict)) else corpus
    view = None if isinstance(parts, Iterable) else as_corpus(name, corpus, query)
    rows = columns_named(pairs) if view is None else view.rows
    state = _State(query, k, metric=metric, pairs=pairs, documents=documents, rows=rows, backend=backend)
    known = "blocks" if view is None or checkpoint is None else sample(view)
    file = None if checkpoint is None else Checkpoint(name, checkpoint, state, known)
    resumed = state.covered
    if view is None:
        blocks = _blocks_of_parts(parts, query, resumed, step)  # type: ignore[arg-type]
    else:
        blocks = read_ahead(view.unseen(resumed, step))
    done = sum(end - begin for begin, end in resumed)
    with contextlib.ExitStack() as stack:
        if file is not None:
            stack.callback(file.write)
        report = stack.enter_context(reporter(progress, done, rows))
        stack.enter_context(contextlib.closing(blocks))
        for begin, block in blocks:
            state.update(block, begin)
            done += block.shape[0]
            if file is not None:
                file.write_now_and_then()
            report(done, rows)
    return state.finalize()


def _blocks_of_parts(parts: Iterable[Any], query: Tensor, seen: list[Range], step: int) -> Blocks:
    """Blocks of what was not seen of parts that come one after another, or with their first rows."""
    begin = last = 0
    for item in parts:
        begin, part = item if isinstance(item, tuple) and len(item) == 2 else (begin, item)
        begin = checks.integer("search", "index of the first row of a block", begin, 0)
        corpus = as_corpus("search", part, query)
        yield from corpus.unseen(seen, step, begin)
        begin += corpus.rows
        last = max(last, begin)
    if seen and last < seen[-1][1]:
        raise ValueError(
            f"search: corpus must have the {seen[-1][1]} rows that the checkpoint knows, got {last}: it is another "
            "one, or ended early"
        )


class Checkpoint:
    """The file that a state is saved in; written whole or not at all.

    Of several processes each has a file of its own, with its rank at the end but for the first; what is found of more
    processes than there are is read by one of those that are.

    Args:
        function: the function to name in errors.
        path: of the file.
        state: goes on from the file, and is written.
        corpus: what `sample` says of it.
        rank: of this process.
        ranks: how many there are.
    """

    def __init__(
        self,
        function: str,
        path: str | os.PathLike[str],
        state: TopKState,
        corpus: str,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        whole = os.path.abspath(os.fspath(path))
        if not os.path.isdir(os.path.dirname(whole)):
            raise ValueError(f"{function}: checkpoint must be in a folder that exists, got {path}")
        self.function, self.state = function, state
        self.path = f"{whole}.{rank}" if rank else whole
        numbers = (each.removeprefix(f"{whole}.") for each in glob.glob(f"{glob.escape(whole)}.*"))
        more = sorted(int(number) for number in numbers if number.isdecimal())
        self.others = [f"{whole}.{number}" for number in more if number >= ranks and number % ranks == rank]
        self.corpus = corpus
        self.written = time.monotonic()
        if os.path.exists(self.path):
            self._load(self.path, state)
        for other in self.others:
            part = state.begun_anew()
            self._load(other, part)
            if not covers(state.covered, part.covered):  # as it is where a process ended between its two steps below
                state.merge(part)
        self.covered = [] if self.others else state.covered

    def write_now_and_then(self) -> None:
        """Write, if it was long ago."""
        if time.monotonic() - self.written >= CHECKPOINT_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what the state has seen since."""
        if self.state.covered == self.covered:
            return
        state = self.state.state_dict()
        saved = {"state": state, "corpus": self.corpus, "digest": _digest(state)}
        part = f"{self.path}.{os.getpid()}.part"
        try:
            with open(part, "wb") as file:
                torch.save(saved, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(part)
            raise
        for other in self.others:
            os.remove(other)
        self.others = []
        self.covered, self.written = self.state.covered, time.monotonic()

    def _load(self, path: str, state: TopKState) -> None:
        advice = f"\n  delete {path} to search anew"
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            found, corpus = saved["state"], saved["corpus"]
        except Exception as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is of some files that are cut short
                raise
            # Not torch's words: they advise to load what was refused in a way that runs the code in it.
            raise ValueError(
                f"{self.function}: checkpoint must be a file that {self.function} wrote, got one that cannot be read "
                f"({type(error).__name__}){advice}"
            ) from None
        if saved.get("digest") not in (None, _digest(found)):  # None: written before there was one
            raise ValueError(f"{self.function}: checkpoint must be as it was written, got one with other bytes{advice}")
        try:
            state.load_state_dict(found)
        except ValueError as error:
            raise ValueError(f"{error}{advice}") from None
        if corpus != self.corpus:
            raise ValueError(f"{self.function}: checkpoint must be of the same corpus, got one with other rows{advice}")


def _digest(state: object) -> str:
    """A hash of all that a state has found: bytes of a file change, and torch does not look."""
    parts = state if isinstance(state, dict) else {}
    statistics = parts.get("statistics")
    found = [parts.get(name) for name in ("values", "indices", "covered")]
    found += [each for _, each in sorted(statistics.items())] if isinstance(statistics, dict) else []
    return fingerprint(*(each for each in found if isinstance(each, Tensor)))


def sample(corpus: Corpus) -> str:
    """A hash of some rows, first and last among them."""
    count = min(SAMPLED_ROWS, corpus.rows)
    return fingerprint(corpus.take(torch.linspace(0, corpus.rows - 1, count, dtype=torch.float64).round().long()))


@contextlib.contextmanager
def reporter(
    progress: Progress, done: int, rows: int | None, function: str = "search"
) -> Iterator[Callable[[int, int | None], object]]:
    """What to call after each block."""
    if callable(progress):
        yield progress
        return
    if not isinstance(progress, bool):
        raise TypeError(f"{function}: progress must be a bool or a function, got {type(progress).__name__}")
    try:
        from tqdm.auto import tqdm
    except ImportError:
        tqdm = None
    if not progress or tqdm is None:
        yield lambda done, rows: None
        return
    with tqdm(total=rows, initial=done, unit=" rows", unit_scale=True) as bar:
        yield lambda done, rows: bar.update(done - bar.n)
