"""RecipeCLI: the subcommands of ``lightning-sparse`` that run a Trainer, with a report after ``fit``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_sparse.callbacks import Sparsifier, checks
from lightning_sparse.cli import checkpoints, folders
from lightning_sparse.cli.errors import UsageError, class_of, explain
from lightning_sparse.cli.failures import in_one_line
from lightning_sparse.cli.report import Report, RunRecorder
from lightning_sparse.cli.sparse_cli import SparseCLI
from lightning_sparse.cli.table import Result

MISTAKES = (ValueError, TypeError, ImportError, AttributeError, MisconfigurationException)
Front = TypeVar("Front", bound="RecipeCLI")


class RecipeCLI(SparseCLI):
    """Run ``fit``, ``validate``, ``test`` or ``predict`` from a recipe.

    ``fit`` stores the figures in ``result``. Raises UsageError, naming the closest keys or classes, before anything is
    trained or written.
    """

    result: Result | None = None
    checkpoint: Any = None  # the content of --ckpt_path until it has been checked

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(save_config_callback=None, seed_everything_default=0, args=list(args))

    def refuse(self, error: UsageError) -> NoReturn:
        """Raise the error; ``main`` prints it."""
        raise error from None

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return only the requested subcommand, because each parser takes 0.1 s to build."""
        every = LightningCLI.subcommands()
        return {verb: taken for verb, taken in every.items() if verb in self.words[:1]} or every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Report, "report")
        parser.add_argument("--threads", type=PositiveInt | None, help="CPU threads of torch; small networks run faster on one.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        chosen = self.config.get(self.config.get("subcommand") or "") or {}
        if not _is_seed(chosen.get("seed_everything")):
            raise UsageError(f"seed_everything must be true, false or a whole number from 0 to 2**32 - 1, got {chosen['seed_everything']}")
        if "weights_only" in chosen:  # not in Lightning 2.5, which loads any object
            self.checkpoint = checkpoints.read(chosen.get("ckpt_path"), objects=chosen["weights_only"] is False)

    def read_file(self, path: Any) -> None:
        """Read nothing yet; the whole file is checked after the other arguments."""

    def instantiate_classes(self) -> None:
        try:
            LightningCLI.instantiate_classes(self)
        except MISTAKES as error:
            raise UsageError(explain(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.settings
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        return super().instantiate_trainer(**kwargs)

    def extra_callbacks(self) -> list[Callback]:
        self.recorder = RunRecorder(self.recipe())
        return [*super().extra_callbacks(), self.recorder]

    def before_fit(self) -> None:
        """Check selection, strategy, penalty and checkpoint before a logger opens a file."""
        try:
            for callback in self.sparsifiers():
                callback.setup(self.trainer, self.model, "fit")
                self.recorder.names += callback.parameters
                checks.check_optimizer(callback.options.form, class_of(self.config[self.subcommand].get("optimizer")))
            self._check_checkpoint(self.sparsifiers(), resumed=True)
            for callback in self.sparsifiers():
                callback.teardown(self.trainer, self.model, "fit")
        except MISTAKES as error:
            raise UsageError(str(error)) from error

    def before_validate(self) -> None:
        self._check_checkpoint()

    before_test = before_predict = before_validate

    def _check_checkpoint(self, callbacks: Sequence[Sparsifier] = (), resumed: bool = False) -> None:
        if self.checkpoint is not None:
            checkpoints.check(self.settings["ckpt_path"], self.checkpoint, self.model, callbacks, resumed)
            self.checkpoint = None

    def fit(self, **given: Any) -> None:
        """Call the Trainer's method. Errors that do not come from the user's code become one-line messages."""
        folders.choose(self.trainer, self.recorder.recipe, given.get("ckpt_path"))
        try:
            self._launch(self.trainer.fit, given)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # the Trainer ends so
                raise KeyboardInterrupt(_way_back(self.trainer)) from error
            raise

    def validate(self, **given: Any) -> None:
        """Call the Trainer's method, like :meth:`fit`."""
        self._launch(self.trainer.validate, given)

    def test(self, **given: Any) -> None:
        """Call the Trainer's method, like :meth:`fit`."""
        self._launch(self.trainer.test, given)

    def predict(self, **given: Any) -> None:
        """Call the Trainer's method, like :meth:`fit`."""
        self._launch(self.trainer.predict, given)

    def _launch(self, verb: Callable[..., Any], given: dict[str, Any]) -> None:
        with in_one_line(given.get("ckpt_path")):
            verb(**given)

    def after_fit(self) -> None:
        with in_one_line():
            self.result = self.settings["report"].write(self) if not self.trainer.fast_dev_run else None

    def rebuild(self) -> tuple[LightningModule, LightningDataModule | None, Any]:
        """Build a new model and data module with the run's seed, and new settings of the Trainer."""
        seed = self.config[self.subcommand]["seed_everything"]
        if seed is not False:
            seed_everything(seed, workers=True, verbose=False)
        fresh = self.parser.instantiate(self.config)[self.subcommand]
        return fresh["model"], fresh.get("data"), fresh["trainer"]

    def recipe(self) -> str:
        """Return the run's whole configuration as YAML."""
        words: str = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        return words


def _is_seed(given: Any) -> bool:
    return given is None or isinstance(given, bool) or 0 <= given < 2**32


def fit(words: Sequence[str]) -> RecipeCLI:
    """Run ``lightning-sparse fit`` in this process; the returned object has the figures in ``result``.

    Raises UsageError for a mistake in the arguments or the recipe.
    """
    return launch(RecipeCLI, ["fit", *words])


def _way_back(trainer: Trainer) -> str:
    """Say how an interrupted fit goes on: from the newest file that its ModelCheckpoints wrote."""
    files = [Path(path) for keeper in trainer.checkpoint_callbacks for path in _written(keeper) if path and Path(path).is_file()]
    if not files:
        return "before a checkpoint was written"
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    return f"the same command with --ckpt_path {shlex.quote(str(newest))} goes on"


def _written(keeper: Callback) -> list[str]:
    return [*getattr(keeper, "best_k_models", ()), getattr(keeper, "best_model_path", ""), getattr(keeper, "last_model_path", "")]


def launch(front: type[Front], words: Sequence[str]) -> Front:
    """Run a CLI class with the given words. Hides sys.argv, because LightningCLI warns if both are given."""
    hidden, sys.argv = sys.argv, sys.argv[:1]
    try:
        return front(words)
    finally:
        sys.argv = hidden


def run(verb: str, words: list[str]) -> int:
    """Run a subcommand of LightningCLI."""
    launch(RecipeCLI, [verb, *words])
    return 0
