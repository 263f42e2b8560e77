"""Train a LIMoE, one sparse Transformer for images and text, on real digits with captions, on a CPU.

Patches of an image and words of a caption pass through the same layers; every other one is a mixture of experts, in
which each token uses one of sixteen. Image tokens outnumber words, so a router that is only balanced over all tokens
starves the text: the entropy losses of LIMoE keep both modalities alive.

    python examples/train_limoe.py              # trains, and says what the model can do
    python examples/train_limoe.py --dense      # and its dense twin, of equal active parameters
    python examples/train_limoe.py --ablate     # every combination of balance losses, three seeds, two figures
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _digits import Words, load, patches, progress, shifted
from _limoe_report import describe, recall, run_ablation, to_table
from torch import Tensor, nn

from contrastive_ops import similarity_topk
from contrastive_ops.moe import SparseMoE
from contrastive_ops.nn import CLIPLoss
from contrastive_ops.ops import Gating, RouterLoss

MODALITIES = ("image", "text")
HELD_OUT = 397
CAPTIONS = 32  # of each image, of which a step takes one
# The balance losses of the paper. Importance and load are over all tokens; entropies are of each modality.
AUXILIARY = ("none", "classic", "local", "full")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    auxiliary: str = "full"
    priority: str = "gate"  # Batch Priority Routing; or "position", where images come before text
    dense: bool = False
    seed: int = 0
    steps: int = 300
    batch: int = 64
    dim: int = 64
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    capacity: float = 1.05
    learning_rate: float = 2e-3


def balance(config: Config) -> list[RouterLoss]:
    """The losses of a variant, each with those of the one before it."""
    # The mean probabilities of a modality are to spread over at least as many experts as these shares of them.
    least = [math.log(share * config.experts) for share in (10 / 16, 7 / 16)]
    losses = [
        RouterLoss("importance", 0.01, pooled=True),
        RouterLoss("load", 0.01, pooled=True),
        RouterLoss("z", 0.001, pooled=True),
        RouterLoss("local_entropy", [0.0, 0.04]),  # words decide; image tokens do so by themselves
        RouterLoss("global_entropy", 0.04, threshold=least),
    ]
    return losses[: {"none": 0, "classic": 3, "local": 4, "full": 5}[config.auxiliary]]


class Block(nn.Module):
    """Attention within each image and caption, then a feed-forward layer: dense, or experts for all tokens together."""

    def __init__(self, config: Config, sparse: bool) -> None:
        super().__init__()
        dim, hidden = config.dim, config.hidden
        self.heads, self.sparse = config.heads, sparse
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # In evaluation no token is dropped, so that no result depends on its neighbours in the batch.
        router = {"capacity": config.capacity, "eval_capacity": float(config.experts), "priority": config.priority}
        router |= {"gating": Gating(noise_std=1.0), "losses": balance(config)}
        experts = SparseMoE(dim, hidden, config.experts, bias=True, router=router) if sparse else None
        self.mlp = experts or nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, L, 3 D) of one modality; mask (B, L) of those that are there."""
        q, k, v = x.unflatten(2, (3, self.heads, x.shape[2] // 3 // self.heads)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, masks: list[Tensor], segments: Tensor, generator: Any) -> tuple[Tensor, Any]:
        """x (T, D): tokens of all images, then of all captions, padding included."""
        parts = self.qkv(self.norms[0](x)).split([mask.numel() for mask in masks])
        mixed = [self.attend(p.unflatten(0, m.shape), m).flatten(0, 1) for p, m in zip(parts, masks, strict=True)]
        x = x + self.out(torch.cat(mixed))
        if not self.sparse:
            return x + self.mlp(self.norms[1](x)), None
        rows = torch.cat([mask.flatten() for mask in masks]).nonzero().squeeze(1)  # padding is not an expert's work
        out, routing = self.mlp(self.norms[1](x[rows]), segments=segments[rows], num_segments=2, generator=generator)
        return x.index_add(0, rows, out), routing


class LIMoE(nn.Module):
    """One tower: patches and words have their own first and last projection, and everything between in common."""

    def __init__(self, config: Config, vocabulary: int, length: int, out: int = 32) -> None:
        super().__init__()
        dim = config.dim
        self.first = nn.ModuleList([nn.Linear(9, dim), nn.Embedding(vocabulary, dim)])
        self.places = nn.ParameterList(nn.Parameter(0.02 * torch.randn(n, dim)) for n in (36, length))
        self.blocks = nn.ModuleList(Block(config, not config.dense and i % 2 == 1) for i in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.last = nn.ModuleList(nn.Linear(dim, out, bias=False) for _ in MODALITIES)
        nn.init.normal_(self.first[1].weight, std=0.5)

    def forward(self, images: Tensor, words: Tensor, generator: Any = None) -> tuple[Tensor, Tensor, list[Any]]:
        """Unit rows of images (B, 36, 9) and captions (B', L), and the routings of the sparse layers."""
        tokens = [first(x) + place for first, x, place in zip(self.first, (images, words), self.places, strict=True)]
        masks = [torch.ones(images.shape[:2], dtype=torch.bool), words != 0]
        segments = torch.arange(2).repeat_interleave(torch.tensor([mask.numel() for mask in masks]))
        x, routings = torch.cat([part.flatten(0, 1) for part in tokens]), []
        for block in self.blocks:
            x, routing = block(x, masks, segments, generator)
            routings += [routing] if routing is not None else []
        parts = self.norm(x).split([mask.numel() for mask in masks])
        sums = [(p.unflatten(0, m.shape) * m[:, :, None]).sum(1) for p, m in zip(parts, masks, strict=True)]
        means = [total / m.sum(1, keepdim=True) for total, m in zip(sums, masks, strict=True)]
        image, text = (F.normalize(last(mean), dim=1) for last, mean in zip(self.last, means, strict=True))
        return image, text, routings


@dataclass
class Run:
    """A model in training; `state` is all that a run which goes on needs, to the bit."""

    config: Config
    step: int = 0
    history: dict[str, list[Any]] = field(default_factory=lambda: {"loss": [], "success": [], "effective": []})

    def __post_init__(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.words = Words()
        self.train_set, self.test_set = load(HELD_OUT, config.seed)
        self.captions = self.words.captions(self.train_set, CAPTIONS, config.seed)
        self.model, self.loss = LIMoE(config, len(self.words), self.words.length), CLIPLoss()
        self.parameters = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=0.05)
        self.generator = torch.Generator().manual_seed(config.seed)  # of batches, captions, shifts and router noise

    def advance(self) -> None:
        """One step."""
        config, generator = self.config, self.generator
        rows = torch.randperm(len(self.train_set), generator=generator)[: config.batch]
        images = patches(shifted(self.train_set.images[rows], generator))
        words = self.captions[rows, torch.randint(CAPTIONS, (len(rows),), generator=generator)]
        image, text, routings = self.model(images, words, generator)
        loss = self.loss(image, text)
        total = loss + sum(routing.loss for routing in routings)
        warm, done = min(1.0, (self.step + 1) / 50), self.step / config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self.history["loss"].append(loss.item())
        for name, metric in (("success", "success_rate"), ("effective", "effective_experts")):
            # [layer][modality]
            self.history[name].append([routing.metrics[metric].tolist() for routing in routings])

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "loss", "optimizer")}
        state |= {"step": self.step, "history": self.history, "config": asdict(self.config)}
        return state | {"generator": self.generator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        if state["config"] != asdict(self.config):
            raise SystemExit(f"the checkpoint must be of the same run, got one of {state['config']}")
        for name in ("model", "loss", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.history = state["step"], state["history"]
        self.generator.set_state(state["generator"])

    def train(self, checkpoint: Path | None = None, every: int = 100) -> Run:
        """All steps that are left."""
        label = "dense" if self.config.dense else self.config.auxiliary
        for _ in progress(range(self.step, self.config.steps), label):
            self.advance()
            if checkpoint and (self.step % every == 0 or self.step == self.config.steps):
                part = checkpoint.with_name(f"{checkpoint.name}.part")
                torch.save(self.state(), part)
                part.replace(checkpoint)  # whole, or as it was: a kill or a full disk loses nothing
        return self

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """What the model can do with held-out images."""
        self.model.eval()
        test, prompts = self.test_set, self.words.prompts()
        image, text, routings = self.model(patches(test.images), self.words.full(test))
        _, named, _ = self.model(patches(test.images[:0]), prompts.flatten(0, 1))
        self.model.train()
        classes = F.normalize(named.view(*prompts.shape[:2], -1).mean(1), dim=1)
        found = {"zero_shot": (similarity_topk(image, classes, 1).indices[:, 0] == test.labels).float().mean().item()}
        found |= recall(image, text, torch.cat([test.labels[:, None], test.attributes], 1))
        last = slice(-max(1, self.config.steps // 20), None)
        for name in ("success", "effective") if routings else ():
            mean = torch.tensor(self.history[name][last]).mean((0, 1))
            found |= {f"{name}_{modality}": mean[m].item() for m, modality in enumerate(MODALITIES)}
        found["choices"] = [routing.metrics["choices"].tolist() for routing in routings]
        return found


def resume(run: Run, checkpoint: Path) -> None:
    """Go on where the file ends; with one that is cut short, changed or hostile, end with a reason."""
    try:
        run.restore(torch.load(checkpoint, weights_only=True))
    except Exception as error:  # not torch's words: they advise to load it in a way that runs the code in it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is of some files that are cut short
            raise
        raise SystemExit(
            f"the checkpoint must be a file that this example wrote, got {checkpoint}, which cannot be read "
            f"({type(error).__name__}); delete it to train anew"
        ) from None


def main(argv: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--seed", type=int, nargs="+", default=None, help="several with --ablate; default 0, or 0 1 2")
    parser.add_argument("--auxiliary", choices=AUXILIARY, default="full", help="balance losses")
    parser.add_argument("--priority", choices=("gate", "position"), default="gate", help="position: without BPR")
    parser.add_argument("--dense", action="store_true", help="also train the dense twin")
    parser.add_argument("--ablate", action="store_true", help="train all variants instead, and draw")
    parser.add_argument("--checkpoint", type=Path, help="file to save the run to, and to go on from if it exists")
    parser.add_argument("--out", type=Path, default=Path("limoe_output"), help="folder of the ablation")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    args = parser.parse_args(argv)
    seeds = args.seed or ([0, 1, 2] if args.ablate else [0])
    config = Config(auxiliary=args.auxiliary, priority=args.priority, seed=seeds[0], steps=args.steps)
    results: dict[str, Any] = {}
    if args.ablate:
        results = run_ablation(config, seeds, args.out)
        print(to_table(results))
    for name, each in {"LIMoE": config, "dense twin": replace(config, dense=True)}.items() if not args.ablate else ():
        if args.dense or not each.dense:
            run, start, checkpoint = Run(each), time.process_time(), None if each.dense else args.checkpoint
            if checkpoint and checkpoint.exists():
                resume(run, checkpoint)
            found = run.train(checkpoint).evaluate() | {"history": run.history}
            results[name] = found | {"cpu_seconds": time.process_time() - start}
            print(f"{name}\n{describe(results[name], HELD_OUT)}\n")
    if args.json:
        args.json.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
