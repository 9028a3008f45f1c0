"""Arguments that are numbers of numpy, as np.linspace and np.logspace give them, in a run whose files are read safely."""

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


@check("a run whose arguments were numbers of numpy writes files that load with weights_only=True, and resumes", GROUP)
def numbers_of_numpy_are_no_matter(subject: Subject, folder: Path) -> None:
    again = Subject(subject.name, _with_numpy(subject.callbacks), subject.optimizer)
    trainer = again.fit(again.model())
    trainer.save_checkpoint(folder / "numpy.ckpt")
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(folder / "numpy.ckpt")
    require(not foreign, f"the file holds {foreign}, so torch.load(weights_only=True) refuses it")
    again.fit(again.model(), epochs=3, ckpt_path=folder / "numpy.ckpt")


def _with_numpy(make: Callable[[], Sequence[Callback]]) -> Callable[[], list[Callback]]:
    """What makes the callbacks again, of arguments whose numbers are numpy's."""
    kinds = {type(callback) for callback in make()}
    if not kinds:
        raise NotApplicable("there is no callback that takes arguments")
    with _recorded(kinds) as made:
        callbacks = [*make()]
    if any(id(callback) not in made for callback in callbacks):
        raise NotApplicable("a callback was copied, so its arguments are not seen; give check_callback a function that makes it")
    given = [(type(callback), *made[id(callback)]) for callback in callbacks]
    return lambda: [kind(*numpy(args), **numpy(options)) for kind, args, options in given]


@contextmanager
def _recorded(kinds: set[type[Callback]]) -> Iterator[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments that callbacks of these classes are made of meanwhile, by the callback's id."""
    made: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def recording(own: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(own)
        def record(self: Callback, *args: Any, **options: Any) -> None:
            made.setdefault(id(self), (args, options))  # a base's __init__ comes after
            own(self, *args, **options)

        return record

    inherited = {kind for kind in kinds if "__init__" not in vars(kind)}
    before = {kind: kind.__init__ for kind in kinds}
    for kind, own in before.items():
        kind.__init__ = recording(own)  # type: ignore[method-assign]
    try:
        yield made
    finally:
        for kind, own in before.items():
            if kind in inherited:
                del kind.__init__
            else:
                kind.__init__ = own  # type: ignore[method-assign]


def numpy(given: Any) -> Any:
    """``given`` with the numbers in it as numpy's, those of frozen dataclasses too."""
    if isinstance(given, bool):
        return np.bool_(given)
    if isinstance(given, (int, float)):
        return np.int64(given) if isinstance(given, int) else np.float64(given)
    if isinstance(given, str):
        return np.str_(given)
    if type(given) in (list, tuple):
        return type(given)(map(numpy, given))
    if type(given) is dict:
        return {name: numpy(value) for name, value in given.items()}
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        fields = {field.name: numpy(getattr(given, field.name)) for field in dataclasses.fields(given) if field.init}
        return dataclasses.replace(given, **fields)
    return given
