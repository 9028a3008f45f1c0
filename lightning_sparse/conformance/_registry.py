"""Registry of the conformance checks, their subjects and their outcomes."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_sparse import _checks
from lightning_sparse._contract import ContractError
from lightning_sparse.callbacks.compatibility import is_a
from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import NAME, Callback, LightningModule, Trainer


class NotApplicable(Exception):
    """The check does not apply: the callback lacks the feature, or Lightning itself is not exact in this setting."""


@dataclass(frozen=True)
class Subject:
    """The callbacks to check, or the optimiser if the optimiser makes the zeros.

    ``callbacks()`` returns new callbacks for every run. ``optimizer(parameters)`` makes the optimiser and replaces the check's
    own. Both must be importable functions (or partials of them) because some checks start processes.
    """

    name: str
    callbacks: Callable[[], Sequence[Callback]]
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None

    def model(self, *args: Any, **options: Any) -> toys.Toy:
        """Build a :class:`toys.Toy`, with the subject's optimiser if it has one."""
        return toys.Toy(*args, **(options | ({"optimizer": self.optimizer} if self.optimizer else {})))

    def trainer(self, *neighbours: Callback, first: bool = True, **options: Any) -> Trainer:
        """Build a quiet CPU Trainer with the subject's callbacks before (``first``) or after its neighbours."""
        own = [*self.callbacks()]
        return toys.trainer(*(own + [*neighbours] if first else [*neighbours] + own), **options)

    def fit(self, module: LightningModule, *neighbours: Callback, loader: Any = None, **options: Any) -> Trainer:
        """Fit ``module`` on the toy data and return the Trainer."""
        resume = {"ckpt_path": options.pop("ckpt_path")} if "ckpt_path" in options else {}
        trainer = self.trainer(*neighbours, **options)
        trainer.fit(module, toys.data() if loader is None else loader, toys.data(seed=1), **resume)
        return trainer


@dataclass(frozen=True)
class Check:
    """A check. ``run`` raises ContractError if the subject fails, NotApplicable if the check does not apply."""

    name: str
    title: str  # as in the table of docs/correctness.md
    group: str
    run: Callable[[Subject, Path], None]
    slow: bool


class Outcome(NamedTuple):
    """``verdict`` is "pass", "fail" or "n/a"; ``reason`` is empty for a pass."""

    check: str
    verdict: str
    reason: str


CHECKS: dict[str, Check] = {}


@dataclass(frozen=True)
class _Copies:
    """Return a deep copy of a callback at each call."""

    callback: Callback

    def __call__(self) -> list[Callback]:
        return [copy.deepcopy(self.callback)]


@dataclass(frozen=True)
class _Made:
    """Return the callbacks of a function that returns one or several."""

    make: Callable[[], Any]

    def __call__(self) -> list[Callback]:
        made = self.make()
        return [made] if is_a(made, "Callback") else [*made]


def subject(callback: Any) -> Subject:
    """Build the :class:`Subject` of a callback, or of a function that returns one or several."""
    if is_a(callback, "Callback"):
        return Subject(type(callback).__name__, _Copies(callback))
    if callable(callback) and not isinstance(callback, type):
        return Subject(getattr(callback, "__name__", repr(callback)), _Made(callback))
    shown = _checks.shown(callback, Callback)
    raise TypeError(f"check_callback takes a lightning.pytorch Callback or a function that makes one, got {shown}")


def chosen(only: Collection[str] | None, skip: Collection[str], slow: bool) -> list[str]:
    """Return the names of the checks to run. Raises ValueError for an unknown name."""
    for name in [*(only or ()), *skip]:
        if name not in CHECKS:
            raise ValueError(f"no check {name!r}{_checks.closest(name, CHECKS)}; one of {', '.join(CHECKS)}")
    return [name for name, one in CHECKS.items() if (only is None or name in only) and name not in skip and (slow or not one.slow)]


def check(title: str, group: str, slow: bool = False) -> Callable[[Callable[[Subject, Path], None]], Callable[[Subject, Path], None]]:
    """Register a check under the name of its function."""

    def register(run: Callable[[Subject, Path], None]) -> Callable[[Subject, Path], None]:
        CHECKS[run.__name__] = Check(run.__name__, title, group, run, slow)
        return run

    return register


def require(holds: object, message: str) -> None:
    """Raise ContractError with ``message`` unless ``holds`` is true."""
    if not holds:
        raise ContractError(message)


def outcome(subject: Subject, name: str) -> Outcome:
    """Run one check and return its outcome. Any error of the subject is a failure."""
    try:
        with undisturbed(), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)  # because some checks build networks, and an outcome must not depend on what ran before
            CHECKS[name].run(subject, Path(folder))
    except NotApplicable as reason:
        return Outcome(name, "n/a", str(reason))
    except ContractError as reason:
        return Outcome(name, "fail", str(reason))
    except Exception as error:
        text = str(error).strip()
        # an error of another process is a whole traceback: take its last line
        text = text.splitlines()[-1] if "Traceback" in text else f"{type(error).__name__}: {text}"
        return Outcome(name, "fail", " ".join(text.split())[:300])
    return Outcome(name, "pass", "")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the caller's random state, warning filters and log level at exit."""
    logger = logging.getLogger(NAME)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
