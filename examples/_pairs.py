"""Collect (signature, first docstring sentence) pairs from what is installed.

Python files are parsed, never imported, so collecting runs nobody's code. Only modules that exist
as compiled code are looked up live: C modules of the standard library, and numpy and torch, which
the demo has imported anyway.

The order depends on names alone, so the same packages give the same pairs on every run.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePath
from typing import NamedTuple

# Directories that hold tests, vendored copies of other packages, or modules that act on import.
SKIPPED_PARTS = {
    "antigravity", "conftest", "dist-packages", "idlelib", "lib2to3", "pythonwin", "site-packages",
    "test", "testing", "tests", "this", "tkinter", "turtledemo",
}  # fmt: skip
LIVE_MODULES = (
    "numpy", "numpy.fft", "numpy.linalg", "numpy.random", "torch", "torch.fft", "torch.linalg",
    "torch.nn.functional", "torch.special",
)  # fmt: skip
STDLIB_NAMES = frozenset(sys.stdlib_module_names)
SKIPPED_LIVE = {"readline", "xxlimited", "xxlimited_35", "xxsubtype"}
FIRST_PACKAGES = ("numpy", "torch")  # read before the byte limit can cut anything off
# Limits in bytes, not seconds, so that they cut at the same place on every run.
MAX_SOURCE_BYTES = 64_000_000
MAX_PACKAGE_BYTES = 12_000_000  # one huge package must not crowd the others out
MAX_FILE_BYTES = 1_000_000  # larger files are generated tables
MIN_WORDS = 4

Progress = Callable[[Iterable, str], Iterable]


class Pair(NamedTuple):
    """One function, class or method: what it is called, and what it says it does."""

    name: str  # qualified, e.g. "numpy.linalg.solve"
    signature: str  # e.g. "numpy.linalg.solve(a, b)"
    sentence: str  # first sentence of the docstring, without the name


def split_identifier(name: str) -> list[str]:
    """`parseHTTPDate_2` -> ["parse", "HTTP", "Date", "2"]."""
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+", name)


def mask_name(sentence: str, name: str) -> str:
    """Remove the function's own name from its sentence.

    Removed, in any case and wherever a letter or digit does not continue it: the last part of the
    qualified name, its snake_case and camelCase parts joined by nothing, spaces, underscores,
    hyphens or other punctuation, and that followed by a regular ending (so `sort` also hides
    "sorts" and "sorted"). NOT removed: one part of a longer name ("read" stays in the sentence of
    `read_csv`), other word forms ("solution" for `solve`), and names of the module and class.
    """
    parts = split_identifier(name.rsplit(".", 1)[-1])
    if not parts or not all(part.lower() in sentence.lower() for part in parts):
        return sentence  # nothing to hide; most names stop here, before a pattern is compiled
    joined = r"[\W_]*".join(re.escape(part) for part in parts)
    pattern = re.compile(rf"(?<![^\W_]){joined}(?:s|es|d|ed|ing)?(?![^\W_])", re.IGNORECASE)
    # Removing one occurrence can bring the halves of another together: repeat until stable.
    while (masked := pattern.sub(" ", sentence)) != sentence:
        sentence = masked
    return re.sub(r"\s+([.,;:)])", r"\1", " ".join(sentence.split()))


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring as plain text, without markup."""
    paragraph = re.split(r"\n\s*\n", doc.strip(), maxsplit=1)[0]
    if paragraph.lstrip().startswith((">>>", "..", "{")):
        return ""
    text = re.sub(r":[a-z:]+:`~?([^`<]*)[^`]*`", r"\1", paragraph)
    text = " ".join(re.sub(r"[`*|]+", "", text).split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z(\[\"'])", text, maxsplit=1)[0][:400]


def make_pair(name: str, params: list[str], doc: str) -> Pair | None:
    """A pair, or None where too little is left once the name is hidden."""
    sentence = mask_name(first_sentence(doc), name)
    words = re.findall(r"[^\W\d_]{2,}", sentence)
    if len(words) < MIN_WORDS or words[0].lower() in {"see", "alias", "deprecated"}:
        return None
    return Pair(name, f"{name}({', '.join(params)})", sentence)


# --- Python files, parsed ------------------------------------------------------------------------


def is_private_or_test(part: str) -> bool:
    """Whether a path or name component marks a test or something not meant for callers."""
    lowered = part.lower()
    return (
        lowered.startswith(("_", ".", "test_", "test-"))
        or lowered.endswith("_test")
        or lowered in SKIPPED_PARTS
        or part.startswith("Test")
    )


def wanted(path: PurePath) -> bool:
    """Whether a path below a package root is a public module that is not a test."""
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    return path.suffix == ".py" and bool(parts) and not any(map(is_private_or_test, parts))


def source_files(stdlib_only: bool = False) -> Iterator[list[tuple[PurePath, Path]]]:
    """(path below the package root, file) of the standard library, then of every package."""
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    public = [path for path in relative if wanted(path)]
    yield [(path, root / path) for path in public if path.with_suffix("").parts[0] in STDLIB_NAMES]
    if stdlib_only:
        return
    packages = {}
    for dist in metadata.distributions():
        packages.setdefault((dist.metadata["Name"] or "").lower(), dist)
    for name in sorted(packages, key=lambda name: (name not in FIRST_PACKAGES, name)):
        files = sorted(path for path in packages[name].files or () if wanted(path))
        yield [(path, Path(str(packages[name].locate_file(path)))) for path in files]


def parse_file(path: PurePath, file: Path) -> Iterator[Pair]:
    """The pairs of one Python file; nothing for a file that does not parse."""
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    yield from walk(tree.body, ".".join(parts))


def walk(body: list[ast.stmt], prefix: str) -> Iterator[Pair]:
    """Public definitions of a module or class; what is nested in a function is its own business."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if is_private_or_test(node.name):
                continue
            name = f"{prefix}.{node.name}"
            doc = ast.get_docstring(node, clean=False)
            if doc and (pair := make_pair(name, parameters(node), doc)):
                yield pair
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, name)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from walk(node.body, prefix)
            yield from walk(node.orelse, prefix)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[str]:
    """Parameter names without self and cls; a class has those of its __init__."""
    if isinstance(node, ast.ClassDef):
        inits = (item for item in node.body if getattr(item, "name", "") == "__init__")
        init = next(inits, None)
        return parameters(init) if isinstance(init, ast.FunctionDef) else []
    spec = node.args
    every = [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
    return [arg.arg for arg in every if arg is not None and arg.arg not in {"self", "cls"}]


# --- compiled modules, looked up live ------------------------------------------------------------


def compiled_modules() -> Iterator[str]:
    """Public standard-library modules that exist only as compiled code."""
    loaders = (importlib.machinery.ExtensionFileLoader, importlib.machinery.BuiltinImporter)
    for name in sorted(STDLIB_NAMES - SKIPPED_LIVE):
        if is_private_or_test(name):
            continue
        spec = importlib.util.find_spec(name) if name not in sys.modules else None
        loader = spec.loader if spec else getattr(sys.modules.get(name), "__loader__", None)
        if loader in loaders or isinstance(loader, loaders[0]):
            yield name


def live_pairs(module_name: str) -> Iterator[Pair]:
    """The pairs of a module and its classes as the interpreter sees them."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return
    root = module_name.split(".")[0]
    for attribute, value in sorted(vars(module).items()):
        owner = getattr(value, "__module__", None) or root
        if not callable(value) or is_private_or_test(attribute) or owner.split(".")[0] != root:
            continue
        yield from live_pair(f"{module_name}.{attribute}", value)
        if inspect.isclass(value):
            for method, member in sorted(vars(value).items()):
                if callable(member) and not is_private_or_test(method):
                    yield from live_pair(f"{module_name}.{attribute}.{method}", member)


def live_pair(name: str, value: object) -> Iterator[Pair]:
    """A pair from an object's docstring; a leading signature line gives the parameters."""
    doc = value.__doc__
    if not isinstance(doc, str):
        return
    call = re.compile(rf"\s*[\w.]*{re.escape(name.rsplit('.', 1)[-1])}\s*\((.*?)\)[^\n]*(?:\n|$)")
    params: list[str] = []
    while match := call.match(doc):
        params = params or names_in(match[1])
        doc = doc[match.end() :]
    if not params and not inspect.isclass(value):
        with contextlib.suppress(TypeError, ValueError):
            params = [name for name in inspect.signature(value).parameters if name != "self"]
    if pair := make_pair(name, params, doc):
        yield pair


def names_in(arguments: str) -> list[str]:
    """Parameter names in the text between the parentheses of a signature."""
    flat = re.sub(r"\[[^\]]*\]", "", arguments)
    return re.findall(r"(?:^|,)\s*\**([A-Za-z_]\w*)", flat)


# --- everything ----------------------------------------------------------------------------------


def collect_pairs(stdlib_only: bool = False, progress: Progress = lambda items, _: items) -> list[Pair]:
    """Distinct pairs sorted by name: no two share a sentence, no two share a signature."""
    found: list[Pair] = []
    with without_gc():
        for path, file in progress(files_within_limits(stdlib_only), "reading sources"):
            found.extend(parse_file(path, file))
    modules = [*compiled_modules(), *(() if stdlib_only else LIVE_MODULES)]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for module_name in modules:
            found.extend(live_pairs(module_name))
    return distinct(found)


def files_within_limits(stdlib_only: bool) -> list[tuple[PurePath, Path]]:
    """The source files to read: whole packages in order, cut where a limit is reached."""
    chosen, total = [], 0
    for package in source_files(stdlib_only):
        used = 0
        for path, file in package:
            size = file.stat().st_size if file.is_file() else 0
            fits = used + size <= MAX_PACKAGE_BYTES and total + size <= MAX_SOURCE_BYTES
            if 0 < size <= MAX_FILE_BYTES and fits:
                chosen.append((path, file))
                used += size
                total += size
    return chosen


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Parsing allocates millions of tree nodes and no cycles; the collector costs 40% of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def distinct(pairs: list[Pair]) -> list[Pair]:
    """Keep the first pair by name of each sentence and of each signature."""
    sentences: set[str] = set()
    signatures: set[str] = set()
    kept = []
    for pair in sorted(pairs):
        sentence, signature = pair.sentence.lower(), pair.signature.lower()
        if sentence not in sentences and signature not in signatures:
            kept.append(pair)
            sentences.add(sentence)
            signatures.add(signature)
    return kept
