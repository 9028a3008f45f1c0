"""SparseCLI: a LightningCLI for your scripts, with packaged recipes, a ``sparsify`` key and one-line error messages."""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_sparse.curvature
import lightning_sparse.mask_rules
import lightning_sparse.noise
import lightning_sparse.penalties
import lightning_sparse.schedules
import lightning_sparse.structure  # noqa: F401  (because only imported classes have short names)
from lightning_sparse import archive
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.cli import checkpoints, misplaced, recipes, text
from lightning_sparse.cli.errors import UsageError, class_of, explain, imported
from lightning_sparse.cli.failures import NO_NAME, is_refusal

_STRICT = {"exit_on_error": False, "allow_abbrev": False}


class Parser(LightningArgumentParser):
    """A parser that saves a configuration as UTF-8, whatever the locale's encoding is."""

    def save(self, *args: Any, **options: Any) -> None:
        """Save the configuration as jsonargparse does, but in UTF-8."""
        with text.utf8():
            super().save(*args, **options)


class SparseCLI(LightningCLI):
    """LightningCLI with packaged recipes, a ``sparsify`` key, and one-line error messages with the closest names.

    Replace ``LightningCLI(MyModel, MyData)`` in a script by ``SparseCLI(MyModel, MyData)``. Differences:

    - ``--config`` also accepts the name of a packaged recipe, such as ``overlay/adaptive_mask``; files are read as UTF-8.
    - Callbacks that a file adds by ``callbacks+:`` are kept when a later file has a plain ``callbacks:`` list.
    - The callback under the key ``sparsify`` is appended to the Trainer's; ``--sparsify AdaptiveMask`` selects another callback
      and ``--sparsify.lam 1e-3`` sets its strength.
    - A misspelt key or class, or a setting that this package rejects, ends the command with exit code 2 and one line.

    Args:
        model_class: as in LightningCLI; None takes the class from the configuration.
        datamodule_class: as in LightningCLI.
        more: further positional arguments of LightningCLI.
        args: the command line as a list of words, or a dict; None uses sys.argv.
        options: further keyword arguments of LightningCLI.
    """

    trainer: Any
    words: list[str]
    overruled: list[tuple[str, str]]  # (file that adds callbacks, later file whose list would replace them)

    def __init__(self, model_class: Any = None, datamodule_class: Any = None, *more: Any, args: Any = None, **options: Any) -> None:
        self.words, self.overruled = [], []
        if args is None:
            text.print_utf8()
        if args is None or isinstance(args, list):
            try:
                self.words, self.overruled = recipes.with_added(recipes.with_paths(sys.argv[1:] if args is None else args))
            except UsageError as error:
                self.refuse(error)
        super().__init__(model_class, datamodule_class, *more, **({"parser_class": Parser} | options | {"args": args}))

    def refuse(self, error: UsageError) -> NoReturn:
        """Print the error and exit with code 2."""
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
            self.refuse(UsageError(misplaced.hint(self.words) or explain(str(error.message), known)))
        if name := text.unencodable_name(self.config.as_dict()):  # before a logger opens its run
            self.refuse(UsageError(NO_NAME.format(name)))
        chosen = self.config.get(self.config.get("subcommand") or "") or {}
        self.read_file(chosen.get("ckpt_path"))

    def read_file(self, path: Any) -> None:
        """Refuse a damaged file of --ckpt_path, which torch does not name."""
        try:
            archive.check(path)
        except ValueError as error:
            self.refuse(UsageError(str(error)))

    def _parse_ckpt_path(self) -> None:
        if self._ignores_file():
            return
        try:  # because Lightning parses the file's hyper_parameters over the command line's
            super()._parse_ckpt_path()
        except argparse.ArgumentError as error:
            self.refuse(UsageError(f"hyper_parameters of --ckpt_path: {explain(str(error.message))}; is it a file of another model?"))
        except pickle.UnpicklingError:
            self.refuse(UsageError("LightningCLI reads no --ckpt_path with such objects; in Python: Trainer.fit(..., weights_only=False)"))

    def _ignores_file(self) -> bool:
        """Return True if the configuration names the model's class and the file of --ckpt_path does not, or names another one.

        A plain Trainer saves arguments without their class. The weights tell whether the file is of that model.
        """
        chosen = self.config.get(self.config.get("subcommand") or "") or {}
        own = class_of(chosen.get("model")) if self.subclass_mode_model else None
        given = checkpoints.hyper_parameters(chosen.get("ckpt_path")) if own is not None else {}
        return bool(given) and imported(str(given.get("_class_path"))) is not own

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
        _check_states(self.settings["trainer"]["callbacks"])
        return super().instantiate_trainer(**kwargs)

    def extra_callbacks(self) -> list[Callback]:
        """Return the callbacks to append to the Trainer's: the one under ``sparsify``."""
        chosen = self.settings.get("sparsify")
        return [] if chosen is None else [chosen]

    @property
    def settings(self) -> Any:
        """The instantiated configuration of the subcommand."""
        return self.config_init if self.subcommand is None else self.config_init[self.subcommand]

    def sparsifiers(self) -> list[Sparsifier]:
        """Return the sparsity callbacks of the Trainer."""
        return [callback for callback in self.trainer.callbacks if isinstance(callback, Sparsifier)]


def _check_states(callbacks: Iterable[Callback]) -> None:
    """Raise ValueError for two callbacks with one state key, because a checkpoint would hold the state of only one of them."""
    seen: dict[str, Callback] = {}
    for callback in callbacks:
        if type(callback).state_dict is Callback.state_dict:
            continue
        if callback.state_key in seen:
            same = "select" if isinstance(callback, Sparsifier) else "settings"
            raise ValueError(
                f"two callbacks are {type(callback).__name__} with the same {same}, and a checkpoint would hold the state of only one of "
                f"them; remove one (trainer.callbacks and the key sparsify count together), or give each its own {same}"
            )
        seen[callback.state_key] = callback
