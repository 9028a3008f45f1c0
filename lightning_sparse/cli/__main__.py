"""``python -m lightning_sparse.cli`` is ``lightning-sparse``."""

import sys

from lightning_sparse.cli import main

sys.exit(main())
