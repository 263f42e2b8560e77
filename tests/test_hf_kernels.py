"""The layout of Hugging Face's `kernels`: imported from its folder, beside the package and without it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "hf_kernels.py"

# As the importer of `kernels` does: a spec of the file, under the name that the metadata gives.
LOAD = """
import importlib.util, json, sys
def load(folder):
    name = json.loads(open(folder + "/metadata.json").read())["id"]
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
ALONE = """
sys.modules["contrastive_ops"] = None
import torch
kernel = load(sys.argv[1])
x, y = torch.randn(20, 16, requires_grad=True), torch.randn(20, 16, requires_grad=True)
found = []
for backend in ("triton", "reference"):
    loss = kernel.clip(x, y, scale=5.0, backend=backend)
    found.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
torch.testing.assert_close(*found)
best = kernel.similarity_topk(x, y, 3, backend="triton")
assert torch.equal(best.indices, (x @ y.T).topk(3).indices)
assert kernel.ops.similarity_reduce.__module__.startswith(kernel.__name__)
"""
BESIDE = """
import torch
import contrastive_ops
kernel = load(sys.argv[1])
x, y = torch.randn(8, 4), torch.randn(8, 4)
values = [each.clip(x, y, scale=5.0, backend="reference") for each in (kernel, contrastive_ops)]
torch.testing.assert_close(*values)
assert kernel.clip is not contrastive_ops.clip
"""


def script():
    spec = importlib.util.spec_from_file_location("hf_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return {path.name: path for path in script().write(folder)}


@pytest.mark.parametrize("program", [ALONE, BESIDE], ids=["alone", "beside"])
def test_imports_from_the_folder(variants, program):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", LOAD + program, str(variants["torch-cuda"])]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=variants["torch-cuda"].parent)
    assert ended.returncode == 0, ended.stderr


def test_metadata_and_what_is_left_out(variants):
    assert set(variants) == {"torch-cuda", "torch-rocm"}
    for backend, folder in (("cuda", variants["torch-cuda"]), ("rocm", variants["torch-rocm"])):
        said = json.loads((folder / "metadata.json").read_text())
        assert (said["name"], said["license"], said["backend"]) == ("contrastive-ops", "Apache-2.0", {"type": backend})
        assert said["id"].startswith("contrastive_ops_") and said["python-depends"] == []
        assert not list(folder.rglob("*.so")) and not (folder / "integrations").exists()
        for file in folder.rglob("*.py"):
            assert not any(line.startswith(("from contrastive_ops", "import contrastive_ops")) for line in file.open())


def test_an_import_of_the_package_by_name_is_refused():
    with pytest.raises(ValueError, match=r"a.py: line 2 must import from contrastive_ops"):
        script().relative(Path("a.py"), "\nimport contrastive_ops.core\n")
    text = "from contrastive_ops.core import problem\nfrom contrastive_ops import clip\n"
    assert script().relative(Path("kernels/a.py"), text) == "from ..core import problem\nfrom .. import clip\n"
