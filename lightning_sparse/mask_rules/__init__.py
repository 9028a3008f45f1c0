"""Mask rules alpha(w), one file a rule. A new one: its file and one line here."""

from lightning_sparse.mask_rules.linear_ramp import LinearRamp
from lightning_sparse.mask_rules.ranked import TargetedDropout, TopK
from lightning_sparse.mask_rules.standout import Standout

__all__ = ["LinearRamp", "Standout", "TargetedDropout", "TopK"]
