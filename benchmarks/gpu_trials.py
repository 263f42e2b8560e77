"""What `make gpu` times experiment by experiment: single sweeps and products, whole steps, and who is faster by shape.

Each experiment is a list of trials, most wanted first. A trial is one shape with several ways to compute the same; the
first is what the others are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_ops as co
from benchmarks import cases_gpu, cases_routing, providers, providers_routing
from benchmarks.inputs import grouped_inputs, router_inputs, views_of_things
from benchmarks.registry import Provider

Step = Callable[[], "Tensor | None"]
COSINE, SCALE, BIAS = 0.24, 50.0, -12.0
MATMUL = providers.MATMUL
SWEEPS = ("cuda", "hopper", "triton_persistent", "triton")


@dataclass(frozen=True)
class Setup:
    """Where trials run.

    Attributes:
        device: "cuda", or "cpu" in a rehearsal.
        rehearses: sizes are small, and the reference stands in for a backend that cannot run.
    """

    device: str = "cuda"
    rehearses: bool = False

    def size(self, size: int, small: int = 64) -> int:
        """The size, or one that takes milliseconds."""
        return min(size, small) if self.rehearses else size

    def matrix(self, rows: int, columns: int, seed: int = 0) -> Tensor:
        """Unit rows in bfloat16."""
        generator = torch.Generator(self.device).manual_seed(seed)
        numbers = torch.randn(rows, columns, generator=generator, device=self.device)
        return F.normalize(numbers, dim=1).bfloat16()

    def pair(self, n: int, d: int) -> tuple[Tensor, Tensor]:
        """Rows and others that resemble them as those of a model in training do."""
        x, y = (view.to(self.device, torch.bfloat16) for view in views_of_things(n, d, cosine=COSINE))
        return x.requires_grad_(), y.requires_grad_()

    def backend(self, name: str, stem: str, x: Tensor) -> str:
        """The backend, or what stands in for it; ImportError with the reasons where it cannot run."""
        try:
            providers.insist_on(name, stem, x)
        except ImportError:
            if not self.rehearses:
                raise
            return "reference"
        return name


@dataclass(frozen=True)
class Trial:
    """One shape.

    Attributes:
        shape: in words.
        flops: what nobody can do without.
        ways: functions that make steps, by name; a step returns what is compared.
        floors: those that only show what the machine can do, with nothing to compare.
    """

    shape: str
    flops: float
    ways: Mapping[str, Callable[[], Step]]
    floors: Mapping[str, Callable[[], Step]] = field(default_factory=dict)


# ---- Similarity matrices ---------------------------------------------------------------------------------------------


def product(x: Tensor, y: Tensor, times: int = 1) -> Callable[[], Step]:
    """The matrix product alone, as often as a step needs one of its size."""

    def build() -> Step:
        out = torch.empty(len(x), len(y), dtype=x.dtype, device=x.device)

        def step() -> None:
            with torch.no_grad():
                for _ in range(times):
                    torch.mm(x, y.T, out=out)

        return step

    return build


def fold_trial(setup: Setup, n: int, d: int) -> Trial:
    """Both logsumexps and the targets' logits, forward alone: one sweep."""
    n = setup.size(n)
    x, y = setup.pair(n, d)
    target = torch.arange(n, device=setup.device)

    def plain() -> Step:
        def step() -> Tensor:
            with torch.no_grad():
                logits = SCALE * (x.float() @ y.float().T)
                of_targets = logits.diagonal().clone()
                logits.fill_diagonal_(-math.inf)  # no fold has a target
                return torch.cat([logits.logsumexp(1), logits.logsumexp(0), of_targets])

        return step

    def ours(name: str) -> Callable[[], Step]:
        def build() -> Step:
            backend = setup.backend(name, "similarity_reduce", x)

            def step() -> Tensor:
                with torch.no_grad():
                    found = co.similarity_reduce(x, y, dim=(0, 1), scale=SCALE, target=target, backend=backend)
                return torch.cat([found.rows, found.cols, found.target])

            return step

        return build

    ways = {"torch float32": plain, **{name: ours(name) for name in SWEEPS}}
    return Trial(f"N={n} D={d}", 2.0 * n * n * d, ways, {MATMUL: product(x, y)})


Loss = Callable[[Tensor, Tensor], Tensor]


def gradient_of_rows(loss: Loss, x: Tensor, y: Tensor) -> Step:
    """Forward and backward of both sides."""
    return lambda: torch.autograd.grad(loss(x, y), [x, y])[0]


def step_trial(
    setup: Setup, n: int, d: int, *, loss: str = "clip", names: tuple[str, ...] = SWEEPS, kept: tuple[str, ...] = ()
) -> Trial:
    """A training step of a loss: with inner products formed again, and kept where a backend is among `kept`."""
    n = setup.size(n)
    x, y = setup.pair(n, d)
    constants = {"scale": SCALE, "bias": BIAS} if loss == "siglip" else {"scale": SCALE}
    scalars = {key: torch.tensor(value, dtype=x.dtype, device=setup.device) for key, value in constants.items()}
    eager = {"clip": providers.eager_clip, "siglip": providers.eager_siglip}[loss]

    def ours(name: str, budget: int) -> Callable[[], Step]:
        def build() -> Step:
            options = {"backend": setup.backend(name, "similarity_reduce", x), "memory_budget": budget, **constants}
            return gradient_of_rows(lambda x, y: getattr(co, loss)(x, y, normalize=False, **options), x, y)

        return build

    ways = {"torch eager": lambda: gradient_of_rows(lambda x, y: eager(x, y, **scalars), x, y)}
    ways |= {name: ours(name, 0) for name in names}
    ways |= {f"{name}, logits kept": ours(name, 4 * n * n) for name in kept}
    products = 4 if loss == "clip" else 3
    return Trial(
        f"{loss} N={n} D={d}", 2.0 * products * n * n * d, ways, {f"{products} x {MATMUL}": product(x, y, products)}
    )


def weights_trial(setup: Setup, n: int, d: int) -> Trial:
    """The gradient of a scale alone: the sweep that makes weights, without their store and without the products."""
    n = setup.size(n)
    x, y = (rows.detach() for rows in setup.pair(n, d))
    scale = torch.tensor(SCALE, device=setup.device).requires_grad_()

    def ours(name: str) -> Callable[[], Step]:
        def build() -> Step:
            options = {"backend": setup.backend(name, "similarity_reduce", x), "bias": BIAS, "normalize": False}
            return lambda: torch.autograd.grad(co.siglip(x, y, scale=scale, **options), scale)[0]

        return build

    return Trial(f"N={n} D={d}", 2.0 * n * n * d, {name: ours(name) for name in SWEEPS}, {MATMUL: product(x, y)})


def chunk_trial(setup: Setup, rows: int, n: int, d: int) -> Trial:
    """The two products of gradients for a chunk of weights: float32, the second added to what is there."""
    from contrastive_ops.cuda import _products

    rows, n = setup.size(rows, 32), setup.size(n)
    weights, x, y = setup.matrix(rows, n), setup.matrix(rows, d, seed=1), setup.matrix(n, d, seed=2)
    dx, dy = (torch.zeros(len(each), d, device=setup.device) for each in (x, y))

    def build() -> Step:
        def step() -> None:
            _products.set_or_add(dx, weights, y, add=False)
            _products.set_or_add(dy, weights.T, x, add=True)

        return step

    return Trial(f"rows={rows} N={n} D={d}", 4.0 * rows * n * d, {}, {"products of gradients": build})


# ---- The host --------------------------------------------------------------------------------------------------------


def host_trial(setup: Setup, n: int, d: int = 512) -> Trial:
    """Small batches: Python and launches, eager and as a graph."""
    n = setup.size(n)
    x, y = setup.pair(n, d)

    scale = torch.tensor(SCALE, dtype=x.dtype, device=setup.device)

    def plain() -> Loss:
        return lambda x, y: providers.eager_clip(x, y, scale)

    def ours(name: str) -> Loss:
        backend = setup.backend(name, "similarity_reduce", x)
        return lambda x, y: co.clip(x, y, scale=SCALE, normalize=False, backend=backend)

    losses: dict[str, Callable[[], Loss]] = {"torch": plain}
    losses |= {name: partial(ours, name) for name in ("cuda", "hopper", "triton")}
    ways: dict[str, Callable[[], Step]] = {}
    for name, make in losses.items():
        ways[name] = lambda make=make: gradient_of_rows(make(), x, y)
        ways[f"{name}, graph"] = lambda make=make: gradient_of_rows(co.capture(make(), x, y), x, y)
    return Trial(f"N={n} D={d}", 8.0 * n * n * d, ways)


# ---- Searches, routers and experts -----------------------------------------------------------------------------------


def topk_trial(setup: Setup, n: int, m: int, d: int, k: int) -> Trial:
    """A search without rules."""
    n, m, k = setup.size(n, 32), setup.size(m, 512), setup.size(k, 8)
    x, y = setup.matrix(n, d), setup.matrix(m, d, seed=1)

    def plain() -> Step:
        return lambda: torch.cat([(part @ y.T).topk(k).values for part in x.split(cases_gpu.TOPK_ROWS)])

    def ours(name: str) -> Callable[[], Step]:
        def build() -> Step:
            backend = setup.backend(name, "similarity_topk", x)
            return lambda: co.similarity_topk(x, y, k, backend=backend).values

        return build

    ways = {"torch mm + topk": plain, **{name: ours(name) for name in ("cuda", "hopper", "triton")}}
    return Trial(f"N={n} M={m} D={d} k={k}", 2.0 * n * m * d, ways, {MATMUL: product(x, y)})


def route_trial(setup: Setup, tokens: int, experts: int, k: int) -> Trial:
    """A router with its losses, forward and backward."""
    case = cases_gpu.route_case(setup.size(tokens, 256), experts, k)
    constants = {"noise_std": 0.0, "threshold": math.log(20), "segments": 2, "capacity": 1.05}
    inputs = router_inputs(replace(case, device=setup.device), constants)

    def ours(name: str) -> Callable[[], Step]:
        def build() -> Step:
            backend = setup.backend(name, "expert_routing", inputs.tensors["logits"])
            step = providers_routing.ours_route(backend=backend).build(inputs)
            return lambda: step().grads["logits"]  # type: ignore[union-attr]

        return build

    floor = {providers_routing.COPY: lambda: providers_routing.copy_logits().build(inputs)}
    return Trial(case.shape_text, case.flops(case.shapes), {name: ours(name) for name in ("triton", "cuda")}, floor)


def grouped_trial(setup: Setup, experts: int, each: int, d: int, f: int) -> Trial:
    """Rows of experts times their matrices, forward and both gradients: torch's grouped product against ours."""
    shapes = {"E": setup.size(experts, 4), "T": setup.size(each, 16), "D": setup.size(d), "F": setup.size(f)}
    case = replace(cases_routing.grouped_case(each, faster=1.0), shapes=shapes, dtype=torch.bfloat16)
    inputs = grouped_inputs(replace(case, device=setup.device))
    frozen = {**inputs.frozen, "upstream": inputs.frozen["upstream"].to(case.dtype)}
    inputs = replace(inputs, frozen=frozen)

    def of(provider: Provider) -> Callable[[], Step]:
        def build() -> Step:
            step = provider.build(inputs)
            return lambda: torch.cat([gradient.flatten() for gradient in step().grads.values()])  # type: ignore[union-attr]

        return build

    ways = {
        providers_routing.GROUPED: of(providers_routing.torch_grouped()),
        "grouped_matmul": of(providers_routing.ours_grouped()),
    }
    floor = {providers_routing.DENSE: lambda: providers_routing.dense_product().build(inputs)}
    return Trial(case.shape_text, case.flops(shapes), ways, floor)


# ---- The experiments -------------------------------------------------------------------------------------------------

DIMENSIONS = (768, 256, 512, 1024)


def folds(setup: Setup) -> Iterator[Trial]:
    """The sweep that folds."""
    return (fold_trial(setup, 32_768, d) for d in DIMENSIONS)


def weights(setup: Setup) -> Iterator[Trial]:
    """The sweep that makes weights."""
    return (weights_trial(setup, 32_768, d) for d in DIMENSIONS)


def products(setup: Setup) -> Iterator[Trial]:
    """How many rows of weights the library should get at once."""
    return (chunk_trial(setup, rows, 32_768, 768) for rows in (4096, 2048, 8192, 16_384))


def clip(setup: Setup) -> Iterator[Trial]:
    """Whole steps, inner products formed again and kept."""
    yield step_trial(setup, 32_768, 768, names=("cuda", "hopper"), kept=("cuda", "hopper"))
    yield step_trial(setup, 32_768, 256, names=("cuda", "hopper"), kept=("hopper",))
    yield step_trial(setup, 65_536, 768, names=("cuda", "hopper"))


def host(setup: Setup) -> Iterator[Trial]:
    """Small batches."""
    return (host_trial(setup, n) for n in (1024, 4096))


def siglip(setup: Setup) -> Iterator[Trial]:
    """A loss of one sweep."""
    yield step_trial(setup, 65_536, 768, loss="siglip", names=("cuda", "hopper"))


def topk(setup: Setup) -> Iterator[Trial]:
    """Two sweeps against a stored matrix."""
    yield topk_trial(setup, 16_384, 100_000, 128, 100)
    yield topk_trial(setup, 16_384, 100_000, 768, 100)
    yield topk_trial(setup, 1024, 100_000, 128, 10)


def persistent(setup: Setup) -> Iterator[Trial]:
    """Triton with tensor descriptors against plain loads and the library: whole steps."""
    for d in DIMENSIONS:
        yield step_trial(setup, 16_384, d, names=("triton_persistent", "triton", "cuda"))
    yield step_trial(setup, 16_384, 768, loss="siglip", names=("triton_persistent", "triton", "cuda"))


def grouped(setup: Setup) -> Iterator[Trial]:
    """Many small groups and few large ones."""
    shapes = ((32, 512, 512, 2048), (32, 128, 512, 2048), (8, 4096, 1024, 4096), (128, 64, 512, 2048))
    return (grouped_trial(setup, *shape) for shape in shapes)


def router(setup: Setup) -> Iterator[Trial]:
    """Kernels of CUDA against those of Triton."""
    return (route_trial(setup, *shape) for shape in ((524_288, 32, 2), (131_072, 128, 8)))


EXPERIMENTS: Mapping[str, Callable[[Setup], Iterator[Trial]]] = {
    each.__name__: each for each in (folds, weights, products, clip, host, siglip, topk, persistent, grouped, router)
}
