"""The example on several processes has the curve of one."""

import sys
from pathlib import Path

import pytest
from ranks import ranks

EXAMPLES = str(Path(__file__).resolve().parents[1] / "examples")


def run(rank, size, options):
    sys.path.insert(0, EXAMPLES)
    import train_distributed

    words = [f"{verb} the {noun} of a {thing}" for verb in VERBS for noun in NOUNS for thing in THINGS]
    texts = [word.replace(" ", "_") for word in words], words
    bags = tuple(train_distributed.make_bags(side) for side in texts)
    return train_distributed.train(bags, train_distributed.parse_arguments(options))


VERBS, NOUNS, THINGS = ["find", "sort", "count", "draw"], ["row", "edge", "name"], ["graph", "table", "list", "tree"]
COMMON = ["--batch", "15", "--dim", "16", "--steps", "4"]


def test_the_curve_is_that_of_one_process():
    ((truth, mrr),) = ranks(1).run(run, COMMON)
    assert truth[-1] < truth[0] and mrr > 0.3
    for options in ([], ["--schedule", "ring", "--chunk", "4"]):
        for losses, found in ranks(2).run(run, COMMON + options):
            assert losses == pytest.approx(truth, rel=1e-4) and found == pytest.approx(mrr)
