"""Run every check on one of our callbacks and print what came of each as JSON: python under.py ReweightedPenalty [CHECK ...]

In a process of its own, since the environment variable LIGHTNING_SPARSE_PACKAGE decides at import which of Lightning's two
packages the checks run under.
"""

from __future__ import annotations

import json
import sys

from subjects import OURS

from lightning_sparse import conformance
from lightning_sparse.conformance import _lightning

if __name__ == "__main__":
    name, *only = sys.argv[1:]
    outcomes = [conformance.outcome(OURS[name], check) for check in only or conformance.CHECKS]
    print(json.dumps({"package": _lightning.NAME, "outcomes": outcomes}))
