"""Run one of a benchmark's commands: python tests/benchmarks/FOLDER COMMAND [options]."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping


def run(package: str, commands: Mapping[str, str]) -> None:
    """Call ``main`` of the module of ``package`` named by the first word; list the ``commands`` if it is missing or unknown."""
    name, *rest = sys.argv[1:] or [""]
    if name not in commands:
        print(f"usage: python tests/benchmarks/{package} COMMAND [--help] [options]\n", file=sys.stderr)
        print(*(f"  {key:18} {about}" for key, about in commands.items()), sep="\n", file=sys.stderr)
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    sys.argv = [f"{package} {name}", *rest]
    importlib.import_module(f"{package}.{name}").main()
