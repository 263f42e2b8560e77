"""The examples at a reduced size: what they promise, not how good they get."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import _digits  # noqa: E402
import _limoe_report  # noqa: E402
import moe_embeddings  # noqa: E402
import simclr_digits  # noqa: E402
import train_limoe  # noqa: E402

from benchmarks import tables_examples  # noqa: E402

SMALL = train_limoe.Config(steps=6, batch=16, dim=16, hidden=16, layers=2, heads=2, experts=4)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- digits and captions -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[_digits.Digits, _digits.Digits]:
    return _digits.load(397, seed=0)


def test_digits_are_split_without_overlap(digits):
    train, test = digits
    assert len(train) == 1400 and len(test) == 397
    rows = torch.cat([train.images, test.images]).flatten(1)
    alone = len(_digits.load(0, seed=1)[0].images.flatten(1).unique(dim=0))
    assert len(rows.unique(dim=0)) == alone
    assert train.labels.bincount(minlength=10).min() > 100


def test_attributes_say_what_is_seen():
    stroke = torch.zeros(6, 8, 8)
    for row in range(8):
        stroke[0, row, 3] = 1  # upright, thin
        stroke[1, row, 2:6] = 1  # upright, bold and wide
        stroke[2, row, (9 - row) // 2] = 1  # to the right a row up
        stroke[3, row, row // 2 + 1] = 1  # to the left a row up
        stroke[4, row, 3] = 0.9
        stroke[5, row, 1:7] = 1
    weight, slant, width = _digits.attributes(stroke).T
    assert weight[5] == 2 and weight[1] == 2 and weight[4] == 0
    assert slant[2] == 2 and slant[3] == 0
    assert width[5] == 2 and width[0] == width[4] == 0


def test_captions_name_the_digit_and_its_looks(digits):
    train, _ = digits
    words = _digits.Words()
    names = {number: word for word, number in words.ids.items()}
    some = train[torch.arange(50)]
    captions = words.captions(some, 8, seed=3)
    assert captions.shape == (50, 8, words.length)
    assert torch.equal(captions, words.captions(some, 8, seed=3))
    said = set()
    for label, look, several in zip(some.labels.tolist(), some.attributes.tolist(), captions.tolist(), strict=True):
        for ids in several:
            text = {names[i] for i in ids if i}
            assert text & set(_digits.NAMES) == {_digits.NAMES[label]}
            for groups, value in zip((_digits.WEIGHTS, _digits.SLANTS, _digits.WIDTHS), look, strict=True):
                every = {word for group in groups for word in group}
                assert text & every <= set(groups[value])
                said |= text & every
    assert len(said) > 15
    lengths = (captions != 0).sum(2).double()
    assert lengths.mean() < 36 / 4  # image tokens are far more than words
    # Padding is at the end, and prompts say nothing of an image.
    assert not ((captions[:, :, 1:] != 0) & (captions[:, :, :-1] == 0)).any()
    looks = {w for groups in (_digits.WEIGHTS, _digits.SLANTS, _digits.WIDTHS) for group in groups for w in group}
    assert not looks & {names[i] for i in words.prompts().flatten().tolist() if i}


def test_shifts_move_by_a_pixel_and_fill_with_background(digits):
    images = digits[0].images[:40]
    moved = _digits.shifted(images, torch.Generator().manual_seed(0))
    wide = F.pad(images, (1, 1, 1, 1))
    every = torch.stack([wide[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)], 1)
    found = (every == moved[:, None]).all((2, 3))
    assert found.any(1).all() and len(found.long().argmax(1).unique()) > 4


def test_patches_are_windows_of_the_image(digits):
    images = digits[0].images[:3]
    cut = _digits.patches(images)
    assert cut.shape == (3, 36, 9)
    torch.testing.assert_close(cut[:, 6 * 2 + 5] * 0.37 + 0.3, images[:, 2:5, 5:8].flatten(1))


# --- LIMoE ---------------------------------------------------------------------------------------


def same(a, b) -> bool:
    """Whether nested states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = train_limoe.Run(SMALL).train(tmp_path / "whole.pt")
    parts = train_limoe.Run(SMALL)
    for _ in range(3):
        parts.advance()
    torch.save(parts.state(), tmp_path / "part.pt")
    torch.manual_seed(99)  # what the process does in between must not matter
    resumed = train_limoe.Run(SMALL)
    resumed.restore(torch.load(tmp_path / "part.pt"))
    assert resumed.step == 3
    resumed.train(tmp_path / "resumed.pt")
    assert same(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt"))
    assert len(whole.history["loss"]) == SMALL.steps
    with pytest.raises(SystemExit, match="must be of the same run"):
        train_limoe.Run(replace(SMALL, seed=1)).restore(torch.load(tmp_path / "part.pt"))


def test_padding_changes_nothing_and_is_not_routed(digits):
    run = train_limoe.Run(SMALL)
    run.model.eval()
    images = _digits.patches(digits[1].images[:5])
    words = run.words.full(digits[1][torch.arange(5)])
    assert (words == 0).any()
    image, text, routings = run.model(images, words)
    shorter = words[:, : int((words != 0).sum(1).max())]
    places, run.model.places[1] = run.model.places[1], run.model.places[1][: shorter.shape[1]]
    again = run.model(images, shorter)
    run.model.places[1] = places
    torch.testing.assert_close(text, again[1])
    torch.testing.assert_close(image, again[0])
    assert routings[0].metrics["tokens"].tolist() == [5 * 36, int((words != 0).sum())]
    # In evaluation an embedding does not depend on what else is in the batch.
    torch.testing.assert_close(run.model(images[:1], words[:0])[0], image[:1])
    torch.testing.assert_close(run.model(images[:0], words[:2])[1], text[:2])


def test_variants_have_the_losses_of_their_names():
    names = {}
    for auxiliary in train_limoe.AUXILIARY:
        names[auxiliary] = [loss.name for loss in train_limoe.balance(replace(SMALL, auxiliary=auxiliary))]
    assert names["none"] == []
    assert names["classic"] == ["importance", "load", "z"]
    assert names["local"] == [*names["classic"], "local_entropy"]
    assert names["full"] == [*names["local"], "global_entropy"]
    run = train_limoe.Run(SMALL)
    _, _, (routing,) = run.model(torch.randn(4, 36, 9), run.captions[:4, 0])
    assert [len(value) for value in routing.losses.values()] == [1, 1, 1, 2, 2]
    dense = train_limoe.Run(replace(SMALL, dense=True))
    assert not [name for name, _ in dense.model.named_parameters() if "experts" in name]
    active = sum(p.numel() for p in run.model.parameters()) - run.model.blocks[1].mlp.gate.weight.numel()
    active -= (1 - 1 / SMALL.experts) * sum(p.numel() for p in run.model.blocks[1].mlp.experts.parameters())
    assert active == sum(p.numel() for p in dense.model.parameters())


def test_training_learns_and_is_evaluated():
    """A short run of the default model is far better than chance: 10% for classes, 2.5% for ten of 397."""
    run = train_limoe.Run(replace(train_limoe.Config(), steps=60, layers=2, experts=4)).train()
    found = run.evaluate()
    assert run.history["loss"][-1] < run.history["loss"][0] - 0.5
    assert found["zero_shot"] > 0.3
    assert found["text_to_image_at_10"] > 0.15
    assert all(0 < found[f"success_{modality}"] <= 1 for modality in train_limoe.MODALITIES)
    assert [sum(row) for row in found["choices"][0]][0] == 397 * 36


def test_command_trains_both_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_limoe, "Config", lambda **values: replace(SMALL, **values))
    monkeypatch.setattr(train_limoe.Config, "steps", 2, raising=False)
    options = ["--checkpoint", str(tmp_path / "run.pt"), "--json", str(tmp_path / "found.json"), "--steps", "2"]
    train_limoe.main(["--dense", *options])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"LIMoE", "dense twin"}
    assert "success_text" in found["LIMoE"] and "success_text" not in found["dense twin"]
    shown = capsys.readouterr().out
    for part in ("zero-shot accuracy", "recall @1", "text tokens", "effective experts"):
        assert part in shown
    train_limoe.main(options)  # nothing is left to train
    assert json.loads((tmp_path / "found.json").read_text())["LIMoE"]["history"] == found["LIMoE"]["history"]


def test_ablation_draws_and_does_not_repeat_itself(tmp_path, monkeypatch):
    config = replace(SMALL, steps=3)
    runs = _limoe_report.run_ablation(config, [0, 1], tmp_path)
    assert set(runs) == {*_limoe_report.VARIANTS, _limoe_report.DENSE}
    for name in ("limoe_success.png", "limoe_experts.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    first = [found[0] for found in runs.values()]
    assert len({json.dumps(run["config"], sort_keys=True) for run in first}) == len(first)
    # All sparse variants start from the same weights and see the same batch.
    losses = {train_limoe.Run(replace(config, **v)).train().history["loss"][0] for v in _limoe_report.VARIANTS.values()}
    assert max(losses) - min(losses) < 0.05
    monkeypatch.setattr(train_limoe.Run, "train", lambda self: pytest.fail("trained again"))
    assert _limoe_report.run_ablation(config, [0, 1], tmp_path) == runs
    table = _limoe_report.to_table(runs).splitlines()
    assert len(table) == 1 + len(runs) and table[-1].startswith("dense twin") and "text kept" in table[0]


# --- SimCLR --------------------------------------------------------------------------------------


def test_views_differ_and_keep_the_digit(digits):
    images = digits[0].images[:64]
    generator = torch.Generator().manual_seed(0)
    one, two = (simclr_digits.augment(images, generator) for _ in range(2))
    assert one.shape == images.shape and (one - two).abs().mean() > 0.05
    # A view is nearer to its own image than to most others.
    distance = torch.cdist(one.flatten(1), images.flatten(1))
    rank = (distance < distance.diagonal()[:, None]).sum(1)
    assert rank.double().median() <= 3


def test_simclr_runs(tmp_path, capsys):
    simclr_digits.main(["--steps", "8", "--batch", "64", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["accuracy"]) == {"pixels", "untrained", "nt_xent", "sup_con"}
    assert all(accuracy["all"] > 0.8 for accuracy in found["accuracy"].values())
    assert all(losses[-1] < losses[0] for losses in found["losses"].values())
    assert "sup_con" in capsys.readouterr().out


# --- experts by domain ---------------------------------------------------------------------------


def test_copied_experts_are_the_dense_model():
    """Before tuning, a mixture whose experts are enforced gives what the model gave that it was made from."""
    base = moe_embeddings.Encoder()
    texts = moe_embeddings.make_bags(["read_csv(path)", "Sum of two tensors", "parseDate"])
    domain = torch.tensor([2, 0, 2])
    mixture = base.mixture(3, enforced=True)
    expected, _ = base("sentence", texts, domain)
    torch.testing.assert_close(mixture("sentence", texts, domain)[0], expected)
    with torch.no_grad():
        for parameter in mixture.mlp.experts.parameters():
            parameter[2] += 0.1
    changed = mixture("sentence", texts, domain)[0]
    assert not torch.allclose(changed[[0, 2]], expected[[0, 2]], atol=1e-3)
    torch.testing.assert_close(changed[1], expected[1])


def test_domains_run(tmp_path, capsys):
    options = ["--stdlib", "--domains", "2", "--steps", "4", "--of-each", "32", "--json", str(tmp_path / "found.json")]
    moe_embeddings.main(options)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["domains"]) == 2 and len(found["mrr"]) == 5
    assert all(0 < value <= 1 for values in found["mrr"].values() for value in values)
    experts, single = found["parameters"]["experts, by domain"], found["parameters"]["one dense model"]
    assert single < experts < 1.1 * single < found["parameters"]["one dense model a domain"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*found["domains"], *found["mrr"]))


# --- distillation --------------------------------------------------------------------------------


def test_distillation_runs(tmp_path, capsys):
    import distill_embeddings

    options = ["--stdlib", "--steps", "6", "--batch", "128", "--width", "16", "--dim", "16", "--student-width", "4"]
    options += ["--student-dim", "8", "--labelled", "500"]
    distill_embeddings.main([*options, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["mrr"]) == 7 and "labels of 500 pairs" in found["mrr"]
    assert found["dim"]["the teacher itself"] == 16 and found["dim"]["teacher, all pairs"] == 8
    assert found["parameters"]["teacher, all pairs"] < found["parameters"]["the teacher itself"] / 3
    assert "held out" in capsys.readouterr().out


# --- the README's tables -------------------------------------------------------------------------


def test_tables_show_the_spread_of_seeds():
    run = {"success_text": 0.5, "success_image": 1.0, "effective_text": 2.0, "zero_shot": 0.9}
    run |= {"text_to_image_at_5": 0.8, "cpu_seconds": 40.0}
    other = run | {"success_text": 0.7, "cpu_seconds": 50.4}
    dense = {key: run[key] for key in ("zero_shot", "text_to_image_at_5", "cpu_seconds")}
    text = tables_examples.limoe({"all": [run, other], "dense twin": [dense, dense]})
    assert "| all | 60.0% (50.0 to 70.0%) | 100.0% (100.0 to 100.0%) | 2.0 (2.0 to 2.0) |" in text
    assert "| dense twin |  |  |  | 90.0% (90.0 to 90.0%) |" in text
    assert "Mean of 2 seeds (least to most). A run took 40 to 50 s" in text
    probes = [{"accuracy": {n: {"few": f, "all": 0.9} for n in simclr_names()}, "train": 1400} for f in (0.5, 0.7)]
    assert "| encoder, untrained | 60.0% (50.0 to 70.0%) | 90.0% (90.0 to 90.0%) |" in tables_examples.simclr(probes)
    mrr = {"mrr": {"experts": [0.2, 0.4]}, "parameters": {"experts": 4.6e6}, "domains": {"a": 1, "b": 2}}
    assert "| experts | 0.300 (0.300 to 0.300) | 4.6 M |" in tables_examples.moe_embeddings([mrr])
    taught = {"mrr": {"labels": 0.2}, "parameters": {"labels": 4.6e6}, "pairs": 10, "held_out": 3}
    other = taught | {"mrr": {"labels": 0.3}}
    assert "| labels | 0.250 (0.200 to 0.300) | 4.60 M |" in tables_examples.distill([taught, other])


def simclr_names() -> list[str]:
    return ["pixels", "untrained", *simclr_digits.LOSSES]
