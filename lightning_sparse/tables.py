"""Lookup tables for penalties known only as a curve eta -> (w, f), fast enough for training.

Each octave of |w| has 1024 equal cells, so the leading bits of a float are the index of its cell and no logarithm is needed.
Linear interpolation within a cell has a relative error of 2.4e-7 for functions between w^0 and w^-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.numeric import HIGH, LOW

Array = np.ndarray
_FAR = 2.0**60  # a slope of 1/w is set to 0 from here on, because larger squares overflow float32
_BITS = 10  # leading bits of the mantissa: the index of the cell in its octave
_FLOATS = 1 << (8 + _BITS)  # number of cells of all float32 >= 0
_LAYOUT = {torch.float32: (torch.int32, np.float32, np.int32, 23), torch.float64: (torch.int64, np.float64, np.int64, 52)}


class Table:
    """A piecewise linear function of |w|. The first cell is extended down to 0; the value is 0 for |w| >= ``high``.

    ``exact`` puts a node exactly at ``high`` by looking up w * unit; otherwise the table ends slightly above ``high``.
    """

    def __init__(self, function: Callable[[Array], Array], low: float, high: float, exact: bool = False) -> None:
        self.unit = 2.0 ** math.ceil(math.log2(high)) / high if exact else 1.0
        first, last = (np.array([low * self.unit, high * self.unit]).view(np.int64) >> (52 - _BITS)).tolist()
        nodes = (np.arange(first, last + (1 if exact else 3), dtype=np.int64) << (52 - _BITS)).view(np.float64)
        values = function(nodes / self.unit)
        slopes = np.diff(values) / np.diff(nodes)
        self.low, self.high = float(nodes[0]), float(nodes[-1])
        self.slopes = torch.from_numpy(np.append(slopes, 0.0))
        self.starts = torch.from_numpy(np.append(values[:-1] - slopes * nodes[:-1], 0.0))
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (like.dtype, like.device)
        if key not in self._cast:
            self._cast[key] = (self.starts.to(like), self.slopes.to(like))
        return self._cast[key]

    def __call__(self, w: Tensor) -> Tensor:
        size = (w if w.dtype in _LAYOUT else w.float()).detach().reshape(-1).abs().mul_(self.unit).clamp_(max=self.high)
        starts, slopes = self._columns(size)
        integer, np_float, np_integer, mantissa = _LAYOUT[size.dtype]
        first = int(np.array(self.low, dtype=np_float).view(np_integer)) >> (mantissa - _BITS)
        cell = (size.view(integer) >> (mantissa - _BITS)).sub_(first).clamp_(0, len(starts) - 1)
        value = starts.index_select(0, cell).addcmul_(slopes.index_select(0, cell), size)
        return value.view(w.shape).to(w.dtype)

    def _by_bits(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the table for every float32 >= 0, indexed by the 18 bits after the sign. The first cell reaches down to 0."""
        key = (torch.uint8, device)
        if key not in self._cast:
            first = int(np.array(self.low, dtype=np.float32).view(np.int32)) >> (23 - _BITS)
            columns = []
            for column in (self.starts, self.slopes):
                full = torch.zeros(_FLOATS)
                full[:first], full[first : first + len(column)] = column[0], column
                columns.append(full.to(device))
            self._cast[key] = (columns[0], columns[1])
        return self._cast[key]

    def _halves(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the table for every float32, negative numbers first. The value at 0 and at the smallest denormals is 0."""
        key = (torch.int8, device)
        if key not in self._cast:
            starts, slopes = (column.clone() for column in self._by_bits(device))
            starts[0] = slopes[0] = 0.0
            self._cast[key] = (torch.cat([-starts, starts]), torch.cat([slopes, slopes]))
        return self._cast[key]

    def even(self, w: Tensor) -> Tensor:
        """Return the function at |w|. For float32 twice as fast as a call, because the bits of w are the index of its cell."""
        if w.dtype != torch.float32 or self.unit != 1:
            return self(w)
        starts, slopes = self._by_bits(w.device)
        inner = w.detach().reshape(-1).abs().clamp_(max=self.high)
        cell = inner.view(torch.int32) >> (23 - _BITS)
        return starts.index_select(0, cell).addcmul_(slopes.index_select(0, cell), inner).view(w.shape)

    def odd(self, w: Tensor) -> Tensor:
        """Return sign(w) times the function at |w|. For float32 twice as fast, because the table includes the sign."""
        if w.dtype != torch.float32:
            return self(w).mul_(w.detach().sign())
        starts, slopes = self._halves(w.device)
        inner = (w.detach().reshape(-1) * self.unit).clamp_(-self.high, self.high)
        cell = (inner.view(torch.int32) >> (23 - _BITS)).add_(_FLOATS)
        return starts.index_select(0, cell).addcmul_(slopes.index_select(0, cell), inner).view(w.shape)


@dataclass(frozen=True)
class Curve:
    """A penalty as four tables: slope omega'(|w|), ratio omega / |w|, conjugate f(eta) / eta and conjugate slope f'(eta).

    For a finite ``jump``, eta_hat is infinite and omega constant for |w| >= ``jump``; otherwise the slope decays like 1/w.
    ``top`` is the largest eta in the table of the conjugate.
    """

    slope: Table
    ratio: Table
    conjugate: Table
    conjugate_slope: Table
    jump: float
    top: float

    def gradient(self, w: Tensor) -> Tensor:
        return self.slope.odd(w)

    def eta_hat(self, w: Tensor) -> Tensor:
        return w.abs() / self.slope(w)

    def omega(self, w: Tensor) -> Tensor:
        growth = 0.0 if self.jump < torch.inf else 1.0
        return _grow(self.ratio, w.abs(), min(HIGH, self.jump), growth)

    def dual(self, eta: Tensor) -> Tensor:
        if self.jump == torch.inf:
            return _grow(self.conjugate, eta, self.top, 1.0)
        height = 2 * self.omega(torch.full_like(eta, self.jump))
        # beyond the jump the dual is its lower envelope: a line in 1/eta from the jump to eta = inf
        return torch.where(eta < self.top, _grow(self.conjugate, eta, self.top, 0.0), height - self.jump**2 / eta)

    def dual_slope(self, eta: Tensor) -> Tensor:
        beyond = eta.reciprocal().mul_(self.top).clamp_(max=1)  # 1 within the table; above it f grows like log eta
        value = self.conjugate_slope.even(eta.clamp(max=self.top)).mul_(beyond)
        return value if self.jump == torch.inf else torch.where(eta < self.top, value, self.jump**2 / eta**2)


def _grow(table: Table, x: Tensor, top: float, growth: float) -> Tensor:
    """Return x * table(x) for x <= ``top``, and top * table(top) + ``growth`` * log(x / top) above."""
    wide = x if x.dtype in _LAYOUT else x.float()
    inner = wide.clamp(max=top)
    value = table(inner) * inner
    return (value + growth * (wide.clamp(min=top) / top).log() if growth else value).to(x.dtype)


def curve(w: Array, eta: Array, f: Array, jump: float = float("inf")) -> Curve:
    """Build the Curve through points (w, eta, f). w increases and covers LOW to HIGH, or LOW to slightly above ``jump``."""
    high = min(HIGH, jump)
    top = float(_spline(w, eta)(np.array([high]))[0])
    slope, ratio = _spline(w, w / eta), _spline(w, (w / eta + f / w) / 2)
    end = high if jump < float("inf") else _FAR
    return Curve(
        Table(lambda at: slope(np.minimum(at, HIGH)) * np.minimum(1, HIGH / at), LOW, end, exact=True),
        Table(ratio, LOW, high),
        Table(_spline(eta, f / eta), LOW, top),
        Table(_spline(eta, (w / eta) ** 2), LOW, top),
        jump,
        top,
    )


def _spline(x: Array, y: Array) -> Callable[[Array], Array]:
    """Interpolate log y by a cubic spline in log x."""
    from scipy.interpolate import CubicSpline

    spline = CubicSpline(np.log(x), np.log(y))
    return lambda at: np.asarray(np.exp(spline(np.log(at))))
