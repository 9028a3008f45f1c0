"""One-line messages for errors that do not come from the user's own code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_sparse.cli.errors import UsageError

NO_NAME = "this locale supports only ASCII file names, got {!r}: set PYTHONUTF8=1 or LC_ALL=C.UTF-8"

_LONGEST = 500  # characters of a message that is not ours


class RunError(Exception):
    """A run that failed after it had started. The user sees only the message."""


@contextmanager
def in_one_line(checkpoint: Any = None) -> Iterator[None]:
    """Convert errors that need no traceback; all others, such as those of the user's code, keep theirs.

    UsageError: the callbacks refuse the run, or ``checkpoint`` cannot be loaded. RunError: the loss is not finite, or the system
    refuses an operation (for example a full disk).
    """
    try:
        yield
    except Exception as error:
        converted = _converted(error, checkpoint)
        if converted is None:
            raise
        raise converted from error


def is_refusal(error: Exception) -> bool:
    """Return True for an error that this package raised, or that jsonargparse raised from such an error."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, Exception) and _places(error)[-1].startswith("jsonargparse."):
        return is_refusal(cause)
    return isinstance(error, (ValueError, TypeError, RuntimeError)) and _places(error)[-1].startswith("lightning_sparse.")


def _converted(error: Exception, checkpoint: Any) -> Exception | None:
    places = _places(error)
    own = places[-1].startswith("lightning_sparse.")
    if isinstance(error, (UsageError, RunError)):
        return None
    if checkpoint is not None and any(place.endswith("checkpoint_connector") for place in places):
        return UsageError(f"{checkpoint} cannot be loaded here: {in_words(error)}")
    if isinstance(error, OSError) or (own and isinstance(error, FloatingPointError)):
        return RunError(in_words(error))
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":
        return UsageError(NO_NAME.format(error.object))
    if not is_refusal(error):
        return None
    of_file = checkpoint is not None and "the checkpoint" in str(error)
    return UsageError((f"{checkpoint}: " if of_file else "") + in_words(error))


def _places(error: Exception) -> list[str]:
    """Return the modules in an error's traceback; the last one raised the error."""
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)] or [""]


def in_words(error: Exception) -> str:
    """Return an error's text in one line, after the name of its class if the text alone is unclear."""
    text = " ".join(str(error).split())
    clear = isinstance(error, (ValueError, TypeError, RuntimeError, FloatingPointError, ImportError)) and " " in text
    if not _places(error)[-1].startswith("lightning_sparse.") and len(text) > _LONGEST:  # because our own messages end with the remedy
        text = f"{text[:_LONGEST]} ..."
    return text if clear else f"{type(error).__name__}: {text}"
