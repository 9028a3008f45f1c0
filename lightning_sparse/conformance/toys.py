"""Small modules, data and a quiet Trainer, shared by the checks and the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse.conformance._lightning import Callback, LightningModule, Trainer


class Toy(LightningModule):
    """A LightningModule for any network and loss. ``optimizer`` is a function of the parameters.

    ``decay`` reduces the learning rate linearly to 0 over that many steps; True means over the whole run. Do not use True with
    a stateful loader: the Trainer then computes its length, and Lightning loses the loader's position.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, 1e-2),
        loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        seed: int = 0,
        decay: bool | int = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = network if network is not None else nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.make, self.loss, self.decay = optimizer, loss, decay

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network(x)
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val/loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        if not self.decay:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches) if self.decay is True else self.decay
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data(samples: int = 64, features: int = 8, classes: int = 3, batch_size: int = 16, seed: int = 0) -> DataLoader[Any]:
    """Build a loader of random inputs with labels from a linear map. Not shuffled, so that runs are comparable."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator)
    y = (x @ torch.randn(features, classes, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


class Stateful:
    """A loader that saves its position, so that Lightning resumes exactly in the middle of an epoch."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.batches, self.given, self.first = [*loader], 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        self.given, self.first = self.first, 0
        for batch in self.batches[self.given :]:
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["given"] % len(self.batches)


class Repeated:
    """A loader of the same batch, ``count`` times."""

    def __init__(self, batch: tuple[Tensor, Tensor], count: int = 1) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return iter([self.batch] * self.count)


def trainer(*callbacks: Callback, epochs: int = 2, **options: Any) -> Trainer:
    """Build a CPU Trainer that prints and writes nothing by default."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), log_every_n_steps=1, **(quiet | options))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def hooks(module: nn.Module) -> int:
    """Count the hooks on a module's submodules and parameters."""
    kinds: tuple[str, ...] = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
    )
    on_modules = sum(len(getattr(part, kind, {})) for part in module.modules() for kind in kinds)
    return on_modules + sum(len(parameter._backward_hooks or {}) for parameter in module.parameters())


class Spy(Callback):
    """Call ``look(moment, module)`` at every hook of a training batch. Put it last among the callbacks."""

    def __init__(self, look: Callable[[str, Toy], None]) -> None:
        self.look = look

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("batch start", pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("before backward", pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.look("after backward", pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("before step", pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("batch end", pl_module)
