"""The only file that touches a user's module: weights replaced for a while, views for files, hooks; all undone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sparse import elementwise
from lightning_sparse.select import owners

View = Callable[[str], Tensor]


class _Hook:
    """A hook that a copy or a pickle of the module does not carry along."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if self.function else None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _Call:
    """A hook on a module's forward that is put on and taken off at every batch: through the module's own dicts, which is quick."""

    def __init__(self, hooks: dict[int, Any], with_names: dict[int, bool] | None, hook: _Hook) -> None:
        self.hooks, self.with_names, self.hook = hooks, with_names, hook
        self.key = RemovableHandle(hooks).id

    def listen(self) -> None:
        self.hooks[self.key] = self.hook
        if self.with_names is not None:
            self.with_names[self.key] = True

    def ignore(self) -> None:
        self.hooks.pop(self.key, None)
        if self.with_names is not None:
            self.with_names.pop(self.key, None)


class Attachment:
    """Holds the live weights while the parameters' data are masked or thresholded, and serves files a view of them.

    ``view(name)`` is what ``state_dict()`` and evaluation see of a selected parameter. Between :meth:`multiply` or
    :meth:`show` and :meth:`restore` the data differ from the live weights; keys, parameter objects and the module's
    class never change.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], view: View) -> None:
        self.parameters, self.view = dict(parameters), view
        self._live: dict[str, Tensor] = {}
        self._aside: set[str] = set()  # of the live weights, those whose own memory was set aside
        self._backward: dict[str, Callable[[Tensor], Tensor]] = {}
        self._handles: list[Any] = []
        self._around: list[Any] = []  # hooks of show_in_forwards
        self._depth, self._shows = 0, False  # of nested forwards; the outermost one shows the view
        self._calls: list[_Call] = []
        self._bare: list[tuple[nn.Module, dict[str, Tensor]]] = []  # noisy data of weights that are live for one call, and whose
        self._units = elementwise.fsdp_modules(module)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        open_to_hooks = {id(part) for part in _uncompiled(module) if not isinstance(part, torch.jit.ScriptModule)}
        self._users: dict[str, list[nn.Module]] = {}  # whose forwards use each weight
        for key, owner, attribute, parameter in owners(module):
            if id(parameter) in names:
                self._serve(owner, attribute, names[id(parameter)])
                above = module.get_submodule(".".join(key.split(".")[:-2]))  # attention uses its projection's weight, not its forward
                self._users.setdefault(names[id(parameter)], []).extend(user for user in (owner, above) if id(user) in open_to_hooks)

    def _serve(self, owner: nn.Module, attribute: str, name: str) -> None:
        def replace(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
            if not isinstance(state.get(prefix + attribute), nn.Parameter):  # keep_vars=True hands out the parameter
                state[prefix + attribute] = self.view(name)

        self._handles.append(owner.register_state_dict_post_hook(_Hook(replace)))

    def live(self, name: str) -> Tensor:
        """The weights that the optimiser owns, whatever the parameter's data are just now."""
        return self._live[name] if name in self._live else self.parameters[name].detach()

    @torch.no_grad()
    def substitute(self, name: str, value: Tensor, backward: Callable[[Tensor], Tensor] | None = None) -> None:
        """Put ``value`` into the parameter's data until :meth:`restore`; ``backward`` turns its gradient into the live weights'."""
        self._set_aside(name, value, backward)

    @torch.no_grad()
    def multiply(self, name: str, mask: Tensor, product: Tensor | None = None) -> None:
        """Put ``live * mask`` (``product``, where it is known) into the parameter's data and ``mask`` before its gradient."""
        self._set_aside(name, self.live(name) * mask if product is None else product, lambda grad: grad * mask)

    def _set_aside(self, name: str, value: Tensor, backward: Callable[[Tensor], Tensor] | None) -> None:
        """``value``, in the live weights' type and order in memory, becomes the parameter's data, with no copy of them."""
        live = self._live.setdefault(name, self.parameters[name].detach())  # a batch that was skipped left its mask behind
        alike = value.dtype == live.dtype and value.stride() == live.stride() and value.device == live.device
        self.parameters[name].data = value if alike else torch.empty_like(live).copy_(value)
        self._aside.add(name)
        if backward is not None:
            self._backward[name] = backward

    @property
    def shown(self) -> bool:
        """The parameters' data differ from the live weights just now."""
        return bool(self._live)

    @torch.no_grad()
    def show(self) -> None:
        """Put the view into every parameter's data, until :meth:`restore`."""
        self.restore()
        for name, parameter in self.parameters.items():
            shown = self.view(name)
            self._live[name] = parameter.detach().clone()
            parameter.data.copy_(shown)
        self.renew()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the live weights back, bit for bit."""
        self._bare.clear()
        for name, live in self._live.items():
            if name in self._aside:
                self.parameters[name].data = live
            else:
                self.parameters[name].data.copy_(live)
        if self._live:
            self.renew()
        self._live.clear()
        self._aside.clear()
        self._backward.clear()

    def altered(self) -> list[str]:
        """Names of shown parameters whose data are neither live weights nor zeros any more: another wrote there."""
        live = {name: elementwise.local_part(w) for name, w in self._live.items() if name not in self._aside}
        data = {name: elementwise.local_part(self.parameters[name].detach()) for name in live}
        return [name for name, w in live.items() if not bool(((data[name] == w) | (data[name] == 0)).all())]

    def show_in_forwards(self, module: nn.Module) -> None:
        """Show the view during each outermost forward inside ``module``, and only there, until :meth:`end_forwards`.

        Compiled parts are left out, because they take no new hooks, and so is FSDP2, which gathers weights in hooks of its own.
        """
        self.end_forwards()
        for part in [] if self._units else _uncompiled(module):
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

    def renew(self) -> None:
        """The next forward uses the parameters' data as they are now: FSDP2 keeps what it gathered for an evaluation."""
        for unit in self._units:
            unit.reshard()

    def mask_gradients(self) -> None:
        """Let each parameter's gradient be multiplied by the mask in force, before anything else sees it."""
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
        """Call ``function(layer, inputs, output)`` after each forward of ``layer``; what it returns replaces the output.

        ``inputs`` also holds what the layer was given by keyword, after what it was given by position.
        """

        def called(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            return function(layer, (*inputs, *named.values()) if named else inputs, output)

        self._add_call(_Call(layer._forward_hooks, layer._forward_hooks_with_kwargs, _Hook(called)))

    def bare_in_evaluation(self, names: Iterable[str]) -> None:
        """Let forwards in evaluation mode without gradients use these weights as they live, also while masked ones are in force.

        Not in compiled parts, whose graphs a hook would break.
        """
        users: dict[nn.Module, list[str]] = {}
        for name in names:
            for user in self._users.get(name, ()):
                users.setdefault(user, []).append(name)
        for user, used in users.items():
            before, after = _Hook(lambda user, _, used=used: self._lay_bare(user, used)), _Hook(lambda user, *_: self._cover(user))
            self._add_call(_Call(user._forward_pre_hooks, None, before))
            self._add_call(_Call(user._forward_hooks, None, after))

    def _lay_bare(self, user: nn.Module, names: list[str]) -> None:
        if self._live and not user.training and not torch.is_grad_enabled():
            bare = {name for _, laid in self._bare for name in laid}
            noisy = {name: self.parameters[name].data for name in names if name in self._aside and name not in bare}
            for name in noisy:
                self.parameters[name].data = self._live[name]
            self._bare.append((user, noisy))

    def _cover(self, user: nn.Module) -> None:
        if self._bare and self._bare[-1][0] is user:
            for name, data in self._bare.pop()[1].items():
                self.parameters[name].data = data

    def _add_call(self, call: _Call) -> None:
        call.listen()
        self._calls.append(call)

    def listen(self) -> None:
        """Let the hooks on forwards be called again, after :meth:`ignore`."""
        for call in self._calls:
            call.listen()

    def ignore(self) -> None:
        """Take the hooks on forwards off until :meth:`listen`: scripting a module compiles the hooks that it finds."""
        for call in self._calls:
            call.ignore()

    def detach(self) -> None:
        """Undo everything: live weights back, hooks removed."""
        self.end_forwards()
        self.restore()
        self.ignore()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()


def write_view(state: dict[str, Any], module: nn.Module, parameters: Mapping[str, nn.Parameter], view: View) -> None:
    """Put the view of each selected parameter into a state dict of ``module``, under every name that it has there."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for key, _, _, parameter in owners(module):
        if id(parameter) in names:
            value = view(names[id(parameter)])
            if elementwise.is_sharded(value) and not elementwise.is_sharded(state.get(key)):  # a full state dict, which rank 0 holds alone
                value = elementwise.full_tensor(value).cpu()
            if key in state:
                state[key] = value


LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module), by module.compile(), or as a LightningModule that was given to the Trainer compiled."""
    marks = ("_compiled_call_impl", "_compiler_ctx")
    return type(module).__name__ == "OptimizedModule" or any(getattr(module, mark, None) is not None for mark in marks)


def _uncompiled(module: nn.Module) -> list[nn.Module]:
    """The parts of ``module`` that are neither compiled nor inside a compiled one."""
    compiled = {id(part) for root in module.modules() if _is_compiled(root) for part in root.modules()}
    return [part for part in module.modules() if id(part) not in compiled]


def layers(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    """For each selected ``weight`` of a Linear or ConvNd layer that is really called: its layer, by parameter name.

    A weight with several owners, a subclass such as attention's output projection (whose forward is bypassed), and what
    is compiled is left out: what happens to it cannot be seen from one layer's input and output, or only at the price of
    a graph that breaks at every layer.
    """
    open_to_hooks = {id(part) for part in _uncompiled(module)}
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, list[nn.Module]] = {}
    for _, owner, attribute, parameter in owners(module):
        if id(parameter) in names:
            known = type(owner) in LAYERS and attribute == "weight" and id(owner) in open_to_hooks
            found.setdefault(names[id(parameter)], []).extend([owner] if known else [owner, owner])
    return {name: hits[0] for name, hits in found.items() if len(hits) == 1}


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, ``log`` and ``log_dict`` silenced and metrics kept, for extra passes through a module's step."""
    training = [part for part in module.modules() if part.training]
    metrics = [(part, copy.deepcopy(part.__dict__)) for part in module.modules() if hasattr(part, "metric_state")]
    module.eval()
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            object.__delattr__(module, name)
        for metric, state in metrics:
            metric.__dict__.clear()
            metric.__dict__.update(state)
        for part in training:
            part.training = True
