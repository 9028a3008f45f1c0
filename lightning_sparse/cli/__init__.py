"""The ``lightning-sparse`` command: LightningCLI's verbs with packaged recipes, and verbs of its own.

``main`` imports nothing heavy beyond what a verb needs, so that ``--help``, ``recipes`` and ``plot`` stay quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_sparse import _checks
from lightning_sparse._version import __version__
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.failures import RunError
from lightning_sparse.cli.text import speak_utf8

if TYPE_CHECKING:
    from lightning_sparse.cli.sparse_cli import SparseCLI

__all__ = ["RunError", "SparseCLI", "UsageError", "main"]

_TRAINING = "lightning_sparse.cli.training"
_VERBS = {
    "fit": (_TRAINING, "train a recipe's model and print what it reached"),
    "validate": (_TRAINING, "evaluate on the validation split"),
    "test": (_TRAINING, "evaluate on the test split"),
    "predict": (_TRAINING, "run the model on the prediction data"),
    "recipes": ("lightning_sparse.cli.recipes", "list the packaged recipes with what they reach, or those of a FOLDER"),
    "check": ("lightning_sparse.cli.check", "validate a recipe without training: check RECIPE [overrides]"),
    "seeds": ("lightning_sparse.cli.seeds", "mean and spread of a recipe over seeds: seeds RECIPE [--seeds 5] [overrides]"),
    "reproduce": ("lightning_sparse.cli.reproduce", "rerun the paper's case study: its table and figures beside the published ones"),
    "plot": ("lightning_sparse.cli.plot", "draw omega, eta_hat, f and alpha of penalties to a PNG"),
}


def __getattr__(name: str) -> Any:
    if name == "SparseCLI":  # on first use, because it imports Lightning
        from lightning_sparse.cli.sparse_cli import SparseCLI

        return SparseCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def usage() -> str:
    """The text of ``lightning-sparse --help``."""
    verbs = "\n".join(f"  {verb:9} {text}" for verb, (_, text) in _VERBS.items())
    return (
        f"lightning-sparse {__version__}: sparse training by adaptive masks or the equivalent reweighted penalties\n\n"
        f"usage: lightning-sparse VERB ...\n\n{verbs}\n\n"
        "  lightning-sparse fit --config digits                            a packaged recipe, or a YAML file\n"
        "  lightning-sparse fit --config digits --sparsify AdaptiveMask    the other form, same penalty and lam\n"
        "  lightning-sparse VERB --help                                    the arguments of one verb\n"
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code, one line on stderr with the others than 0.

    0: done; 1: the run failed, by a loss that is not finite, say, or a full disk; 2: a mistake in the input.
    """
    speak_utf8()
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["--version"]:
        print(__version__)
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    try:
        return _run(words[0], words[1:])
    except (RunError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2


def _run(verb: str, rest: list[str]) -> int:
    if verb not in _VERBS:
        raise UsageError(f"no verb {verb!r}{_checks.closest(verb, _VERBS)}; one of {', '.join(_VERBS)}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that `class_path: my_file.MyPenalty` finds a file beside the recipe
    code: int = importlib.import_module(_VERBS[verb][0]).run(verb, rest)
    return code
