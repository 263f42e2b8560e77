"""What the documentation shows runs: doctests of the public functions, code blocks of the README."""

import doctest
import importlib
import pathlib
import re

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "contrastive_ops"
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text() and path.name != "__main__.py"
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0 and found.failed == 0


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_replacement_gives_the_same_loss():
    """The two code blocks under "Replace this by this"."""
    before, after = readme_blocks()[:2]
    values = {"torch": torch, "F": torch.nn.functional, "logit_scale": torch.tensor(1.5)}
    values |= {name: torch.randn(10, 8) for name in ("image", "text")}
    exec(before, values)
    expected = values.pop("loss")
    exec(after, values)
    torch.testing.assert_close(values["loss"], expected)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/design.md",
        "docs/distributed.md",
        "docs/integrations.md",
        "benchmarks/README.md",
    ],
)
def test_links_and_files_exist(page):
    """Relative links, and paths in code spans that look like files of the tree."""
    path = ROOT / page
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), link
    stems = re.findall(r"`(\w+)`", "".join(re.findall(r"for each STEM of (.*?)\|", text)))
    for name in re.findall(r"`((?:contrastive_ops|csrc|tests|examples)/[\w/.-]+\.(?:py|cpp|h))`", text):
        files = [ROOT / name.replace("STEM", stem) for stem in stems] if "STEM" in name else [ROOT / name]
        # Small primitives register their operators next to the public function.
        every = any if "_STEM_" in name else all
        assert every(file.exists() for file in files), name


def test_integrations_page_names_what_there_is():
    """Every import line of docs/integrations.md, where the other package is installed."""
    page = (ROOT / "docs/integrations.md").read_text()
    found = re.findall(r"from (contrastive_ops\.integrations\.(\w+)) import (?:\(.*\n)?([^()]*?)(?:\)|\n)", page)
    assert len(found) == 4
    for module, package, names in found:
        pytest.importorskip(package)
        for name in re.findall(r"\w+", names):
            assert hasattr(importlib.import_module(module), name), (module, name)


def test_readme_mining_runs():
    """The block under "Hard negatives that never starve"."""
    values = {"query": torch.randn(4, 8), "corpus": torch.randn(30, 8), "positives": torch.arange(4)}
    values |= {"queries": list("abcd"), "documents": [str(row) for row in range(30)]}
    exec(readme_blocks()[2], values)
    mined = values["mined"]
    assert mined.indices.shape == (4, 5)
    assert set(mined.format("triplet", values["queries"], values["documents"])) == {"anchor", "positive", "negative"}


def test_readme_routing_runs():
    """The block under "Experts that keep every modality alive"."""
    logits = torch.randn(40, 32, requires_grad=True)
    values = {"logits": logits, "tokens": torch.randn(40, 8), "is_text": torch.arange(40) % 2}
    values |= {"up": torch.randn(32, 8, 16), "down": torch.randn(32, 16, 8)}
    exec(readme_blocks()[3], values)
    assert values["out"].shape == (40, 8)
    (values["routing"].loss + values["out"].sum()).backward()
    assert logits.grad.isfinite().all() and values["routing"].metrics["success_rate"].shape == (2,)
