"""Arguments shared by the benchmarks, with clear errors."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from performance.record import FOLDER


def whole(least: int = 1) -> Callable[[str], int]:
    """Return a parser of whole numbers >= ``least``, also written as 1e7."""

    def read(text: str) -> int:
        wanted = f"must be a whole number >= {least}, got {text!r}"
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(wanted) from None
        if not value.is_integer() or value < least:
            raise argparse.ArgumentTypeError(wanted)
        return int(value)

    return read


def parser(text: str | None, name: str, rounds: int = 9) -> argparse.ArgumentParser:
    """Make a parser with ``--rounds``, ``--threads`` and ``--out`` (default results/NAME.json); ``text`` is the command's docstring."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rounds", type=whole(), default=rounds, help="rounds that count, after one that warms up")
    found.add_argument("--threads", type=whole(), default=2, help="torch's threads")
    found.add_argument("--out", type=Path, default=FOLDER / f"{name}.json", help="the JSON file to write")
    return found


def command(words: Sequence[str] | None = None) -> str:
    """Return the command line of this run, without ``--out`` and with folder names instead of full paths."""
    script, *rest = sys.argv if words is None else words
    kept = [word for before, word in zip([script, *rest], rest, strict=False) if "--out" not in (before, word)]
    words = [_named(word) for word in kept if not word.startswith("--out=")]
    return shlex.join(["python", "tests/benchmarks/performance", Path(script).stem.rpartition(" ")[2], *words])


def _named(word: str) -> str:
    option, given, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + given + (Path(value).name if Path(value).is_absolute() else value)
