"""Use every callback in other packages: python tests/benchmarks/clients [options]."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from clients.run import main

    main()
