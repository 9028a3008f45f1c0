"""Both forms against a direct solver on sparse regression: 200 x 50, standardised, 10 true coefficients.

    python tests/benchmarks/exchange linear

The direct solver minimises ||y - X w||^2 / (2 n) + lam * Omega(w) by coordinate descent with the exact prox: with
columns of unit curvature each coordinate's problem is a prox of lam * omega. The two forms are trained by the callbacks.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveProx, ReweightedPenalty, Sparsifier
from lightning_sparse.curvature import InputMoment

N, D, TRUE = 200, 50, 10


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """Make standardised X (N, D), x_j^T x_j / N = 1, and y = X w + noise with TRUE coefficients of size 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    signs = torch.randint(0, 2, (TRUE,), generator=generator) * 2 - 1
    w = torch.zeros(D, dtype=torch.float64)
    w[torch.randperm(D, generator=generator)[:TRUE]] = signs * torch.linspace(1, 2, TRUE, dtype=torch.float64)
    return x, x @ w + 0.5 * torch.randn(N, generator=generator, dtype=torch.float64)


def solve(x: Tensor, y: Tensor, penalty: penalties.LogSum, lam: float, sweeps: int = 500) -> Tensor:
    """Solve by coordinate descent: w_j <- prox_{lam omega}(w_j + x_j^T r / n), r the residual."""
    w, residual = torch.zeros(x.shape[1], dtype=x.dtype), y.clone()
    for _ in range(sweeps):
        for j in range(len(w)):
            new = penalty.prox(w[j] + x[:, j] @ residual / len(y), lam)
            residual -= x[:, j] * (new - w[j])
            w[j] = new
    return w


class Regression(LightningModule):
    """A linear model on ||y - X w||^2 / (2 n), full batch, SGD with a rate that falls to 0."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.model = nn.Linear(features, 1, bias=False, dtype=torch.float64)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return ((self.model(x)[:, 0] - y) ** 2).mean() / 2

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / total) ** 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Steps:
    """A loader of the full batch, ``count`` times."""

    def __init__(self, batch: tuple[Tensor, Tensor], count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.count)


def train(callback: Sparsifier, x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
    """Train and return the coefficients."""
    seed_everything(seed, verbose=False)
    module = Regression(x.shape[1])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet).fit(module, Steps((x, y), steps))  # type: ignore[arg-type]
    return module.model.weight.detach()[0]


def compare(seed: int, lam: float, steps: int) -> list[tuple[str, int, bool, float]]:
    """Return (form, support size, same support as the solver, largest relative deviation on it)."""
    penalty = penalties.LogSum(eps=2.0)
    x, y = problem(seed)
    exact = solve(x, y, penalty, lam)
    form = ReweightedPenalty(penalty, lam)
    forms = {"penalty": form, "prox": AdaptiveProx(penalty, lam, exact=True), "mask": form.to_mask(curvature=InputMoment())}
    rows = [("solver", int((exact != 0).sum()), True, 0.0)]
    for name, callback in forms.items():
        w = train(callback, x, y, steps, seed)
        on = exact != 0
        worst = float(((w - exact)[on] / exact[on]).abs().max())
        rows.append((name, int((w != 0).sum()), bool(torch.equal(w != 0, on)), worst))
    return rows


def main() -> None:
    """Print the comparison for a few seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lam", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    settings = f"LogSum(2), lam {options.lam:g}, {options.steps} steps, torch {torch.__version__}"
    print(f"sparse regression {N} x {D}, {TRUE} true coefficients, {settings}")
    print(f"{'seed':>4}  {'form':8} {'non-zero':>8}  same support  largest relative deviation")
    for seed in range(options.seeds):
        for name, size, same, worst in compare(seed, options.lam, options.steps):
            print(f"{seed:4}  {name:8} {size:8}  {same!s:12}  {worst:.1e}")


if __name__ == "__main__":
    main()
