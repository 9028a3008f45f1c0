"""Uses of layers in a step: by keyword, not in every batch, with empty inputs, in evaluation mode; and export during a run."""

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
from lightning_sparse.conformance.life_cycle import require_zeros
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


@check("layers with keyword inputs train like others", GROUP)
def layers_called_by_keyword(subject: Subject, folder: Path) -> None:
    ends = []
    for network in (_ByPosition, _ByKeyword):
        torch.manual_seed(0)
        module = subject.model(network())
        subject.fit(module, epochs=2)
        ends.append({name: p.detach().clone() for name, p in module.named_parameters()})
    close(ends[0], ends[1], "called by keyword")


class _Experts(nn.Module):
    """Two experts; the second one gets no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.last = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)]), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > -9
        out: Tensor = self.last(functional.relu(torch.cat([self.experts[0](x[first]), self.experts[1](x[~first])])))
        return out


@check("a layer with an empty input, such as an expert without tokens", GROUP)
def layers_without_rows(subject: Subject, folder: Path) -> None:
    module = subject.model(_Experts())
    subject.fit(module, epochs=4)
    require(all(bool(torch.isfinite(p).all()) for p in module.parameters()), "a weight is not finite after fit")
    require_zeros(module)


class _Heads(toys.Toy):
    """Two heads for two tasks. Each batch uses one of them, or both if ``together``."""

    together = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        hidden = functional.relu(self.network[0](batch[0]))  # type: ignore[index]
        heads = (1, 2) if self.together else (1 + index % 2,)
        return torch.stack([self.loss(self.network[head](hidden), batch[1]) for head in heads]).mean()  # type: ignore[index]


class _Moved(Callback):
    """Record the names of weights that differ between the forward and the end of the previous batch."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.names: set[str] = set()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.before = {name: w.clone() for name, w in matrices(module).items()}

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        now = matrices(module)
        self.names |= {name for name, w in self.before.items() if name in now and not torch.equal(w, now[name])}


@check("a layer that some batches do not use is treated like a layer used in every batch", GROUP)
def layers_not_used_in_each_batch(subject: Subject, folder: Path) -> None:
    moved = []
    for together in (True, False):
        build = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 3)])
        model = subject.model(build)
        module = _Heads(build, model.make)
        module.together, seen = together, _Moved()
        subject.fit(module, seen, epochs=4, limit_val_batches=0)
        moved.append(seen.names)
    require(
        moved[0] == moved[1],
        f"weights changed between the previous batch and the forward: {sorted(moved[1])}; if used in each batch: {sorted(moved[0])}",
    )


class _Looks(toys.Toy):
    """Run a forward in evaluation mode without gradients before and after each training forward."""

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
    """Record the network's outputs at the end of each batch."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.outputs.append(module(module.x).detach().clone())


@check("a forward in evaluation mode without gradients, inside a training step, has no noise", GROUP)
def no_noise_in_evaluation_within_a_step(subject: Subject, folder: Path) -> None:
    module, own = _Looks(optimizer=subject.model().make), _Own()
    module.seen, module.x = [], torch.randn(5, 8)
    subject.fit(module, own, epochs=3, limit_val_batches=0)
    per_epoch = len(own.outputs) // 3
    for i, expected in enumerate(own.outputs[:-1]):
        if (i + 1) % per_epoch:  # not after the last batch of an epoch, because epoch hooks may change weights
            for output in module.seen[2 * i + 2 : 2 * i + 4]:
                require(torch.equal(output, expected), f"batch {i + 1}: the output differs from that of the live weights")


class _Export(Callback):
    """Export the network by three methods, at the end of a batch, of an epoch and of validation."""

    def __init__(self) -> None:
        self.x, self.problems = torch.randn(4, 8), list[str]()

    def export(self, module: Any, when: str) -> None:
        ways: dict[str, Callable[[], Any]] = {
            "torch.jit.script": lambda: torch.jit.script(module.network),
            "to_torchscript by tracing": lambda: module.to_torchscript(method="trace", example_inputs=self.x),
            "torch.export": lambda: torch.export.export(module.network, (self.x,)).module(),
        }
        training = module.training
        module.eval()
        expected = module(self.x).detach()
        for way, make in ways.items():
            try:
                output = make()(self.x).detach()
                self.problems += [] if torch.allclose(output, expected, atol=1e-5) else [f"{way} at {when} computes something else"]
            except Exception as error:
                self.problems.append(f"{way} at {when}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        module.train(training)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 1:
            self.export(module, "a batch's end")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.export(module, "validation's end")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.export(module, "an epoch's end")


@check("the module can be scripted, traced and exported during a run", GROUP)
def exported_in_mid_run(subject: Subject, folder: Path) -> None:
    exports = _Export()
    subject.fit(subject.model(), exports, epochs=1, num_sanity_val_steps=0)
    require(not exports.problems, "; ".join(exports.problems[:2]))
