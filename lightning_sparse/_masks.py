"""What the mask form makes of each weight in a batch: call by call, or by one compiled kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse import _joined, duality
from lightning_sparse._compiled import Kernel
from lightning_sparse._curvature import noise_eta
from lightning_sparse._hashed import keys, signed, words
from lightning_sparse._joined import Masks, Row
from lightning_sparse._memory import Kept
from lightning_sparse._pieces import mapped, pieces
from lightning_sparse.duality import Penalty
from lightning_sparse.noise import Elementwise, Noise, bounded_variance

_LONGEST = 1 << 30  # elements at a time: a weight's number is a 32-bit word


class Masking(ABC):
    """The masks of rows of terms: w, and H_jj where it calibrates."""

    def check(self, like: Iterable[Tensor], terms: int, outputs: bool) -> None:  # noqa: B027 - nothing can fail by default
        """RuntimeError where noise on ``outputs``, or masks, of weights like these, of that many terms, cannot be made."""

    @abstractmethod
    def masked(self, rows: Sequence[Row], lam: float, generator: torch.Generator, kept: Kept | None) -> Masks:
        """Number, mask and w * mask of each row, as of :func:`_joined.masked`."""

    @abstractmethod
    def spread(self, lam: float, *terms: Tensor) -> Tensor:
        """Var s of each weight's mask."""


class Called(Masking):
    """By a call for each operation, of any ``eta`` of the terms and any noise; element by element where it is ``separable``.

    Keep probabilities are ``alpha_min`` at least.
    """

    def __init__(self, eta: Callable[..., Tensor], noise: Noise, alpha_min: float, separable: bool) -> None:
        self._eta, self._noise, self._least, self._separable = eta, noise, alpha_min, separable

    def masked(self, rows: Sequence[Row], lam: float, generator: torch.Generator, kept: Kept | None) -> Masks:
        draw = lambda *terms: self._noise.sample(self._alpha(lam, *terms), generator)  # noqa: E731
        return _joined.masked(draw, rows, not self._separable, kept)

    def _alpha(self, lam: float, *terms: Tensor) -> Tensor:
        """alpha bounded from below, but for a rule that drops a weight for good (top-k), which keeps its 0."""
        if self._separable:
            return mapped(lambda *terms: self._bounded(self._eta(*terms), lam), *terms)
        eta = self._eta(*terms)
        return self._bounded(eta, lam).masked_fill(eta == 0, 0.0)

    def _bounded(self, eta: Tensor, lam: float) -> Tensor:
        return duality.alpha_of(eta, lam).clamp_(min=self._least)

    def spread(self, lam: float, *terms: Tensor) -> Tensor:
        return mapped(lambda *terms: bounded_variance(self._eta(*terms), lam, self._least), *terms)


class Fused(Masking):
    """By a compiled kernel, of ``penalty``. A noise that takes words is given hashed ones; of another the numbers are drawn before."""

    def __init__(self, penalty: Penalty, noise: Noise, ceiling: float, alpha_min: float) -> None:
        if not isinstance(noise, Elementwise):
            raise TypeError(
                f"compile=True needs ScaledBernoulli(), Gaussian() or another lightning_sparse.noise.Elementwise, got {noise!r}"
            )
        self._words, self._numbers = noise.from_words, noise.numbers
        self._fill = Kernel(_filling, penalty, noise, ceiling, alpha_min, what=f"{penalty!r} with {noise!r}")
        self._spread = Kernel(_spreading, penalty, ceiling, alpha_min, what=repr(penalty))

    def check(self, like: Iterable[Tensor], terms: int, outputs: bool) -> None:
        if outputs:
            self._spread.check(like, (1 + terms) * (0.5,), (0.5,))
        else:
            given, numbers = (2, (0.5, 0, 1, 2)) if self._words else (3, (0.5,))
            self._fill.check(like, (given + terms) * (0.5,), numbers)

    def masked(self, rows: Sequence[Row], lam: float, generator: torch.Generator, kept: Kept | None) -> Masks:
        start, memory = 0, kept or Kept()
        for numbers in _joined.grouped(rows, _joined.DRAWN):
            found = [rows[number] for number in numbers]
            row = _joined.as_one(found)
            mask, product = (memory.empty_like(row[0], (numbers[0], what)) for what in ("mask", "product"))
            for part in pieces(mask, product, *row, size=_LONGEST if self._words else _joined.DRAWN):  # numbers are memory
                self._into(part, lam, generator, start)
                start += part[0].numel()
            yield from zip(numbers, _joined.apart(mask, found), _joined.apart(product, found), strict=True)

    def _into(self, part: Row, lam: float, generator: torch.Generator, start: int) -> None:
        if self._words:
            self._fill(part, (float(lam), signed(start), *keys(generator)))
        else:
            mask, product, *terms = part
            self._fill((mask, product, self._numbers(terms[0], generator), *terms), (float(lam),))

    def spread(self, lam: float, *terms: Tensor) -> Tensor:
        spread = torch.empty_like(terms[0])
        self._spread((spread, *terms), (float(lam),))
        return spread


def _filling(penalty: Penalty, noise: Elementwise, ceiling: float, alpha_min: float) -> Any:
    def masks(mask: Tensor, product: Tensor, numbers: Tensor, w: Tensor, estimate: Sequence[Tensor], lam: Tensor) -> None:
        alpha = duality.alpha_of(noise_eta(penalty, lam, ceiling, w, *estimate), lam).clamp(min=alpha_min)
        mask.copy_(noise.mask(alpha, numbers))
        product.copy_(w * mask)

    def of_words(mask: Tensor, product: Tensor, w: Tensor, *rest: Tensor) -> None:
        *estimate, lam, start, first, second = rest
        masks(mask, product, words(w, start, first, second), w, estimate, lam)

    def of_numbers(mask: Tensor, product: Tensor, numbers: Tensor, w: Tensor, *rest: Tensor) -> None:
        *estimate, lam = rest
        masks(mask, product, numbers, w, estimate, lam)

    return of_words if noise.from_words else of_numbers


def _spreading(penalty: Penalty, ceiling: float, alpha_min: float) -> Any:
    def fill(spread: Tensor, w: Tensor, *rest: Tensor) -> None:
        *estimate, lam = rest
        spread.copy_(bounded_variance(noise_eta(penalty, lam, ceiling, w, *estimate), lam, alpha_min))

    return fill
