"""The extension as nvcc and the linker leave it: what is inside, and how it behaves where no GPU is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from contrastive_ops.core import cuda_kernels, extension

ROOT = Path(__file__).resolve().parent.parent
BUILT = extension.load().build_config()["cuda"] if extension.load() is not None else "no"
# Who asks for CUDA kernels must not get a green run without them.
REQUIRED = os.environ.get("CONTRASTIVE_OPS_CUDA") == "1"

pytestmark = pytest.mark.skipif(BUILT == "no" and not REQUIRED, reason="the extension has no CUDA kernels")


def test_kernels_were_built() -> None:
    assert re.fullmatch(r"\d+\.[\d.]+ for (sm_\d+[af]? ?|compute_\d+[af]? ?)+", BUILT)


def test_every_function_is_there() -> None:
    header = ROOT / "csrc" / "cuda" / "functions.h"
    if not header.exists():
        pytest.skip("needs the source checkout")
    names = re.findall(r"\buse\((\w+)\)", header.read_text().partition("#define")[2])
    assert names
    missing = [name for name in names if not hasattr(extension.load(), f"cuda_{name}")]
    assert not missing


def cuobjdump() -> str:
    """A tool of the toolkit, which Triton brings along."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else ROOT
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(folder))
    if tool is None:
        pytest.skip("needs cuobjdump")
    return tool


def test_there_is_code_for_every_architecture() -> None:
    library = extension.load().__file__
    run = {}
    for what in ("--list-elf", "--list-ptx"):
        done = subprocess.run([cuobjdump(), what, library], capture_output=True, text=True, check=False)
        run[what] = set(re.findall(r"\.(sm_\d+[af]?)\.(?:cubin|ptx)", done.stdout))
    codes = BUILT.partition(" for ")[2].split()
    assert run["--list-elf"] == {code for code in codes if code.startswith("sm_")}
    assert run["--list-ptx"] == {code.replace("compute_", "sm_") for code in codes if code.startswith("compute_")}


@pytest.fixture(scope="module")
def without_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Facts about a process that sees no GPU."""
    folder = tmp_path_factory.mktemp("without_gpu")
    script = """
        import json, pathlib
        import torch
        import contrastive_ops
        from contrastive_ops import ops
        from contrastive_ops.core import backends, extension, triton_kernels
        x = torch.randn(4, 8)
        facts = {"refused": {}, "raised": "", "backends": backends.backends()["similarity_reduce"]}
        for stem in ("similarity_reduce", "similarity_topk", "expert_routing", "grouped_matmul"):
            table = __import__(f"contrastive_ops.ops.{stem}", fromlist=["BACKENDS"]).BACKENDS
            if "cuda" in table:
                facts["refused"][stem] = table["cuda"].unsupported(x)
        try:
            contrastive_ops.similarity_reduce(x, x, backend="cuda")
        except Exception as error:
            facts["raised"] = f"{type(error).__name__}: {error}"
        try:
            extension.load().cuda_expert_routing_dispatch(x, None, torch.zeros(4, dtype=torch.int64), x, 1, 4, 8)
        except ValueError as error:
            facts["unguarded"] = str(error)
        facts["value"] = float(contrastive_ops.similarity_reduce(x, x).sum())
        lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
        facts["runtimes"] = sorted({line.split()[-1] for line in lines if "libcudart" in line})
        print(json.dumps(facts))
    """
    env = {name: value for name, value in os.environ.items() if name != "CONTRASTIVE_OPS_BACKEND"}
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, [env.get("PYTHONPATH")]), str(ROOT)])
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_imports_and_computes_without_a_gpu(without_gpu: dict) -> None:
    assert without_gpu["backends"]["cpu"] is None
    assert isinstance(without_gpu["value"], float)


def test_it_refuses_politely_without_a_gpu(without_gpu: dict) -> None:
    assert all(reasons == ["device=cpu (supported: cuda)"] for reasons in without_gpu["refused"].values())
    # Called past the table, a kernel still never sees an address of the CPU.
    assert "expert_routing_dispatch: tensors must be contiguous and on a GPU, got" in without_gpu["unguarded"]
    expected = "NotImplementedError: similarity_reduce: backend 'cuda' cannot run these inputs:\n    device=cpu"
    if "similarity_reduce" in without_gpu["refused"]:
        assert without_gpu["raised"].startswith(expected)


def test_one_cuda_runtime_is_mapped(without_gpu: dict) -> None:
    assert len(without_gpu["runtimes"]) == 1, without_gpu["runtimes"]


# ---- Which GPUs there is code for


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), "sm_80 sm_90a compute_90", True),
        ((8, 9), "sm_80 sm_90a compute_90", True),  # code for 8.0 runs on 8.9
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90a", False),  # features of 9.0 are of no other
        ((10, 0), "sm_80 compute_90", True),
        ((9, 0), "sm_80", False),
        ((8, 0), "sm_86 compute_90", False),
        ((12, 1), "sm_120f", True),
        ((12, 0), "compute_120a", True),
        ((12, 1), "compute_120a", False),
    ],
)
def test_a_gpu_without_code_is_refused(capability: tuple[int, int], built: str, runs: bool) -> None:
    assert cuda_kernels.has_code_for(capability, f"13.0.88 for {built}") == runs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_with_code_is_taken() -> None:
    assert cuda_kernels.unsupported(torch.empty(1, device="cuda")) == []
