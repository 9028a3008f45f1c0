"""Mean and spread of the digits recipe: ``python -m lightning_sparse.examples.digits_seeds [--seeds 5] [overrides]``.

Each run is the recipe with another ``seed_everything`` (initial weights and order of the batches; the split stays), its
dense twin included. Further arguments override the recipe as in ``lightning-sparse fit``, for example
``--sparsify AdaptiveMask --sparsify.lam 1e-3``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys

import lightning
import torch

from lightning_sparse._version import __version__
from lightning_sparse.cli import UsageError
from lightning_sparse.cli.report import Result
from lightning_sparse.cli.training import fit

_PLAIN = ["--trainer.logger", "false", "--report.pictures", "false"]


def run(seed: int, overrides: list[str]) -> Result:
    """The recipe's figures with one seed. Raises UsageError for overrides that the recipe does not take."""
    result = fit(["--config", "digits", *_PLAIN, *overrides, "--seed_everything", str(seed)]).result
    if result is None:
        raise UsageError("the run has no sparsity callback, so there is nothing to report")
    return result


def figures(result: Result) -> dict[str, float]:
    """Accuracies in %, non-zero weights in % of the selected ones, seconds for both trainings."""
    dense = result.dense or result.sparse
    return {
        "dense test %": 100 * dense.metrics["test/accuracy"],
        "sparse test %": 100 * result.sparse.metrics["test/accuracy"],
        "non-zero %": 100 * result.sparse.nonzero / result.sparse.size,
        "seconds": dense.seconds + result.sparse.seconds,
    }


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_sparse.examples.digits_seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="run seeds 0 to N - 1 (default: %(default)s)")
    given, overrides = parser.parse_known_args(args)
    if given.seeds < 2:
        parser.error(f"--seeds must be at least 2 to have a spread, got {given.seeds}")
    try:
        rows = [figures(run(seed, overrides)) for seed in range(given.seeds)]
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(rows, overrides))
    return 0


def summary(rows: list[dict[str, float]], overrides: list[str]) -> str:
    """One line a seed, then mean and standard deviation (of the sample) of each figure."""
    versions = f"lightning-sparse {__version__}, torch {torch.__version__}, lightning {lightning.__version__}"
    lines = [f"recipe digits {' '.join(overrides)}".rstrip(), f"{versions}, Python {platform.python_version()}"]
    lines.append(f"{'seed':>6}" + "".join(f"{name:>15}" for name in rows[0]))
    for seed, row in enumerate(rows):
        lines.append(f"{seed:>6}" + "".join(f"{value:>15.2f}" for value in row.values()))
    for label, statistic in (("mean", statistics.mean), ("sd", statistics.stdev)):
        lines.append(f"{label:>6}" + "".join(f"{statistic(row[name] for row in rows):>15.2f}" for name in rows[0]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
