"""The ``lightning-sparse`` command: LightningCLI's subcommands with packaged recipes, and subcommands of this package.

``main`` imports only what a subcommand needs, because Lightning takes seconds to import.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_sparse import _checks
from lightning_sparse._version import __version__
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.failures import RunError
from lightning_sparse.cli.text import print_utf8

if TYPE_CHECKING:
    from lightning_sparse.cli.sparse_cli import SparseCLI

__all__ = ["RunError", "SparseCLI", "UsageError", "main"]

_TRAINING = "lightning_sparse.cli.training"
_VERBS = {  # module, what it is for, the arguments of an example
    "fit": (_TRAINING, "train a recipe's model, or that of your own YAML file, and print the results", "--config digits"),
    "validate": (_TRAINING, "evaluate a checkpoint on the validation split", "--config digits --ckpt_path CKPT"),
    "test": (_TRAINING, "evaluate a checkpoint on the test split", "--config digits --ckpt_path CKPT"),
    "predict": (_TRAINING, "run a checkpoint on the prediction data", "--config my.yaml --ckpt_path CKPT"),
    "recipes": ("lightning_sparse.cli.recipes", "list the packaged recipes with their results, or those of a folder", ""),
    "check": ("lightning_sparse.cli.check", "check a recipe's settings, train nothing", "digits --sparsify.lam 3e-3"),
    "report": (
        "lightning_sparse.cli.checkpoint_report",
        "say what is zero in a checkpoint, what each use of the zeros gains on this machine, and the command for it",
        "CKPT",
    ),
    "shrink": ("lightning_sparse.cli.shrink", "remove zero channels, neurons and heads", "CKPT --out small"),
    "export": ("lightning_sparse.cli.export", "write files that use the zeros, and measure each here", "CKPT --to csr compact"),
    "seeds": ("lightning_sparse.cli.seeds", "mean and standard deviation of a recipe over seeds", "digits --seeds 5"),
    "compare": (
        "lightning_sparse.cli.compare",
        "train with several callbacks, targets and seeds; one table, one picture of the metric against the zeros",
        "my.yaml --targets 0.8 0.9 --seeds 0 1",
    ),
    "path": (
        "lightning_sparse.cli.compare",
        "train for a list of strengths, each run starting from the last",
        "digits --lams 1e-4 1e-3 1e-2",
    ),
    "sweep": ("lightning_sparse.cli.sweep", "write a W&B sweep file for wandb agent", "digits --lam 1e-4 1e-2 --metric val/accuracy"),
    "reproduce": (
        "lightning_sparse.cli.reproduce",
        "rerun the paper's case study: its table and figures with the published results",
        "--epochs 200 --seeds 0 1 2",
    ),
    "plot": ("lightning_sparse.cli.plot", "draw omega, eta_hat, f and alpha of penalties", "LogSum 'MCP: {c: 0.7}' -o penalties.png"),
}


_ASKED = ("--version", "-h", "--help")


def __getattr__(name: str) -> Any:
    if name == "SparseCLI":  # on first use, because it imports Lightning
        from lightning_sparse.cli.sparse_cli import SparseCLI

        return SparseCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def usage() -> str:
    """Return the text of ``lightning-sparse --help``."""
    verbs = "\n".join(f"  {verb:9} {text}\n{'':14}lightning-sparse {verb} {words}".rstrip() for verb, (_, text, words) in _VERBS.items())
    return (
        f"lightning-sparse {__version__}: train networks to zeros, and make them smaller or faster\n\n"
        f"usage: lightning-sparse VERB ...\n\n{verbs}\n\n"
        "lightning-sparse fit --config digits --sparsify AdaptiveMask trains with another callback, with the recipe's penalty and lam.\n"
        "lightning-sparse VERB --help lists the arguments of one verb.\n"
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code. Errors are one line on stderr.

    0: success; 1: the run failed (for example a non-finite loss or a full disk); 2: invalid input; 130: interrupted by Ctrl-C.
    """
    print_utf8()
    words = list(sys.argv[1:] if args is None else args)
    if args is None:  # because Lightning's own call of a function that this torch deprecates is nothing to a user
        warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated", FutureWarning)
    try:
        code = _run(words[0], words[1:]) if words and words[0] not in _ASKED else _tell(words)
        if args is None:
            _finish_wandb(code)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _stop_printing()
    except KeyboardInterrupt as error:
        return _stop(str(error))
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # the Trainer ends so, with exit code 1
            return _stop("")
        raise
    except (RunError, UsageError) as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return _stop_printing()
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2


def _tell(words: list[str]) -> int:
    print(__version__ if words[:1] == ["--version"] else usage())
    return 0 if words else 2


def _finish_wandb(code: int) -> None:
    """End an open W&B run, because some versions of W&B end it after Python's exit, with colours on stdout even in a file."""
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish(exit_code=code)


def _stop(state: str) -> int:
    """Say that the command was interrupted, and return the exit code of a shell for that."""
    below = "\n" if sys.stderr.isatty() else ""  # where the terminal shows ^C
    print(f"{below}interrupted{': ' if state else ''}{state}", file=sys.stderr)
    return 128 + signal.SIGINT


def _stop_printing() -> int:
    """Drop what is left to print, because its reader (such as ``head``) has ended, and return the exit code of a shell for that."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())  # else Python flushes into the closed pipe when it ends
    return 128 + signal.SIGPIPE


def _run(verb: str, rest: list[str]) -> int:
    if verb not in _VERBS:
        raise UsageError(f"no verb {verb!r}{_checks.closest(verb, _VERBS)}; one of {', '.join(_VERBS)}")
    files = (word.rpartition("=")[2] for word in rest)
    beside = (os.path.dirname(os.path.abspath(file)) for file in files if file.endswith((".yaml", ".yml")) and os.path.isfile(file))
    # because `class_path: my_file.MyPenalty` should find a file in the current folder, or beside the configuration
    sys.path += [folder for folder in dict.fromkeys([os.getcwd(), *beside]) if folder not in sys.path]
    code: int = importlib.import_module(_VERBS[verb][0]).run(verb, rest)
    return code
