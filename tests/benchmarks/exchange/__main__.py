"""Compare penalty and mask: python tests/benchmarks/exchange COMMAND [options]."""

from __future__ import annotations

import sys
from pathlib import Path

COMMANDS = {
    "mnist": "train LeNet-300-100, LeNet-5 and a ViT with every callback",
    "page": "write docs/exchange.md and its pictures from the records",
    "digits": "compare zeros and accuracy on the digits",
    "linear": "compare a linear model with coordinate descent",
    "target_sparsity": "measure how exactly each callback reaches a target",
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dispatch import run

    run("exchange", COMMANDS)
