"""The CUDA kernels of expert_routing against the reference. Without a GPU they run on the host, under sanitizers."""

import contextlib

import cuda_host
import pytest
import torch
from expert_routing_cases import EXTREME, INF, LAYOUTS, NAMES, NAN, OPTIONS, Subject, ops

from contrastive_ops import route
from contrastive_ops.core import cuda_kernels
from contrastive_ops.core.routing import ScoreSpec
from contrastive_ops.cuda import expert_routing as launchers
from contrastive_ops.ops import Capacity, Gating, RouterLoss, Routing, combine, dispatch, expert_choice
from contrastive_ops.testing import TOLERANCE, relative_error

HAS_GPU = torch.cuda.is_available() and cuda_kernels.why_missing() is None
if not HAS_GPU and cuda_host.why_missing() is not None:
    pytest.skip(f"CUDA kernels need a GPU, or: {cuda_host.why_missing()}", allow_module_level=True)

SCHEDULES = ("ascending", "descending", "shuffled")
DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="module")
def hosts():
    """The kernels in each order of threads; none where there is a GPU."""
    with contextlib.ExitStack() as stack:
        yield (
            {}
            if HAS_GPU
            else {name: stack.enter_context(contextlib.closing(cuda_host.HostKernels(name))) for name in SCHEDULES}
        )


@pytest.fixture
def cuda(hosts):
    """The backend, with threads in the least regular order."""
    with cuda_kernels.on_host(hosts["shuffled"]) if hosts else contextlib.nullcontext():
        yield Subject("cuda", DEVICE)


@pytest.fixture
def check_bits(hosts):
    """Checks that a function returns tensors of the same bits in every order of threads; on a GPU, in two runs."""

    def check(function):
        results = [function(), function()] if HAS_GPU else []
        for host in hosts.values():
            with cuda_kernels.on_host(host):
                results.append(function())
        first, *others = results
        for found in others:
            for value, expected in zip(found, first, strict=True):
                assert torch.equal(value, expected)

    return check


# ---- Scores ----------------------------------------------------------------------------------------------------------

# Teams of every kind: a part of a warp, a warp, a block; rows that begin at multiples of 16 bytes, and others.
TEAMS = {
    "2 threads": {"experts": 16, "tokens": 70, "segments": 3},
    "4 threads": {"experts": 32, "tokens": 40, "noise": "load", "segments": 2},
    "8 threads": {"experts": 60, "tokens": 20, "k": 8},
    "16 threads": {"experts": 128, "tokens": 18, "segments": 4, "noise": "noise"},
    "32 threads": {"experts": 256, "tokens": 9, "segments": 2},
    "2 runs of each thread": {"experts": 500, "tokens": 7, "segments": 2, "noise": "load"},
    "4 runs of each thread": {"experts": 1000, "tokens": 6, "segments": 2, "bias": True},
    "a block": {"experts": 1100, "tokens": 3, "segments": 2, "noise": "load", "k": 3},
    "a block and groups": {"experts": 1056, "tokens": 2, "groups": (32, 3, 0), "allowed": True, "score": 1},
    "a block and an assignment": {"experts": 1030, "tokens": 2, "given": True, "renormalize": 1},
    "groups in a warp": {"experts": 96, "tokens": 9, "groups": (8, 3, 0), "k": 4, "segments": 2},
}  # fmt: skip


@pytest.mark.parametrize("integers", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("name", OPTIONS)
def test_scores_and_their_derivative(name, integers, cuda):
    arguments = cuda.problem(**OPTIONS[name], integers=integers)
    found = cuda.check_scores(arguments)
    cuda.check_backward(arguments, found["experts"])


@pytest.mark.parametrize("name", TEAMS)
def test_teams_of_threads(name, cuda):
    """With ties, which must be broken by experts that different threads have."""
    arguments = cuda.problem(**TEAMS[name], integers=True)
    found = cuda.check_scores(arguments)
    cuda.check_backward(arguments, found["experts"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["softmax", "load of segments", "best two of groups", "4 threads"])
def test_scores_of_16_bits(name, dtype, cuda):
    arguments = cuda.problem(**{**OPTIONS, **TEAMS}[name], dtype=dtype)
    found = cuda.check_scores(arguments)
    cuda.check_backward(arguments, found["experts"])


@pytest.mark.parametrize("options", ["softmax", "sigmoid", "load of segments", "best two of groups", "bias"])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits(name, options, cuda):
    logits, *others = cuda.problem(**{**OPTIONS[options], "k": 3})
    cuda.check_extreme((EXTREME[name](logits), *others))


@pytest.mark.parametrize("experts", [40, 1050])
def test_extreme_logits_of_larger_teams(experts, cuda):
    logits, *others = cuda.problem(tokens=6, experts=experts, k=3)
    cuda.check_extreme((EXTREME["all of them"](logits), *others))


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("segments", [1, 3])
def test_parts_have_several_tokens(segments, parts, cuda, monkeypatch):
    """Labels come in runs, which are added up in registers, and one by one; parts are of unequal length."""
    monkeypatch.setattr(launchers, "PARTS", parts)
    arguments = list(cuda.problem(tokens=140, experts=20, noise="load", segments=segments))
    found = cuda.check_scores(arguments)
    if segments > 1:
        arguments[5] = arguments[5].sort().values
        found = cuda.check_scores(arguments)
    cuda.check_backward(arguments, found["experts"])


@pytest.mark.parametrize("experts", [8, 260, 1100])
def test_tables_in_global_memory_hold_what_shared_memory_would(experts, check_bits, monkeypatch):
    subject = Subject("cuda", DEVICE)
    arguments = subject.problem(tokens=max(4, 400 // experts), experts=experts, segments=3, noise="load")
    found = []
    for room in (launchers.SHARED, 0):
        monkeypatch.setattr(launchers, "SHARED", room)
        check_bits(lambda: found.append(ops.expert_routing_scores(*arguments, "cuda")) or found[-1])
    for results in found:
        for name, value, expected in zip(NAMES, results, found[0], strict=True):
            assert torch.equal(value, expected), name


def test_labels_out_of_range_count_nowhere(cuda):
    """The public function refuses them; here they must only do no harm."""
    arguments = list(cuda.problem(tokens=40, segments=3))
    clean = arguments[5].clone()
    arguments[5][::4], arguments[5][1::4] = 3, -7
    found = cuda.scores(arguments)
    arguments[6] = (arguments[5] >= 0) & (arguments[5] < 3)
    arguments[5] = clean
    expected = cuda.scores(arguments)
    for name in ("sums", "totals", "choices", "tokens", "margin"):
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_logits_of_padding_are_not_read(cuda):
    arguments = cuda.problem(valid=True, noise="load", segments=2)
    clean = cuda.scores(arguments)
    logits, valid = arguments[0].clone(), arguments[6]
    logits[~valid] = NAN
    found = cuda.scores((logits, *arguments[1:]))
    for name in NAMES:
        assert torch.equal(found[name], clean[name]), name


def test_strided_and_expanded_scores(cuda):
    arguments = cuda.problem(allowed=True, segments=2, integers=True)
    expected = cuda.scores(arguments, "reference")
    logits, noise, bias, allowed, given, segment, valid, *rest = arguments
    variants = {
        "columns": (logits.T.contiguous().T, allowed.T.contiguous().T),
        "part of rows": (torch.cat([logits, logits], 1)[:, : logits.shape[1]], allowed),
        "every other": (logits.repeat_interleave(2, 1)[:, ::2], allowed.repeat_interleave(2, 0)[::2]),
    }
    for name, (z, mask) in variants.items():
        found = cuda.scores((z, noise, bias, mask, given, segment, valid, *rest))
        assert torch.equal(found["experts"], expected["experts"]), name
        torch.testing.assert_close(found["sums"], expected["sums"])
    mask = allowed[:1].expand_as(allowed)
    arguments = (logits, noise, bias, mask, given, segment, valid, *rest)
    assert torch.equal(cuda.scores(arguments)["experts"], cuda.scores(arguments, "reference")["experts"])


@pytest.mark.parametrize("name", ["load of segments", "best two of groups", "everything", *TEAMS])
def test_scores_have_the_same_bits_in_every_order_of_threads(name, check_bits):
    subject = Subject("cuda", DEVICE)
    logits, noise, bias, allowed, given, *rest = subject.problem(**{**OPTIONS, **TEAMS}[name])
    outputs = ops.expert_routing_scores(logits, noise, bias, allowed, given, *rest, "reference")
    upstream = [torch.randn(each.shape, device=DEVICE) for each in (outputs[1], outputs[3], outputs[4])]
    backward = (logits, noise, bias, allowed, *rest, outputs[0], *upstream)
    check_bits(lambda: ops.expert_routing_scores(logits, noise, bias, allowed, given, *rest, "cuda"))
    check_bits(lambda: [ops.expert_routing_scores_backward(*backward, "cuda")])


def test_no_tokens(cuda):
    arguments = cuda.problem(tokens=0, segments=3, noise="load", valid=True)
    found, expected = cuda.scores(arguments), cuda.scores(arguments, "reference")
    for name in NAMES:
        assert torch.equal(found[name], expected[name]), name
    cuda.check_backward(arguments, found["experts"])


def test_what_has_no_kernel_is_refused_with_a_reason(cuda):
    spec = ScoreSpec(1, 0, 0, 1, 1, 0, 1, 0)
    with pytest.raises(NotImplementedError, match="no kernel for more than 4096 experts, got 4097"):
        cuda.scores((torch.zeros(1, 4097, device=DEVICE), *[None] * 6, spec, 1.0))
    with pytest.raises(NotImplementedError, match="load loss only with noise"):
        cuda.scores((torch.zeros(1, 3, device=DEVICE), *[None] * 6, spec._replace(load=1), 1.0))
    for experts in (4097, 131_072):
        with pytest.raises(NotImplementedError, match=f"no kernel for more than 4096 experts, got {experts}"):
            route(torch.zeros(1, experts, device=DEVICE), losses=["importance"], capacity=1.0, backend="cuda")
    chosen, gates = torch.tensor([[8191], [0], [8191]], device=DEVICE), torch.ones(3, 1, device=DEVICE)
    assert Routing.from_choices(chosen, gates, 8192, backend="cuda").slots.tolist() == [[1], [0], [2]]
    with pytest.raises(NotImplementedError, match="no room for more than 8192 experts, got 131072"):
        Routing.from_choices(chosen, gates, 131_072, backend="cuda")
    with pytest.raises(NotImplementedError, match=r"supported: float32, bfloat16, float16"):
        route(torch.zeros(3, 2, dtype=torch.float64, device=DEVICE), backend="cuda")


def test_more_experts_than_a_warp_has_room_for():
    """Every number of experts has a team that just holds it."""
    for experts in (*range(1, 300), 500, 512, 513, 1000, 1024, 1025, 2047, 4096):
        team = launchers._Team.of("scores", experts)
        room = team.lanes * team.items
        assert experts <= room and (room == 8 or room < 2 * experts), experts


# ---- Slots -----------------------------------------------------------------------------------------------------------

# Several blocks of items, several warps, more experts than one warp has lanes; blocks with fewer warps.
LARGER = [
    (700, 3, 40, None, 60, 0, 3),
    (1100, 2, 70, None, 25, 1, 2),
    (1300, 4, 5, 650, 300, 0, 1),
    (1200, 2, 6, None, -1, 0, 1),
    (40, 2, 1030, None, 1, 0, 5),
    (300, 1, 4100, None, 2, 0, 2),
    # More choices of an expert than a warp orders.
    (1500, 2, 3, None, 400, 0, 2),
    (1500, 2, 3, None, 400, 1, 2),
    (1500, 1, 2, 750, 300, 1, 1),
    (1500, 1, 2, 750, 0, 0, 1),
]


@pytest.mark.parametrize("priority", [None, "ties", "NaN"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_slots_are_those_of_the_reference(layout, priority, cuda):
    cuda.check_slots(layout, priority)


@pytest.mark.parametrize("layout", LARGER, ids=str)
def test_slots_of_several_blocks(layout, cuda):
    cuda.check_slots(layout, "ties")


@pytest.mark.parametrize("capacity", [299, 300, 301])
def test_a_capacity_at_the_edge_of_a_bin(capacity, cuda):
    """The higher 300 of the priorities share their upper bits, and so do the lower ones."""
    high, low = 0.5 + 0.12 * torch.rand(300), 0.0625 + 0.0155 * torch.rand(300)
    priority = torch.cat([high, low])[torch.randperm(600)].to(DEVICE)
    chosen = torch.zeros(600, 1, dtype=torch.int64, device=DEVICE)
    cuda.check_slots_of(chosen, priority, None, [1, 600, capacity, 0, 1])


def test_slots_of_experts_that_are_not_contiguous(cuda):
    cuda.check_slots_of(torch.randint(5, (3, 40), device=DEVICE).T, None, None, [5, 40, 9, 0, 1])


@pytest.mark.parametrize("layout", [*LAYOUTS[:5], *LARGER], ids=str)
def test_slots_have_the_same_bits_in_every_order_of_threads(layout, check_bits):
    tokens, k, experts, size, *rest = layout
    chosen = torch.randint(-1, experts, (tokens, k), device=DEVICE)
    segment = torch.randint(rest[-1], (tokens,), device=DEVICE)
    priority = torch.rand(tokens, device=DEVICE)
    check_bits(lambda: launchers.slots(chosen, priority, segment, [experts, size or tokens, *rest]))


# ---- Moving rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(9, 2, 16, 15), (20, 3, 70, 70), (1, 1, 1, 1), (5, 1, 33, 40), (3, 2, 0, 4), (7, 6, 320, 30), (4, 9, 264, 9)],
    ids=str,
)
def test_moved_integers_are_exact(shape, dtype, cuda):
    tokens, rows, gates, *places = cuda.moved(*shape, dtype)
    cuda.check_moves(tokens, rows, gates, places)


def test_moved_rows_have_the_same_bits_in_every_order_of_threads(check_bits):
    subject = Subject("cuda", DEVICE)
    tokens, rows, gates, *places = subject.moved(20, 5, 72, 70, torch.float32)
    tokens, rows, gates = (torch.randn_like(each) for each in (tokens, rows, gates))
    check_bits(lambda: subject.moves(tokens, rows, gates, places))


def test_moved_rows_may_be_strided(cuda):
    tokens, rows, gates, *places = cuda.moved(20, 3, 70, 70, torch.float32)
    expected = cuda.moves(tokens, rows, gates, places, "reference")
    variants = {
        "columns": (tokens.T.contiguous().T, rows.T.contiguous().T, gates.T.contiguous().T),
        "parts": (torch.cat([tokens, tokens], 1)[:, :70], torch.cat([rows, rows], 1)[:, :70], gates),
        "every other": (tokens.repeat_interleave(2, 1)[:, ::2], rows.repeat_interleave(2, 0)[::2], gates),
    }
    for name, given in variants.items():
        for value, truth in zip(cuda.moves(*given, places), expected, strict=True):
            assert torch.equal(value, truth), name


def test_what_has_no_place_is_not_read(cuda):
    tokens, rows, gates, slots, order = cuda.moved(20, 3, 70, 90, torch.float32)
    clean = cuda.moves(tokens, rows, gates, (slots, order))
    rows[order < 0] = NAN
    gates[slots < 0] = NAN
    tokens[(slots < 0).all(1)] = NAN
    for value, truth in zip(cuda.moves(tokens, rows, gates, (slots, order)), clean, strict=True):
        assert torch.equal(value, truth)


def test_nan_does_not_come_back_where_a_choice_was_dropped(cuda):
    """Not through its gate, and not through a token that has another row."""
    tokens, rows, gates, slots, order = cuda.moved(20, 3, 70, 40, torch.float32)
    slots[0] = torch.tensor([-1, 5, -1])
    gates[slots < 0], tokens[:] = INF, NAN
    assert ops.expert_routing_combine(rows, gates, slots, order, "cuda").isfinite().all()
    products = ops.expert_routing_dots(tokens, rows, slots, order, "cuda")
    assert torch.equal(products == 0, slots < 0) and torch.equal(products.isnan(), slots >= 0)


# ---- The whole -------------------------------------------------------------------------------------------------------

LOSSES = ["importance", "switch", "z", RouterLoss("local_entropy", weight=[0.1, 0.5]),
          RouterLoss("global_entropy", threshold=1.5)]  # fmt: skip
ROUTERS = {
    "dropless": lambda z, **options: route(z, 2, **options),
    "capacity": lambda z, **options: route(z, 2, capacity=0.8, **options),
    "padded groups": lambda z, **options: route(
        z, 3, capacity=Capacity(factor=0.7, group_size=20, padded=True), gating=Gating(renormalize=True), **options
    ),
    "sigmoid": lambda z, **options: route(
        z, 2, capacity=1.0, gating=Gating("sigmoid", expert_groups=3, kept_groups=2), priority="position", **options
    ),
    "experts choose": lambda z, **options: expert_choice(z, 1.0, **options),
    "experts choose, padded": lambda z, **options: expert_choice(
        z, Capacity(limit=5, group_size=20, padded=True), **options
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_without_experts(name, cuda):
    """Rows are scaled where experts would be; all gradients are those of the reference in float64."""
    tokens, experts, depth = 40, 6, 24
    segment = torch.randint(2, (tokens,), device=DEVICE)
    inputs = [torch.randn(tokens, experts, device=DEVICE), torch.randn(tokens, depth, device=DEVICE)]
    results, routings = [], []
    for backend in ("cuda", "reference"):
        leaves = [(t if backend == "cuda" else t.double()).detach().requires_grad_() for t in inputs]
        routed = ROUTERS[name](leaves[0], segments=segment, num_segments=2, losses=LOSSES, backend=backend)
        rows = dispatch(leaves[1], routed, backend=backend)
        out = combine(rows * torch.arange(1, depth + 1, device=DEVICE), routed, backend=backend)
        upstream = torch.arange(out.numel(), device=DEVICE).view_as(out) % 7 - 3
        gradients = torch.autograd.grad(
            [out, routed.loss], leaves, [upstream.to(out.dtype), torch.ones_like(routed.loss)]
        )
        results.append((out, routed.loss, *gradients, *routed.losses.values(), *routed.metrics.values()))
        routings.append(routed)
    for field in ("experts", "slots", "order", "offsets"):
        assert torch.equal(getattr(routings[0], field), getattr(routings[1], field)), field
    for value, truth in zip(*results, strict=True):
        assert relative_error(value, truth) <= 4 * TOLERANCE[torch.float32]


ALL_LOSSES = {
    "plain": (1, ["importance", "switch", "z", "local_entropy", "global_entropy"], {}),
    "noise": (1, ["importance", "load", "switch", RouterLoss("z", 0)], {"noise_std": 1.5}),
    "segments": (3, ["importance", "switch", RouterLoss("z", [0.5, 0, 2]), RouterLoss("local_entropy", [0, 0.1, 1]),
                     RouterLoss("global_entropy", [1, 2, 3], [0.1, 1.2, 9])], {}),
    "pooled": (3, [RouterLoss("importance", 0.5, pooled=True), "importance", RouterLoss("z", pooled=True),
                   RouterLoss("load", pooled=True), RouterLoss("switch", 2, pooled=True),
                   RouterLoss("global_entropy", 0.2, 1.7, pooled=True)], {"noise_std": 1.0}),
    "sigmoid": (2, ["importance", "switch", "z", RouterLoss("local_entropy", [1, 0]), "global_entropy"],
                {"score": "sigmoid", "renormalize": True}),
    "none": (1, [], {}),
}  # fmt: skip


def routed_with_gradients(logits, backend, losses, segments, gating, noise, *, upstream=True, **options):
    """A routing with its losses, and gradients of gates, of each loss, and of the total, apart and together."""
    leaf = logits.clone().requires_grad_()
    labels = None if segments == 1 else torch.arange(len(logits), device=DEVICE) % (segments + 1) % segments
    noise = None if noise is None else noise.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    routed = route(leaf, min(2, logits.shape[1]), gating=Gating(**gating), segments=labels, num_segments=segments,
                   losses=losses, noise=noise, backend=backend, **options)  # fmt: skip
    generator = torch.Generator(DEVICE).manual_seed(5)
    weights = torch.randn(routed.gates.shape, generator=generator, device=DEVICE)
    totals = [(routed.gates * weights).sum()]
    if losses:
        each = sum((place + 2) * loss.sum() for place, loss in enumerate(routed.losses.values()))
        totals += [routed.loss, each, routed.loss - 3 * each + totals[0]]
    gradients = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in totals] if upstream else []
    return routed, gradients


def check_whole(logits, losses, segments, gating, tolerance=TOLERANCE[torch.float32], **options):
    """Losses, sums and gradients are those of the reference in float64."""
    noise = torch.randn(logits.shape, device=DEVICE) if "noise_std" in gating else None
    asked = (losses, segments, gating, noise)
    found, gradients = routed_with_gradients(logits, "cuda", *asked, **options)
    truth, expected = routed_with_gradients(logits.double(), "reference", *asked, **options)
    for name in ("experts", "slots", "order", "offsets", "counts"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    assert relative_error(found.sums, truth.sums) <= tolerance
    for name, loss in truth.losses.items():
        assert relative_error(found.losses[name], loss) <= 4 * tolerance, name
    torch.testing.assert_close(found.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    room = {torch.float32: 4 * TOLERANCE[torch.float32], torch.bfloat16: 4e-3, torch.float16: 1e-3}[logits.dtype]
    for gradient, each in zip(gradients, expected, strict=True):
        assert gradient.dtype == logits.dtype
        assert relative_error(gradient, each) <= room


@pytest.mark.parametrize("shape", [(50, 6), (9, 40)], ids=str)
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_losses_and_gradients_of_whole_routers(name, shape, cuda):
    segments, losses, gating = ALL_LOSSES[name]
    check_whole(2 * torch.randn(shape, device=DEVICE), losses, segments, gating)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("experts", [5, 8, 12, 40])
def test_logits_of_16_bits_are_read_and_written_as_such(experts, dtype, cuda):
    segments, losses, gating = ALL_LOSSES["segments"]
    check_whole(2 * torch.randn(30, experts, device=DEVICE).to(dtype), losses, segments, gating)


@pytest.mark.parametrize("shape", [(0, 4), (7, 1), (1, 3), (3, 1100)], ids=str)
def test_losses_of_few_tokens_and_experts(shape, cuda):
    segments, losses, gating = ALL_LOSSES["segments"]
    check_whole(torch.randn(shape, device=DEVICE), losses, segments, gating)


def test_losses_of_several_parts(cuda, monkeypatch):
    """Columns of sums have several blocks, and blocks several rows."""
    monkeypatch.setattr(launchers, "PARTS", 3)
    segments, losses, gating = ALL_LOSSES["pooled"]
    check_whole(2 * torch.randn(70, 24, device=DEVICE), losses, segments, gating)


def test_nan_reaches_losses_and_gradients(cuda):
    logits = torch.randn(20, 4, device=DEVICE)
    logits[3, 1] = NAN
    losses = ALL_LOSSES["plain"][1]
    routed, (gates, loss, *_) = routed_with_gradients(logits, "cuda", losses, 1, {}, None)
    assert all(value.isnan().all() for value in (*routed.losses.values(), routed.loss))
    assert gates.isnan().any(1).nonzero().tolist() == [[3]]  # losses that nobody differentiates reach nothing
    assert loss.isnan().any(1).all()


def test_what_kernels_have_no_room_for_is_made_by_torch(cuda, monkeypatch):
    """More segments than they take: losses of their sums, and slopes, are the same."""
    segments, losses, gating = ALL_LOSSES["segments"]
    monkeypatch.setattr(launchers, "MOST_SEGMENTS", 2)
    check_whole(2 * torch.randn(40, 5, device=DEVICE), losses, segments, gating)


def test_whole_routers_have_the_same_bits_in_every_order_of_threads(check_bits):
    segments, losses, gating = ALL_LOSSES["pooled"]
    logits, noise = torch.randn(70, 24, device=DEVICE), torch.randn(70, 24, device=DEVICE)

    def outputs():
        routed, gradients = routed_with_gradients(logits, "cuda", losses, segments, gating, noise, capacity=0.9)
        return [
            routed.gates,
            routed.slots,
            routed.sums,
            routed.counts,
            routed.loss,
            *routed.losses.values(),
            *gradients,
        ]

    check_bits(outputs)


def test_memory_that_was_something_else_before(cuda, monkeypatch):
    """Nothing is taken to be 0 that no kernel wrote."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    segments, losses, gating = ALL_LOSSES["segments"]
    torch.use_deterministic_algorithms(True)
    try:
        for capacity in (None, 0.8):
            check_whole(2 * torch.randn(70, 5, device=DEVICE), losses, segments, gating, capacity=capacity)
    finally:
        torch.use_deterministic_algorithms(False)


def test_noise_is_that_of_the_generator(cuda):
    """The load loss and its gradient, with the same noise on both backends."""
    logits, results = torch.randn(30, 5, device=DEVICE), []
    for backend in ("cuda", "reference"):
        leaf = logits.clone().requires_grad_()
        generator = torch.Generator(DEVICE).manual_seed(3)
        routed = route(leaf, 2, gating=Gating(noise_std=1.0), losses=["load"], generator=generator, backend=backend)
        results.append((routed.experts, routed.loss, *torch.autograd.grad(routed.loss, leaf)))
    assert torch.equal(results[0][0], results[1][0])
    for value, truth in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6)


def test_golden_places_of_v_moe(cuda):
    gates = torch.tensor([[5, 3, 2], [6, 3, 1], [4, 3.5, 2.5], [7, 2, 1], [2, 5, 3], [3, 3, 4]], device=DEVICE) / 10
    kept = {
        "position": [[0, 1], [1, -1], [-1, -1], [-1, -1], [0, 1], [0, -1]],
        "gate": [[-1, -1], [1, -1], [-1, -1], [0, 1], [0, 1], [0, -1]],
    }
    for priority, places in kept.items():
        capacity = Capacity(limit=2, padded=True)
        routed = route(gates.log(), 2, capacity=capacity, priority=priority, backend="cuda")
        assert routed.experts.tolist() == [[0, 1], [0, 1], [0, 1], [0, 1], [1, 2], [2, 0]]
        expected = torch.tensor(places, device=DEVICE)
        assert torch.equal(routed.slots, torch.where(expected < 0, -1, 2 * routed.experts + expected))
