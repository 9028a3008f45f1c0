"""Short error messages for invalid input: the causes in the parser's nested reports, with the closest names."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning_sparse import _checks

_STRUCTURE = (
    "Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>", "Not a valid subclass", "Subclass types",
    "a class path (str)", "a dict with", "a dict without", "Import path", "Expected a path but",
)  # fmt: skip


_KINDS = {
    "float": "a number (float)",
    "int": "a whole number (int)",
    "bool": "true or false",
    "str": "a string",
    "list": "a list",
    "Sequence": "a list",
}
_BASES = {"LightningModule": "MyModel", "LightningDataModule": "MyData"}  # which only a class of the user's can stand for
_OTHER_KIND = re.compile(r"(?:^|: )(?:must be (?!.*, got )|no class )")


class UsageError(Exception):
    """Invalid input in the command line or a recipe. The user sees only the message."""


def explain(text: str, keys: Iterable[str] = ()) -> str:
    """Extract the causes from a report of jsonargparse: one per line, each with its key and the closest names.

    ``keys`` are the dotted keys that the parser accepts. A report in an unknown format is returned unchanged.
    """
    causes = list(dict.fromkeys(_causes(text, list(keys))))
    clear = [cause for cause in causes if not _OTHER_KIND.search(cause)]  # those of the matching type of a union
    hinted = [unknown[1] for cause in clear if (unknown := re.search(r"takes no ('[^']+'); closest", cause))]
    clear = [cause for cause in clear if not any(cause.endswith(f"takes no {key}") for key in hinted)]  # reports of a base class
    numbers = [cause.partition("must be ")[0] for cause in causes if re.search(r": must be ", cause)]
    causes = [
        cause for cause in causes if not any(key and cause.startswith(f"{key}no class") and "closest" not in cause for key in numbers)
    ]
    return _with_list("\n".join(clear or causes), text) or text


def _with_list(message: str, report: str) -> str:
    """Add what was given to a message that ends with "must be a list", and, for a string, the list to write."""
    given = re.search(
        r"Expected a <class '[\w.]*(?:list|Sequence)'>.*?Given value type: <class '(\w+)'>\s+Given value: ([^\n]*)", report, re.S
    )
    if given is None or not message.endswith("must be a list"):
        return message
    return f"{message} such as [{given[2]!r}], got {given[2]!r}" if given[1] == "str" else f"{message}, got {given[2]}"


def _causes(text: str, keys: list[str]) -> Iterator[str]:
    path: list[tuple[int, str]] = []
    owner, bases = "", ""
    for line in text.splitlines():
        depth, cause = len(line) - len(line.lstrip()), line.strip().removeprefix("- ")
        if key := re.match(r"Parser key \"([^\"]+)\":(.*)", cause):
            path = [entry for entry in path if entry[0] < depth] + [(depth, key[1])]
            cause = key[2].strip()
        elif given := re.match(r"Problem with given class_path '([^']+)':", cause):
            owner = given[1]
            continue
        bases = cause if cause.startswith("Subtypes:") else bases
        if cause and not cause.startswith(_STRUCTURE):
            where = ".".join(name for _, name in path)
            sentence = _sentence(cause, where, owner, bases, keys)
            yield from [sentence] if sentence else []


def _sentence(cause: str, where: str, owner: str, bases: str, keys: list[str]) -> str:
    """Reword one cause; return an empty string if the class exists and only another type of the union rejects it."""
    prefix = f"{where}: " if where else ""
    if option := re.match(r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)", cause):
        if owner.rpartition(".")[2] in _BASES:
            return (
                f"{prefix}{option[1]!r} without a class_path: write `{where}: {{class_path: my_module.{_BASES[owner.rpartition('.')[2]]}, "
                f"init_args: {{{option[1]}: ...}}}}`, or give the script that fixes the class to a command with --script"
            )
        taken = parameters(owner)
        takes = "" if (hint := _checks.closest(option[1], taken)) or not taken else f"; it takes {', '.join(sorted(taken))}"
        return f"{prefix}{owner.rpartition('.')[2]} takes no {option[1]!r}{hint or takes}"
    if name := re.match(r"Expected a dot import path string: (\S+)", cause):
        known = class_names(_expected(owner, where.rpartition(".")[2]) or bases)
        return "" if name[1] in known else f"{prefix}no class {name[1]!r}{_checks.closest(name[1], known)}"
    if option := re.search(r"does not accept option '([^']+)'|Unrecognized arguments: (?:--)?([\w.+-]+)", cause, re.IGNORECASE):
        return f"no key {option[1] or option[2]!r}{_near_key(option[1] or option[2], keys)}"
    if missing := re.match(r"the following arguments are required: (.*)", cause):
        names = [name.strip().lstrip("-") for name in missing[1].split(",")]
        return f"{prefix}{_needed(where, owner, names) if where else _needed_at_the_top(names)}"
    if key := re.match(r"Spaces not allowed in keys: (\"[^\"]*\")", cause):  # text with a colon, such as a lambda, is a mapping in YAML
        wanted = _expected(owner, where.rpartition(".")[2])
        number = "a number, or " if "float" in wanted else ""
        return f"{prefix}must be {number}a class_path ({', '.join(sorted(class_names(wanted)))}), got a mapping with the key {key[1]}"
    if kind := re.match(r"Expected a (?:<class '(?:[\w.]+\.)?(\w+)'>|typing\.Literal(\[.*\]))(?:\. Got value: (.*))?$", cause):
        wanted = f"one of {kind[2]}" if kind[2] else _KINDS.get(kind[1], kind[1])
        return f"{prefix}must be {wanted}{f', got {kind[3]}' if kind[3] else ''}"
    return prefix + cause


def _needed(where: str, owner: str, names: list[str]) -> str:
    """Return what to write for missing arguments of the class at a key, in YAML and on the command line, with its example values."""
    form = imported(owner)
    first: Mapping[str, Any] = next(iter(getattr(form, "examples", ())), {})
    values = getattr(form, "sample", None) or {name: str(value) for name, value in first.items()}
    written, flags = [], []
    for name in names:
        value = values.get(name, "VALUE")
        flags.append(f"--{where}.{name} {value}")
        if made := re.fullmatch(r"(?:\w+\.)*(\w+)\((.*)\)", value):  # such as penalties.LogSum(eps=2.0)
            arguments = [one.strip().partition("=") for one in made[2].split(",")]
            value = f"{{class_path: {made[1]}, init_args: {{{', '.join(f'{key}: {given}' for key, _, given in arguments)}}}}}"
            flags[-1] = " ".join([f"--{where}.{name} {made[1]}", *(f"--{where}.{name}.{key} {given}" for key, _, given in arguments)])
        written.append(f"{name}: {value}")
    listed = " and ".join(map(repr, names))
    name = owner.rpartition(".")[2]
    path = name if owner.startswith(("lightning.", "lightning_sparse.")) else owner  # because their classes have short names
    entry = f"{{class_path: {path}, init_args: {{{', '.join(written)}}}}}"
    return f"{name} needs {listed}, such as `{entry}` in YAML, or {' '.join(flags)}"


def _needed_at_the_top(names: list[str]) -> str:
    """Return what to write for missing keys of the configuration."""
    keys = [re.sub(r"^(?:fit|validate|test|predict)\.", "", name) for name in names]
    flags = " ".join(f"--{key} VALUE" for key in keys)
    return (
        f"{' and '.join(map(repr, keys))} must be given: by --config RECIPE, a YAML file or a name that `lightning-sparse recipes` lists, "
        f"or by {flags}"
    )


def parameters(class_path: str) -> list[str]:
    """Return the argument names of the class at a dotted path; an empty list if it cannot be imported."""
    found = imported(class_path)
    return [name for name in inspect.signature(found).parameters if name != "self"] if found else []


def _expected(class_path: str, name: str) -> str:
    """Return the annotation of a class's argument, with full paths; empty if the class or its argument is not found."""
    form = imported(class_path)
    for cls in form.__mro__ if form else ():
        try:
            hints = typing.get_type_hints(vars(cls)["__init__"]) if "__init__" in vars(cls) else {}
        except (NameError, TypeError):  # a name that only type checkers import
            continue
        if name in hints:
            return str(hints[name])
    return ""


def class_names(text: str) -> set[str]:
    """Return the names of all public concrete subclasses of the classes whose dotted paths are in ``text``."""
    found: set[str] = set()
    for path in re.findall(r"[A-Za-z_][\w.]*\.[\w]+", text):
        if base := imported(path):
            found.update(cls.__name__ for cls in below(base) if not inspect.isabstract(cls))
    return {name for name in found if not name.startswith("_")}


def class_of(given: Any) -> type[Any] | None:
    """Return the class of a parsed entry with ``class_path``; None without one."""
    path = getattr(given, "class_path", None)
    return imported(path) if isinstance(path, str) else None


def imported(path: str) -> type[Any] | None:
    """Import the class at a dotted path; return None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, type) else None


def below(base: type[Any]) -> Iterator[type[Any]]:
    """Yield a class and all its imported subclasses."""
    yield base
    subclasses: list[type[Any]] = base.__subclasses__()
    for cls in subclasses:
        yield from below(cls)


def _near_key(key: str, keys: list[str]) -> str:
    """Return a hint with the closest known keys, compared at the first unknown part of ``key``."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        prefix = parts[:depth]
        here = {known.split(".")[depth] for known in keys if known.split(".")[:depth] == prefix and known.count(".") >= depth}
        if part not in here:
            return _qualified(_checks.closest(part, here), prefix)
    return ""


def _qualified(hint: str, prefix: list[str]) -> str:
    return re.sub(r"'([^']+)'", lambda hit: f"'{'.'.join([*prefix, hit[1]])}'", hint)
