"""What a callback does on the way to a target share of zeros: find lam, remove what is missing by rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sparse import counts, elementwise
from lightning_sparse.mask_rules.ranked import lamp, shrunk
from lightning_sparse.target import FAR, ROUNDS

if TYPE_CHECKING:
    from lightning_sparse.callbacks._supported import Supported


@torch.no_grad()
def advance(callback: Supported) -> bool:
    """ROUNDS times on the way: renew lam, remove by rank what the zeros lack; return whether the target is met."""
    target, way = callback.ascent, callback.total * (1 - callback.freeze)
    if target is None or callback.frozen or callback.step * ROUNDS // way == (callback.step - 1) * ROUNDS // way:
        return False
    zeros, t = callback.share_of_zeros(), callback.step / way
    target.climb(zeros, t, way)
    if zeros < (least := target.least(t)):
        cut(callback, least)
        before, zeros = zeros, callback.share_of_zeros()
        target.ranked += zeros - before
    return target.has_arrived(zeros)


def say_by_rank(callback: Supported) -> None:
    """Say, where the support is frozen, if the rank has removed more than a few weights."""
    if callback.ascent is None:
        return
    aim, start = callback.ascent.target, callback.ascent.start
    by_rank = callback.ascent.ranked + max(aim - callback.share_of_zeros(), 0.0)
    if by_rank > FAR:
        rank_zero_info(
            f"{type(callback).__name__} removed {by_rank:.2%} of the weights by rank, as pruning does, to meet target_sparsity={aim:g} by "
            f"the time its support is frozen: within this run lam (from {start:.3g} to {callback.lam:.3g}) did not bring enough of them to "
            "zero. For zeros by lam alone train longer, raise the learning rate, or give lam= beside target_sparsity: it starts there"
        )


@torch.no_grad()
def cut(callback: Supported, share: float) -> None:
    """Remove the weights of the lowest rank, so that ``share`` of all is zero until the support is frozen."""
    if callback.attachment is not None:
        callback.attachment.restore()
    callback.cut = largest(callback, share)
    for name, kept in callback.cut.items():
        elementwise.apply_mask_(callback.parameters[name], kept)


def largest(callback: Supported, zeros: float) -> dict[str, Tensor]:
    """The support that leaves this share of zeros, all parameters together: what counts as zero goes first, then the lowest LAMP.

    LAMP (Lee et al., arXiv 2010.07611) divides x_j^2 by the sum of the squares at least as large in the same parameter, x being
    alpha |w|: unlike a magnitude it leaves something of every layer.
    """
    alive = {name: ~elementwise.full_tensor(where) for name, where in callback.all_zeros().items()}
    everywhere = {name: torch.ones_like(whole) for name, whole in alive.items()}
    counted = {name: alive[name].float() for name in counts.distinct(callback.parameters)}  # what is tied to one of them is cleared with it
    sizes = {name: (callback.keep_probability(name), callback._live(name)) for name in counted}
    scores = {name: lamp(elementwise.full_tensor(alpha) * elementwise.full_tensor(w)) for name, (alpha, w) in sizes.items()}
    kept = everywhere | shrunk(counted, everywhere, zeros, scores)
    return {name: callback._part(name, whole) for name, whole in kept.items()}
