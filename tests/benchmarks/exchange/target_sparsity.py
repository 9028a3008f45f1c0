"""Measure how exactly each callback reaches a target_sparsity, on the digits (an MLP 64-300-100-10):

    python tests/benchmarks/exchange target_sparsity [--targets 0.9 0.95 0.98] [--seeds 0] [--epochs 150] [--forms ...] [--restart]

One line a run: the zeros just before the support is frozen and in the trained network, when it was frozen, and the lam that
was found. Aim: within 0.2 points of the target when the support is frozen; what is missing then is removed by rank. The
learning rate falls along half a cosine over the whole run; with --restart it reaches 0 where the support is frozen at the
latest, and with it the power of lam to move a weight.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_sparse import __version__, callbacks, penalties
from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.examples.digits import Digits
from lightning_sparse.examples.mlp import MLP

WITHIN = 0.2  # points
FREEZE = 0.25
EARLIEST = 0.5  # no support is frozen before that share of the run
_LOG_SUM = penalties.LogSum(eps=2.0)
FORMS: dict[str, Callable[..., Sparsifier]] = {
    "ReweightedPenalty": lambda **k: callbacks.ReweightedPenalty(_LOG_SUM, **k),
    "PenaltyLoss": lambda **k: callbacks.PenaltyLoss(_LOG_SUM, **k),
    "AdaptiveProx": lambda **k: callbacks.AdaptiveProx(_LOG_SUM, **k),
    "AdaptiveMask": lambda **k: callbacks.AdaptiveMask(_LOG_SUM, **k),
    "EtaTrick": lambda **k: callbacks.EtaTrick(_LOG_SUM, learned_lr=0.05, **k),
    "VariationalDropout": lambda **k: callbacks.VariationalDropout(prior="empirical_bayes", learned_lr=0.05, **k),
    "HardConcrete": lambda **k: callbacks.HardConcrete(learned_lr=0.05, **k),
}
HEAD = ("form", "target %", "before the freeze %", f"within {WITHIN:g} points", "trained %", "frozen at", "lam", "test %", "seed")


class Watch(Callback):
    """Record the share of zeros before the support is frozen, and the step of the freeze."""

    def __init__(self, form: Sparsifier) -> None:
        self.form, self.before, self.frozen_at = form, float("nan"), 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.form.frozen:
            self.frozen_at = self.frozen_at or self.form.step
        elif self.form.step > EARLIEST * self.form.total:
            self.before = self.form.share_of_zeros()


def train(name: str, target: float, seed: int, epochs: int, restart: bool) -> list[str]:
    """Train and return one row of the table."""
    seed_everything(seed, verbose=False)
    form = FORMS[name](target_sparsity=target, freeze=FREEZE)
    watch, module, data = Watch(form), MLP([64, 300, 100, 10], lr=5e-3, restart=1 - FREEZE if restart else None), Digits(batch_size=128)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=epochs, check_val_every_n_epoch=epochs, callbacks=[form, watch], **quiet)
    trainer.fit(module, data)
    accuracy = trainer.test(module, data, verbose=False)[0]["test/accuracy"]
    weights = [w for w in module.parameters() if w.dim() > 1]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    before, trained = (f"{100 * value:.2f}" for value in (watch.before, zeros))
    met = "yes" if round(abs(watch.before - target), 4) <= WITHIN / 100 else "no"
    when = f"{watch.frozen_at / form.total:.0%}"
    return [name, f"{100 * target:g}", before, met, trained, when, f"{form.lam:.2g}", f"{100 * accuracy:.2f}", str(seed)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--restart", action="store_true", help="the learning rate falls to 0 before the support is frozen, and again after")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"digits, MLP 64-300-100-10, {given.epochs} epochs, the support frozen for the last {FREEZE:.0%} at least", flush=True)
    print(f"lightning-sparse {__version__}, torch {torch.__version__}, lightning {lightning.__version__}\n", flush=True)
    print(_line(HEAD), "|---" * len(HEAD) + "|", sep="\n", flush=True)
    for name in given.forms:
        for target in given.targets:
            for seed in given.seeds:
                print(_line(train(name, target, seed, given.epochs, given.restart)), flush=True)


if __name__ == "__main__":
    main()
