"""The docstring search demo: what it collects, how it searches, and that it runs."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import _loss_meter  # noqa: E402
import _pairs  # noqa: E402
import docstring_search  # noqa: E402

MIB = _loss_meter.MIB


@pytest.fixture(scope="module")
def pairs() -> list[_pairs.Pair]:
    return _pairs.collect_pairs()


# --- collecting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence", "masked"),
    [
        ("json.loads", "Deserialize s; loads never blocks.", "Deserialize s; never blocks."),
        ("m.parse_date", "Like parse_date, parseDate and parse-date.", "Like, and."),
        ("m.parse_date", "Parse a date or ParseDates.", "Parse a date or."),
        ("m.HTTPServer", "An HTTP server, not an http_servers list.", "An, not an list."),
        ("list.sort", "Sorts in place; unsorted and sorting stay.", "in place; unsorted and stay."),
        ("list.sort", "Sorted, sorts, SORT.", ",,."),
        ("m.get_x", "get get x x before y", "before y"),
        ("m.abs", "The absolute value", "The absolute value"),
        ("m.abs", "np.abs(x) and __abs__", "np. (x) and __ __"),
    ],
)
def test_mask_name(name: str, sentence: str, masked: str) -> None:
    assert _pairs.mask_name(sentence, name) == masked


def test_first_sentence_is_plain_text() -> None:
    doc = "\n    Return :class:`~a.B` of ``x``,\n    e.g. of 1. Then stop. \n\n    More.\n"
    assert _pairs.first_sentence(doc) == "Return a.B of x, e.g. of 1."
    assert _pairs.first_sentence(">>> f(1)\n2") == ""


def test_no_sentence_contains_its_name(pairs: list[_pairs.Pair]) -> None:
    def leaks(pair: _pairs.Pair) -> bool:
        own = pair.name.rsplit(".", 1)[-1].lower()
        tokens = re.findall(r"[^\W_]+", pair.sentence.lower())
        identifiers = re.findall(r"\w+", pair.sentence.lower())
        name_tokens = re.findall(r"[^\W_]+", own)
        size = len(name_tokens)
        joined = "".join(name_tokens)
        runs = [tokens[i : i + size] for i in range(len(tokens) - size + 1)]
        return own in identifiers or joined in tokens or name_tokens in runs

    assert [pair for pair in pairs if leaks(pair)] == []


def test_at_least_ten_thousand_distinct_public_pairs(pairs: list[_pairs.Pair]) -> None:
    assert len(pairs) >= 10_000
    assert pairs == sorted(pairs)
    assert len({pair.sentence.lower() for pair in pairs}) == len(pairs)
    assert len({pair.signature.lower() for pair in pairs}) == len(pairs)
    for pair in pairs:
        parts = pair.name.split(".")
        assert not any(part.startswith(("_", "test_", "Test")) for part in parts), pair
        assert not {"test", "tests"} & set(parts), pair
    assert {"torch", "numpy", "math", "json"} <= {pair.name.split(".")[0] for pair in pairs}


def test_collecting_twice_gives_the_same() -> None:
    assert _pairs.collect_pairs(stdlib_only=True) == _pairs.collect_pairs(stdlib_only=True)


# --- the model's input and the loss layers -------------------------------------------------------


def test_bags_select_what_embedding_bag_would_see() -> None:
    texts = ["read_csv(path)", "", "Sum of two tensors", "parseDate"]
    bags = docstring_search.make_bags(texts)
    chosen = torch.tensor([2, 0, 1, 2])
    picked = bags[chosen]
    table = torch.randn(docstring_search.BUCKETS, 3)
    got = F.embedding_bag(picked.ids, table, picked.offsets, include_last_offset=True)
    alone = [docstring_search.make_bags([texts[i]]).ids for i in chosen]
    torch.testing.assert_close(got, torch.stack([table[ids].mean(0) for ids in alone]))


def test_batches_never_repeat_a_row() -> None:
    plan = docstring_search.batches(100, 30, 7, torch.Generator().manual_seed(0))
    assert len(plan) == 7
    assert all(len(set(batch.tolist())) == 30 for batch in plan)


def test_mrr_counts_rank_and_cut_off() -> None:
    class Fixed:
        def __call__(self, signatures: object, sentences: object) -> tuple[torch.Tensor, ...]:
            keys = torch.eye(12)
            order = torch.arange(12, 0, -1).float()
            words = torch.stack([order, order, *torch.eye(12)[2:11], order])
            return keys, words  # ranks 1, 2, 1 (nine times), 12

    rows = torch.arange(12)
    bags = docstring_search.make_bags(["a"] * 12)
    got = docstring_search.mrr_at_10(Fixed(), (bags, bags), rows)
    assert got == pytest.approx((1 + 1 / 2 + 9) / 12)


def test_the_two_loss_layers_agree() -> None:
    results = {}
    for name, layer in _loss_meter.LAYERS.items():
        generator = torch.Generator().manual_seed(0)
        a, b = (F.normalize(torch.randn(67, 24, generator=generator), dim=1) for _ in "ab")
        inputs = [a.requires_grad_(), b.requires_grad_(), torch.tensor(9.0, requires_grad=True)]
        loss = layer(*inputs)
        results[name] = (loss.detach(), *torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(results["contrastive_ops"], results["pytorch"], rtol=1e-4, atol=1e-6)


def test_chunks_of_the_towers_train_as_the_whole_batch_does() -> None:
    texts = ["read_csv(path)", "Sum of two tensors", "parseDate", "close()", "write_row(row, file)"]
    both = docstring_search.make_bags(texts), docstring_search.make_bags(texts[::-1])
    runs = []
    for chunk in (None, 2):
        torch.manual_seed(0)
        layer = _loss_meter.LAYERS["contrastive_ops"]
        run = docstring_search.Training(docstring_search.TwoTower(16), layer, chunk)
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
        for _ in range(2):
            run.step(*both)
        runs.append(run)
    assert runs[0].losses == pytest.approx(runs[1].losses, abs=1e-6)
    for whole, chunked in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-6)


def test_asking_ends_with_an_empty_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = iter(["sort a list", " ", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(given))
    docstring_search.ask(lambda query: [f"{query}: {rank}" for rank in (1, 2)])
    assert capsys.readouterr().out == "    sort a list: 1\n    sort a list: 2\n"
    assert next(given) == "never read"


# --- the search for the largest batch ------------------------------------------------------------


def search(bytes_of, first: int = 4096, seconds: float = 1e9, seconds_of=lambda n: 0.0):
    """largest_batch on a made-up loss layer; the result and the trials it made."""
    made = []

    def run(batch: int, timeout: float) -> _loss_meter.Trial | None:
        made.append(batch)
        if seconds_of(batch) > timeout:
            return None
        return _loss_meter.Trial(batch, bytes_of(batch), seconds_of(batch))

    trial = _loss_meter.Trial(first, bytes_of(first), seconds_of(first))
    found = _loss_meter.largest_batch(trial, run, limit=2048 * MIB, seconds=seconds)
    return found, made


@pytest.mark.parametrize("bytes_per_pair", [4, 16, 17.3, 24, 400])
def test_search_finds_the_limit_of_a_stored_matrix(bytes_per_pair: float) -> None:
    found, made = search(lambda n: bytes_per_pair * n * n + 3000 * n)
    best = max(n for n in range(0, 30_000, 256) if bytes_per_pair * n * n + 3000 * n <= 2048 * MIB)
    assert found == (best, False)
    assert len(made) <= 8
    assert max(made) <= max(4096, best + 512)  # no trial that could fill the machine


def test_search_survives_a_killed_trial() -> None:
    found, _ = search(lambda n: math.inf if n > 10_000 else 8 * n * n)
    assert found == (9984, False)


def test_search_says_where_the_cap_ended_it() -> None:
    found, made = search(lambda n: 2000 * n, seconds=30, seconds_of=lambda n: (n / 8192) ** 2)
    assert found == (32_768, True)
    assert made == [16_384, 32_768]
    found, made = search(lambda n: 2000 * n, seconds=0, seconds_of=lambda n: 1.0)
    assert found == (4096, True) and made == []


# --- the whole of it -----------------------------------------------------------------------------


def test_quick_run(tmp_path: Path) -> None:
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "docstring_search.py"), "--quick"]
        + ["--out", str(tmp_path), "--json", str(tmp_path / "result.json"), "--dims", "16", "256"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shortest, longest = (line.split() for line in re.findall(r"^ +(?:16|256)  .*", done.stdout, re.MULTILINE))
    assert len(shortest) == len(longest) == 3
    assert all(0 < float(cut) < float(whole) for cut, whole in zip(shortest[1:], longest[1:], strict=True))
    assert (tmp_path / "docstring_search.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "result.json").read_text())
    both = {"pytorch", "contrastive_ops"}
    for key in ("losses", "ms_min", "ms_median", "extra_mib", "mrr", "largest"):
        assert set(result[key]) == both, key
    plain, ours = result["losses"]["pytorch"], result["losses"]["contrastive_ops"]
    assert len(plain) == len(ours) >= 5
    assert max(abs(p - o) for p, o in zip(plain, ours, strict=True)) <= 1e-3
    assert result["agrees"] is True
    assert plain[-1] < plain[0]
    assert all(mrr > 5 * result["mrr_chance"] for mrr in result["mrr"].values())
    mining = result["mining"]
    assert set(mining["mrr"]) == set(mining["seconds"]) == {"in_batch", "mined"}
    assert mining["refreshes"] == 4 and mining["starved"] == 0 and mining["margin_dropped"] > 0
    assert all(after > mining["mrr_before"] for after in mining["mrr"].values())
    sentence, *signatures = mining["example"]
    assert len(set(signatures)) == 1 + mining["num_negatives"]
    for shown in (sentence, "mined negatives as well", *signatures):
        assert shown in done.stdout
    for shown in ("ms per step", "peak extra memory", "MRR@10", "largest batch", "at least"):
        assert shown in done.stdout
    assert "within 0.001: yes" in done.stdout
