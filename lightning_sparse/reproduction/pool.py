"""Jobs side by side in processes of their own, with a display of how far each is."""

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
    """The results of ``jobs`` in their order, ``at_once`` of them running at a time; finished ones are read, not run again.

    ``work`` runs one of them, or reads its result; a function of a module's own, since other processes import it.

    The first job that fails ends the others and its error is raised; what they recorded stays, and a second call goes on.
    """
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn"), initializer=_begin) as pool:
        running = {pool.submit(work, job): job for job in jobs if not job.result.is_file()}
        try:
            _watch(running)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.kill()  # the Trainer would only make a note of a SIGTERM
            raise
    return [work(job) for job in jobs]  # each reads its result


def _begin() -> None:
    """In each of the processes, and in none but them: weights and moments that decay to denormals slow a CPU down many times."""
    torch.set_flush_denormal(True)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A command that is killed ends nothing by itself: its runs would go on, and write beside those of the next command."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _watch(running: Running) -> None:
    """Until all are done: a bar over all epochs on a terminal, a line for each finished run elsewhere."""
    pending = set(running)
    with _bar() as bar:
        task = bar.add_task("", total=sum(job.epochs for job in running.values()))
        while pending:
            done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                _say(running[future], future.result())
            shown = (f"{job.folder.name} {job.epochs_done()}/{job.epochs}" for future, job in running.items() if future.running())
            bar.update(task, completed=sum(job.epochs_done() for job in running.values()), description=", ".join(shown))


def _bar() -> Progress:
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} epochs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), disable=not sys.stderr.isatty())


def _say(job: Job, found: dict[str, Any]) -> None:
    figures = f"test error {found['test_error']:.2f} %, non-zero {found['nonzero']:.2f} %"
    print(f"{time.strftime('%H:%M')} {job.folder.name}: {figures}, {found['seconds'] / 60:.1f} min", flush=True)


def jobs_left(jobs: Iterable[Job]) -> int:
    """How many have no result yet."""
    return sum(not job.result.is_file() for job in jobs)


def epochs_left(jobs: Iterable[Job]) -> int:
    """How many epochs of those are still to go."""
    return sum(max(job.epochs - job.epochs_done(), 0) for job in jobs if not job.result.is_file())
