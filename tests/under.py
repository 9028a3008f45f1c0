"""Run every check on one callback and print the outcomes as JSON: python under.py ReweightedPenalty [CHECK ...]

The script is run in a child process, because LIGHTNING_SPARSE_PACKAGE selects Lightning's package at import.
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
