"""Candidate groups by the names of layers: attention heads (also grouped-query attention) and MLP neurons, without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_sparse._groups import Entry, Group

QUERIES = ("q", "q_proj", "query", "to_q", "q_lin", "wq")
KEYS = ("k", "k_proj", "key", "to_k", "k_lin", "wk")
VALUES = ("v", "v_proj", "value", "to_v", "v_lin", "wv")
OUTPUTS = ("o", "o_proj", "out", "out_proj", "to_out", "out_lin", "wo", "proj", "dense")
UPWARD = ("gate_proj", "up_proj", "w1", "w3", "fc1", "c_fc", "lin1", "linear1", "dense_h_to_4h", "wi", "wi_0", "wi_1", "gate", "up")
DOWNWARD = ("down_proj", "w2", "fc2", "c_proj", "lin2", "linear2", "dense_4h_to_h", "wo", "down")
HEADS = ("num_heads", "heads", "n_heads", "n_head", "nhead", "num_attention_heads")
SHARED_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")  # of keys and values, in grouped-query attention


def by_name(model: nn.Module, inputs: Any, heads: Mapping[str, int]) -> list[list[list[Group]]]:
    """Return heads and neurons of modules whose Linear layers have the usual names. The proof shows whether the names told the truth."""
    found = []
    for path, part in model.named_modules():
        layers = {leaf: layer for leaf, layer in part.named_children() if isinstance(layer, nn.Linear)}
        for members in (_heads(path, part, layers, heads.get(path)), _neurons(path, layers)):
            if members:
                found.append([members])
    return found


def _heads(path: str, part: nn.Module, layers: Mapping[str, nn.Linear], given: int | None) -> list[Group]:
    """Return a group for each head of keys and values, with all the queries that use it."""
    names = [next((leaf for leaf in known if leaf in layers), "") for known in (QUERIES, KEYS, VALUES, OUTPUTS)]
    if not all(names):
        return []
    q, k, v, o = (layers[name] for name in names)
    count = given or _integer(part, HEADS) or (q.out_features // size if (size := _integer(part, ("head_dim",))) else 0)
    if count < 1 or q.out_features % count or o.in_features != q.out_features or k.out_features != v.out_features:
        return []
    size = q.out_features // count
    shared, rest = divmod(k.out_features, size)
    if shared < 1 or rest or count % shared:
        return []
    ratio, groups = count // shared, []
    counts = [(f"{path}.{leaf}".lstrip("."), ratio) for leaf in HEADS if _integer(part, (leaf,)) == count]
    counts += [(f"{path}.{leaf}".lstrip("."), 1) for leaf in SHARED_HEADS if _integer(part, (leaf,)) == shared]
    for head in range(shared):
        wide, narrow = range(head * ratio * size, (head + 1) * ratio * size), range(head * size, (head + 1) * size)
        entries = [*_rows(path, names[0], q, wide), *_rows(path, names[1], k, narrow), *_rows(path, names[2], v, narrow)]
        entries.append(Entry(_full(path, names[3], "weight"), 1, tuple(wide), "consumer"))
        groups.append(Group(f"{path or 'heads'}[{head}]", path or "heads", "head", tuple(entries), tuple(counts)))
    return groups


def _neurons(path: str, layers: Mapping[str, nn.Linear]) -> list[Group]:
    """Return a group for each hidden neuron of an MLP: rows of the layers up, a column of the layer down."""
    down = [leaf for leaf in DOWNWARD if leaf in layers]
    up = [leaf for leaf in UPWARD if leaf in layers and down and layers[leaf].out_features == layers[down[0]].in_features]
    if len(down) != 1 or not up:
        return []
    axis, groups = _full(path, up[0], ""), []
    for i in range(layers[down[0]].in_features):
        entries = [entry for leaf in up for entry in _rows(path, leaf, layers[leaf], range(i, i + 1))]
        entries.append(Entry(_full(path, down[0], "weight"), 1, (i,), "consumer"))
        groups.append(Group(f"{axis}[{i}]", axis, "neuron", tuple(entries)))
    return groups


def _rows(path: str, leaf: str, layer: nn.Linear, rows: range) -> Iterator[Entry]:
    for tensor in ("weight", "bias") if layer.bias is not None else ("weight",):
        yield Entry(_full(path, leaf, tensor), 0, tuple(rows), "producer")


def _full(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _integer(part: nn.Module, names: tuple[str, ...]) -> int:
    """Return the first attribute that is a whole number; 0 if there is none."""
    return next((value for name in names if type(value := getattr(part, name, None)) is int), 0)
