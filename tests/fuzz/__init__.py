"""Random calls of everything public against dense formulas in float64: `make fuzz CASES=10000 SEED=1`.

A subject (of `SUBJECTS`) has named parameters, each with its choices in order, the simplest first. A case is a choice
of each; one that fails is made simpler as long as it fails, and printed as a call of `check` that repeats it.
"""

from .cases import Case, Difference, check, draw_case, run, shrunk
from .subjects import SUBJECTS

__all__ = ["SUBJECTS", "Case", "Difference", "check", "draw_case", "run", "shrunk"]
