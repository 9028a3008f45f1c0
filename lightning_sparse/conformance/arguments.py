"""Arguments that are numpy numbers, as from np.linspace and np.logspace: checkpoints must load with weights_only=True."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_sparse.conformance._lightning import Callback
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require

GROUP = "files"


@check("arguments given as numpy numbers: files load with weights_only=True, and the run resumes", GROUP)
def numbers_of_numpy_are_no_matter(subject: Subject, folder: Path) -> None:
    with_numpy = Subject(subject.name, _with_numpy(subject.callbacks), subject.optimizer)
    trainer = with_numpy.fit(with_numpy.model())
    trainer.save_checkpoint(folder / "numpy.ckpt")
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(folder / "numpy.ckpt")
    require(not foreign, f"the file holds {foreign}, so torch.load(weights_only=True) refuses it")
    with_numpy.fit(with_numpy.model(), epochs=3, ckpt_path=folder / "numpy.ckpt")


def _with_numpy(make: Callable[[], Sequence[Callback]]) -> Callable[[], list[Callback]]:
    """Return a function that makes the same callbacks, with numpy numbers in their arguments."""
    kinds = {type(callback) for callback in make()}
    if not kinds:
        raise NotApplicable("no callback takes arguments")
    with _recorded(kinds) as made:
        callbacks = [*make()]
    if any(id(callback) not in made for callback in callbacks):
        raise NotApplicable("a callback was copied, so its arguments cannot be replaced; pass check_callback a function that makes it")
    calls = [(type(callback), *made[id(callback)]) for callback in callbacks]
    return lambda: [kind(*numpy(args), **numpy(options)) for kind, args, options in calls]


@contextmanager
def _recorded(kinds: set[type[Callback]]) -> Iterator[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Record the constructor arguments of new callbacks of these classes, by the callback's id."""
    made: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def recording(own: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(own)
        def record(self: Callback, *args: Any, **options: Any) -> None:
            made.setdefault(id(self), (args, options))  # only the first call, because super().__init__ is recorded too
            own(self, *args, **options)

        return record

    inherited = {kind for kind in kinds if "__init__" not in vars(kind)}
    originals = {kind: kind.__init__ for kind in kinds}
    for kind, own in originals.items():
        kind.__init__ = recording(own)  # type: ignore[method-assign]
    try:
        yield made
    finally:
        for kind, own in originals.items():
            if kind in inherited:
                del kind.__init__
            else:
                kind.__init__ = own  # type: ignore[method-assign]


def numpy(argument: Any) -> Any:
    """Convert the numbers and strings in ``argument`` to numpy types, also inside containers and dataclasses."""
    if isinstance(argument, bool):
        return np.bool_(argument)
    if isinstance(argument, (int, float)):
        return np.int64(argument) if isinstance(argument, int) else np.float64(argument)
    if isinstance(argument, str):
        return np.str_(argument)
    if type(argument) in (list, tuple):
        return type(argument)(map(numpy, argument))
    if type(argument) is dict:
        return {name: numpy(value) for name, value in argument.items()}
    if dataclasses.is_dataclass(argument) and not isinstance(argument, type):
        fields = {field.name: numpy(getattr(argument, field.name)) for field in dataclasses.fields(argument) if field.init}
        return dataclasses.replace(argument, **fields)
    return argument
