"""Inference and files that use the zeros: sparse layers, 2:4 layers, ONNX files and compact files. Depends on torch, not on Lightning."""

from __future__ import annotations

from lightning_sparse.export.compact import load_compact, save_compact
from lightning_sparse.export.conversion import Choice, plan, sparse_layers, to_dense, to_sparse
from lightning_sparse.export.gains import Gain, Table
from lightning_sparse.export.layers import SparseAttention, SparseLinear
from lightning_sparse.export.onnx_file import to_onnx
from lightning_sparse.export.structured import is_semi_structured, semi_structured

__all__ = [
    "Choice",
    "Gain",
    "SparseAttention",
    "SparseLinear",
    "Table",
    "is_semi_structured",
    "load_compact",
    "plan",
    "save_compact",
    "semi_structured",
    "sparse_layers",
    "to_dense",
    "to_onnx",
    "to_sparse",
]
