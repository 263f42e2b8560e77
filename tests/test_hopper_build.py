"""What nvcc makes of the kernels for Hopper GPUs: the instructions they are written for, and none that slow them."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from test_extension_cuda import cuobjdump

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("csrc", "cuda", "hopper")
ARCHITECTURE = "sm_90a"


@pytest.fixture(scope="module")
def compilers():
    """nvcc as an installation calls it, and for the GPU of these kernels alone."""
    if torch.version.cuda is None or not (ROOT / "setup_cuda.py").exists():
        pytest.skip("needs the source checkout and a CUDA build of torch")
    sys.path.insert(0, str(ROOT))
    import setup_cpu
    import setup_cuda

    try:
        toolkit = setup_cuda.find_toolkit(torch.version.cuda)
        codes = setup_cuda.architectures()
    except setup_cuda.NoCuda as why:
        pytest.skip(str(why))
    return setup_cuda.Nvcc(toolkit, codes, setup_cpu.find_compiler()), setup_cuda.Nvcc(toolkit, [ARCHITECTURE])


@pytest.fixture(scope="module")
def made(compilers, tmp_path_factory):
    """Of each file: what nvcc said, the instructions of each kernel of clusters in their order, registers of a thread.

    Of the objects of `make install`, where they are what would be made now; else the files are compiled.
    """
    installed, alone = compilers
    tool, folder, found = cuobjdump(), tmp_path_factory.mktemp("hopper_build"), {}
    objects = Path("build", f"editable.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/**/*.h")]
    depends = [str(path.relative_to(ROOT)) for path in (*headers, ROOT / "setup_cuda.py")]
    for name in COUNTS:
        source, target = str(FOLDER / f"{name}.cu"), str(objects / FOLDER / f"{name}.cu.o")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)  # commands have relative paths
            if ARCHITECTURE not in installed.codes or not installed.is_current(source, target, depends):
                target = str(folder / f"{name}.o")
                assert alone.compile(source, target, depends)
            said = Path(f"{target}.said").read_text()
            listed, usage = (
                subprocess.run(
                    [tool, "-arch", ARCHITECTURE, what, target], capture_output=True, text=True, check=True
                ).stdout
                for what in ("-sass", "-res-usage")
            )
        kernels = {}
        for text in listed.split("Function : ")[1:]:
            symbol = text.split(None, 1)[0]
            if f"{name}_kernel" in symbol:
                kernels[symbol] = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", text)
        used = re.findall(rf"Function \S*{name}_kernel\S*:\s+REG:(\d+)", usage)
        found[name] = said, kernels, [int(each) for each in used]
    return found


# How many kernels each file has (types, kinds of slopes, and of two matrices or of one with itself), and the width of
# their tiles.
COUNTS, WIDTHS = {"fold": 4, "weigh": 8, "topk": 2}, {"fold": 192, "weigh": 128, "topk": 192}
each_file = pytest.mark.parametrize("name", COUNTS)


def kernels(made, name):
    assert len(made[name][1]) == COUNTS[name]
    return made[name][1].items()


def count(instructions, pattern):
    return sum(re.search(pattern, text) is not None for _, text in instructions)


@each_file
def test_nvcc_overlaps_products(made, name):
    """C75xx: products that are waited for one by one, because registers between them are looked at."""
    said = made[name][0]
    assert "ptxas info" in said and not re.search(r"C75\d\d|wgmma", said), said


@each_file
def test_registers_are_those_of_the_launch(made, name):
    """Three groups of 128 threads begin with 168 each, of which they give and take."""
    used = made[name][2]
    assert len(used) == COUNTS[name] and max(used) <= 168
    for _, instructions in kernels(made, name):
        assert count(instructions, "USETMAXREG") == 2


@each_file
def test_products_and_copies_are_the_instructions_of_hopper(made, name):
    for symbol, instructions in kernels(made, name):
        kind = "BF16" if "bfloat16" in symbol else ""
        pattern = rf"HGMMA\.64x{WIDTHS[name]}x16\.F32(\.{kind})? " if kind else rf"HGMMA\.64x{WIDTHS[name]}x16\.F32 "
        # Four products of each half of the rows: of the first step of a tile, and in the loop.
        assert count(instructions, pattern) == count(instructions, "HGMMA") == 16, symbol
        assert count(instructions, r"UTMALDG\.2D ") == 1
        assert count(instructions, r"UTMALDG\.2D\.MULTICAST ") == 1


def test_weights_leave_by_blocks_and_tiles(made):
    for symbol, instructions in kernels(made, "weigh"):
        assert count(instructions, r"STSM\.16\.M88\.4 ") == WIDTHS["weigh"] // 8, symbol
        assert count(instructions, r"UTMASTG\.2D ") == WIDTHS["weigh"] // 64
    for name in ("fold", "topk"):
        for _, instructions in kernels(made, name):
            assert count(instructions, "STSM|UTMASTG") == 0


def test_exponentials_are_as_few_as_can_be(made):
    """One for each of a thread's pairs, for its row and its column; two where both have a weight; one for softplus.

    A loop for logits that lie far apart has a few more.
    """
    for symbol, instructions in kernels(made, "fold"):
        beyond = count(instructions, r"MUFU\.EX2") - WIDTHS["fold"]
        assert 0 < beyond < 40, symbol
    for symbol, instructions in kernels(made, "weigh"):
        found, pairs = count(instructions, r"MUFU\.EX2"), WIDTHS["weigh"]
        if found == 2 * pairs:
            continue
        assert pairs <= found < pairs + 8, symbol
        assert pairs <= count(instructions, r"MUFU\.RCP") < pairs + 32
        folds = "Lb0E" in symbol  # of one with itself, losses are folded before
        assert pairs * folds <= count(instructions, r"MUFU\.LG2") < pairs * folds + 8


def test_a_score_is_compared_with_the_largest_first(made):
    """A maximum takes one instruction for each of a thread's pairs; an atomic, for each of its rows, is in a loop."""
    for symbol, instructions in kernels(made, "topk"):
        assert WIDTHS["topk"] <= count(instructions, "FMNMX") < WIDTHS["topk"] + 16, symbol
        assert count(instructions, "ATOMG") == 4, symbol
        assert count(instructions, r"MUFU\.EX2") == 0, symbol


@each_file
def test_nothing_is_spilled_where_tiles_are_multiplied(made, name):
    """Of the loops that multiply the innermost is that of the steps of a tile."""
    for symbol, instructions in kernels(made, name):
        places = [int(address, 16) for address, _ in instructions]
        loops = []
        for at, (address, text) in enumerate(instructions):
            jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if jump and int(jump[1], 16) < int(address, 16):
                body = instructions[places.index(int(jump[1], 16)) : at + 1]
                if count(body, "HGMMA"):
                    loops.append(body)
        loop = min(loops, key=len)
        assert count(loop, "HGMMA") == 8, symbol
        assert count(loop, r"\b(LDL|STL)\b") == 0, symbol
        assert len(loop) < 200, symbol
