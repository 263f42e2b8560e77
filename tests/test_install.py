"""Each way to install, in an environment with only torch, numpy and a compiler, or without the compiler."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from install_cases import (
    NO_COMPILER,
    ROOT,
    caching_compiler,
    clean_interpreter,
    copy_sources,
    environment,
    run,
    setuptools_wheel,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout, not an installed package"),
]

WAYS = ["README", "pip install .", "pip install -e .", "pip install --no-build-isolation .", "sdist"]


@dataclass
class Place:
    """A clone, an interpreter, and the variables that both are used with."""

    clone: Path
    python: Path
    env: dict[str, str]
    elsewhere: Path

    def shell(self, line: str) -> str:
        """The output of a line of shell in the clone, which must succeed."""
        done = run("bash", "-ec", line, cwd=self.clone, env=self.env)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def info_and_check(self, folder: Path) -> tuple[dict, str]:
        """What the two commands say in a folder, in one process: importing torch is most of the time."""
        code = (
            "from contrastive_ops.__main__ import main; main(['info', '--json']); print('---'); exit(main(['check']))"
        )
        done = run(self.python, "-c", code, cwd=folder, env=self.env)
        assert done.returncode == 0, done.stdout + done.stderr
        info, check = done.stdout.split("---")
        return json.loads(info), check


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs Linux and g++")
    # Of the kernels there are objects; what is compiled here is the rest, which is called and not timed.
    return caching_compiler(tmp_path_factory.mktemp("compiler"), "-O0")


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setuptools_wheel(tmp_path_factory.mktemp("links"))


def place(folder: Path, links: Path, *names: str, **variables: str) -> Place:
    python = clean_interpreter(folder / "venv", *names)
    env = environment(
        PATH=os.pathsep.join([str(python.parent), os.environ["PATH"]]),
        PIP_FIND_LINKS=str(links),
        PIP_NO_COMPILE="1",  # of setuptools for each isolated build
        PYTHONDONTWRITEBYTECODE="1",
        CONTRASTIVE_OPS_CUDA="0",
        OMP_NUM_THREADS="1",
        **variables,
    )
    env.pop("VIRTUAL_ENV", None)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    return Place(copy_sources(folder / "clone"), python, env, elsewhere)


def readme_lines() -> list[str]:
    """The commands under "To install into an environment of yours"."""
    text = (ROOT / "README.md").read_text().partition("To install into")[2]
    return re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].splitlines()


def install(at: Place, way: str) -> None:
    if way == "README":
        said = [at.shell(line) for line in readme_lines()]
        assert "already satisfied: torch" in said[0] and "Successfully installed contrastive-ops" in said[1]
        return
    if "--no-build-isolation" in way:
        at.shell('pip install "setuptools>=77"')
    if way == "sdist":
        script = "import setuptools.build_meta as b; b.build_sdist('dist')"
        assert run(sys.executable, "-c", script, cwd=at.clone, env=at.env).returncode == 0
        way = "pip install dist/*.tar.gz"
    at.shell(way)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "pip install ."])  # a line of the README
def test_builds_against_the_torch_that_is_there(way: str, compiler: Path, links: Path, tmp_path: Path) -> None:
    at = place(tmp_path, links, "torch", "numpy", CXX=str(compiler), CC=str(compiler))
    install(at, way)
    (inside, checked_inside), (outside, checked_outside) = map(at.info_and_check, (at.clone, at.elsewhere))
    note = inside["extension"].pop("note", "")
    assert inside["extension"] == outside["extension"] and outside["extension"]["present"]
    assert Path(outside["extension"]["file"]).is_relative_to(at.clone if "-e" in way else at.python.parent.parent)
    assert bool(note) == ("-e" not in way), note
    for checked in (checked_inside, checked_outside):
        assert len(re.findall(r"^ok +cpu ", checked, re.MULTILINE)) == 18 and "FAIL" not in checked


@pytest.mark.parametrize("way", WAYS[1:])
def test_without_a_compiler_all_say_so(way: str, links: Path, tmp_path: Path) -> None:
    at = place(tmp_path, links, "torch", "numpy", **NO_COMPILER)
    install(at, way)
    reason = f"no C++ compiler was found (looked for {NO_COMPILER['CXX']})"
    for info, check in map(at.info_and_check, (at.clone, at.elsewhere)):
        assert (info["extension"]["present"], info["extension"]["why"]) == (False, reason)
        assert f"skip  cpu: {reason}; run `python -m contrastive_ops info`" in check


def test_without_torch_the_build_stops_and_says_what_to_do(links: Path, tmp_path: Path) -> None:
    at = place(tmp_path, links)
    # With its requirements pip would look for torch first, and there is no index here.
    done = run("bash", "-ec", "pip install --no-deps .", cwd=at.clone, env=at.env)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert f"built against it, but {at.python} has none\n" in output
    assert f'run: {at.python} -m pip install "torch>=2.6", and then the same command again' in output
    assert "Successfully installed" in at.shell("CONTRASTIVE_OPS_EXT=0 pip install --no-deps .")


def test_a_build_says_how_far_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`make install`: the first line before anything is compiled, then the objects that were written since."""
    (tmp_path / "earlier.o").write_text("")
    os.utime(tmp_path / "earlier.o", (0, 0))
    building = runpy.run_path(str(ROOT / ".ci" / "building.py"))["main"]
    code = f"import sys, time; open({str(tmp_path / 'made.o')!r}, 'w').close(); time.sleep(0.5); sys.exit(3)"
    assert building([sys.executable, "-S", "-c", code], tmp_path, every=0.3) == 3
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("contrastive_ops: building") and lines[-1].startswith("contrastive_ops: not built in ")
    assert lines[1:-1] and lines[-2].endswith(" s, 1 files compiled")
