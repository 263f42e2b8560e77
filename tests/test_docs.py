"""What the documentation shows runs: doctests of the public functions, code blocks of the pages."""

import ast
import doctest
import importlib
import importlib.util
import pathlib
import re
import sys

import pytest
import torch

import contrastive_ops

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


PAGES = {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md"}
PAGES = sorted(PAGES - {ROOT / "CHANGELOG.md"})


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES if "```python" in page.read_text()])
def test_blocks_are_python_and_import_what_exists(page):
    for block in blocks(page):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "contrastive_ops":
                if "integrations" in node.module and not importlib.util.find_spec(node.module.split(".")[2]):
                    continue
                for name in node.names:
                    assert hasattr(importlib.import_module(node.module), name.name), (node.module, name.name)


# Blocks that show a trainer of another package, or names that a paragraph introduces: tests of these run the calls.
FRAGMENTS = {"README.md", "docs/distributed.md", "docs/experts.md", "docs/integrations.md", "docs/mining.md"}


@pytest.mark.parametrize(
    "page", sorted({str(page.relative_to(ROOT)) for page in PAGES if "```python" in page.read_text()} - FRAGMENTS)
)
def test_blocks_run(page):
    """One after the other, as a reader would; what they claim they assert."""
    torch.manual_seed(0)
    values = {}
    for block in blocks(page):
        exec(block, values)


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_drawings_are_those_of_the_script_and_each_primitive_has_a_page():
    for path, text in script("drawings").files():
        assert path.read_text() == text, f"run python docs/drawings.py: {path.name}"
        stem = path.stem.removeprefix("primitive_")
        page = (ROOT / "docs" / "primitives" / f"{stem}.md").read_text()
        assert f"../images/{path.name}" in page
        assert all(f"\n## {part}\n" in page for part in ("What it computes", "How", "Memory and work"))
        assert f"({stem}.md)" in (ROOT / "docs" / "primitives" / "index.md").read_text()


def test_page_of_errors_has_every_error():
    """What is raised in the sources, counted without the page's own reading of them, and what calls say."""
    errors = script("errors")
    found, page = list(errors.errors()), errors.page()
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert len(found) == len(re.findall(r"^ +raise (?:\w+\.)*\w*Error\((?!\))", text, re.MULTILINE))
    assert all(errors._cell(error.what) in page for error in found)
    x = torch.zeros(4, 8)
    for call in (
        lambda: contrastive_ops.info_nce(x, torch.zeros(4, 9)),
        lambda: contrastive_ops.info_nce(x, x.double()),
        lambda: contrastive_ops.clip(x, x, temperature=-1.0),
        lambda: contrastive_ops.clip(x, x, reduction="all"),
        lambda: contrastive_ops.clip(x, x, scale=1.0, temperature=1.0),
        lambda: contrastive_ops.similarity_topk(x, x, 0),
        lambda: contrastive_ops.similarity_topk(x.long(), x, 1),
        lambda: contrastive_ops.route(x, 0),
        lambda: contrastive_ops.similarity_reduce(x, reduce="median"),
        lambda: contrastive_ops.clip(x, x, backend="cuda"),
    ):
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as raised:
            call()
        said = str(raised.value)
        close = [error for error in found if error.kind == raised.type.__name__ and error.pattern().fullmatch(said)]
        assert close, said


def test_readme_replacement_gives_the_same_loss():
    """The two code blocks under "Replace this by this"."""
    before, after = blocks("README.md")[:2]
    values = {"torch": torch, "F": torch.nn.functional, "logit_scale": torch.tensor(1.5)}
    values |= {name: torch.randn(10, 8) for name in ("image", "text")}
    exec(before, values)
    expected = values.pop("loss")
    exec(after, values)
    torch.testing.assert_close(values["loss"], expected)


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
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


@pytest.mark.parametrize("page", ["README.md", "docs/mining.md"])
def test_mining_runs(page):
    """The block of the page that mines."""
    values = {"query": torch.randn(4, 8), "corpus": torch.randn(30, 8), "positives": torch.arange(4)}
    values |= {"queries": list("abcd"), "documents": [str(row) for row in range(30)]}
    exec(next(block for block in blocks(page) if "mine_hard_negatives" in block), values)
    mined = values["mined"]
    assert mined.indices.shape == (4, 5)
    assert set(mined.format("triplet", values["queries"], values["documents"])) == {"anchor", "positive", "negative"}


@pytest.mark.parametrize("page", ["README.md", "docs/experts.md"])
def test_routing_runs(page):
    """The block of the page that routes."""
    logits = torch.randn(40, 32, requires_grad=True)
    values = {"logits": logits, "tokens": torch.randn(40, 8), "is_text": torch.arange(40) % 2}
    values |= {"up": torch.randn(32, 8, 16), "down": torch.randn(32, 16, 8)}
    exec(next(block for block in blocks(page) if "route(" in block), values)
    assert values["out"].shape == (40, 8)
    (values["routing"].loss + values["out"].sum()).backward()
    assert logits.grad.isfinite().all() and values["routing"].metrics["success_rate"].shape == (2,)
