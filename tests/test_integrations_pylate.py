"""Losses of PyLate against its own, where it is installed: it asks for other releases than those of the peers."""

import copy
import inspect

import pytest
import torch

original = pytest.importorskip("pylate.losses")
scores = pytest.importorskip("pylate.scores")

from contrastive_ops.integrations import _originals  # noqa: E402
from contrastive_ops.integrations import pylate as ours  # noqa: E402

SKIPPED = [3, 5]  # tokens of documents that no score counts


class Encoder(torch.nn.Module):
    """What the losses ask of a ColBERT model."""

    def __init__(self, expansion):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(40, 16)
        self.mix = torch.nn.Linear(16, 12)
        self.drop = torch.nn.Dropout(0.1)
        self.skiplist, self.do_query_expansion = SKIPPED, expansion

    def forward(self, features):
        # Cosines above 0: of negative ones a similarity that the original's mask makes 0 would be the best.
        return {"token_embeddings": self.drop(self.mix(self.words(features["input_ids"]))).exp()}


def batch(columns, rows=6, ways=1):
    torch.manual_seed(1)
    shapes = [(rows, 5), *[(rows * ways, 9)] * columns]
    found = []
    for shape in shapes:
        mask = torch.arange(shape[1]) < torch.randint(2, shape[1] + 1, (shape[0], 1))
        ids = torch.randint(0, 40, shape)
        ids[:, 0] = 1  # as [CLS], which no list skips
        found.append({"input_ids": ids, "attention_mask": mask.long()})
    return found


def curve(module, name, model, features, labels, **options):
    """Some steps of training: losses, and the weights behind them."""
    model = copy.deepcopy(model)
    loss, optimizer = getattr(module, name)(model, **options), torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(2)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(features, labels)
        value.backward()
        optimizer.step()
        values.append(value.detach())
    return torch.stack(values), torch.cat([each.detach().flatten() for each in model.parameters()])


@pytest.fixture(autouse=True)
def warned():
    _originals._warn_once.cache_clear()


@pytest.mark.filterwarnings("error:.*has no fused form")
@pytest.mark.parametrize("expansion", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Contrastive", {}),
        ("Contrastive", {"temperature": 0.3, "size_average": False, "score_mini_batch_size": 4}),
        ("CachedContrastive", {"mini_batch_size": 4, "temperature": 0.3}),
        ("Distillation", {}),
        ("Distillation", {"normalize_scores": False, "size_average": False}),
    ],
)
def test_curves_of_training_are_those_of_the_originals(name, options, expansion):
    kd = name == "Distillation"
    features = batch(1, ways=4) if kd else batch(2)
    labels = torch.randn(6, 4) if kd else None
    mine, theirs = (curve(module, name, Encoder(expansion), features, labels, **options) for module in (ours, original))
    assert theirs[0][-1] < theirs[0][0]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_another_metric_or_backend_runs_the_original(monkeypatch):
    features = batch(2)
    with pytest.warns(UserWarning, match="Contrastive: score_metric=XTRScores has no fused form"):
        loss = ours.Contrastive(Encoder(True), score_metric=scores.XTRScores())
    assert type(loss.score_metric) is scores.XTRScores
    loss = ours.Contrastive(Encoder(True).eval())
    value = loss(features)
    monkeypatch.setenv("PYLATE_SCORES_BACKEND", "torch")
    with pytest.warns(UserWarning, match="ColBERTScores: backend='torch' has no fused form"):
        torch.testing.assert_close(loss(features), value)


def test_constructors_and_kinds_are_those_of_the_originals():
    for name in ("Contrastive", "CachedContrastive", "Distillation"):
        loss = getattr(ours, name)(Encoder(True))
        assert isinstance(loss, getattr(original, name))
        assert list(loss.state_dict()) == list(getattr(original, name)(Encoder(True)).state_dict())
    parameters = (inspect.signature(module.colbert_kd_scores).parameters for module in (ours, scores))
    assert list(next(parameters)) == list(next(parameters))


def test_masked_tokens_win_nowhere_and_documents_without_tokens_have_score_0():
    queries, documents = torch.ones(2, 3, 4), -torch.ones(2, 3, 5, 4)
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[0, 0, 2:], mask[1, 2] = False, False
    found = ours.ColBERTScores()(queries, documents, documents_mask=mask)
    assert found[:, 0].tolist() == [-12.0, -12.0] and found[:, 5].tolist() == [0.0, 0.0]
    found = ours.colbert_kd_scores(queries, documents, documents_mask=mask)
    assert found.tolist() == [[-12.0] * 3, [-12.0, -12.0, 0.0]]
