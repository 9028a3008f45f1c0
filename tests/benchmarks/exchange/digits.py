"""Compare penalty and mask on the digits: the same recipe with another callback and the same lam.

    python tests/benchmarks/exchange digits [--seeds 5] [--lams 3e-4 1e-3 3e-3] [--forms ...] [--jobs 2] [overrides]

Each run is the recipe ``digits`` (its schedule, split and fine-tuning share) without the dense twin; the accuracy and the
zeros are those of the saved file. Aim: within 3 points of sparsity and 1 point of test accuracy, in the mean of 5 seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor

import lightning
import torch

from lightning_sparse import __version__
from lightning_sparse.cli import seeds

FORMS = ("ReweightedPenalty", "AdaptiveMask")
AIM_SPARSITY, AIM_ACCURACY = 3.0, 1.0  # points

Job = tuple[str, float, int, list[str]]


def train(job: Job) -> tuple[float, float]:
    """Train one run; return zeros and test accuracy in %."""
    form, lam, seed, overrides = job
    torch.set_num_threads(1)
    words = ["--report.dense_twin", "false", "--sparsify", form, "--sparsify.lam.lam", str(lam), *overrides]
    with contextlib.redirect_stdout(io.StringIO()):
        sparse = seeds.train("digits", seed, words).sparse
    return 100 - 100 * sparse.nonzero / sparse.size, 100 * sparse.metrics["test/accuracy"]


def header(forms: list[str]) -> str:
    """Format the table's first two lines."""
    cells = ["lam", *(cell for form in forms for cell in (f"{form}: zeros %", "test %"))]
    cells += ["zeros apart", "test apart", "within 3 and 1 points"] if len(forms) > 1 else []
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def row(lam: float, results: dict[str, list[tuple[float, float]]]) -> str:
    """Format one line: mean (sd) of both forms, differences, and whether the goal is met."""
    cells, means = [f"{lam:g}"], {}
    for form in results:
        zeros, accuracy = (list(column) for column in zip(*results[form], strict=True))
        means[form] = statistics.mean(zeros), statistics.mean(accuracy)
        cells += [f"{m:.2f} ({statistics.stdev(c):.2f})" for m, c in zip(means[form], (zeros, accuracy), strict=True)]
    if len(means) < len(FORMS):
        return " | ".join(cells)
    apart = [means[FORMS[1]][i] - means[FORMS[0]][i] for i in (0, 1)]
    met = abs(apart[0]) <= AIM_SPARSITY and abs(apart[1]) <= AIM_ACCURACY
    return " | ".join([*cells, *(f"{difference:+.2f}" for difference in apart), "yes" if met else "no"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lams", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="one alone prints its own figures")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    given, overrides = parser.parse_known_args()
    jobs: list[Job] = [(form, lam, seed, overrides) for lam in given.lams for form in given.forms for seed in range(given.seeds)]
    print(f"recipe digits {' '.join(overrides)}, seeds 0 to {given.seeds - 1}; mean (sd)", flush=True)
    print(f"lightning-sparse {__version__}, torch {torch.__version__}, lightning {lightning.__version__}\n", flush=True)
    print(header(given.forms), flush=True)
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        found = dict(zip([job[:3] for job in jobs], pool.map(train, jobs), strict=True))
    for lam in given.lams:
        print(f"| {row(lam, {form: [found[form, lam, seed] for seed in range(given.seeds)] for form in given.forms})} |", flush=True)


if __name__ == "__main__":
    main()
