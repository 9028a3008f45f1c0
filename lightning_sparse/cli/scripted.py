"""Take the model and the data from a user's training script: run it up to its call of ``Trainer.fit``."""

from __future__ import annotations

import functools
import importlib
import runpy
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.saved import silence_device_messages

HELP = (
    "your own training script, run up to its first call of Trainer.fit for its model and data; the code before it runs. As python SCRIPT "
    "fit --config CONFIG, or as it is without one. Further arguments are passed to it: --script train.py --seed 1"
)
_LONGEST = 500  # characters of a message of the script
_PASSED = "arguments after SCRIPT are passed to it: --script train.py --seed 1"


class _Reached(BaseException):
    """The script has called ``Trainer.fit``. No Exception, because a script may catch those."""

    def __init__(self, trainer: Any, model: Any, data: Any) -> None:
        super().__init__()
        self.trainer, self.model, self.data = trainer, model, data


class _Loaders(LightningDataModule):
    """The data loaders that a script has given to ``Trainer.fit``."""

    def __init__(self, train: Any, validation: Any) -> None:
        super().__init__()
        self.train, self.validation = train, validation

    def train_dataloader(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return self.validation


def objects(script: str, words: Sequence[str]) -> tuple[LightningModule, Any]:
    """Return the model and the data (a data module or None) that a script passes to ``Trainer.fit``, as :func:`reached` does."""
    _, model, data = reached(script, words)
    return model, data


def reached(script: str, words: Sequence[str]) -> tuple[Trainer, LightningModule, Any]:
    """Return the Trainer, the model and the data of a script's first call of ``Trainer.fit``; nothing is trained.

    ``words`` are the script's arguments. Raises UsageError if the script fails or ends before that call, and for a module of
    ``pytorch_lightning``.
    """
    shown = f"python {shlex.join([script, *words])}"
    sys.path.insert(0, str(Path(script).parent))  # for good, because its classes may import more later
    before, sys.argv = sys.argv, [script, *words]
    try:
        with _caught(Path(script).read_text(encoding="utf-8")), silence_device_messages():
            runpy.run_path(script, run_name="__main__")
    except _Reached as found:
        if not isinstance(found.model, LightningModule):
            raise UsageError(
                f"{shown} trains a {type(found.model).__name__} that is no module of lightning.pytorch (pytorch_lightning is not read here)"
            ) from None
        return found.trainer, found.model, found.data
    except SystemExit as error:
        raise UsageError(f"{shown} ended with exit code {error.code} before it called Trainer.fit; {_PASSED}") from error
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{shown} failed before Trainer.fit: {_told(error, script)}; {_PASSED}") from error
    finally:
        sys.argv = before
    raise UsageError(f"{shown} never called Trainer.fit, so its model and data are unknown")


def _told(error: Exception, script: str) -> str:
    """Return an error's class and text in one line, with the script's last line and, if it is another, the line that raised it."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == script]
    places = [f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}" for frame in [*own[-1:], *frames[-1:]] if own]
    where = ", raised in ".join(dict.fromkeys(places))
    return f"{type(error).__name__}: {text[:_LONGEST]}{' ...' if len(text) > _LONGEST else ''}{f' ({where})' if where else ''}"


@contextmanager
def _caught(source: str) -> Iterator[None]:
    """Replace ``Trainer.fit`` by a method that hands over its arguments, in the other Lightning package too if ``source`` names it."""

    def handing_over(own: Any) -> Any:
        @functools.wraps(own)  # because LightningCLI makes the options of fit from its signature
        def fit(
            self: Any, model: Any, train_dataloaders: Any = None, val_dataloaders: Any = None, datamodule: Any = None, **_: Any
        ) -> None:
            found = train_dataloaders if datamodule is None else datamodule
            if found is not None and not hasattr(found, "train_dataloader"):
                found = _Loaders(train_dataloaders, val_dataloaders)
            raise _Reached(self, model, found)

        return fit

    other = "pytorch_lightning"
    packages = ["lightning.pytorch", *([other] if other in sys.modules or other in source else [])]
    trainers = [importlib.import_module(name).Trainer for name in packages]
    kept = [trainer.fit for trainer in trainers]
    for trainer in trainers:
        trainer.fit = handing_over(trainer.fit)
    try:
        yield
    finally:
        for trainer, own in zip(trainers, kept, strict=True):
            trainer.fit = own
