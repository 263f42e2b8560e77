"""Commands that documents, docstrings and messages name: targets, modules, files, options and packages exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from contrastive_ops import __main__ as cli
from contrastive_ops import _checkout

ROOT = Path(__file__).resolve().parent.parent
# Whatever a user may read: documents, and everything in the code, of which messages and docstrings are a part.
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
CODE = [
    *(
        path
        for folder in ("contrastive_ops", "kernels", "benchmarks", "examples")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ),
    *ROOT.glob("setup*.py"),
]
OTHERS = [ROOT / name for name in ("Makefile", ".ci/run", ".pre-commit-config.yaml", "pyproject.toml", "CITATION.cff")]
OTHERS += [*ROOT.glob("requirements/*.txt"), *ROOT.glob(".github/**/*.yml")]
TEXTS = sorted({path for path in (*DOCUMENTS, *CODE, *OTHERS) if path.exists()})

pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the source checkout")


def found(pattern: str, paths: list[Path] = TEXTS) -> list[tuple[Path, re.Match[str]]]:
    """Every place of a pattern in what a user may read."""
    return [(path, match) for path in paths for match in re.finditer(pattern, path.read_text(), re.MULTILINE)]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = found(r"`make ([a-z][\w-]*)")  # in code spans
    named += found(r"^[ #]*(?:- run: )?make ([a-z][\w-]*)(?: {2,}| ARGS=|$)")  # and in blocks
    wrong = [(path.name, match[0]) for path, match in named if match[1] not in targets]
    assert len(named) > 30 and not wrong, wrong


def test_modules_and_their_options_exist() -> None:
    parser = subprocess.run([sys.executable, "-m", "contrastive_ops", "-h"], capture_output=True, text=True, cwd=ROOT)
    (commands,) = re.findall(r"\{([\w,]+)\}", parser.stdout.splitlines()[0])
    named, wrong = found(r"python3? -m ([\w.]+)((?: +[\w.*/-]+)*)"), []
    for path, match in named:
        module, words = match[1].rstrip("."), match[2].split()
        if module == "contrastive_ops":
            good = not words or words[0] in commands.split(",")
        elif module.split(".")[0] == "benchmarks":
            file = ROOT / f"{module.replace('.', '/')}.py"
            options = [word for word in words if word.startswith("--")]
            good = file.exists() and all(f'"{option}"' in file.read_text() for option in options)
        else:
            good = module in ("pip", "pytest", "venv", "build")
        if not good:
            wrong.append((path.name, match[0]))
    assert len(named) > 30 and not wrong, wrong


def test_files_that_are_run_exist() -> None:
    named = found(r"(?:\bpython3?|\$\(RUN\)|-m pytest) +((?:\w+/)*\w+\.py)\b")
    wrong = [(path.name, match[0]) for path, match in named if not (ROOT / match[1]).exists()]
    assert len(named) > 5 and not wrong, wrong


def test_nothing_is_installed_from_an_index_but_what_others_own() -> None:
    """The name of this package belongs to nobody there: whoever registered it would run code on users' machines."""
    required = [line for path in ROOT.glob("requirements/*.txt") for line in path.read_text().splitlines()]
    known = {re.match(r"[\w-]+", line)[0] for line in required if line and line[0] not in "#-"}
    known |= {"setuptools", "pre-commit", "triton"}
    named, wrong = found(r"pip3? install((?: (?:\"[^\"\n]+\"|[^\s`&;,|\"'#)]+))+)"), []
    for path, match in named:
        words = [word.strip("\"'.:") for word in match[1].split()]
        for before, word in zip(["", *words], words, strict=False):
            takes_value = before in ("-r", "--target", "-t", "-c")
            if not word or word[0] in "-{$/" or takes_value:
                continue  # the folder itself, options, what is filled in
            name = re.match(r"[\w-]*", word)[0]
            if name not in known and word.isascii() and not word.endswith((".txt", ".whl", ".gz")):
                wrong.append((path.name, match[0]))
    assert len(named) > 5 and not wrong, wrong
    assert not {"contrastive-ops", "contrastive_ops"} & known
    messages = [(path.name, match[0]) for path, match in found(r"install[^\n]*contrastive[-_]ops(?![\w./])", CODE)]
    assert not messages, messages


def test_variables_exist_and_are_documented() -> None:
    code = {match[0] for _, match in found(r"CONTRASTIVE_OPS_[A-Z_]+\b", CODE)}
    native = "".join(path.read_text() for path in ROOT.glob("csrc/**/*.*"))
    defined = set(re.findall(r"#define (CONTRASTIVE_OPS_[A-Z_]+)", native))
    table = set(re.findall(r"CONTRASTIVE_OPS_[A-Z_]+", (ROOT / "CONTRIBUTING.md").read_text())) - defined
    macros = {name for name in code if f'"{name}"' not in native and f'environ.get("{name}' not in native}
    documented = {match[0] for _, match in found(r"CONTRASTIVE_OPS_[A-Z_]+\b", DOCUMENTS)} - defined
    assert documented == table, documented ^ table
    assert table <= code, table - code
    assert macros  # what is only a macro of the build needs no line in the table


RECORDS = {
    "a folder": {"url": "FOLDER", "dir_info": {}},
    "an editable folder": {"url": "FOLDER", "dir_info": {"editable": True}},
    "a folder that is gone": {"url": "file:///no/such/folder", "dir_info": {}},
    "a wheel": {"url": "file:///no/such/contrastive_ops-0.2.0-cp311-cp311-linux_x86_64.whl", "archive_info": {}},
    "a commit": {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
    "an archive": {"url": "https://host/x.tar.gz", "archive_info": {}},
    "an index": {},
}


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("in_clone", [False, True])
def test_what_info_tells_to_run(kind, in_clone, monkeypatch, tmp_path) -> None:
    """Paths with spaces included: the last word is something that exists, or the line is no command."""
    source = tmp_path / "my source"
    source.mkdir()
    record = {**RECORDS[kind]}
    if record.get("url") == "FOLDER":
        record["url"] = source.as_uri()
    monkeypatch.setattr(_checkout, "source_folder", lambda: source if in_clone else None)
    monkeypatch.setattr(_checkout, "installations", lambda: iter([(cli.PACKAGE, record)]))
    said = cli._fix_commands()[-1]
    url = {"a commit": "git+https://host/x.git@abc", "an archive": "https://host/x.tar.gz"}.get(kind)
    if in_clone or "url" in record and str(source.as_uri()) == record["url"]:
        url = str(source)
    if url is None:
        assert said == "install it again from the folder of its source code, with CONTRASTIVE_OPS_EXT=1"
        return
    words = shlex.split(said)
    assert words[0] == "CONTRASTIVE_OPS_EXT=1" and words[1] == sys.executable and words[2:5] == ["-m", "pip", "install"]
    assert words[-1] == url and ("-e" in words) == (in_clone and bool(record))
    assert ("--no-build-isolation" in words) == (importlib.util.find_spec("setuptools") is not None)
