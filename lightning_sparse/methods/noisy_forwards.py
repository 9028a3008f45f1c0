"""Run forwards with noise: decide when it is drawn, from which generator, and where it is added. A method draws it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_sparse import layers
from lightning_sparse.methods.base import Run
from lightning_sparse.methods.noise_cost import NoiseCost
from lightning_sparse.noise import generator_for
from lightning_sparse.state import are_names, entry, is_count
from lightning_sparse.weights import Attachment

WHOLE_BECAUSE = (
    "FSDP2 gathers the weights anew for each forward and backward and adds up their gradients before a mask of this process could "
    "multiply them"
)


class Source(Protocol):
    """Draws the noise."""

    @property
    def local(self) -> bool:
        """Return True if noise is added to the outputs of layers whose input and output hooks can observe."""
        ...

    def prepare_outputs(self, name: str) -> None:
        """Compute from the weights, at the batch's start, what the noise on a layer's outputs needs."""

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the noise on a layer's output for the input ``x``."""
        ...

    def draw_weights(self, names: list[str], attachment: Attachment) -> None:
        """Write noisy weights into the data of these parameters."""


class NoisyForwards:
    """Adds noise in forwards: to weights from a batch's start, to the outputs of ``local`` layers at each forward.

    If a layer's forward is bypassed or compiled, its weights get the noise instead. Forwards in evaluation mode without gradients
    have none, as with dropout. ``cost`` measures what the noise on outputs costs.
    """

    def __init__(self, source: Source, cost: NoiseCost | None = None) -> None:
        self.source, self.cost = source, cost
        self.reset()

    def reset(self, run: Run | None = None) -> None:
        """Reset before a new run."""
        self.run: Any = run
        self.draws = 0
        self.noise_active = False  # forward hooks add noise to outputs in this batch
        self.layers: dict[str, nn.Module] = {}  # layers whose outputs get noise, by the name of their weight
        self.trained: set[str] = set()  # parameters trained in this batch, also while toggled off
        self._calls: dict[str, int] = {}  # calls of each layer's forward since the noise was drawn
        self._called: set[str] = set()  # layers whose forward ran in this batch
        self._used: set[str] = set()  # layers whose weight got a gradient in this batch
        self._bypassed: set[str] = set()  # layers whose weight is used without their forward; the weight gets the noise

    def prepare(self) -> None:
        """Prepare for a run."""
        self.draws, self._bypassed = 0, set()

    def attach(self, module: nn.Module) -> None:
        """Attach to the module's layers."""
        attachment = self.run.weights.attachment
        known = layers.layers(module, self.run.weights.parameters) if self.source.local else {}
        self.layers = {name: layer for name, layer in known.items() if name not in self._bypassed}
        for name, layer in self.layers.items():
            attachment.on_forward(layer, partial(self._add_noise, name))
            attachment.on_gradient(name, partial(self._note_use, name))
        attachment.mask_gradients()
        attachment.live_in_evaluation(name for name in self.run.weights.parameters if name not in self.layers)
        attachment.disable_forward_hooks()  # until a batch begins

    def begin_batch(self) -> bool:
        """Start a batch; return True if it is run with noise."""
        self._called, self._used = set(), set()
        weights = self.run.weights
        if weights.attachment is None or self.run.support.frozen is not None or not weights.parameters:
            return False
        weights.attachment.enable_forward_hooks()
        self.trained = {name for name, parameter in weights.parameters.items() if parameter.requires_grad}
        return True

    @torch.no_grad()
    def draw(self, noisy: bool = True) -> None:
        """Draw new noise: on the weights at once, on the outputs of layers at each of their forwards.

        Without ``noisy`` there is none, but the random streams of the next draw are in use.
        """
        self.draws, self._calls, self.noise_active = self.draws + 1, {}, noisy
        weights = self.run.weights
        if not noisy or weights.attachment is None or not weights.parameters:
            return
        for name in self.layers:
            if name in self.trained:
                self.source.prepare_outputs(name)
        self.source.draw_weights([n for n in weights.parameters if n in self.trained and n not in self.layers], weights.attachment)

    def stream(self, index: int, call: int = 0) -> torch.Generator:
        """Return the generator of one parameter (and call of its layer) in this batch, equal in a recomputed forward."""
        device = next(iter(self.run.weights.parameters.values())).device
        return generator_for(device, self.run.seed, self.run.rank, self.draws, index, call)

    def _add_noise(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.noise_active or name not in self.layers or name not in self.trained:
            return output
        if not layer.training and not torch.is_grad_enabled():
            return output
        # two calls inside one checkpointed block would be recomputed in forward order, and swap their draws
        again = torch._C._current_graph_task_id() != -1  # recomputed in backward, last call first
        call = self._calls.get(name, 0) - (1 if again else 0)
        self._calls[name] = call if again else call + 1
        self._called.add(name)
        number = list(self.run.weights.parameters).index(name)
        noise = self.source.draw_outputs(name, layer, inputs[0], self.stream(number, call))
        noisy = output + noise
        if self.cost is not None and self.cost.active:
            self.cost.observe(noisy, noise)
        return noisy

    def _note_use(self, name: str, grad: Tensor) -> None:
        if self.noise_active:
            self._used.add(name)

    def end_batch(self) -> None:
        """Remove the noise; layers whose forward was not observed get it on their weights from the next batch on."""
        unseen = self._used - self._called  # forwards that were bypassed, or compiled before this run
        if unseen:
            self._bypassed |= unseen
            self.layers = {name: layer for name, layer in self.layers.items() if name not in unseen}
        attachment = self.run.weights.attachment
        if attachment is not None:
            attachment.restore()
            attachment.live_in_evaluation(sorted(unseen))
            attachment.disable_forward_hooks()
        self._calls, self.noise_active = {}, False

    def release(self) -> None:
        """Disable the hooks when training has ended or failed."""
        if self.run.weights.attachment is not None:
            self.run.weights.attachment.disable_forward_hooks()
        self._calls, self.noise_active = {}, False

    # -- state -----------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers that continue the draws exactly, and the layers that are bypassed."""
        return {"seed": self.run.seed, "draws": self.draws, "bypassed": sorted(self._bypassed)}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless a state's entries of noise may be loaded; another method's state has none."""
        for name in ("seed", "draws"):
            if name in state:
                entry(state, name, is_count, "a whole number >= 0")
        if "bypassed" in state:
            entry(state, "bypassed", are_names, "a list of parameter names")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; entries are missing in another method's state."""
        self.run.seed, self.draws = state.get("seed", self.run.seed), state.get("draws", 0)
        self._bypassed = set(state.get("bypassed", ()))
        self.layers = {name: layer for name, layer in self.layers.items() if name not in self._bypassed}
        if self.run.weights.attachment is not None:
            self.run.weights.attachment.live_in_evaluation(sorted(self._bypassed & self.run.weights.parameters.keys()))
            self.run.weights.attachment.disable_forward_hooks()
