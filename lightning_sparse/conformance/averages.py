"""Together with EMAWeightAveraging or StochasticWeightAveraging, in either order: the averaged weights are sparse and correct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback, ModelCheckpoint, StochasticWeightAveraging, callbacks
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require
from lightning_sparse.conformance.resume import first_difference

GROUP = "neighbours"
DECAY, EPOCHS, STEPS = 0.5, 4, 16  # four batches per epoch
ORDERS = ((True, "before the averaging callback"), (False, "after the averaging callback"))


def _ema() -> Callback:
    if not hasattr(callbacks, "EMAWeightAveraging"):
        raise NotApplicable("this version of Lightning has no EMAWeightAveraging")
    made: Callback = callbacks.EMAWeightAveraging(decay=DECAY)
    return made


def _swa() -> Callback:
    return StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Copy the weights in use by the linear layers, by their plain names."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    return {f"{name}.weight": layer.weight.detach().clone() for name, layer in layers.items()}


class _Reference(Callback):
    """Compute the averages independently: EMA after each step, SWA at the start of each epoch; record the weights in validation."""

    def __init__(self) -> None:
        self.ema: dict[str, Tensor] = {}
        self.starts: list[dict[str, Tensor]] = []
        self.seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # (weights in validation, expected average)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.starts.append(matrices(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        now = matrices(pl_module)
        self.ema = {name: torch.lerp(w, self.ema.get(name, w), DECAY) for name, w in now.items()}

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append((matrices(pl_module), self.ema))


def _thresholded(evaluated: dict[str, Tensor], average: dict[str, Tensor], where: str) -> None:
    """Check that ``evaluated`` equals ``average`` except for some zeros."""
    zeros = sum(int((w == 0).sum()) for w in evaluated.values())
    require(0 < zeros < 176, f"{where}: {zeros} of 176 weights are zero; some but not all should be zero")
    for name, w in evaluated.items():
        wrong = int((~torch.isclose(w, average[name], rtol=1e-4, atol=1e-6) & (w != 0)).sum())
        require(not wrong, f"{where}: {wrong} weights of {name} are neither the average's nor zero")


@check("EMAWeightAveraging, before or after the callback: the average is sparse in validation, in the file and after fit", GROUP)
def ema_is_sparse(subject: Subject, folder: Path) -> None:
    for first, order in ORDERS:
        reference, module = _Reference(), subject.model()
        keeper = ModelCheckpoint(folder / order, filename="{epoch}", save_top_k=-1)
        subject.fit(module, _ema(), reference, keeper, first=first, epochs=EPOCHS, enable_checkpointing=True)
        require(reference.seen, f"{order}: no validation took place")
        evaluated, average = reference.seen[-1]
        _thresholded(evaluated, average, f"validation, {order}")
        file = torch.load(folder / order / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)["state_dict"]
        for name, w in evaluated.items():
            require(name in file, f"the file, {order}, has no {name}; it has {sorted(file)}")
            require(torch.equal(file[name], w), f"the file, {order}: {name} differs from the evaluated weights")
        _thresholded(matrices(module), reference.ema, f"after fit, {order}")


@check("StochasticWeightAveraging, before or after the callback: the final average is sparse", GROUP)
def swa_is_sparse(subject: Subject, folder: Path) -> None:
    for first, order in ORDERS:
        reference, module = _Reference(), subject.model()
        subject.fit(module, _swa(), reference, first=first, epochs=EPOCHS)
        starts = reference.starts[1:]
        average = {name: torch.stack([start[name] for start in starts]).mean(0) for name in starts[0]}
        _thresholded(matrices(module), average, f"after fit, {order}")


@check("StochasticWeightAveraging updates batch norm statistics with the sparse average", GROUP)
def swa_renews_statistics(subject: Subject, folder: Path) -> None:
    for first, order in ORDERS:
        torch.manual_seed(0)
        layer, norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        network = nn.Sequential(layer, norm, nn.ReLU(), nn.Linear(16, 3))
        subject.fit(subject.model(network), _swa(), first=first, epochs=EPOCHS)
        require((layer.weight == 0).any(), f"no weight of the first layer is zero after fit, {order}")
        mean = torch.stack([layer(x).mean(0) for x, _ in toys.data()]).mean(0).detach()
        deviation = float((norm.state_dict()["running_mean"] - mean).abs().max())
        require(deviation < 1e-4, f"the running mean, {order}, differs by {deviation:.2g} from that of the final weights")


def _ends(one: Subject, average: Callback, seed: int, **options: Any) -> dict[str, Any]:
    """Fit, and return the final weights, average and optimiser states."""
    module = one.model(decay=STEPS, seed=seed)
    trainer = one.fit(module, average, *options.pop("more", ()), epochs=EPOCHS, **options)
    average_model = getattr(average, "_average_model", None)
    averaged = {} if average_model is None else dict(average_model.state_dict())
    return {"weights": dict(module.state_dict()), "average": averaged, "optimisers": [o.state_dict() for o in trainer.optimizers]}


def _differences(one: Subject, folder: Path, make: Any, first: bool) -> dict[str, str]:
    """Return, by checkpoint, the first difference between the uninterrupted run and the run resumed from the checkpoint."""
    keeper = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    uninterrupted = _ends(one, make(), 0, first=first, more=(keeper,), enable_checkpointing=True)
    paths = sorted(folder.glob("*.ckpt"))[1:]
    return {path.stem: first_difference(uninterrupted, _ends(one, make(), 1, first=first, ckpt_path=path)) for path in paths}


def _resumes(subject: Subject, folder: Path, make: Any) -> None:
    """Check that resumed runs end equal, for every checkpoint from which Lightning alone resumes exactly."""
    # Lightning alone is not exact from the checkpoint of a finished run, because it does not restore the average
    control = _differences(Subject("nothing", tuple, subject.optimizer), folder / "control", make, True)
    if all(control.values()):
        raise NotApplicable(f"Lightning's own run, resumed, differs at {next(iter(control.values()))}")
    for first, order in ORDERS:
        own = _differences(subject, folder / order, make, first)
        for file in (file for file, difference in control.items() if not difference):
            require(not own[file], f"resumed from {file}, {order}, the final state differs at {own[file]}")


@check("EMAWeightAveraging: a resumed run equals the uninterrupted one bit for bit, and so does its average", GROUP, slow=True)
def ema_resumes(subject: Subject, folder: Path) -> None:
    _resumes(subject, folder, _ema)


@check("StochasticWeightAveraging: a resumed run equals the uninterrupted one bit for bit, and so does its average", GROUP, slow=True)
def swa_resumes(subject: Subject, folder: Path) -> None:
    _resumes(subject, folder, _swa)
