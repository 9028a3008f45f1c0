"""At every hook: plain state_dict keys, the user's own parameters, no noise in files. Files load without the package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback, ModelCheckpoint
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require

GROUP = "files"
NOISY = ("on_train_batch_start", "training_step", "on_before_zero_grad", "on_before_backward")  # parameters may be noisy here
MOMENTS = (
    "on_train_start",
    "on_train_epoch_start",
    *NOISY,
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_exception",
)
Look = Callable[[str, Any, toys.Toy], None]  # moment, trainer, module


class AtEveryHook(Callback):
    """Call ``look`` at every hook. :class:`Watched` calls ``look`` in training_step."""

    def __init__(self, look: Look) -> None:
        self.look, self.blocked = look, False
        for moment in MOMENTS:
            setattr(self, moment, partial(self._at, moment))

    def _at(self, moment: str, trainer: Any, module: Any, *args: Any) -> None:
        if not self.blocked:  # not after a look has raised, because an error in on_exception would hide the first one
            self.blocked = True
            self.look(moment, trainer, module)
            self.blocked = False


class Watched(toys.Toy):
    """A toy that calls ``look`` in training_step, and may raise there at a given step."""

    look: Look | None = None
    fails_at = -1

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        if self.look is not None:
            self.look("training_step", self.trainer, self)
        if self.trainer.global_step == self.fails_at:
            raise InterruptedError("simulated power failure")
        return loss


def _watch(subject: Subject, look: Look, first: bool, fails_at: int = -1, **options: Any) -> Watched:
    """Fit two epochs and call ``look`` at every hook, after (``first``) or before the subject's callbacks."""
    module = Watched(**options)
    module.look, module.fails_at = look, fails_at
    trainer = subject.trainer(AtEveryHook(look), first=first)
    try:
        trainer.fit(module, toys.data(), toys.data(seed=1))
    except InterruptedError:
        require(fails_at >= 0, "the run was interrupted")
    return module


@check("state_dict keys, parameter objects and the module's class are unchanged at every hook", GROUP)
def plain_at_every_moment(subject: Subject, folder: Path) -> None:
    for first, fails_at in ((True, -1), (False, -1), (True, 5)):
        seen: dict[str, Any] = {}

        def look(moment: str, trainer: Any, module: toys.Toy, seen: dict[str, Any] = seen) -> None:
            now = [list(module.state_dict()), {name: id(p) for name, p in module.named_parameters()}, type(module)]
            for what, value in zip(("state_dict keys", "parameters", "class"), now, strict=True):
                require(seen.setdefault(what, value) == value, f"{what} at {moment}: {_short(value)}; before training {_short(seen[what])}")

        module = Watched(optimizer=subject.optimizer) if subject.optimizer else Watched()
        look("construction", None, module)
        module.look, module.fails_at = look, fails_at
        trainer = subject.trainer(AtEveryHook(look), first=first)
        with suppress(InterruptedError):
            trainer.fit(module, toys.data(), toys.data(seed=1))
        look("the end", None, module)


def _short(value: Any) -> str:
    return str(list(value))[:200] if isinstance(value, (list, dict)) else repr(value)


def _rate_zero(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.0)


def _clean(state: dict[str, Tensor], before: dict[str, Tensor], where: str) -> None:
    """Check that each weight is unchanged or zero: at a learning rate of 0 any other value is noise."""
    require(state.keys() == before.keys(), f"{where} has the keys {_short(list(state))}")
    for name, w in state.items():
        noisy = (w != before[name]) & (w != 0)
        require(not noisy.any(), f"{where}: {int(noisy.sum())} of {w.numel()} weights of {name} are neither the live ones nor zero")


AT_REST = ", at a learning rate of 0, where no step but the noise of masks changes a weight that is not zero"


def _no_noise(subject: Subject, folder: Path, first: bool, fails_at: int = -1) -> None:
    before = toys.weights(toys.Toy())
    count = 0

    def look(moment: str, trainer: Any, module: toys.Toy) -> None:
        nonlocal count
        count += 1
        path = folder / "now.ckpt"
        trainer.save_checkpoint(path)
        _clean(torch.load(path, weights_only=True)["state_dict"], before, f"the file saved at {moment}{AT_REST}")
        _clean(dict(module.state_dict()), before, f"state_dict() at {moment}{AT_REST}")
        if moment not in NOISY:
            _clean(toys.weights(module), before, f"the data at {moment}{AT_REST}")

    module = _watch(subject, look, first, fails_at, optimizer=_rate_zero)
    _clean(toys.weights(module), before, "the module after fit")
    require(count > 40, f"only {count} hooks were called")


@check("state_dict() and files contain live or thresholded weights at every hook, never noisy weights", GROUP)
def no_noise_at_any_moment(subject: Subject, folder: Path) -> None:
    if subject.optimizer:
        raise NotApplicable("the optimiser itself makes the zeros; a learning rate of 0 would switch it off")
    _no_noise(subject, folder, True)
    _no_noise(subject, folder, False)
    _no_noise(subject, folder, True, fails_at=7)


@check("validation evaluates the same weights that a checkpoint saved at that time contains", GROUP)
def validation_evaluates_the_file(subject: Subject, folder: Path) -> None:
    evaluated: list[dict[str, Tensor]] = []
    files: list[dict[str, Tensor]] = []

    def look(moment: str, trainer: Any, module: toys.Toy) -> None:
        if moment == "on_validation_batch_end":
            evaluated.append(toys.weights(module))
        if moment in ("on_validation_batch_end", "on_validation_end") and not trainer.sanity_checking:
            trainer.save_checkpoint(folder / "now.ckpt")
            files.append(torch.load(folder / "now.ckpt", weights_only=True)["state_dict"])

    subject.fit(subject.model(), AtEveryHook(look), num_sanity_val_steps=0)
    for file in files[:5]:
        for name, w in evaluated[0].items():
            require(name in file, f"the file has no {name}; it has {_short(list(file))}")
            different = int((file[name] != w).sum())
            require(not different, f"the file's {name} differs from the evaluated one in {different} of {w.numel()} weights")


def _equal_its_file(trainer: Any, module: toys.Toy, path: Path, where: str) -> None:
    trainer.save_checkpoint(path)
    file, own = torch.load(path, weights_only=True)["state_dict"], module.state_dict()
    require(file.keys() == own.keys(), f"the file written {where} has the keys {_short(list(file))}, the module {_short(list(own))}")
    for name, w in own.items():
        different = int((file[name] != w).sum())
        require(not different, f"the file written {where}: {name} differs from the module's in {different} of {w.numel()} weights")


@check("a file saved after fit, or after a failed fit, contains the module's weights, even if other weights were loaded since", GROUP)
def files_after_fit_hold_the_module(subject: Subject, folder: Path) -> None:
    module, keeper = subject.model(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = subject.fit(module, keeper, epochs=4, enable_checkpointing=True)
    _equal_its_file(trainer, module, folder / "end.ckpt", "right after fit")
    early = torch.load(folder / "epoch=0.ckpt", weights_only=True)["state_dict"]
    dense = toys.Toy(seed=9).state_dict()
    for state, what in ((early, "an earlier file's weights"), (dense, "a dense network's weights")):
        module.load_state_dict(state)
        _equal_its_file(trainer, module, folder / "later.ckpt", f"when {what} had been loaded after fit")
        subject.fit(subject.model(seed=1), epochs=6, ckpt_path=folder / "later.ckpt")
    other = toys.Toy(seed=8)
    trainer.validate(other, toys.data(seed=1), verbose=False)
    _equal_its_file(trainer, other, folder / "other.ckpt", "when another module had been validated after fit")
    subject.fit(subject.model(seed=1), epochs=6, ckpt_path=folder / "other.ckpt")
    failing = Watched(optimizer=subject.optimizer) if subject.optimizer else Watched()
    failing.fails_at = 13
    trainer = subject.trainer(epochs=4)
    with suppress(InterruptedError):
        trainer.fit(failing, toys.data(), toys.data(seed=1))
    failing.load_state_dict(dense)
    _equal_its_file(trainer, failing, folder / "failed.ckpt", "when a dense network's weights had been loaded after fit had failed")
    subject.fit(subject.model(seed=1), epochs=6, ckpt_path=folder / "failed.ckpt")


_PLAIN = """
import sys, torch
sys.modules.update({name: None for name in ("lightning_sparse", "lightning", "pytorch_lightning")})
file = torch.load(sys.argv[1], weights_only=True)
network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
network.load_state_dict({name.removeprefix("network."): w for name, w in file["state_dict"].items()}, strict=True)
print(sum(int((w == 0).sum()) for w in network.parameters() if w.dim() > 1))
"""


@check("the file loads into the plain module without this package and without Lightning", GROUP, slow=True)
def file_loads_without_the_package(subject: Subject, folder: Path) -> None:
    module = subject.model()
    trainer = subject.fit(module)
    trainer.save_checkpoint(folder / "end.ckpt")
    done = subprocess.run([sys.executable, "-c", _PLAIN, str(folder / "end.ckpt")], capture_output=True, text=True)
    require(done.returncode == 0, f"loading failed: {done.stderr.strip().splitlines()[-1:]}")
    zeros = sum(int((w == 0).sum()) for w in module.parameters() if w.dim() > 1)
    require(int(done.stdout) == zeros > 0, f"the loaded module has {done.stdout.strip()} zeros, the trained one {zeros}")
