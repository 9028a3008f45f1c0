"""Resumed runs equal uninterrupted ones bit for bit; sparse runs resume dense checkpoints and the reverse."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback, ModelCheckpoint
from lightning_sparse.conformance._processes import Died, call
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require

GROUP = "resume"
EPOCHS, STEPS = 4, 16  # of the toy runs: four batches per epoch


def _keeper(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)


def _run(subject: Subject, *neighbours: Callback, seed: int = 0, mid: bool = False, **options: Any) -> dict[str, Any]:
    """Fit, and return the final weights, optimiser states and callback states."""
    module = subject.model(decay=STEPS, seed=seed)
    loader = toys.Stateful(toys.data()) if mid else toys.data()
    trainer = subject.fit(module, *neighbours, loader=loader, epochs=EPOCHS, **options)
    own = [callback.state_dict() for callback in trainer.callbacks if callback not in neighbours]  # type: ignore[attr-defined]
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return {"weights": dict(module.state_dict()), "optimisers": optimizers, "callbacks": own}


def first_difference(a: Any, b: Any, path: str = "") -> str:
    """Return the path of the first bitwise difference between two nested states, or an empty string."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return "" if a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) else path
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((inner for key in a if (inner := first_difference(a[key], b[key], f"{path}[{key!r}]"))), "")
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return next((inner for i in range(len(a)) if (inner := first_difference(a[i], b[i], f"{path}[{i}]"))), "")
    if isinstance(a, (dict, list, tuple)):
        return path
    return "" if type(a) is type(b) and (a is b or bool(a == b) or a != a) else path


def _without(subject: Subject) -> Subject:
    return Subject("nothing", tuple, subject.optimizer)


def _compare(subject: Subject, folder: Path, mid: bool, **when: Any) -> None:
    """Compare a run with the runs resumed from each of its checkpoints; a run without the subject is the control."""
    for one, name in ((_without(subject), "control"), (subject, "own")):
        uninterrupted = _run(one, _keeper(folder / name, **when), mid=mid, enable_checkpointing=True)
        for path in sorted((folder / name).glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2])):
            _same(one is subject, path, uninterrupted, _run(one, seed=1, mid=mid, ckpt_path=path))


def _same(own: bool, path: Path, uninterrupted: dict[str, Any], resumed: dict[str, Any]) -> None:
    difference = first_difference(uninterrupted, resumed)
    if difference and not own:
        raise NotApplicable(f"Lightning's own run, resumed from {path.stem}, differs at {difference}")
    counts = f"zeros {_zeros(uninterrupted)} and {_zeros(resumed)}"
    require(not difference, f"resumed from {path.stem}, the final state differs at {difference}; {counts}")


def _zeros(run: dict[str, Any]) -> int:
    return sum(int((w == 0).sum()) for w in run["weights"].values() if w.dim() > 1)


@check("a run resumed at the end of an epoch equals the uninterrupted one bit for bit", GROUP)
def resume_at_an_epochs_end(subject: Subject, folder: Path) -> None:
    _compare(subject, folder, mid=False, every_n_epochs=1)


@check("a run resumed within an epoch, with a stateful loader, equals the uninterrupted one bit for bit", GROUP)
def resume_within_an_epoch(subject: Subject, folder: Path) -> None:
    _compare(subject, folder, mid=True, every_n_train_steps=3, save_on_train_epoch_end=False)


class _Killer(Callback):
    """Kill the process at an optimiser step with SIGKILL, like kill -9."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _until_killed(subject: Subject, folder: Path, step: int) -> None:
    _run(subject, _Killer(step), _keeper(folder, every_n_epochs=1), enable_checkpointing=True)


@check("a run resumed after kill -9 equals the uninterrupted one bit for bit", GROUP, slow=True)
def resume_after_a_kill(subject: Subject, folder: Path) -> None:
    try:
        call(_until_killed, (subject, folder, 10))
    except Died as died:
        require(died.code == -signal.SIGKILL, f"the run was not killed: {died}")
    newest = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    _same(True, newest, _run(subject), _run(subject, seed=1, ckpt_path=newest))


class _Smaller(Callback):
    """Limit the file size to half of the next checkpoint, so that SIGXFSZ kills the process while it writes."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            import resource

            size = max(path.stat().st_size for path in self.folder.glob("*.ckpt"))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))


def _until_writing(subject: Subject, folder: Path) -> None:
    keeper = ModelCheckpoint(folder, filename="one", enable_version_counter=False, every_n_epochs=1)
    _run(subject, _Smaller(6, folder), keeper, enable_checkpointing=True)


@check("a kill during a save leaves the previous checkpoint intact, and the run resumes from it", GROUP, slow=True)
def resume_after_a_kill_while_writing(subject: Subject, folder: Path) -> None:
    try:
        call(_until_writing, (subject, folder))
    except Died as died:
        require(died.code == -signal.SIGXFSZ, f"the run was not killed: {died}")
    path = folder / "one.ckpt"
    step = torch.load(path, weights_only=True)["global_step"]
    require(step == 4, f"the file on disk is from step {step}, expected the intact one from step 4")
    _same(True, path, _run(subject), _run(subject, seed=1, ckpt_path=path))


@check("a dense run continues from a sparse run's checkpoint, and a sparse run from a dense run's", GROUP)
def dense_and_sparse_files_are_exchanged(subject: Subject, folder: Path) -> None:
    other = _without(subject)
    for first, second, name in ((subject, other, "sparse"), (other, subject, "dense")):
        trainer = first.fit(first.model(), epochs=2)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        resumed = second.fit(second.model(seed=1), epochs=4, ckpt_path=folder / f"{name}.ckpt")
        require(resumed.global_step == STEPS, f"continued from a {name} checkpoint, the run ended at step {resumed.global_step} of {STEPS}")
