"""What goes wrong in a run leaves the module as it was, and the files written before whole."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._processes import call
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require
from lightning_sparse.conformance.resume import first_difference

GROUP = "faults"
EPOCHS, STEP = 3, 6  # four batches an epoch; the step, in the second one, at which things go wrong
MOMENTS = (
    "on_train_batch_start",
    "training_step",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_validation_start",
    "validation_step",
    "on_save_checkpoint",
)


class Accident(Exception):
    """Raised in the user's code by these checks."""


class Unlucky(toys.Toy):
    """Remembers what it was at the end of each batch, and calls ``fault`` at a moment of a step."""

    before: dict[str, Any]

    def prepare(self, moment: str, fault: Callable[[Any], Any], step: int = STEP) -> None:
        """``fault`` is given what the moment's own hook returns, and its result replaces that."""
        own = getattr(self, moment)

        def hook(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            return fault(result) if self.trainer.global_step >= step else result

        setattr(self, moment, hook)

    def on_train_batch_end(self, *args: Any) -> None:
        self.before = _state(self) | {"hooks": self.before["hooks"]}


def _state(module: torch.nn.Module) -> dict[str, Any]:
    parameters = {name: id(parameter) for name, parameter in module.named_parameters()}
    return {"keys": list(module.state_dict()), "parameters": parameters, "hooks": toys.hooks(module), "weights": toys.weights(module)}


def _unlucky(subject: Subject, **options: Any) -> Unlucky:
    module = Unlucky(**(options | ({"optimizer": subject.optimizer} if subject.optimizer else {})))
    module.before = _state(module)
    return module


def _is_as_before(module: Unlucky, when: str) -> None:
    """Keys, parameter objects, hooks and weights are those at the end of the batch before."""
    now = _state(module)
    for what in ("keys", "parameters", "hooks"):
        require(now[what] == module.before[what], f"{when}, the {what} are {now[what]}; before {module.before[what]}")
    odd = [name for name, w in module.before["weights"].items() if not torch.equal(w, now["weights"][name])]
    require(not odd, f"{when}, {odd} are not those at the end of the batch before")


def _fails(error: BaseException) -> Callable[[Any], Any]:
    def fault(result: Any) -> Any:
        raise error

    return fault


@check("an exception in the user's code, at any hook, leaves weights as before the batch, plain keys and no hook", GROUP)
def an_exception_leaves_the_module(subject: Subject, folder: Path) -> None:
    for moment in MOMENTS:
        module = _unlucky(subject)
        module.prepare(moment, _fails(Accident()))
        try:
            subject.fit(module, ModelCheckpoint(folder / moment), enable_checkpointing=True, num_sanity_val_steps=0)
        except Accident:
            _is_as_before(module, f"after an exception in {moment}")
        else:
            raise NotApplicable(f"an exception in {moment} does not reach the caller")


@contextmanager
def _interruptible() -> Any:
    """Lightning switches Ctrl-C off for good while it shuts down; here it comes back."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _after_ctrl_c(subject: Subject) -> str:
    module = _unlucky(subject)
    module.prepare("on_after_backward", _fails(KeyboardInterrupt()))
    with _interruptible(), suppress(SystemExit):
        subject.fit(module)
    try:
        _is_as_before(module, "after Ctrl-C")
    except AssertionError as error:
        return str(error)
    return ""


@check("so does Ctrl-C", GROUP, slow=True)
def ctrl_c_leaves_the_module(subject: Subject, folder: Path) -> None:
    (odd,) = call(_after_ctrl_c, (subject,))
    require(not odd, odd)


def _stops(subject: Subject, module: Unlucky, what: str) -> None:
    """The run raises FloatingPointError or ValueError; before the batch its weights were finite."""
    try:
        subject.fit(module)
    except (FloatingPointError, ValueError) as error:
        require("nan" in str(error).lower() or "inf" in str(error).lower(), f"{what}: the error does not say so: {error}")
    else:
        harmed = [name for name, w in toys.weights(module).items() if not bool(w.isfinite().all())]
        require(False, f"{what} went unnoticed to the end of the run; not finite in the end: {harmed}")
    _is_as_before(module, f"after {what}")


@check("a loss that is not finite ends the run, with the weights of before that batch and no hook left", GROUP)
def a_loss_that_is_not_finite(subject: Subject, folder: Path) -> None:
    for value in (torch.nan, torch.inf):
        module = _unlucky(subject)
        module.prepare("training_step", partial(torch.mul, value))
        _stops(subject, module, f"a loss of {value}")


class _Steep(torch.autograd.Function):
    """The identity, with a slope that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.slope, None


def _steep(slope: float, loss: Tensor) -> Any:
    return _Steep.apply(loss, slope)


@check("gradients that are not finite, of a loss that is, end the run before they reach a weight", GROUP)
def gradients_that_are_not_finite(subject: Subject, folder: Path) -> None:
    for value in (torch.nan, torch.inf):
        module = _unlucky(subject)
        module.prepare("training_step", partial(_steep, value))
        _stops(subject, module, f"a gradient of {value}")


@check("weights that are not finite before training are refused, and left as they are", GROUP)
def weights_that_are_not_finite(subject: Subject, folder: Path) -> None:
    for value in (torch.nan, -torch.inf):
        module = _unlucky(subject)
        with torch.no_grad():
            module.get_parameter("network.0.weight")[1, 2] = value
        before = toys.weights(module)
        try:
            subject.fit(module)
        except (ValueError, FloatingPointError) as error:
            require("network.0.weight" in str(error), f"the error does not name network.0.weight: {error}")
        else:
            require(False, f"a weight of {value} went unnoticed to the end of the run")
        for name, w in toys.weights(module).items():
            require(torch.equal(w.view(torch.int32), before[name].view(torch.int32)), f"{name} was changed")


class _Full(Callback):
    """Lets the disk be full from a step on: files may not grow beyond a kilobyte."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == STEP:
            _limit(1024)


def _limit(size: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG, as on a full disk with ENOSPC
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _fill_the_disk(subject: Subject, folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What is odd after the failed save, and the end of a run without and with that failure in between."""
    whole = _unlucky(subject)
    subject.fit(whole, epochs=EPOCHS)
    module, path = _unlucky(subject), folder / "one.ckpt"
    keeper = ModelCheckpoint(folder, filename="one", enable_version_counter=False, every_n_epochs=1, save_on_train_epoch_end=True)
    odd = _failed_save(subject, module, keeper)
    again = _unlucky(subject, seed=1)
    subject.fit(again, epochs=EPOCHS, ckpt_path=path)
    return odd, toys.weights(whole), toys.weights(again)


def _failed_save(subject: Subject, module: Unlucky, keeper: Callback) -> str:
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
        _is_as_before(module, "after a failed save")
    except AssertionError as error:
        return str(error)
    return ""


@check("a full disk while saving leaves the module, and the file of before whole: the run resumes from it", GROUP, slow=True)
def a_full_disk_while_saving(subject: Subject, folder: Path) -> None:
    ((odd, whole, again),) = call(_fill_the_disk, (subject, folder))
    require(not odd, odd)
    step = torch.load(folder / "one.ckpt", weights_only=True)["global_step"]
    require(step == 4, f"the file on disk is of step {step}, not the whole one of step 4")
    odd = first_difference(whole, again)
    require(not odd, f"resumed from the file of before, the run ends elsewhere than without the fault: {odd}")


def _saved(subject: Subject, folder: Path) -> Path:
    trainer = subject.fit(subject.model())
    trainer.save_checkpoint(folder / "whole.ckpt")
    return folder / "whole.ckpt"


def _is_refused(subject: Subject, path: Path, what: str, loaded: bool = False) -> None:
    """Resuming raises before a step and leaves the module as it was, but for weights that had been loaded by then."""
    module = _unlucky(subject, seed=1)
    module.prepare("training_step", _fails(Accident()), step=0)
    try:
        subject.fit(module, epochs=EPOCHS, ckpt_path=path, num_sanity_val_steps=0)
    except Accident:
        require(False, f"{what} was resumed as if nothing were wrong")
    except Exception:
        if loaded:
            module.before["weights"] = toys.weights(module)
        _is_as_before(module, f"after {what} was refused")


@check("a truncated checkpoint is refused before training, wherever it was cut", GROUP)
def truncated_files_are_refused(subject: Subject, folder: Path) -> None:
    raw = _saved(subject, folder).read_bytes()
    for share in (0.0, 0.01, 0.3, 0.7, 0.99):
        (folder / "cut.ckpt").write_bytes(raw[: int(share * len(raw))])
        _is_refused(subject, folder / "cut.ckpt", f"a file cut after {share:.0%}")


@check("a checkpoint with a flipped bit in a weight is refused before training", GROUP)
def flipped_bits_are_refused(subject: Subject, folder: Path) -> None:
    path = _saved(subject, folder)
    raw = path.read_bytes()
    weight = torch.load(path, weights_only=True)["state_dict"]
    first = next(w for w in weight.values() if w.dim() > 1)
    place = raw.find(first.contiguous().numpy().tobytes())
    require(place > 0, "the weight's bytes are not found in the file")
    kept = first.flatten().nonzero().flatten().tolist()
    require(kept, "the file's first weight is all zero")
    for index, bit in ((kept[0], 0), (kept[-1], 12), (kept[-1], 31)):
        flipped = bytearray(raw)
        flipped[place + 4 * index + bit // 8] ^= 1 << bit % 8
        (folder / "flipped.ckpt").write_bytes(bytes(flipped))
        _is_refused(subject, folder / "flipped.ckpt", "a file with a flipped bit", loaded=True)


@check("torch.load(weights_only=True) reads every file: at epochs' ends, within them, at the end, after an exception", GROUP)
def files_load_safely(subject: Subject, folder: Path) -> None:
    module = _unlucky(subject)
    module.prepare("training_step", _fails(Accident()), step=10)
    keeper = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    trainer = subject.trainer(keeper, epochs=EPOCHS, enable_checkpointing=True)
    try:
        trainer.fit(module, toys.data(), toys.data(seed=1))
    except Accident:
        trainer.save_checkpoint(folder / "after.ckpt")
    _saved(subject, folder)
    for path in sorted(folder.glob("*.ckpt")):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            require(False, f"{path.name}: {' '.join(str(error).split())[-200:]}")
    require(len([*folder.glob("*.ckpt")]) == 5, f"files: {sorted(path.name for path in folder.glob('*.ckpt'))}")
