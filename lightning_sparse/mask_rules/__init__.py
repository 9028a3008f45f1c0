"""Mask rules alpha(w), one file per family. To add one, write its file and import it here."""

from lightning_sparse.mask_rules.linear_ramp import LinearRamp
from lightning_sparse.mask_rules.ranked import TargetedDropout, TopK
from lightning_sparse.mask_rules.standout import Standout

__all__ = ["LinearRamp", "Standout", "TargetedDropout", "TopK"]
