"""Parallel training processes end with the command that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

COMMAND = """
import os, time
from pathlib import Path
from lightning_sparse.reproduction import pool
from lightning_sparse.reproduction.runs import Job

def work(job):
    Path("pid.part").write_text(str(os.getpid()))
    Path("pid.part").rename("pid")
    time.sleep(120)

if __name__ == "__main__":
    pool.run([Job("none", 0, 1, Path("run"))], 1, work)
"""


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait for a condition; return False after the timeout."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not happened():
        time.sleep(0.05)
    return happened()


def is_running(pid: int) -> bool:
    """Return True if a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="asks /proc whether a process runs")
@pytest.mark.parametrize("kill", ["terminate", "kill"])
def test_a_run_ends_with_the_command_that_started_it(kill: str, tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    with subprocess.Popen([sys.executable, "command.py"], cwd=tmp_path, env=os.environ) as command:
        assert wait_for((tmp_path / "pid").is_file)
        worker = int((tmp_path / "pid").read_text())
        assert is_running(worker)
        getattr(command, kill)()
    assert wait_for(lambda: not is_running(worker), 30)
