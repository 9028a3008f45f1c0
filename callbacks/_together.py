"""What counts as zero in many parameters at once: small ones share the operations that find it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sparse import _joined
from lightning_sparse.callbacks import _steps

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form


@torch.no_grad()
def zeros(form: Form, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``form.zeros(name, w)`` of each parameter, ``values`` being what its weights are."""
    found: dict[str, Tensor] = {}
    for optimizer in form._optimizers if form.joins and form.penalty.separable and form.support is None else ():
        found |= _joint(form, optimizer, values)
    return {name: form.also_cut(name, found[name]) if name in found else form.zeros(name, w) for name, w in values.items()}


def _joint(form: Form, optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of those that ``optimizer`` updates and that are worked on together."""
    owned = [(name, p, group, form.eta_terms(name, values[name])) for name, p, group in form._owned(optimizer) if name in values]
    known = [(name, p, group, terms) for name, p, group, terms in owned if terms is not None]
    found: dict[str, Tensor] = {}
    for kind in _steps.alike(optimizer, (member[1:] for member in known), form._step_sizes):
        every = list(zip(*kind.columns, strict=True))
        for numbers in _joined.grouped(every):
            if len(numbers) > 1:
                rows = [every[number] for number in numbers]
                columns = [_joined.flattened(column) for column in zip(*rows, strict=True)]
                count = len(columns) - len(kind.moments)
                marks = form.marks(columns[:count], kind.group, kind.rate_state(columns[count:]))
                names = [known[kind.numbers[number]][0] for number in numbers]
                found |= zip(names, _joined.parted(marks, [row[0] for row in rows]), strict=True)
    return found
