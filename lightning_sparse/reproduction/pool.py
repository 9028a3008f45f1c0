"""Jobs run in parallel processes, with a progress bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import connection, get_context, parent_process
from threading import Thread
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_sparse.reproduction.runs import Job, train

Running = dict["Future[dict[str, Any]]", Job]


def run(jobs: Sequence[Job], at_once: int, work: Callable[[Any], dict[str, Any]] = train) -> list[dict[str, Any]]:
    """Run ``jobs`` in parallel, at most ``at_once`` at a time, and return the results in order. Finished jobs are not run again.

    ``work`` runs a job or reads its result. It must be a function at module level, because other processes import it.

    If a job fails, the other jobs are stopped and its error is raised. Their records stay, and a second call resumes them.
    """
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn"), initializer=_begin) as pool:
        running = {pool.submit(work, job): job for job in jobs if not job.result.is_file()}
        try:
            _watch(running)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.kill()  # because the Trainer does not stop at once on SIGTERM
            raise
    return [work(job) for job in jobs]  # all jobs are finished: work reads the results


def _begin() -> None:
    """Set up a worker process."""
    torch.set_flush_denormal(True)  # because weights and moments decay to denormals, which slow a CPU down many times
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent ends."""
    # because the workers of a killed command would go on and write to the same files as the next command
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _watch(running: Running) -> None:
    """Wait for all jobs: show a bar over all epochs on a terminal, and print a line for each finished run."""
    pending = set(running)
    with _bar() as bar:
        task = bar.add_task("", total=sum(job.epochs for job in running.values()))
        while pending:
            done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                _print_result(running[future], future.result())
            active = (f"{job.folder.name} {job.epochs_done()}/{job.epochs}" for future, job in running.items() if future.running())
            bar.update(task, completed=sum(job.epochs_done() for job in running.values()), description=", ".join(active))


def _bar() -> Progress:
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} epochs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), disable=not sys.stderr.isatty())


def _print_result(job: Job, result: dict[str, Any]) -> None:
    figures = f"test error {result['test_error']:.2f} %, non-zero {result['nonzero']:.2f} %"
    print(f"{time.strftime('%H:%M')} {job.folder.name}: {figures}, {result['seconds'] / 60:.1f} min", flush=True)


def jobs_left(jobs: Iterable[Job]) -> int:
    """Count the jobs without a result."""
    return sum(not job.result.is_file() for job in jobs)


def epochs_left(jobs: Iterable[Job]) -> int:
    """Count the remaining epochs of the jobs without a result."""
    return sum(max(job.epochs - job.epochs_done(), 0) for job in jobs if not job.result.is_file())
