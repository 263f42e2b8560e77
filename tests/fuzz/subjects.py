"""Everything that the fuzzer calls."""

from __future__ import annotations

from .cases import Subject
from .subjects_losses import Losses
from .subjects_mining import MINING
from .subjects_similarity import Distill, Prefix, Reduce, TopK, Values
from .subjects_tokens import TOKENS

ALL: tuple[Subject, ...] = (Reduce(), TopK(), Prefix(), Distill(), Values(), *TOKENS, *MINING, Losses())
SUBJECTS: dict[str, Subject] = {subject.name: subject for subject in ALL}
