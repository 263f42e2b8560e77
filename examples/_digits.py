"""scikit-learn's handwritten digits for the examples: images, shifted copies, and captions that say what they show.

Nothing is downloaded. A caption names the digit, and may name what is measured from the image: how much ink the stroke
has, which way it leans, and how wide it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = (("thin", "light", "faint"), ("regular", "medium", "plain"), ("bold", "heavy", "thick"))
SLANTS = (("left", "backward"), ("straight", "upright"), ("right", "forward"))
WIDTHS = (("narrow", "slim"), ("normal", "average"), ("wide", "broad"))
# What an image can be asked for: `PROMPTS` name the class alone, `FULL` all that is known of it.
PROMPTS = ("a {name}", "the digit {name}", "a handwritten {name}", "an image of the number {name}")
FULL = "{weight} {width} {name} leaning {slant}"
TEMPLATES = (
    *PROMPTS,
    FULL,
    "a {weight} {name}",
    "{name} in {weight} ink",
    "a {width} and {weight} {name}",
    "the number {name} leaning {slant}",
    "a {slant} {name} with {weight} strokes",
)


class Digits(NamedTuple):
    """Images (N, 8, 8) in [0, 1], their classes (N,), and their attributes (N, 3): weight, slant and width, 0 to 2."""

    images: Tensor
    labels: Tensor
    attributes: Tensor

    def __getitem__(self, rows: Tensor) -> Digits:
        return Digits(*(each[rows] for each in (self.images, self.labels, self.attributes)))

    def __len__(self) -> int:
        return len(self.labels)


def progress(items: Iterable[int], label: str) -> Iterable[int]:
    """A progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label, mininterval=0.5, dynamic_ncols=True)


def load(held_out: int, seed: int) -> tuple[Digits, Digits]:
    """Digits to train on, and held-out ones."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    digits = Digits(images, torch.tensor(found.target, dtype=torch.int64), attributes(images))
    test, train = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tensor_split([held_out])
    return digits[train], digits[test]


def attributes(images: Tensor) -> Tensor:
    """Ink, slant and width of each image, as the third of all images that it is in."""
    ink = images.sum((1, 2))
    p = images / ink[:, None, None]
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    dx, dy = x - (p * x).sum((1, 2), keepdim=True), y - (p * y).sum((1, 2), keepdim=True)
    lean = -(p * dx * dy).sum((1, 2)) / (p * dy.square()).sum((1, 2))  # of the stroke: columns to the right a row up
    spread = (p * dx.square()).sum((1, 2))
    measured = torch.stack([ink, lean, spread], 1)
    thirds = measured.quantile(torch.tensor([1 / 3, 2 / 3]), 0)
    return (measured[None] > thirds[:, None]).sum(0)


def shifted(images: Tensor, generator: torch.Generator, most: int = 1) -> Tensor:
    """Each image moved by up to `most` pixels in both directions, filled with background."""
    rows = torch.arange(len(images))[:, None, None]
    moves = torch.randint(2 * most + 1, (2, len(images), 1), generator=generator) + torch.arange(8)
    return F.pad(images, (most,) * 4)[rows, moves[0][:, :, None], moves[1][:, None, :]]


def patches(images: Tensor) -> Tensor:
    """(N, 8, 8) as 36 overlapping patches of 3 x 3 pixels, (N, 36, 9), with mean 0 and unit variance or so."""
    return (images.unfold(1, 3, 1).unfold(2, 3, 1).flatten(3).flatten(1, 2) - 0.3) / 0.37


def caption(template: str, label: int, look: tuple[int, int, int], choose: random.Random) -> str:
    """One caption; which of several words says the same thing is left to chance."""
    weight, slant, width = (choose.choice(words[i]) for words, i in zip((WEIGHTS, SLANTS, WIDTHS), look, strict=True))
    return template.format(name=NAMES[label], weight=weight, slant=slant, width=width)


class Words:
    """The vocabulary of all captions; 0 is padding."""

    def __init__(self) -> None:
        every = " ".join(
            [*TEMPLATES, *NAMES, *(word for group in (WEIGHTS, SLANTS, WIDTHS) for words in group for word in words)]
        )
        known = sorted({word for word in every.split() if "{" not in word})
        self.ids = {word: number for number, word in enumerate(known, start=1)}
        self.length = max(len(template.split()) for template in TEMPLATES)

    def __len__(self) -> int:
        return len(self.ids) + 1

    def encode(self, texts: list[str]) -> Tensor:
        """(N, L) ids."""
        ids = [[self.ids[word] for word in text.split()] for text in texts]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in ids])

    def captions(self, digits: Digits, count: int, seed: int) -> Tensor:
        """(N, count, L): several captions of each image, of random templates and words."""
        choose = random.Random(seed)
        looks = list(zip(digits.labels.tolist(), map(tuple, digits.attributes.tolist()), strict=True))
        texts = [caption(choose.choice(TEMPLATES), label, look, choose) for label, look in looks for _ in range(count)]
        return self.encode(texts).view(len(digits), count, -1)

    def full(self, digits: Digits) -> Tensor:
        """(N, L): the caption that says all, in the first of the words for it."""
        return self.encode(
            [
                FULL.format(name=NAMES[label], weight=WEIGHTS[w][0], slant=SLANTS[s][0], width=WIDTHS[b][0])
                for label, (w, s, b) in zip(digits.labels.tolist(), digits.attributes.tolist(), strict=True)
            ]
        )

    def prompts(self) -> Tensor:
        """(10, prompts, L): each class in several sentences, which know nothing of an image."""
        return torch.stack([self.encode([prompt.format(name=name) for prompt in PROMPTS]) for name in NAMES])
