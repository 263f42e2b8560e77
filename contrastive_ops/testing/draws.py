"""Random inputs of losses, for a batch of any size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

# How many more columns than rows there are where columns are not partners: a size of their own tells them apart.
MORE_COLUMNS = 5
# Samples of the data set that batches are taken from.
DATA_SET = 4096


class Draw:
    """Random inputs for one batch size: the same numbers whatever the dtype.

    What has as many rows as the batch belongs to its rows; everything else is columns, or shared.
    """

    def __init__(self, rows: int, depth: int, dtype: torch.dtype, seed: int) -> None:
        self.rows, self.depth, self.dtype = rows, depth, dtype
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self) -> Tensor:
        """(N, D) unit rows."""
        return self._unit(self.rows).requires_grad_()

    def columns(self) -> Tensor:
        """(M, D) unit rows that are nobody's partners."""
        return self.queue().requires_grad_()

    def queue(self) -> Tensor:
        """(M, D) unit rows without a gradient."""
        return self._unit(self.rows + MORE_COLUMNS)

    def of_each_row(self) -> Tensor:
        """(N, 2, D): two unit rows for each row."""
        return self._unit(self.rows, 2).requires_grad_()

    def tokens(self) -> Tensor:
        """(N, 2, D): two unit rows for each row, with a gradient."""
        return self.of_each_row().requires_grad_()

    def more_tokens(self) -> Tensor:
        """(M, 3, D): sets of three unit rows that are nobody's partners."""
        return self._unit(self.rows + MORE_COLUMNS, 3).requires_grad_()

    def lists_of_tokens(self) -> Tensor:
        """(N, 2, 3, D): two sets of three unit rows for each row."""
        return self._unit(self.rows, 2, 3)

    def token_mask(self) -> Tensor:
        """(M, 3) which of `more_tokens` take part: one at least."""
        mask = self._uniform(self.rows + MORE_COLUMNS, 3) < 0.7
        mask[:, 1] = True
        return mask

    def guide(self) -> Tensor:
        """(N, D) unit rows of another model, in a dtype of its own."""
        return self._unit(self.rows, dtype=self._wide)

    def guide_columns(self) -> Tensor:
        """(M, D) unit rows of another model."""
        return self._unit(self.rows + MORE_COLUMNS, dtype=self._wide)

    def teacher(self) -> Tensor:
        """(N, D) unit rows of a teacher, without a gradient."""
        return self._unit(self.rows)

    def scale(self) -> Tensor:
        """0-d: what the inner products are multiplied with."""
        return torch.tensor(6.0, dtype=self._wide, requires_grad=True)

    def bias(self) -> Tensor:
        """0-d: what is added to every logit."""
        return torch.tensor(-1.0, dtype=self._wide, requires_grad=True)

    def scale_of_rows(self) -> Tensor:
        """(N,) between 3 and 8."""
        return (3 + 5 * self._uniform(self.rows)).requires_grad_()

    def weight(self) -> Tensor:
        """(N,) between 0.5 and 1.5."""
        return (0.5 + self._uniform(self.rows)).requires_grad_()

    def share(self) -> Tensor:
        """(N,) between 0 and 0.5."""
        return (self._uniform(self.rows) / 2).requires_grad_()

    def grades(self) -> Tensor:
        """(N,) between 0 and 1."""
        return self._uniform(self.rows).requires_grad_()

    def list_grades(self) -> Tensor:
        """(N, 2) between 0 and 1."""
        return self._uniform(self.rows, 2).requires_grad_()

    def shares_of_two(self) -> Tensor:
        """(N, 2) with rows that sum to 1."""
        first = self._uniform(self.rows, 1)
        return torch.cat([first, 1 - first], 1)

    def sample(self) -> Tensor:
        """(N,) a sample of the data set."""
        return torch.randint(DATA_SET, (self.rows,), generator=self._generator)

    def log_u(self) -> Tensor:
        """(2, samples) logarithms of running denominators."""
        return self._uniform(2, DATA_SET).float()

    def labels(self) -> Tensor:
        """(N,) classes of two and more rows: two where there are two rows, then more than one class."""
        return torch.arange(self.rows) % max(self.rows // 3, 1)

    def col_labels(self) -> Tensor:
        """(M,) the same classes."""
        return torch.arange(self.rows + MORE_COLUMNS) % max(self.rows // 3, 1)

    def own(self) -> Tensor:
        """(N,) the number of each row."""
        return torch.arange(self.rows)

    def successor(self) -> Tensor:
        """(N,) the number of another row."""
        return (torch.arange(self.rows) + 1) % max(self.rows, 1)

    def column(self) -> Tensor:
        """(N,) one of the M columns."""
        return torch.randint(max(self.rows + MORE_COLUMNS, 1), (self.rows,), generator=self._generator)

    def two_columns(self) -> Tensor:
        """(N, 2) two different columns out of M."""
        first = self.column()
        return torch.stack([first, (first + 2) % max(self.rows + MORE_COLUMNS, 1)], 1)

    def log_prob(self) -> Tensor:
        """(N,) logarithms of probabilities."""
        return self._uniform(self.rows).log().requires_grad_()

    def list_scores(self) -> Tensor:
        """(N, 5) scores of candidates."""
        return (4 * self._uniform(self.rows, 5)).requires_grad_()

    def teacher_scores(self) -> Tensor:
        """(N, 5) scores of candidates by a teacher; the lists of odd rows have three."""
        scores = 3 * self._uniform(self.rows, 5)
        scores[1::2, 1] = -torch.inf
        scores[1::2, 4] = -torch.inf
        return scores

    def relevance(self) -> Tensor:
        """(N, 5) weights of candidates; no list is without one that is relevant."""
        weights = self._uniform(self.rows, 5).detach() * 2 - 0.8
        weights[:, 2] = 0.5
        return weights.clamp_min(0.0)

    def list_mask(self) -> Tensor:
        """(N, 5) which of them are there, another choice."""
        mask = torch.ones(self.rows, 5, dtype=torch.bool)
        mask[::3, 3] = False
        return mask

    def temperature(self) -> Tensor:
        """0-d: what scores are divided by."""
        return torch.tensor(0.8, dtype=self._wide, requires_grad=True)

    def zero_or_one(self) -> Tensor:
        """(N,) whether a pair belongs together."""
        return torch.arange(self.rows) % 2

    @property
    def _wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _unit(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, self.depth, generator=self._generator, dtype=torch.float64)
        return normalize(values, dim=-1).to(self._wide).to(dtype or self.dtype)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, dtype=torch.float64).to(self._wide)
