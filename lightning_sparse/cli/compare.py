"""``lightning-sparse compare CONFIG``: train a configuration with several callbacks, targets and seeds, and compare them.

``path`` trains it for a list of strengths, each run starting from the weights of the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

from lightning_sparse import _checks, callbacks, plots
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.cli import recipes
from lightning_sparse.cli.comparison import before, engines, methods, results
from lightning_sparse.cli.comparison.runs import Run, check_script, execute
from lightning_sparse.cli.errors import UsageError

_LOG_SUM = {"class_path": "lightning_sparse.penalties.LogSum", "init_args": {"eps": 2.0}}
_FORM = "ReweightedPenalty"  # of a path, if the configuration has no callback with a lam
_COMPARE = (
    "Train a LightningCLI configuration once without sparsity (dense) and with each callback, target share of zeros and seed, in "
    "processes side by side. Prints one table (mean and standard deviation over seeds of a validation metric), and writes it with a "
    "CSV of all runs and a picture. The same command again trains only what is missing. Further arguments override the "
    "configuration as in fit. Example: lightning-sparse compare digits --targets 0.9 0.98 --seeds 0 1"
)
_PATH = (
    "Train a configuration for a list of strengths, weakest first, each run starting from the weights of the last, and draw the "
    "non-zero weights of each parameter against lam. Example: lightning-sparse path digits --lams 1e-4 1e-3 1e-2"
)


def run(verb: str, words: list[str]) -> int:
    """Train the runs that have no record yet, then print the table and write the files."""
    parser = _parser(verb)
    args, overrides = parser.parse_known_args(words)
    _check(args)
    settings = _Settings(args, verb, tuple(overrides))
    runs = settings.path() if verb == "path" else settings.comparison()
    settings.check_classes()
    settings.check_callbacks()
    settings.check_runs(runs, parser)
    settings.keep(runs)
    finished = [record for run in runs if (record := run.result()) is not None]
    results.metric_of(finished, args.metric)  # before any other is trained
    print(f"{len(runs)} runs, {len(runs) - len(finished)} to go, files in {settings.out}{settings.told(runs)}", flush=True)
    if args.metric is not None and not finished and getattr(args, "engine", "local") == "local":
        settings.check_metric(runs[0])
    try:
        if verb == "path":  # one after the other, because each starts from the last
            records = [record for run in runs for record in engines.run_all([run], "local", 1, _tell)]
        else:
            records = engines.run_all(runs, args.engine, args.jobs, _tell, args.engine_options)
    except KeyboardInterrupt:
        done = sum(run.result() is not None for run in runs)
        raise KeyboardInterrupt(f"{done} of {len(runs)} runs done; the same command goes on") from None
    setting = "lam" if verb == "path" else "target"
    metric = results.metric_of(records, args.metric)
    cells = results.cells(runs, records, metric)
    table = results.markdown(cells, metric, setting, results.rises(metric, args.mode))
    notes = results.footnotes(runs, records)
    notes = ["Warnings, in full in log.txt of each run's folder:", *(f"- {note}" for note in notes)] if notes else []
    (settings.out / "table.md").write_text("\n".join([table, *([""] if notes else []), *notes, ""]), encoding="utf-8")
    Console(highlight=False, width=None if os.isatty(1) else 140).print(Markdown(table))
    print("\n".join([*notes, ""]), end="")
    picture = results.regularisation_path(runs, records, metric) if verb == "path" else results.frontier(cells, metric)
    for file in (settings.out / "table.md", results.write_csv(settings.out / "runs.csv", runs, records, setting)):
        print(file)
    print(plots.save(picture, settings.out / f"{'path' if verb == 'path' else 'frontier'}.png"))
    return 0 if any("failed" not in record for run, record in zip(runs, records, strict=True) if run.callback is not None) else 1


def _tell(run: Run, record: dict[str, Any]) -> None:
    if "failed" in record:
        print(f"{time.strftime('%H:%M')} {run.name}: failed: {record['failed']}", flush=True)
        return
    shown = [f"{name} {value:.4f}" for name, value in record["metrics"].items() if name.lower().startswith("val")]
    print(f"{time.strftime('%H:%M')} {run.name}: zeros {record['zeros']:.2%} {' '.join(shown[:3])} {record['seconds']:.0f} s", flush=True)


def _parser(verb: str) -> argparse.ArgumentParser:
    about = _PATH if verb == "path" else _COMPARE
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", description=about, allow_abbrev=False)
    parser.add_argument("config", help="a packaged recipe or a YAML file of LightningCLI")
    parser.add_argument("--script", help="your own script that makes a LightningCLI, run as: python SCRIPT fit --config CONFIG ...")
    parser.add_argument("--metric", help="the logged metric to compare (default: a validation metric, an accuracy if there is one)")
    parser.add_argument("--mode", choices=("min", "max"), help="whether smaller or larger is better (default: guessed from the name)")
    parser.add_argument("--out", type=Path, help=f"the folder for all files (default: runs/{verb}/CONFIG)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run (default: %(default)s)")
    if verb == "path":
        parser.add_argument("--lams", type=float, nargs="+", required=True, metavar="LAM", help="the strengths")
        parser.add_argument(
            "--method",
            help=f"the callback, as in compare (default: the one under sparsify of the configuration if it takes lam, else {_FORM})",
        )
        parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
        return parser
    default = [
        name for name in ("Sparsify", "ReweightedPenalty", "AdaptiveProx", "AdaptiveMask", "MagnitudePruning") if hasattr(callbacks, name)
    ]
    parser.add_argument(
        "--methods",
        nargs="+",
        default=default,
        metavar="METHOD",
        help="class names of callbacks that take target_sparsity, alone or as YAML with arguments: 'AdaptiveProx: {penalty: {class_path: "
        f"MCP, init_args: {{c: 0.2}}}}}}' (default: {' '.join(default)})",
    )
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98], metavar="SHARE", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; 0 leaves it to Ray or Slurm (default: %(default)s)")
    parser.add_argument("--no_dense", action="store_true", help="leave out the runs without sparsity")
    parser.add_argument("--test", action="store_true", help="also measure each final checkpoint on the test split (into runs.csv)")
    parser.add_argument("--engine", choices=engines.ENGINES, default="local", help="where the runs are executed (default: %(default)s)")
    parser.add_argument(
        "--engine_options",
        type=_mapping,
        default={},
        metavar="YAML",
        help="of Ray's init, or Slurm's: '{slurm_partition: gpu, timeout_min: 60}'",
    )
    return parser


def _mapping(word: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(word)
    except yaml.YAMLError:
        tree = None
    if not isinstance(tree, dict):
        raise argparse.ArgumentTypeError(f"must be a YAML mapping such as '{{timeout_min: 60}}', got {word!r}")
    return tree


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for numbers out of range."""
    for target in getattr(args, "targets", ()):
        try:
            _checks.share("--targets", target)
        except ValueError as error:
            raise UsageError(str(error)) from error
    for lam in getattr(args, "lams", ()):
        if not lam > 0:
            raise UsageError(f"--lams must be > 0, got {lam:g}")
    if min([*getattr(args, "seeds", ()), getattr(args, "seed", 0)]) < 0:
        raise UsageError("seeds must be whole numbers >= 0")
    if getattr(args, "jobs", 1) < (0 if getattr(args, "engine", "") in ("ray", "slurm") else 1):
        raise UsageError(f"--jobs must be at least 1, got {args.jobs}")
    if args.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {args.threads}")


_OTHERS = {"config": "another configuration", "script": "another --script", "overrides": "other overrides", "threads": "other --threads"}


class _Settings:
    """The runs that a command asks for, and the folder that keeps their records."""

    def __init__(self, args: argparse.Namespace, verb: str, overrides: tuple[str, ...]) -> None:
        self.args, self.verb, self.overrides = args, verb, overrides
        self.script = check_script(args.script)
        self.config = recipes.find(args.config).resolve()
        self.tree = recipes.content(self.config)
        self.out = (args.out or Path("runs", verb, re.sub(r"[^\w.-]+", "_", args.config.removesuffix(".yaml")).lstrip("._"))).resolve()

    def keep(self, runs: Iterable[Run] = ()) -> None:
        """Write what all runs of the folder share. Raises UsageError if the folder holds runs of other settings."""
        shared = {"config": self.tree, "script": self.script, "overrides": list(self.overrides), "threads": self.args.threads}
        file = self.out / "settings.json"
        if (
            self._has_runs()
            and file.is_file()
            and (known := json.loads(file.read_text(encoding="utf-8"))) != json.loads(json.dumps(shared, default=str))
        ):
            changed = [other for name, other in _OTHERS.items() if known.get(name) != json.loads(json.dumps(shared[name], default=str))]
            raise UsageError(f"{self.out} holds runs with {' and '.join(changed)}; choose another folder with --out, or delete it")
        for run in runs:
            if run.is_of_other_arguments():
                raise UsageError(
                    f"{run.path} holds a finished run of {run.method} with other arguments; choose another folder with --out, or delete it"
                )
        self.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(shared, indent=1, default=str), encoding="utf-8")

    def _has_runs(self) -> bool:
        """Return True if a run of the folder is finished, or was interrupted, or is trained by another process now."""
        begun = (file.parent for file in self.out.glob("*/overlay.yaml"))
        return any(not (folder / "failed.txt").is_file() for folder in begun)

    def check_classes(self) -> None:
        """Raise UsageError if no run can be built, because neither the configuration nor a script names the model's class."""
        if self.script is None:
            recipes.check_classes(self.config, self.overrides, "that script, --script SCRIPT")

    def check_callbacks(self) -> None:
        """Raise UsageError for a sparsity callback in trainer.callbacks, which every run would have beside its own, the dense one too."""
        for word in self.overrides if self.script is None else ():
            option = word.partition("=")[0]
            if option == "--sparsify" or option.startswith("--sparsify."):
                example = f"{{{option.removeprefix('--sparsify.').split('.')[0]}: ...}}" if "." in option else "{...}"
                raise UsageError(
                    f"{option} would set the callback that {self.verb} replaces: give it as {self._flag} 'Name: {example}', or in the "
                    "configuration"
                )
        files = [self.config, *map(Path, recipes.files_of(self.overrides))]
        for file, name in recipes.listed_callbacks(files):
            form = methods.class_of(name)
            if inspect.isclass(form) and issubclass(form, Sparsifier):
                moved = "" if self.script else f", or move it to the key sparsify, which {self.verb} replaces"
                raise UsageError(
                    f"trainer.callbacks of {file} has {name}, which every run of {self.verb} would have beside its own callback, the dense "
                    f"run too: take it out{moved}"
                )

    def check_runs(self, runs: Iterable[Run], parser: argparse.ArgumentParser) -> None:
        """Raise UsageError for a callback that cannot be built, and for overrides that ``fit`` does not know; a script's are its own."""
        for label, text in dict.fromkeys((run.method, json.dumps(run.callback, default=str)) for run in runs if run.callback is not None):
            before.check_method(label, json.loads(text))
        if self.script is None:
            with before.naming_flags(parser):
                before.check_words(["--config", str(self.config), *self.overrides, "--sparsify", "null"])

    def check_metric(self, run: Run) -> None:
        """Raise UsageError, naming what is logged, if a trial of two batches logs no such metric. A trial that fails tells nothing."""
        trial = dataclasses.replace(
            run, folder=str(self.out / "trial"), overrides=(*self.overrides, "--trainer.fast_dev_run", "2"), test=False, group=""
        )
        try:
            found = execute(trial).get("metrics", {})
        finally:
            shutil.rmtree(trial.path, ignore_errors=True)
        if found and self.args.metric not in found:
            close = _checks.closest(self.args.metric, found)
            raise UsageError(f"--metric {self.args.metric} is not logged; a trial of two batches logged {', '.join(found)}{close}")

    def comparison(self) -> list[Run]:
        """Return the dense runs, then those of every method, target and seed."""
        args = self.args
        dense = [] if args.no_dense else [self._run("dense", None, seed, None) for seed in dict.fromkeys(args.seeds)]
        sparse = [
            self._run(label, target, seed, methods.described(method, self._penalty(), {"target_sparsity": target}, self._configured()))
            for (label, method), target, seed in itertools.product(
                _labelled(args.methods), dict.fromkeys(args.targets), dict.fromkeys(args.seeds)
            )
        ]
        return [*dense, *sparse]

    def path(self) -> list[Run]:
        """Return the runs of rising lam; each starts from the last one's weights."""
        args, found = self.args, list[Run]()
        own = self._own_with_lam() if args.method is None else None
        method = args.method or (own["class_path"] if own else _FORM)
        label = next(iter(_labelled([method if args.method else method.rpartition(".")[2]])))[0]
        if args.method is None:
            reason = "the callback of the configuration" if own else "because the configuration has no callback that takes lam"
            print(f"path of {label}, {reason}; --method chooses another")
        for lam in sorted(set(args.lams)):
            start = f"{found[-1].folder}/final.ckpt" if found else None
            callback = methods.described(method, self._penalty(), {"lam": lam}, self._configured())
            found.append(self._run(label, lam, args.seed, callback, start))
        return found

    def _configured(self) -> dict[str, Any]:
        """Return class_path and init_args of the configuration's own callback."""
        own = self.tree.get("sparsify")
        return {"class_path": own} if isinstance(own, str) else dict(own or {})

    @property
    def _removes(self) -> bool:
        """Return True if the runs have an option ``sparsify``: those of this command, and of a script whose configuration sets it."""
        files = [self.config, *map(Path, recipes.files_of(self.overrides))]
        return self.script is None or any(key.split(".")[0] == "sparsify" for file in files for key in recipes.content(file))

    def _own_with_lam(self) -> dict[str, Any] | None:
        """Return class_path and init_args of the configuration's own callback; None without one, and if it takes no lam."""
        tree = self._configured()
        form = methods.class_of(tree.get("class_path"))
        return tree if inspect.isclass(form) and issubclass(form, Sparsifier) and "lam" in methods.arguments_of(form) else None

    def _penalty(self) -> Any:
        """Return the penalty of the configuration's own callback, else LogSum(2)."""
        return (self._configured().get("init_args") or {}).get("penalty") or _LOG_SUM

    def told(self, runs: Iterable[Run]) -> str:
        """Say which arguments of the configuration's callback the methods take over, and which they do not."""
        return methods.told(
            self._configured(), {run.method: run.callback["init_args"] for run in runs if run.callback is not None}, self._flag
        )

    @property
    def _flag(self) -> str:
        return "--method" if self.verb == "path" else "--methods"

    def _run(self, method: str, setting: float | None, seed: int, callback: Any, start_from: str | None = None) -> Run:
        name = "-".join(re.sub(r"[^\w.=]+", "_", str(part)) for part in (method, setting, f"seed{seed}") if part is not None)
        return Run(
            str(self.out / name),
            str(self.config),
            method,
            setting,
            seed,
            callback,
            self.script,
            self.overrides,
            removes=self._removes,
            start_from=start_from,
            test=getattr(self.args, "test", False),
            group=f"{self.verb}-{self.out.name}",
            threads=self.args.threads,
        )


def _labelled(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Return each method with its label, without repetitions."""
    return [(" ".join(method.split()), method) for method in dict.fromkeys(methods)]
