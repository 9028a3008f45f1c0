"""Run every conformance check on every callback and on other tools: python tests/benchmarks/conformance [options]."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from conformance.run import main

    main()
