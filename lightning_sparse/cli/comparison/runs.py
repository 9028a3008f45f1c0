"""One run of a comparison: its command line and files, and how it is executed in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_sparse import _checks
from lightning_sparse.cli import recipes
from lightning_sparse.cli.comparison import recorder, resuming
from lightning_sparse.cli.errors import UsageError, explain

OVERLAY, LOG = "overlay.yaml", "log.txt"
KILLED = "killed by"
_QUIET = ("--report.table", "false", "--report.pictures", "false", "--report.dense_twin", "false")


@dataclass(frozen=True)
class Run:
    """Describes one run. ``folder`` is absolute, because an engine may execute the run elsewhere on the same file system.

    Args:
        folder: its files.
        config: the user's configuration file.
        method: the callback as it is shown in the table; "dense" without one.
        setting: the target share of zeros, or lam in a path; None for a dense run.
        seed: the run's seed.
        callback: class_path and init_args of the sparsity callback; None for a dense run.
        script: the user's LightningCLI script; None for ``lightning-sparse fit``.
        overrides: further words of the command line.
        removes: the configuration has a ``sparsify`` key that this run replaces.
        start_from: a checkpoint whose weights it starts from.
        test: also measure the final checkpoint on the test split.
        group: the W&B group.
        threads: CPU threads of each process.
    """

    folder: str
    config: str
    method: str
    setting: float | None
    seed: int
    callback: Mapping[str, Any] | None = None
    script: str | None = None
    overrides: tuple[str, ...] = ()
    removes: bool = False
    start_from: str | None = None
    test: bool = False
    group: str = ""
    threads: int = 1

    @property
    def path(self) -> Path:
        """The folder as a path."""
        return Path(self.folder)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def result(self) -> dict[str, Any] | None:
        """Return the run's record; None if it is not finished."""
        file = self.path / recorder.METRICS
        if not file.is_file():
            return None
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record if "test" in record or not self.test else None

    def is_of_other_arguments(self) -> bool:
        """Return True if the folder holds a finished run whose callback had other arguments."""
        file = self.path / OVERLAY
        if self.result() is None or not file.is_file():
            return False
        known = yaml.safe_load(file.read_text(encoding="utf-8"))["trainer"]["callbacks+"][:-1]  # the last is the recorder
        return bool(known != json.loads(json.dumps(self.overlay()["trainer"]["callbacks+"][:-1])))

    def done(self) -> float:
        """Return the share of the epochs that have been trained, in [0, 1]."""
        if (self.path / recorder.METRICS).is_file():
            return 1.0
        try:
            progress = json.loads((self.path / recorder.PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0.0
        return progress["epoch"] / progress["epochs"] if progress["epochs"] and progress["epochs"] > 0 else 0.0

    def words(self, verb: str = "fit", resumed: Path | None = None) -> list[str]:
        """Return the command line of a verb, after the program's name; ``resumed`` is the checkpoint that fit continues from."""
        words = [verb, "--config", self.config, "--config", str(self.path / OVERLAY), *self.overrides]
        words += [
            "--trainer.default_root_dir",
            str(self.path / "test" if verb == "test" else self.path),
            "--seed_everything",
            str(self.seed),
        ]
        words += [*_QUIET, "--threads", str(self.threads)] if self.script is None and verb == "fit" else []
        words += ["--sparsify", "null"] if self.removes else []
        if verb == "test":
            words += ["--ckpt_path", str(self.path / recorder.FINAL)]
        elif resumed is not None:
            words += ["--ckpt_path", str(resumed)]
        return words

    def overlay(self) -> dict[str, Any]:
        """Return the configuration that adds the callbacks."""
        added = [] if self.callback is None else [dict(self.callback)]
        start = {} if self.start_from is None else {"start_from": self.start_from}
        added.append({"class_path": f"{recorder.Recorder.__module__}.Recorder", "init_args": {"folder": self.folder} | start})
        return {"trainer": {"callbacks+": added}}

    def begin(self) -> Path | None:
        """Write the overlay and return the checkpoint that the run continues from; None if it starts from the beginning."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / OVERLAY).write_text(yaml.safe_dump(self.overlay(), allow_unicode=True), encoding="utf-8")
        if (self.path / recorder.METRICS).is_file():
            return None
        return resuming.start(self.path, [recipes.content(Path(self.config)), self.overlay(), self.script, self.words()])


def execute(run: Run, started: Callable[[Any], None] = lambda process: None) -> dict[str, Any]:
    """Execute a run in a process of its own and return its record, or ``{"failed": reason}``. A finished run is only read.

    An interrupted run continues from its newest checkpoint. ``started`` gets the process, which ends when this one does.
    """
    if (known := run.result()) is not None:
        return known
    resumed = run.begin()
    if not (run.path / recorder.METRICS).is_file() and (reason := _call(run, "fit", started, resumed)):
        return {"failed": reason}
    if run.test and (reason := _call(run, "test", started)):
        return {"failed": f"test: {reason}"}
    return run.result() or {"failed": f"the run ended before training did, without a record; its output is in {run.path / LOG}"}


def _call(run: Run, verb: str, started: Callable[[Any], None], resumed: Path | None = None) -> str:
    """Run a verb in another process, with its output in LOG; return the reason if it fails, else an empty string."""
    program = [sys.executable, "-m", "lightning_sparse.cli.comparison.worker", run.script or "-", *run.words(verb, resumed)]
    threads = {name: str(run.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    group = {"WANDB_RUN_GROUP": run.group, "WANDB_NAME": run.name} if run.group else {}
    for saved in run.path.rglob("config.yaml"):  # because LightningCLI refuses to write it again
        if verb == "fit" or saved.parent != run.path:
            saved.unlink()
    with (run.path / LOG).open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **threads, **group})
        started(process)
        try:
            code = process.wait()
        finally:
            process.kill()  # if this thread was interrupted
            if process.stdin is not None:
                process.stdin.close()  # the worker's sign to end
    if code == 0:
        return ""
    with (run.path / LOG).open("rb") as log:
        log.seek(start)
        return reason_in(log.read().decode("utf-8", "replace"), code)


def reason_in(log: str, code: int) -> str:
    """Return why a run failed, in one line, from what it printed: its ``error:`` line, else the last line of a traceback."""
    lines = [line for line in log.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if starts:
        text = "\n".join([lines[starts[-1]].removeprefix("error: "), *lines[starts[-1] + 1 :]])
        return " ".join(explain(text).split())
    ended = f"{KILLED} {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raised = [line.strip() for line in lines if _is_exception(line)]
    return f"{raised[-1]} ({ended})" if raised else ended


def _is_exception(line: str) -> bool:
    name, colon, _ = line.partition(":")
    return bool(colon) and name.replace(".", "").isidentifier() and name.endswith(("Error", "Exception", "Interrupt"))


def check_script(script: str | None, kind: str = "the Python file of your LightningCLI") -> str | None:
    """Return the absolute path of a user's script. Raises UsageError, with the closest names beside it, for a missing file."""
    if script is None:
        return None
    if not Path(script).is_file():
        beside = (str(file) for file in sorted(Path(script).parent.glob("*.py")))
        raise UsageError(f"--script must be {kind}, no file {script!r}{_checks.closest(script, beside)}")
    return str(Path(script).resolve())
