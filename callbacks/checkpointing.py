"""Save a sparsity callback's state in checkpoints, check a loaded state as a whole, and restore it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter

from lightning_sparse import _checks, elementwise, schedules, step_sizes
from lightning_sparse.callbacks.form import peers_of
from lightning_sparse.callbacks.options import Options
from lightning_sparse.callbacks.progress import choose, fits, saved_values
from lightning_sparse.callbacks.user_warnings import rank_zero_warn
from lightning_sparse.callbacks.weight_averaging import Averages
from lightning_sparse.methods.base import Method
from lightning_sparse.state import are_masks, are_tensors, entry, is_count, is_factor, is_flag, is_share, is_whole, short
from lightning_sparse.step import Clock
from lightning_sparse.support import Support

LATER = ("score", "least_kept", "structure")  # arguments that states of earlier releases do not name
VERSION = 1  # version of the state; files of 0.1 have none
Filed = Callable[[str], Tensor]


class CheckpointState:
    """Collects and restores a callback's state.

    A file holds thresholded weights; the state holds their live values at the zeros (``taken``), so that a resumed run is exact.
    """

    def __init__(self, options: Options, method: Method, support: Support, clock: Clock) -> None:
        self.options, self.method, self.support, self.clock = options, method, support, clock
        self.weights, self.strength, self.clipping, self.sizes = support.weights, support.strength, support.clipping, support.sizes
        self.restored: dict[str, Any] | None = None  # from a file, or from the last fit
        self.applied = False  # it was restored
        self.planned: float | None = None  # the run's length when it was saved

    @property
    def is_waiting(self) -> bool:
        """Return True if a state was loaded and is not restored yet."""
        return self.restored is not None and not self.applied

    def collect(self, filed: Filed, frozen: bool, recipe: Mapping[str, Any], averages: Averages | None) -> dict[str, Any]:
        """Return the state that a resumed run needs.

        ``filed`` returns what the file holds of a parameter; ``frozen`` is True if those values lie in a frozen support.
        """
        live, support, ascent = self.weights.live, self.support, self.strength.target
        taken = {name: elementwise.gather_where(live(name), filed(name) == 0) for name in self.weights.parameters}
        optional = {
            "held": _whole(support.held),
            "cut": _whole(support.cut),
            "squares": _whole(support.squares.means),
            "step_sizes": self.sizes.state_dict(self.weights.parameters),
            "ascent": {} if ascent is None else ascent.state_dict(),
            "drift": self.clock.drift,
            "asked": self.strength.asked if frozen else None,
            "total": float(self.strength.total) if math.isfinite(self.strength.total) else None,
            "averaged": {} if averages is None else averages.pruned_values(),
            "open": self._open() if frozen else {},
        }
        clock = {"step": self.strength.step, "offset": self.clock.offset, "begun": self.clock.begun, "clipped": self.clipping.mean}
        always = {"version": VERSION, "recipe": recipe, "frozen": frozen, "taken": taken}
        return self.method.state_dict() | clock | always | {name: value for name, value in optional.items() if value}

    def _open(self) -> dict[str, Tensor]:
        """Return the weights that are zero and may become non-zero, although the support is frozen: a target asked for fewer zeros."""
        live = self.weights.live
        found = _whole({name: kept & (live(name) == 0) for name, kept in (self.support.frozen or {}).items()})
        return {name: where for name, where in found.items() if bool(where.any())}

    def load(self, state: dict[str, Any]) -> bool:
        """Accept a saved state; return True if it can be restored at once, because the weights are attached."""
        if state:
            self.check(state)
        held = state.get("taken") or state.get("begun")  # absent in a file written before a fit
        self.restored, self.applied = (state if held else None), False
        return self.weights.attachment is not None and self.restored is not None

    def check(self, state: Any) -> None:
        """Raise ValueError, naming the entry, unless ``state`` is what a Sparsifier saves. Nothing is loaded."""
        try:
            self._check(state)
        except ValueError as error:
            raise ValueError(
                f"the checkpoint's state of {self.options.form} is damaged: {error}. Resume from another file, or load this one's "
                "weights into the module and fit without ckpt_path"
            ) from None

    def _check(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"it must be a dict, got {short(state)}")
        for name, (holds, wanted) in _ENTRIES.items():
            if name in _REQUIRED or name in state:
                entry(state, name, holds, wanted)
        known = self.weights.parameters
        for kind in ("held", "cut", "open", "squares") if self.support.structure.elementwise else ("held", "cut", "open"):
            for name, held in state.get(kind, {}).items():
                if name in known and held.shape != known[name].shape:
                    raise ValueError(f"{kind!r} of {name!r} is {short(held)}, the weight has shape {tuple(known[name].shape)}")
        self.method.check_state(state, self._of_method())

    def _of_method(self) -> Mapping[str, Parameter]:
        """Return what the method works on; nothing before it is known, which is of any shape."""
        weights = self.method.run.weights
        waits = weights is self.weights and self.method.takes_groups and not self.support.structure.elementwise
        return {} if waits else weights.parameters

    @torch.no_grad()
    def restore(self, recipe: Mapping[str, Any], averages: Averages | None) -> None:
        """Restore the loaded state; ``recipe`` describes the callback that continues."""
        state: dict[str, Any] = self.restored or {}
        averaged = state.get("averaged", state["taken"])
        if averages is None or not averages.saved:  # the module has loaded WeightAveraging's average
            state = state | {"taken": averaged}
        self._check_fits(state, recipe)
        self.method.check_state(state, self._of_method())
        warn_settings_changed(recipe, state, self.strength.target is not None)
        self.applied, part = True, self.weights.part
        self.support.held |= {name: part(name, held) for name, held in state.get("held", {}).items() if name in self.support.held}
        self.support.cut = {name: part(name, where) for name, where in state.get("cut", {}).items() if name in self.weights.parameters}
        self.support.squares.restore(state.get("squares", {}), self.support.groups)
        self.strength.step, self.clock.begun, self.clock.drift = state["step"], state.get("begun", True), state.get("drift", 0)
        self.planned = state.get("total")
        self.clock.begin_at(state["offset"])
        self.clipping.resume(state.get("clipped", 1.0))
        self.sizes.load_state_dict(state.get("step_sizes", {}), self.weights.parameters)
        if self.strength.target is not None and "ascent" in state:
            self.strength.target.load_state_dict(state["ascent"], saved_target(state))
        if averages is not None:
            averages.restore_values(averaged)
        for name, taken in state["taken"].items():
            elementwise.scatter_to_zeros_(self.weights.parameters[name], taken)
        if state["frozen"]:
            known, may_grow = self.weights.parameters, state.get("open", {})
            self.support.freeze_zeros({name: part(name, where) for name, where in may_grow.items() if name in known})
            self.strength.asked = None if saved_target(state) == self.options.target_sparsity else saved_target(state)
        else:
            self.support.frozen = None
        self.method.load_state_dict(state)

    def _check_fits(self, state: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
        """Raise ValueError for a state of another selection or model."""
        known = self.weights.parameters
        if set(state["taken"]) != set(known):
            odd = sorted(set(state["taken"]) ^ set(known))
            old = _with_later_arguments(state.get("recipe"), recipe)
            before, now = (_as_text(one["init_args"].get("structure")) for one in ((old if _is_recipe(old) else recipe), recipe))
            if before != now:
                raise ValueError(
                    f"the checkpoint's {self.options.form} was written with structure={before}, and this one has structure={now}. "
                    "Resume with the same structure; to train with another one, load the weights into the module and fit without ckpt_path"
                )
            raise ValueError(
                f"the checkpoint's {self.options.form} was written for other parameters; they differ in {odd[:5]}"
                f"{_checks.closest(odd[0], known)}. Resume with the same model and selection"
            )
        for name, taken in state["taken"].items():
            parameter = known[name].detach()
            zeros = int(elementwise.sum_shards((elementwise.local_part(parameter) == 0).sum(), parameter))
            if taken.numel() != zeros:
                raise ValueError(
                    f"the checkpoint keeps {taken.numel()} thresholded weights of {name!r}, but the loaded file has {zeros} zeros there: "
                    "its weights were changed after it was written"
                )


def _whole(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: elementwise.full_tensor(where).cpu() for name, where in masks.items()}


def callbacks_of(checkpoint: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the callbacks' states in a checkpoint; raise ValueError if they are not a dict."""
    states = checkpoint.get("callbacks") or {}
    if not isinstance(states, dict):
        raise ValueError(f"the checkpoint is damaged: its 'callbacks' must be a dict by state key, got {short(states)}")
    return states


def own_state(checkpoint: Mapping[str, Any], key: str, options: Options, trainer: Trainer, module: LightningModule) -> Any:
    """Return the state under ``key``, else that of another sparsity callback for the same parameters; empty if there is none.

    Of another selection's states it is said that they are not used.
    """
    states = callbacks_of(checkpoint)
    others = (state for state in states.values() if fits(options.select, trainer, module, state))
    found = states[key] if key in states else next(others, {})
    if not found:
        _report_other_selection(states, options, trainer, module)
    return found


def _report_other_selection(states: Mapping[str, Any], options: Options, trainer: Trainer, module: LightningModule) -> None:
    """Report, for a fit resumed by a callback that has no state in the file, a state of another selection that it does not continue.

    Raises ValueError for a state of the callback's class: its ramp, its zeros and the values below them would be lost. Warns once of one of
    another class.
    """
    peers = peers_of(trainer)
    kept = {key: state for key, state in states.items() if key not in {peer.state_key for peer in peers}}
    for state in kept.values() if trainer.state.fn == "fit" else ():
        if any(fits(peer.options.select, trainer, module, state) for peer in peers):
            continue
        if not saved_values(state) or not _is_recipe(recipe := state.get("recipe")) or not isinstance(recipe["init_args"], dict):
            continue
        form, own_form = recipe["class_path"], options.form
        before, now = (_selection(select) for select in (recipe["init_args"].get("select"), options.select))
        odd = sorted(set(saved_values(state)) ^ set(choose(options.select, trainer, module)))
        differs = f"{before}, and {own_form} has {now}: they differ in {odd[:5]}{_checks.more(odd)}"
        if form == own_form and before != now and odd:
            raise ValueError(
                f"the checkpoint's {form} was written with {differs}. Resume with the same selection; to train another one, load the "
                "weights into the module and fit it without ckpt_path"
            )
        if form != own_form and options is next((peer.options for peer in peers if not states.get(peer.state_key)), None):
            rank_zero_warn(
                f"the state of {form} in the checkpoint was not used, because it was written with {differs}. {own_form} starts anew from "
                "the loaded weights; to continue the ramp and the zeros, resume with the same selection"
            )


def _selection(patterns: Any) -> str:
    return "the default select" if patterns is None else f"select={patterns}"


# -- checks of the entries -------------------------------------------------------------------------------------------------


def _are_taken(value: Any) -> bool:
    return are_tensors(value) and all(taken.dim() == 1 for taken in value.values())


def _is_recipe(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_path"), str) and _has_arguments(value)


def _has_arguments(value: Any) -> bool:
    if not isinstance(value, dict):
        return True
    return ("class_path" not in value or isinstance(value.get("init_args"), dict)) and all(map(_has_arguments, value.values()))


_TAKEN = (_are_taken, "a dict of finite 1-dimensional floating tensors by parameter name")
_MASKS = (are_masks, "a dict of boolean tensors by parameter name")
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "version": (lambda value: is_count(value) and value <= VERSION, f"a whole number up to {VERSION}, or the file is of a later release"),
    "step": (is_count, "a whole number >= 0"),
    "offset": (is_count, "a whole number >= 0"),
    "frozen": (is_flag, "True or False"),
    "taken": _TAKEN,
    "begun": (is_flag, "True or False"),
    "drift": (is_whole, "a whole number"),
    "asked": (is_share, "a number in [0, 1]"),
    "averaged": _TAKEN,
    "held": _MASKS,
    "cut": _MASKS,
    "open": _MASKS,
    "squares": (are_tensors, "a dict of finite floating tensors by parameter name"),
    "total": (is_factor, "a finite number > 0"),
    "clipped": (is_factor, "a finite number > 0"),
    "ascent": (schedules.is_state, "a dict of finite numbers 'log_lam', 'error' and 't'"),
    "step_sizes": (step_sizes.are_step_sizes, "a dict of the tensors of measured step sizes by parameter name"),
    "recipe": (_is_recipe, "a dict with 'class_path' and 'init_args'"),
}
_REQUIRED = ("step", "offset", "frozen", "taken")  # the others were added later, or depend on an option


# -- changed settings ------------------------------------------------------------------------------------------------------

_MISSING = "nothing"


def warn_settings_changed(recipe: Mapping[str, Any], state: Mapping[str, Any], regrows: bool) -> None:
    """Warn, once on rank 0, of every argument that differs from the checkpoint's; the new ones apply from its step on.

    ``regrows``: a lower target brings weights back.
    """
    old = _with_later_arguments(state.get("recipe"), recipe)
    if not isinstance(old, dict) or old == recipe:
        return
    changes, (before, now) = differences(old, recipe), (saved_target(state), saved_target({"recipe": recipe}))
    if before != now and not any("sparsity: " in change for change in changes):  # where another callback names it otherwise
        changes.append(f"target_sparsity: {before} -> {now}")
    applies = "The new one applies from here on; shares (warm-up, freeze) are of the new run's length"
    if before is not None and now is not None and now < before:
        applies += f". If more than {now:g} of the weights are zero already, "
        applies += "those above it are trained again" if regrows else "they stay zero, and the target is not met"
    if state.get("frozen"):
        target = saved_target(state)
        kept = "" if target is None else f"; sparsity/target stays {target:g}, for which they were chosen"
        applies = (
            f"Its support is frozen already, so the same weights stay zero whatever the new one says{kept}. To choose new zeros, load "
            "the weights into the module and fit it with a new Trainer without ckpt_path"
        )
    rank_zero_warn(
        f"resuming at step {state['step']} of the checkpoint's {old.get('class_path')} with other settings: {', '.join(changes)}. {applies}"
    )


def _with_later_arguments(old: Any, new: Mapping[str, Any]) -> Any:
    """Return a saved recipe with the present values of the arguments that its release did not have."""
    if not isinstance(old, dict) or not isinstance(old.get("init_args"), dict):
        return old
    later = {name: new["init_args"][name] for name in LATER if name in new["init_args"] and name not in old["init_args"]}
    structure = old["init_args"].get("structure")
    if isinstance(structure, dict) and structure.get("class_path") == "Channels":
        later["structure"] = structure | {"init_args": {"cost": "weights"} | structure.get("init_args", {})}
    return old | {"init_args": old["init_args"] | later}


def saved_target(state: Mapping[str, Any]) -> float | None:
    """Return the share of zeros that a checkpoint's callback was asked for in the end; None where it had no target."""
    recipe = state.get("recipe")
    arguments = recipe.get("init_args") if isinstance(recipe, dict) else None
    found = [state.get("asked"), *((arguments or {}).get(name) for name in ("target_sparsity", "sparsity"))]
    return next((float(share) for share in found if isinstance(share, (int, float))), None)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return ``path: old -> new`` for each leaf that differs, without ``class_path`` and ``init_args`` in the paths."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("class_path") == new.get("class_path"):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key, _MISSING), new.get(key, _MISSING), _below(path, key))]
    if isinstance(old, dict) and isinstance(new, dict) and not path:  # another callback, whose own arguments are not listed as changes
        shared = [key for key in old["init_args"] if key in new["init_args"]]
        arguments = [line for key in shared for line in differences(old["init_args"][key], new["init_args"][key], key)]
        return [f"form: {old['class_path']} -> {new['class_path']}", *arguments]
    return [] if old == new else [f"{path}: {_as_text(old)} -> {_as_text(new)}"]


def _below(path: str, key: str) -> str:
    return path if key in ("class_path", "init_args") else f"{path}.{key}" if path else key


def _as_text(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={_as_text(part)}" for name, part in value.get("init_args", {}).items())
        return f"{value['class_path']}({arguments})"
    return str(value)
