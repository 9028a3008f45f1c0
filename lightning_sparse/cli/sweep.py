"""``lightning-sparse sweep CONFIG``: write a W&B sweep file over the callback, its strength and its penalty."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from lightning_sparse.cli import recipes
from lightning_sparse.cli.comparison import results
from lightning_sparse.cli.comparison.runs import check_script
from lightning_sparse.cli.errors import UsageError

_ABOUT = (
    "Write a W&B sweep file that `wandb sweep FILE` registers and `wandb agent ID` runs. Give at least one of --lam, --target, --eps, "
    "--freeze and --callbacks. Example: lightning-sparse sweep digits --lam 1e-4 1e-2 --eps 0.5 2 --metric val/accuracy"
)


def run(verb: str, words: list[str]) -> int:
    """Write the file and print the commands that use it."""
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", description=_ABOUT, allow_abbrev=False)
    parser.add_argument("config", help="a packaged recipe or a YAML file of LightningCLI")
    parser.add_argument("--script", help="your own LightningCLI script; its last callback is varied, such as that of an overlay")
    parser.add_argument("--search", choices=("bayes", "random", "grid"), default="bayes", help="(default: %(default)s)")
    parser.add_argument("--metric", default="val/accuracy", help="the logged metric to optimise (default: %(default)s)")
    parser.add_argument("--mode", choices=("min", "max"), help="(default: guessed from the metric's name)")
    parser.add_argument("--lam", type=float, nargs="+", help="two bounds for bayes and random, any number of values for grid")
    parser.add_argument("--target", type=float, nargs="+", help="target_sparsity, in the same way")
    parser.add_argument("--eps", type=float, nargs="+", help="the eps of the recipe's penalty, in the same way")
    parser.add_argument("--freeze", type=float, nargs="+", help="the last share of the run with a frozen support, in the same way")
    parser.add_argument("--callbacks", nargs="+", metavar="CLASS", help="class names of callbacks; not with --script")
    parser.add_argument("--runs", type=int, help="stop after this many runs (W&B's run_cap)")
    parser.add_argument("-o", "--output", type=Path, default=Path("sweep.yaml"), help="(default: %(default)s)")
    args, overrides = parser.parse_known_args(words)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(yaml.safe_dump(sweep(args, overrides), sort_keys=False, allow_unicode=True), encoding="utf-8")
    print(f"{args.output}\n\nwandb sweep {args.output}      # prints the ID\nwandb agent ID")
    return 0


def sweep(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Return the sweep's description. Raises UsageError for arguments that give no search space."""
    script = check_script(args.script)
    config, tree = recipes.find(args.config), recipes.content(recipes.find(args.config))
    if script is None and not tree.get("sparsify"):
        raise UsageError(f"{args.config} has no callback under the key sparsify to vary; give --script for a script of your own")
    if script is not None and args.callbacks:
        raise UsageError("--callbacks changes the key sparsify of a recipe; with --script make one sweep for each callback")
    prefix = "sparsify" if script is None else "trainer.callbacks"
    numbers = {"lam": args.lam, "target_sparsity": args.target, "penalty.init_args.eps": args.eps, "freeze": args.freeze}
    names = {name: f"{prefix}.init_args.{name}" if script is None else f"{prefix}.{name}" for name in numbers}
    space = {names[name]: _range(name, values, args.search) for name, values in numbers.items() if values}
    space = ({prefix: {"values": args.callbacks}} if args.callbacks else {}) | space
    if not space:
        raise UsageError("nothing to search: give at least one of --lam, --target, --eps, --freeze and --callbacks")
    if args.target and not args.lam:
        overrides = [*overrides, f"--{names['lam']}=null"]
    program = ["lightning-sparse"] if script is None else [sys.executable, script]
    shown = str(config) if config.is_relative_to(recipes.folder()) is False else args.config
    goal = "maximize" if results.rises(args.metric, args.mode) else "minimize"
    described: dict[str, Any] = {
        "name": f"{config.stem} {args.search}",
        "method": args.search,
        "metric": {"name": args.metric, "goal": goal},
        "command": ["${env}", *program, "fit", "--config", shown, *overrides, "${args}"],
        "parameters": space,
    }
    return described | ({"run_cap": args.runs} if args.runs else {})


def _range(name: str, values: list[float], search: str) -> dict[str, Any]:
    """Return a parameter's values or its distribution: log-uniform for lam and eps, uniform for shares."""
    if search == "grid" or len(values) == 1:
        return {"values": values}
    low, high = min(values), max(values)
    if len(values) != 2 or not low < high:
        raise UsageError(f"--search {search} needs two different bounds for {name}, got {values}; use --search grid for a list")
    is_share = name in ("freeze", "target_sparsity")
    if not is_share and low <= 0:
        raise UsageError(f"{name} must be > 0, got {low:g}")
    return {"distribution": "uniform" if is_share else "log_uniform_values", "min": low, "max": high}
