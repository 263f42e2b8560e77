"""Problems of expert_routing, and how the answers of a backend to them are checked; for the tests of GPU kernels.

Decisions must be those of the reference in the same precision, numbers are compared with the reference in float64.
"""

from dataclasses import dataclass

import torch

from contrastive_ops.core.routing import ScoreSpec, SlotSpec
from contrastive_ops.testing import TOLERANCE, relative_error

NAN, INF = torch.nan, torch.inf
NAMES = ("experts", "gates", "priority", "sums", "totals", "choices", "tokens", "margin")
DECISIONS = ("experts", "choices", "tokens")
ops = torch.ops.contrastive_ops

OPTIONS = {
    "softmax": {},
    "sigmoid": {"score": 1},
    "renormalized": {"renormalize": 1},
    "renormalized sigmoid": {"renormalize": 1, "score": 1, "k": 3},
    "noise": {"noise": "noise"},
    "noise on sigmoid": {"noise": "noise", "score": 1, "segments": 3},
    "load": {"noise": "load"},
    "load of segments": {"noise": "load", "segments": 3, "valid": True},
    "load with too few experts": {"noise": "load", "allowed": True, "k": 6},
    "bias": {"bias": True},
    "bias on sigmoid": {"bias": True, "score": 1, "k": 4},
    "best two of groups": {"experts": 12, "groups": (4, 2, 0), "k": 3},
    "best of groups": {"experts": 15, "groups": (5, 2, 1), "k": 3, "bias": True, "score": 1},
    "groups of one": {"groups": (8, 3, 0), "k": 3},
    "groups and a mask": {"experts": 12, "groups": (3, 2, 0), "k": 4, "allowed": True},
    "mask": {"allowed": True, "segments": 2},
    "assignment": {"given": True, "k": 3},
    "assignment with noise": {"given": True, "k": 3, "noise": "noise"},
    "padding": {"valid": True},
    "segments": {"segments": 5},
    "more segments than tokens": {"segments": 60, "tokens": 20},
    "everything": {
        "noise": "load", "valid": True, "segments": 3, "allowed": True, "renormalize": 1, "k": 3, "experts": 11
    },
    "all experts": {"k": 8},
    "one expert": {"experts": 1, "k": 1, "segments": 2},
    "one token": {"tokens": 1},
    "more experts than a tile": {"experts": 300, "tokens": 9, "k": 5},
}  # fmt: skip

EXTREME = {
    "huge": lambda z: z * 1e4,
    "equal": lambda z: z * 0,
    "minus infinity": lambda z: z.masked_fill(torch.rand_like(z) < 0.5, -INF),
    "a row of minus infinity": lambda z: torch.cat([z[:3], torch.full_like(z[:2], -INF), z[5:]]),
    "NaN": lambda z: z.masked_fill(torch.rand_like(z) < 0.2, NAN),
    "a row of NaN": lambda z: torch.cat([z[:3], torch.full_like(z[:2], NAN), z[5:]]),
    "infinity": lambda z: z.masked_fill(torch.rand_like(z) < 0.1, INF),
    "all of them": lambda z: torch.where(
        torch.rand_like(z) < 0.6,
        torch.tensor([NAN, INF, -INF, 3e38, -3e38, 0.0, -0.0], device=z.device)[torch.randint(7, z.shape).to(z.device)],
        z,
    ),
}

# Tokens, k, experts, group size (None for all), capacity, padded, segments.
LAYOUTS = [
    (50, 2, 5, None, -1, 0, 1),
    (50, 2, 5, None, 7, 0, 1),
    (50, 2, 5, None, 7, 1, 3),
    (60, 3, 4, 12, 4, 0, 2),
    (60, 3, 4, 12, 4, 1, 1),
    (60, 1, 40, 1, 1, 1, 1),
    (7, 7, 7, None, 3, 0, 1),
    (130, 2, 3, None, 1000, 0, 40),
    (20, 2, 3, None, 0, 0, 1),
    (20, 2, 3, None, 0, 1, 1),
    (1, 1, 1, None, 1, 0, 1),
    (0, 2, 3, None, 0, 1, 2),
    (0, 2, 3, None, -1, 0, 1),
]


def wide(tensors):
    """The same numbers in float64; what is not floating stays."""
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


@dataclass(frozen=True)
class Subject:
    """A backend on a device."""

    backend: str
    device: str

    # ---- Scores ----

    def problem(
        self, tokens=37, experts=8, k=2, *, dtype=torch.float32, score=0, renormalize=0, noise=None, bias=False,
        groups=(1, 1, 0), allowed=False, given=False, valid=False, segments=1, integers=False
    ):  # fmt: skip
        """The arguments of the operator up to the backend."""
        draw = torch.randint(-2, 3, (tokens, experts)) if integers else 2 * torch.randn(tokens, experts)
        spec = ScoreSpec(k, score, renormalize, *groups, segments, int(noise == "load"))
        tensors = (
            draw.to(dtype),
            torch.randn(tokens, experts) if noise else None,
            torch.randn(experts) / 4 if bias else None,
            torch.rand(tokens, experts) < 0.5 if allowed else None,
            torch.rand(tokens, experts).argsort(1)[:, :k] - 1 if given else None,
            torch.randint(segments, (tokens,)) if segments > 1 else None,
            torch.rand(tokens) < 0.8 if valid else None,
        )
        return *(t if t is None else t.to(self.device) for t in tensors), list(spec), 0.5

    def scores(self, arguments, backend=None):
        results = ops.expert_routing_scores(*arguments, backend or self.backend)
        return dict(zip(NAMES, results, strict=True))

    def check_scores(self, arguments, tolerance=TOLERANCE[torch.float32]):
        """Equal decisions; gates, sums and totals of the reference in float64 for these decisions. Returns them."""
        found, same_precision = self.scores(arguments), self.scores(arguments, "reference")
        for name in DECISIONS:
            assert torch.equal(found[name], same_precision[name]), name
        logits, noise, bias, allowed, _, *others = arguments
        truth = self.scores(wide([logits, noise, None, allowed, found["experts"], *others]), "reference")
        for name in NAMES:
            assert found[name].shape == same_precision[name].shape and found[name].dtype == same_precision[name].dtype
            if name not in DECISIONS:
                assert relative_error(found[name], truth[name]) <= tolerance, name
        return found

    def check_backward(self, arguments, experts, tolerance=2 * TOLERANCE[torch.float32]):
        logits, noise, bias, allowed, _, segment, valid, spec, sigma = arguments
        s = ScoreSpec(*spec)
        shapes = (experts.shape, (3, s.segments, logits.shape[1]), (2, s.segments))
        upstream = [torch.randn(shape, device=self.device) for shape in shapes]
        problem = [logits, noise, bias, allowed, segment, valid, spec, sigma, experts, *upstream]
        found = ops.expert_routing_scores_backward(*problem, self.backend)
        truth = ops.expert_routing_scores_backward(*wide(problem), "reference")
        assert found.dtype == torch.float32
        assert relative_error(found, truth) <= tolerance

    def check_extreme(self, arguments):
        """Decisions are those of the reference and name each expert once; NaN and infinity are where it has them."""
        found, expected = self.scores(arguments), self.scores(arguments, "reference")
        for each in DECISIONS:
            assert torch.equal(found[each], expected[each]), each
        for each in set(NAMES) - set(DECISIONS):
            torch.testing.assert_close(found[each], expected[each], rtol=1e-4, atol=1e-5, equal_nan=True, msg=each)
        for row in found["experts"]:
            chosen = row[row >= 0].tolist()
            assert len(chosen) == len(set(chosen))
        upstream = [torch.randn(found[each].shape, device=self.device) for each in ("gates", "sums", "totals")]
        given = (*arguments[:4], *arguments[5:], found["experts"], *upstream)
        found, expected = (ops.expert_routing_scores_backward(*given, name) for name in (self.backend, "reference"))
        logits = arguments[0].float()
        if self.device == "cpu":
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
        else:  # whether products of infinities and numbers near 1e38 are NaN depends on their order and on fused adds
            clear = (logits.abs() < 1e30).all(1)
            torch.testing.assert_close(found[clear], expected[clear], rtol=1e-3, atol=1e-4)

    # ---- Slots ----

    def check_slots(self, layout, priority):
        """All slots are those of the reference."""
        tokens, k, experts, size, capacity, padded, segments = layout
        spec = SlotSpec(experts, tokens if size is None else size, capacity, padded, segments)
        chosen = torch.rand(tokens, experts).argsort(1)[:, :k].masked_fill(torch.rand(tokens, k) < 0.2, -1)
        first = torch.randint(3, (tokens,)) / 4
        if priority == "NaN":
            first = first.masked_fill(torch.rand(tokens) < 0.3, NAN).masked_fill(torch.rand(tokens) < 0.2, -INF)
        label = torch.randint(segments, (tokens,)).to(self.device) if segments > 1 else None
        first = None if priority is None else first.to(self.device)
        self.check_slots_of(chosen.to(self.device), first, label, list(spec))

    def check_slots_of(self, *given):
        found, expected = (ops.expert_routing_slots(*given, backend) for backend in (self.backend, "reference"))
        for name, value, truth in zip(("slots", "order", "offsets", "kept"), found, expected, strict=True):
            assert value.shape == truth.shape and torch.equal(value, truth), name

    # ---- Moving rows ----

    def moved(self, tokens, k, depth, rows, dtype):
        """Tokens, rows, gates and places in which some choices and some rows are empty; integers."""
        order = torch.full((rows,), -1)
        count = min(rows, tokens * k) * 2 // 3
        order[torch.randperm(rows)[:count]] = torch.randperm(tokens * k)[:count]
        slots = torch.full((tokens * k,), -1)
        slots[order[order >= 0]] = (order >= 0).nonzero()[:, 0]
        numbers = [torch.randint(-3, 4, shape).to(self.device, dtype) for shape in ((tokens, depth), (rows, depth))]
        gates = torch.randint(-2, 3, (tokens, k)).to(self.device).float() / 2
        return *numbers, gates, slots.view(tokens, k).to(self.device), order.to(self.device)

    def moves(self, tokens, rows, gates, places, backend=None):
        """Everything that rows are moved by."""
        backend = backend or self.backend
        return (
            *(ops.expert_routing_dispatch(tokens, g, *places, backend) for g in (None, gates)),
            *(ops.expert_routing_combine(rows, g, *places, backend) for g in (None, gates)),
            ops.expert_routing_dots(tokens, rows, *places, backend),
        )

    def check_moves(self, tokens, rows, gates, places):
        """The same numbers and dtypes as the reference."""
        expected = self.moves(tokens, rows, gates, places, "reference")
        for value, truth in zip(self.moves(tokens, rows, gates, places), expected, strict=True):
            assert value.dtype == truth.dtype and torch.equal(value, truth)
