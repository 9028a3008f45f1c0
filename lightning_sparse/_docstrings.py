"""Complete docstrings with the arguments that base classes describe, so that each argument is described once."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r"    ((?:\w+, )*\w+): (.*)")


def complete(cls: type) -> None:
    """Give a class's own docstring one ``Args:`` section in the order of its signature, completed from its bases.

    A class without a docstring, or whose ``__init__`` is added later (a dataclass), is not changed.
    """
    own = vars(cls).get("__doc__")
    names = parameters(cls)
    if not own or not names:
        return
    text, written = split(own)
    known = {name: words for base in reversed(cls.__mro__[1:]) for name, words in split(base.__doc__ or "")[1].items()} | written
    entries = "\n".join(f"    {name}: {known[name]}" for name in names if name in known)
    cls.__doc__ = f"{text}\n\nArgs:\n{entries}\n" if entries else own


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class by name; if ``__init__`` passes keywords on, also those of its bases."""
    return _parameters([base for base in cls.__mro__ if "__init__" in vars(base) and base is not object])


def _parameters(bases: list[type]) -> dict[str, inspect.Parameter]:
    if not bases:
        return {}
    taken = list(inspect.signature(bases[0].__init__).parameters.values())[1:]  # type: ignore[misc]
    own = {one.name: one for one in taken if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    inherited = _parameters(bases[1:]) if any(one.kind is one.VAR_KEYWORD for one in taken) else {}
    first = {name: one for name, one in own.items() if one.kind is not one.KEYWORD_ONLY}
    hidden = {*own, *vars(bases[0]).get("fills", ())}  # arguments that a class passes to its base itself
    return first | {name: one for name, one in inherited.items() if name not in hidden} | own


def split(doc: str) -> tuple[str, dict[str, str]]:
    """Return a docstring without its ``Args:`` section, and the section's texts by argument; ``a, b: text`` counts for both."""
    lines, kept, found = inspect.cleandoc(doc).splitlines(), [], dict[str, list[str]]()
    inside, names = False, list[str]()
    for line in lines:
        if line == "Args:":
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        if not inside:
            kept.append(line)
        elif entry := _ENTRY.fullmatch(line):
            names = entry[1].split(", ")
            found |= {name: [entry[2]] for name in names}
        elif line.strip():
            for name in names:
                found[name].append(line)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    return text, {name: "\n".join(words) for name, words in found.items()}
