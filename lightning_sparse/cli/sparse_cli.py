"""SparseCLI: a LightningCLI for scripts of one's own, with packaged recipes, a ``sparsify`` key and answers in one line."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_sparse.curvature
import lightning_sparse.mask_rules
import lightning_sparse.noise
import lightning_sparse.penalties
import lightning_sparse.schedules  # noqa: F401  (short class names resolve once their classes are imported)
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.cli import recipes, text
from lightning_sparse.cli.errors import UsageError, explain
from lightning_sparse.cli.failures import NO_NAME, is_refusal

_STRICT = {"exit_on_error": False, "allow_abbrev": False}


class Parser(LightningArgumentParser):
    """A parser that saves a configuration as UTF-8, whatever the locale's encoding is."""

    def save(self, *args: Any, **options: Any) -> None:
        """As jsonargparse's, in UTF-8."""
        with text.utf8():
            super().save(*args, **options)


class SparseCLI(LightningCLI):
    """LightningCLI that knows packaged recipes and answers mistakes in one line with the closest names.

    Write ``SparseCLI(MyModel, MyData)`` where a script has ``LightningCLI(MyModel, MyData)``. It differs in this:

    - ``--config`` also takes the name of a packaged recipe, such as ``overlay/adaptive_mask``; files are read as UTF-8.
    - Callbacks that a file adds by ``callbacks+:`` stay, also where a later file has a plain ``callbacks:`` list.
    - The callback under the key ``sparsify`` is appended to the Trainer's; ``--sparsify AdaptiveMask`` swaps the form and
      ``--sparsify.lam 1e-3`` sets its strength.
    - A misspelt key or class, and what this package refuses, ends the command with exit code 2 and one line.

    Args:
        model_class: as in LightningCLI; None takes the class from the configuration.
        datamodule_class: as in LightningCLI.
        more: LightningCLI's further arguments by position.
        args: the command line as a list of words, or a dict; None takes sys.argv.
        options: LightningCLI's further arguments by name.
    """

    trainer: Any
    words: list[str]
    overruled: list[tuple[str, str]]  # a file that adds callbacks, and the later one whose list would have replaced them

    def __init__(self, model_class: Any = None, datamodule_class: Any = None, *more: Any, args: Any = None, **options: Any) -> None:
        self.words, self.overruled = [], []
        if args is None:
            text.speak_utf8()
        if args is None or isinstance(args, list):
            try:
                self.words, self.overruled = recipes.with_added(recipes.with_paths(sys.argv[1:] if args is None else args))
            except UsageError as error:
                self.refuse(error)
        super().__init__(model_class, datamodule_class, *more, **({"parser_class": Parser} | options | {"args": args}))

    def refuse(self, error: UsageError) -> NoReturn:
        """Print what was wrong with the command and end it with exit code 2."""
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**(kwargs | _STRICT))

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        parser.add_subclass_arguments(Sparsifier, "sparsify", required=False, help="The callback that makes the network sparse.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            with text.utf8():
                self.config = parser.parse_args(self.words) if args is None or isinstance(args, list) else parser.parse_object(args)
        except argparse.ArgumentError as error:
            parsers = getattr(self, "_subcommand_parsers", {}).values() or [parser]
            known = {key for one in parsers for key in one.get_defaults().keys(branches=True)}
            self.refuse(UsageError(explain(str(error.message), known)))
        if name := text.unnameable(self.config.as_dict()):  # before a logger opens its run
            self.refuse(UsageError(NO_NAME.format(name)))

    def _parse_ckpt_path(self) -> None:
        try:  # Lightning lets the file's hyper_parameters replace the command line's
            super()._parse_ckpt_path()
        except argparse.ArgumentError as error:
            self.refuse(UsageError(f"hyper_parameters of --ckpt_path: {explain(str(error.message))}"))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            if not is_refusal(error):
                raise
            self.refuse(UsageError(explain(str(error))))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        own = self.settings["trainer"].get("callbacks") or []
        self.settings["trainer"]["callbacks"] = [*(own if isinstance(own, list) else [own]), *self.extra_callbacks()]
        return super().instantiate_trainer(**kwargs)

    def extra_callbacks(self) -> list[Callback]:
        """What comes after the callbacks that the configuration gives the Trainer: the one under ``sparsify``."""
        chosen = self.settings.get("sparsify")
        return [] if chosen is None else [chosen]

    @property
    def settings(self) -> Any:
        """The instantiated configuration of the chosen verb."""
        return self.config_init if self.subcommand is None else self.config_init[self.subcommand]

    def sparsifiers(self) -> list[Sparsifier]:
        """The sparsity callbacks of the Trainer."""
        return [callback for callback in self.trainer.callbacks if isinstance(callback, Sparsifier)]
