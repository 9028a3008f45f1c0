"""Run elementwise functions over many tensors, by ``add_``, ``update_``, ``map`` and ``draw``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_sparse.elementwise import pieces, shards
from lightning_sparse.elementwise.kernels import Kernel, is_frozen_config
from lightning_sparse.elementwise.pieces import BufferPool
from lightning_sparse.elementwise.rng import as_int32, counter_keys, counter_words

DRAWN = 1 << 19  # elements of a mask that are drawn at a time, whatever the number of threads, because draws must not depend on it
_LONGEST = 1 << 30  # elements of a kernel's mask at a time, because the number of an element is a 32-bit word

Function = Callable[..., Any]
Scalars = Sequence[float]


class Distribution(Protocol):
    """The part of a mask's distribution that :meth:`Engine.draw` needs (see :class:`lightning_sparse.noise.Noise`)."""

    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor: ...


class Drawn(NamedTuple):
    """The mask of row ``number``, and its first column times the mask."""

    number: int
    mask: Tensor
    product: Tensor


class Engine:
    """Runs one function per formula over many tensors: their local shards, chunks, buckets of small ones, or a compiled kernel.

    ``columns`` are sequences of equal length; tensor i of each column forms row i, and the tensors of a row have one shape. A
    function is called as ``function(*row, *scalars)`` with rows of any shape and must work element by element, without branches
    on tensors. Scalars are Python numbers, or 0-d tensors inside a kernel. With ``separable=False`` it is called with each
    row's whole local tensors instead.
    """

    def __init__(self) -> None:
        self._buckets, self._buffers = pieces.Buckets(), BufferPool()
        self._kernels: dict[Hashable, Kernel] = {}

    # -- functions over many tensors --------------------------------------------------------------------------------------

    def add_(self, targets: Sequence[Tensor], sources: Sequence[Tensor], function: Function, scale: float, separable: bool = True) -> None:
        """Compute ``target += scale * function(source)`` for each pair, in place."""
        targets, sources = shards.local_parts(targets), shards.local_parts(sources)
        kernel = self._kernels.get(("add", _key(function)))
        if not separable:
            for target, source in zip(targets, sources, strict=True):
                target.add_(function(source), alpha=scale)
        elif kernel is None:
            self._buckets.add_(targets, sources, function, scale)
        else:
            for row in self._buckets.rows((targets, sources), whole=True):
                kernel(row, (float(scale),))

    def update_(self, columns: pieces.Columns, function: Function, scalars: Scalars = (), written: int = 1, separable: bool = True) -> None:
        """Call ``function(*row, *scalars)``, which writes into the first ``written`` tensors of each row."""
        local = [*map(shards.local_parts, columns)]
        kernel = self._kernels.get(("update", _key(function)))
        rows = self._buckets.rows(local, written, whole=kernel is not None) if separable else zip(*local, strict=True)
        for row in rows:
            if kernel is None:
                function(*row, *scalars)
            else:
                kernel(row, [*map(float, scalars)])

    def map(self, columns: pieces.Columns, function: Function, scalars: Scalars = (), separable: bool = True) -> list[Tensor]:
        """Return ``function(*row, *scalars)`` of each row, a tensor of the row's shape (and split over processes as it is)."""
        whole = columns[0]
        rows = list(zip(*map(shards.local_parts, columns), strict=True))
        kernel = self._kernels.get(("map", _key(function)))
        made: list[Tensor] = [torch.empty(0)] * len(rows)
        for numbers in pieces.bucket_rows(rows) if separable else [[number] for number in range(len(rows))]:
            found = [rows[number] for number in numbers]
            row = pieces.merge(found)
            if kernel is not None:
                value = torch.empty_like(row[0])
                kernel((value, *row), [*map(float, scalars)])
            elif separable:
                value = pieces.map_chunks(lambda *tensors: function(*tensors, *scalars), *row)
            else:
                value = function(*row, *scalars)
            for number, part in zip(numbers, pieces.split(value, found), strict=True):
                made[number] = shards.shard_like(part, whole[number])
        return made

    def draw(
        self,
        rows: Sequence[pieces.Row],
        keep_probability: Function,
        noise: Distribution,
        generator: torch.Generator,
        scalars: Scalars = (),
        separable: bool = True,
        reuse: bool = True,
    ) -> Iterator[Drawn]:
        """Draw a mask for the first tensor of each row, with ``keep_probability(*row, *scalars)`` for each element.

        Small rows are drawn together. With ``reuse`` the results of large rows are in the memory of the last call's.
        """
        pool = self._buffers if reuse else BufferPool()
        kernel = self._kernels.get(("draw", _key(keep_probability), _key(noise)))
        if kernel is not None:
            yield from _draw_by_kernel(kernel, rows, noise, generator, scalars, pool)
            return

        def draw(*row: Tensor) -> Tensor:
            alpha = pieces.map_chunks(lambda *part: keep_probability(*part, *scalars), *row)
            return noise.sample(alpha, generator)

        if not separable:
            for number, row in enumerate(rows):
                mask = noise.sample(keep_probability(*row, *scalars), generator)
                yield Drawn(number, mask, row[0] * mask)
            return
        for numbers in pieces.bucket_rows(rows, DRAWN, small=DRAWN // 2, few=2):
            found = [rows[number] for number in numbers]
            if len(numbers) == 1:
                yield Drawn(numbers[0], *_drawn(draw, found[0], pool, numbers[0]))
                continue
            terms = pieces.merge(found)
            mask = draw(*terms)
            masks, products = pieces.split(mask, found), pieces.split(terms[0].mul_(mask), found)
            yield from (Drawn(*row) for row in zip(numbers, masks, products, strict=True))

    def clear(self) -> None:
        """Release buffers; kernels stay."""
        self._buckets.clear()
        self._buffers.clear()

    # -- kernels ----------------------------------------------------------------------------------------------------------

    def compile_add_(self, function: Function, like: Iterable[Tensor], what: str) -> None:
        """Compile :meth:`add_` with ``function`` for tensors ``like`` these; RuntimeError, naming ``what``, where that fails."""

        def add(target: Tensor, source: Tensor, scale: Tensor) -> None:
            target.add_(function(source) * scale)

        self._compile(("add", _key(function)), add, what, like, (0.5, 0.5), (0.5,))

    def compile_update_(self, function: Function, like: Iterable[Tensor], values: Scalars, scalars: Scalars, what: str) -> None:
        """Compile :meth:`update_` with ``function``; it is tried on rows filled with ``values``."""
        self._compile(("update", _key(function)), function, what, like, values, scalars)

    def compile_map(self, function: Function, like: Iterable[Tensor], values: Scalars, scalars: Scalars, what: str) -> None:
        """Compile :meth:`map` with ``function``; it is tried on rows filled with ``values``."""

        def fill(result: Tensor, *rest: Tensor) -> None:
            result.copy_(function(*rest))

        self._compile(("map", _key(function)), fill, what, like, (0.5, *values), scalars)

    def compile_draw(
        self, keep_probability: Function, noise: Any, like: Iterable[Tensor], values: Scalars, scalars: Scalars, what: str
    ) -> None:
        """Compile :meth:`draw`; the noise needs ``from_words``, ``numbers`` and ``mask`` (:class:`lightning_sparse.noise.Elementwise`).

        A noise with ``from_words`` gets counter-based random words inside the kernel; for another its numbers are drawn before.
        """

        def of_words(mask: Tensor, product: Tensor, w: Tensor, *rest: Tensor) -> None:
            *terms, start, first, second = rest
            put(mask, product, counter_words(w, start, first, second), w, *terms)

        def put(mask: Tensor, product: Tensor, numbers: Tensor, w: Tensor, *terms: Tensor) -> None:
            mask.copy_(noise.mask(keep_probability(w, *terms), numbers))
            product.copy_(w * mask)

        words = noise.from_words
        given: tuple[float, ...] = (0.5, 0.5, *values) if words else (0.5, 0.5, 0.5, *values)
        key = ("draw", _key(keep_probability), _key(noise))
        self._compile(key, of_words if words else put, what, like, given, (*scalars, 0, 1, 2) if words else scalars)

    def _compile(self, key: Hashable, function: Function, what: str, like: Iterable[Tensor], values: Scalars, scalars: Scalars) -> None:
        self._kernels[key] = kernel = Kernel(function, what, key if _is_shared(key) else None)
        kernel.check(like, values, scalars)


def _key(function: Any) -> Hashable:
    """Return what identifies a function: of a bound method its class's function and the object, which may be equal to another's."""
    owner = getattr(function, "__self__", None)
    return function if owner is None else (function.__func__, owner)


def _is_shared(key: Any) -> bool:
    """Return True if kernels of equal ``key`` compute the same, because it holds only frozen values and plain module functions."""
    if isinstance(key, tuple):
        return all(map(_is_shared, key))
    return isinstance(key, str) or is_frozen_config(key) or getattr(key, "__closure__", key) is None


def _drawn(draw: Function, row: pieces.Row, pool: BufferPool, number: int) -> tuple[Tensor, Tensor]:
    """Draw one row: at once, or DRAWN elements at a time into buffers."""
    if row[0].numel() <= DRAWN or not row[0].is_cpu:
        mask = draw(*row)
        return mask, row[0] * mask
    mask, product = (pool.empty_like(row[0], (number, what)) for what in ("mask", "product"))
    for into, multiplied, *terms in pieces.chunks(mask, product, *row, size=DRAWN):
        torch.mul(terms[0], into.copy_(draw(*terms)), out=multiplied)
    return mask, product


def _draw_by_kernel(
    kernel: Kernel, rows: Sequence[pieces.Row], noise: Any, generator: torch.Generator, scalars: Scalars, pool: BufferPool
) -> Iterator[Drawn]:
    start, numbers_of = 0, [*map(float, scalars)]
    for numbers in pieces.bucket_rows(rows, DRAWN):
        found = [rows[number] for number in numbers]
        row = pieces.merge(found)
        mask, product = (pool.empty_like(row[0], (numbers[0], what)) for what in ("mask", "product"))
        # random numbers that are drawn before the kernel take memory: DRAWN of them at a time
        for part in pieces.chunks(mask, product, *row, size=_LONGEST if noise.from_words else DRAWN):
            if noise.from_words:
                kernel(part, (*numbers_of, as_int32(start), *counter_keys(generator)))
            else:
                kernel((*part[:2], noise.numbers(part[2], generator), *part[2:]), numbers_of)
            start += part[0].numel()
        masks, products = pieces.split(mask, found), pieces.split(product, found)
        yield from (Drawn(*drawn) for drawn in zip(numbers, masks, products, strict=True))
