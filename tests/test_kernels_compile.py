"""Every Triton kernel compiles for every target, in its shared memory and without spilling registers. No GPU needed."""

import importlib

import pytest

from contrastive_ops.core import triton_kernels

if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)
if triton_kernels.interprets():
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

import triton

from contrastive_ops.kernels import _cover, _variants

STEMS = ("similarity_reduce", "similarity_topk", "expert_routing", "grouped_matmul")
# Passes between products of the library, maxsim, persistent sweeps: one combination of options on each target, another
# on the next.
SPREAD = ("similarity_values", "similarity_prefix", "similarity_distill", "maxsim", "similarity_reduce_persistent")


def variants(arch, *combine):
    modules = [importlib.import_module(f"contrastive_ops.kernels.{stem}") for stem in STEMS]
    return [variant for module in modules for variant in module.variants(arch, *combine)]


def spread_variants(arch, number):
    modules = [importlib.import_module(f"contrastive_ops.kernels.{stem}") for stem in SPREAD]
    tiles = "sm_90" if arch in _variants.NEWER else arch
    return [variant for module in modules for variant in module.variants(tiles, _cover.spread(number))]


# Every two options on sm_80, which has the least room; of the two others each has every option, and both together have
# every two. Only combinations of one cover: in others some spill, and are left so.
COVERS = {"sm_80": _cover.pairwise_cover, "sm_90": _cover.half_of_cover(0), "gfx942": _cover.half_of_cover(1)}
CASES = [
    pytest.param(arch, v, id=f"{arch}-{v.name}")
    for arch in _variants.TARGETS
    for v in variants(arch, COVERS[arch])
    # Without matrix products NVIDIA's GPUs get one program.
    if not (arch == "sm_80" and v.name.startswith("expert_routing"))
]
CASES += [
    pytest.param(arch, v, id=f"{arch}-{v.name}")
    for number, arch in enumerate((*_variants.TARGETS, *_variants.NEWER))
    for v in spread_variants(arch, number)
    # The newest, whose compilation takes longest, gets the kernels with the most in registers.
    if arch not in _variants.NEWER
    or v.name.endswith(("weights_kernel", "slopes_kernel", "best_kernel", "persistent_fold_kernel"))
]


@pytest.mark.parametrize("arch, variant", CASES)
def test_compiles_within_the_budget(arch, variant):
    compiled = _variants.compile_for(variant, arch)
    assert compiled.shared <= _variants.SHARED_MEMORY.get(arch, _variants.SHARED_MEMORY["sm_90"])
    assert compiled.spills == 0
    if variant.has_dot and arch == "sm_90":
        assert "wgmma" in compiled.assembly


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", _variants.TARGETS)
def test_every_combination_fits(arch):
    """Not two options at a time but all: in shared memory, and how many of them spill."""
    spilled, total = [], 0
    for variant in variants(arch, _cover.every_combination) + [v for n in range(6) for v in spread_variants(arch, n)]:
        compiled = _variants.compile_for(variant, arch)
        assert compiled.shared <= _variants.SHARED_MEMORY[arch], variant.name
        spilled += [f"{variant.name}: {compiled.spills} bytes"] if compiled.spills else []
        total += 1
    assert len(spilled) <= total // 20, spilled


@pytest.mark.parametrize("arch", _variants.TARGETS)
def test_names_are_unique_and_few(arch):
    names = [variant.name for variant in variants(arch) + spread_variants(arch, 0)]
    assert len(names) == len(set(names)) <= 160


def test_structures_are_passed_whole():
    """Releases of Triton before 3.8 take apart what is not, and its fields lose their names."""
    structures = [
        each
        for variant in variants("sm_80")
        for name in ("sets", "folds", "sums")
        for each in variant.constants.get(name, ())
    ]
    assert structures
    assert all(isinstance(each, triton.language.constexpr) for each in structures)


@pytest.mark.parametrize(
    "version, reason",
    [("3.3.1", "Triton 3.3.1 (supported: 3.4 and newer)"), ("3.4.0", None), ("3.10.0", None), ("4.0.0", None)],
)
def test_older_releases_are_refused(monkeypatch, version, reason):
    monkeypatch.setattr(triton, "__version__", version)
    assert triton_kernels._why_too_old.__wrapped__() == reason


def test_a_cover_has_every_pair():
    choices = {"a": [1, 2, 3], "b": "xyz", "c": [False, True], "d": [False, True], "e": [0, 1]}
    rows = list(_cover.pairwise_cover(choices))
    assert len(rows) < 20
    for first in choices:
        for second in choices:
            if first != second:
                met = {(row[first], row[second]) for row in rows}
                assert met == {(i, j) for i in choices[first] for j in choices[second]}


def test_halves_of_a_cover_have_every_value_and_together_every_pair():
    choices = {"a": [1, 2, 3], "b": "xyz", "c": [False, True], "d": [None, 0], "e": ["left", "right"]}
    whole = list(_cover.pairwise_cover(choices))
    halves = [list(_cover.half_of_cover(number)(choices)) for number in (0, 1)]
    assert all(row in whole for half in halves for row in half) and all(row in sum(halves, []) for row in whole)
    assert all({row[name] for row in half} == set(values) for half in halves for name, values in choices.items())
    assert all(len(half) < 0.7 * len(whole) for half in halves)


def test_every_combination_is_the_product():
    choices = {"a": [1, 2, 3], "b": "xy"}
    rows = [tuple(row.values()) for row in _cover.every_combination(choices)]
    assert rows == [(1, "x"), (1, "y"), (2, "x"), (2, "y"), (3, "x"), (3, "y")]


@pytest.mark.parametrize("arch, size", [("sm_80", 64), ("gfx942", 128)])
def test_spills_are_seen(arch, size):
    """A kernel that holds more numbers than a program has registers for."""
    import triton.language as tl

    @triton.jit
    def too_large(source, out, N: tl.constexpr):
        i = tl.arange(0, N)
        cell = i[:, None] * N + i[None, :]
        a, b = tl.load(source + cell), tl.load(source + N * N + cell)
        ab, ba, aa = tl.dot(a, b), tl.dot(b, a), tl.dot(a, a)
        tl.store(out + cell, ab * ba + aa * ab + ba * aa)

    types = {"source": "*fp16", "out": "*fp16"}
    variant = _variants.Variant("too large", too_large, types, {"N": size}, {"num_warps": 1, "num_stages": 1}, True)
    assert _variants.compile_for(variant, arch).spills > 0
