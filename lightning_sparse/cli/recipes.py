"""Packaged recipes: look up by name, list with results, and merge on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lightning_sparse import _checks
from lightning_sparse.cli.errors import UsageError


def folder() -> Path:
    """Return the folder of the packaged recipes."""
    return Path(str(files("lightning_sparse.recipes")))


def names() -> list[str]:
    """Return the names of all packaged recipes, such as ``digits`` and ``overlay/reweighted_penalty``."""
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.yaml"))


def find(name: str) -> Path:
    """Return the file of a recipe, given an existing path or a packaged name with or without ``.yaml``.

    Raises UsageError with the closest names otherwise.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = name.removesuffix(".yaml")
    if packaged in names():
        return folder() / f"{packaged}.yaml"
    is_file = Path(name).suffix in (".yaml", ".yml", ".json")
    missing = f"no file {name!r}, and no recipe of this name" if is_file else f"no recipe {name!r}"
    raise UsageError(f"{missing}{_checks.closest(packaged, names())}; give a file, or one that `lightning-sparse recipes` lists")


def content(path: Path) -> dict[str, Any]:
    """Read a recipe as a mapping. Raises UsageError, naming the file and the key, for other content."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must contain keys such as 'trainer' and 'sparsify', got {tree!r:.40}")
    for key in ("trainer", "report", "sparsify", "model", "data"):
        if not isinstance(tree.get(key), (dict, str, type(None))):
            raise UsageError(f"{path}: {key} must be a mapping of its arguments, got {tree[key]!r:.40}")
    _check_classes(path, tree, "")
    return tree


def _check_classes(path: Path, tree: Any, key: str) -> None:
    """Raise UsageError unless every ``init_args`` is a mapping."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        where = f"{key}.{name}" if key else str(name)
        if name == "init_args" and not isinstance(value, (dict, type(None))):
            raise UsageError(f"{path}: {where} must be a mapping of arguments, got {value!r:.40}")
        _check_classes(path, value, where)


def check_classes(path: Path, words: Sequence[str], script: str) -> None:
    """Raise UsageError, with the lines to write, for a configuration that names no class of the model and has its values.

    A LightningCLI script with fixed classes reads and writes such files. ``words`` are further arguments of ``fit``, which may name
    the class; ``script`` is how the script is given instead.
    """
    tree = content(path)
    model = tree.get("model")
    if isinstance(model, str) or (isinstance(model, dict) and "class_path" in model):
        return
    if any(word.partition("=")[0] in ("--config", "-c", "--model", "--model.class_path") for word in words):
        return
    lines = []
    for key, name in (("model", "MyModel"), ("data", "MyData")):
        own = tree.get(key)
        if not isinstance(own, str) and "class_path" not in (own or {}):
            wanted = {"class_path": f"my_module.{name}"} | ({"init_args": own} if own else {})
            lines.append(f"  {key}: {yaml.safe_dump(wanted, default_flow_style=True, sort_keys=False, width=10_000).strip()}")
    raise UsageError(
        f"{path}: model names no class, as in the configuration of a script with fixed classes, LightningCLI(MyModel, MyData). Give "
        f"{script}, or name the classes in a copy of the file:\n" + "\n".join(lines)
    )


def about(path: Path) -> dict[str, str]:
    """Read the ``key: text`` lines of the comment at the top of a recipe (``summary``, ``reaches``, ``command``)."""
    fields: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").removeprefix(" ")
        key, colon, rest = text.partition(": ")
        if colon and key.isidentifier():  # other lines are indented and continue the previous text
            fields[key] = [rest]
        elif fields:
            fields[list(fields)[-1]].append(text)
    return {key: " ".join(" ".join(parts).split()) for key, parts in fields.items()}


def with_paths(words: Sequence[str]) -> list[str]:
    """Replace recipe names after ``--config`` (or ``-c``) by the paths of their files, and check the files."""
    done: list[str] = []
    for word in words:
        flag, equals, name = word.partition("=")
        if equals and flag in ("--config", "-c"):
            done.append(f"{flag}={_checked(name)}")
        else:
            done.append(_checked(word) if done[-1:] in (["--config"], ["-c"]) else word)
    return done


def with_added(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Keep callbacks that a file adds by ``callbacks+:`` when a later file sets ``callbacks:``.

    jsonargparse silently replaces the added callbacks by that list, so they are added again after it. Returns the new command
    line and, for each conflict, the pair of files.
    """
    done, added, pairs = list[str](), dict[str, Any](), list[tuple[str, str]]()
    for word, file in zip(words, _files(words), strict=True):
        done.append(word)
        trainer = content(Path(file)).get("trainer") if file else None
        if not isinstance(trainer, dict):
            continue
        if "callbacks" in trainer and added:
            again = [one for given in added.values() for one in (given if isinstance(given, list) else [given])]
            done.append(f"--config={json.dumps({'trainer': {'callbacks+': again}})}")
            pairs += [(before, file) for before in added]
        if "callbacks+" in trainer:
            added[file] = trainer["callbacks+"]
    return done, pairs


def with_absolute(words: Sequence[str]) -> list[str]:
    """Replace the files after ``--config`` or ``-c`` by absolute paths, for a command that another folder runs; names of recipes stay."""
    return [f"{word[: -len(file)]}{Path(file).resolve()}" if file else word for word, file in zip(words, _files(words), strict=True)]


def files_of(words: Sequence[str]) -> list[str]:
    """Return the files after ``--config`` or ``-c`` on a command line, in order."""
    return [file for file in _files(words) if file]


def listed_callbacks(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield each configuration file and the class path of each callback that it lists under trainer, in order."""
    for file in files:
        trainer = content(file).get("trainer")
        for key in ("callbacks", "callbacks+") if isinstance(trainer, dict) else ():
            listed = trainer.get(key) or []  # type: ignore[union-attr]
            for one in listed if isinstance(listed, list) else [listed]:
                yield file, str(one.get("class_path", "") if isinstance(one, dict) else one)


def _files(words: Sequence[str]) -> list[str]:
    """Return, for each word, the configuration file that it names, or an empty string."""
    joined = [word.partition("=")[2] if word.startswith(("--config=", "-c=")) else "" for word in words]
    flagged = [False, *(word in ("--config", "-c") for word in words[:-1])] if words else []
    named = [word if flag else name for word, name, flag in zip(words, joined, flagged, strict=True)]
    return [name if name and Path(name).is_file() else "" for name in named]


def _checked(name: str) -> str:
    if "://" in name or (not Path(name).is_file() and _is_mapping(name)):  # a URL, or the configuration itself
        return name
    path = find(name)
    content(path)
    return str(path)


def _is_mapping(word: str) -> bool:
    try:
        return isinstance(yaml.safe_load(word), dict)
    except yaml.YAMLError:
        return False


def run(verb: str, words: list[str]) -> int:
    """Print each recipe with its results, those of one folder (``recipes overlay``), or the path of one (``recipes NAME``)."""
    if words[:1] in (["-h"], ["--help"]) or len(words) > 1:
        print(f"usage: lightning-sparse {verb} [FOLDER | NAME]   list the packaged recipes, or those of a folder, or print the path of one")
        return 0 if len(words) == 1 else 2
    under = [name for name in names() if not words or name.startswith(f"{words[0].rstrip('/')}/")]
    if words and not under:
        print(find(words[0]))
        return 0
    for name in under:
        print(name)
        for key, text in about(folder() / f"{name}.yaml").items():
            print(f"  {key + ':':9} {text}")
        print()
    return 0
