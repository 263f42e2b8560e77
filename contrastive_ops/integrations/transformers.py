"""Experts of transformers' mixture models on fused kernels, and a contrastive loss for its Trainer.

    import contrastive_ops.integrations.transformers

    model = AutoModelForCausalLM.from_config(config, experts_implementation="contrastive_ops")

serves every model whose experts transformers calls through its own registry: Mixtral, Qwen-MoE, OLMoE, DeepSeek, ...
Weights, router, balance loss and checkpoints stay the model's.

    trainer = Trainer(model=model, compute_loss_func=contrastive_loss(model), ...)

takes the features of a `CLIPModel` or `SiglipModel` and leaves out the model's own loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses import clip, siglip
from ..ops import Routing, combine, grouped_matmul
from ._originals import third_party

INSTALL = "'transformers>=5'"
NAME = "contrastive_ops"
moe = third_party("transformers.integrations.moe", INSTALL)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What `transformers` calls for the experts of a layer: (T, D) tokens, (T, k) experts and their weights.

    Equivalent to, for each token t::

        sum(top_k_weights[t, j] * expert[top_k_index[t, j]](hidden_states[t]) for j in range(k))

    Tokens are read where they are, and the products of one expert are one matrix product. Experts of other ranks, which
    `transformers` marks by numbers beyond the last one, add nothing.
    """
    routing = Routing.from_choices(top_k_index, top_k_weights, self.num_experts)
    hidden = grouped_matmul(hidden_states, *_layer(self, "gate_up_proj" if self.has_gate else "up_proj", routing))
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    weight, offsets, bias = _layer(self, "down_proj", routing)
    rows = grouped_matmul(hidden, weight, routing.offsets, bias)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return combine(rows, routing).to(hidden_states.dtype)


def _layer(experts: Any, name: str, routing: Any) -> tuple[Tensor, Any, Tensor | None]:
    """The matrices of a layer as (E, in, out), where their rows are, and the biases."""
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return weight if experts.is_transposed else weight.transpose(1, 2), routing, bias


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def contrastive_loss(model: torch.nn.Module) -> Callable[..., Tensor]:
    """The `compute_loss_func` of transformers' Trainer for a `CLIPModel` or `SiglipModel`.

    Args:
        model: which has `logit_scale`, and `logit_bias` for SigLIP's loss.

    Returns:
        A function of the model's outputs, which must have `image_embeds` and `text_embeds`. The loss is a mean over the
        batch.
    """
    bias = getattr(model, "logit_bias", None)

    def compute_loss(outputs: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
        image, text = outputs.image_embeds, outputs.text_embeds
        scale: Any = model.logit_scale.exp()  # type: ignore[operator]
        if bias is None:
            return clip(image, text, scale=scale)
        return siglip(image, text, scale=scale, bias=bias)

    return compute_loss
