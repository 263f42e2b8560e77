"""The package itself names what most programs need; everything else has a namespace."""

import inspect
import re
import subprocess
import sys
import typing

import pytest

import contrastive_ops

LOSSES = {"clip", "siglip", "info_nce", "nt_xent", "sup_con", "triplet"}
FUNCTIONS = {"similarity_reduce", "similarity_topk", "mine_hard_negatives", "route"}
NAMESPACES = {"losses", "ops", "mining", "moe", "nn", "metrics", "decoding", "testing", "distributed", "recipes"}


def test_top_level():
    assert set(contrastive_ops.__all__) == LOSSES | FUNCTIONS | NAMESPACES | {"Pairs", "Fold", "capture", "__version__"}
    assert all(hasattr(contrastive_ops, name) for name in contrastive_ops.__all__)


def test_what_namespaces_list_is_found_without_their_names():
    for namespace in (contrastive_ops.losses, contrastive_ops.ops, contrastive_ops.mining):
        for name in namespace.__all__:
            assert getattr(contrastive_ops, name) is getattr(namespace, name)
    assert "moco" not in dir(contrastive_ops) and not hasattr(contrastive_ops, "mocco")


def test_functions_are_those_of_their_namespaces():
    homes = dict.fromkeys(LOSSES, contrastive_ops.losses) | dict.fromkeys(FUNCTIONS, contrastive_ops.ops)
    homes["mine_hard_negatives"] = contrastive_ops.mining
    for name, home in homes.items():
        assert getattr(contrastive_ops, name) is getattr(home, name) and name in home.__all__


def test_what_is_for_tests_is_imported_when_it_is_asked_for():
    program = """
import sys, contrastive_ops
for name in ("contrastive_ops.testing", "contrastive_ops.distributed", "contrastive_ops.recipes", "torch._dynamo"):
    assert name not in sys.modules
assert contrastive_ops.testing.LOSSES and contrastive_ops.distributed.clip
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads came with Python 3.11")
def test_what_a_call_returns_is_told_by_types():
    """Where it depends on an argument there is an overload for each value."""
    namespaces = [getattr(contrastive_ops, name) for name in NAMESPACES - {"nn", "moe", "testing"}]
    functions = [getattr(space, name) for space in namespaces for name in space.__all__]
    told = 0
    for function in filter(inspect.isfunction, functions):
        result = str(inspect.signature(function).return_annotation)
        assert result != "Any", function.__name__
        if "|" in re.sub(r"\[.*\]", "", result):
            told += 1
            assert len(typing.get_overloads(function)) > 1, function.__name__
    assert told >= 8


WORDS = {
    "pairs": "Pairs | None",
    "weight": "Tensor | None",
    "col_bias": "Tensor | None",
    "row_negatives": "Tensor | None",
    "in_batch": "bool",
    "diagnostics": "bool",
    "normalize": "bool",
    "reduction": "str",
    "temperature": "float | Tensor | None",
    "scale": "float | Tensor | None",
    "memory_budget": "int | None",
    "backend": "str",
}
OTHER_WORDS = {"ids", "row_ids", "col_ids", "queue_ids", "token_weight", "hard_negatives", "reference_weight"}
OF_LISTS_AND_TOKENS = {
    ("listwise_cross_entropy", "temperature"),
    ("listwise_distillation", "temperature"),
    ("pairwise_rank_distillation", "temperature"),
}
OF_LISTS_AND_TOKENS |= {("late_interaction", "row_negatives")}


def test_one_word_for_one_thing():
    for function in (getattr(contrastive_ops.losses, name) for name in contrastive_ops.losses.__all__):
        if not inspect.isfunction(function):
            continue
        parameters = inspect.signature(function).parameters
        assert not OTHER_WORDS & set(parameters), function.__name__
        for word, kind in WORDS.items():
            if word in parameters and (function.__name__, word) not in OF_LISTS_AND_TOKENS:
                assert parameters[word].annotation == kind, (function.__name__, word)
                assert parameters[word].kind is inspect.Parameter.KEYWORD_ONLY, (function.__name__, word)
