"""Damaged checkpoints: a full disk, truncated files, flipped bits; and loading with weights_only=True."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import Any

import torch

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback, ModelCheckpoint
from lightning_sparse.conformance._processes import call
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.faults import EPOCHS, GROUP, STEP, Faulty, InjectedError, check_unchanged, faulty, raising
from lightning_sparse.conformance.resume import first_difference


class _Full(Callback):
    """Simulate a full disk after a step: limit the size of files to 1024 bytes."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == STEP:
            _limit(1024)


def _limit(size: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with EFBIG, like ENOSPC on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _save_on_full_disk(subject: Subject, folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the problem after a failed save (empty if none), and the final weights without and with the failure and a resume."""
    uninterrupted = faulty(subject)
    subject.fit(uninterrupted, epochs=EPOCHS)
    module, path = faulty(subject), folder / "one.ckpt"
    keeper = ModelCheckpoint(folder, filename="one", enable_version_counter=False, every_n_epochs=1, save_on_train_epoch_end=True)
    problem = _failed_save(subject, module, keeper)
    resumed = faulty(subject, seed=1)
    subject.fit(resumed, epochs=EPOCHS, ckpt_path=path)
    return problem, toys.weights(uninterrupted), toys.weights(resumed)


def _failed_save(subject: Subject, module: Faulty, keeper: Callback) -> str:
    import resource

    try:
        subject.fit(module, _Full(), keeper, epochs=EPOCHS, enable_checkpointing=True)
    except OSError as error:
        _limit(resource.RLIM_INFINITY)
        if error.errno != errno.EFBIG:
            raise
    else:
        return "the save did not fail"
    try:
        check_unchanged(module, "after a failed save")
    except AssertionError as error:
        return str(error)
    return ""


@check("a full disk during a save leaves the module and the previous checkpoint intact, and the run resumes from it", GROUP, slow=True)
def a_full_disk_while_saving(subject: Subject, folder: Path) -> None:
    ((problem, uninterrupted, resumed),) = call(_save_on_full_disk, (subject, folder))
    require(not problem, problem)
    step = torch.load(folder / "one.ckpt", weights_only=True)["global_step"]
    require(step == 4, f"the file on disk is from step {step}, expected the intact one from step 4")
    difference = first_difference(uninterrupted, resumed)
    require(not difference, f"resumed from the previous file, the final state differs from an uninterrupted run's at {difference}")


def _saved(subject: Subject, folder: Path) -> Path:
    trainer = subject.fit(subject.model())
    trainer.save_checkpoint(folder / "whole.ckpt")
    return folder / "whole.ckpt"


def _check_refused(subject: Subject, path: Path, what: str, loaded: bool = False) -> None:
    """Check that resuming raises before the first step and leaves the module unchanged, except for weights ``loaded`` by then."""
    module = faulty(subject, seed=1)
    module.prepare("training_step", raising(InjectedError()), step=0)
    try:
        subject.fit(module, epochs=EPOCHS, ckpt_path=path, num_sanity_val_steps=0)
    except InjectedError:
        require(False, f"{what} was resumed without an error")
    except Exception:
        if loaded:
            module.before["weights"] = toys.weights(module)
        check_unchanged(module, f"after {what} was refused")


@check("a checkpoint truncated at any point is refused before training", GROUP)
def truncated_files_are_refused(subject: Subject, folder: Path) -> None:
    raw = _saved(subject, folder).read_bytes()
    for share in (0.0, 0.01, 0.3, 0.7, 0.99):
        (folder / "cut.ckpt").write_bytes(raw[: int(share * len(raw))])
        _check_refused(subject, folder / "cut.ckpt", f"a file cut after {share:.0%}")


@check("a checkpoint with a flipped bit in a weight is refused before training", GROUP)
def flipped_bits_are_refused(subject: Subject, folder: Path) -> None:
    path = _saved(subject, folder)
    raw = path.read_bytes()
    weight = torch.load(path, weights_only=True)["state_dict"]
    first = next((w for w in weight.values() if w.dim() > 1 and w.any()), torch.zeros(1))
    require(first.any(), "the file's weights are all zero")
    place = raw.find(first.contiguous().numpy().tobytes())
    require(place > 0, "the weight's bytes are not found in the file")
    nonzero = first.flatten().nonzero().flatten().tolist()
    for index, bit in ((nonzero[0], 0), (nonzero[-1], 12), (nonzero[-1], 31)):
        flipped = bytearray(raw)
        flipped[place + 4 * index + bit // 8] ^= 1 << bit % 8
        (folder / "flipped.ckpt").write_bytes(bytes(flipped))
        _check_refused(subject, folder / "flipped.ckpt", "a file with a flipped bit", loaded=True)


@check("torch.load(weights_only=True) reads every file: saved during and after an epoch, after fit, after an exception", GROUP)
def files_load_safely(subject: Subject, folder: Path) -> None:
    module = faulty(subject)
    module.prepare("training_step", raising(InjectedError()), step=10)
    keeper = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    trainer = subject.trainer(keeper, epochs=EPOCHS, enable_checkpointing=True)
    try:
        trainer.fit(module, toys.data(), toys.data(seed=1))
    except InjectedError:
        trainer.save_checkpoint(folder / "after.ckpt")
    _saved(subject, folder)
    for path in sorted(folder.glob("*.ckpt")):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            require(False, f"{path.name}: {' '.join(str(error).split())[-200:]}")
    require(len([*folder.glob("*.ckpt")]) == 5, f"files: {sorted(path.name for path in folder.glob('*.ckpt'))}")
