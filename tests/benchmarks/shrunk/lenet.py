"""LeNet-300-100 on MNIST at 95, 98 and 99 % zeros, trained without a structure, and shrunk."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_sparse.cli.training import fit
from lightning_sparse.shrinking import shrink_and_report
from shrunk.rows import Row

TARGETS = (0.95, 0.98, 0.99)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="data", help="the folder above MNIST/raw (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="mnist/adaptive_prox")


def rows(args: argparse.Namespace) -> list[Row]:
    """Train once dense and once for each target; shrink the sparse ones."""
    found = []
    for target in (None, *TARGETS):
        with tempfile.TemporaryDirectory() as folder:
            cli = train(args, target, folder)
        cli.datamodule.setup("test")
        x, y = cli.datamodule.parts["test"]
        model = cli.model.eval()
        title = "dense" if target is None else f"{100 * target:.0f} % zeros"
        if target is None:
            found.append(Row.of(title, model, model, (x, y)))
            continue
        for unit in (8, 1):
            small = shrink_and_report(model, x[:256], unit, seconds=0.0)
            found.append(Row.of(f"{title}, shrunk, round_to={unit}", small.module, model, (x, y), small.report))
    return found


def train(args: argparse.Namespace, target: float | None, folder: str) -> Any:
    """Run the recipe; a target of None sets lam to 1e-12."""
    words = ["--config", args.recipe, "--data.root", str(Path(args.root).resolve()), "--seed_everything", str(args.seed)]
    words += ["--trainer.max_epochs", str(args.epochs), "--trainer.default_root_dir", folder, "--trainer.logger", "false"]
    words += ["--report.table", "false", "--report.pictures", "false", "--model.restart", "0.5", "--sparsify.freeze", "0.5"]
    words += ["--data.batch_size", str(args.batch), "--model.lr", str(args.rate)]
    strength = ["--sparsify.lam", "1e-12"] if target is None else ["--sparsify.lam", "null", "--sparsify.target_sparsity", str(target)]
    torch.set_num_threads(1)
    return fit([*words, *strength])
