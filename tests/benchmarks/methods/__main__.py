"""Write the page of all methods: python tests/benchmarks/methods [--write docs/methods.md]."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from methods.page import main

    main()
