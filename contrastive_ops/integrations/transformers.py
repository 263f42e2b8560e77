"""Experts of transformers' mixture models on fused kernels, and a contrastive loss for its Trainer.

    import contrastive_ops.integrations.transformers

    model = AutoModelForCausalLM.from_config(config, experts_implementation="contrastive_ops")

serves every model whose experts transformers calls through its own registry: Mixtral, Qwen-MoE, OLMoE, DeepSeek, ...
Weights, router, balance loss and checkpoints stay the model's.

    trainer = Trainer(model=model, compute_loss_func=contrastive_loss(model), ...)

takes the features of a `CLIPModel` or `SiglipModel` and leaves out the model's own loss.

    layer = sparse_moe(config, state_dict, prefix="model.layers.0.mlp.")

is a `SparseMoE` of its own with the weights of a checkpoint's mixture layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..losses import clip, siglip
from ..moe import SparseMoE
from ..ops import Gating, Routing, combine, grouped_matmul
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


# What checkpoints have beside gate and experts: our names, and theirs.
RENAMED = {"gate.e_score_correction_bias": "gate.expert_bias"}
LAYERS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")


def sparse_moe(config: Any, state: Mapping[str, Tensor], prefix: str = "", **options: Any) -> SparseMoE:
    """A `SparseMoE` with the weights and the gating of a mixture layer of a checkpoint.

    Equivalent to the layer's block in transformers, of which it returns the output and the `Routing`.

    Args:
        config: of a model whose `model_type` is mixtral, qwen2_moe, qwen3_moe, olmoe or deepseek_v3.
        state: the layer's weights, or those of the whole model. Experts may be apart (``experts.0.w1.weight``, ``w3``,
            ``w2``; ``experts.0.gate_proj.weight``, ``up_proj``, ``down_proj``) or in one tensor
            (``experts.gate_up_proj``, ``experts.down_proj``).
        prefix: of the layer's names, such as "model.layers.0.block_sparse_moe.".
        **options: more arguments of `SparseMoE`; `dtype` is that of the experts by default. ``router`` adds to the
            gating, such as ``router={"losses": ["switch"]}``.

    Returns:
        `SparseMoE`. A `routed_scaling_factor` is in the experts' second matrices; DeepSeek's correction of scores is
        the router's `expert_bias`, which `update_bias` moves on.

    Raises:
        ValueError: a model of another type; no weights with this prefix.
        NotImplementedError: shared experts with a gate of their own, as Qwen2's models have.
        RuntimeError: weights that are missing or do not fit, as from `load_state_dict`.
    """
    kind = config.model_type
    if kind not in LAYERS:
        raise ValueError(f"sparse_moe: config must be of one of {', '.join(LAYERS)}, got {kind!r}")
    layer = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if not any(name.startswith("experts.") for name in layer):
        raise ValueError(f"sparse_moe: state must have weights of experts with the prefix, got none with {prefix!r}")
    if any(name.startswith("shared_expert_gate") for name in layer):
        raise NotImplementedError(
            "sparse_moe: state must have no shared_expert_gate, got one\n"
            '  use experts_implementation="contrastive_ops", which keeps the block'
        )
    layer = {RENAMED.get(name, name): value for name, value in layer.items()}
    gating: dict[str, Any] = {"renormalize": kind == "mixtral" or config.norm_topk_prob}
    router, shared = dict(options.pop("router", {})), 0
    if kind == "deepseek_v3":
        gating |= {"score": "sigmoid", "expert_groups": config.n_group, "kept_groups": config.topk_group}
        router, shared = {"balance": "sign"} | router, config.n_shared_experts
        for name in [name for name in layer if name.startswith("experts.") and "down_proj" in name]:
            layer[name] = layer[name] * config.routed_scaling_factor
    experts, hidden = layer["gate.weight"].shape[0], getattr(config, "moe_intermediate_size", config.intermediate_size)
    activation = {"activation": third_party("transformers.activations", INSTALL).ACT2FN[config.hidden_act]}
    options = {"dtype": next(value.dtype for name, value in layer.items() if name.startswith("experts."))} | options
    found = SparseMoE(
        config.hidden_size,
        hidden,
        experts,
        config.num_experts_per_tok,
        gated=True,
        shared=shared,
        router=router | {"gating": Gating(**gating)},
        **activation,
        **options,
    )
    found.load_state_dict(layer)
    return found


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
