"""What every processor runs has instructions of every processor; what every Linux loads has symbols of an old one."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contrastive_ops.core import eager, extension

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")

# Mnemonics of what came after x86-64: SSE3, SSSE3, SSE4, AVX and all that is encoded like it, and of single bits.
# tzcnt is not among them: its encoding is that of bsf with a prefix that old processors pass over.
NEWER_X86 = re.compile(
    r"""v(?!err|erw|mcall)\w+ | k(mov|or|and|xor|not|shift|test|unpck|add)\w* | \w*xsave\w*
    | addsubp[sd] | hadd\w+ | hsub\w+ | lddqu | movddup | movs[hl]dup | fisttp\w*
    | pshufb | phadd\w+ | phsub\w+ | pmaddubsw | pmulhrsw | psign\w | pabs\w | palignr
    | pmulld | pmuldq | dpp[sd] | mpsadbw | p?blend\w+ | p(min|max)(sb|uw|ud|sd) | round[ps][sd] | insertps | extractps
    | pinsr[bdq] | pextr[bdq] | pmov[sz]x\w+ | ptest | pcmpeqq | packusdw | movntdqa | phminposuw
    | pcmp[ei]str\w+ | pcmpgtq | crc32\w* | popcnt\w* | lzcnt\w* | andn | bextr | bls\w+ | bzhi | mulx | pdep | pext
    | rorx | sarx | shlx | shrx | adcx | ad[od]x | movbe\w* | aes\w+ | pclmul\w+ | sha\d\w+ | tdp\w+ | tile\w+""",
    re.VERBOSE,
)
# The same for ARM: what came after Armv8.0, which are atomic operations, dot products, bfloat16, complex numbers, SVE.
NEWER_ARM = re.compile(
    r"""bf(dot|mmla|cvt|mla)\w* | (us|su|s|u)dot | (us|s|u)mmla | casp?[al]*[bh]? | swp[al]*[bh]?
    | (ld|st)(add|clr|set|eor|[su]max|[su]min)[al]*[bh]? | ldapr\w* | fc(mla|add) | fmlal\w* | fmlsl\w* | fjcvtzs
    | sqrdml[as]h | eor3 | rax1 | bcax | whilel\w* | ptrue | cnt[bhwd] | crc32\w*""",
    re.VERBOSE,
)
WIDE_X86, WIDE_ARM = r"%[yz]mm|%k[0-7]", r"\bz\d+\.|\bp\d+/[mz]|\bza\b"
# Newer versions of what glibc has always had: a build on an older system takes the older one. The last is asked for by
# the headers of libstdc++, and only where glibc has it.
ALWAYS_THERE = {"exp", "log", "pow", "dlopen", "dlsym", "dlclose", "dlerror", "__libc_single_threaded"}
OLDEST_GLIBC = (2, 28)  # that of manylinux_2_28


def tool(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"needs {command[0]}")
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def objects(*levels: str) -> list[Path]:
    """What `make install` has left of these levels of the extension; without a name, of all that is of no level."""
    every = sorted((ROOT / "build").glob("editable.*/**/*.o"))
    of = {path: re.findall(r"/contrastive_ops_(\w+)/csrc/", str(path)) for path in every}
    found = [path for path in every if (of[path][:1] or [""])[0] in (levels or ("", "capability", "scratch"))]
    if not found:
        pytest.skip("needs the objects of `make install`")
    return found


def newer_instructions(path: Path, machine: str = platform.machine()) -> set[str]:
    """Instructions of an object that processors of before SSE3 do not have, or those of Armv8.0."""
    prefixes = "lock|repz?|repnz|data16|bnd|notrack"
    arm = machine == "aarch64"
    objdump = "aarch64-linux-gnu-objdump" if arm and platform.machine() != machine else "objdump"
    listing = tool(objdump, "-d", "--no-show-raw-insn", path)
    lines = re.findall(rf"^\s+[0-9a-f]+:\t(?:(?:{prefixes}) )*(\w+)(.*)$", listing, re.MULTILINE)
    assert lines, path
    newer, wide = (NEWER_ARM, WIDE_ARM) if arm else (NEWER_X86, WIDE_X86)
    return {name for name, operands in lines if newer.fullmatch(name) or re.search(wide, operands)}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="knows two architectures")
def test_only_the_levels_have_instructions_of_newer_processors() -> None:
    arm = platform.machine() == "aarch64"
    common = [*objects(), *objects("neon" if arm else "default")]
    # Also what speaks with CUDA, where it was built.
    assert {"bindings.o", "tensor.o", "threads.o", "capability.o", "scratch.o"} <= {path.name for path in common}
    found = {path.name: newer_instructions(path) for path in common}
    assert not any(found.values()), {name: new for name, new in found.items() if new}
    # The same eyes see them where they are.
    if arm:
        assert any(newer_instructions(path) for path in objects("neon_bf16"))
        return
    for level in ("avx2", "avx512"):
        assert all(newer_instructions(path) for path in objects(level))


def modules() -> list[str]:
    module = extension.load()
    if module is None:
        pytest.skip("needs the extension")
    loaded = [str(module.__file__)]
    return [*loaded, *(str(path) for path in Path(loaded[0]).parent.glob("_eager*.so") if eager.reason() is None)]


def test_symbols_of_the_system_are_old() -> None:
    for module in modules():
        symbols = re.findall(r"\(GLIBC_(\d+)\.(\d+)[\d.]*\)\s+(\S+)", tool("objdump", "-T", module))
        assert symbols, module
        new = {name for major, minor, name in symbols if (int(major), int(minor)) > OLDEST_GLIBC}
        assert new <= ALWAYS_THERE, (module, new - ALWAYS_THERE)
