"""Train every pair of thirty optimisers and eight callbacks: python tests/benchmarks/optimizers [options]."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from optimizers.run import main

    main()
