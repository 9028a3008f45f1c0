"""Lightning's two packages, ``lightning.pytorch`` and ``pytorch_lightning``, in one process."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.conformance import _lightning, toys
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require
from lightning_sparse.conformance.life_cycle import require_zeros

GROUP = "models"


class _Steps:
    """A mixin with the toy's network and steps, for a LightningModule of either package."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.make = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), make

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val/loss", self.training_step(batch, index))  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())  # type: ignore[attr-defined]


def _trained(subject: Subject, package: Any, folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """Fit with classes of ``package`` only; return the module and the state_dict of its last file."""
    module = type("Model", (_Steps, package.LightningModule), {})(subject.optimizer or toys.Toy().make)
    keeper = package.callbacks.ModelCheckpoint(folder, monitor="val/loss", save_top_k=-1, save_last=True)
    trainer = package.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=package.loggers.CSVLogger(folder),
        callbacks=[*subject.callbacks(), keeper],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, toys.data(), toys.data(seed=1))
    state: dict[str, Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return module, state


@check("classes of Lightning's other package in the same process: the same weights and files", GROUP)
def both_packages_train_alike(subject: Subject, folder: Path) -> None:
    other = _lightning.other()
    if other is None:
        raise NotApplicable("Lightning's other package is not installed")
    own, own_file = _trained(subject, importlib.import_module(_lightning.NAME), folder / "own")
    module, file = _trained(subject, other, folder / "other")
    require_zeros(module, f" under {other.__name__}")
    for name, w in own.named_parameters():
        require(torch.equal(w, module.get_parameter(name)), f"the final {name} differs under {other.__name__}")
    require(file.keys() == own_file.keys(), f"the file's keys under {other.__name__} are {sorted(file)}")
    different = [name for name, w in own_file.items() if not torch.equal(w, file[name])]
    require(not different, f"the file under {other.__name__} contains other values of {different[:5]}")
