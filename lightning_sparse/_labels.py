"""How many labels a loss averages over, and how many samples a batch holds.

A loss is L = sum over labels i of k_i l_i: k_i = 1/N for a mean over N samples, tokens or pixels. Autograd finds every k_i by
itself: they are the gradients of L in the labels' own losses, which the loss's graph leads to through linear operations alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Labels = int | Callable[[Any], float] | None
# linear in what they are given, where that is one tensor that needs a gradient; by the names of autograd's nodes
_LINEAR = re.compile(
    "Add|Sub|Rsub|Neg|Mul|Div|Mean|Sum|Nansum|View|UnsafeView|Reshape|ReshapeAlias|Squeeze|Unsqueeze|Expand|Permute|Transpose|T|Select|Slice|"
    "Index|IndexSelect|Gather|Take|MaskedSelect|MaskedFill|Where|Stack|Cat|Clone|Alias|ToCopy|Copy|Unbind|Split|SplitWithSizes|Dot|Mv|Repeat|"
    "Diagonal|Scatter|ScatterAdd|ScatterReduce|IndexAdd|IndexPut|Flip|Roll|ConstantPadNd|NllLoss|NllLoss2D|_DDPSink"
)
_SUMS = re.compile("Mean|Sum|Nansum|Dot|Mv|NllLoss|NllLoss2D|ScatterAdd|ScatterReduce|IndexAdd")
# losses with a reduction of their own, over all elements of what they are given
_LOSSES = re.compile("MseLoss|BinaryCrossEntropy|BinaryCrossEntropyWithLogits|SmoothL1Loss|HuberLoss|SoftMarginLoss")
_PRODUCTS = ("Mul", "Div", "Dot", "Mv")
_MOST = 4096  # nodes that are looked at


class Place(NamedTuple):
    """A node of a loss's graph whose gradient holds the k_i of some labels."""

    node: Any
    kind: str


def places(loss: Tensor) -> list[Place]:
    """The nodes at which the loss stops being linear in what comes before it: log-softmax and whole losses, else squares and the like."""
    found: list[Place] = []
    waiting: list[tuple[Any, bool]] = [(loss.grad_fn, False)]
    seen: set[Any] = set()
    while waiting and len(seen) < _MOST:
        node, summed = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind, before = _kind(node), [part for part, _ in node.next_functions if part is not None]
        if _is_known(kind):
            found.append(Place(node, kind))
        elif _LINEAR.fullmatch(kind) and (len(before) == 1 or kind not in _PRODUCTS):
            waiting += [(part, summed or bool(_SUMS.fullmatch(kind))) for part in before]
        elif not summed and _is_scalar(node) and all(map(_is_scalar, before)) and before:  # the root or the logarithm of a mean
            waiting += [(part, False) for part in before]
        elif summed and not all(_kind(part) == "AccumulateGrad" for part in before):  # a penalty on the weights has no labels
            found.append(Place(node, kind))
    return [place for place in found if _is_known(place.kind)] or found


def _is_known(kind: str) -> bool:
    return kind == "LogSoftmax" or bool(_LOSSES.fullmatch(kind))


def _kind(node: Any) -> str:
    return re.sub(r"Backward\d*$", "", str(node.name()))


def _is_scalar(node: Any) -> bool:
    return all(math.prod(meta.shape) == 1 for meta in getattr(node, "_input_metadata", ()))


def shares(place: Place, grads: Iterable[Tensor | None]) -> tuple[Tensor, Tensor] | None:
    """Sum of k_i and sum of k_i^2 over the labels of a place, given the gradients of its outputs."""
    grad = next((grad for grad in grads if grad is not None), None)
    if grad is None:
        return None
    if place.kind == "LogSoftmax":
        each = log_softmax_shares(place.node, grad)
    else:
        each = grad.detach().abs()
        if _is_known(place.kind) and each.numel() == 1 and getattr(place.node, "_saved_reduction", 0) != 0:
            count = place.node._saved_self.numel()
            each = each.expand(count) / (count if place.node._saved_reduction == 1 else 1)
    exact = each.double() if each.device.type != "mps" else each.float()
    return exact.sum(), exact.square().sum()


def log_softmax_shares(node: Any, grad: Tensor) -> Tensor:
    """k_i of each row of a log-softmax: its label's gradient, or all of a soft label's."""
    sizes: Tensor = torch.linalg.vector_norm(grad.detach(), 1, dim=log_softmax_dim(node))  # |grad| itself would be as large as the logits
    return sizes


def log_softmax_dim(node: Any) -> int:
    """The dimension of the classes."""
    dim = int(node._saved_dim)
    return dim - 2**64 if dim >= 2**63 else dim  # kept without a sign


class Categorical(NamedTuple):
    """The cross-entropies of a loss: log-softmaxes, the k_i of their rows, and N."""

    places: list[Place]
    sizes: list[Tensor]
    labels: float

    def is_plain(self, prediction: Tensor, count: float) -> bool:
        """A mean over the rows of this prediction, each with one label."""
        logs = self.places[0].node._saved_result
        return len(self.places) == 1 and self.labels == count and logs.shape == prediction.shape

    def drawn(self, generator: torch.Generator | None) -> list[tuple[Tensor, Tensor]]:
        """Each log-softmax with the loss's gradient in it, for labels drawn from it."""
        pairs = []
        for place, sizes in zip(self.places, self.sizes, strict=True):
            logs, dim = place.node._saved_result, log_softmax_dim(place.node)
            chance = logs.detach().movedim(dim, -1).exp()
            label = torch.multinomial(chance.reshape(-1, chance.shape[-1]), 1, generator=generator).reshape(*chance.shape[:-1], 1)
            residual = torch.zeros_like(chance).scatter_(-1, label, -sizes.unsqueeze(-1).to(chance)).movedim(-1, dim)
            pairs.append((logs, residual))
        return pairs


def read_categorical(loss: Tensor, scale: float) -> Categorical | None:
    """The cross-entropies of a loss that was multiplied by ``scale``; None where it has none that can be read."""
    found = places(loss)
    if not found or any(place.kind != "LogSoftmax" for place in found):
        return None
    logs = [place.node._saved_result for place in found]
    grads = torch.autograd.grad(loss, logs, retain_graph=True)
    sizes = [log_softmax_shares(place.node, grad) for place, grad in zip(found, grads, strict=True)]
    first, second = (float(sum((one**power).sum(dtype=torch.float64) for one in sizes)) for power in (1, 2))
    return Categorical(found, sizes, near_whole(scale * first / second)) if second > 0 else None


class LabelCount:
    """N, the labels that a batch's loss averages over: given, read from the loss, or taken for the batch's samples.

    Where k_i are not all the same (class weights, several losses), N = sum k_i / sum k_i^2: right where the labels' losses
    curve alike.
    """

    def __init__(self, labels: Labels = None) -> None:
        self.labels = labels
        self.doubt = ""  # why the count may be wrong, until it was said
        self.begin(None)

    def begin(self, batch: Any) -> None:
        """Before a batch's forward."""
        self._batch = batch
        self.forget()

    def forget(self) -> None:
        """After a backward: the next one has labels of its own."""
        self._parts: list[tuple[Tensor, Tensor]] = []

    def listen(self, loss: Tensor) -> None:
        """Before the loss's backward, which will tell."""
        if self.labels is None:
            for place in places(loss):
                place.node.register_prehook(lambda grads, place=place: self._hear(place, grads))

    def _hear(self, place: Place, grads: tuple[Tensor | None, ...]) -> None:
        part = shares(place, grads)
        if part is not None:
            self._parts.append(part)

    def count(self, scale: float = 1.0) -> float:
        """N of the loss, which was multiplied by ``scale``; ``doubt`` says why where it is not known."""
        if self.labels is not None:
            return self._given()
        if self._parts:
            first, second = (float(sum(part[i] for part in self._parts)) for i in (0, 1))
            if second != 0:  # else no label counted, and no gradient came
                return near_whole(scale * first / second if math.isfinite(first) else math.nan)
        samples = batch_size(self._batch)
        if samples is None:
            self.doubt = f"nor how many samples a batch of type {type(self._batch).__name__} holds; it is taken for 1"
        elif _may_hold_tokens(self._batch):
            self.doubt = f"it is taken for {samples}, the samples of the batch, though its labels may be one for each token or pixel"
        return samples or 1

    def _given(self) -> float:
        if callable(self.labels):
            return max(float(self.labels(self._batch)), 1.0)
        samples = batch_size(self._batch)
        if samples is None:
            raise ValueError(
                f"labels={self.labels!r} counts labels a sample, but how many samples a batch of type {type(self._batch).__name__} "
                "holds is not known; give labels a function of the batch, such as labels=lambda batch: len(batch.y)"
            )
        return float(samples * (self.labels or 1))


def near_whole(count: float) -> float:
    """``count`` without its rounding errors."""
    return float(round(count)) if math.isfinite(count) and abs(count - round(count)) <= 1e-4 * count else count


_DEEPEST = 4  # objects in objects that are looked into


def batch_size(batch: Any) -> int | None:
    """Samples in a batch, None where nothing says: the length of its first tensor of more than one row, or of its lists of samples."""
    first = None
    for size in _sizes(batch, 0):
        if size > 1:
            return size
        first = 1
    return first


def graph_of_row(batch: Any, depth: int = 0) -> dict[int, Tensor]:
    """By their number: the graph of each row of nodes, and of each row of edges, of a torch_geometric batch; empty for others."""
    if isinstance(graphs := getattr(batch, "num_graphs", None), int):
        nodes, edges = getattr(batch, "batch", None), getattr(batch, "edge_index", None)
        if graphs < 2 or not isinstance(nodes, Tensor) or nodes.dim() != 1:
            return {}
        of_edges = {edges.shape[1]: nodes[edges[0]]} if isinstance(edges, Tensor) and edges.dim() == 2 else {}
        return of_edges | {len(nodes): nodes}
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) and depth <= _DEEPEST else ()
    return next((found for part in parts if (found := graph_of_row(part, depth + 1))), {})


def _sizes(batch: Any, depth: int) -> Iterator[int]:
    if isinstance(graphs := getattr(batch, "num_graphs", None), int):  # torch_geometric's, whose tensors are as long as there are nodes
        yield graphs
    elif isinstance(batch, Tensor):
        yield len(batch) if batch.dim() else 1
    elif isinstance(batch, (list, tuple)) and batch and _are_samples(batch, depth == 0):
        yield len(batch)
    elif depth <= _DEEPEST:
        for part in _parts(batch):
            yield from _sizes(part, depth + 1)


def _are_samples(items: list[Any] | tuple[Any, ...], outermost: bool) -> bool:
    """A list with an entry a sample, such as images of different sizes or a dict of boxes each, rather than of columns."""
    if all(isinstance(item, str) for item in items):
        return True
    if all(isinstance(item, Mapping) for item in items):
        return not outermost or (isinstance(items, list) and all(item.keys() == items[0].keys() for item in items))
    if hasattr(items, "_fields") or not all(isinstance(item, Tensor) for item in items):
        return False
    if any(item.dim() == 0 for item in items):
        return not outermost
    images = all(item.dim() == 3 and len(item) in (1, 3, 4) and item.is_floating_point() for item in items)
    return images or (not outermost and len({len(item) for item in items}) > 1)


def _parts(batch: Any) -> Iterable[Any]:
    """What a batch holds: its values, fields or attributes."""
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, (list, tuple)):
        return batch
    if isinstance(batch, (str, bytes, type, Tensor)) or callable(batch):
        return ()
    if dataclasses.is_dataclass(batch):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    given = batch.to_dict() if callable(getattr(batch, "to_dict", None)) else getattr(batch, "__dict__", None)  # torch_geometric's Data
    return given.values() if isinstance(given, Mapping) else ()


def _may_hold_tokens(batch: Any, depth: int = 0) -> bool:
    """Some tensor of whole numbers has more than one a sample."""
    if isinstance(batch, Tensor):
        return not batch.is_floating_point() and batch.dtype != torch.bool and batch.dim() > 1 and batch.numel() > len(batch)
    return depth <= _DEEPEST and any(_may_hold_tokens(part, depth + 1) for part in _parts(batch))
