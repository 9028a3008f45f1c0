"""The conformance suite behind :func:`lightning_sparse.testing.check_callback`: checks for every sparsity callback.

Each check fits small models on the CPU and inspects the run through Lightning and torch only, not through the callback.
"""

from __future__ import annotations

from lightning_sparse.conformance import (
    arguments,
    averages,
    changes,
    counts,
    damage,
    endings,
    faults,
    files,
    forwards,
    lengths,
    life_cycle,
    loops,
    memory,
    models,
    neighbours,
    optimizers,
    packages,
    precision,
    ranks,
    resume,
    selection,
    step_sizes,
    steps,
    swaps,
)
from lightning_sparse.conformance._registry import (
    CHECKS,
    Check,
    NotApplicable,
    Outcome,
    Subject,
    check,
    chosen,
    outcome,
    require,
    subject,
    undisturbed,
)

__all__ = ["CHECKS", "Check", "NotApplicable", "Outcome", "Subject", "check", "chosen", "outcome", "require", "subject", "undisturbed"]
__all__ += ["arguments", "averages", "changes", "counts", "damage", "faults", "files", "life_cycle", "loops", "memory", "models"]
__all__ += ["neighbours", "precision", "ranks", "resume", "selection", "steps", "swaps"]
__all__ += ["endings", "lengths", "optimizers", "packages"]
__all__ += ["forwards", "step_sizes"]
