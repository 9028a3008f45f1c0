"""One removable unit of a network: the slices of its parameters and buffers that go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["producer", "normaliser", "consumer", "statistic"]


@dataclass(frozen=True)
class Entry:
    """The slice ``indices`` along ``dim`` of one tensor.

    Args:
        name: name of the parameter or buffer in the module.
        dim: dimension of the tensor.
        indices: indices along ``dim``.
        role: "producer": adds into the channel (a row, its bias); "normaliser": acts on this channel alone (batch norm, a depthwise
            convolution); "consumer": reads the channel (a column); "statistic": a buffer (running mean and variance).
    """

    name: str
    dim: int
    indices: tuple[int, ...]
    role: Role


@dataclass(frozen=True)
class Group:
    """One removable unit: a channel, a neuron or a head, with every tensor entry that goes with it.

    Args:
        name: name of the group, unique in the module ("layers.5[17]").
        axis: name of the set of groups of equal shape that this one belongs to ("layers.5"). At least one group of an axis stays.
        kind: "channel" (of convolutions), "neuron" (of Linear layers) or "head" (of attention).
        entries: what is removed, as slices of tensors.
        counts: integer attributes that decrease when the group is removed, (dotted name, by how much): a number of heads.
        reason: why the group cannot be removed; empty if it can.
    """

    name: str
    axis: str
    kind: str
    entries: tuple[Entry, ...]
    counts: tuple[tuple[str, int], ...] = ()
    reason: str = ""

    @property
    def exact(self) -> bool:
        """True if the network with the group at zero equals the network without it."""
        return not self.reason

    def parameters(self, *roles: Role) -> list[Entry]:
        """Return the entries in parameters (not in buffers), of the given roles or of all."""
        return [entry for entry in self.entries if entry.role != "statistic" and (not roles or entry.role in roles)]


class ForwardFails(ValueError):
    """The module's forward fails on the example inputs.

    Args:
        name: the module's class.
        reason: type and text of its error.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name} fails on the example inputs: {reason}. They are what forward takes: a tensor, a tuple of arguments or a dict of "
            "keyword arguments; of a batch (x, y) give x"
        )
        self.name, self.reason = name, reason


class ForwardBranches(ValueError):
    """The module's forward may take another path for other inputs.

    Args:
        problem: what it does, in words.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}. Pass allow_branches=True if the path is always the same")
        self.problem = problem
