"""The methods of a comparison: a sparsity callback from a word of the command line and the configuration's own callback."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import yaml

from lightning_sparse import _checks, _docstrings, callbacks
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.cli.errors import UsageError, imported

CARRIED = ("select", "structure", "keep_zeros", "least_kept")  # arguments that say which weights may become zero, by any method
STRENGTHS = ("lam", "target_sparsity", "sparsity")  # arguments that a comparison or path sets


def class_of(name: Any) -> Any:
    """Return a callback's class by its name here or its import path; None if there is none."""
    return imported(str(name)) if "." in str(name) else getattr(callbacks, str(name), None)


def described(method: str, penalty: Any, strength: dict[str, float], configured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return class_path and init_args of a callback, given as ``Name`` or ``'Name: {argument: value}'``.

    A callback that needs a penalty and has none gets ``penalty``. ``configured`` is the configuration's own callback: one of the same
    class takes its arguments if a target (lam) is among both, others those that say which weights may become zero. Raises UsageError,
    with the closest names, for an unknown class, one that does not take the strength, and an unknown argument.
    """
    try:
        tree = yaml.safe_load(method)
    except yaml.YAMLError:
        tree = None
    tree = {tree: {}} if isinstance(tree, str) else tree
    name, given = next(iter(tree.items())) if isinstance(tree, dict) and len(tree) == 1 else ("", None)
    if not name or not isinstance(name, str) or not isinstance(given, (dict, type(None))):
        raise UsageError(f"a method is a class name, alone or as 'Name: {{argument: value}}', got {method!r}{_brackets(method)}")
    form = class_of(name)
    forms = [one for one in callbacks.__all__ if issubclass(getattr(callbacks, one), Sparsifier) and one != "Sparsifier"]
    if not (inspect.isclass(form) and issubclass(form, Sparsifier)) or form is Sparsifier:
        raise UsageError(
            f"no sparsity callback {name!r}{_checks.closest(name, forms)}; one of {', '.join(forms)}, or your own by its import path"
        )
    known = arguments_of(form)
    for argument in [*(given or {}), *strength]:
        if argument not in known:
            raise UsageError(f"{name} takes no {argument!r}{_checks.closest(argument, known)}")
    if twice := [argument for argument in given or {} if argument in STRENGTHS]:
        set_by = "--lams" if "lam" in strength else "--targets"
        raise UsageError(f"{twice[0]} of {name} cannot be given here: {set_by} sets the strength of every method")
    needs_penalty = "penalty" in known and known["penalty"].default is inspect.Parameter.empty
    own = _taken_over(form, configured or {}, *strength) | ({"penalty": penalty} if needs_penalty else {})
    return {"class_path": name if "." in name else f"lightning_sparse.callbacks.{name}", "init_args": own | (given or {}) | strength}


def _is_set_by(configured: Mapping[str, Any], strength: str) -> bool:
    """Return True if a callback has this kind of strength: its other arguments, such as freeze, may not suit the other kind."""
    given = {name for name, value in (configured.get("init_args") or {}).items() if value is not None}
    to_target = bool(given & {"target_sparsity", "sparsity"})  # beside a target lam only starts the search for it
    return to_target if strength == "target_sparsity" else "lam" in given and not to_target


def _taken_over(form: type[Any], configured: Mapping[str, Any], strength: str) -> dict[str, Any]:
    """Return the arguments of the configuration's own callback that a method of class ``form`` takes over."""
    known, same = arguments_of(form), class_of(configured.get("class_path")) is form and _is_set_by(configured, strength)
    every = (configured.get("init_args") or {}).items()
    return {name: value for name, value in every if name in known and (name in CARRIED or (same and name not in STRENGTHS))}


def told(configured: Mapping[str, Any], described: Mapping[str, Mapping[str, Any]], flag: str) -> str:
    """Say, in lines of their own, which arguments of the configuration's callback the methods take over, and which they do not.

    ``described`` are the arguments of each method, by its label; ``flag`` is the one that methods are given by.
    """
    given = configured.get("init_args") or {}
    every = [name for name in given if name not in STRENGTHS]
    found: dict[tuple[str, str], list[str]] = {}  # the methods by what they take over and what they leave
    for method, init_args in described.items() if every else ():
        kept = [name for name in every if name in init_args and init_args[name] == given[name]]
        left = [name for name in every if name not in init_args and name != "penalty"]
        rest = f"; not {', '.join(left)}: give what a method needs as {flag} 'Name: {{{left[0]}: ...}}'" if left else ""
        found.setdefault((", ".join(kept) or "nothing", rest), []).append(method)
    lines = []
    for (names, rest), methods in found.items():
        who = f"{' and '.join(methods)} take{'s' if len(methods) == 1 else ''}"
        if len(found) == 1 and len(methods) > 1:
            who = "every method takes"
        lines.append(f"\n{who} over from sparsify in the configuration: {names}{rest}")
    return "".join(lines)


def _brackets(word: str) -> str:
    """Return a hint if a word has more opening brackets than closing ones, or fewer."""
    counted = [(word.count(opens), opens, word.count(closes), closes) for opens, closes in ("{}", "[]")]
    wrong = [f"{some} {opens} and {others} {closes}" for some, opens, others, closes in counted if some != others]
    return f"; it has {', '.join(wrong)}" if wrong else ""


def arguments_of(form: type[Any]) -> dict[str, inspect.Parameter]:
    """Return the arguments of a callback's constructor: those passed on to its bases included, those that it sets itself left out."""
    return _docstrings.parameters(form)
