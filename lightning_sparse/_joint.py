"""Elementwise work on many small tensors as on one, in memory that is kept from one time to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sparse import _joined, _pieces
from lightning_sparse._joined import Row, grouped, parted

Columns = Sequence[Sequence[Tensor]]  # the first tensors of all rows, the second ones, ...; a row's are of one shape
_PLANS = 16  # that are remembered: which gradients there are may change from step to step


class Part(NamedTuple):
    """Numbers of rows that are worked on together: some columns of them in ``flat``, and there each tensor's own view."""

    numbers: list[int]
    flat: Row = ()
    views: tuple[list[Tensor], ...] = ()


class Joint:
    """Many small rows come as one: copied into memory that all groups of them share, and back what was written.

    A copy costs as much as the work itself, and new memory for it as much again; so do the views of each tensor's part,
    which are kept, too, as long as the first column holds the same tensors.
    """

    def __init__(self) -> None:
        self._plans: dict[Hashable, tuple[list[Part], Sequence[Tensor]]] = {}
        self._memory: dict[Hashable, Tensor] = {}

    def clear(self) -> None:
        """Let the memory go."""
        self._plans.clear()
        self._memory.clear()

    def pieces(self, columns: Columns, written: int, whole: bool = False) -> Iterator[Row]:
        """The pieces of each row, or it ``whole``; many small rows come as one, which is a copy.

        What is written to the column ``written`` of a piece is in its tensors once the next one is asked for.
        """
        for part in self._planned(columns, range(len(columns))):
            if not part.flat:
                row = tuple(column[part.numbers[0]] for column in columns)
                yield from [row] if whole else _pieces.pieces(*row)
                continue
            for column, views in zip(columns, part.views, strict=True):
                torch._foreach_copy_(views, _of(column, part))
            yield part.flat
            torch._foreach_copy_(_of(columns[written], part), part.views[written])

    def add(self, sources: Sequence[Tensor], targets: Sequence[Tensor], function: Callable[[Tensor], Tensor], alpha: float) -> None:
        """``target += alpha * function(source)`` for each of them."""
        for part in self._planned((sources, targets), [0]):
            if not part.flat:
                for source, target in _pieces.pieces(sources[part.numbers[0]], targets[part.numbers[0]]):
                    target.add_(function(source), alpha=alpha)
                continue
            (flat,), (views,) = part.flat, part.views
            torch._foreach_copy_(views, _of(sources, part))
            flat.copy_(function(flat))
            torch._foreach_add_(_of(targets, part), views, alpha=alpha)

    def _planned(self, columns: Columns, copied: Sequence[int]) -> list[Part]:
        """The rows' groups, with memory for the columns ``copied`` of each that has several."""
        count = len(columns[0]) if columns else 0
        if count < _joined.FEW:
            return [Part([number]) for number in range(count)]
        key = (tuple(copied), _pieces.SIZE * torch.get_num_threads(), *_kinds(columns))
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self.clear()
            groups = grouped(list(zip(*columns, strict=True)))
            self._plans[key] = [self._part(numbers, columns, copied) for numbers in groups], columns[0]  # which keeps their ids theirs
        return self._plans[key][0]

    def _part(self, numbers: list[int], columns: Columns, copied: Sequence[int]) -> Part:
        if len(numbers) == 1:
            return Part(numbers)
        members = [_of(columns[column], Part(numbers)) for column in copied]
        flat = tuple(self._block(column, tensors) for column, tensors in enumerate(members))
        return Part(numbers, flat, tuple(list(parted(one, tensors)) for one, tensors in zip(flat, members, strict=True)))

    def _block(self, column: int, tensors: Sequence[Tensor]) -> Tensor:
        """Memory for ``tensors``, a column's: the same for every group, as long as it is enough."""
        like, size = tensors[0], sum(tensor.numel() for tensor in tensors)
        key = (column, like.dtype, like.device)
        if key not in self._memory or len(self._memory[key]) < size:
            self._memory[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._memory[key][:size]


def _of(column: Sequence[Tensor], part: Part) -> list[Tensor]:
    return [column[number] for number in part.numbers]


def _kinds(columns: Columns) -> Iterator[Hashable]:
    """All that the grouping depends on; no list or tuple a tensor, of which many set off the garbage collector."""
    yield tuple(map(id, columns[0]))
    yield tuple([tensor.numel() for tensor in columns[0]])
    for column in columns:
        yield tuple([tensor.device for tensor in column])
        yield tuple([tensor.dtype for tensor in column])
        yield tuple([tensor.layout for tensor in column])
        yield tuple(map(type, column))
