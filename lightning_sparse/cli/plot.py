"""``lightning-sparse plot LogSum 'MCP: {c: 0.7}' -o penalties.png``: draw curves of penalties."""

from __future__ import annotations

import argparse
from typing import Any

import jsonargparse
import yaml

import lightning_sparse.mask_rules
import lightning_sparse.penalties  # noqa: F401  (because only imported classes have short names)
from lightning_sparse import plots
from lightning_sparse.cli.errors import UsageError, below, explain, imported
from lightning_sparse.duality import MaskRule, Penalty

_HELP = (
    "class names, alone (with the arguments of the class's first example), or as YAML with arguments: 'MCP: {c: 0.7}', "
    "or as in recipes: '{class_path: MCP, init_args: {c: 0.7}}'"
)


def run(verb: str, words: list[str]) -> int:
    """Parse the penalties, draw them and print the file's path."""
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", description="Draw omega, eta_hat, f and alpha of penalties.")
    parser.add_argument("penalties", nargs="+", metavar="PENALTY", help=_HELP)
    parser.add_argument("-o", "--output", default="penalties.png", help="the PNG or PDF file (default: %(default)s)")
    parser.add_argument("--lam", type=float, default=1.0, help="strength at which alpha is drawn (default: %(default)s)")
    parser.add_argument("--w-max", type=float, default=4.0, help="largest weight (default: %(default)s)")
    args = parser.parse_args(words)
    try:
        figure = plots.penalty_curves([read(word) for word in args.penalties], args.lam, args.w_max)
        print(plots.save(figure, args.output))
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    return 0


def read(word: str) -> Penalty | MaskRule:
    """Parse one word of the command line into a penalty or mask rule.

    Raises UsageError with the closest class names or arguments.
    """
    try:
        tree = yaml.safe_load(word)
    except yaml.YAMLError as error:
        raise UsageError(f"{word!r} is neither a class name nor YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, (str, dict)):
        raise UsageError(f"{word!r} is neither a class name nor a mapping such as 'MCP: {{c: 0.7}}'")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("penalty", type=Penalty | MaskRule)
    try:
        parsed = parser.parse_object({"penalty": _described(tree)})
        result: Penalty | MaskRule = parser.instantiate(parsed)["penalty"]
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UsageError(explain(str(getattr(error, "message", error)))) from None
    return result


def _described(tree: Any) -> Any:
    """Convert ``Name`` and ``{Name: arguments}`` to class_path and init_args; default arguments are the class's first example."""
    if isinstance(tree, str):
        return {"class_path": tree, "init_args": _example(tree)}
    if set(tree) <= {"class_path", "init_args"}:
        return {"init_args": _example(str(tree.get("class_path")))} | tree
    if len(tree) == 1:
        name, arguments = next(iter(tree.items()))
        return {"class_path": name, "init_args": _example(str(name)) if arguments is None else arguments}
    return tree


def _example(name: str) -> dict[str, Any]:
    cls = imported(name)  # first, because importing the user's module defines its subclasses
    classes = {subclass.__name__: subclass for base in (Penalty, MaskRule) for subclass in below(base)}
    examples = getattr(cls or classes.get(name.rpartition(".")[2]), "examples", ())
    return dict(examples[0]) if examples else {}
