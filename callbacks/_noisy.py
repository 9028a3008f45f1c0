"""Noisy: a form whose batches are run with noise, on the weights or on the outputs of their layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sparse import attach, elementwise
from lightning_sparse.callbacks import _states
from lightning_sparse.callbacks.base import Sparsifier, is_skipped


class Noisy(Sparsifier):
    """When noise is drawn, from which generator, and where: what is drawn is the subclass's.

    Noise goes onto the weights at a batch's start, or onto the outputs of ``local`` layers as their forwards come; where a
    layer's forward is bypassed or compiled, onto its weights all the same. Forwards in evaluation mode without gradients
    have none, as with dropout.
    """

    takes_parts = False
    whole_because = (
        "FSDP2 gathers the weights anew for each forward and backward and adds up their gradients before a mask of this process could "
        "multiply them"
    )

    @property
    def local(self) -> bool:
        """Noise on the outputs of the layers whose input and output are seen, where the form wants it there."""
        return False

    def _forget(self) -> None:
        super()._forget()
        self._seed, self._rank, self._draws = 0, 0, 0
        self._local: dict[str, nn.Module] = {}
        self._loud = False  # this batch's noise on outputs is in force
        self._calls: dict[str, int] = {}  # of each layer's forward since the noise was drawn
        self._heard: set[str] = set()  # local layers whose forward ran in this batch
        self._used: set[str] = set()  # those whose weight got a gradient in it
        self._bypassed: set[str] = set()  # those whose weight is used without their forward: it gets the noise
        self._trained: set[str] = set()  # parameters that are trained in this batch, though toggled off for a while

    # -- what a subclass draws --------------------------------------------------------------------------------------------

    def begin_batch(self, batch: Any) -> None:
        """Before the first draw for a batch; nothing by default."""

    def begin_draw(self) -> None:
        """Before the noise of a batch is drawn; nothing by default."""

    def draw_all(self, names: list[str], attachment: attach.Attachment) -> None:
        """Put noisy weights into the data of these parameters, by default one after the other."""
        numbers = {name: number for number, name in enumerate(self.parameters)}
        for name in names:
            self.draw_weights(name, attachment, self._stream(numbers[name], -1))

    def draw_weights(self, name: str, attachment: attach.Attachment, generator: torch.Generator) -> None:
        """Put noisy weights into a parameter's data."""
        raise NotImplementedError

    def prepare_outputs(self, name: str) -> None:
        """What a local layer's noise needs from the weights at the batch's start; nothing by default."""

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        """The noise on a local layer's output for the input ``x``."""
        raise NotImplementedError

    # -- life cycle -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seed = trainer.strategy.broadcast(torch.initial_seed())  # a file holds one for all ranks
        self._rank, self._draws, self._bypassed = trainer.global_rank, 0, set()
        super().on_fit_start(trainer, pl_module)

    def _install(self, pl_module: LightningModule, attachment: attach.Attachment) -> None:
        super()._install(pl_module, attachment)
        known = attach.layers(pl_module, self.parameters) if self.local else {}
        self._local = {name: layer for name, layer in known.items() if name not in self._bypassed}
        for name, layer in self._local.items():
            attachment.on_forward(layer, partial(self._blur, name))
            attachment.on_gradient(name, partial(self._note_use, name))
        attachment.mask_gradients()
        attachment.bare_in_evaluation(name for name in self.parameters if name not in self._local)
        attachment.ignore()  # until a batch begins

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        super()._before(optimizer)
        if self._manual and self.attachment is not None and not is_skipped(optimizer):  # else the noise goes on to the next forward
            self.attachment.restore()

    def _stream(self, index: int, call: int = 0) -> torch.Generator:
        """The draws of one parameter (and call of its layer) in this batch, the same again in a recomputed forward."""
        device = next(iter(self.parameters.values())).device
        return elementwise.generator_for(device, self._seed, self._rank, self._draws, index, call)

    def _blur(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self._loud or name not in self._local or name not in self._trained:
            return output
        if not layer.training and not torch.is_grad_enabled():
            return output
        # two calls inside one checkpointed block would be recomputed first call first, and swap their draws
        again = torch._C._current_graph_task_id() != -1  # recomputed in backward, last call first
        call = self._calls.get(name, 0) - (1 if again else 0)
        self._calls[name] = call if again else call + 1
        self._heard.add(name)
        return output + self.draw_outputs(name, layer, inputs[0], self._stream(list(self.parameters).index(name), call))

    def _note_use(self, name: str, grad: Tensor) -> None:
        if self._loud:
            self._used.add(name)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._heard, self._used = set(), set()
        if self.attachment is not None and not self.frozen and self.parameters:
            self.attachment.listen()
            self._trained = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
            self.begin_batch(batch)
            self._draw(self.attachment)

    @torch.no_grad()
    def _draw(self, attachment: attach.Attachment) -> None:
        """New noise: on the weights at once, on the outputs of local layers as their forwards come."""
        self._draws, self._calls, self._loud = self._draws + 1, {}, True
        self.begin_draw()
        for name in self._local:
            if name in self._trained:
                self.prepare_outputs(name)
        self.draw_all([name for name in self.parameters if name in self._trained and name not in self._local], attachment)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._manual:  # else more forwards of this batch may come before a step
            self._end_batch()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._manual and self.attachment is not None and self.parameters:  # the next forward of this batch is noisy too
            self._draw(self.attachment)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._end_batch()  # a step that returned no loss had no backward
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _end_batch(self) -> None:
        unseen = self._used - self._heard  # a layer whose forward is bypassed, or compiled before this run, is never asked
        if unseen:
            self._bypassed |= unseen
            self._local = {name: layer for name, layer in self._local.items() if name not in unseen}
        if self.attachment is not None:
            self.attachment.restore()
            self.attachment.bare_in_evaluation(sorted(unseen))
            self.attachment.ignore()
        self._calls, self._loud = {}, False

    def _release(self) -> None:
        super()._release()
        if self.attachment is not None:
            self.attachment.ignore()
        self._calls, self._loud = {}, False

    # -- state --------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        noise = {"seed": self._seed, "draws": self._draws, "bypassed": sorted(self._bypassed)}
        return noise | super().state_dict()  # which is the restored one before a fit

    def check_state(self, state: Any) -> None:
        super().check_state(state)
        for name in ("seed", "draws"):  # another form's state has none
            if name in state:
                _states.entry(self, state, name, _states.is_count, "a whole number >= 0")
        if "bypassed" in state:
            _states.entry(self, state, "bypassed", _states.are_names, "a list of parameter names")

    def _resume(self, state: dict[str, Any]) -> None:
        self._seed, self._draws = state.get("seed", self._seed), state.get("draws", 0)
        self._bypassed = set(state.get("bypassed", ()))
        self._local = {name: layer for name, layer in self._local.items() if name not in self._bypassed}
        if self.attachment is not None:
            self.attachment.bare_in_evaluation(sorted(self._bypassed & self.parameters.keys()))
            self.attachment.ignore()
        super()._resume(state)
