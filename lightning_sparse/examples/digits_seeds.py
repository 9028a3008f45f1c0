"""``python -m lightning_sparse.examples.digits_seeds [--seeds 5] [overrides]``: same as ``lightning-sparse seeds digits``."""

from __future__ import annotations

import sys

from lightning_sparse.cli import main, seeds
from lightning_sparse.cli.report import Result


def run(seed: int, overrides: list[str]) -> Result:
    """Train the recipe with one seed and return its result. Raises UsageError for overrides unknown to the recipe."""
    return seeds.train("digits", seed, overrides)


def figures(result: Result) -> dict[str, float]:
    """Return the accuracies in % and the non-zero weights in % of the selected weights."""
    dense = result.dense or result.sparse
    return {
        "dense test %": 100 * dense.metrics["test/accuracy"],
        "sparse test %": 100 * result.sparse.metrics["test/accuracy"],
        "non-zero %": 100 * result.sparse.nonzero / result.sparse.size,
    }


if __name__ == "__main__":
    sys.exit(main(["seeds", "digits", *sys.argv[1:]]))
