"""``lightning-sparse shrink --config X --max_drop 0.5``: cut groups and fine-tune in stages while the validation metric stays in budget."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelSummary, ProgressBar
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_sparse import _checks, coupling
from lightning_sparse.callbacks import Sparsifier, Sparsify
from lightning_sparse.cli import checkpoints, recipes, shrunk_table
from lightning_sparse.cli.comparison.before import naming_flags
from lightning_sparse.cli.comparison.results import rises
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.opened import Opened
from lightning_sparse.cli.saved import Saved, silence_device_messages
from lightning_sparse.cli.text import as_flags
from lightning_sparse.cli.training import launch
from lightning_sparse.export import latency, program
from lightning_sparse.shrinking import Budget, GroupScores, Shrunk, Stages, choose, remove, rounding, save_shrunk, share_of
from lightning_sparse.shrinking.report import Report, changed_widths
from lightning_sparse.shrinking.stages import DEVICES, OtherSettings
from lightning_sparse.structure import Channels, Heads

_ABOUT = (
    "Shrink a recipe's network in stages: score its channels, neurons and heads by their gradients (Taylor importance), remove the lowest "
    "per multiply-add, fine-tune, and validate. A stage counts if the metric is at most --max_drop worse than the dense network's; a "
    "stage that drops more is tried again with half of the cut, then the run ends. It ends earlier once all of the given goals are "
    "reached: --max_params, --max_multiply_adds, --max_latency, --speed_up. The folder keeps every stage: the same command "
    "goes on where it stopped. Further arguments override the recipe as in fit."
)
_QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
_DROP = (
    "how much worse the metric may be. Larger is better and both lie in [0, 1]: in points, 1 is 0.01. Otherwise, also for a loss: in the "
    "metric's own unit (default: any)"
)
_BATCHES = 50  # that the scores are computed on
GIVEN = ("--max_drop", "--max_params", "--max_multiply_adds", "--max_latency", "--speed_up")  # one of them makes it this verb
ROUND_TO = "keep multiples of this many channels, or fastest: of 1, 4, 8, 16 and 32 the multiple that is measured to be fastest"
_GOALS = [flag.removeprefix("--") for flag in GIVEN]


class _Scoring(Callback):
    """Score groups on the training batches, and leave the weights as they are."""

    def __init__(self, scores: GroupScores) -> None:
        self.scores = scores

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.scores.update(pl_module)
        for parameter in pl_module.parameters():
            parameter.grad = None  # optimisers pass over such parameters


def _sparsifiers(module: LightningModule, groups: list[coupling.Group], chosen: list[coupling.Group]) -> list[Sparsifier]:
    """Return callbacks that train towards as many zero weights as the ``chosen`` groups hold: of channels and neurons, and of heads."""
    found: list[Sparsifier] = []
    for structure in (Channels(), Heads()):
        members, picked = ([group for group in of if (group.kind == "head") == structure.heads] for of in (groups, chosen))
        if picked:
            names = {entry.name for group in members if group.exact for entry in group.entries}
            select = [name for name, _ in module.named_parameters() if name in names]
            found.append(Sparsify(share_of(module, members, picked), structure=structure, select=select))
    return found


def run(words: Sequence[str]) -> int:
    """Shrink in stages, write the smallest network that counts, and print the table."""
    args, overrides = parser().parse_known_args(words)
    _check_no_checkpoint(overrides)
    if args.device not in DEVICES:
        raise UsageError(f"--for must be {' or '.join(DEVICES)}, got {args.device!r}")
    if args.batch is not None and args.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {args.batch}")
    try:
        budget = Budget(**{name: getattr(args, name) for name in _GOALS}, device=args.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        args.round_to = (rounding.FASTEST if budget.is_timed else 8) if args.round_to is None else args.round_to
        rounding.check(args.round_to)
        _checks.share("--step", args.step)
    except ValueError as error:
        raise UsageError(str(error)) from error
    guessed, args.mode = args.mode is None, "max" if rises(args.monitor, args.mode) else "min"
    with naming_flags(parser()):
        cli = launch(Opened, ["fit", *recipes.with_paths(["--config", args.config]), *overrides])
    print(_direction(args, guessed), flush=True)
    with silence_device_messages():
        _Run(args, budget, words, overrides, cli).run()
    return 0


def _check_no_checkpoint(overrides: Sequence[str]) -> None:
    """Raise UsageError for a checkpoint that is given by its place, as without a goal."""
    for before, word in zip(["", *overrides], overrides, strict=False):
        if word.endswith(".ckpt") and not word.startswith("-") and not before.startswith("--"):
            raise UsageError(f"with a goal ({', '.join(GIVEN)}) the dense network's checkpoint is given as --ckpt_path {word}")


def _direction(args: argparse.Namespace, guessed: bool) -> str:
    """Return the line that says which direction of the metric is better, and what --max_drop means if that is the smaller one."""
    word, other = ("larger", "min") if args.mode == "max" else ("smaller", "max")
    line = f"{args.monitor}: {word} is better" + (f", guessed from its name (else give --mode {other})" if guessed else "")
    rise = args.mode == "min" and args.max_drop is not None
    return line + (f"; --max_drop {args.max_drop:g} allows a rise of {args.max_drop:g}" if rise else "")


def unit(text: str) -> int | str:
    """Read --round_to: a whole number, or a word that is checked later."""
    return int(text) if text.lstrip("-").isdigit() else text


def _points(text: str) -> float:
    """Read --max_drop."""
    try:
        return float(text)
    except ValueError:
        cure = ": give the points without %, 1 for 0.01 of an accuracy" if text.endswith("%") else ""
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}{cure}") from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``shrink`` with a goal."""
    parser = argparse.ArgumentParser(prog="lightning-sparse shrink", description=_ABOUT)
    parser.add_argument("--config", required=True, help="recipe or YAML of the model, data and trainer; its sparsify key is not used")
    parser.add_argument("--max_drop", type=_points, metavar="POINTS", help=_DROP)
    parser.add_argument("--allow_branches", action="store_true", help="accept a forward that branches on values of tensors")
    parser.add_argument("--max_params", type=int, metavar="N", help="goal: at most so many parameters")
    parser.add_argument("--max_multiply_adds", type=float, metavar="SHARE", help="goal: this share of the dense network's multiply-adds")
    parser.add_argument("--max_latency", type=float, metavar="MS", help="goal: milliseconds of a call at --batch, measured")
    parser.add_argument("--speed_up", type=float, metavar="RATIO", help="goal: times faster than dense at --batch, measured in one run")
    parser.add_argument("--for", dest="device", default="cpu", metavar="DEVICE", help="cpu or cuda: measure there (default: %(default)s)")
    parser.add_argument("--batch", type=int, metavar="N", help="batch size of --max_latency and --speed_up (default: the recipe's)")
    parser.add_argument("--ckpt_path", type=Path, help="the dense network's checkpoint (default: train it first, as the recipe says)")
    parser.add_argument("--monitor", default="val/accuracy", help="metric of validation (default: %(default)s)")
    parser.add_argument("--mode", choices=("max", "min"), help="whether larger or smaller is better (default: guessed from its name)")
    parser.add_argument("--out", type=Path, default=Path("small"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--search",
        choices=("scores", "groups"),
        default="scores",
        help="remove the groups of the lowest scores, or first train each stage towards as many zero groups (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning in each stage, and of groups (default: %(default)s)")
    parser.add_argument("--step", type=float, default=0.25, help="share of the multiply-adds that a stage cuts (default: %(default)s)")
    parser.add_argument("--stages", type=int, default=12, help="at most (default: %(default)s)")
    parser.add_argument("--round_to", type=unit, metavar="N", help=f"{ROUND_TO} (default: fastest with a goal of latency, else 8)")
    return parser


class _Run:
    """The recipe's Trainer, model and data as the functions that ``Stages`` calls, and the files at the end."""

    def __init__(self, args: argparse.Namespace, budget: Budget, words: Sequence[str], overrides: Sequence[str], cli: Any) -> None:
        self.args, self.words, self.cli, self.folder = args, words, cli, args.out
        self.saved = Saved(args.ckpt_path or self.folder / "dense.ckpt", cli.model, cli.datamodule)
        given = self.saved.inputs()
        self.inputs, self.one = program.sized(given, 64), program.sized(given, 1)
        self.batch = args.batch or next(len(x) for x in pytree.tree_leaves(given) if isinstance(x, Tensor) and x.dim())
        settings = {name: getattr(args, name) for name in ("config", "monitor", "search", "epochs", "round_to")}
        settings |= {"ckpt_path": str(args.ckpt_path) if args.ckpt_path else None, "overrides": list(overrides)}
        settings |= {"batch": self.batch} if budget.is_timed else {}
        try:
            self.stages = Stages(
                self.folder,
                cli.model,
                self.one,
                budget,
                cut=self._cut,
                tune=self._tune,
                validate=self._validate,
                mode=args.mode,
                step=args.step,
                most=args.stages,
                timed_inputs=program.sized(given, self.batch),
                settings=settings,
            )
        except OtherSettings as error:
            dense = f"; {self._again()} keeps its dense network" if self.saved.file.is_file() else ""
            raise UsageError(f"{error}{dense}") from error
        except ValueError as error:
            raise UsageError(str(error)) from error

    def run(self) -> None:
        """Go through the stages that are missing, from where the folder stands, and write the files."""
        self._dense()
        state = self.stages.state
        for stage in self.stages:
            if stage.get("smallest"):
                continue
            timing = f"{stage['milliseconds']:.3f} ms, {stage['times_faster']:.2f}x, " if "milliseconds" in stage else ""
            print(
                f"stage {stage['number']}: {stage['multiply_adds'] / state.dense['multiply_adds']:.3f} of the multiply-adds, "
                f"{stage['parameters']:,} parameters, {timing}{self.args.monitor} {stage['metric']:.4f}, {self._worse(stage)}: "
                + ("counts" if stage["counts"] else "too much"),
                flush=True,
            )
        self._finish(self.stages.network())

    def _worse(self, stage: Mapping[str, Any]) -> str:
        """Return how much worse a stage's metric is than the dense network's, with its unit."""
        word, drop = "drop" if self.args.mode == "max" else "rise", stage.get("drop", 0.0)
        return f"{word} {drop:.2f} points" if self.stages.is_in_points(stage["metric"]) else f"{word} {drop:.4f}"

    def _dense(self) -> None:
        """Load the dense network, or train it if the folder has none."""
        file = self.saved.file
        if self.args.ckpt_path or file.is_file():
            content = checkpoints.read(file, objects=True)  # of which the weights are used
            if content is None:
                raise UsageError(f"give the path of a checkpoint file, got {file}")
            checkpoints.check(file, content, self.cli.model)
            self.cli.model.load_state_dict(content["state_dict"])
            return
        self._check_monitor()
        self.stages.write()  # first, because another command must not take this run's network for its own
        print("training the dense network ...", flush=True)
        self._trainer(None).fit(self.cli.model, datamodule=self.cli.datamodule)
        trainer = self._trainer(1)
        trainer.strategy.connect(self.cli.model)
        beside = file.with_name(f"{file.name}.part")
        trainer.save_checkpoint(beside, weights_only=True)
        beside.replace(file)

    def _trainer(self, epochs: int | None, *callbacks: Callback, **options: Any) -> Trainer:
        """Build the recipe's Trainer without its loggers, checkpoints and sparsifier, for so many epochs (None: the recipe's)."""
        _, _, settings = self.cli.rebuild()
        passed = (ProgressBar, ModelSummary, Checkpoint, EarlyStopping, Sparsifier)
        own = [callback for callback in settings["callbacks"] or [] if not isinstance(callback, passed)]
        length = {} if epochs is None else {"max_epochs": epochs, "max_steps": -1}
        return Trainer(**{**settings, **_QUIET, **length, "callbacks": [*own, *callbacks], **options})

    def _cut(self, module: LightningModule, target: int) -> LightningModule | None:
        """Remove the groups of the lowest scores until one sample takes ``target`` multiply-adds; None if none can go."""
        groups = self._groups(module)
        if not self.stages.state.stages:
            for axis, count, why in coupling.left_out(groups):
                print(f"left out: {count} group{'s'[: count != 1]} of {axis}: {why}")
        scores, size = self._scores(module, groups), self.args.round_to
        given = 8 if isinstance(size, str) else size
        chosen = choose(module, self.one, groups, scores, target, given)
        if chosen and self.args.search == "groups":
            self._trainer(self.args.epochs, *_sparsifiers(module, groups, chosen)).fit(module, datamodule=self.cli.datamodule)
            scores = self._scores(module, groups)  # 0 for groups that are zero by now

        def removed(unit: int) -> LightningModule | None:
            chosen = choose(module, self.one, groups, scores, target, unit)
            return remove(module, self.inputs, groups, chosen, unit) if chosen else None

        if not isinstance(size, str):
            return removed(size)
        found = rounding.fastest(removed, self.stages.timed_inputs, self.stages.budget.device)
        if found is not None:
            print(found)
        return None if found is None else found.module

    def _again(self) -> str:
        """Return the flags of a run with other settings that starts from the dense network of this one."""
        return f"--out FOLDER --ckpt_path {shlex.quote(str(self.saved.file))}"

    def _groups(self, module: LightningModule) -> list[coupling.Group]:
        try:
            return coupling.groups(module, self.inputs, allow_branches=self.args.allow_branches)
        except coupling.ForwardBranches as error:
            raise UsageError(as_flags(str(error))) from error

    def _scores(self, module: LightningModule, groups: list[coupling.Group]) -> dict[str, float]:
        scores = GroupScores(groups)
        self._trainer(1, _Scoring(scores), limit_train_batches=_BATCHES, limit_val_batches=0).fit(module, datamodule=self.cli.datamodule)
        return scores.values()

    def _tune(self, module: LightningModule) -> None:
        self._trainer(self.args.epochs).fit(module, datamodule=self.cli.datamodule)

    def _validate(self, module: LightningModule) -> float:
        return self._metric(self._trainer(1).validate(module, datamodule=self.cli.datamodule, verbose=False))

    def _check_monitor(self) -> None:
        """Validate a new network on two batches, to refuse a metric that validation does not log before anything is trained."""
        module, data, _ = self.cli.rebuild()
        try:
            found = self._trainer(1, limit_val_batches=2).validate(module, datamodule=data, verbose=False)
        except Exception:  # a metric may need more than two batches: the dense network's validation tells
            return
        self._metric(found)

    def _metric(self, found: Sequence[Mapping[str, float]]) -> float:
        """Return the monitored one of the figures that validation logged. Raises UsageError, with their names, if it is not there."""
        metrics = {name: float(value) for one in found for name, value in one.items()}
        if self.args.monitor not in metrics:
            close = _checks.closest(self.args.monitor, metrics)
            raise UsageError(f"--monitor {self.args.monitor} is not among the validation metrics {sorted(metrics)}{close}")
        return metrics[self.args.monitor]

    def _finish(self, module: LightningModule) -> None:
        """Save the last network that counts, and print the table against the dense one."""
        state, budget = self.stages.state, self.stages.budget
        last, dense = state.last(), state.dense
        if not last["number"] and not state.stages:
            raise UsageError(f"the dense network reaches every goal already: {self._goals(list(budget.goals()))}")
        if not last["number"]:
            best = min((stage for stage in state.stages if "drop" in stage), key=lambda stage: stage["drop"], default=None)
            closest = f" (best: {self._worse(best)})" if best else ""
            raise UsageError(
                f"no stage stayed within --max_drop {self.args.max_drop:g}{closest}: fine-tune longer (--epochs), cut less (--step), or "
                f"allow more (--max_drop), in another folder: {self._again()}"
            )
        save_shrunk(module, self.folder)
        widths = changed_widths(*(self._groups(network) for network in (self.cli.model, module)))
        pairs = [(int(dense[name]), int(last[name])) for name in ("parameters", "multiply_adds")]
        report = Report(widths, pairs[0], pairs[1], 0.0, samples=1)
        table = shrunk_table.show(self.saved, Shrunk(module, report), self.folder, tuned=True, device=budget.device)
        missed = budget.missed(last, dense)
        notes = [f"not reached within these stages: {self._goals(missed)}"] if missed else []
        if last.get("milliseconds"):
            took = f"{last['milliseconds']:.3f} ms, {last['times_faster']:.2f} times faster than dense"
            notes.append(f"measured at batch {self.batch} on {budget.device}: {took}")
        self._write_report(table, notes)
        print("\n".join([*notes, f"stages: {shlex.quote(str(self.folder / 'state.json'))}"]))

    def _goals(self, names: Sequence[str]) -> str:
        return ", ".join(f"--{name} {getattr(self.args, name):g}" for name in names)

    def _write_report(self, table: shrunk_table.Shown, notes: Sequence[str]) -> None:
        """Write ``report.md``: the command, the table, the stages, and how to load the files."""
        state, name = self.stages.state, type(self.cli.model).__name__
        lines = [f"# {name}, shrunk", "", f"    lightning-sparse shrink {shlex.join(self.words)}", ""]
        lines += [f"| {' | '.join(table.titles)} |", f"|---|{'--:|' * (len(table.titles) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
        lines += ["", f"{latency.MEANING}."]
        lines += ["", f"| stage | multiply-adds | parameters | {self.args.monitor} | worse by | |", "|--:|--:|--:|--:|--:|---|"]
        for stage in state.stages:
            share = stage["multiply_adds"] / state.dense["multiply_adds"]
            verdict = "counts" if stage["counts"] else "no group left to remove" if stage.get("smallest") else "too much"
            figures = f"{share:.3f} | {stage['parameters']:,} | {stage['metric']:.4f} | {self._worse(stage)}"
            lines.append(f"| {stage['number']} | {figures} | {verdict} |")
        lines += ["", *(f"- {note}" for note in [*notes, *table.notes])]
        if (self.folder / "model.pt2").is_file():
            lines += ["", "Without this package:", "", "    import torch"]
            lines.append(f"    program = torch.export.load({str(self.folder / 'model.pt2')!r}).module()")
        (self.folder / "report.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
