"""Measure the curvature of groups: H_g = F_g / |w_g|^2 with F_g = E (d loss / d s_g)^2, s_g a factor on all weights of the group.

For one sample, d loss / d s_g is the sum over the group of w_j times the sample's gradient G_j. So H_g is the curvature in the direction
of w_g; the diagonal H_jj of single weights does not give it. It calibrates the mask of a group as H_jj does that of a weight:
Var s_g = lam / (eta_g H_g).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse._parts import Part
from lightning_sparse.grouped import GroupAttachment, Groups, ratio, wide
from lightning_sparse.layers import LAYERS, uncompiled
from lightning_sparse.sample_gradients import each_gradient
from lightning_sparse.select import owners

Squares = tuple[Tensor, int, int]  # the sum over samples, of how many rows, of how many looked at


class GroupCurvature:
    """Records, in one backward pass, the derivatives of each sample's loss in the factors on groups.

    Args:
        attachment: the hooks of the groups' weights.
        module: the module; its Linear, ConvNd and batch norm layers are observed sample by sample. Weights used otherwise, or
            several times in a pass, give the derivative of the whole batch.
        wants: tells if a set of groups is to be recorded in this batch.
    """

    def __init__(self, attachment: GroupAttachment, module: nn.Module, wants: Callable[[str], bool]) -> None:
        self.groups: Groups = attachment.groups
        self.live, self.wants = attachment.real.live, wants
        self.parameters = attachment.real.parameters
        self.layers: dict[str, nn.Module] = {}  # by the name of the first of its parameters
        self._parts: dict[str, list[tuple[str, Part, str]]] = {}  # of a layer: leader, part, attribute
        open_to_hooks = {id(part) for part in uncompiled(module)}
        seen = list(owners(module))
        for key, owner, attribute, parameter in seen:
            only = sum(other is parameter for *_, other in seen) == 1
            known = type(owner) in _KINDS and attribute in ("weight", "bias")
            parts = [(leader, part) for leader, part in self._masked() if part.name in self.parameters and part.name == key]
            if only and known and id(owner) in open_to_hooks and parts:
                first = next((name for name, layer in self.layers.items() if layer is owner), key)
                self.layers[first] = owner
                self._parts.setdefault(first, []).extend((leader, part, attribute) for leader, part in parts)
        for name in {part.name for _, part in self._masked()}:
            attachment.real.on_gradient(name, partial(self._on_gradient, name))
        self.clear()

    def _masked(self) -> Iterator[tuple[str, Part]]:
        return ((leader, part) for leader, parts in self.groups.parts.items() for part in parts if part.is_masked)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._samples: dict[tuple[str, str], list[Tensor]] = {}  # by leader and parameter, one tensor for each call of the layer
        self._rows: dict[str, tuple[int, int]] = {}
        self._batch: dict[tuple[str, str], Tensor] = {}

    def wants_layer(self, name: str) -> bool:
        """Return True if the groups of a layer are to be recorded."""
        return any(self.wants(leader) for leader, *_ in self._parts[name])

    @torch.no_grad()
    def add(self, name: str, layer: nn.Module, x: Tensor, grad: Tensor, samples: int) -> None:
        """Record the derivatives from a layer's input and the loss's gradient in its output."""
        for leader, part, attribute in self._parts[name]:
            if self.wants(leader):
                w = wide(self.live(part.name))
                found = [part.pool(w * wide(one)) for one in each_gradient(layer, attribute, x, grad, samples)]
                none = part.pool(torch.zeros_like(w))[None][:0]  # a layer that got no rows tells nothing
                self._samples.setdefault((leader, part.name), []).append(torch.stack(found) if found else none)
                self._rows[leader] = len(x), len(found)

    @torch.no_grad()
    def _on_gradient(self, name: str, grad: Tensor) -> None:
        for leader, part in self._masked():
            if part.name == name and self.wants(leader):
                key, value = (leader, name), part.pool(wide(self.live(name)) * wide(grad.detach()))
                self._batch[key] = self._batch[key] + value if key in self._batch else value

    def settled(self) -> dict[str, Squares]:
        """Return the squared derivatives of the recorded groups, divided by |w_g|^2."""
        found: dict[str, Squares] = {}
        for leader, parts in self.groups.parts.items():
            keys = [(leader, part.name) for part in parts if part.is_masked]
            calls = [self._samples.get(key, []) for key in keys]
            if all(len(call) == 1 for call in calls) and len({len(call[0]) for call in calls}) == 1:
                along, (rows, used) = torch.stack([call[0] for call in calls]).sum(0), self._rows[leader]
            elif all(key in self._batch for key in keys):
                along, rows, used = torch.stack([self._batch[key] for key in keys]).sum(0)[None], 1, 1
            else:
                continue
            norm = self.groups.total(leader, self.live, lambda w, _: w * w)
            found[leader] = ratio(along.square().sum(0), norm, 0.0), rows, used
        self.clear()
        return found


_KINDS = (*LAYERS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def observe(attachment: Any, module: nn.Module, wants: Callable[[str], bool]) -> GroupCurvature | None:
    """Return what records the curvature of groups; None for the attachment of single weights."""
    return GroupCurvature(attachment, module, wants) if isinstance(attachment, GroupAttachment) else None
