"""Saved: what a checkpoint holds for a form, and how a run goes on from it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_sparse import archive, attach, elementwise
from lightning_sparse.callbacks import _endings, _joining, _ranks, _recipes, _refusals, _states
from lightning_sparse.callbacks._supported import Supported


class Saved(Supported):
    """A form whose runs are resumed exactly."""

    def _begin_at(self, offset: int) -> None:
        """The callback's own clock starts ``offset`` steps into the run."""
        self._offset, self.total = offset, max(self._whole - offset, 1)

    @property
    def _averaged(self) -> bool:
        """An average takes the weights' place in validation and in files."""
        return self._averages is not None and bool(self._averages.saved)

    @property
    def _finished(self) -> bool:
        """Training has ended, and not by an exception."""
        return self._ending is not None and not self._ending.failed

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, and the live values where the file holds the threshold's zeros."""
        if self._restored is not None and not self._applied:  # a tuner saves before on_fit_start
            return self._restored
        taken = {name: elementwise.gather_where(self._live(name), _endings.filed(self, name) == 0) for name in self.parameters}
        clock: dict[str, Any] = {"step": self.step, "offset": self._offset, "begun": self._begun}
        averaged = {} if self._averages is None else self._averages.taken()
        held = {name: elementwise.full_tensor(where).cpu() for name, where in self.held.items()}
        clock |= {"recipe": self.recipe(), "clipped": self._clipping.mean} | ({"held": held} if held else {})
        sizes = self._step_sizes.state_dict(self.parameters)
        clock |= {"step_sizes": sizes} if sizes else {}
        clock |= {} if self.ascent is None else {"ascent": self.ascent.state_dict()}
        clock |= {"drift": self._drift} if self._drift else {}
        clock |= {"total": float(self.total)} if math.isfinite(self.total) else {}
        clock |= {"cut": {name: elementwise.full_tensor(where).cpu() for name, where in self.cut.items()}} if self.cut else {}
        return clock | {"frozen": _endings.is_frozen(self), "taken": taken} | ({"averaged": averaged} if averaged else {})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        waiting = self._restored is not None and not self._applied
        gone = self.attachment is None and not self._finished  # after an exception: the views are gone, the state is not
        if gone and self.parameters and not waiting:
            attach.write_view(checkpoint["state_dict"], pl_module, self.parameters, partial(_endings.filed, self))
        _endings.leave_out(self, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        _ranks.on_rank_zero(trainer, partial(archive.check, trainer.ckpt_path))
        states = _states.callbacks_of(checkpoint)
        others = (state for state in states.values() if _joining.fits(self, trainer, pl_module, state))
        own = states[self.state_key] if self.state_key in states else next(others, {})
        if self.attachment is None:
            self.parameters = _joining.choose(self, trainer, pl_module, own)
        if self.state_key not in states:  # another form's state of the same parameters carries this one on
            self.load_state_dict(own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.check_state(state_dict)
        held = state_dict.get("taken") or state_dict.get("begun")  # not in a file that was written before a fit
        self._restored, self._applied = (state_dict if held else None), False
        if self.attachment is not None and self._restored is not None:
            self._resume(self._restored)

    def check_state(self, state: Any) -> None:
        """Raise ValueError, naming the entry, unless ``state`` is one that this form saves; nothing is used of it yet."""
        _states.check(self, state)

    @torch.no_grad()
    def _resume(self, state: dict[str, Any]) -> None:
        averaged = state.get("averaged", state["taken"])
        if not self._averaged:  # of a file written beside WeightAveraging the module has loaded the average
            state = state | {"taken": averaged}
        _refusals.check_state(self, state)
        _recipes.say_changes(self, state)
        self.held |= {name: self._part(name, held) for name, held in state.get("held", {}).items() if name in self.held}
        self.step, self._begun, self._applied = state["step"], state.get("begun", True), True
        self._drift = state.get("drift", 0)
        self.cut = {name: self._part(name, where) for name, where in state.get("cut", {}).items() if name in self.parameters}
        self._planned = state.get("total")
        self._begin_at(state["offset"])
        self._clipping.resume(state.get("clipped", 1.0))
        self._step_sizes.load_state_dict(state.get("step_sizes", {}), self.parameters)
        if self.ascent is not None and "ascent" in state:
            self.ascent.load_state_dict(state["ascent"])
        if self._averages is not None:
            self._averages.give_back(averaged)
        for name, taken in state["taken"].items():
            elementwise.scatter_to_zeros_(self.parameters[name], taken)
        frozen = {name: parameter.detach() != 0 for name, parameter in self.parameters.items()}
        self.support = frozen if state["frozen"] else None
