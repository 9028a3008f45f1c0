"""Files and messages in UTF-8, whatever encoding the locale names."""

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
    """Have jsonargparse open text files as UTF-8 meanwhile: it has no setting for it, and takes the locale's encoding."""
    from jsonargparse import _core, _paths

    modules = [vars(module) for module in (_core, _paths)]
    before = [names.get("open") for names in modules]
    for names in modules:
        names["open"] = _open  # before the built-in one, in these modules alone
    try:
        yield
    finally:
        for names, old in zip(modules, before, strict=True):
            names.pop("open") if old is None else names.update(open=old)


def _open(file: Any, mode: str = "r", **options: Any) -> Any:
    return open(file, mode, **(options if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"} | options))


def speak_utf8() -> None:
    """Print UTF-8 where the locale is ASCII's: a terminal shows it, and a file name goes out as it came in."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and codecs.lookup(stream.encoding or "utf-8").name == "ascii":
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def unnameable(tree: Any, key: str = "") -> str | None:
    """The first name of a folder or file in a configuration that this locale cannot give to a file; None where there is none."""
    if isinstance(tree, (dict, list)):
        pairs = tree.items() if isinstance(tree, dict) else ((key, one) for one in tree)
        return next((found for name, value in pairs if (found := unnameable(value, str(name)))), None)
    if not isinstance(tree, str) or not key.endswith(("dir", "path", "root", "file", "folder")):
        return None
    try:
        os.fsencode(tree)
    except UnicodeEncodeError:
        return tree
    return None


def readable(words: str) -> str:
    """A YAML text in which file names that an ASCII locale could not decode, and YAML escaped, stand as UTF-8 again."""
    words = re.sub(r"\\uDC([89A-F][0-9A-F])", lambda byte: chr(0xDC00 + int(byte[1], 16)), words)
    return words.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
