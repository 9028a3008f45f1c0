"""How layers are used in a step: by keyword, not in each batch, with no rows, in evaluation; and modules exported in mid-run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import zeros
from lightning_sparse.conformance.steps import close, matrices

GROUP = "forwards"


class _ByPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(functional.relu(self.first(x)))
        return out


class _ByKeyword(_ByPosition):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(input=functional.relu(self.first(input=x)))
        return out


@check("layers whose input is given by keyword train as others do", GROUP)
def layers_called_by_keyword(subject: Subject, folder: Path) -> None:
    ends = []
    for network in (_ByPosition, _ByKeyword):
        torch.manual_seed(0)
        module = subject.model(network())
        subject.fit(module, epochs=2)
        ends.append({name: p.detach().clone() for name, p in module.named_parameters()})
    close(ends[0], ends[1], "called by keyword")


class _Experts(nn.Module):
    """The second expert gets no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.last = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)]), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > -9
        out: Tensor = self.last(functional.relu(torch.cat([self.experts[0](x[first]), self.experts[1](x[~first])])))
        return out


@check("a layer that gets no rows, such as an expert without tokens", GROUP)
def layers_without_rows(subject: Subject, folder: Path) -> None:
    module = subject.model(_Experts())
    subject.fit(module, epochs=4)
    require(all(bool(torch.isfinite(p).all()) for p in module.parameters()), "a weight is not finite after fit")
    require(zeros(module) > 0, "no weight is zero after fit")


class _Heads(toys.Toy):
    """A head each for two tasks; each batch is of one of them, or of both."""

    together = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        hidden = functional.relu(self.network[0](batch[0]))  # type: ignore[index]
        heads = (1, 2) if self.together else (1 + index % 2,)
        return torch.stack([self.loss(self.network[head](hidden), batch[1]) for head in heads]).mean()  # type: ignore[index]


class _Moved(Callback):
    """Names of the weights whose values in the forward differ from those that the batch before left."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.names: set[str] = set()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.before = {name: w.clone() for name, w in matrices(module).items()}

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        now = matrices(module)
        self.names |= {name for name, w in self.before.items() if name in now and not torch.equal(w, now[name])}


@check("a layer that some batches do not use is treated as one that each batch uses", GROUP)
def layers_not_used_in_each_batch(subject: Subject, folder: Path) -> None:
    moved = []
    for together in (True, False):
        build = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 3)])
        model = subject.model(build)
        module = _Heads(build, model.make)
        module.together, seen = together, _Moved()
        subject.fit(module, seen, epochs=4, limit_val_batches=0)
        moved.append(seen.names)
    odd = sorted(moved[0] ^ moved[1])
    require(
        not odd,
        f"in the forward, other values than the batch before left are in {sorted(moved[1])}; used in each batch: {sorted(moved[0])}",
    )


class _Looks(toys.Toy):
    """Runs itself in evaluation without gradients, before and after each training pass."""

    seen: list[Tensor]
    x: Tensor

    def look(self) -> None:
        self.eval()
        with torch.no_grad():
            self.seen.append(self(self.x).clone())
        self.train()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.look()
        loss = super().training_step(batch, index)
        self.look()
        return loss


class _Own(Callback):
    """The network's outputs once a batch has ended."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.outputs.append(module(module.x).detach().clone())


@check("in a training step, a forward in evaluation without gradients has no noise", GROUP)
def no_noise_in_evaluation_within_a_step(subject: Subject, folder: Path) -> None:
    module, own = _Looks(optimizer=subject.model().make), _Own()
    module.seen, module.x = [], torch.randn(5, 8)
    subject.fit(module, own, epochs=3, limit_val_batches=0)
    ends = len(own.outputs) // 3  # where others may still act: an epoch's last batch is left out
    for i, wanted in enumerate(own.outputs[:-1]):
        if (i + 1) % ends:
            for found in module.seen[2 * i + 2 : 2 * i + 4]:
                require(torch.equal(found, wanted), f"batch {i + 1}: the output is not that of the weights that the batch before left")


class _Export(Callback):
    """Exports the network by all ways, at a batch's end, an epoch's, and a validation's."""

    def __init__(self) -> None:
        self.x, self.said = torch.randn(4, 8), list[str]()

    def export(self, module: Any, when: str) -> None:
        ways: dict[str, Callable[[], Any]] = {
            "torch.jit.script": lambda: torch.jit.script(module.network),
            "to_torchscript by tracing": lambda: module.to_torchscript(method="trace", example_inputs=self.x),
            "torch.export": lambda: torch.export.export(module.network, (self.x,)).module(),
        }
        training = module.training
        module.eval()
        wanted = module(self.x).detach()
        for way, make in ways.items():
            try:
                found = make()(self.x).detach()
                self.said += [] if torch.allclose(found, wanted, atol=1e-5) else [f"{way} at {when} computes something else"]
            except Exception as error:
                self.said.append(f"{way} at {when}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        module.train(training)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 1:
            self.export(module, "a batch's end")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.export(module, "validation's end")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.export(module, "an epoch's end")


@check("the module is scripted, traced and exported in the middle of a run", GROUP)
def exported_in_mid_run(subject: Subject, folder: Path) -> None:
    seen = _Export()
    subject.fit(subject.model(), seen, epochs=1, num_sanity_val_steps=0)
    require(not seen.said, "; ".join(seen.said[:2]))
