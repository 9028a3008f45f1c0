"""``lightning-sparse shrink CKPT``: write the network of a checkpoint without its zero groups, and print what that brings."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from lightning_sparse.cli import budget, shrunk_table
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.opened import add_arguments, open_checkpoint, parsed
from lightning_sparse.cli.text import as_flags
from lightning_sparse.export import program
from lightning_sparse.shrinking import save_shrunk, shrink_and_report

_ABOUT = (
    "Remove the zero channels, neurons and heads of a checkpoint's network, compare the outputs, and write the smaller network into a "
    "folder (model.pt and shape.json for lightning_sparse.load_shrunk, model.pt2 for torch.export.load). Prints one table: widths, "
    "parameters, multiply-adds of one sample, bytes, latency at batch 1, 32 and 256 beside the given network in one run (A/A: that "
    "network against itself), test metrics. Further arguments override the recipe as in fit. With --max_drop, --max_params, "
    "--max_multiply_adds, --max_latency or --speed_up, cuts and fine-tunes a dense network in stages: see below."
)


class _Parser(argparse.ArgumentParser):
    """Names the two ways to use the command where the checkpoint is missing, and prints the help of both."""

    def error(self, message: str) -> NoReturn:
        both = "; or give a goal, such as --max_drop 1, to shrink the dense network of --config" if "CKPT" in message else ""
        super().error(message + both)

    def format_help(self) -> str:
        """Return the help of this command and, below it, that of the command with a goal."""
        return f"{super().format_help()}\nWith a goal ({', '.join(budget.GIVEN)}):\n\n{budget.parser().format_help()}"


def run(verb: str, words: list[str]) -> int:
    """Shrink, save and print the table. Raises UsageError for a network that cannot be shrunk; nothing is written then."""
    if any(word.partition("=")[0] in budget.GIVEN for word in words):
        if any(word.partition("=")[0] == "--script" for word in words):
            raise UsageError("--script is for a checkpoint: a budget trains, so name the classes of model and data in the YAML of --config")
        return budget.run(words)
    parser = _Parser(prog=f"lightning-sparse {verb}", description=_ABOUT)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go (default: CKPT's path with .shrunk)")
    parser.add_argument("--round_to", type=budget.unit, default=8, metavar="N", help=f"{budget.ROUND_TO} (default: %(default)s)")
    parser.add_argument("--allow_branches", action="store_true", help="accept a forward that branches on values of tensors")
    args, overrides = parsed(parser, words)
    saved = open_checkpoint(args.checkpoint, args.config, overrides, args.script)
    inputs = program.sized(saved.inputs(), shrunk_table.SAMPLES)
    try:
        found = shrink_and_report(saved.module, inputs, args.round_to, allow_branches=args.allow_branches, seconds=0)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{args.checkpoint}: {as_flags(str(error))}") from error
    found = replace(found, report=replace(found.report, samples=shrunk_table.SAMPLES))
    folder = save_shrunk(found.module, args.out or args.checkpoint.with_suffix(".shrunk"))
    shrunk_table.show(saved, found, folder)
    return 0
