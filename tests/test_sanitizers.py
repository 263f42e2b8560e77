"""The lists of `make sanitize`, and the lines that `make coverage` names; the builds themselves take minutes."""

import importlib.util
import re

import pytest
import sanitizers
from sanitizers import KINDS, ROOT


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_what_is_chosen_is_there(kind):
    """A word of `-k` that no test has any more would leave a primitive out, and nobody would know."""
    for words in kind.tests:
        files = [word for word in words if word.startswith("tests/")]
        text = "".join((ROOT / file).read_text() for file in files)
        chosen = words[words.index("-k") + 1] if "-k" in words else ""
        names = [name for name in re.findall(r"\w+", chosen) if name not in ("and", "or", "cpu")]
        assert files and all(re.search(rf"def test_\w*{name}", text) for name in names), (files, names)


def test_the_runtime_comes_first():
    if sanitizers.why_missing() is not None:
        pytest.skip(sanitizers.why_missing())
    for kind in KINDS.values():
        found = sanitizers.environment(kind, "default")
        assert kind.preloaded[0].split(".")[0] in found["LD_PRELOAD"].split()[0]
        assert found["CONTRASTIVE_OPS_CPU_CAPABILITY"] == "default" and str(sanitizers.FOLDER) in found["PYTHONPATH"]


def test_lines_are_named_as_ranges():
    spec = importlib.util.spec_from_file_location("covered", ROOT / ".ci" / "covered.py")
    covered = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(covered)
    assert covered.ranges([9, 3, 5, 4]) == "3-5, 9" and covered.ranges([]) == ""
