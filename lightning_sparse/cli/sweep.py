"""``lightning-sparse sweep CONFIG``: write a W&B sweep file over the callback, its strength and its penalty."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import callbacks as pl_callbacks

from lightning_sparse import _checks, callbacks
from lightning_sparse.cli import check, recipes
from lightning_sparse.cli.comparison import results
from lightning_sparse.cli.comparison.methods import arguments_of
from lightning_sparse.cli.comparison.runs import Run, check_script, execute
from lightning_sparse.cli.errors import UsageError, imported
from lightning_sparse.cli.saved import silence_device_messages

_ABOUT = (
    "Write a W&B sweep file that `wandb sweep FILE` registers and `wandb agent ID` runs. Give at least one of --lam, --target, --eps, "
    "--freeze and --callbacks. One run of the sweep is checked, and tried for two batches, before the file is written. Further arguments "
    "override the configuration as in fit. Example: lightning-sparse sweep digits --lam 1e-4 1e-2 --eps 0.5 2 --metric val/accuracy"
)
_STRENGTHS = ("lam", "kl_weight", "sparsity")  # which a callback takes in the place of target_sparsity
_LOGGER = "trainer: {logger: {class_path: WandbLogger, init_args: {project: my}}}"


def run(verb: str, words: list[str]) -> int:
    """Write the file and print the commands that use it."""
    args, overrides = _parser(verb).parse_known_args(words)
    described = sweep(args, overrides)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(yaml.safe_dump(described, sort_keys=False, allow_unicode=True), encoding="utf-8")
    print(f"{args.output}, to optimise {described['metric']['name']}\n")
    if not _logs(args.config, overrides):
        print(f"the YAML needs a WandbLogger, which gives the metric to the sweep; add to it: {_LOGGER}\n")
    print("wandb login      # once")
    agent = "" if args.script else "      # in a shell that finds lightning-sparse on its PATH"
    print(f"wandb sweep {args.output}      # prints the ID\nwandb agent ID{agent}")
    return 0


def _logs(config: str, overrides: Sequence[str]) -> bool:
    """Return True if the runs have a WandbLogger."""
    trainer = recipes.content(recipes.find(config)).get("trainer")
    own = trainer.get("logger") if isinstance(trainer, dict) else None
    return "WandbLogger" in str(list(overrides) if any("trainer.logger" in word for word in overrides) else own)


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", description=_ABOUT, allow_abbrev=False)
    parser.add_argument("config", help="a packaged recipe or a YAML file of LightningCLI")
    parser.add_argument("--script", help="your own LightningCLI script; its last callback is varied, such as that of an overlay")
    parser.add_argument("--search", choices=("bayes", "random", "grid"), default="bayes", help="(default: %(default)s)")
    parser.add_argument("--metric", help="the logged metric to optimise (default: a validation metric, an accuracy if there is one)")
    parser.add_argument("--mode", choices=("min", "max"), help="(default: guessed from the metric's name)")
    parser.add_argument("--lam", type=float, nargs="+", help="two bounds for bayes and random, any number of values for grid; one is fixed")
    parser.add_argument("--target", type=float, nargs="+", help="target_sparsity, in the same way")
    parser.add_argument("--eps", type=float, nargs="+", help="the eps of the recipe's penalty, in the same way")
    parser.add_argument("--freeze", type=float, nargs="+", help="the last share of the run with a frozen support, in the same way")
    parser.add_argument("--callbacks", nargs="+", metavar="CLASS", help="class names of callbacks; not with --script")
    parser.add_argument("--runs", type=int, help="stop after this many runs (W&B's run_cap)")
    parser.add_argument("-o", "--output", type=Path, default=Path("sweep.yaml"), help="(default: %(default)s)")
    return parser


def sweep(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Return the sweep's description. Raises UsageError for arguments that give no search space, and if a run of the sweep would fail."""
    script = check_script(args.script)
    config = recipes.find(args.config)
    tree = recipes.content(config)
    if script is None and not tree.get("sparsify") and not _given(overrides):
        raise UsageError(
            f"{args.config} has no callback under the key sparsify to vary: the YAML needs `sparsify: {_callback_for(args)}`; or give "
            "--script for a script of your own"
        )
    if script is not None and args.callbacks:
        raise UsageError("--callbacks changes the key sparsify of a recipe; with --script make one sweep for each callback")
    listed = recipes.listed_callbacks([config, *map(Path, recipes.files_of(overrides))])
    own = _own_callback(tree, overrides) if script is None else next((name for _, name in reversed([*listed])), "")
    if script is not None:
        _check_last(own, args)
    _check_numbers(args, args.callbacks or [own])
    prefix = "sparsify" if script is None else "trainer.callbacks"
    numbers = {"lam": args.lam, "target_sparsity": args.target, "penalty.init_args.eps": args.eps, "freeze": args.freeze}
    names = {name: f"{prefix}.init_args.{name}" if script is None else f"{prefix}.{name}" for name in (*numbers, *_STRENGTHS)}
    space = {names[name]: _range(name, values, args.search) for name, values in numbers.items() if values}
    space = ({prefix: {"values": args.callbacks}} if args.callbacks else {}) | space
    if not space:
        raise UsageError("nothing to search: give at least one of --lam, --target, --eps, --freeze and --callbacks")
    if all(len(one.get("values", ("min", "max"))) == 1 for one in space.values()):
        raise UsageError(
            "nothing to search: each of the given arguments has one value; give two bounds, such as --target 0.8 0.95, or a list with "
            "--search grid"
        )
    if args.target and args.lam:
        raise UsageError("--lam and --target together: with a target lam only bounds its search; make one sweep for each")
    written = [*overrides, *(file.read_text(encoding="utf-8") for file in (config, *map(Path, recipes.files_of(overrides))))]
    if args.lam and any("target_sparsity" in text for text in written) and "target_sparsity" in _arguments(own):
        overrides = [*overrides, f"--{names['target_sparsity']}=null"]
    if args.target:
        overrides = [*overrides, *(f"--{names[name]}=null" for name in _STRENGTHS if name in _arguments(own))]
    samples = _samples(space)
    if script is None:
        for sample in samples:
            _check(args.config, [*overrides, *sample], several=len(samples) > 1)
    metric = _metric(config, script, [*overrides, *samples[0]], args.metric)
    program = ["lightning-sparse"] if script is None else [sys.executable, script]
    shown = args.config if config.is_relative_to(recipes.folder()) else str(config.resolve())  # because agents run in other folders
    described: dict[str, Any] = {
        "name": f"{config.stem} {args.search}",
        "method": args.search,
        "metric": {"name": metric, "goal": "maximize" if results.rises(metric, args.mode) else "minimize"},
        "command": ["${env}", *program, "fit", "--config", shown, *recipes.with_absolute(overrides), "${args}"],
        "parameters": space,
    }
    return described | ({"run_cap": args.runs} if args.runs else {})


def _given(overrides: Sequence[str]) -> str:
    """Return the class that ``--sparsify NAME`` chooses, or an empty string."""
    words = [*overrides, ""]
    found = [words[i + 1] if word == "--sparsify" else word.partition("=")[2] for i, word in enumerate(words) if _is_choice(word)]
    return found[-1] if found else ""


def _is_choice(word: str) -> bool:
    return word == "--sparsify" or word.startswith("--sparsify=")


def _own_callback(tree: dict[str, Any], overrides: Sequence[str]) -> str:
    """Return the class path of the callback under the key sparsify."""
    own = tree["sparsify"] if tree.get("sparsify") else ""
    return _given(overrides) or str(own.get("class_path", "") if isinstance(own, dict) else own)


def _callback_for(args: argparse.Namespace) -> str:
    """Return YAML of a callback that has the arguments to vary; a script of the user's own needs whole paths of classes."""
    forms, penalties = ("lightning_sparse.callbacks.", "lightning_sparse.penalties.") if args.script else ("", "")
    if args.lam or args.eps:
        penalty = f"{{class_path: {penalties}LogSum, init_args: {{eps: 2.0}}}}"
        return f"{{class_path: {forms}ReweightedPenalty, init_args: {{penalty: {penalty}, lam: 1.0e-3}}}}"
    return f"{{class_path: {forms}Sparsify, init_args: {{target_sparsity: 0.9}}}}"


def _check_last(name: str, args: argparse.Namespace) -> None:
    """Raise UsageError unless the last callback of a script's configuration may be one of this package, which the sweep varies."""
    form = imported(name) if "." in name else getattr(callbacks, name, None) or getattr(pl_callbacks, name, None)
    if not name or (isinstance(form, type) and not issubclass(form, callbacks.Sparsifier)):
        last = f"its last callback is {name}, and the last one is varied" if name else "it has no callback"
        raise UsageError(
            f"{args.config}: no sparsity callback at the end of trainer.callbacks ({last}). Add one there, such as "
            f"`trainer: {{callbacks+: [{_callback_for(args)}]}}`, or give --config FILE with the file that "
            "`lightning-sparse recipes overlay/reweighted_penalty` names"
        )


def _arguments(name: str) -> Sequence[str]:
    """Return the argument names of a callback; none for an unknown class, which the check refuses by its own message."""
    form = imported(name) if "." in name else getattr(callbacks, name, None)
    return list(arguments_of(form)) if isinstance(form, type) else []


def _check_numbers(args: argparse.Namespace, forms: Iterable[str]) -> None:
    """Raise UsageError for numbers out of range, and for those that one of the callbacks has no argument for."""
    try:
        for target in args.target or ():
            _checks.share("--target", target)
        for share in args.freeze or ():
            _checks.share("--freeze", share, closed="l")
    except ValueError as error:
        raise UsageError(str(error)) from error
    for form in forms:
        known = _arguments(form)
        for word, argument, values in (("lam", "lam", args.lam), ("target", "target_sparsity", args.target), ("eps", "penalty", args.eps)):
            if values and known and argument not in known:
                instead = "; give --target, the share of zeros" if word == "lam" and "target_sparsity" in known else ""
                raise UsageError(f"--{word}: {form.rpartition('.')[2]} takes no {argument!r}{instead}")


def _samples(space: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the arguments of one run for each callback of the sweep, as ``wandb agent`` writes them."""
    first = {name: one["values"][0] if "values" in one else one["min"] for name, one in space.items()}
    forms = space["sparsify"]["values"] if "sparsify" in space else [None]
    varied = [first | ({} if form is None else {"sparsify": form}) for form in forms]
    return [[f"--{name}={value}" for name, value in sorted(one.items())] for one in varied]


def _check(name: str, words: list[str], several: bool) -> None:
    """Check one run of the sweep as ``lightning-sparse check`` does; raises UsageError as it does.

    With ``several`` callbacks no flag is named, because it would be one of every callback.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), silence_device_messages():
            check.run("check", [name, *words])
    except UsageError as error:
        text = re.sub(r" in YAML, or --sparsify\..*$", " under sparsify in the YAML", str(error)) if several else str(error)
        raise UsageError(f"a run of this sweep would fail, with {' '.join(words)}: {text}") from error


class _Trial(Run):
    """A run whose own configuration comes last, because ``--trainer.callbacks.lam`` sets an argument of the last callback before it."""

    def words(self, verb: str = "fit", resumed: Path | None = None) -> list[str]:
        words = super().words(verb, resumed)
        return [*words[:3], *words[5:], *words[3:5]]


def _metric(config: Path, script: str | None, words: Sequence[str], given: str | None) -> str:
    """Return the metric of the sweep: the given one, or a validation metric that a trial of two batches logs.

    Raises UsageError with the logged names if there is no such metric, and if the trial fails where nothing else has checked the run.
    """
    with tempfile.TemporaryDirectory() as folder:
        quick = (*words, "--trainer.fast_dev_run", "2")
        trial = _Trial(folder, str(config.resolve()), "trial", None, 0, script=script, overrides=quick)
        record = execute(trial)
    if "failed" in record:
        if script is None and given is not None:  # it was checked, and a metric may need more than two batches
            return given
        hint = "; give --metric if only two batches are too few" if script is None else ""
        raise UsageError(f"a run of this sweep fails, with {' '.join(quick)}: {record['failed']}{hint}")
    names = list(record["metrics"])
    if given is not None and given not in names:
        close = _checks.closest(given, names)
        raise UsageError(f"--metric {given} is not logged; a trial of two batches logged {', '.join(names) or 'nothing'}{close}")
    if not names:
        raise UsageError("a trial of two batches logged no metric to optimise: log one with self.log in validation_step")
    return results.metric_of([record], given)


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
