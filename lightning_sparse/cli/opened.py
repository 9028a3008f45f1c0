"""Open a checkpoint with the module and the data of the run that wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sparse.cli import checkpoints, recipes
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.report import run_folder
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


def open_checkpoint(path: Path, config: str | None = None, overrides: Sequence[str] = ()) -> Saved:
    """Return the checkpoint's module and data.

    Raises UsageError for a missing or damaged file, a file of another module, and where no configuration is found.

    Args:
        path: the checkpoint.
        config: a recipe or YAML file; None takes the ``config.yaml`` that ``fit`` wrote beside the checkpoint or one folder above.
        overrides: arguments that override it, as in ``fit``.
    """
    content = checkpoints.read(path)
    if content is None:
        raise UsageError(f"give the path of a checkpoint file, got {str(path)!r}")
    words = recipes.with_paths(["--config", config if config is not None else str(_config_beside(path))])
    with silence_device_messages():
        cli = launch(Opened, ["fit", *words, *_QUIET, *overrides])
    checkpoints.check(path, content, cli.model)
    cli.model.load_state_dict(content["state_dict"])
    return Saved(path, cli.model.eval().cpu(), cli.datamodule, selected(content))


def selected(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the weights that the sparsity callbacks of a checkpoint's run had selected, from their states."""
    states = content.get("callbacks")
    found = [state.get("taken") for state in (states.values() if isinstance(states, dict) else ()) if isinstance(state, dict)]
    return tuple(dict.fromkeys(name for taken in found if isinstance(taken, dict) for name in taken))


def _config_beside(path: Path) -> Path:
    folder = path.resolve().parent
    for place in (run_folder(folder), folder, folder.parent):
        if (place / "config.yaml").is_file():
            return place / "config.yaml"
    raise UsageError(f"no config.yaml beside {path}, so its module and data are unknown: give --config RECIPE, the one it was trained with")
