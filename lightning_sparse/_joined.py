"""Elementwise work on many tensors at once: those that are small share calls, which would take longer than their weights do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lightning_sparse import _pieces
from lightning_sparse._memory import Kept
from lightning_sparse.shards import PLAIN

DRAWN = 1 << 19  # elements of a mask that are drawn at a time, whatever the number of threads: draws do not depend on it
SMALL = 1 << 16  # elements: more of them take longer than the calls of a few operations do
FEW = 8  # tensors of that size, or fewer, whose calls cost less than copying them together

Row = tuple[Tensor, ...]  # tensors of one shape


def grouped(rows: Sequence[Row], size: int | None = None, small: int | None = None, few: int | None = None) -> list[list[int]]:
    """The numbers of ``rows`` by what is worked on together, each number once: rows of the same types and device.

    A group has at most ``size`` elements, by default a piece's. Rows of more than ``small`` elements, in fewer than ``few``,
    or of tensors that are not plain, stay alone; by default SMALL and FEW.
    """
    size, small, few = size or _pieces.SIZE * torch.get_num_threads(), small or SMALL, few or FEW
    if len(rows) < few:
        return [[number] for number in range(len(rows))]
    kinds: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        plain = all(type(tensor) in PLAIN and tensor.layout == torch.strided for tensor in row)
        kind = (row[0].device, *(tensor.dtype for tensor in row)) if plain and row[0].numel() <= small else number
        kinds.setdefault(kind, []).append(number)
    groups = [group for kind in kinds.values() for group in _filled(kind, rows, size)]
    return [part for group in groups for part in ([group] if len(group) >= few else [[number] for number in group])]


def _filled(numbers: Iterable[int], rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """In order, as many as ``size`` elements hold."""
    group: list[int] = []
    count = 0
    for number in numbers:
        if group and count + rows[number][0].numel() > size:
            yield group
            group, count = [], 0
        group.append(number)
        count += rows[number][0].numel()
    yield group


def as_one(rows: Sequence[Row]) -> Row:
    """The only row, or all of them flattened."""
    return rows[0] if len(rows) == 1 else tuple(flattened(column) for column in zip(*rows, strict=True))


def apart(made: Tensor, rows: Sequence[Row]) -> Sequence[Tensor]:
    """What was made of :func:`as_one`, a tensor for each row."""
    return [made] if len(rows) == 1 else parted(made, [first for first, *_ in rows])


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of ``tensors``, each row by row, in one new tensor."""
    flat: Tensor = _flatten_dense_tensors(tensors)
    return flat


def parted(flat: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What was made of :func:`flattened` ``tensors``, in their shapes: views."""
    parts: Sequence[Tensor] = _unflatten_dense_tensors(flat, tensors)
    return parts


Masks = Iterator[tuple[int, Tensor, Tensor]]


def masked(draw: Callable[..., Tensor], rows: Sequence[Row], whole: bool = False, kept: Kept | None = None) -> Masks:
    """Number, mask and w * mask of each row (w, ...), in groups.

    ``draw`` makes a mask of rows' elements, whatever their shape; or, if ``whole``, of a row as it is. Results of large rows
    are in the memory of the last time, if it is ``kept``.
    """
    for numbers in [[number] for number in range(len(rows))] if whole else grouped(rows, DRAWN, small=DRAWN // 2, few=2):
        if len(numbers) == 1:
            yield numbers[0], *_masked(draw, rows[numbers[0]], whole, kept or Kept(), numbers[0])
            continue
        terms = [flattened(column) for column in zip(*(rows[number] for number in numbers), strict=True)]
        mask, weights = draw(*terms), [rows[number][0] for number in numbers]
        yield from zip(numbers, parted(mask, weights), parted(terms[0].mul_(mask), weights), strict=True)


def _masked(draw: Callable[..., Tensor], row: Row, whole: bool, kept: Kept, number: int) -> tuple[Tensor, Tensor]:
    if whole or row[0].numel() <= DRAWN or not row[0].is_cpu:
        mask = draw(*row)
        return mask, row[0] * mask
    mask, value = (kept.empty_like(row[0], (number, what)) for what in ("mask", "product"))
    for into, product, *terms in _pieces.pieces(mask, value, *row, size=DRAWN):
        torch.mul(terms[0], into.copy_(draw(*terms)), out=product)
    return mask, value
