"""How CUDA kernels get into the build, or stay out of it with a reason; nvcc and the C++ compiler are fakes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup_cuda.py").exists(), reason="needs the source checkout, not an installed package"
)

NVCC = """#!/bin/sh
log={log}
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.88"; exit ;;
  *--dryrun*) echo "#\\$ TOP={top}" >&2; exit ;;
esac
echo "$*" >> "$log"
if [ -e "$log.fail" ]; then echo 'x.cu(7): error: identifier "no_such" is undefined' >&2; exit 2; fi
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo object > "$2"; shift; done
"""
# Compiles and links nothing; whatever setuptools and torch ask, the real one answers.
CXX = """#!/bin/sh
case " $* " in
  *" -c "*|*" -shared "*) ;;
  *) exec {real} "$@" ;;
esac
echo "$*" >> {log}
while [ $# -gt 0 ]; do
  case "$1" in -o) echo object > "$2" ;; -MF) : > "$2" ;; esac
  shift
done
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def make_toolkit(home: Path, release: str = "13.0", top: str | None = None, header: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit; what its nvcc compiles is written to nvcc.log."""
    text = NVCC.format(log=home / "nvcc.log", release=release, top=top or home / "bin" / "..")
    script(home / "bin" / "nvcc", text)
    if header:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime_api.h").touch()
    return home


@pytest.fixture
def setup_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module beside setup.py, on a machine with nothing of CUDA."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    spec = importlib.util.spec_from_file_location("setup_cuda", ROOT / "setup_cuda.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "setup_cuda", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


# ---- For which GPUs


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        (None, ["sm_80", "sm_90a", "compute_90"]),
        ("9.0a", ["sm_90a"]),
        ("9.0+PTX", ["sm_90", "compute_90"]),
        ("9.0 9.0a", ["sm_90a"]),  # code for one GPU, once
        ("8.6;8.6;10.0a,12.0f+PTX", ["sm_86", "sm_100a", "sm_120f", "compute_120f"]),
        ("7.0 7.5 8.0", ["sm_80"]),
    ],
)
def test_architectures_are_read_as_torch_writes_them(setup_cuda, monkeypatch, text, codes) -> None:
    if text is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert setup_cuda.architectures() == codes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hopper", r"must list numbers such as 9.0, 9.0a or 9.0\+PTX, got 'Hopper'"),
        ("7.5", "must have an entry of 8.0 or newer, got '7.5'"),
        (";", "must have an entry of 8.0 or newer, got ';'"),
    ],
)
def test_unusable_architectures_are_refused(setup_cuda, text, message) -> None:
    with pytest.raises(setup_cuda.NoCuda, match=message):
        setup_cuda.architectures(text)


def test_each_architecture_has_its_flag(setup_cuda) -> None:
    assert setup_cuda.gencode(["sm_90a", "compute_90"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


# ---- Which toolkit


def test_cuda_home_comes_first(setup_cuda, monkeypatch, tmp_path) -> None:
    make_toolkit(tmp_path / "other")
    (tmp_path / "path").symlink_to(tmp_path / "other" / "bin")
    home = make_toolkit(tmp_path / "cuda", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(home))
    found = setup_cuda.find_toolkit("13.0")
    assert (found.home, found.version, found.include_dirs) == (home, "13.2.88", (str(home / "include"),))
    assert found.nvcc == str(home / "bin" / "nvcc")


def test_a_wrapper_on_path_says_where_its_toolkit_is(setup_cuda, tmp_path) -> None:
    home = make_toolkit(tmp_path / "cuda")
    script(tmp_path / "path" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    assert setup_cuda.find_toolkit("13.0").home == home


def test_pip_packages_complete_a_toolkit_without_headers(setup_cuda, monkeypatch, tmp_path) -> None:
    home = make_toolkit(tmp_path / "cuda", header=False)
    site = tmp_path / "site"
    for name in ("cudnn", "cu13"):
        (site / "nvidia" / name / "include").mkdir(parents=True)
    (site / "nvidia" / "cu13" / "include" / "cuda_runtime_api.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(setup_cuda.sysconfig, "get_path", lambda name: str(site))
    assert setup_cuda.find_toolkit("13.0").include_dirs == (str(site / "nvidia" / "cu13" / "include"),)


def test_another_major_version_is_refused(setup_cuda, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda", "12.8")))
    with pytest.raises(setup_cuda.NoCuda, match=r"built with CUDA 13.0, but .*/cuda/bin/nvcc is of CUDA 12.8.88"):
        setup_cuda.find_toolkit("13.0")
    assert setup_cuda.find_toolkit("12.6").version == "12.8.88"


def test_what_is_missing_is_named(setup_cuda, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(setup_cuda.NoCuda, match=rf"no CUDA toolkit .*looked at CUDA_HOME={tmp_path}\); install CUDA"):
        setup_cuda.find_toolkit("13.0")
    script(tmp_path / "bin" / "nvcc", "#!/bin/sh\necho broken\n")
    with pytest.raises(setup_cuda.NoCuda, match="does not say its version: broken"):
        setup_cuda.find_toolkit("13.0")
    script(tmp_path / "bin" / "nvcc", "#!/no/such/shell\n")
    with pytest.raises(setup_cuda.NoCuda, match="nvcc does not run"):
        setup_cuda.find_toolkit("13.0")
    monkeypatch.delenv("CUDA_HOME")
    script(tmp_path / "path" / "nvcc", NVCC.format(log="x", release="13.0", top="/nowhere/else"))
    with pytest.raises(setup_cuda.NoCuda, match="says that its toolkit is /nowhere/else"):
        setup_cuda.find_toolkit("13.0")


@pytest.mark.skipif(torch.version.cuda is None or sys.platform != "linux", reason="needs a CUDA build of torch")
def test_the_runtime_is_the_one_that_torch_has_loaded(setup_cuda, tmp_path) -> None:
    (path,) = setup_cuda.runtime_library(tmp_path)
    assert Path(path).is_file() and Path(path).name.startswith("libcudart")
    assert path.endswith(f".{torch.version.cuda.partition('.')[0]}") or torch.version.cuda[:2] in path


# ---- What is compiled again


def test_objects_are_made_again_when_a_file_or_the_command_changes(setup_cuda, tmp_path) -> None:
    home = make_toolkit(tmp_path / "cuda")
    source, header, target = (str(tmp_path / name) for name in ("a.cu", "a.h", "build/a.o"))
    for path in (source, header):
        Path(path).touch()
    toolkit = setup_cuda.Toolkit(home, "13.0.88", ())
    nvcc = setup_cuda.Nvcc(toolkit, ["sm_80"], ["ccache", "g++"])
    assert nvcc.compile(source, target, [header])
    assert not nvcc.compile(source, target, [header])
    assert not setup_cuda.Nvcc(toolkit, ["sm_80"], ["g++"], threads=4).compile(source, target, [header])
    assert setup_cuda.Nvcc(toolkit, ["sm_90a"], ["g++"]).compile(source, target, [header])
    assert setup_cuda.Nvcc(setup_cuda.Toolkit(home, "13.0.99", ()), ["sm_90a"], ["g++"]).compile(source, target, [])
    for path in (source, header):
        later = os.path.getmtime(target) + 10
        os.utime(path, (later, later))
        assert nvcc.compile(source, target, [header])
        os.utime(target, (later, later))
    logged = (home / "nvcc.log").read_text().splitlines()
    assert len(logged) == 5
    assert logged[0].startswith("-ccbin g++ -std=c++17 -O3") and "-gencode=arch=compute_80,code=sm_80" in logged[0]


def test_a_failed_compilation_says_the_first_error_and_is_tried_again(setup_cuda, tmp_path) -> None:
    home = make_toolkit(tmp_path / "cuda")
    source, target = str(tmp_path / "a.cu"), str(tmp_path / "a.o")
    Path(source).touch()
    nvcc = setup_cuda.Nvcc(setup_cuda.Toolkit(home, "13.0.88", ()), ["sm_80"])
    assert nvcc.compile(source, target, [])
    (home / "nvcc.log.fail").touch()
    changed = setup_cuda.Nvcc(nvcc.toolkit, ["sm_90"])
    for _ in range(2):
        with pytest.raises(setup_cuda.NoCuda, match=r'nvcc rejected .*a.cu: x.cu\(7\): error: identifier "no_such"'):
            changed.compile(source, target, [])


def test_registers_are_kept_beside_the_object_and_warnings_are_shown(setup_cuda, tmp_path, capfd) -> None:
    home = make_toolkit(tmp_path / "cuda")
    usual = [
        "ptxas info    : 0 bytes gmem",
        "ptxas info    : Compiling entry function 'f' for 'sm_90a'",
        "ptxas info    : Function properties for f",
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        "ptxas info    : Used 168 registers, used 4 barriers",
        "ptxas info    : Compile time = 3.456 ms",
    ]
    odd = ["ptxas info    : (C7510) Potential Performance Loss: wgmma is serialized", "a.cu(1): warning #177-D: unused"]
    lines = "".join(f'echo "{line}" >&2\n' for line in (*usual, *odd))
    script(home / "bin" / "nvcc", f"#!/bin/sh\n{lines}for word; do target=$word; done\necho object > $target\n")
    source, target = str(tmp_path / "a.cu"), str(tmp_path / "a.o")
    Path(source).touch()
    nvcc = setup_cuda.Nvcc(setup_cuda.Toolkit(home, "13.0.88", ()), ["sm_90a"])
    assert nvcc.compile(source, target, []) and nvcc.is_current(source, target, [])
    assert Path(f"{target}.said").read_text().splitlines() == [*usual, *odd]
    assert capfd.readouterr().err.splitlines() == odd


@pytest.mark.parametrize("name", ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"])
def test_a_chosen_host_compiler_is_kept(setup_cuda, monkeypatch, name) -> None:
    nvcc = setup_cuda.Nvcc(setup_cuda.Toolkit(Path("/cuda"), "13.0", ()), ["sm_80"], ["g++"])
    monkeypatch.setenv(name, "/usr/bin/g++-12" if name == "NVCC_CCBIN" else "-ccbin /usr/bin/g++-12")
    assert "-ccbin" not in nvcc.command("a.cu", "a.o")


# ---- A whole build


class Build:
    """A copy of the sources, a fake toolkit and a fake compiler."""

    def __init__(self, folder: Path) -> None:
        self.source, self.log = folder / "source", folder / "cxx.log"
        self.cuda = make_toolkit(folder / "cuda", torch.version.cuda)
        self.nvcc_log = self.cuda / "nvcc.log"
        self.compiler = script(folder / "c++", CXX.format(real=shutil.which("g++"), log=self.log))
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_report.json")
        for name in ("contrastive_ops", "kernels", "csrc"):
            shutil.copytree(ROOT / name, self.source / name, ignore=ignore)
        for name in (*(path.name for path in ROOT.glob("setup*.py")), "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.source / name)

    def run(self, prelude: str = "pass", **variables: str) -> subprocess.CompletedProcess[str]:
        """Builds after a line of Python."""
        code = f"import runpy, sys, torch; {prelude}; sys.argv = ['setup.py', 'build']; "
        return self.call([sys.executable, "-c", f"{code} runpy.run_path('setup.py', run_name='__main__')"], **variables)

    def call(self, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command that builds; the logs of both compilers begin anew."""
        for log in (self.log, self.nvcc_log):
            log.unlink(missing_ok=True)
        own = ("CONTRASTIVE_OPS_", "TORCH_CUDA_ARCH_LIST", "CUDA_", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        env = {**kept, "CXX": str(self.compiler), "CC": str(self.compiler), "CUDA_HOME": str(self.cuda), **variables}
        env["LDCXXSHARED"] = f"{self.compiler} -shared"
        return subprocess.run(command, cwd=self.source, env=env, capture_output=True, text=True, check=False)

    def compiled(self) -> list[str]:
        """The kernel files that nvcc got."""
        lines = self.nvcc_log.read_text().splitlines() if self.nvcc_log.exists() else []
        return sorted(word for line in lines for word in line.split() if word.endswith(".cu"))

    def line(self, part: str) -> str:
        """The last command of the C++ compiler that has this part: nvcc may fail when a file was compiled already."""
        *_, found = (line for line in self.log.read_text().splitlines() if part in line)
        return found

    def report(self) -> dict[str, str | None]:
        (path,) = self.source.glob("build/lib*/contrastive_ops/_build_report.json")
        return json.loads(path.read_text())

    def is_linked_with_kernels(self) -> bool:
        """Whether the extension gets kernels, their macro and their libraries; all or none."""
        link, compilation = self.line("contrastive_ops/_C"), self.line("bindings.cpp")
        signs = ["contrastive_ops_cuda" in link, "libcudart" in link]
        signs += ["-DCONTRASTIVE_OPS_CUDA=" in compilation, str(self.cuda / "include") in compilation]
        assert len(set(signs)) == 1, (signs, link, compilation)
        return signs[0]


KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/**/*.cu"))


@pytest.fixture
def build(tmp_path: Path) -> Build:
    if torch.version.cuda is None or sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs a CUDA build of torch and g++")
    return Build(tmp_path)


def test_kernels_are_built_by_default_and_once(build: Build) -> None:
    done = build.run()
    assert done.returncode == 0, done.stderr
    assert build.compiled() == KERNELS
    assert build.is_linked_with_kernels()
    summary = build.report()["summary"]
    assert summary.endswith(f"; CUDA {torch.version.cuda}.88 for sm_80 sm_90a compute_90")
    assert build.report()["why_no_cuda"] is None
    assert list(build.source.glob("build/lib*/contrastive_ops/cuda/expert_routing.py"))
    assert build.run().returncode == 0
    assert build.compiled() == []
    # Without the kernels, nothing of them stays.
    assert build.run(CONTRASTIVE_OPS_CUDA="0").returncode == 0
    assert build.compiled() == [] and not build.is_linked_with_kernels()
    assert build.report()["why_no_cuda"] == "CONTRASTIVE_OPS_CUDA=0 was set when the package was built"
    assert build.report()["summary"].endswith("; no CUDA kernels")


def test_kernels_that_fail_leave_the_cpu_extension(build: Build) -> None:
    Path(f"{build.nvcc_log}.fail").touch()
    done = build.run(MAX_JOBS="1")
    assert done.returncode == 0, done.stderr
    assert "contrastive_ops is installed WITHOUT CUDA kernels" in done.stderr
    assert not build.is_linked_with_kernels()
    assert build.report()["why_no_extension"] is None
    assert build.report()["why_no_cuda"].startswith("nvcc rejected csrc/cuda/")
    assert list(build.source.glob("build/lib*/contrastive_ops/_C*.so"))
    done = build.run(CONTRASTIVE_OPS_CUDA="1")
    assert done.returncode != 0
    assert "CONTRASTIVE_OPS_CUDA=1 must be able to build CUDA kernels, but nvcc rejected" in done.stderr
    Path(f"{build.nvcc_log}.fail").unlink()
    assert build.run(CONTRASTIVE_OPS_CUDA="1").returncode == 0
    assert build.compiled() == KERNELS and build.is_linked_with_kernels()


def test_make_gpu_gets_a_package_beside_the_checkout(build: Build, monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "ROOT", build.source)
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    stage = gpu.build_stage((9, 0))
    done = build.call(list(stage.command), **stage.env)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "work" / "site" / "contrastive_ops"
    for name in ("__init__.py", "kernels/__init__.py", "cuda/__init__.py", "_build_report.json"):
        assert (site / name).exists(), name
    assert list(site.glob("_C*.so")) and not list(build.source.glob("contrastive_ops/_C*.so"))
    assert json.loads((site / "_build_report.json").read_text())["summary"].endswith(" for sm_90a")


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("2.14.1+cpu", "pass", "is not built with CUDA; install one that is"),
        (
            "2.14.1+rocm7.0",
            "torch.version.hip = '7.0'",
            'is built for AMD GPUs (ROCm), where backend "triton" serves; the CUDA kernels are for NVIDIA\'s',
        ),
        (
            "2.14.1+xpu",
            "torch.version.xpu = '2025'",
            "is built for Intel GPUs (XPU), for which there are no kernels; the reference runs on them",
        ),
    ],
)
def test_torch_without_cuda_gets_the_cpu_extension(build: Build, name: str, kind: str, why: str) -> None:
    done = build.run(f"torch.version.cuda = None; torch.__version__ = '{name}'; {kind}")
    assert done.returncode == 0, done.stderr
    assert build.compiled() == [] and not build.is_linked_with_kernels()
    assert build.report()["why_no_cuda"] == f"torch {name} {why}"


def test_windows_is_pure_python_and_says_where_else(build: Build) -> None:
    done = build.run("import sys; sys.platform = 'win32'")
    assert done.returncode == 0, done.stderr
    assert "the extension is built on Linux and macOS, got win32; Windows has a Linux of its own, WSL" in done.stderr


def test_a_toolkit_that_does_not_fit_is_left_alone_or_an_error(build: Build) -> None:
    home = make_toolkit(build.cuda.parent / "old", "11.8")
    done = build.run(CUDA_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert not build.is_linked_with_kernels()
    assert "is of CUDA 11.8.88; set CUDA_HOME" in build.report()["why_no_cuda"]
    done = build.run(CUDA_HOME=str(home), CONTRASTIVE_OPS_CUDA="1")
    assert done.returncode != 0 and not build.log.exists()
    assert "CONTRASTIVE_OPS_CUDA=1 must be able to build CUDA kernels, but torch is built with CUDA" in done.stderr
    assert "remove the cause, or set CONTRASTIVE_OPS_CUDA=0" in done.stderr
