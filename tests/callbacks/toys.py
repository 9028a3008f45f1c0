"""The small modules and data of the conformance suite, under the name that the callback tests import."""

from lightning_sparse.conformance.toys import Repeated, Spy, Toy, data, hooks, trainer, weights

__all__ = ["Repeated", "Spy", "Toy", "data", "hooks", "trainer", "weights"]
