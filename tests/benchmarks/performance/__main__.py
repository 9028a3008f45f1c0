"""Measure the cost of sparse training: python tests/benchmarks/performance COMMAND [options]."""

from __future__ import annotations

import sys
from pathlib import Path

COMMANDS = {
    "page": "write docs/performance.md from the records",
    "step_cost": "time a step of each callback",
    "before_after": "time a step of each method with two versions of this package",
    "peers": "time a step of other packages and of ours",
    "time_to_quality": "time each method to a share of zeros at a given error",
    "scaling": "time a callback by number of weights and tensors",
    "start_end": "time imports, set-up and the end of a fit",
    "memory": "measure the memory of each callback",
    "profiles": "profile a step by operators and draw it",
    "ways": "time alternative implementations",
    "curvature_cost": "time curvature estimates",
    "numeric_penalty": "time a tabulated penalty and a closed form",
    "mnist_epoch": "time an epoch in the Trainer and in a plain loop",
    "import_time": "time the import compared with torch",
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dispatch import run

    run("performance", COMMANDS)
