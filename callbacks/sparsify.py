"""Define Sparsify, the recommended way to a known share of zeros."""

from __future__ import annotations

from typing import Any

from lightning_sparse import penalties
from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.duality import Penalty
from lightning_sparse.methods.proximal import Proximal


class Sparsify(Sparsifier):
    """Trains to a share of zeros: removes weights along a ramp, and shrinks those that remain where that costs nothing.

    The share of zeros rises as gradual pruning's cubic; weights of the lowest ``score`` are removed for good and the others recover
    from each cut. Up to the end of the ramp the exact prox of an L1 penalty runs after each optimiser step. Its lam is bounded in units of
    the loss's gradients: at a twentieth of them where the scale of the weights does not matter, as in convolutions before a batch norm, and
    near 0 where it does. So it needs no strength and works alike under Adam and SGD. The last share ``freeze`` of the run (where it is
    0: a quarter, or 0.7 if the network was trained before) trains the weights that are left, without penalty.

    It is ``AdaptiveProx(penalties.L1(), exact=True, target_sparsity=...)`` whose steps move a weight by at most the learning rate.
    Source of the ramp: Zhu and Gupta, arXiv 1710.01878. Raises ValueError unless 0 < target_sparsity < 1.

    Args:
        target_sparsity: the share of the selected weights that is zero at the end.
    """

    method_type, own_arguments, sample = Proximal, (), {"target_sparsity": "0.9"}
    fills = ("penalty", "lam")
    instead = {"lam": "use ReweightedPenalty or AdaptiveProx for a strength"}  # for errors

    def __init__(self, target_sparsity: float, **options: Any) -> None:
        if target_sparsity is None:
            raise TypeError("Sparsify needs target_sparsity, the share of zeros to reach, such as 0.9; got None")
        for name in self.fills:
            if name in options:
                raise TypeError(f"unexpected keyword argument {name!r}")
        super().__init__(penalties.L1(), None, target_sparsity=target_sparsity, **options)

    def _make_method(self, penalty: Penalty) -> Proximal:
        return Proximal(penalty, exact=True, bounded=True)  # because first gradients may be tiny

    def _shared(self) -> dict[str, Any]:
        return super()._shared() | {"lam": None}  # because it is found
