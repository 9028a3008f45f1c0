"""Run one command line in this process: ``python -m lightning_sparse.cli.comparison.worker SCRIPT|- WORD ...``.

The process ends when its standard input is closed, so that no run goes on after its comparison was killed.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from threading import Thread


def end_with_input() -> None:
    """End this process at once when its standard input ends."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def main(words: list[str]) -> int:
    """Run the user's script, or the command of this package for "-", with the other words as its arguments."""
    script, *arguments = words
    Thread(target=end_with_input, daemon=True).start()
    if script == "-":
        from lightning_sparse.cli import main as command

        return command(arguments)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
