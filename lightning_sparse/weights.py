"""Store the selected weights of a user's module (live, masked, thresholded), the files' view of them, and their optimisers.

Hooks and replaced data are all removed again by :meth:`Attachment.detach`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sparse import elementwise
from lightning_sparse.layers import uncompiled
from lightning_sparse.select import owners

View = Callable[[str], Tensor]
Member = tuple[str, Parameter, dict[str, Any]]  # name, parameter, group
Place = tuple[Optimizer, int]  # an optimiser and the number of its group


class _Hook:
    """A hook that copies and pickles of the module do not include."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if self.function else None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _ForwardHook:
    """A hook on a module's forward that is added and removed at every batch, directly in the module's dicts because that is fast."""

    def __init__(self, hooks: dict[int, Any], with_names: dict[int, bool] | None, hook: _Hook) -> None:
        self.hooks, self.with_names, self.hook = hooks, with_names, hook
        self.key = RemovableHandle(hooks).id

    def enable(self) -> None:
        self.hooks[self.key] = self.hook
        if self.with_names is not None:
            self.with_names[self.key] = True

    def disable(self) -> None:
        self.hooks.pop(self.key, None)
        if self.with_names is not None:
            self.with_names.pop(self.key, None)


class Attachment:
    """Stores the live weights while the parameters' data are masked or thresholded, and writes a view of them to state dicts.

    ``view(name)`` returns what ``state_dict()`` and evaluation use for a selected parameter. Between :meth:`multiply` or
    :meth:`show` and :meth:`restore` the data differ from the live weights; keys, parameter objects and the module's
    class never change.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], view: View) -> None:
        self.parameters, self.view = dict(parameters), view
        self._live: dict[str, Tensor] = {}
        self._replaced: set[str] = set()  # parameters whose data are another tensor; the live weights keep their memory
        self._backward: dict[str, Callable[[Tensor], Tensor]] = {}
        self._handles: list[Any] = []
        self._around: list[Any] = []  # hooks of show_in_forwards
        self._depth, self._shows = 0, False  # depth of nested forwards; the outermost one shows the view
        self._forward_hooks: list[_ForwardHook] = []
        self._swapped: list[tuple[nn.Module, dict[str, Tensor]]] = []  # calls that use live weights, and the noisy data they replace
        self._units = elementwise.fsdp_modules(module)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        open_to_hooks = {id(part) for part in uncompiled(module) if not isinstance(part, torch.jit.ScriptModule)}
        self._users: dict[str, list[nn.Module]] = {}  # modules whose forwards use each weight
        for key, owner, attribute, parameter in owners(module):
            if id(parameter) in names:
                self._add_view(owner, attribute, names[id(parameter)])
                above = module.get_submodule(".".join(key.split(".")[:-2]))  # attention uses its projection's weight, not its forward
                self._users.setdefault(names[id(parameter)], []).extend(user for user in (owner, above) if id(user) in open_to_hooks)

    def _add_view(self, owner: nn.Module, attribute: str, name: str) -> None:
        def replace(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
            if not isinstance(state.get(prefix + attribute), nn.Parameter):  # keep_vars=True returns the parameter
                state[prefix + attribute] = self.view(name)

        self._handles.append(owner.register_state_dict_post_hook(_Hook(replace)))

    def live(self, name: str) -> Tensor:
        """Return the weights that the optimiser owns, whatever the parameter's data are."""
        return self._live[name] if name in self._live else self.parameters[name].detach()

    @torch.no_grad()
    def substitute(self, name: str, value: Tensor, backward: Callable[[Tensor], Tensor] | None = None) -> None:
        """Replace the parameter's data by ``value`` until :meth:`restore`; ``backward`` converts its gradient to the live weights'."""
        self._replace_data(name, value, backward)

    @torch.no_grad()
    def multiply(self, name: str, mask: Tensor, product: Tensor | None = None) -> None:
        """Set the parameter's data to ``live * mask`` (or a known ``product``) and multiply its gradient by ``mask``."""
        self._replace_data(name, self.live(name) * mask if product is None else product, lambda grad: grad * mask)

    def _replace_data(self, name: str, value: Tensor, backward: Callable[[Tensor], Tensor] | None) -> None:
        """Make ``value``, in the live weights' type and memory layout, the parameter's data, without copying the live weights."""
        live = self._live.setdefault(name, self.parameters[name].detach())  # a skipped batch may have left its mask
        alike = value.dtype == live.dtype and value.stride() == live.stride() and value.device == live.device
        self.parameters[name].data = value if alike else torch.empty_like(live).copy_(value)
        self._replaced.add(name)
        if backward is not None:
            self._backward[name] = backward

    @property
    def shown(self) -> bool:
        """Return True while the parameters' data differ from the live weights."""
        return bool(self._live)

    @torch.no_grad()
    def show(self) -> None:
        """Write the view into every parameter's data until :meth:`restore`."""
        self.restore()
        for name, parameter in self.parameters.items():
            shown = self.view(name)
            self._live[name] = parameter.detach().clone()
            parameter.data.copy_(shown)
        self.refresh()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the live weights, bit for bit."""
        self._swapped.clear()
        for name, live in self._live.items():
            if name in self._replaced:
                self.parameters[name].data = live
            else:
                self.parameters[name].data.copy_(live)
        if self._live:
            self.refresh()
        self._live.clear()
        self._replaced.clear()
        self._backward.clear()

    def changed_by_others(self) -> list[str]:
        """Return the names of shown parameters whose data are neither live weights nor zeros, because others wrote there."""
        live = {name: elementwise.local_part(w) for name, w in self._live.items() if name not in self._replaced}
        data = {name: elementwise.local_part(self.parameters[name].detach()) for name in live}
        return [name for name, w in live.items() if not bool(((data[name] == w) | (data[name] == 0)).all())]

    def show_in_forwards(self, module: nn.Module) -> None:
        """Show the view only during each outermost forward inside ``module``, until :meth:`end_forwards`.

        Compiled parts are left out, because they accept no new hooks, and FSDP2, because it gathers weights in hooks of its own.
        """
        self.end_forwards()
        for part in [] if self._units else uncompiled(module):
            if isinstance(part, torch.jit.ScriptModule):
                continue
            before = part.register_forward_pre_hook(_Hook(lambda *_: self._enter()))
            self._around += [before, part.register_forward_hook(_Hook(lambda *_: self._leave()), always_call=True)]

    def end_forwards(self) -> None:
        """Remove the hooks of :meth:`show_in_forwards`."""
        for handle in self._around:
            handle.remove()
        self._around, self._depth, self._shows = [], 0, False

    def _enter(self) -> None:
        if self._depth == 0 and not self.shown:
            self.show()
            self._shows = True
        self._depth += 1

    def _leave(self) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0 and self._shows:
            self.restore()
            self._shows = False

    def refresh(self) -> None:
        """Make the next forward use the parameters' current data, because FSDP2 keeps what it gathered for an evaluation."""
        for unit in self._units:
            unit.reshard()

    def mask_gradients(self) -> None:
        """Multiply each parameter's gradient by the mask in force, before other hooks see it."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(_Hook(lambda grad, name=name: self._scaled(name, grad))))

    def _scaled(self, name: str, grad: Tensor) -> Tensor | None:
        return self._backward[name](grad) if name in self._backward else None

    def on_gradient(self, name: str, function: Callable[[Tensor], None]) -> None:
        """Call ``function(gradient)`` with each backward's gradient of a parameter, before a mask multiplies it."""
        if self.parameters[name].requires_grad:
            self._handles.append(self.parameters[name].register_hook(_Hook(function)))

    def on_forward(self, layer: nn.Module, function: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> None:
        """Call ``function(layer, inputs, output)`` after each forward of ``layer``; its result replaces the output.

        ``inputs`` holds the positional arguments, then the keyword arguments.
        """

        def called(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            return function(layer, (*inputs, *named.values()) if named else inputs, output)

        self._add_forward_hook(_ForwardHook(layer._forward_hooks, layer._forward_hooks_with_kwargs, _Hook(called)))

    def live_in_evaluation(self, names: Iterable[str]) -> None:
        """Use the live weights in evaluation forwards without gradients, also while masked weights are in force.

        Compiled parts are left out, because a hook would break their graphs.
        """
        users: dict[nn.Module, list[str]] = {}
        for name in names:
            for user in self._users.get(name, ()):
                users.setdefault(user, []).append(name)
        for user, used in users.items():
            before, after = _Hook(lambda user, _, used=used: self._use_live(user, used)), _Hook(lambda user, *_: self._use_noisy(user))
            self._add_forward_hook(_ForwardHook(user._forward_pre_hooks, None, before))
            self._add_forward_hook(_ForwardHook(user._forward_hooks, None, after))

    def _use_live(self, user: nn.Module, names: list[str]) -> None:
        if self._live and not user.training and not torch.is_grad_enabled():
            swapped = {name for _, data in self._swapped for name in data}
            noisy = {name: self.parameters[name].data for name in names if name in self._replaced and name not in swapped}
            for name in noisy:
                self.parameters[name].data = self._live[name]
            self._swapped.append((user, noisy))

    def _use_noisy(self, user: nn.Module) -> None:
        if self._swapped and self._swapped[-1][0] is user:
            for name, data in self._swapped.pop()[1].items():
                self.parameters[name].data = data

    def _add_forward_hook(self, hook: _ForwardHook) -> None:
        hook.enable()
        self._forward_hooks.append(hook)

    def enable_forward_hooks(self) -> None:
        """Enable the hooks on forwards again, after :meth:`disable_forward_hooks`."""
        for hook in self._forward_hooks:
            hook.enable()

    def disable_forward_hooks(self) -> None:
        """Disable the hooks on forwards until :meth:`enable_forward_hooks`, because scripting would compile them."""
        for hook in self._forward_hooks:
            hook.disable()

    def detach(self) -> None:
        """Restore the live weights and remove all hooks."""
        self.end_forwards()
        self.restore()
        self.disable_forward_hooks()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forward_hooks.clear()


class WeightStore:
    """Stores the selected weights by name, which optimiser updates each, and their live values during a run."""

    def __init__(self) -> None:
        self.parameters: dict[str, Parameter] = {}
        self.attachment: Attachment | None = None
        self.optimizers: list[Optimizer] = []  # those that update selected weights
        self.places: dict[str, Place] = {}
        self._members: dict[int, tuple[tuple[Any, ...], list[Member]]] = {}  # by optimiser, with a stamp that changes with its groups

    def attach(self, module: nn.Module, optimizers: list[Optimizer], view: View) -> Attachment:
        """Attach to ``module`` and record the places in ``optimizers``; called again when parameters become trainable."""
        self._members = {}
        self.optimizers = [optimizer for optimizer in optimizers if self.members(optimizer)] or optimizers[:1]
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        found = ((o, i, p) for o in self.optimizers for i, group in enumerate(o.param_groups) for p in group["params"])
        self.places = {names[id(p)]: (o, i) for o, i, p in found if id(p) in names}  # numbers: loading a state replaces groups
        self.attachment = Attachment(module, self.parameters, view)
        return self.attachment

    def members(self, optimizer: Optimizer) -> list[Member]:
        """Return (name, parameter, group) of each selected parameter that ``optimizer`` updates."""
        stamp = (len(self.parameters), *((id(group), len(group["params"])) for group in optimizer.param_groups))
        known = self._members.get(id(optimizer))
        if known is not None and known[0] == stamp:
            return known[1]
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        # members hold their groups, so that no group's id is reused while they are cached
        found = [(names[id(p)], p, group) for group in optimizer.param_groups for p in group["params"] if id(p) in names]
        self._members[id(optimizer)] = (stamp, found)
        return found

    def trainable(self, optimizers: Iterable[Optimizer]) -> tuple[int, ...]:
        """Return numbers that change when parameters become trainable: groups per optimiser, and trainable selected parameters."""
        groups = [len(optimizer.param_groups) for optimizer in optimizers]
        return (*groups, sum(parameter.requires_grad for parameter in self.parameters.values()))

    def live(self, name: str) -> Tensor:
        """Return the weights that the optimiser owns, whatever the parameter's data are."""
        return self.parameters[name].detach() if self.attachment is None else self.attachment.live(name)

    def all_live(self) -> dict[str, Tensor]:
        """Return the live weights of every parameter, by name."""
        return {name: self.live(name) for name in self.parameters}

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the parameters that have one."""
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def restore(self) -> None:
        """Restore the live weights of the parameters."""
        if self.attachment is not None:
            self.attachment.restore()

    @torch.no_grad()
    def write(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Set the live weights of the named parameters to these values."""
        self.restore()
        for name, value in values:
            self.parameters[name].data.copy_(value)
        if self.attachment is not None:
            self.attachment.refresh()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's part of a tensor that is shaped like a whole parameter."""
        parameter = self.parameters[name]
        return elementwise.shard_like(elementwise.cut_like(whole.to(parameter.device), parameter), parameter)

    def close(self) -> None:
        """Restore the live weights and remove all hooks."""
        if self.attachment is not None:
            self.attachment.detach()
        self.attachment = None

    def forget_optimizers(self) -> None:
        """Drop the references to the optimisers after a fit."""
        self.optimizers, self.places, self._members = [], {}, {}
