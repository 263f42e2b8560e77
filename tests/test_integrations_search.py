"""Mining, search and evaluators of sentence-transformers against the originals, on embeddings that are drawn."""

import inspect
import random
import types

import pytest
import torch
from torch.nn import functional as F

datasets = pytest.importorskip("datasets")
pytest.importorskip("sentence_transformers")

from sentence_transformers import util  # noqa: E402
from sentence_transformers.sentence_transformer import evaluation  # noqa: E402

from contrastive_ops.integrations import _originals  # noqa: E402
from contrastive_ops.integrations import _sentence_transformers_search as search  # noqa: E402
from contrastive_ops.integrations import sentence_transformers as ours  # noqa: E402

ANCHORS = [f"q{i // 2}" for i in range(60)]
POSITIVES = [f"d{i * 7 % 40}" for i in range(60)]
CORPUS = [f"c{i}" for i in range(100)]
DATA = datasets.Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES})


def drawn(texts, dim=16):
    """A row of normal numbers for each text."""
    generator = torch.Generator()
    return torch.stack([torch.randn(dim, generator=generator.manual_seed(hash_of(text))) for text in texts])


def hash_of(text):
    return int.from_bytes(text.encode(), "little")


class Model:
    """What the searches ask a model for."""

    device = torch.device("cpu")
    model_card_data = types.SimpleNamespace(set_evaluation_metrics=lambda *_: None, base_model="drawn")

    def __init__(self, metric="cosine"):
        self.similarity_fn_name = metric

    def encode(self, texts, convert_to_tensor=False, **_):
        rows = drawn(texts)
        return rows if convert_to_tensor else F.normalize(rows).numpy()

    encode_query = encode_document = encode

    def get_embedding_dimension(self):
        return 16

    def similarity(self, a, b):
        return util.SimilarityFunction.to_similarity_fn(self.similarity_fn_name)(a, b)

    def similarity_pairwise(self, a, b):
        return util.SimilarityFunction.to_similarity_pairwise_fn(self.similarity_fn_name)(a, b)


class Reranker:
    """A cross encoder whose scores are those of other rows."""

    def predict(self, pairs, **_):
        return torch.stack([F.cosine_similarity(*drawn([a + "!", b + "!"]), dim=0) for a, b in pairs])


def mined(module, **options):
    random.seed(0)
    model = options.pop("model", None) or Model()
    found = module.mine_hard_negatives(DATA, model, verbose=False, **options)
    return found.column_names, found.to_dict()


def check_equal(mine, theirs):
    assert mine[0] == theirs[0]
    for name, column in theirs[1].items():
        if "score" not in name:
            assert mine[1][name] == column
            continue
        for values in zip(mine[1][name], column, strict=True):
            torch.testing.assert_close(*map(torch.tensor, values), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"range_min": 2, "num_negatives": 5, "output_format": "n-tuple", "output_scores": True},
        {"absolute_margin": 0.1, "max_score": 0.6, "min_score": -0.2, "range_max": 30},
        {"relative_margin": 0.05, "range_max": 25, "output_format": "labeled-list", "output_scores": True},
        {"output_format": "labeled-pair"},
        {"output_format": "labeled-pair", "output_scores": True, "use_faiss": True},
        {"sampling_strategy": "random", "range_max": 20, "output_scores": True},
        {"include_positives": True, "range_max": 12},
        {"corpus": CORPUS, "faiss_batch_size": 7, "max_score": 0.5},
        {"cross_encoder": Reranker(), "relative_margin": 0.2, "output_format": "labeled-list"},
        {"model": Model("dot"), "num_negatives": 300, "range_max": 400},
    ],
    ids=lambda options: "-".join(options),
)
def test_negatives_are_those_of_the_original(options):
    check_equal(mined(ours, **options), mined(util, **options))


def test_margins_do_not_use_up_the_candidates():
    names, mine = mined(ours, relative_margin=0.05, output_scores=True, output_format="labeled-list")
    _, theirs = mined(util, relative_margin=0.05, output_scores=True, output_format="labeled-list")
    assert len(mine["anchor"]) > len(theirs["anchor"]) > 0
    _, everything = mined(util, relative_margin=0.05, output_scores=True, output_format="labeled-list", range_max=39)
    check_equal((names, mine), (names, everything))  # of all 40 documents


def test_embeddings_in_place_of_a_model(tmp_path):
    embeddings = {"anchor_embeddings": drawn(ANCHORS), "positive_embeddings": drawn(POSITIVES).numpy()}
    options = {"relative_margin": 0.05, "output_scores": True, "verbose": False}
    found = ours.mine_hard_negatives(DATA, **embeddings, **options)
    assert found.to_dict() == mined(ours, relative_margin=0.05, output_scores=True)[1]
    whole = {"corpus": CORPUS, "corpus_embeddings": drawn(CORPUS)}
    found = ours.mine_hard_negatives(DATA, **embeddings, **whole, **options)
    assert found.to_dict() == mined(ours, relative_margin=0.05, output_scores=True, corpus=CORPUS)[1]
    with pytest.raises(ValueError, match=r"corpus_embeddings must have shape \(100, D\), a row a text, got NoneType"):
        ours.mine_hard_negatives(DATA, **embeddings, corpus=CORPUS)
    with pytest.raises(ValueError, match="cache_folder must be None with embeddings"):
        ours.mine_hard_negatives(DATA, **embeddings, cache_folder=str(tmp_path))
    with pytest.raises(TypeError, match="model must embed texts, got None; or give embeddings"):
        ours.mine_hard_negatives(DATA)


def test_the_signature_is_the_original_one():
    theirs = inspect.signature(util.mine_hard_negatives).parameters
    mine = inspect.signature(ours.mine_hard_negatives).parameters
    assert list(mine)[: len(theirs)] == list(theirs)
    assert [mine[name].default for name in theirs if name != "model"] == [
        each.default for name, each in theirs.items() if name != "model"
    ]


def test_a_distance_runs_the_original_and_says_so():
    _originals._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="mine_hard_negatives: similarity_fn_name=euclidean has no fused form"):
        mine = mined(ours, model=Model("euclidean"))
    check_equal(mine, mined(util, model=Model("euclidean")))
    _originals._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="semantic_search: score_function=manhattan_sim has no fused form"):
        ours.semantic_search(drawn(ANCHORS), drawn(CORPUS), score_function=util.manhattan_sim)


@pytest.mark.parametrize("score", [util.cos_sim, util.dot_score])
def test_semantic_search_and_paraphrases(score):
    queries, corpus = drawn(ANCHORS), drawn(CORPUS)
    options = {"score_function": score, "top_k": 7, "corpus_chunk_size": 33}
    for found, expected in zip(
        ours.semantic_search(queries, corpus, **options), util.semantic_search(queries, corpus, **options), strict=True
    ):
        assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in expected]
    found, expected = (
        module.paraphrase_mining(Model(), CORPUS, top_k=5, corpus_chunk_size=40, score_function=score)
        for module in (ours, util)
    )
    assert [pair[1:] for pair in found] == [pair[1:] for pair in expected]


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("copies", [1, 3])
def test_retrieval_metrics_are_those_of_the_original(metric, copies, monkeypatch):
    """Also where copies of a text tie, of which the original takes those that come first by name."""
    texts = [text for text in CORPUS for _ in range(copies)]
    draw = random.Random(0)
    corpus = {f"{draw.random()}": text for text in texts}
    relevant = {f"q{i}": set(draw.sample(list(corpus), 6)) for i in range(30)}
    queries = {f"q{i}": f"text {i}" for i in range(30)}
    options = {"show_progress_bar": False, "write_csv": False, "corpus_chunk_size": 64, "map_at_k": [10]}
    dense = []
    whole = search.Scores.dense
    monkeypatch.setattr(search.Scores, "dense", lambda scores: dense.append(scores) or whole(scores))
    values = [
        module.InformationRetrievalEvaluator(queries, corpus, relevant, **options)(Model(metric))
        for module in (ours, evaluation)
    ]
    assert values[0] == values[1] and len(values[0]) > 10
    assert bool(dense) == (copies > 1)
    assert ours.NanoBEIREvaluator.information_retrieval_class is ours.InformationRetrievalEvaluator


def test_scores_are_the_matrix_for_everything_else():
    x, y = drawn(ANCHORS), drawn(CORPUS)
    scores = search.Scores(x, y, util.dot_score, "dot")
    expected = util.dot_score(x, y)
    assert len(scores) == 60 and len(scores[0]) == 100 and scores.shape == expected.shape
    assert torch.equal(torch.stack([scores, scores])[1], expected)
    assert torch.equal(scores > 0, expected > 0) and torch.equal(scores == 0, expected == 0)
    assert torch.equal(scores.topk(3, largest=False).indices, expected.topk(3, largest=False).indices)
    x[3, 0] = torch.nan
    found, expected = torch.topk(search.Scores(x, y, util.dot_score, "dot"), 3), util.dot_score(x, y).topk(3)
    assert torch.equal(found.values.isnan(), expected.values.isnan())
    sides = x.to_sparse(), y.to_sparse()
    assert torch.equal(search._unstored("", util.dot_score)(*sides).isnan(), util.dot_score(*sides).isnan())
