"""Layers with sparse matrices for inference: ``SparseLinear`` and ``SparseAttention``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Layout = str  # "csr" or "bsr"


@functools.cache
def _hear_notice() -> None:
    """Make a sparse tensor, because torch prints once in a process that these are in beta state."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta state")
        torch.zeros(1, 1).to_sparse_csr()


def matrix(crow: Tensor, col: Tensor, entries: Tensor, width: int) -> Tensor:
    """Return the CSR tensor (``entries`` is a vector) or BSR tensor (``entries`` has shape (blocks, height, width)) of these parts."""
    _hear_notice()
    block = 1 if entries.dim() == 1 else entries.shape[1]
    make = torch.sparse_csr_tensor if entries.dim() == 1 else torch.sparse_bsr_tensor
    return make(crow, col, entries, size=((crow.numel() - 1) * block, width), check_invariants=False)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias. x has shape (batch, inputs), the result (batch, outputs)."""
    if len(x) == 1 and weight.layout == torch.sparse_csr:  # because the product with a vector takes half of the time
        y = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
        return y.unsqueeze(0)
    return (weight @ x.t() if bias is None else torch.addmm(bias.unsqueeze(1), weight, x.t())).t()


@torch.library.custom_op("lightning_sparse::linear", mutates_args=())
def _operator(x: Tensor, crow: Tensor, col: Tensor, entries: Tensor, bias: Tensor | None, width: int) -> Tensor:
    return product(x, matrix(crow, col, entries, width), bias).contiguous()


@_operator.register_fake
def _shape(x: Tensor, crow: Tensor, col: Tensor, entries: Tensor, bias: Tensor | None, width: int) -> Tensor:
    block = 1 if entries.dim() == 1 else entries.shape[1]
    return x.new_empty(x.shape[0], (crow.shape[0] - 1) * block)


class SparseLinear(nn.Module):
    """Compute x W^T + b like nn.Linear, with W in CSR or BSR. For inference: the weights are buffers and are not trained.

    ``state_dict`` has the keys of nn.Linear (``weight``, dense, and ``bias``) and ``load_state_dict`` accepts those of any nn.Linear
    of this shape, so files are exchanged with the dense module. Compiled and exported programs call the operator
    ``lightning_sparse::linear``, which ``import lightning_sparse.export`` registers.

    Args:
        weight: the matrix, of shape (outputs, inputs), float32 or float64.
        bias: of shape (outputs,), or None.
        layout: "csr" or "bsr".
        block: height and width of a block of BSR; both sides of the matrix must be multiples of it.
    """

    crow: Tensor
    col: Tensor
    entries: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, layout: Layout = "csr", block: int = 32) -> None:
        super().__init__()
        if layout not in ("csr", "bsr"):
            raise ValueError(f"layout must be 'csr' or 'bsr', got {layout!r}")
        if layout == "bsr" and any(size % block for size in weight.shape):
            raise ValueError(f"both sides of a BSR matrix must be multiples of its block, {block}; got {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.layout, self.block = layout, block if layout == "bsr" else 1
        self._made: tuple[Tensor, Tensor] | None = None  # (entries, the sparse tensor made of the buffers)
        for name, part in self._compressed(weight).items():
            self.register_buffer(name, part, persistent=False)  # because state_dict has the dense matrix
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)

    def _compressed(self, weight: Tensor) -> dict[str, Tensor]:
        dense = weight.detach()
        _hear_notice()
        found = dense.to_sparse_csr() if self.layout == "csr" else dense.to_sparse_bsr((self.block, self.block))
        # clones, because a view of a sparse tensor cannot be compiled; 32-bit indices, because they take half of the memory
        crow, col = found.crow_indices().to(torch.int32).clone(), found.col_indices().to(torch.int32).clone()
        return {"crow": crow, "col": col, "entries": found.values().clone()}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"this layer takes (..., {self.in_features}), got {tuple(x.shape)}")
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            y: Tensor = _operator(rows.to(self.entries.dtype), self.crow, self.col, self.entries, self.bias, self.in_features)
        else:
            weight = self._matrix()
            if torch.is_autocast_enabled(x.device.type) or x.dtype != weight.dtype:  # sparse products are in float32 and float64 only
                with torch.autocast(x.device.type, enabled=False):
                    y = product(rows.to(weight.dtype), weight, self.bias)
            else:
                y = product(rows, weight, self.bias)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def _matrix(self) -> Tensor:
        """Return the sparse tensor that shares the buffers' memory; made once, because that takes as long as a small product."""
        made, entries = self._made, self.entries
        if made is None or made[0] is not entries:  # the module was moved, converted or loaded
            with torch.inference_mode(False):
                made = self._made = (entries, matrix(self.crow, self.col, entries, self.in_features))
        return made[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}  # because sparse tensors can be neither copied nor pickled in inference mode

    def to_dense(self) -> Tensor:
        """Return the matrix as a dense tensor of shape (outputs, inputs)."""
        return self._matrix().to_dense()

    def nonzero(self) -> int:
        """Return the number of non-zero weights."""
        return int(self.entries.count_nonzero())

    def extra_repr(self) -> str:
        blocks = f", block={self.block}" if self.layout == "bsr" else ""
        share = self.nonzero() / max(self.out_features * self.in_features, 1)
        return f"{self.in_features}, {self.out_features}, {self.layout}{blocks}, non-zero={100 * share:.2f} %, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.to_dense()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {"weight": (self.out_features, self.in_features)} | ({} if self.bias is None else {"bias": (self.out_features,)})
        for name, size in own.items():
            given = state_dict.get(f"{prefix}{name}")
            if given is None:
                missing_keys.append(f"{prefix}{name}")
            elif given.shape != size:
                error_msgs.append(f"size mismatch for {prefix}{name}: the file has {tuple(given.shape)}, the module {size}.")
            elif name == "weight":
                for part, tensor in self._compressed(given.to(self.entries)).items():
                    setattr(self, part, tensor)
            else:
                self.bias = given.detach().to(self.entries).clone()
        unexpected_keys += [
            key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :] and key[len(prefix) :] not in own
        ]


class SparseAttention(nn.Module):
    """Compute multi-head attention like nn.MultiheadAttention, with projections that may be sparse. For inference, without dropout.

    ``state_dict`` has the keys of nn.MultiheadAttention.

    Args:
        query: projection of the query; the others likewise. An nn.Linear or a :class:`SparseLinear` of the shape (width, width).
        key: see ``query``.
        value: see ``query``.
        out_proj: projection of the result.
        num_heads: number of heads.
        batch_first: inputs have the shape (batch, length, width) and not (length, batch, width).
    """

    # because torch's TransformerEncoderLayer reads these, and they keep it from its fused path, which needs dense weights
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module, out_proj: nn.Module, num_heads: int, batch_first: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out_proj = query, key, value, out_proj
        self.num_heads, self.batch_first = num_heads, batch_first
        self.register_state_dict_post_hook(_join)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_split)  # type: ignore[no-untyped-call]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (result, attention weights or None). Arguments and shapes are those of nn.MultiheadAttention."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask and takes attn_mask too, as in nn.MultiheadAttention")
        batched = query.dim() == 3
        swap = batched and not self.batch_first
        inputs = [x if batched else x.unsqueeze(0) for x in (query, key, value)]
        inputs = [x.transpose(0, 1) if swap else x for x in inputs]
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer, x in zip(layers, inputs, strict=True))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        if need_weights:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            weights: Tensor | None = (scores if mask is None else scores + mask).softmax(-1)
            heads = weights @ v
        else:
            weights, heads = None, nn.functional.scaled_dot_product_attention(q, k, v, mask)
        result = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return (result.transpose(0, 1) if swap else result if batched else result.squeeze(0)), weights

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Return the sum of both masks as floats that broadcast to (batch, heads, queries, keys); True stands for -inf."""
        found = []
        if mask is not None:
            found.append(mask if mask.dim() == 2 else mask.reshape(-1, self.num_heads, q.shape[2], k.shape[2]))
        if padding is not None:
            found.append(padding.reshape(-1, 1, 1, k.shape[2]))
        floats = [q.new_zeros(m.shape).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(q.dtype) for m in found]
        return sum(floats[1:], floats[0]) if floats else None


_PARTS = ("query", "key", "value")


def _join(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
    for kind in ("weight", "bias"):
        parts = [state.pop(f"{prefix}{part}.{kind}", None) for part in _PARTS]
        if all(part is not None for part in parts):
            state[f"{prefix}in_proj_{kind}"] = torch.cat(parts)


def _split(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    for kind in ("weight", "bias"):
        if (joined := state.pop(f"{prefix}in_proj_{kind}", None)) is not None:
            for part, tensor in zip(_PARTS, joined.chunk(3), strict=True):
                state[f"{prefix}{part}.{kind}"] = tensor
