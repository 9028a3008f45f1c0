"""Checks before a command starts its runs: its own flags, the overrides of the configuration, and the callbacks of the methods."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.cli.errors import UsageError, explain
from lightning_sparse.cli.sparse_cli import Parser
from lightning_sparse.cli.training import MISTAKES, RecipeCLI, launch


class ParsedCLI(RecipeCLI):
    """Parse a configuration, and build and train nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def check_words(words: Sequence[str]) -> None:
    """Raise UsageError, as ``fit`` does, for arguments of ``fit`` that cannot be parsed."""
    launch(ParsedCLI, ["fit", *words])


@contextmanager
def naming_flags(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Name the flag of a command in a UsageError about an unknown key that comes close to one, such as ``--method``."""
    try:
        yield
    except UsageError as error:
        unknown = re.match(r"no key '(\w+)'", str(error))
        flags = re.findall(r"--\w+", parser.format_usage())
        near = difflib.get_close_matches(f"--{unknown[1]}", flags, n=1, cutoff=0.75) if unknown else []
        if not near:
            raise
        raise UsageError(f"no argument '--{unknown[1]}'; did you mean {near[0]}?" if unknown else "") from error


def check_method(label: str, callback: Mapping[str, Any]) -> None:
    """Raise UsageError for a callback, with ``class_path`` and ``init_args``, that cannot be built."""
    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(Sparsifier, "method", required=False)
    try:
        parser.instantiate(parser.parse_object({"method": dict(callback)}))
    except argparse.ArgumentError as error:
        raise UsageError(f"method {label!r}: {_of_method(explain(str(error.message)))}") from error
    except MISTAKES as error:
        raise UsageError(f"method {label!r}: {_of_method(explain(str(error)))}") from error


def _of_method(text: str) -> str:
    """Shorten a message about the key ``method``: its arguments are given as YAML, not as flags."""
    return re.sub(r"^method(?:\.|: )", "", re.sub(r" in YAML, or --method\.\S.*$", "", text))
