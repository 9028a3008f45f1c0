"""``lightning-sparse seeds RECIPE [--seeds 5] [overrides]``: mean and standard deviation of a recipe's figures over seeds."""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import lightning
import torch
from lightning_utilities.core import rank_zero

from lightning_sparse._version import __version__
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.table import Result
from lightning_sparse.cli.training import fit

_PLAIN = ["--trainer.logger", "false", "--report.pictures", "false", "--report.table", "false"]
_ABOUT = (
    "Run a recipe with seeds 0 to N - 1, without logger and pictures, and print mean and standard deviation. The seed changes "
    "the initial weights and the order of the batches, not a data split with its own seed. Further arguments override the "
    "recipe as in fit."
)


def train(recipe: str, seed: int, overrides: list[str]) -> Result:
    """Train a recipe with one seed in a temporary folder. Raises UsageError for overrides unknown to the recipe."""
    with tempfile.TemporaryDirectory() as folder, _without_files(folder):
        words = [*_PLAIN, "--trainer.default_root_dir", folder, *overrides, "--seed_everything", str(seed)]
        result = fit(["--config", recipe, *words]).result
    if result is None:
        raise UsageError("the run has no sparsity callback, so there is nothing to report")
    return result


@contextmanager
def _without_files(folder: str) -> Iterator[None]:
    """Cut the checkpoint and the next step out of the line at the end of a fit, because the folder is deleted."""

    def shorten(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if folder in text and "selected weights are zero; " in text:
            record.msg, record.args = text.partition("; ")[0], ()
        return True

    log = rank_zero.log  # of the Lightning package that was imported last
    log.addFilter(shorten)
    try:
        yield
    finally:
        log.removeFilter(shorten)


def figures(result: Result) -> dict[str, float]:
    """Return the test metrics of the sparse network and of the dense twin, if any, non-zero weights in %, and seconds."""
    networks = {"dense": result.dense, "sparse": result.sparse}
    trained = {title: network for title, network in networks.items() if network is not None}
    values = {f"{title} {name}": value for title, network in trained.items() for name, value in network.metrics.items()}
    values["non-zero %"] = 100 * result.sparse.nonzero / result.sparse.size
    return values | {"seconds": sum(network.seconds for network in trained.values())}


def summary(recipe: str, rows: list[dict[str, float]], overrides: list[str]) -> str:
    """Return settings and versions, one line per seed, then mean and sample standard deviation of each figure."""
    versions = f"lightning-sparse {__version__}, torch {torch.__version__}, lightning {lightning.__version__}"
    lines = [f"recipe {recipe} {' '.join(overrides)}".rstrip(), f"{versions}, Python {platform.python_version()}"]
    widths = {name: max(len(name), 8) + 2 for name in rows[0]}
    lines.append(f"{'seed':>6}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    cells = [(str(seed), row) for seed, row in enumerate(rows)]
    for label, statistic in (("mean", statistics.mean), ("sd", statistics.stdev)):
        cells.append((label, {name: statistic(row[name] for row in rows) for name in widths}))
    lines += [f"{label:>6}" + "".join(f"{row[name]:>{width}.4f}" for name, width in widths.items()) for label, row in cells]
    return "\n".join(lines)


def run(verb: str, words: list[str]) -> int:
    """Train once for each seed and print the summary."""
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", description=_ABOUT)
    parser.add_argument("recipe", help="a packaged recipe or a YAML file")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many (default: %(default)s)")
    args, overrides = parser.parse_known_args(words)
    if args.seeds < 2:
        raise UsageError(f"--seeds must be at least 2 for a standard deviation, got {args.seeds}")
    print(summary(args.recipe, [figures(train(args.recipe, seed, overrides)) for seed in range(args.seeds)], overrides))
    return 0
