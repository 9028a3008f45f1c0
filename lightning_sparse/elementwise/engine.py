"""Run elementwise functions over many tensors, by ``add_``, ``update_``, ``map`` and ``draw``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lightning_sparse.elementwise import pieces, shards
from lightning_sparse.elementwise.kernels import Kernel, is_frozen_config
from lightning_sparse.elementwise.pieces import PLAIN, BufferPool, Row
from lightning_sparse.elementwise.rng import as_int32, counter_keys, counter_words

DRAWN = 1 << 19  # elements of a mask that are drawn at a time, whatever the number of threads, because draws must not depend on it
SUMMED = 1 << 20  # elements: of larger tensors a sum, which only reads them, finds NaN and inf faster
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
        self._buckets, self._buffers = pieces.Buckets(bucket_rows), BufferPool()
        self._kernels: dict[Hashable, Kernel] = {}

    # -- functions over many tensors --------------------------------------------------------------------------------------

    def add_(self, targets: Sequence[Tensor], sources: Sequence[Tensor], function: Function, scale: float, separable: bool = True) -> None:
        """Compute ``target += scale * function(source)`` for each pair, in place."""
        targets, sources = _local_parts(targets), _local_parts(sources)
        kernel = self._kernels.get(("add", _key(function)))
        if kernel is not None and separable:
            for row in self._rows((targets, sources), whole=True):
                kernel(row, (float(scale),))
        elif separable and len(targets) >= pieces.FEW:
            self._buckets.add_(targets, sources, function, scale)
        else:
            rows = self._rows((targets, sources)) if separable else zip(targets, sources, strict=True)
            for target, source in rows:
                target.add_(function(source), alpha=scale)

    def update_(self, columns: pieces.Columns, function: Function, scalars: Scalars = (), written: int = 1, separable: bool = True) -> None:
        """Call ``function(*row, *scalars)``, which writes into the first ``written`` tensors of each row."""
        local = [*map(_local_parts, columns)]
        kernel = self._kernels.get(("update", _key(function)))
        rows = self._rows(local, written, whole=kernel is not None) if separable else zip(*local, strict=True)
        for row in rows:
            if kernel is None:
                function(*row, *scalars)
            else:
                kernel(row, [*map(float, scalars)])

    def _rows(self, columns: pieces.Columns, written: int = 1, whole: bool = False) -> Iterator[Row]:
        """Yield the rows: many small ones together, and large ones in chunks unless they are wanted ``whole``."""
        if len(columns[0]) >= pieces.FEW:
            yield from self._buckets.rows(columns, written, whole)
            return
        for row in zip(*columns, strict=True):
            yield from [row] if whole or _is_chunk(row[0]) else pieces.chunks(*row)

    def map(self, columns: pieces.Columns, function: Function, scalars: Scalars = (), separable: bool = True) -> list[Tensor]:
        """Return ``function(*row, *scalars)`` of each row, a tensor of the row's shape (and split over processes as it is)."""
        whole = columns[0]
        rows = list(zip(*map(_local_parts, columns), strict=True))
        kernel = self._kernels.get(("map", _key(function)))
        made: list[Tensor] = [torch.empty(0)] * len(rows)
        for numbers in bucket_rows(rows) if separable else [[number] for number in range(len(rows))]:
            found = [rows[number] for number in numbers]
            row = merge(found)
            if kernel is not None:
                value = torch.empty_like(row[0])
                kernel((value, *row), [*map(float, scalars)])
            elif separable:
                value = map_chunks(lambda *tensors: function(*tensors, *scalars), *row)
            else:
                value = function(*row, *scalars)
            for number, part in zip(numbers, split(value, found), strict=True):
                made[number] = part if type(whole[number]) in PLAIN else shards.shard_like(part, whole[number])
        return made

    def draw(
        self,
        rows: Sequence[Row],
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
            alpha = map_chunks(lambda *part: keep_probability(*part, *scalars), *row)
            return noise.sample(alpha, generator)

        if not separable:
            for number, row in enumerate(rows):
                mask = noise.sample(keep_probability(*row, *scalars), generator)
                yield Drawn(number, mask, row[0] * mask)
            return
        for numbers in bucket_rows(rows, DRAWN, small=DRAWN // 2, few=2):
            found = [rows[number] for number in numbers]
            if len(numbers) == 1:
                yield Drawn(numbers[0], *_drawn(draw, found[0], pool, numbers[0]))
                continue
            terms = merge(found)
            mask = draw(*terms)
            masks, products = split(mask, found), split(terms[0].mul_(mask), found)
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


# -- the rows of many tensors ----------------------------------------------------------------------------------------------------


def _local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of ``tensors`` that this process holds; whole ones as they are."""
    return [tensor if type(tensor) in PLAIN else shards.local_part(tensor.detach()) for tensor in tensors]


def _is_chunk(tensor: Tensor) -> bool:
    """Return True for a tensor that is processed at once."""
    return tensor.numel() <= pieces.CHUNK * torch.get_num_threads()


def map_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply an elementwise ``function``, chunk by chunk if the tensors are large; the result has the layout of the first tensor."""
    return function(*tensors) if _is_chunk(tensors[0]) else pieces.map_large(function, *tensors)


def bucket_rows(rows: Sequence[Row], size: int | None = None, small: int = pieces.SMALL, few: int = pieces.FEW) -> list[list[int]]:
    """Group row numbers into buckets of the same types and device, each number once.

    A bucket has at most ``size`` elements (by default one chunk). A row stays alone if it has more than ``small`` elements, if
    its bucket would have fewer than ``few`` rows, or if one of its tensors is not plain and dense.
    """
    if len(rows) < few:
        return [[number] for number in range(len(rows))]
    size = size or pieces.chunk_size()
    kinds: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        plain = all(type(tensor) in PLAIN and tensor.layout == torch.strided for tensor in row)
        kind = (row[0].device, *(tensor.dtype for tensor in row)) if plain and row[0].numel() <= small else number
        kinds.setdefault(kind, []).append(number)
    buckets = [bucket for kind in kinds.values() for bucket in _filled(kind, rows, size)]
    return [part for bucket in buckets for part in ([bucket] if len(bucket) >= few else [[number] for number in bucket])]


def _filled(numbers: Iterable[int], rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Split row numbers, in order, into lists of at most ``size`` elements."""
    bucket: list[int] = []
    count = 0
    for number in numbers:
        if bucket and count + rows[number][0].numel() > size:
            yield bucket
            bucket, count = [], 0
        bucket.append(number)
        count += rows[number][0].numel()
    yield bucket


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Copy all elements of ``tensors``, each in row-major order, into one new tensor."""
    flat: Tensor = _flatten_dense_tensors(tensors)
    return flat


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """View a flat tensor as tensors of the shapes of ``tensors``."""
    parts: Sequence[Tensor] = _unflatten_dense_tensors(flat, tensors)
    return parts


def merge(rows: Sequence[Row]) -> Row:
    """Return the only row, or one row with the flattened columns of all."""
    return rows[0] if len(rows) == 1 else tuple(flatten(column) for column in zip(*rows, strict=True))


def split(made: Tensor, rows: Sequence[Row]) -> Sequence[Tensor]:
    """View what was computed from :func:`merge` as one tensor for each row."""
    return [made] if len(rows) == 1 else unflatten(made, [first for first, *_ in rows])


def scalar_div(number: float | Tensor, tensor: Tensor) -> Tensor:
    """Compute number / tensor in one pass, because torch takes the reciprocal of the tensor first and then the product."""
    if not isinstance(number, Tensor):
        number = torch.tensor(number, dtype=torch.result_type(tensor, 1.0), device="cpu")
    return torch.div(number, tensor)


def outside(where: Tensor) -> Tensor:
    """Return 0 where ``where`` is true, else 1, because a product costs a tenth of a select between scattered places."""
    return where.logical_not().view(torch.uint8)


def can_check(tensor: Tensor) -> bool:
    """Return True for a tensor that :func:`are_finite` can check: whole, dense, small and on the CPU."""
    return type(tensor) in PLAIN and tensor.is_cpu and tensor.layout == torch.strided and tensor.numel() <= SUMMED


def are_finite(tensors: list[Tensor]) -> bool:
    """Return True if tensors are finite, by one call, the one that GradScalers use: it rewrites them with equal values.

    False also if one of them cannot be checked.
    """
    if not all(map(can_check, tensors)):
        return False
    found, one = torch.zeros((), device="cpu"), torch.ones((), device="cpu")
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
    except RuntimeError:  # elements share memory, or the type is not supported
        return False
    return found.item() == 0


def _key(function: Any) -> Hashable:
    """Return what identifies a function: of a bound method its class's function and the object, which may be equal to another's."""
    owner = getattr(function, "__self__", None)
    return function if owner is None else (function.__func__, owner)


def _is_shared(key: Any) -> bool:
    """Return True if kernels of equal ``key`` compute the same, because it holds only frozen values and plain module functions."""
    if isinstance(key, tuple):
        return all(map(_is_shared, key))
    return isinstance(key, str) or is_frozen_config(key) or getattr(key, "__closure__", key) is None


def _drawn(draw: Function, row: Row, pool: BufferPool, number: int) -> tuple[Tensor, Tensor]:
    """Draw one row: at once, or DRAWN elements at a time into buffers."""
    if row[0].numel() <= DRAWN or not row[0].is_cpu:
        mask = draw(*row)
        return mask, row[0] * mask
    mask, product = (pool.empty_like(row[0], (number, what)) for what in ("mask", "product"))
    for into, multiplied, *terms in pieces.chunks(mask, product, *row, size=DRAWN):
        torch.mul(terms[0], into.copy_(draw(*terms)), out=multiplied)
    return mask, product


def _draw_by_kernel(
    kernel: Kernel, rows: Sequence[Row], noise: Any, generator: torch.Generator, scalars: Scalars, pool: BufferPool
) -> Iterator[Drawn]:
    start, numbers_of = 0, [*map(float, scalars)]
    for numbers in bucket_rows(rows, DRAWN):
        found = [rows[number] for number in numbers]
        row = merge(found)
        mask, product = (pool.empty_like(row[0], (numbers[0], what)) for what in ("mask", "product"))
        # random numbers that are drawn before the kernel take memory: DRAWN of them at a time
        for part in pieces.chunks(mask, product, *row, size=_LONGEST if noise.from_words else DRAWN):
            if noise.from_words:
                kernel(part, (*numbers_of, as_int32(start), *counter_keys(generator)))
            else:
                kernel((*part[:2], noise.numbers(part[2], generator), *part[2:]), numbers_of)
            start += part[0].numel()
        masks, products = split(mask, found), split(product, found)
        yield from (Drawn(*drawn) for drawn in zip(numbers, masks, products, strict=True))
