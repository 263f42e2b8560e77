"""sentence-transformers' searches, its mining and its evaluators, on `similarity_topk`.

All of them ask a function for a matrix of scores and take the best of each row by `torch.topk`. Here the function
returns `Scores`, which know their two sides, and `torch.topk` of those makes no matrix. All else is the original code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from ..mining import NegativeRules
from ..ops import Pairs, similarity_topk
from ._originals import runs_original, third_party

INSTALL = "'sentence-transformers>=6'"
third_party("sentence_transformers", INSTALL)
evaluation = third_party("sentence_transformers.sentence_transformer.evaluation", INSTALL)
util = third_party("sentence_transformers.util", INSTALL)

Score = Callable[[Any, Any], Any]
METRICS = {util.cos_sim: "cosine", util.pytorch_cos_sim: "cosine", util.dot_score: "dot"}


class Scores:
    """The matrix ``score(x, y)`` that is made only where something else than its best columns is asked for.

    Args:
        x: (N, D).
        y: (M, D).
        score: what makes the matrix.
        metric: as `similarity_topk` names it.
        pairs: which pairs take part; without them those of a list that is not full are the matrix's.
        keeps_ties: the caller looks for scores that equal the last of a list. Where there are any, all is read from the
            matrix, because two roundings of one score may differ.
    """

    def __init__(
        self, x: Tensor, y: Tensor, score: Score, metric: str, *, pairs: Pairs | None = None, keeps_ties: bool = False
    ) -> None:
        self.x, self.y, self.score, self.metric, self.pairs, self.keeps_ties = x, y, score, metric, pairs, keeps_ties
        self._best: Tensor | None = None
        self._dense: Tensor | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.topk and isinstance(args[0], cls):
            return args[0].topk(*args[1:], **kwargs)
        args, kwargs = _pytree.tree_map(lambda each: each.dense() if isinstance(each, cls) else each, (args, kwargs))
        return function(*args, **kwargs)

    def dense(self) -> Tensor:
        """The matrix."""
        if self._dense is None:
            self._dense = self.score(self.x, self.y)
        return self._dense

    def topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:  # noqa: A002
        """What `torch.topk` returns of the matrix; equal scores are in the order of their columns."""
        more = min(k + self.keeps_ties, len(self.y))
        if dim in (1, -1) and largest and 0 < k <= more and self._dense is None:
            found = similarity_topk(self.x, self.y, more, metric=self.metric, pairs=self.pairs)
            tied = self.keeps_ties and more > k and bool((found.values[:, k - 1] == found.values[:, k]).any())
            if self.pairs is not None or not (tied or bool((found.indices < 0).any())):
                self._best = found.values
                return torch.return_types.topk((found.values[:, :k], found.indices[:, :k]))
        return torch.topk(self.dense(), k, dim, largest, sorted)

    def __getitem__(self, row: Any) -> Any:
        return self.score(self.x[row], self.y)[0] if isinstance(row, int) else self.dense()[row]

    def __len__(self) -> int:
        return len(self.x)

    def __ge__(self, other: Any) -> Any:
        # After `topk` without ties no other column is as good as those of the list, so they alone are compared.
        return (self.dense() if self._best is None else self._best) >= other

    def __gt__(self, other: Any) -> Any:
        return self.dense() > other

    def __eq__(self, other: Any) -> Any:
        return self.dense() == other

    __hash__ = None  # type: ignore[assignment]

    def detach(self) -> Scores:
        """Scores have no gradient."""
        return self

    def to(self, *_: Any, **__: Any) -> Scores:
        """The results are where the two sides are."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor] | None:
    """Both sides as `similarity_topk` takes them, None where it does not."""
    pair = [torch.from_numpy(side) if isinstance(side, np.ndarray) else side for side in (a, b)]
    kinds = {
        (side.layout, side.dim(), side.dtype, side.device, side.shape[-1]) if isinstance(side, Tensor) else None
        for side in pair
    }
    plain = len(kinds) == 1 and None not in kinds and pair[0].layout is torch.strided and pair[0].dim() == 2
    fits = plain and pair[0].is_floating_point() and len(pair[1])
    return (pair[0].detach(), pair[1].detach()) if fits else None


def _metric(function: Score) -> str | None:
    """The metric of a function of scores, or of the model whose method it is."""
    if isinstance(function, FunctionType):
        return METRICS.get(function)
    name = getattr(getattr(function, "__self__", None), "similarity_fn_name", None)
    return name if name in METRICS.values() else None


def _unstored(who: str, function: Score, keeps_ties: bool = False) -> Score:
    """A function of scores whose matrices are `Scores`."""
    metric = _metric(function)
    if metric is None:
        runs_original(who, f"score_function={util.similarity_fct_name(function)}")
        return function

    def score(a: Any, b: Any) -> Any:
        pair = _pair(a, b)
        return function(a, b) if pair is None else Scores(*pair, function, metric, keeps_ties=keeps_ties)

    return score


def _search(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function of sentence-transformers that takes a `score_function`, without matrices of scores."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def search(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        call.arguments["score_function"] = _unstored(original.__name__, call.arguments["score_function"])
        return original(*call.args, **call.kwargs)

    return search


semantic_search = _search(util.semantic_search)
paraphrase_mining = _search(util.paraphrase_mining)
paraphrase_mining_embeddings = _search(util.paraphrase_mining_embeddings)


class InformationRetrievalEvaluator(evaluation.InformationRetrievalEvaluator):
    """`InformationRetrievalEvaluator` that keeps the best documents of a query, and never a score of each.

    Args:
        *args: see `sentence_transformers.sentence_transformer.evaluation.InformationRetrievalEvaluator`.
        **kwargs: the same. Other `score_functions` than cosine and dot product run as they are.
    """

    def compute_all_metrics(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the metrics of all score functions."""
        functions: dict[str, Score] = self.score_functions  # type: ignore[has-type]
        name = type(self).__name__
        self.score_functions = {key: _unstored(name, each, keeps_ties=True) for key, each in functions.items()}
        try:
            return super().compute_all_metrics(model, *args, **kwargs)
        finally:
            self.score_functions = functions


class NanoBEIREvaluator(evaluation.NanoBEIREvaluator):
    """`NanoBEIREvaluator` of the `InformationRetrievalEvaluator` of this module.

    Args:
        *args: see `sentence_transformers.sentence_transformer.evaluation.NanoBEIREvaluator`.
        **kwargs: the same.
    """

    information_retrieval_class = InformationRetrievalEvaluator


_mine = util.mine_hard_negatives
_SIGNATURE = inspect.signature(_mine)


def mine_hard_negatives(
    dataset: Any,
    model: Any = None,
    *args: Any,
    anchor_embeddings: Tensor | None = None,
    positive_embeddings: Tensor | None = None,
    corpus_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`sentence_transformers.util.mine_hard_negatives` without a matrix of scores, by a model or by embeddings.

    Equivalent to the original, of which all arguments, prints, caches and formats are, but for one thing: without a
    `range_max` the original looks at ``range_min + 10 * num_negatives`` documents and their positives, and finds few
    negatives where margins drop most of them. Here positives, margins and limits decide inside the search, as in
    `contrastive_ops.mine_hard_negatives`, and a query has as many negatives as there are. With a `range_max`, a
    `cross_encoder` or `include_positives` candidates are those of the original.

    Args:
        dataset: a `datasets.Dataset` of anchors and positives.
        model: what embeds them; None with embeddings. The original runs where its similarity is a distance.
        *args: as of the original, in its order.
        anchor_embeddings: (rows of the data set, D), in place of a model.
        positive_embeddings: (rows of the data set, D).
        corpus_embeddings: (texts of `corpus`, D), where there is a `corpus`.
        **kwargs: as of the original. `use_faiss` changes nothing: the search is exact, and needs no index.

    Returns:
        A `datasets.Dataset` in the `output_format`.

    Raises:
        ValueError: embeddings that do not fit the texts; what the original raises.
        TypeError: neither a model nor embeddings.
    """
    call = _SIGNATURE.bind(dataset, model, *args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    embeddings = anchor_embeddings, positive_embeddings, corpus_embeddings
    if any(each is not None for each in embeddings):
        options["model"] = model = _Embedded(options, *embeddings)
    elif model is None:
        raise TypeError("mine_hard_negatives: model must embed texts, got None; or give embeddings")
    metric = getattr(model, "similarity_fn_name", None)
    if metric not in METRICS.values():
        runs_original("mine_hard_negatives", f"similarity_fn_name={metric}")
        return _mine(*call.args, **call.kwargs)
    options.update(model=_Miner(model, options), use_faiss=False)
    return _mine(*call.args, **call.kwargs)


mine_hard_negatives.__signature__ = _SIGNATURE.replace(  # type: ignore[attr-defined]
    parameters=[
        *(each.replace(default=None) if each.name == "model" else each for each in _SIGNATURE.parameters.values()),
        *(p for p in inspect.signature(mine_hard_negatives).parameters.values() if p.kind is p.KEYWORD_ONLY),
    ]
)


def _texts(options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The anchors and the positives of a data set."""
    dataset, found = options["dataset"], []
    for position, name in enumerate((options["anchor_column_name"], options["positive_column_name"])):
        known = name in dataset.column_names if name else False
        found.append(list(dataset[name if known else dataset.column_names[position]]))
    return found[0], found[1]


class _Embedded:
    """In place of a model, embeddings that are known."""

    similarity_fn_name = "cosine"
    similarity = staticmethod(util.cos_sim)
    similarity_pairwise = staticmethod(util.pairwise_cos_sim)

    def __init__(self, options: dict[str, Any], anchors: Any, positives: Any, corpus: Any) -> None:
        if options["cache_folder"] is not None:
            raise ValueError("mine_hard_negatives: cache_folder must be None with embeddings, got one")
        texts = _texts(options)
        self.queries = self._table("anchor_embeddings", texts[0], anchors)
        self.documents = self._table("positive_embeddings", texts[1], positives)
        if options["corpus"] is not None:
            self.documents = self._table("corpus_embeddings", options["corpus"], corpus) | self.documents
        self.device = torch.device("cpu")

    @staticmethod
    def _table(name: str, texts: Sequence[Any], rows: Any) -> dict[Any, Tensor]:
        rows = torch.as_tensor(rows) if isinstance(rows, np.ndarray) else rows
        if not isinstance(rows, Tensor) or rows.dim() != 2 or len(rows) != len(texts):
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"mine_hard_negatives: {name} must have shape ({len(texts)}, D), a row a text, got {got}")
        unit = torch.nn.functional.normalize(rows.detach().float().cpu())
        return dict(zip(reversed(texts), reversed(unit.unbind()), strict=True))  # the first row of a text stays

    def encode_query(self, texts: Sequence[Any], **_: Any) -> np.ndarray:
        """The rows of anchors."""
        return torch.stack([self.queries[text] for text in texts]).numpy()

    def encode_document(self, texts: Sequence[Any], **_: Any) -> np.ndarray:
        """The rows of documents."""
        return torch.stack([self.documents[text] for text in texts]).numpy()


class _Miner:
    """A model whose similarities are `Scores` that know positives and margins."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._model, self._rows = model, 0
        self._options = dict(options)
        margin, candidates = options["margin"], ("range_max", "cross_encoder", "include_positives")
        self._decides = not any(options[name] for name in candidates)
        absolute = options["absolute_margin"] if margin is None else margin
        limits = {name: options[name] for name in ("relative_margin", "min_score", "max_score")}
        self._rules = NegativeRules(absolute_margin=absolute, **limits)

    def similarity(self, queries: Any, documents: Any) -> Any:
        """Scores of some queries, which come in order, and all documents."""
        pair = _pair(queries, documents)
        if pair is None:
            return self._model.similarity(queries, documents)
        pairs = self._pairs(*pair) if self._decides else None
        return Scores(*pair, self._model.similarity, self._model.similarity_fn_name, pairs=pairs)

    @functools.cached_property
    def _positives(self) -> list[list[int]]:
        """The documents of each query that are positives, numbered as the original numbers them."""
        anchors, positives = _texts(self._options)
        documents = dict.fromkeys([*(self._options["corpus"] or ()), *positives])
        number = {text: at for at, text in enumerate(documents)}
        listed: dict[Any, dict[int, None]] = {anchor: {} for anchor in anchors}
        for anchor, positive in zip(anchors, positives, strict=True):
            listed[anchor][number[positive]] = None
        return [list(each) for each in listed.values()]

    def _pairs(self, queries: Tensor, documents: Tensor) -> Pairs:
        listed = self._positives[self._rows : self._rows + len(queries)]
        self._rows += len(queries)
        lengths = torch.tensor([len(each) for each in listed])
        column = torch.tensor([each for part in listed for each in part])
        row = torch.repeat_interleave(lengths)
        scores = self._model.similarity_pairwise(queries[row.to(queries.device)], documents[column.to(queries.device)])
        positive = scores.new_full((len(queries),), torch.inf).scatter_reduce(0, row.to(scores.device), scores, "amin")
        indptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        upper = self._rules.upper(positive)
        return Pairs(
            exclude=(indptr.to(queries.device), column.to(queries.device)),
            below=None if upper is None else upper.float().to(queries.device),
            above=self._rules.min_score,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
