"""Files that are cut short, mixed up or hostile: an error that says what to do, and nothing is run or overwritten."""

import ast
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from contrastive_ops.mining import MemoryBank, TopKState, search

ROOT = Path(__file__).parents[1]
QUERY, ROWS = torch.randint(-8, 9, (3, 4)) / 4.0, torch.randint(-8, 9, (40, 4)) / 4.0


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# ---- Nothing is run ------------------------------------------------------------------------------------------------


def test_no_file_is_unpickled_anywhere():
    """Every torch.load names weights_only=True, every numpy.load is without pickle; nobody imports pickle."""
    wrong, seen = [], 0
    for path in [p for folder in ("contrastive_ops", "examples", "benchmarks") for p in (ROOT / folder).rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", None)]
                wrong += [f"{path}:{node.lineno}" for name in names if name in ("pickle", "marshal", "shelve", "dill")]
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load"):
                continue
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            module = getattr(node.func.value, "id", "")
            seen += module == "torch"
            if (module == "torch" and given.get("weights_only") is not True) or given.get("allow_pickle"):
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong and seen >= 2


def test_a_hostile_checkpoint_is_refused_and_not_run(tmp_path):
    file, made = tmp_path / "search.pt", tmp_path / "made"
    for content in (Hostile(made), {"state": Hostile(made), "corpus": ""}):
        torch.save(content, file)
        before = file.read_bytes()
        with pytest.raises(ValueError, match=f"search: checkpoint must be .*\n  delete {re.escape(str(file))}"):
            search(QUERY, ROWS, 5, checkpoint=file)
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="search: checkpoint must be"):
            search(QUERY, ROWS, 5, checkpoint=file)
        assert before and not made.exists()


# ---- Checkpoints of a search ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_cut_short_or_changed(tmp_path):
    """Wherever it is cut, and whatever byte of its structure is another: an error or the right lists, never others."""
    file = tmp_path / "search.pt"
    expected = search(QUERY, ROWS, 5, checkpoint=file)
    whole = file.read_bytes()
    for size in {0, 1, 100, len(whole) // 2, len(whole) - 1}:
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="search: checkpoint must be a file that search wrote"):
            search(QUERY, ROWS, 5, checkpoint=file)
        assert file.read_bytes() == whole[:size]
    refused = 0
    for at in range(0, len(whole), len(whole) // 60):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            found = search(QUERY, ROWS, 5, checkpoint=file)
        except ValueError:
            refused += 1
            continue
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)
    assert refused


def test_a_long_checkpoint_that_is_cut_short(tmp_path):
    """Of a zip archive of more than 4 KiB, torch's reader says OSError for some lengths."""
    file, query = tmp_path / "search.pt", QUERY.repeat(100, 1)
    search(query, ROWS, 5, checkpoint=file)
    whole = file.read_bytes()
    for size in range(0, len(whole), len(whole) // 40):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="search: checkpoint must be a file that search wrote"):
            search(query, ROWS, 5, checkpoint=file)


def saved_state(rows=None):
    state = TopKState(QUERY, 5, rows=rows, count_above=torch.zeros(3))
    state.update(ROWS[10:30], 10)
    return state.state_dict()


def changed(name, value):
    def change(state):
        return {**state, name: value(state[name]) if callable(value) else value}

    return change


STATES = {
    "nothing": lambda state: {},
    "no dict": lambda state: None,
    "a list": lambda state: [state],
    "no lists": lambda state: {k: v for k, v in state.items() if k != "values"},
    "problem is no dict": changed("problem", 3),
    "one list less": changed("values", lambda v: v[:2]),
    "longer lists": changed("indices", lambda v: torch.cat([v, v], 1)),
    "doubles": changed("values", lambda v: v.double()),
    "int32": changed("indices", lambda v: v.int()),
    "an index before what was seen": changed("indices", lambda v: v.clone().fill_(9)),
    "an index behind what was seen": changed("indices", lambda v: v.clone().fill_(30)),
    "an index of nowhere": changed("indices", lambda v: v.clone().fill_(2**62)),
    "a negative index": changed("indices", lambda v: v.clone().fill_(-2)),
    "no tensor": changed("covered", [(0, 40)]),
    "ranges of floats": changed("covered", lambda v: v.float()),
    "backwards": changed("covered", lambda v: v.flip(1)),
    "overlapping": changed("covered", torch.tensor([[10, 30], [20, 40]])),
    "before the corpus": changed("covered", torch.tensor([[-1, 30]])),
    "behind the corpus": changed("covered", torch.tensor([[10, 41]])),
    "three columns": changed("covered", torch.tensor([[10, 20, 30]])),
    "no statistics": changed("statistics", {}),
    "other statistics": changed("statistics", lambda v: {name: each[:1] for name, each in v.items()}),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_cannot_be_is_refused(name):
    state = TopKState(QUERY, 5, rows=40, count_above=torch.zeros(3))
    with pytest.raises(ValueError, match="TopKState: .* must be"):
        state.load_state_dict(STATES[name](saved_state(40)))
    assert state.covered == []
    state.load_state_dict(saved_state(40))
    assert state.covered == [(10, 30)]


# ---- Banks and modules with state ----------------------------------------------------------------------------------

BANKS = {
    "pointer behind the end": ("pointer", torch.tensor(8)),
    "negative pointer": ("pointer", torch.tensor(-1)),
    "more than there are": ("filled", torch.tensor(9)),
    "less than none": ("filled", torch.tensor(-(2**62))),
    "negative steps": ("step", torch.tensor(-3)),
    "born after the last step": ("born", torch.full((8,), 2**62)),
    "born before the first": ("born", torch.full((8,), -2)),
    "ids that are numbers": ("ids", torch.zeros(8)),
    "complex rows": ("rows", torch.zeros(8, 4, dtype=torch.complex64)),
    "rows that are ids": ("rows", torch.zeros(8, 4, dtype=torch.int64)),
    "no tensor": ("pointer", 3),
    "another shape": ("rows", torch.zeros(9, 4)),
}


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_that_cannot_be_is_refused(name):
    bank = MemoryBank(8, 4)
    bank.enqueue(torch.randn(5, 4), torch.arange(5))
    before = {key: value.clone() for key, value in bank.state_dict().items()}
    key, value = BANKS[name]
    with pytest.raises(RuntimeError, match=f"{key}"):
        bank.load_state_dict({**before, key: value})
    if name != "another shape":
        assert all(torch.equal(value, before[key]) for key, value in bank.state_dict().items())
    holder = torch.nn.ModuleDict({"bank": bank})
    with pytest.raises(RuntimeError, match=f"bank.{key}"):
        holder.load_state_dict({f"bank.{k}": v for k, v in {**before, key: value}.items()})


# ---- Corpora -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 4, 8000, 11_999])
def test_a_map_that_is_cut_short_between_two_blocks(tmp_path, size):
    path = str(tmp_path / "rows")
    corpus = np.memmap(path, np.float32, "w+", shape=(1000, 3))
    corpus[:] = 1
    corpus.flush()

    def cut(done, rows):
        if done == 100:
            os.truncate(path, size)

    file = tmp_path / "search.pt"
    with pytest.raises(ValueError, match="search: corpus must be a file of at least 12000 bytes .*, got"):
        search(torch.ones(1, 3), corpus, 2, block_rows=100, checkpoint=file, progress=cut)
    os.truncate(path, 12000)
    corpus = np.memmap(path, np.float32, "w+", shape=(1000, 3))
    corpus[:] = 1
    assert search(torch.ones(1, 3), corpus, 2, block_rows=100, checkpoint=file).indices.tolist() == [[0, 1]]


# ---- An example's checkpoint ---------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_checkpoint_of_an_example(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_limoe

    saved = tmp_path / "run.pt"
    saved.write_bytes(b"what was there")

    def full(state, path):
        Path(path).write_bytes(b"hal")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    run = object.__new__(train_limoe.Run)
    run.config = train_limoe.Config(steps=1)
    run.step, run.history = 0, []
    monkeypatch.setattr(train_limoe.Run, "advance", lambda self: setattr(self, "step", 1))
    monkeypatch.setattr(train_limoe.Run, "state", lambda self: {})
    with pytest.raises(OSError, match="No space"):
        run.train(saved)
    assert saved.read_bytes() == b"what was there"


def test_an_example_refuses_a_checkpoint_that_is_cut_short_of_another_version_or_hostile(tmp_path, monkeypatch):
    """The file stays, nothing in it is run, and no advice is given to load it in another way."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_limoe

    config = train_limoe.Config(steps=1, batch=16, dim=16, hidden=16, layers=2, heads=2, experts=4)
    saved, made = tmp_path / "run.pt", tmp_path / "made"
    run = train_limoe.Run(config)
    run.train(saved)
    whole, state = saved.read_bytes(), run.state()
    contents = [whole[:size] for size in (0, 100, len(whole) // 2, len(whole) - 1)]
    others = [
        None,
        [state],
        {name: each for name, each in state.items() if name != "optimizer"},
        {**state, "model": {name: each for name, each in state["model"].items() if "norm" not in name}},
        {**state, "generator": state["generator"][:9]},
        {**state, "config": Hostile(made)},
    ]
    for other in others:
        torch.save(other, saved)
        contents.append(saved.read_bytes())
    reason = "must be a file that this example wrote, .*delete it to train anew"
    for content in [*contents, pickle.dumps({**state, "config": Hostile(made)})]:
        saved.write_bytes(content)
        with pytest.raises(SystemExit, match=reason) as end:
            train_limoe.resume(train_limoe.Run(config), saved)
        assert "weights_only" not in str(end.value) and saved.read_bytes() == content and not made.exists()
    saved.write_bytes(whole)
    resumed = train_limoe.Run(config)
    train_limoe.resume(resumed, saved)
    assert resumed.step == 1
