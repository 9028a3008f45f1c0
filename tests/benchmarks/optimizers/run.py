"""Train every pair of thirty optimisers and eight callbacks on the digits (an MLP 64-100-10 without biases):

    pip install timm pytorch_optimizer schedulefree lion-pytorch
    python tests/benchmarks/optimizers [--optimizers AdamW Lion ...] [--forms AdaptiveProx ...] [--seed 0] [--write docs/optimizers.md]

A cell is the share of zeros in the trained network, at one lam per callback for all optimisers. "refused" means refused before the
first step, "FAILED" an exception during the run. "!" marks a run with a warning about its optimiser or about hardly any zeros at
the end. For optimisers that scale their steps by the size of the gradients, the goal is a share of zeros within a factor of 2 of
AdamW's, or a warning; "x" marks a cell that misses the goal, "+" a cell with less than half of AdamW's non-zeros. Each optimiser has
one typical learning rate and no schedule; schedule-free optimisers are set to training mode when they are created.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.optim import Optimizer

from lightning_sparse import __version__, callbacks, penalties
from lightning_sparse.examples.digits import Digits

FACTOR = 2.0
SAID = ("step size", "selected weights to zero")  # in warnings that a cell marks
EXTRAS = ("timm", "pytorch_optimizer", "schedulefree", "lion-pytorch")
_LOG_SUM = penalties.LogSum(eps=2.0)
FORMS: dict[str, Callable[[], Callback]] = {
    "ReweightedPenalty": lambda: callbacks.ReweightedPenalty(_LOG_SUM, lam=2e-3),
    "PenaltyLoss": lambda: callbacks.PenaltyLoss(_LOG_SUM, lam=2e-3),
    "AdaptiveProx": lambda: callbacks.AdaptiveProx(_LOG_SUM, lam=2e-3),
    "AdaptiveMask": lambda: callbacks.AdaptiveMask(_LOG_SUM, lam=1e-3),
    "EtaTrick": lambda: callbacks.EtaTrick(_LOG_SUM, lam=2e-3, learned_lr=0.05),
    "VariationalDropout": lambda: callbacks.VariationalDropout(kl_weight=2e-4, learned_lr=0.05),
    "HardConcrete": lambda: callbacks.HardConcrete(lam=2e-3, learned_lr=0.05),
    "MagnitudePruning": lambda: callbacks.MagnitudePruning(0.8, every=10),
}


class Case(NamedTuple):
    """An optimiser: package, factory, and whether it scales the steps of each weight or matrix by the size of its gradients."""

    source: str
    make: Callable[[Any], Optimizer]
    adaptive: bool = True


def _of(package: str, name: str, adaptive: bool = True, **options: Any) -> Case:
    """Return the class ``name``, imported on first use."""

    def make(parameters: Any) -> Optimizer:
        module = importlib.import_module(package)
        made: Optimizer = getattr(module, name)(parameters, **options)
        return made

    return Case(package.partition(".")[0], make, adaptive)


def _lookahead(parameters: Any) -> Optimizer:
    import pytorch_optimizer

    made: Optimizer = pytorch_optimizer.Lookahead(torch.optim.AdamW(parameters, 3e-3))
    return made


_PO = partial(_of, "pytorch_optimizer")
_TIMM = partial(_of, "timm.optim")
_TORCH = partial(_of, "torch.optim")
_FREE = partial(_of, "schedulefree")
OPTIMIZERS: dict[str, Case] = {
    "AdamW": _TORCH("AdamW", lr=3e-3),
    "Adam": _TORCH("Adam", lr=3e-3),
    "NAdam": _TORCH("NAdam", lr=3e-3),
    "RAdam": _TORCH("RAdam", lr=5e-3),
    "Adamax": _TORCH("Adamax", lr=5e-3),
    "RMSprop": _TORCH("RMSprop", lr=5e-3),
    "Adagrad": _TORCH("Adagrad", lr=5e-2),
    "Adadelta": _TORCH("Adadelta", lr=1.0),
    "Adafactor": _TORCH("Adafactor", lr=5e-2),
    "Muon": _TORCH("Muon", lr=1e-2, adjust_lr_fn="match_rms_adamw"),
    "SGD, momentum": _TORCH("SGD", False, lr=0.05, momentum=0.9),
    "Lamb": _TIMM("Lamb", lr=1e-2),
    "timm Adan": _TIMM("Adan", lr=3e-3),
    "AdafactorBigVision": _TIMM("AdafactorBigVision", lr=3e-3),
    "AdamP": _TIMM("AdamP", lr=3e-3),
    "MADGRAD": _TIMM("MADGRAD", lr=3e-3),
    "Mars": _TIMM("Mars", lr=3e-3),
    "LaProp": _TIMM("LaProp", lr=3e-3),
    "Adopt": _TIMM("Adopt", lr=3e-3),
    "AdaBelief": _PO("AdaBelief", lr=3e-3),
    "Adafactor, lr=None": _PO("AdaFactor", lr=None),
    "Prodigy": _PO("Prodigy", lr=1.0),
    "SOAP": _PO("SOAP", lr=3e-3),
    "StableAdamW": _PO("StableAdamW", lr=3e-3),
    "AdEMAMix": _PO("AdEMAMix", lr=1e-3),
    "Yogi": _PO("Yogi", lr=3e-3),
    "Lookahead(AdamW)": Case("pytorch_optimizer", _lookahead),
    "AdamWScheduleFree": _FREE("AdamWScheduleFree", lr=1e-2),
    "SGDScheduleFree": _FREE("SGDScheduleFree", False, lr=0.5),
    "Lion": _of("lion_pytorch", "Lion", lr=6e-4),
}
REFERENCE = "AdamW"


class Network(LightningModule):
    """A module on the digits for any optimiser; schedule-free ones stay in training mode."""

    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 100, bias=False), nn.ReLU(), nn.Linear(100, 10, bias=False))
        self.make = make

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def test_step(self, batch: Any, index: int) -> None:
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Optimizer:
        made = self.make(self.parameters())
        if hasattr(made, "train"):
            made.train()
        return made


class Outcome(NamedTuple):
    """Outcome of a run: an error and its step, or warnings about the optimiser, zeros and accuracy."""

    error: str = ""
    step: int = 0
    warned: tuple[str, ...] = ()
    zeros: float = 0.0
    accuracy: float = 0.0
    seconds: float = 0.0


def run(case: Case, form: Callable[[], Callback] | None, seed: int, epochs: int) -> Outcome:
    """Train once."""
    seed_everything(seed, verbose=False)
    module, data = Network(case.make), Digits(batch_size=64)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[form()] if form else [], **quiet)
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, data)
        except Exception as error:
            return Outcome(f"{type(error).__name__}: {error}", trainer.global_step)
    seconds = time.perf_counter() - began
    warned = tuple(str(one.message) for one in said if any(word in str(one.message) for word in SAID))
    accuracy = trainer.test(module, data, verbose=False)[0]["accuracy"]
    weights = [w for w in module.parameters() if w.dim() > 1]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return Outcome(warned=warned, zeros=zeros, accuracy=accuracy, seconds=seconds)


def cell(outcome: Outcome, case: Case, reference: Outcome | None) -> str:
    """Format an outcome for the table."""
    if outcome.error:
        return f"FAILED at step {outcome.step}" if outcome.step else "refused"
    mark = "!" if outcome.warned else ""
    if case.adaptive and reference is not None:
        near = outcome.zeros <= FACTOR * reference.zeros and reference.zeros <= FACTOR * outcome.zeros
        mark += "" if near or outcome.warned else " x"
        mark += " +" if 1 - reference.zeros > FACTOR * (1 - outcome.zeros) else ""
    return f"{100 * outcome.zeros:.0f}{mark}"


def table(names: list[str], forms: list[str], seed: int, epochs: int) -> tuple[list[str], list[str]]:
    """Return the rows, and notes on refused, failed and warning runs."""
    lines = [f"| optimiser | from | dense test % | {' | '.join(forms)} |", "|---" * (len(forms) + 3) + "|"]
    notes: list[str] = []
    wanted = {form: run(OPTIMIZERS[REFERENCE], FORMS[form], seed, epochs) for form in forms}
    for name in names:
        case, cells = OPTIMIZERS[name], []
        dense = run(case, None, seed, epochs)
        for form in forms:
            outcome = wanted[form] if name == REFERENCE else run(case, FORMS[form], seed, epochs)
            cells.append(cell(outcome, case, None if name == REFERENCE else wanted[form]))
            notes += [f"- {name}, {form}: {text}" for text in dict.fromkeys((*outcome.warned, outcome.error)) if text]
        shown = f"{100 * dense.accuracy:.0f}" if not dense.error else dense.error
        lines.append(f"| {name} | {case.source} | {shown} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines, notes


def page(lines: list[str], notes: list[str], seed: int, epochs: int) -> str:
    """Format the page: legend, table, and an example of each kind of note."""
    kinds = {"were refused": [n for n in notes if "Error" in n], "gave warnings": [n for n in notes if "Error" not in n]}
    said = [f"{len(found)} runs {kind}; the first:\n\n{found[0]}\n" for kind, found in kinds.items() if found]
    command = f"python tests/benchmarks/optimizers --seed {seed} --epochs {epochs} --write docs/optimizers.md"
    legend = (__doc__ or "").partition("A cell is")[2].strip()
    return "\n".join(
        [
            "# Optimisers",
            "",
            f"Zeros in % of 8 callbacks with {len(lines) - 2} optimisers on the digits (MLP 64-100-10 without biases). A cell is {legend}",
            "",
            f"Written by `{command}`, on the CPU with one thread: {_versions()}. All columns are of {_commit()}.",
            "",
            *lines,
            "",
            *said,
        ]
    )


def _versions() -> str:
    own = [f"lightning-sparse {__version__}", f"torch {torch.__version__}", f"lightning {lightning.__version__}"]
    return ", ".join(own + [f"{name} {importlib.metadata.version(name)}" for name in EXTRAS])


def _commit() -> str:
    """Return the commit of the code that runs, and today's date."""
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return f"commit {shown.stdout.strip() or 'unknown'}, {datetime.date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--write", type=Path, help="a page for the table")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    lines, notes = table(given.optimizers, given.forms, given.seed, given.epochs)
    print(*lines, "", *notes, "", _versions(), sep="\n")
    if given.write:
        given.write.write_text(page(lines, notes, given.seed, given.epochs), encoding="utf-8")


if __name__ == "__main__":
    main()
