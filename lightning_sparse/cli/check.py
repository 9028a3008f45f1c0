"""``lightning-sparse check RECIPE [overrides]``: run every check that ``fit`` does before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_sparse import duality
from lightning_sparse.callbacks import Sparsifier, checks
from lightning_sparse.cli import recipes
from lightning_sparse.cli.training import RecipeCLI, launch
from lightning_sparse.structure import Element

_STAND_IN = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"]


class CheckCLI(RecipeCLI):
    """Parse and instantiate a recipe and check selection and penalty, without training."""

    def fit(self, **_: Any) -> None:
        """Do nothing."""

    def after_fit(self) -> None:
        pass


def run(verb: str, words: list[str]) -> int:
    """Print one line per sparsity callback. Raises UsageError for a recipe that cannot be trained."""
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
            f"note: {replacing} follows {added}, and its 'callbacks:' list would replace the added callbacks. This command and SparseCLI "
            f"keep both; with LightningCLI give {added} last, or write 'callbacks+:' in both files"
        )
    print(f"ok: {name}" + ("" if cli.sparsifiers() else ", without a sparsity callback"))
    return 0


def _line(callback: Sparsifier, cli: CheckCLI, overlay: bool) -> str:
    chosen = {name: p for name, p in cli.model.named_parameters() if name in cli.recorder.names}
    kind = "weight matri" + ("x" if len(chosen) == 1 else "ces") if all(p.dim() == 2 for p in chosen.values()) else "tensors"
    size = f"{len(chosen)} {kind} with {sum(p.numel() for p in chosen.values()):,} weights"
    shape = f"; {duality.fine_print(callback.penalty)}" if callback.penalty.separable else ""
    if not chosen and checks.is_built_later(cli.model):
        size = f"{type(cli.model).__name__} builds its layers when training starts, so its weights were not checked"
    where = "the recipe has no model, checked with a demo model" if overlay else size
    groups = "" if type(callback.structure) is Element else f", structure {callback.structure}"
    strength = f"lam {callback.lam:g}"
    if callback.target_sparsity is not None:
        strength = f"to a share of {callback.target_sparsity:.4g} zeros (lam is found in the run, and what it leaves is removed by rank)"
    return f"{type(callback).__name__} with {callback.given}, {strength}{groups}: {where}{shape}"
