"""The cases of values summed by a softmax: rows that are assigned to the entries of a codebook."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks import providers_values as providers
from benchmarks.inputs import views_of_things
from benchmarks.providers import MATMUL
from benchmarks.providers_values import EAGER, NO_CACHE, SDPA
from benchmarks.registry import OURS, TOLERANCE, Case, Inputs, Target, register
from benchmarks.truth import values_truth


def values_inputs(case: Case) -> Inputs:
    """Rows that lie near entries, a value of the same dimension for each entry, and a gradient from above."""
    n, m, d = case.shapes["N"], case.shapes["M"], case.shapes["D"]
    generator = torch.Generator().manual_seed(0)
    entries, noisy = views_of_things(m, d, cosine=0.6)
    x = noisy[torch.randint(m, (n,), generator=generator)]
    values, upstream = (F.normalize(torch.randn(k, d, generator=generator), dim=1) for k in (m, n))
    on = {"device": case.device, "dtype": case.dtype}
    tensors = {"x": x.to(**on), "y": entries.to(**on), "values": values.to(**on)}
    return Inputs(tensors, {"scale": 20.0}, frozen={"upstream": upstream.to(**on)})


def values_case(n: int, m: int, d: int) -> Case:
    """Two products forward; backward two of them again, and one for each of three gradients."""
    return Case(
        op="similarity_values",
        shapes={"N": n, "M": m, "D": d},
        dtype=torch.float32,
        make_inputs=values_inputs,
        truth=values_truth,
        providers=(
            providers.ours(),
            providers.ours(NO_CACHE, memory_budget=0),
            providers.eager(),
            providers.attention(),
            providers.products(),
        ),
        baseline=EAGER,
        flops=lambda s: 14 * s["N"] * s["M"] * s["D"],
        tolerance=TOLERANCE[torch.float32],
        targets=(
            Target("values", "time", 1.2, NO_CACHE, MATMUL),
            Target("values-dense", "faster", 0.9, OURS, EAGER),
            Target("values-dense", "faster", 1.1, OURS, SDPA),
            Target("values-dense", "memory", 1 / 4, NO_CACHE, EAGER),
        ),
    )


register(values_case(4096, 8192, 256))
