"""``python tests/benchmarks/shrunk NAME [options]``: train, shrink, and print a table with versions and settings."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from shrunk import rows

NAMES = ("lenet", "coverage", "resnet", "search", "targets", "cifar10", "sizes")


def main() -> None:
    name = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in NAMES else ""
    parser = argparse.ArgumentParser(prog=f"python tests/benchmarks/shrunk {name or 'NAME'}")
    parser.add_argument("name", choices=NAMES)
    study = importlib.import_module(f"shrunk.{name}") if name else None
    if study is not None:
        study.options(parser)
    args = parser.parse_args()
    assert study is not None
    torch.set_num_threads(1)
    began = time.perf_counter()
    lines = [*study.lines(args)] if hasattr(study, "lines") else [rows.table(study.rows(args))]
    print(f"command: python tests/benchmarks/shrunk {' '.join(sys.argv[1:])}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, {time.perf_counter() - began:.0f} s")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
