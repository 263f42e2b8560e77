"""The float64 truth of each op: dense mathematics and autograd, sharing no code with the package.

Three softmax losses are one formula, ``logsumexp over a row - logit of the positive``, applied to
rows and columns (clip), to rows (info_nce), or to a batch against itself without the diagonal
(nt_xent). Rows go through in checkpointed chunks so that a matrix of 8192 x 8192 float64 logits
and its temporaries need not all live at once.

Batches of copies: repeat every row ``r`` times and each row's sum has every column ``r`` times, its
own ``r - 1`` times where a row does not meet itself (nt_xent, sup_con) or where its own column is
another term than the rest (siglip). So the truth of the large batch comes from the small one with
sums over columns that count them so often, which adds ``log r`` and ``log (r - 1)`` to the logits
of a softmax; by symmetry each copy gets ``1 / r`` of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.providers_matryoshka import dims_of
from benchmarks.providers_routing import dense_router, router_total
from benchmarks.registry import Inputs, Outcome, Scores

CHUNK_BYTES = 128 * 2**20
GPU_CHUNK_BYTES = 2**31


def _row_losses(x: Tensor, y: Tensor, target: Tensor, scale: Tensor, copies: int, own: int | None) -> Tensor:
    """Sum over the rows of one chunk; ``own``: its first row's own column in a self-similarity."""
    logits = scale * (x @ y.T)
    positive = logits.gather(1, target[:, None]).squeeze(1)
    if own is not None:
        rows = torch.arange(len(x), device=x.device)
        without_self = torch.zeros_like(logits)
        without_self[rows, own + rows] = torch.tensor(1 - 1 / copies, dtype=x.dtype).log()
        logits = logits + without_self
    lse = logits.logsumexp(1) + torch.tensor(float(copies), dtype=x.dtype).log()
    return (lse - positive).sum()


def _mean_row_loss(
    x: Tensor, y: Tensor, target: Tensor, scale: Tensor, copies: int, self_similarity: bool = False
) -> Tensor:
    def of_rows(part: slice) -> Tensor:
        own = part.start if self_similarity else None
        return _row_losses(x[part], y, target[part], scale, copies, own)

    return mean_over_rows(of_rows, len(x), len(y), x.device)


def mean_over_rows(of_rows: Callable[[slice], Tensor], rows: int, columns: int, device: torch.device) -> Tensor:
    """The mean over all rows, where ``of_rows`` gives the sum of some; only one chunk lives at a time."""
    size = max(1, (CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES) // (8 * columns))
    parts = [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
    if len(parts) == 1:
        return of_rows(parts[0]) / rows
    sums = [checkpoint(of_rows, part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum() / rows


def _own_column(part: slice, columns: Tensor) -> Tensor:
    """(rows of the part, columns): where a row of the batch meets the column of its own number."""
    numbers = torch.arange(len(columns), device=columns.device)
    return numbers[part, None] == numbers


def differentiated(loss_of: Callable[..., Tensor], inputs: Inputs) -> Outcome:
    """Loss and gradients in float64 from the values the providers get, rounding included."""
    leaves = {}
    for name, tensor in inputs.tensors.items():
        base = tensor if tensor.ndim == 0 else tensor[: len(tensor) // inputs.copies]
        leaves[name] = base.detach().double().requires_grad_()
    loss = loss_of(**leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    spread = {
        name: grad if grad.ndim == 0 or inputs.copies == 1 else grad.repeat(inputs.copies, 1) / inputs.copies
        for name, grad in zip(leaves, grads, strict=True)
    }
    return Outcome(loss.detach(), spread)


def _same_row(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def clip_truth(inputs: Inputs) -> Outcome:
    """CLIP: the mean of both directions, with a learned scale."""

    def loss_of(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        rows = _mean_row_loss(image, text, _same_row(image), scale, inputs.copies)
        columns = _mean_row_loss(text, image, _same_row(text), scale, inputs.copies)
        return (rows + columns) / 2

    return differentiated(loss_of, inputs)


def info_nce_truth(inputs: Inputs, cosine: bool = False) -> Outcome:
    """InfoNCE from queries to keys, with a fixed scale; ``cosine``: of normalised rows."""
    scale = torch.tensor(inputs.constants["scale"], dtype=torch.float64)

    def loss_of(query: Tensor, key: Tensor) -> Tensor:
        if cosine:
            query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        return _mean_row_loss(query, key, _same_row(query), scale, inputs.copies)

    return differentiated(loss_of, inputs)


def nt_xent_truth(inputs: Inputs) -> Outcome:
    """NT-Xent (SimCLR): both views against both views without the diagonal, rows normalised."""
    scale = torch.tensor(1 / inputs.constants["temperature"], dtype=torch.float64)

    def loss_of(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]), dim=1)
        partner = _same_row(z).roll(len(z0))
        return _mean_row_loss(z, z, partner, scale, inputs.copies, self_similarity=True)

    return differentiated(loss_of, inputs)


def matryoshka_truth(inputs: Inputs) -> Outcome:
    """Clip where the scale is learned, else InfoNCE: the sum over normalised prefixes."""

    def loss_of(x: Tensor, y: Tensor, scale: Tensor, both: bool) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for d in dims_of(x.shape[1]):
            a, b = F.normalize(x[:, :d], dim=1), F.normalize(y[:, :d], dim=1)
            rows = _mean_row_loss(a, b, _same_row(a), scale, inputs.copies)
            columns = _mean_row_loss(b, a, _same_row(b), scale, inputs.copies) if both else rows
            total = total + (rows + columns) / 2
        return total

    def of_leaves(scale: Tensor | None = None, **pair: Tensor) -> Tensor:
        fixed = torch.tensor(inputs.constants.get("scale", 0.0), dtype=torch.float64)
        return loss_of(*pair.values(), fixed if scale is None else scale, scale is not None)

    return differentiated(of_leaves, inputs)


def sup_con_truth(inputs: Inputs) -> Outcome:
    """SupCon: a row's mean of -log p over the others of its label, rows normalised."""
    temperature = inputs.constants["temperature"]

    def loss_of(x: Tensor) -> Tensor:
        z, labels = F.normalize(x, dim=1), inputs.frozen["labels"][: len(x)]

        def of_rows(part: slice) -> Tensor:
            logits = z[part] @ z.T / temperature
            times = inputs.copies - _own_column(part, z).to(z.dtype)
            log_p = logits - (logits + times.log()).logsumexp(1, keepdim=True)
            positive = times * (labels[part, None] == labels)
            return -((positive * log_p).sum(1) / positive.sum(1)).sum()

        return mean_over_rows(of_rows, len(z), len(z), z.device)

    return differentiated(loss_of, inputs)


def siglip_truth(inputs: Inputs) -> Outcome:
    """SigLIP: a row's sum of -log sigmoid(l) of its own text and -log sigmoid(-l) of all others."""

    def loss_of(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        def of_rows(part: slice) -> Tensor:
            logits = scale * (image[part] @ text.T) + bias
            own = _own_column(part, text).to(logits.dtype)
            negative = (inputs.copies - own) * F.logsigmoid(-logits)
            return -(negative + own * F.logsigmoid(logits)).sum()

        return mean_over_rows(of_rows, len(image), len(text), image.device)

    return differentiated(loss_of, inputs)


def gte_truth(inputs: Inputs) -> Outcome:
    """GTE: one softmax over the four blocks of similarities of queries and documents, rows normalised."""
    scale = inputs.constants["scale"]

    def loss_of(query: Tensor, document: Tensor) -> Tensor:
        q, d = F.normalize(query, dim=1), F.normalize(document, dim=1)

        def of_rows(part: slice) -> Tensor:
            own = _own_column(part, q)
            blocks = [
                q[part] @ d.T,
                (q[part] @ q.T).masked_fill(own, -torch.inf),
                d[part] @ q.T,
                (d[part] @ d.T).masked_fill(own, -torch.inf),
            ]
            lse = (scale * torch.cat(blocks, 1)).logsumexp(1)
            return (lse - scale * (q[part] * d[part]).sum(1)).sum()

        return mean_over_rows(of_rows, len(q), 4 * len(q), q.device)

    return differentiated(loss_of, inputs)


def gist_truth(inputs: Inputs) -> Outcome:
    """GISTEmbed: three blocks, without the pairs that a guide finds as similar as the positive less a margin."""
    temperature, margin = inputs.constants["temperature"], inputs.constants["margin"]
    guide_query, guide_key = (F.normalize(inputs.frozen[f"guide_{side}"].double(), dim=1) for side in ("query", "key"))

    def loss_of(query: Tensor, key: Tensor) -> Tensor:
        q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
        bound = (guide_query * guide_key).sum(1, keepdim=True) - margin

        def of_rows(part: slice) -> Tensor:
            own = _own_column(part, q)
            blocks = []
            for x, y, guide_x, guide_y in (
                (q, k, guide_query, guide_key),
                (q, q, guide_query, guide_query),
                (k, k, guide_key, guide_key),
            ):
                drop = guide_x[part] @ guide_y.T > bound[part]
                drop = drop & ~own if y is not x else drop | own
                blocks.append((x[part] @ y.T / temperature).masked_fill(drop, -torch.inf))
            positive = blocks[0][own]
            return (torch.cat(blocks, 1).logsumexp(1) - positive).sum()

        return mean_over_rows(of_rows, len(q), 3 * len(q), q.device)

    return differentiated(loss_of, inputs)


def router_truth(inputs: Inputs) -> Outcome:
    """The losses of a router, and its gates, as the papers write them down."""
    weight = inputs.frozen["weight"].double()

    def loss_of(logits: Tensor) -> Tensor:
        noise = inputs.frozen.get("noise")
        losses, gates, _ = dense_router(logits, noise, inputs.frozen["segments"], weight.shape[1], **inputs.constants)
        return router_total(losses, gates, weight)

    return differentiated(loss_of, inputs)


def grouped_truth(inputs: Inputs) -> Outcome:
    """Rows times the matrix of their group; all groups are of one size."""
    upstream = inputs.frozen["upstream"].double()

    def loss_of(rows: Tensor, weight: Tensor) -> Tensor:
        out = torch.bmm(rows.unflatten(0, (len(weight), -1)), weight)
        return (out.flatten(0, 1) * upstream).sum()

    return differentiated(loss_of, inputs)


def layer_truth(inputs: Inputs) -> Outcome:
    """Every token through the gated expert of its largest probability."""
    upstream = inputs.frozen["upstream"].double()

    def loss_of(tokens: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gates, chosen = (tokens @ router.T).softmax(1).max(1)
        out = torch.zeros_like(tokens)
        for e in range(len(up)):
            mine = (chosen == e).nonzero().squeeze(1)
            gate, hidden = (tokens[mine] @ up[e].T).chunk(2, 1)
            out = out.index_add(0, mine, gates[mine, None] * ((F.silu(gate) * hidden) @ down[e].T))
        return (out * upstream).sum()

    return differentiated(loss_of, inputs)


def distillation_truth(inputs: Inputs) -> Outcome:
    """Cross-entropy with the teacher's softmax as the target, for rows and for columns, averaged."""
    scale, teacher = inputs.constants["scale"], [inputs.frozen[f"teacher_{name}"].double() for name in inputs.tensors]

    def loss_of(image: Tensor, text: Tensor) -> Tensor:
        def direction(x: Tensor, y: Tensor, teacher_x: Tensor, teacher_y: Tensor) -> Tensor:
            def of_rows(part: slice) -> Tensor:
                target = (scale * teacher_x[part] @ teacher_y.T).softmax(1)
                return -(target * (scale * x[part] @ y.T).log_softmax(1)).sum()

            return mean_over_rows(of_rows, len(x), len(y), x.device)

        return (direction(image, text, *teacher) + direction(text, image, *teacher[::-1])) / 2

    return differentiated(loss_of, inputs)


def values_truth(inputs: Inputs) -> Outcome:
    """Values summed by the softmax of each row, against a gradient from above."""
    scale, upstream = inputs.constants["scale"], inputs.frozen["upstream"].double()

    def loss_of(x: Tensor, y: Tensor, values: Tensor) -> Tensor:
        def of_rows(part: slice) -> Tensor:
            return (((scale * x[part] @ y.T).softmax(1) @ values) * upstream[part]).sum()

        return mean_over_rows(of_rows, len(x), len(y), x.device) * len(x)

    return differentiated(loss_of, inputs)


def maxsim_truth(inputs: Inputs) -> Outcome:
    """MaxSim: for each query token the largest similarity with a token of a document, a document at a time."""
    weight, mask = inputs.frozen["weight"].double(), inputs.frozen.get("mask")

    def loss_of(queries: Tensor, documents: Tensor) -> Tensor:
        def of_document(j: int) -> Tensor:
            tokens = documents[j] if mask is None else documents[j][mask[j]]
            return ((queries @ tokens.T).amax(2).sum(1) * weight[:, j]).sum()

        return torch.stack([checkpoint(of_document, j, use_reentrant=False) for j in range(len(documents))]).sum()

    return differentiated(loss_of, inputs)


def linear_log_prob_truth(inputs: Inputs) -> Outcome:
    """The cross entropy of a linear layer's softmax, less the share of its entropy that the inputs name, if any."""
    labels, share = inputs.frozen["labels"], inputs.constants.get("share", 0.0)

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        def of_rows(part: slice) -> Tensor:
            log_prob = (hidden[part] @ weight.T).log_softmax(1)
            entropy = -(log_prob.exp() * log_prob).sum()
            return -log_prob.gather(1, labels[part, None]).sum() - share * entropy

        return mean_over_rows(of_rows, len(hidden), len(weight), hidden.device)

    return differentiated(loss_of, inputs)


def linear_kl_truth(inputs: Inputs) -> Outcome:
    """KL(model || reference) over all words."""
    other_hidden, other_weight = (inputs.frozen[f"reference_{name}"].double() for name in ("hidden", "weight"))

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        def of_rows(part: slice) -> Tensor:
            log_p = (hidden[part] @ weight.T).log_softmax(1)
            log_q = (other_hidden[part] @ other_weight.T).log_softmax(1)
            return (log_p.exp() * (log_p - log_q)).sum()

        return mean_over_rows(of_rows, len(hidden), len(weight), hidden.device)

    return differentiated(loss_of, inputs)


def topk_truth(inputs: Inputs) -> Scores:
    """Top-k: all scores in one matrix; those of excluded columns and those above the row's bound are -inf."""
    query, corpus = (inputs.tensors[name].double() for name in ("query", "corpus"))
    scores = query @ corpus.T
    if "excluded" in inputs.frozen:
        scores.scatter_(1, inputs.frozen["excluded"], -torch.inf)
    if "bound" in inputs.frozen:
        scores.masked_fill_(scores > inputs.frozen["bound"].double()[:, None], -torch.inf)
    return Scores(scores, scores.topk(int(inputs.constants["k"])).values)
