"""Manual optimisation: several optimisers, several backward passes per step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import LightningModule
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import zeros
from lightning_sparse.conformance.steps import GROUP, Make, matrices, some_zeros


class TwoOptimizers(toys.Toy):
    """Manual optimisation with one optimiser per layer. They step in turn, each after its own forward and backward."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        layers: Any = self.network
        return [self.make(layers[i].parameters()) for i in (0, 2)]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()


@check("manual optimisation with several optimisers: zeros in the weights of each", GROUP)
def several_optimizers_end_sparse(subject: Subject, folder: Path) -> None:
    module = TwoOptimizers(**({"optimizer": subject.optimizer} if subject.optimizer else {}))
    subject.fit(module, epochs=4)
    some_zeros(module, "after fit")
    for name, w in matrices(module).items():
        require((w == 0).any(), f"no weight of {name} is zero")


class Gan(LightningModule):
    """A GAN. The discriminator takes one step after two backward passes, for real and for generated samples.

    ``make`` makes the optimiser of each network. ``toggle_optimizer`` keeps the generator's loss from adding gradients to the
    discriminator.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, noise: Iterable[int], make: Make | None = None) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.noise, self.automatic_optimization = (*noise,), False
        self.make = make or partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))

    def configure_optimizers(self) -> Any:
        return [self.make(part.parameters()) for part in (self.generator, self.discriminator)]

    def _loss(self, samples: Tensor, label: float) -> Tensor:
        score = self.discriminator(samples)
        return nn.functional.binary_cross_entropy_with_logits(score, torch.full_like(score, label))

    def training_step(self, batch: Any, index: int) -> None:
        optimizers: Any = self.optimizers()
        of_generator, of_discriminator = optimizers
        z = torch.randn(len(batch[0]), *self.noise, device=self.device)
        self.toggle_optimizer(of_generator)
        of_generator.zero_grad()
        self.manual_backward(self._loss(self.generator(z), 1.0))
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.toggle_optimizer(of_discriminator)
        of_discriminator.zero_grad()
        self.manual_backward(self._loss(batch[0], 1.0))
        self.manual_backward(self._loss(self.generator(z).detach(), 0.0))
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)


def _layers(*sizes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.LeakyReLU(0.2), nn.Linear(sizes[1], sizes[2]))


@check("manual optimisation of a GAN, two backward passes before a step: zeros in both networks", GROUP)
def a_gan_ends_sparse(subject: Subject, folder: Path) -> None:
    torch.manual_seed(0)
    module = Gan(_layers(4, 16, 8), _layers(8, 16, 1), (4,), subject.optimizer)
    subject.trainer(epochs=4).fit(module, toys.data())
    for part in (module.generator, module.discriminator):
        count, size = zeros(part), sum(w.numel() for w in matrices(part).values())
        require(0 < count < size, f"{count} of {size} weights of a network are zero; some but not all should be zero")
    require(all(bool(torch.isfinite(p).all()) for p in module.parameters()), "a weight is not finite")
