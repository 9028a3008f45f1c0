"""Open a checkpoint with the module and the data of the run that wrote it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sparse.cli import checkpoints, recipes, scripted
from lightning_sparse.cli.comparison.runs import check_script
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.folders import run_folder
from lightning_sparse.cli.saved import Saved, silence_device_messages
from lightning_sparse.cli.training import RecipeCLI, launch

_QUIET = ["--trainer.logger", "false", "--ckpt_path", "null"]


class Opened(RecipeCLI):
    """Instantiate the model and the data of a recipe, and train nothing."""

    def before_fit(self) -> None:
        """Check nothing, because nothing is trained."""

    def fit(self, **_: Any) -> None:
        """Do nothing."""

    def after_fit(self) -> None:
        pass


def open_checkpoint(path: Path, config: str | None = None, overrides: Sequence[str] = (), script: str | None = None) -> Saved:
    """Return the checkpoint's module and data.

    Raises UsageError for a missing or damaged file, a file of another module, and where no configuration is found.

    Args:
        path: the checkpoint.
        config: a recipe or YAML file; None takes the ``config.yaml`` that ``fit`` wrote beside the checkpoint or one folder above.
        overrides: arguments that override it, as in ``fit``.
        script: the user's training script; it is run as ``SCRIPT fit --config CONFIG``, or without a configuration as it is.
    """
    script = check_script(script, "your own training script")
    content = checkpoints.read(path, objects=True)  # of which the weights are used
    if content is None:
        raise UsageError(f"give the path of a checkpoint file, got {str(path)!r}")
    file = config if config is not None else _config_beside(path)
    if script is not None:
        words = [] if file is None else ["fit", *recipes.with_paths(["--config", file]), *_QUIET]
        model, data = scripted.objects(script, [*words, *overrides])
    else:
        if file is None:
            raise UsageError(
                f"no config.yaml beside {path}, so its module and data are unknown: give --config RECIPE, the one it was trained with, or "
                "--script SCRIPT, your own training script. In Python: docs/guide/smaller.md, 'A checkpoint of a plain Trainer'"
            )
        recipes.check_classes(recipes.find(file), overrides, "--script SCRIPT")
        with silence_device_messages():
            cli = launch(Opened, ["fit", *recipes.with_paths(["--config", file]), *_QUIET, *overrides])
        model, data = cli.model, cli.datamodule
    try:
        checkpoints.check(path, content, model)
    except UsageError as error:
        if config is None and file is not None:  # which may be of another run
            raise UsageError(f"{error}. The model is that of {file}; for another one give --config RECIPE or --script SCRIPT") from error
        raise
    model.load_state_dict(content["state_dict"])
    return Saved(path, model.eval().cpu(), data, selected(content))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint and how its module and data are found."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--config", help="recipe or YAML of the run (default: the config.yaml beside the checkpoint)")
    parser.add_argument("--script", help=scripted.HELP)


def parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments of a command with one checkpoint, and those that are passed on. Raises UsageError for a second checkpoint.

    After ``--script SCRIPT`` a file may be an argument of the script.
    """
    args, others = parser.parse_known_args(words)
    first = next((number for number, word in enumerate(words) if Path(word) == args.checkpoint), len(words))
    end = next((number for number, word in enumerate(words) if word.partition("=")[0] == "--script"), len(words))
    before = ["", *words]
    for number, word in enumerate(words):
        is_value = before[number].startswith("--") and "=" not in before[number]
        if word in others and word.endswith(".ckpt") and not is_value and (number < end or number == first + 1):
            raise UsageError(f"one checkpoint at a time, got {args.checkpoint} and {word}")
    return args, others


def selected(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the weights that the sparsity callbacks of a checkpoint's run had selected, from their states."""
    states = content.get("callbacks")
    found = [state.get("taken") for state in (states.values() if isinstance(states, dict) else ()) if isinstance(state, dict)]
    return tuple(dict.fromkeys(name for taken in found if isinstance(taken, dict) for name in taken))


def _config_beside(path: Path) -> str | None:
    folder = path.resolve().parent
    places = (place / "config.yaml" for place in (run_folder(folder), folder, folder.parent))
    return next((str(file) for file in places if file.is_file()), None)
