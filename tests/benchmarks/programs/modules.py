"""Modules with networks and losses of lightly, timm, transformers and peft."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from programs.measure import Program, Trained

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits as images of 8 x 8: 1400 to train on, 397 to test on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


def fit(package: Any, module: Any, loader: Any, callbacks: list[Any], folder: Path, error: Callable[[Any], float], epochs: int) -> Trained:
    """Fit with a Trainer of ``package`` and its default checkpoint callback; the file is that of the last epoch."""
    trainer = package.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=callbacks, **QUIET)
    trainer.fit(module, loader)
    path = trainer.checkpoint_callback.best_model_path
    loaded = type(module).load_from_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    return Trained(module, state, loaded, error(module), error(loaded))


def _timm(callbacks: list[Any], folder: Path) -> Trained:
    import pytorch_lightning as package
    import timm

    x, y, x_test, y_test = _digits()

    class Classifier(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = timm.create_model("test_vit", pretrained=False, img_size=8, patch_size=2, depth=2, in_chans=1, num_classes=10)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.network(images)
            return out

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), 3e-3, weight_decay=0.01)
            total = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=int(total))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def error(module: Any) -> float:
        return float((module.eval()(x_test).argmax(1) != y_test).float().mean())

    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    return fit(package, Classifier(), loader, callbacks, folder, error, epochs=10)


def _lightly(callbacks: list[Any], folder: Path) -> Trained:
    """SimCLR on digits: two noisy views of each image; the error is that of the nearest of 1400 embeddings."""
    import pytorch_lightning as package
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    x, y, x_test, y_test = _digits()

    class SimCLR(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(
                nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64)
            )
            self.projection_head = SimCLRProjectionHead(64, 64, 32)
            self.criterion = NTXentLoss(0.5)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.projection_head(self.backbone(images))
            return out

        def training_step(self, batch: Any, index: int) -> Tensor:
            first, second = (self._view(batch[0]) for _ in range(2))
            loss: Tensor = self.criterion(self(first), self(second))
            self.log("train/loss", loss)
            return loss

        def _view(self, images: Tensor) -> Tensor:
            shift = torch.randint(-1, 2, (2,)).tolist()
            return torch.roll(images, shift, (2, 3)) + 0.3 * torch.randn_like(images)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 3e-3)

    @torch.no_grad()
    def error(module: Any) -> float:
        known, asked = (nn.functional.normalize(module.eval().backbone(images)) for images in (x, x_test))
        return float((y[(asked @ known.T).argmax(1)] != y_test).float().mean())

    loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True, drop_last=True)
    return fit(package, SimCLR(), loader, callbacks, folder, error, epochs=12)


VOCABULARY, LENGTH = 24, 16


def _sentences(count: int, seed: int, strides: tuple[int, int] = (1, 4)) -> Tensor:
    """Walks of one of three strides round the vocabulary, one token in twenty at random: a next token that can be learned."""
    rng = np.random.default_rng(seed)
    start, stride = rng.integers(VOCABULARY, size=(count, 1)), rng.integers(*strides, size=(count, 1))
    walk = (start + stride * np.arange(LENGTH)) % VOCABULARY
    odd = rng.random(walk.shape) < 0.05
    return torch.from_numpy(np.where(odd, rng.integers(VOCABULARY, size=walk.shape), walk))


def _language(make: Callable[[], nn.Module], strides: tuple[int, int] = (1, 4)) -> Callable[[list[Any], Path], Trained]:
    """A causal language model of transformers in a module of lightning.pytorch, fed by a collator that returns a BatchEncoding."""

    def train(callbacks: list[Any], folder: Path) -> Trained:
        from transformers import BatchEncoding

        class Language(lightning.pytorch.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = make()

            def training_step(self, batch: Any, index: int) -> Tensor:
                loss: Tensor = self.model(**batch).loss
                self.log("train/loss", loss)
                return loss

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), 3e-3)

        test = _sentences(200, 1, strides)

        @torch.no_grad()
        def error(module: Any) -> float:
            return float(module.eval().model(input_ids=test, labels=test).loss)

        def collate(rows: list[Tensor]) -> Any:
            ids = torch.stack(rows)
            return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})

        loader = DataLoader(_sentences(1000, 0, strides), batch_size=50, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
        return fit(lightning.pytorch, Language(), loader, callbacks, folder, error, epochs=10)

    return train


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=48, n_layer=2, n_head=4))


@functools.cache
def _learnt() -> dict[str, Tensor]:
    """The weights of a dense Llama that has learnt walks of strides 1 to 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, sentences = _llama(), _sentences(1000, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for rows in sentences.repeat(10, 1).split(50):
            optimizer.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
    return model.state_dict()


def _adapted() -> nn.Module:
    """A learnt Llama with LoRA on all of its linear layers, as ``get_peft_model`` makes it, to be tuned for other strides."""
    from peft import LoraConfig, get_peft_model

    model = _llama()
    model.load_state_dict(_learnt())
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))  # type: ignore[arg-type]


UNIFORM = math.log(VOCABULARY)
PROGRAMS = [
    Program("lightly (SimCLR)", "lightly", "pytorch_lightning", "kNN error", 0.9, _lightly),
    Program("timm (ViT)", "timm", "pytorch_lightning", "error", 0.9, _timm),
    Program("transformers (Llama)", "transformers", "lightning.pytorch", "cross-entropy", UNIFORM, _language(_llama)),
    Program("transformers (GPT-2)", "transformers", "lightning.pytorch", "cross-entropy", UNIFORM, _language(_gpt2), select=("*",)),
    Program("peft (LoRA on Llama)", "peft", "lightning.pytorch", "cross-entropy", UNIFORM, _language(_adapted, (4, 7))),
]
