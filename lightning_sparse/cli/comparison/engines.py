"""Execute runs: in processes side by side on this machine, or by Ray Tune or Slurm, which schedule and collect them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_sparse.cli.comparison.runs import KILLED, LOG, Run, execute
from lightning_sparse.cli.comparison.worker import NEEDED
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.failures import in_words

Record = dict[str, Any]
Tell = Callable[[Run, Record], None]
ENGINES = ("local", "ray", "slurm")
_FAILED = "failed.txt"
_LOOK = 1.0  # seconds between two looks at the progress or at free memory


def run_all(runs: Sequence[Run], engine: str, jobs: int, tell: Tell, options: Mapping[str, Any] | None = None) -> list[Record]:
    """Execute the runs and return their records in order; a run that fails has ``{"failed": reason}``.

    ``jobs`` bounds how many are executed at once (0 leaves that to Ray or Slurm). ``tell`` is called after each. ``options`` go to
    Slurm's ``update_parameters`` or Ray's ``init``. Raises UsageError if the engine's package is not installed.
    """
    missing = [run for run in runs if run.result() is None]
    if missing:
        {"local": _local, "ray": _ray, "slurm": _slurm}[engine](missing, jobs, tell, options or {})
    return [execute(run) if run.result() is not None else _failure(run) for run in runs]


def _failure(run: Run) -> Record:
    file = run.path / _FAILED
    return {"failed": file.read_text(encoding="utf-8") if file.is_file() else "not executed"}


def _settle(run: Run, record: Record, tell: Tell) -> None:
    """Remember a failure beside the run, and report the run."""
    file = run.path / _FAILED
    file.unlink(missing_ok=True)
    if "failed" in record:
        run.path.mkdir(parents=True, exist_ok=True)
        file.write_text(record["failed"], encoding="utf-8")
    tell(run, record)


# -- this machine ----------------------------------------------------------------------------------------------------------


def _local(runs: Sequence[Run], jobs: int, tell: Tell, options: Mapping[str, Any]) -> None:
    if options:
        raise UsageError(f"--engine_options are for ray and slurm, the local engine takes none, got {dict(options)}")
    workers, trained = _Workers(), False
    with ThreadPoolExecutor(max(jobs, 1)) as pool, _progress(runs) as show:
        pending = {pool.submit(workers.execute, run): run for run in runs}
        try:
            while pending:
                for future in wait(pending, timeout=_LOOK, return_when=FIRST_COMPLETED).done:
                    run, record = pending.pop(future), future.result()
                    _settle(run, record, tell)
                    trained = trained or "failed" not in record
                    if not trained:
                        _check_script(record)
                        _check_dense(run, record)
                show()
        except BaseException as error:  # also Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            workers.kill()
            for run in pending.values() if isinstance(error, UsageError) else ():
                _stop(run)
            raise


def _stop(run: Run) -> None:
    """Note that a run was stopped with the first one, unless an epoch of it is trained, so that the folder takes other settings."""
    if run.path.is_dir() and not run.done():
        (run.path / _FAILED).write_text("stopped, because another run failed by itself", encoding="utf-8")


def _check_script(record: Record) -> None:
    """Raise UsageError if the user's script makes no LightningCLI, because no run can be trained with it."""
    if NEEDED in record.get("failed", ""):
        raise UsageError(record["failed"])


def _check_dense(run: Run, record: Record) -> None:
    """Raise UsageError if a run without a sparsity callback has failed by itself, because the configuration fails in the others, too."""
    if run.callback is None and "failed" in record and KILLED not in record["failed"]:
        raise UsageError(
            f"{run.name} has failed, which has no sparsity callback, so the other runs would fail too and were stopped: "
            f"{record['failed']}; its output is in {run.path / LOG}"
        )


class _Workers:
    """Executes runs in threads that wait for a process each; a run waits while less memory is free than the largest one used."""

    def __init__(self) -> None:
        self._running, self._processes, self._lock, self._stopped = 0, set[Any](), Lock(), False

    def execute(self, run: Run) -> Record:
        """Execute a run when memory allows."""
        while not self._may_start():
            time.sleep(_LOOK)
        try:
            return {"failed": "stopped"} if self._stopped else execute(run, self._add)
        finally:
            with self._lock:
                self._running -= 1

    def _may_start(self) -> bool:
        with self._lock:
            free = _free_memory()
            allowed = self._running == 0 or free is None or free > _largest_run()
            self._running += allowed
            return allowed

    def _add(self, process: Any) -> None:
        self._processes.add(process)
        if self._stopped:  # while it was started
            process.kill()

    def kill(self) -> None:
        """Kill the processes of all runs, and start no more."""
        self._stopped = True
        for process in list(self._processes):
            process.kill()


def _largest_run() -> float:
    """Return the peak memory in bytes of the largest process that has ended."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return float(peak) if sys.platform == "darwin" else 1024.0 * peak


def _free_memory() -> float | None:
    """Return the available memory in bytes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024.0 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


@contextmanager
def _progress(runs: Sequence[Run]) -> Iterator[Callable[[], None]]:
    """Show a bar over all runs on a terminal."""
    columns = (BarColumn(), TextColumn("{task.completed:.1f}/{task.total} runs"), TimeElapsedColumn(), TextColumn("left"))
    more = (TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, *more, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(runs))

        def show() -> None:
            shares = {run.name: run.done() for run in runs}
            active = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if 0 < share < 1)
            bar.update(task, completed=sum(shares.values()), description=active)

        yield show


# -- clusters --------------------------------------------------------------------------------------------------------------


def _ray(runs: Sequence[Run], jobs: int, tell: Tell, options: Mapping[str, Any]) -> None:
    """Hand the runs to Ray Tune, one trial each, on the cluster of RAY_ADDRESS, or a local one."""
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise UsageError("--engine ray needs Ray Tune: pip install 'lightning-sparse[ray]'") from error
    if not ray.is_initialized():
        ray.init(**{"log_to_driver": False, **options})
    folder = runs[0].path.parent.resolve()

    def trial(config: dict[str, Any]) -> Record:
        return execute(config["run"])

    threads = max(run.threads for run in runs)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": threads}),
        param_space={"run": tune.grid_search(list(runs))},
        tune_config=tune.TuneConfig(max_concurrent_trials=jobs or None),
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), failure_config=tune.FailureConfig(max_failures=1), verbose=0),
    )
    grid = tuner.fit()
    for result in (grid[number] for number in range(len(grid))):
        run: Run = (result.config or {})["run"]
        failed = run.result() is None
        reason = f"{result.error}" if result.error else (result.metrics or {}).get("failed", "")
        _settle(run, {"failed": reason or "no record"} if failed else execute(run), tell)


def _slurm(runs: Sequence[Run], jobs: int, tell: Tell, options: Mapping[str, Any]) -> None:
    """Submit the runs as an array of Slurm jobs; ``cluster: local`` in the options runs them as local processes."""
    try:
        import submitit
    except ImportError as error:
        raise UsageError("--engine slurm needs submitit: pip install 'lightning-sparse[slurm]'") from error
    chosen = dict(options)
    executor = submitit.AutoExecutor(folder=runs[0].path.parent / "slurm", cluster=chosen.pop("cluster", None))
    at_once = {"slurm_array_parallelism": jobs} if jobs else {}
    executor.update_parameters(**{"cpus_per_task": max(run.threads for run in runs), **at_once, **chosen})
    submitted = executor.map_array(execute, list(runs))
    for run, job in zip(runs, submitted, strict=True):
        try:
            record = job.result()
        except Exception as error:  # a job that was killed or could not be submitted is a row of the table
            record = {"failed": in_words(error)}
        _settle(run, record, tell)
