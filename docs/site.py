"""MkDocs hooks: pages that live in the root of the tree, and one of the API for each namespace."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import errors  # noqa: E402

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "measuring.md",
}
NAMESPACES = ("losses", "nn", "ops", "mining", "moe", "metrics", "decoding", "distributed", "recipes")


def _api(namespace: str, known: set[object]) -> str:
    """A page of all that a namespace lists, each by the module that defines it: `losses.clip` is a file as well.

    What an earlier page has, and `known` with it, is left out.
    """
    module = importlib.import_module(f"contrastive_ops.{namespace}")
    lines = [f"# `contrastive_ops.{namespace}`", "", f"::: {module.__name__}", "    options: {members: false}", ""]
    for name in module.__all__:
        found = getattr(module, name)
        if found in known or not hasattr(found, "__qualname__"):
            continue
        known.add(found)
        # Fields are described in the docstring of their class.
        methods = [each for each, value in vars(found).items() if each[0] != "_" and hasattr(value, "__func__")]
        methods += [each for each, value in vars(found).items() if each[0] != "_" and inspect.isfunction(value)]
        lines += [f"::: {found.__module__}.{found.__qualname__}", f"    options: {{members: {sorted(methods)}}}", ""]
    return "\n".join(lines)


def _inside(text: str, folder: Path) -> str:
    """The text with its relative links as seen from docs/; what is not a page of the site stays plain text."""

    def replacement(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        if "://" in target or not target:
            return match[0]
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        if path in PAGES:
            return f"[{words}]({PAGES[path]}{anchor})"
        return f"[{words}]({path.removeprefix('docs/')}{anchor})" if path.startswith("docs/") else words

    return re.sub(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", lambda m: replacement(m).replace("None", ""), text)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the root and of the API."""
    for source, name in PAGES.items():
        text = _inside((ROOT / source).read_text(), (ROOT / source).parent)
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "errors.md", content=errors.page()))
    known: set[object] = set()
    for namespace in NAMESPACES:
        files.append(File.generated(config, f"api/{namespace}.md", content=_api(namespace, known)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of pages in docs/ to those of the root."""
    if page.file.src_uri in PAGES.values() or "/" in page.file.src_uri:
        return markdown
    return _inside(markdown, ROOT / "docs")
