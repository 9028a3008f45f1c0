"""After fit: exact zeros, a plain module again, and no memory growth over repeated fits."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._registry import Subject, check, require

GROUP = "life cycle"
SIZE = 128 + 48  # number of weights in the toy's two matrices


def zeros(module: torch.nn.Module) -> int:
    """Count the exact zeros in a module's matrices."""
    return sum(int((w == 0).sum()) for w in module.parameters() if w.dim() > 1)


def require_zeros(module: torch.nn.Module, how: str = "") -> None:
    """Require a zero in the module's matrices; ``how`` names the run."""
    require(zeros(module) > 0, f"no weight is zero after fit{how}; a callback that is too weak for these short runs needs a larger lam")


@check("after fit some weights are exactly zero, and some are not", GROUP)
def fit_ends_with_true_zeros(subject: Subject, folder: Path) -> None:
    module = subject.model()
    subject.fit(module, epochs=4)
    require(all(bool(torch.isfinite(p).all()) for p in module.parameters()), "a weight is not finite after fit")
    require(0 < zeros(module) < SIZE, f"{zeros(module)} of {SIZE} weights are zero after fit; some but not all should be zero")


@check("after fit the module has its own class, parameters and keys and no hooks, and can be fitted again", GROUP)
def the_module_is_its_own_again(subject: Subject, folder: Path) -> None:
    module, own = subject.model(), [*subject.callbacks()]
    before = _identity(module)
    for fit in ("first", "second"):
        toys.trainer(*own).fit(module, toys.data(), toys.data(seed=1))
        for what, value in _identity(module).items():
            require(value == before[what], f"{what} after the {fit} fit: {value}, before: {before[what]}")
    require(zeros(module) > 0, "no weight is zero after the second fit")


def _identity(module: torch.nn.Module) -> dict[str, Any]:
    parameters = [(name, id(parameter)) for name, parameter in module.named_parameters()]
    return {"class": type(module), "parameters": parameters, "keys": list(module.state_dict()), "hooks": toys.hooks(module)}


@check("a callback works on a second model, and a copy of a used callback works", GROUP)
def a_callback_is_reusable(subject: Subject, folder: Path) -> None:
    own = [*subject.callbacks()]
    ends = []
    for callbacks in (own, own, copy.deepcopy(own)):
        module = subject.model()
        toys.trainer(*callbacks).fit(module, toys.data(), toys.data(seed=1))
        ends.append(toys.weights(module))
    for name, w in ends[0].items():
        require(torch.equal(w, ends[1][name]), f"the second model's final {name} differs from the first's, from equal starts")
        require(torch.equal(w, ends[2][name]), f"with a copy of the used callback, the final {name} differs")


@contextmanager
def only_new() -> Iterator[None]:
    """Exclude existing objects from :func:`storages`, which makes it fast."""
    callers = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not callers:  # because there is no way to unfreeze a part, and the caller's own stay frozen
            gc.unfreeze()


def storages() -> dict[int, int]:
    """Return bytes by address for the memory of all tensors created since :func:`only_new`."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor) and item.layout == torch.strided]
    plain = [t.untyped_storage() for t in tensors if type(t) in (Tensor, torch.nn.Parameter)]
    return {storage.data_ptr(): storage.nbytes() for storage in plain}


@check("memory does not grow over ten fits in one process", GROUP)
def ten_fits_do_not_grow(subject: Subject, folder: Path) -> None:
    module, own, sizes = subject.model(), [*subject.callbacks()], []
    with only_new():
        for _ in range(10):
            toys.trainer(*own, epochs=1).fit(module, toys.data(), toys.data(seed=1))
            sizes.append(sum(storages().values()))
    require(sizes[-1] <= sizes[1], f"bytes in tensors after each fit: {sizes}")
    require(toys.hooks(module) == toys.hooks(subject.model()), f"{toys.hooks(module)} hooks are left on the module")
