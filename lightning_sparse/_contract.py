"""Comparisons and error messages shared by the contract checks of :mod:`lightning_sparse.testing`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sparse.duality import MaskRule, Penalty

DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.04}  # dtype: relative error allowed against float64


class ContractError(AssertionError):
    """A penalty or a mask rule breaks the contract of its base class."""


def described(subject: object) -> None:
    """Check that recipes, resumed runs and cached kernels can tell the subject by its fields: that it is a frozen dataclass."""
    kind = type(subject)
    parameters = getattr(kind, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        found = "a dataclass that is not frozen" if parameters else "no dataclass"
        raise ContractError(
            f"{kind.__name__} is {found}: recipes and resumed runs know it by its fields. Write @dataclass(frozen=True) above the class, "
            "and its numbers as fields"
        )


def fail(subject: object, what: str, w: Tensor, wrong: Tensor, detail: str = "") -> None:
    """Raise ContractError naming the first w where ``wrong`` is True."""
    if wrong.any():
        raise ContractError(f"{subject!r}: {what} at w = {w.reshape(-1)[int(wrong.reshape(-1).nonzero()[0])]:.6g}{detail}")


def close(subject: object, what: str, w: Tensor, value: Tensor, wanted: Tensor, relative: float, absolute: float = 0.0) -> None:
    """Raise ContractError naming the w of the largest relative difference, and both values. Equal infinities are close."""
    difference, allowed = (value - wanted).abs(), relative * wanted.abs() + absolute
    wrong = ~((difference <= allowed) | (value == wanted))
    if wrong.any():
        excess = (difference / allowed).nan_to_num(torch.inf, torch.inf).where(wrong, torch.zeros_like(difference))
        at = int(excess.argmax())
        fail(subject, f"{what}: {value[at]:.8g} against {wanted[at]:.8g}", w, torch.arange(len(w)) == at)


def same_kind(subject: object, what: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ContractError(
            f"{subject!r}: {what} must keep shape and dtype: got {tuple(value.shape)}, {value.dtype} for {tuple(like.shape)}, {like.dtype}"
        )


def weights(subject: Penalty | MaskRule) -> Tensor:
    """Return test weights: log-spaced, or as many distinct ones as a subject that is not separable needs."""
    if subject.separable:
        return torch.logspace(-6, 6, 97, dtype=torch.float64)
    width = int(getattr(subject, "width", 24))
    return torch.linspace(0.1, 2.0, width, dtype=torch.float64).roll(width // 3)
