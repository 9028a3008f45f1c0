"""``lightning-sparse check RECIPE [overrides]``: run every check that ``fit`` does before training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_sparse import duality
from lightning_sparse.callbacks import Sparsifier, checks
from lightning_sparse.cli import recipes, scripted
from lightning_sparse.cli.comparison.runs import check_script
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.training import MISTAKES, RecipeCLI, launch
from lightning_sparse.structure import Coupled, Element

_USAGE = "lightning-sparse {} RECIPE [overrides as in fit, e.g. --sparsify.lam 1e-3] | [RECIPE] --script SCRIPT [its arguments]"
_ABOUT = (
    "Run every check that fit does before training, and train nothing: the keys and classes of the configuration, the callback's settings, "
    "which weights it selects, the optimiser. Prints one line for each sparsity callback, with its penalty, its strength and the number of "
    "weights. A configuration without a model, such as overlay/sparsify, is checked with a demo model."
)
_STAND_IN = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"]


class CheckCLI(RecipeCLI):
    """Parse and instantiate a recipe and check selection and penalty, without training."""

    def fit(self, **_: Any) -> None:
        """Do nothing."""

    def after_fit(self) -> None:
        pass


def run(verb: str, words: list[str]) -> int:
    """Print one line per sparsity callback. Raises UsageError for a recipe that cannot be trained."""
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", usage=_USAGE.format(verb), description=_ABOUT, allow_abbrev=False)
    parser.add_argument("--script", help=scripted.HELP)
    if not words:
        parser.print_usage()
        return 2
    name = None if words[0].startswith("-") else words[0]
    args, rest = parser.parse_known_args(words if name is None else words[1:])
    script = check_script(args.script, "your own training script")
    if script is not None:
        return _check_script(script, name, rest)
    if name is None:
        raise UsageError(f"give RECIPE first, a YAML file or a name that `lightning-sparse recipes` lists, got {words[0]}")
    path = recipes.find(name)
    words = recipes.with_paths(["--config", str(path), *rest])
    models = ["model" in recipes.content(Path(file)) for file in recipes.files_of(words)]
    overlay = not any(models) and not any(word.startswith("--model") for word in rest)
    cli = launch(CheckCLI, ["fit", *words, *(_STAND_IN if overlay else [])])
    for callback in cli.sparsifiers():
        print(_line(callback, cli.model, cli.recorder.names, overlay))
    for added, replacing in cli.overruled:
        print(
            f"note: {replacing} follows {added}, and its 'callbacks:' list would replace the added callbacks. This command and SparseCLI "
            f"keep both; with LightningCLI give {added} last, or write 'callbacks+:' in both files"
        )
    print(f"ok: {name}" + ("" if cli.sparsifiers() else ", without a sparsity callback"))
    return 0


def _check_script(script: str, config: str | None, words: list[str]) -> int:
    """Print the lines for the callbacks of the script's Trainer. Raises UsageError for a script that cannot be trained."""
    given = [] if config is None else ["fit", *recipes.with_paths(["--config", config])]
    trainer, model, _ = scripted.reached(script, [*given, *words])
    chosen = [callback for callback in trainer.callbacks if isinstance(callback, Sparsifier)]  # type: ignore[attr-defined]
    try:
        for callback in chosen:
            callback.setup(trainer, model, "fit")
        for callback in chosen:
            print(_line(callback, model, list(callback.parameters), False))
            callback.teardown(trainer, model, "fit")
    except MISTAKES as error:
        raise UsageError(str(error)) from error
    print(f"ok: {Path(script).name}" + ("" if chosen else ", without a sparsity callback"))
    return 0


def _line(callback: Sparsifier, model: LightningModule, names: Sequence[str], overlay: bool) -> str:
    chosen = {name: p for name, p in model.named_parameters() if name in names}
    kind = "weight matri" + ("x" if len(chosen) == 1 else "ces") if all(p.dim() == 2 for p in chosen.values()) else "tensors"
    size = f"{len(chosen)} {kind} with {sum(p.numel() for p in chosen.values()):,} weights"
    takes_penalty = "penalty" in callback.settings()  # else it is none of the user's choice
    shape = f"; {duality.fine_print(callback.penalty)}" if takes_penalty and callback.penalty.separable else ""
    if not chosen and checks.is_built_later(model):
        size = f"{type(model).__name__} builds its layers when training starts, so its weights were not checked"
    where = "the recipe has no model, checked with a demo model" if overlay else size
    groups = "" if type(callback.structure) is Element else f", structure {callback.structure}"
    groups += " (fit also counts the biases and norms in its groups)" if isinstance(callback.structure, Coupled) else ""
    strength = f"lam {callback.lam:g}"
    if callback.target_sparsity is not None:
        strength = f"to a share of {callback.target_sparsity:.4g} zeros (lam is found in the run, and what it leaves is removed by rank)"
    given = f" with {callback.given}" if takes_penalty else ""
    return f"{type(callback).__name__}{given}, {strength}{groups}: {where}{shape}"
