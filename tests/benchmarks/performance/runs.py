"""Fits in turn: each arm's fit runs in its own process and trains one epoch per turn.

So an arm has its own memory, allocator and caches, is warm before it counts, and what the machine does meanwhile falls on
neighbours alike: a turn is an epoch of a tenth of a second to a few seconds.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from performance import jobs

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: of all threads together
Find = Callable[[str], jobs.Prepare]  # by an arm's name; a function of a module, since another process calls it


@dataclass(frozen=True)
class Setting:
    """Shared settings of all arms: a key of jobs.JOBS, steps per turn, turns, clock, torch's threads."""

    job: str
    steps: int
    turns: int
    clock: str = "wall"
    threads: int = 2


class Turns(Callback):
    """Report seconds per step of an epoch before the next one begins, and wait for the next turn.

    From the start of the epoch to its last batch's end, hooks of the other callbacks and logging included; what lies between
    that and the next start, once an epoch, is charged in proportion to an epoch of the usual length.
    """

    def __init__(self, setting: Setting, answer: Callable[[float], None]) -> None:
        self.steps, self.usual = setting.steps, jobs.JOBS[setting.job].epoch
        self.read, self.answer = CLOCKS[setting.clock], answer

    def on_train_epoch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.current_epoch:
            self.answer((self.last - self.began) / self.steps + (self.read() - self.last) / self.usual)
        self.began = self.read()

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.is_last_batch:
            self.last = self.read()


def work(setting: Setting, find: Find, arm: str, pipe: Connection) -> None:
    """Run one arm's process: train an epoch per message; answer with seconds per step or an error."""

    def answer(seconds: float) -> None:
        pipe.send(seconds)
        pipe.recv()

    try:
        pipe.recv()
        fit(setting, find(arm), Turns(setting, answer))
    except EOFError:  # nobody asks any more
        return
    except BaseException:
        pipe.send(traceback.format_exc())


def fit(setting: Setting, prepare: jobs.Prepare, turns: Turns) -> None:
    """Fit from a fixed start; the last epoch only begins."""
    jobs.be_quiet(setting.threads)
    job = jobs.JOBS[setting.job]
    batches = job.batches()
    torch.manual_seed(0)
    module = job.build()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(callbacks=[*prepare(module), turns], logger=CSVLogger(folder), max_epochs=setting.turns + 1, **jobs.SETTINGS)
        trainer.fit(module, jobs.Rounds(batches, setting.steps))


@contextmanager
def calls(setting: Setting, find: Find, arms: Mapping[str, str]) -> Iterator[dict[str, Callable[[], float]]]:
    """Return, by name, functions that train one epoch of an arm and return seconds per step. They raise RuntimeError on failure."""
    spawned = multiprocessing.get_context("spawn")
    pipes, started = {}, []
    for name, arm in arms.items():
        pipes[name], theirs = spawned.Pipe()
        started.append(spawned.Process(target=work, args=(setting, find, arm, theirs), daemon=True))
        started[-1].start()
        theirs.close()
    try:
        yield {name: lambda name=name: _turn(name, pipes[name]) for name in arms}  # type: ignore[misc]
    finally:
        for process in started:
            process.kill()
            process.join()


def _turn(name: str, pipe: Connection) -> float:
    try:
        pipe.send(None)
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"the run of {name!r} ended without a result; see the error above, or check the memory") from None
    if isinstance(answer, str):
        raise RuntimeError(f"the run of {name!r} failed:\n{answer}")
    return float(answer)
