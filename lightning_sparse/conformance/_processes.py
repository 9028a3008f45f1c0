"""Child processes with one shared import of Lightning: a fork server imports it once and forks every child."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from typing import Any

_TIMEOUT = 300.0  # seconds without an answer after which a child counts as hanging


class Died(Exception):
    """A child ended without an answer. ``code`` is its exit code, negative for a signal."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"a process ended with code {code} and no answer")
        self.code = code


def call(function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """Call ``function(*args)`` for each ``args`` in ``arguments``, in parallel child processes, and return the results.

    Function, arguments and results must be picklable. Raises RuntimeError with the child's traceback if a child raises,
    :class:`Died` if a child is killed, TimeoutError if a child hangs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_sparse.conformance"])
    _start_server()
    pipes = [context.Pipe(duplex=False) for _ in arguments]
    children = [context.Process(target=_run, args=(w, function, args)) for (_, w), args in zip(pipes, arguments, strict=True)]
    for child, (_, writer) in zip(children, pipes, strict=True):
        child.start()
        writer.close()
    try:
        return [_answer(child, reader) for child, (reader, _) in zip(children, pipes, strict=True)]
    finally:
        for child in children:
            child.kill()
            child.join()


def _start_server() -> None:
    """Start the fork server in a folder without packages."""
    # because the server imports from its folder first, and would import a source tree instead of the installed package
    here = os.getcwd()
    os.chdir(sys.prefix)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)


def _run(writer: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    import logging
    import warnings

    import torch

    os.environ.pop("PL_GLOBAL_SEED", None)  # because DDP would replace the seed of each rank by that of a seed_everything() before
    torch.set_num_threads(1)
    logging.getLogger(os.environ.get("LIGHTNING_SPARSE_PACKAGE", "lightning.pytorch")).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        answer = pickle.dumps((True, function(*args)))  # by value, because torch's pipes share memory, which ends with the child
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(answer)


def _answer(child: Any, reader: Any) -> Any:
    if not reader.poll(_TIMEOUT):
        raise TimeoutError(f"a child process gave no answer within {_TIMEOUT:.0f} s")
    try:
        done, value = pickle.loads(reader.recv_bytes())
    except EOFError:
        child.join(10)
        raise Died(child.exitcode) from None
    if not done:
        raise RuntimeError(f"in a child process:\n{value}")
    return value
