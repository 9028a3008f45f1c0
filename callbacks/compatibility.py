"""Support both packages of Lightning: ``lightning.pytorch`` and ``pytorch_lightning``.

The two hold the same code, but their classes are not the same: an ``isinstance`` or ``is_overridden`` of one package does not
recognise the objects of the other. The callbacks here derive from ``lightning.pytorch``. They recognise modules, loggers,
strategies and other callbacks by class name, and also derive from the classes of ``pytorch_lightning`` once that package
is imported, because its Trainer calls ``isinstance`` on a callback that is not in a list and on every checkpoint callback.
``pytorch_lightning`` is never imported here.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from lightning.pytorch import callbacks
from lightning_utilities.core.overrides import is_overridden

from lightning_sparse._construction import Constructed

PACKAGES = ("lightning", "pytorch_lightning")


def is_a(given: object, *names: str) -> bool:
    """Return True if ``given`` is an instance of a Lightning class with one of these names, from either package."""
    return any(base.__name__ in names and _package(base) in PACKAGES for base in type(given).__mro__)


def those_of(trainer: Any, *names: str) -> list[Any]:
    """Return the run's callbacks that are instances of Lightning classes with these names."""
    return [callback for callback in trainer.callbacks if is_a(callback, *names)]


def overrides(hook: str, module: object) -> bool:
    """Return True if a LightningModule of either package has its own ``hook``, on its class or on the instance."""
    own = next(base for base in type(module).__mro__ if base.__name__ == "LightningModule" and _package(base) in PACKAGES)
    return bool(is_overridden(hook, module, own))


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


class NoInstance(TypeError, AttributeError):
    """A class is used where an instance is needed. An AttributeError too, so that tools that list a class's attributes pass over it."""


class CallbackClass(Constructed):
    """Metaclass of the callbacks: names the class in the error if it is given to a Trainer in the place of an instance."""

    @property
    def state_key(self) -> str:  # which a Trainer reads of each callback before it calls a hook
        raise NoInstance(f"the Trainer's callbacks hold the class {self.__name__}: create an instance, {self.__name__}(...)")

    def __iter__(self) -> NoReturn:  # which a Trainer calls if the class is given without a list
        raise NoInstance(f"callbacks={self.__name__} is a class: create an instance, callbacks=[{self.__name__}(...)]")


class _AddsBases:
    """Adds the base classes of ``pytorch_lightning`` whenever an instance is created or a class derived.

    A class path given to the LightningCLI of ``pytorch_lightning`` does neither; import that package before this one there.
    """

    def __new__(cls, *_: Any, **__: Any) -> Any:
        add_bases()
        return super().__new__(cls)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "add_bases" in globals():  # not while this module is being imported
            add_bases()


class AnyCallback(_AddsBases, callbacks.Callback):  # not `Callback`, because recipes name Lightning's classes so
    """Base of the callbacks here: a Callback of ``lightning.pytorch`` and, once that is imported, of ``pytorch_lightning``."""


class AnyModelCheckpoint(_AddsBases, callbacks.ModelCheckpoint):
    """Base that is a ModelCheckpoint of both packages; the methods are those of ``lightning.pytorch``."""


def add_bases() -> None:
    """Add the classes of ``pytorch_lightning`` to the bases of those above if that package is imported."""
    other = sys.modules.get("pytorch_lightning.callbacks")
    for kind, own in ((AnyCallback, callbacks.Callback), (AnyModelCheckpoint, callbacks.ModelCheckpoint)):
        base = getattr(other, own.__name__, None)
        if base is not None and base not in kind.__mro__:
            kind.__bases__ = (*kind.__bases__, base)


add_bases()
