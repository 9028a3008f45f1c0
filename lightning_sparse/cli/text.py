"""UTF-8 for files and messages, independent of the locale."""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def utf8() -> Iterator[None]:
    """Make jsonargparse open text files as UTF-8 inside the context, because it always uses the locale's encoding."""
    from jsonargparse import _core, _paths

    modules = [vars(module) for module in (_core, _paths)]
    before = [names.get("open") for names in modules]
    for names in modules:
        names["open"] = _open  # shadows the built-in open in these modules only
    try:
        yield
    finally:
        for names, old in zip(modules, before, strict=True):
            names.pop("open") if old is None else names.update(open=old)


def _open(file: Any, mode: str = "r", **options: Any) -> Any:
    return open(file, mode, **(options if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"} | options))


def print_utf8() -> None:
    """Print UTF-8 under an ASCII locale; bytes of file names that are not UTF-8 are kept."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and codecs.lookup(stream.encoding or "utf-8").name == "ascii":
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def as_flags(message: str) -> str:
    """Return a message of a function in Python with the command line's flags in the place of its arguments."""
    message = message.replace("Pass allow_branches=True", "Give --allow_branches").replace("dynamic_batch=False", "--fixed_batch")
    return re.sub(r"\bround_to='?(\w+)'?", r"--round_to \1", message)


def unencodable_name(tree: Any, key: str = "") -> str | None:
    """Return the first file or folder name in a configuration that this locale cannot encode, or None."""
    if isinstance(tree, (dict, list)):
        pairs = tree.items() if isinstance(tree, dict) else ((key, one) for one in tree)
        return next((found for name, value in pairs if (found := unencodable_name(value, str(name)))), None)
    if not isinstance(tree, str) or not key.endswith(("dir", "path", "root", "file", "folder")):
        return None
    try:
        os.fsencode(tree)
    except UnicodeEncodeError:
        return tree
    return None


def decode_names(words: str) -> str:
    """Restore file names in a YAML text to UTF-8 that an ASCII locale could not decode and YAML escaped."""
    words = re.sub(r"\\uDC([89A-F][0-9A-F])", lambda byte: chr(0xDC00 + int(byte[1], 16)), words)
    return words.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
