"""Mining: the best columns of a corpus that may be larger than memory, as negatives for contrastive losses."""

from ..core.lists import first_of_each
from ._collapse import collapse
from ._margins import csls, ratio_margin
from ._mixtures import mixtures
from ._rules import NegativeRules
from ._sampling import Sampling
from .bank import Entries, MemoryBank
from .hard_negatives import HardNegatives, mine_hard_negatives
from .refresh import RefreshSchedule, still_exact
from .state import TopKState
from .streaming import search

__all__ = [
    "Entries",
    "HardNegatives",
    "MemoryBank",
    "NegativeRules",
    "RefreshSchedule",
    "Sampling",
    "TopKState",
    "collapse",
    "csls",
    "first_of_each",
    "mine_hard_negatives",
    "mixtures",
    "ratio_margin",
    "search",
    "still_exact",
]
