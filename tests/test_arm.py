"""The levels for ARM as far as a compiler shows them: the main loops of the assembly that it writes."""

from __future__ import annotations

import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "count_instructions.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source checkout")


def compilers() -> list[str]:
    """Commands that compile for ARM here."""
    native = ["c++"] if platform.machine() in ("aarch64", "arm64") else []
    return [name for name in (*native, "aarch64-linux-gnu-g++") if shutil.which(name)]


@pytest.fixture(scope="module")
def counted():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return runpy.run_path(str(SCRIPT), run_name="count_instructions")
    finally:
        sys.path.remove(str(SCRIPT.parent))


GOOD = """
_Z4tilev:
    mov x0, 0
.L2:
    ldp q0, q1, [x1], 32
    {products}
    {extra}
    bne .L2
    str q0, [sp, 16]
    ret
"""
PRODUCTS = "\n    ".join(f"fmla v{2 + lane % 16}.4s, v0.4s, v1.s[{lane % 4}]" for lane in range(32))


@pytest.mark.parametrize(
    ("extra", "ratio", "spills"),
    [("", 34 / 32, 0), ("ldr q5, [sp, 32]", 35 / 32, 1), ("nop\n    " * 16, 50 / 32, 0)],
    ids=["good", "spill", "long"],
)
def test_what_the_script_counts(counted, extra: str, ratio: float, spills: int) -> None:
    (loop,) = counted["loops"](GOOD.format(products=PRODUCTS, extra=extra))
    assert len(loop.products) == 32 and loop.ratio == ratio and loop.spills == spills


def test_a_file_without_the_loop_fails(counted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("none", "_Z1fv:\n    ret\n"), ("good", GOOD.format(products=PRODUCTS, extra=""))):
        (tmp_path / f"{name}.s").write_text(text)
    assert counted["main"]([str(tmp_path / "good.s")]) == 0
    assert counted["main"]([str(tmp_path / "good.s"), str(tmp_path / "none.s")]) == 1
    assert "no loop of products" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["neon", "neon_bf16"])
def test_main_loops(counted, level: str, tmp_path: Path) -> None:
    """At most 1.45 instructions a product and no spill, in every loop of a kernel with all dtypes."""
    if not compilers():
        pytest.skip("needs aarch64-linux-gnu-g++")
    for compiler in compilers():
        path = counted["assembly"](compiler, "csrc/cpu/grouped_matmul.cpp", level, tmp_path)
        found = counted["loops"](path.read_text())
        used = {product for loop in found for product in loop.products}
        assert used == ({"bfdot"} if level == "neon_bf16" else {"fmla"}), (compiler, found)
        assert len(found) == 1  # steps of float64 have fewer products than are counted
        for loop in found:
            assert loop.ratio <= counted["MOST_INSTRUCTIONS"] and loop.spills == 0, (compiler, str(loop))


def test_panels_that_would_end_in_the_middle_do_not_compile(tmp_path: Path) -> None:
    """Eight rows with groups of four lanes once corrupted the heap."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    text = (ROOT / "csrc" / "cpu" / "similarity_packing.h").read_text()
    broken = text.replace("kLaneGroup = kRows<C> > kCols<C> ? kRows<C> : kCols<C>", "kLaneGroup = kRows<C> / 2")
    assert broken != text
    for name, source in (("good", text), ("broken", broken)):
        folder = tmp_path / name / "cpu"
        folder.mkdir(parents=True)
        for header in (ROOT / "csrc").glob("*.h"):
            (folder.parent / header.name).symlink_to(header)
        for header in (ROOT / "csrc" / "cpu").glob("*.h"):
            if header.name != "similarity_packing.h":
                (folder / header.name).symlink_to(header)
        (folder / "similarity_packing.h").write_text(source)
        (folder / "one.cpp").write_text('#include "similarity_packing.h"\n')
        command = [compiler, "-std=c++20", "-fsyntax-only", "-DLEVEL=level_default", "-DVECTOR_BYTES=16"]
        run = subprocess.run([*command, folder / "one.cpp"], capture_output=True, text=True, check=False)
        assert (run.returncode == 0) is (name == "good"), run.stderr
    assert "ends with a panel of either side" in run.stderr


@pytest.mark.parametrize(
    ("built_for", "levels"),
    [
        ("linux-x86_64", {"default", "avx2", "avx512", "avx512_bf16"}),
        ("linux-aarch64", {"neon", "neon_bf16"}),
        ("macosx-14.0-arm64", {"neon", "neon_bf16"}),
        ("linux-ppc64le", {"default"}),
        ("macosx-11.0-universal2", {"default", "avx2", "avx512", "avx512_bf16", "neon", "neon_bf16"}),
    ],
)
def test_levels_of_an_architecture(built_for: str, levels: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import setup_cpu

    monkeypatch.setattr(setup_cpu.sysconfig, "get_platform", lambda: built_for)
    found = setup_cpu.levels()
    assert set(found) - {"amx"} == levels
    names = list(found)
    for level in names:  # the linker reads the one that calls before the one that is called
        below = dict(setup_cpu.level_macros(level)).get("LEVEL_BELOW", f"level_{level}").removeprefix("level_")
        assert names.index(below) <= names.index(level)
    if built_for.endswith("universal2"):
        assert all(found[level][:2] == ["-arch", "arm64" if "neon" in level else "x86_64"] for level in names)


def test_products_assemble_for_a_mac(tmp_path: Path) -> None:
    """The instructions that the tile writes by hand, as Clang writes them into an object for macOS."""
    named = [name for name in ("clang++", "clang++-19", "clang++-14") if shutil.which(name)]
    if not named:
        pytest.skip("needs Clang")
    templates = re.findall(
        r'__asm__\("((?:fmla|bfdot) [^"]*)"', (ROOT / "csrc" / "cpu" / "similarity_tile.h").read_text()
    )
    assert len(templates) == 3
    line = '  __asm__("{}" : "+w"(sum) : "w"(b), "w"(a), "i"(1));\n'
    body = "".join(line.format(template) for template in templates)
    source = tmp_path / "one.cpp"
    source.write_text(f"#include <arm_neon.h>\nvoid f(float32x4_t& sum, uint32x4_t a, uint32x4_t b) {{\n{body}}}\n")
    target = ["--target=arm64-apple-macos14", "-ffreestanding", "-march=armv8.2-a+bf16", "-O2", "-c"]
    for name in named:
        subprocess.run([name, "-stdlib=libc++", *target, source, "-o", tmp_path / "one.o"], check=True)
        assert (tmp_path / "one.o").read_bytes()[:4] == bytes.fromhex("cffaedfe")  # Mach-O, 64 bits
