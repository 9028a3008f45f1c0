"""``lightning-sparse check RECIPE [overrides]``: everything that ``fit`` does before training, and no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_sparse import duality
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.cli import recipes
from lightning_sparse.cli.training import RecipeCLI, launch

_STAND_IN = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"]


class CheckCLI(RecipeCLI):
    """Parses, instantiates, checks selection and penalty; ``fit`` itself is left out."""

    def fit(self, **_: Any) -> None:
        """Nothing is trained."""

    def after_fit(self) -> None:
        pass


def run(verb: str, words: list[str]) -> int:
    """Print one line a sparsity callback; UsageError for what cannot be trained."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: lightning-sparse {verb} RECIPE [overrides as in fit, e.g. --sparsify.lam 1e-3]")
        return 0 if words else 2
    name, rest = words[0], words[1:]
    path = recipes.find(name)
    words = recipes.with_paths(["--config", str(path), *rest])
    models = ["model" in recipes.content(Path(file)) for file in recipes.files_of(words)]
    overlay = not any(models) and not any(word.startswith("--model") for word in rest)
    cli = launch(CheckCLI, ["fit", *words, *(_STAND_IN if overlay else [])])
    for callback in cli.sparsifiers():
        print(_line(callback, cli, overlay))
    for added, replacing in cli.overruled:
        print(
            f"note: {replacing} stands after {added}, and its plain 'callbacks:' list replaces what that adds. This command and SparseCLI "
            "keep both; in a script with LightningCLI give the added file last, or write 'callbacks+:' in both"
        )
    print(f"ok: {name}" + ("" if cli.sparsifiers() else ", without a sparsity callback"))
    return 0


def _line(callback: Sparsifier, cli: CheckCLI, overlay: bool) -> str:
    chosen = {name: p for name, p in cli.model.named_parameters() if name in cli.scribe.names}
    size = f"{len(chosen)} parameters, {sum(p.numel() for p in chosen.values())} weights"
    shape = f"; {duality.fine_print(callback.penalty)}" if callback.penalty.separable else ""
    where = "no model of its own, tried on a stand-in" if overlay else size
    aim = "" if callback.target_sparsity is None else f", rising from there until {callback.target_sparsity:.4g} of the weights are zero"
    return f"{type(callback).__name__} with {callback.given}, lam {callback.lam:g}{aim}: {where}{shape}"
