"""Run elementwise functions over many tensors: :class:`Engine`; over one tensor: :func:`map_chunks`.

The other functions find values that are not finite, and gather or split tensors that FSDP2 shards over
processes. Only this subpackage handles chunks, buckets, kernels, random words, buffers and shards: import from here, not from the
modules inside.
"""

from lightning_sparse.elementwise.engine import Drawn, Engine, are_finite, map_chunks, outside, scalar_div
from lightning_sparse.elementwise.finite import count_nonfinite, maybe_nonfinite
from lightning_sparse.elementwise.kernels import is_frozen_config
from lightning_sparse.elementwise.pieces import raise_malloc_thresholds
from lightning_sparse.elementwise.shards import (
    apply_mask_,
    apply_masks_,
    cut_like,
    fsdp_modules,
    full_tensor,
    gather_where,
    is_sharded,
    local_part,
    map_shards,
    max_shards,
    scatter_to_zeros_,
    shard_like,
    sum_shards,
)

__all__ = [
    "Drawn",
    "Engine",
    "apply_mask_",
    "apply_masks_",
    "are_finite",
    "count_nonfinite",
    "cut_like",
    "fsdp_modules",
    "full_tensor",
    "gather_where",
    "is_frozen_config",
    "is_sharded",
    "local_part",
    "map_chunks",
    "map_shards",
    "max_shards",
    "maybe_nonfinite",
    "outside",
    "raise_malloc_thresholds",
    "scalar_div",
    "scatter_to_zeros_",
    "shard_like",
    "sum_shards",
]
