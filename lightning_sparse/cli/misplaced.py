"""What to write for words and keys that stand in the wrong place of a command line or a configuration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_sparse.cli import recipes

_WITH_SCRIPT = {"check": "CONFIG", "compare": "CONFIG", "path": "CONFIG", "sweep": "CONFIG"}
_WITH_SCRIPT |= {"report": "CKPT", "shrink": "CKPT", "export": "CKPT"}
_ENTRY = ("class_path", "init_args", "dict_kwargs")


def hint(words: Sequence[str]) -> str:
    """Return what to write in the place of what the parser has refused; empty if nothing is found.

    Looks for a command of ``lightning-sparse`` in a script, a configuration without ``--config``, arguments of ``sparsify`` without a
    class, and arguments beside a ``class_path``.
    """
    if words[:1] and words[0] in _WITH_SCRIPT:
        return f"{words[0]!r} is a command of lightning-sparse: lightning-sparse {words[0]} {_WITH_SCRIPT[words[0]]} --script SCRIPT"
    for word in itertools.takewhile(lambda word: not word.startswith("-"), words[:2]):  # a subcommand, if there are any
        if word.endswith((".yaml", ".yml")) or word in recipes.names():
            return f"no key {word!r}; did you mean --config {word}?"
    options = [word.partition("=")[0] for word in words if word.startswith("--sparsify")]
    files = recipes.files_of(words)
    own = [key for file in files for key in recipes.content(Path(file)) if key.partition(".")[0] == "sparsify"]
    if options and not own and not {"--sparsify", "--sparsify.class_path"} & {*options}:
        example = "Sparsify" if "--sparsify.target_sparsity" in options else "ReweightedPenalty --sparsify.penalty L1"
        return (
            f"{options[0]} without a callback, because the configuration has no key sparsify: name one, too, such as --sparsify {example}"
        )
    if "--sparsify" not in options and (found := _without_class(files, options)):
        return found
    trees = [("", recipes.content(Path(file))) for file in files] + list(_inline(words))
    return next((found for where, tree in trees if (found := _beside_class(tree, where))), "")


def _without_class(files: Sequence[str], options: Sequence[str]) -> str:
    """Return the entry to write for arguments of ``sparsify`` in a file, if no file and no option names its class."""
    entries = [entry for file in files if isinstance(entry := recipes.content(Path(file)).get("sparsify"), dict) and entry]
    if not entries or "--sparsify.class_path" in options or any("class_path" in entry for entry in entries):
        return ""
    given = entries[-1].get("init_args") or {key: value for key, value in entries[-1].items() if key not in _ENTRY}
    name = "ReweightedPenalty" if {"lam", "penalty"} & {*given} else "Sparsify"
    return f"sparsify: no class_path: write {_shown({'class_path': name, 'init_args': given})}"


def _shown(entry: dict[str, Any]) -> str:
    return str(yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10_000)).strip()


def _inline(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the key and the content of each word that is a mapping in YAML, such as the one after ``--sparsify``."""
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        if equals and value.startswith("{"):
            try:
                yield flag.lstrip("-").removeprefix("config"), yaml.safe_load(value)
            except yaml.YAMLError:
                continue


def _beside_class(tree: Any, where: str) -> str:
    """Return the entry to write for the first ``class_path`` that has its arguments beside it; empty without one."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if isinstance(tree, dict) and "class_path" in tree and (beside := {key: tree[key] for key in tree if key not in _ENTRY}):
        given = dict(tree.get("init_args") or {})
        for key, value in beside.items():
            given |= value if str(key).startswith("init") and isinstance(value, dict) else {key: value}
        entry = {key: tree[key] for key in tree if key == "class_path"} | {"init_args": given}
        name = str(tree["class_path"]).rpartition(".")[2]
        listed = " and ".join(repr(key) for key in beside)
        return f"{where}: {listed} beside class_path: arguments of {name} belong under init_args: write {_shown(entry)}"
    inner = (_beside_class(value, f"{where}.{key}" if where else str(key)) for key, value in entries)
    return next((found for found in inner if found), "")
