"""Say which weights are zero together: single weights, rows, columns, blocks, or N of each M.

A group g of d_g weights w_g has the size r_g = |w_g| / sqrt(d_g), their root mean square. Every scalar formula of a penalty serves
groups with r_g in the place of |w|, at the same lam: Omega(w) = sum d_g omega(r_g), eta_g = eta_hat(r_g), one mask s_g for the group,
and w_g prox(r_g) / r_g as the prox. ``grouped.py`` does that with a structure's :meth:`Structure.pool` and :meth:`Structure.spread`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sparse import _checks
from lightning_sparse._construction import Constructed, typed

__all__ = ["NM", "Blocks", "Channels", "Columns", "Coupled", "Element", "Heads", "Rows", "Structure"]


class Structure(metaclass=Constructed):
    """Groups the weights of a tensor. A subclass is a frozen dataclass that defines :meth:`pool` and :meth:`spread`.

    Your own structure is one class in your own file; ``lightning_sparse.testing.check_structure`` checks it. :meth:`check` refuses
    tensors that cannot be grouped.
    """

    elementwise: ClassVar[bool] = False  # every weight has its own size, alpha and mask
    ranks_within: ClassVar[bool] = False  # which weights may be zero depends on the ranks of their neighbours

    def __repr__(self) -> str:
        return typed(self)

    @property
    def height(self) -> int | None:
        """Return the number of rows (indices of dimension 0) that a group lies in, counted from the first; None for all of them.

        FSDP2 splits weights by rows. With a height, :meth:`pool` returns the values of each ``height`` rows as one index of
        dimension 0.
        """
        return None

    def pool(self, x: Tensor) -> Tensor:
        """Return the sum of ``x``, a tensor of a weight's shape, over each group: one value for each group, in any shape."""
        raise NotImplementedError

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        """Return the value of each weight's group, in a shape that broadcasts to that of ``like``."""
        raise NotImplementedError

    def project(self, zeros: Tensor, score: Tensor) -> Tensor:
        """Return an admissible mask of zeros that contains ``zeros``; the highest ``score`` stay. A copy, or ``zeros`` itself."""
        return zeros

    def check(self, name: str, w: Tensor) -> None:
        """Raise ValueError, naming the parameter, if the weights ``w`` cannot be grouped."""


def check_groups(structure: Structure, name: str, w: Tensor) -> None:
    """Raise ValueError, naming the parameter, if the weights ``w`` cannot be grouped, or ``pool`` and ``spread`` do not fit each other."""
    structure.check(name, w)
    if type(structure).__module__ == __name__:  # the structures here are tested
        return
    ones = torch.ones(w.shape, dtype=torch.float64)
    try:
        count = structure.pool(ones)
        number = torch.arange(1.0, count.numel() + 1, dtype=torch.float64).reshape(count.shape)
        fits = torch.allclose(structure.pool(structure.spread(number, ones).expand(w.shape)), number * count)
    except Exception as error:  # a structure of one's own may raise any error
        raise ValueError(f"{structure!r} cannot group {name!r} of shape {tuple(w.shape)}: {type(error).__name__}: {error}") from error
    if not fits or int(count.sum()) != ones.numel():
        raise ValueError(
            f"{structure!r} does not group {name!r} of shape {tuple(w.shape)}: pool must sum over each group, with each weight in one "
            "group, and spread must return each weight its own group's value; lightning_sparse.testing.check_structure checks it"
        )


@dataclass(frozen=True, repr=False)
class Element(Structure):
    """Single weights: unstructured sparsity, the default."""

    elementwise: ClassVar[bool] = True

    def pool(self, x: Tensor) -> Tensor:
        return x

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        return value


@dataclass(frozen=True, repr=False)
class Rows(Structure):
    """The weights of one index of dimension 0: the output features of a Linear layer, the filters of a convolution.

    Biases and later layers are not part of the group: see ``Channels`` for groups whose removal changes nothing.
    """

    @property
    def height(self) -> int | None:
        return 1

    def pool(self, x: Tensor) -> Tensor:
        return x if x.dim() < 2 else x.sum(tuple(range(1, x.dim())), keepdim=True)

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        return value


@dataclass(frozen=True, repr=False)
class Columns(Structure):
    """The weights of one index of dimension 1: the input features of a Linear layer, the input channels of a convolution."""

    def pool(self, x: Tensor) -> Tensor:
        return x.sum([dim for dim in range(x.dim()) if dim != 1], keepdim=True)

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        return value

    def check(self, name: str, w: Tensor) -> None:
        _need_matrix(self, name, w)


@dataclass(frozen=True, repr=False)
class Blocks(Structure):
    """Blocks of a matrix, rows by columns; the columns of a convolution are its input channels and positions, (in kh kw).

    Blocks at the lower and right ends are smaller if ``shape`` does not divide the matrix. Raises ValueError unless both sides
    are whole numbers of at least 1.

    Args:
        shape: rows and columns of a block.
    """

    shape: Sequence[int] = (16, 16)

    def __post_init__(self) -> None:
        sides = list(self.shape) if isinstance(self.shape, Sequence) else []
        if len(sides) != 2:
            raise ValueError(f"shape must be the rows and columns of a block, such as (16, 16), got {self.shape!r}")
        names = ("the rows in shape", "the columns in shape")
        object.__setattr__(self, "shape", tuple(_checks.whole(name, side, 1) for name, side in zip(names, sides, strict=True)))

    @property
    def height(self) -> int | None:
        return self.shape[0]

    def pool(self, x: Tensor) -> Tensor:
        flat = x.reshape(len(x), -1)
        rows, columns = self.shape
        down, right = -len(flat) % rows, -flat.shape[1] % columns
        padded = functional.pad(flat, (0, right, 0, down)) if down or right else flat
        return padded.reshape(len(padded) // rows, rows, padded.shape[1] // columns, columns).sum((1, 3))

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        rows, columns = self.shape
        tall, wide = value.shape
        whole = value[:, None, :, None].expand(tall, rows, wide, columns).reshape(tall * rows, wide * columns)
        return whole[: len(like), : like[0].numel()].reshape(like.shape)

    def check(self, name: str, w: Tensor) -> None:
        _need_matrix(self, name, w)


@dataclass(frozen=True, repr=False)
class NM(Structure):
    """At most ``n`` non-zero weights in each ``m`` consecutive ones along dimension 1, the inputs: 2:4 is NM(2, 4).

    Penalty and masks act on single weights. The ``n`` weights of the largest keep probability (of equal ones the largest, then the
    first) of each ``m`` stay, and those of them that count as zero by themselves do not; give ``freeze=0.25``, so that they are
    trained with their support frozen. Raises ValueError unless 1 <= n < m.

    Args:
        n: non-zero weights among ``m``.
        m: length of a group.
    """

    n: int = 2
    m: int = 4
    elementwise: ClassVar[bool] = True
    ranks_within: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole("n", self.n, 1)
        if _checks.whole("m", self.m, 1) <= self.n:
            raise ValueError(f"NM(n, m) keeps n of m weights: n must be less than m, got NM({self.n}, {self.m})")

    @property
    def height(self) -> int | None:
        return 1

    def pool(self, x: Tensor) -> Tensor:
        return x

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        return value

    def project(self, zeros: Tensor, score: Tensor) -> Tensor:
        last = score.movedim(1, -1)
        short = -last.shape[-1] % self.m
        padded = functional.pad(last.float(), (0, short), value=-torch.inf) if short else last.float()
        parts = padded.reshape(*padded.shape[:-1], padded.shape[-1] // self.m, self.m)
        order = parts.sort(dim=-1, descending=True, stable=True).indices[..., : self.n]
        kept = torch.zeros_like(parts, dtype=torch.bool).scatter_(-1, order, True).reshape(padded.shape)
        return zeros | ~kept[..., : last.shape[-1]].movedim(-1, 1)

    def check(self, name: str, w: Tensor) -> None:
        _need_matrix(self, name, w)


class Coupled(Structure):
    """Base of structures whose groups have weights in several tensors: they are found on a trace of the network."""

    heads: ClassVar[bool] = False  # heads of attention, not channels
    cost: ClassVar[str] = "weights"  # what the removal of a group saves, by which scores that are a rise in loss are divided

    def pool(self, x: Tensor) -> Tensor:
        raise TypeError(f"the groups of {self!r} have weights in several tensors; a run finds them (lightning_sparse.coupling)")

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        return self.pool(value)


@dataclass(frozen=True, repr=False)
class Channels(Coupled):
    """Channels of convolutions and neurons of Linear layers, with all that produces, normalises and reads them.

    A zero group can be removed without any change of the output (lightning_sparse.shrinking). Its size r_g is the root mean square of
    the d_g weights that carry its scale: batch norm's weight and bias where there is batch norm, because the rows in front of it are
    scale-free, else the rows and biases that produce it. Everything else of the group is zero with it and counts neither in r_g nor in
    d_g, so that the penalty d_g omega(r_g) has the scalar gradient, prox and mask at the same lam. Groups that are not proved to be
    removable are left out, and one of each axis stays. The network is traced once by torch-pruning (extra ``shrink``), on the
    LightningModule's ``example_input_array`` or the first training batch. Raises ValueError for another ``cost``.

    Args:
        cost: what a channel is ranked by beside its score, where the score is a rise in loss (``scores.Fisher()``): the channels of the
            lowest score for each of the ``"weights"`` or ``"multiply_adds"`` that go with them are removed first. Weights make the
            network small, multiply-adds make it fast. ``target_sparsity`` is a share of the weights with either.
    """

    cost: str = "weights"  # type: ignore[misc] # an option here, fixed for Heads

    def __post_init__(self) -> None:
        _checks.one_of("cost", self.cost, ("weights", "multiply_adds"))


@dataclass(frozen=True, repr=False)
class Heads(Coupled):
    """Heads of attention whose queries, keys and values are Linear layers; masked at the columns of the output projection.

    The size r_g of a head is the root mean square of all its d_g weights: those columns, and the rows and biases of q, k and v.
    Found and proved as the groups of :class:`Channels`. nn.MultiheadAttention has no heads that can be removed; the
    error says how its heads become zero.
    """

    heads: ClassVar[bool] = True


def _need_matrix(structure: Structure, name: str, w: Tensor) -> None:
    if w.dim() < 2:
        raise ValueError(f"{structure!r} groups matrices, but {name!r} has the shape {tuple(w.shape)}; exclude it with select=['!{name}']")
