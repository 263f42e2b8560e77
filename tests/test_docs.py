"""What the documentation shows runs: doctests of the public functions, code blocks of the README."""

import doctest
import importlib
import pathlib
import re

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
MODULES = [
    *(
        f"contrastive_ops.losses.{family}"
        for family in ("classifier", "hardness", "margin", "multi_positive", "partition", "queue", "running")
    ),
    *(f"contrastive_ops.losses.{family}" for family in ("sigmoid", "softmax", "triplet")),
    "contrastive_ops.ops.similarity_reduce",
    "contrastive_ops.reference.stream",
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0 and found.failed == 0


def test_readme_replacement_gives_the_same_loss():
    """The two code blocks under "Replace this by this"."""
    before, after = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    values = {"torch": torch, "F": torch.nn.functional, "logit_scale": torch.tensor(1.5)}
    values |= {name: torch.nn.functional.normalize(torch.randn(10, 8), dim=1) for name in ("image", "text")}
    exec(before, values)
    expected = values.pop("loss")
    exec(after, values)
    torch.testing.assert_close(values["loss"], expected)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/design.md", "benchmarks/README.md"])
def test_links_and_files_exist(page):
    """Relative links, and paths in code spans that look like files of the tree."""
    path = ROOT / page
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:contrastive_ops|csrc|tests|examples)/[\w/.-]+\.(?:py|cpp|h))`", text):
        assert (ROOT / name).exists(), name
