"""A hundred steps of other packages' own training loops, whose curves with an adapter are those of the original."""

import importlib
import types

import pytest
import torch
from ranks import ranks
from torch import nn

pytestmark = pytest.mark.slow

STEPS = 100


class Recorded(nn.Module):
    """A loss that keeps its values."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.values = loss, []

    def forward(self, *inputs, **keywords):
        found = self.loss(*inputs, **keywords)
        value = found["contrastive_loss"] if isinstance(found, dict) else found
        self.values.append(float(value.detach()))
        return found


def assert_same_curve(mine, theirs, tolerance=5e-3):
    mine, theirs = torch.tensor(mine), torch.tensor(theirs)
    assert len(theirs) == STEPS and theirs[-20:].mean() < 0.9 * theirs[:20].mean()
    assert mine[0] == pytest.approx(float(theirs[0]), rel=1e-5)  # later steps amplify the last digits
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


class Pairs:
    """Batches of images and of the texts that name them, as open_clip_train reads them: a part of each for a rank."""

    def __init__(self, rank, size, rows=32):
        draw = torch.Generator().manual_seed(0)
        kinds = torch.randn(200, 3, 16, 16, generator=draw)
        texts = torch.randint(1, 60, (200, 8), generator=draw)
        texts[:, -1] = 63  # open_clip takes the features where the largest token is
        self.batches = []
        for _ in range(STEPS):
            drawn = torch.randperm(200, generator=draw)[:rows]
            noise = torch.randn(rows, 3, 16, 16, generator=draw)
            part = slice(rank * rows // size, (rank + 1) * rows // size)
            self.batches.append(((kinds[drawn] + 0.5 * noise)[part], texts[drawn][part]))
        self.num_batches, self.num_samples = STEPS, STEPS * rows

    def __iter__(self):
        return iter(self.batches)


def open_clip_curves(rank, size):
    """The values of ClipLoss in `train_one_epoch` of open_clip_train, ours and the original's."""
    ours = importlib.import_module("contrastive_ops.integrations.open_clip")
    train = importlib.import_module("open_clip_train.train")
    options = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": size}
    args = types.SimpleNamespace(
        **{"device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1, "skip_scheduler": True},
        **{"horovod": False, "grad_clip_norm": None, "log_every_n_steps": 1000, "batch_size": 32 // size},
        **{"world_size": size, "rank": rank, "local_rank": rank, "log_local": False, "wandb": False},
    )
    curves = []
    for kind in (ours.ClipLoss, ours.open_clip.loss.ClipLoss):
        torch.manual_seed(0)
        model = ours.open_clip.model.CLIP(
            16,
            {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
            {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
            output_dict=True,
        )
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        wrapped = nn.parallel.DistributedDataParallel(model) if size > 1 else model
        loss = Recorded(kind(**options))
        data = {"train": types.SimpleNamespace(set_epoch=lambda _: None, dataloader=Pairs(rank, size))}
        train.train_one_epoch(wrapped, data, loss, 0, optimizer, None, None, None, args)
        curves.append(loss.values)
    return curves


@pytest.mark.parametrize("size", [1, 2])
def test_open_clip_train(size):
    pytest.importorskip("open_clip_train")
    found = ranks(size).run(open_clip_curves) if size > 1 else [open_clip_curves(0, 1)]
    for mine, theirs in found:
        assert_same_curve(mine, theirs)


def test_sim_clr_of_lightly_in_lightning():
    lightning = pytest.importorskip("pytorch_lightning")
    pytest.importorskip("lightly")
    modules = [importlib.import_module(name) for name in ("contrastive_ops.integrations.lightly", "lightly.loss")]
    heads = importlib.import_module("lightly.models.modules.heads")

    class SimCLR(lightning.LightningModule):
        def __init__(self, loss):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32))
            self.head = heads.SimCLRProjectionHead(32, 32, 16)
            self.loss = loss

        def training_step(self, batch, _):
            return self.loss(*(self.head(self.backbone(view)) for view in batch))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 3e-3)

    draw = torch.Generator().manual_seed(0)
    points = torch.randn(STEPS * 32, 24, generator=draw)
    views = [points + 0.5 * torch.randn(points.shape, generator=draw) for _ in range(2)]
    curves = []
    for module in modules:
        torch.manual_seed(0)
        loss = Recorded(module.NTXentLoss(0.2))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*views), 32)
        silent = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"), False
        )
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **silent)
        trainer.fit(SimCLR(loss), loader)
        curves.append(loss.values)
    assert_same_curve(*curves)


def test_mixtral_in_the_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ours = importlib.import_module("contrastive_ops.integrations.transformers")
    config = transformers.MixtralConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2},
        **{"output_router_logits": True, "router_aux_loss_coef": 0.02, "max_position_embeddings": 32},
    )
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 60, (STEPS * 8, 1), generator=draw)
    ids = (starts + 7 * torch.arange(16)) % 61  # each token says what the next one is
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1}
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    curves = []
    for implementation in (ours.NAME, "eager"):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config)
        model.set_experts_implementation(implementation)
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(output_dir=str(tmp_path), **options),
            train_dataset=data,
        )
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    # A token that moves to another expert in one of both runs alone changes more than digits.
    assert_same_curve(*curves, tolerance=3e-2)
