"""Run ``lightning-sparse`` as ``python -m lightning_sparse.cli``."""

import sys

from lightning_sparse.cli import main

sys.exit(main())
