"""Docstrings that describe every argument: what a base class describes is not written again, and is shown all the same."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r"    ((?:\w+, )*\w+): (.*)")


def complete(cls: type) -> None:
    """Give a class's own docstring one ``Args:`` section, in the order of its signature, with what its bases say of the others.

    A class without a docstring, or whose ``__init__`` comes later (a dataclass's), is left as it is.
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
    """The arguments of a class by name; where its ``__init__`` passes keywords on, its bases' between its own and keyword-only ones."""
    return _parameters([base for base in cls.__mro__ if "__init__" in vars(base) and base is not object])


def _parameters(bases: list[type]) -> dict[str, inspect.Parameter]:
    if not bases:
        return {}
    taken = list(inspect.signature(bases[0].__init__).parameters.values())[1:]  # type: ignore[misc]
    own = {one.name: one for one in taken if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    inherited = _parameters(bases[1:]) if any(one.kind is one.VAR_KEYWORD for one in taken) else {}
    first = {name: one for name, one in own.items() if one.kind is not one.KEYWORD_ONLY}
    return first | {name: one for name, one in inherited.items() if name not in own} | own


def split(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring without its ``Args:`` section, and the section's texts by argument; ``a, b: text`` is of both."""
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
