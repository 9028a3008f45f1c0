"""Run one command line in this process: ``python -m lightning_sparse.cli.comparison.worker SCRIPT|- WORD ...``.

The process ends when its standard input is closed, so that no run goes on after its comparison was killed.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from threading import Thread
from typing import Any

NEEDED = (
    "this command needs one, which takes the callbacks of each run from --config: write LightningCLI(MyModel, MyData) in the place of "
    "Trainer(...).fit(...), and the settings of the Trainer in CONFIG under trainer"
)


class _Refused(SystemExit):
    """The script has called ``Trainer.fit`` without a LightningCLI."""


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
    name = Path(script).name
    made = _watch(name)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if not (made or isinstance(error, _Refused)) and error.code not in (None, 0):
            print(f"error: {name} ended with exit code {error.code} before it made a LightningCLI; {NEEDED}", file=sys.stderr)
        raise
    return 0 if made else _refuse(name)


def _watch(script: str) -> list[bool]:
    """Refuse ``Trainer.fit`` until a LightningCLI is made; return a list that holds True from then on."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningCLI

    made: list[bool] = []
    cli: Any = LightningCLI
    trainer: Any = Trainer
    own = cli.__init__, trainer.fit

    def init(self: Any, *args: Any, **options: Any) -> None:
        made.append(True)
        cli.__init__, trainer.fit = own  # because LightningCLI makes the options of fit from its signature
        own[0](self, *args, **options)

    def fit(self: Any, *args: Any, **options: Any) -> None:
        raise _Refused(_refuse(script))

    cli.__init__, trainer.fit = init, fit
    return made


def _refuse(script: str) -> int:
    print(f"error: {script} makes no LightningCLI; {NEEDED}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
