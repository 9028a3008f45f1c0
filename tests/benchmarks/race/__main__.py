"""Compare ways to a share of zeros: python tests/benchmarks/race COMMAND [options]."""

from __future__ import annotations

import sys
from pathlib import Path

COMMANDS = {
    "run": "train what is missing, two runs side by side, and add a record of each",
    "table": "print the tables of the records",
    "again": "fine-tune trained networks with ramps of several lengths",
    "page": "write docs/race.md and its pictures from the records",
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dispatch import run

    run("race", COMMANDS)
