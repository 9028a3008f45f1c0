"""Changes of a module during a run: copy, pickle, cast to another dtype, torch.compile."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.conformance import _networks, toys
from lightning_sparse.conformance._lightning import LightningModule
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import zeros
from lightning_sparse.conformance.models import GROUP, LOOSE
from lightning_sparse.conformance.steps import matrices, own_steps


class Portable(LightningModule):
    """A module that can be pickled, because it has no lambda or local function as an attribute."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.make = _networks.plain(), optimizer or partial(torch.optim.Adam, lr=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def _pickled(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@check("a copy or pickle of the module during a run is a plain module with the same weights, and the run is not affected", GROUP)
def copies_in_mid_run_are_plain(subject: Subject, folder: Path) -> None:
    copies: list[tuple[str, Any, dict[str, Tensor]]] = []

    def look(moment: str, module: Any) -> None:
        for kind, make in (("copy", copy.deepcopy), ("pickle", _pickled)):
            copies.append((f"{kind} at {moment}", make(module), toys.weights(module)))

    disturbed, alone = Portable(subject.optimizer), Portable(subject.optimizer)
    subject.trainer(toys.Spy(look)).fit(disturbed, toys.data())
    subject.trainer().fit(alone, toys.data())
    for name, w in toys.weights(alone).items():
        require(torch.equal(w, disturbed.get_parameter(name)), f"with copies made during the run, the final {name} differs")
    keys = list(Portable().state_dict())
    for where, made, before in copies:
        require(list(made.state_dict()) == keys, f"the {where} has the keys {list(made.state_dict())}")
        _is_plain(where, made, before)


def _is_plain(where: str, made: Any, before: dict[str, Tensor]) -> None:
    """Check that a copy has the same outputs and gradients as a plain network with the same parameters."""
    twin, x = _networks.plain(), torch.randn(4, _networks.FEATURES)
    twin.load_state_dict({name.removeprefix("network."): w for name, w in before.items()})
    made.train()
    require(torch.equal(made(x), twin(x)), f"the {where} has other outputs than a plain network with the same weights")
    made(x).square().sum().backward()
    twin(x).square().sum().backward()
    for name, parameter in twin.named_parameters():
        grad: Any = made.network.get_parameter(name).grad
        require(torch.equal(grad, torch.as_tensor(parameter.grad)), f"the {where} has other gradients than a plain network")


class Widening(toys.Toy):
    """Convert the module to float64 at the start of the second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.to(torch.float64)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return super().training_step((batch[0].to(self.dtype), batch[1]), index)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        super().validation_step((batch[0].to(next(self.parameters()).dtype), batch[1]), index)


@check("the module may be cast to another dtype during a run", GROUP)
def a_change_of_dtype_is_followed(subject: Subject, folder: Path) -> None:
    own_steps(subject)
    module = Widening(optimizer=LOOSE)
    before = {name: id(p) for name, p in module.named_parameters()}
    subject.fit(module, epochs=3)
    require(all(p.dtype == torch.float64 for p in module.parameters()), "the weights are not all float64 after fit")
    require({name: id(p) for name, p in module.named_parameters()} == before, "a parameter was replaced")
    size = sum(w.numel() for w in matrices(module).values())
    require(0 < zeros(module) < size, f"{zeros(module)} of {size} weights are zero after fit; some but not all should be zero")


def graphs() -> int:
    """Return the number of graphs compiled so far by torch.compile."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _count_graphs(made: list[int], moment: str, _: Any) -> None:
    if moment == "batch end":
        made.append(graphs())


@check("torch.compile: the model ends with exact zeros, and steps do not recompile it", GROUP, slow=True)
def compiled_models_end_sparse(subject: Subject, folder: Path) -> None:
    for name, compile_ in COMPILED.items():
        torch._dynamo.reset()
        module = subject.model()
        made: list[int] = []
        subject.trainer(toys.Spy(partial(_count_graphs, made)), epochs=4).fit(compile_(module), toys.data(), toys.data(seed=1))
        require(0 < zeros(module) < 176, f"{name}: {zeros(module)} of 176 weights are zero; some but not all should be zero")
        require(made[-1] == made[7] > 0, f"{name}: graphs compiled by the end of each batch: {made}")


def _inside(module: toys.Toy) -> Any:
    module.network = torch.compile(module.network)  # type: ignore[assignment]
    return module


def _in_place(module: toys.Toy) -> Any:
    module.compile()
    return module


COMPILED: dict[str, Callable[[toys.Toy], Any]] = {
    "torch.compile of the network": _inside,
    "torch.compile of the LightningModule": torch.compile,
    "module.compile()": _in_place,
}
