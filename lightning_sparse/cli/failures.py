"""What stops a run, in one line, where it is not the user's own code that does."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_sparse.cli.errors import UsageError

NO_NAME = "this locale has ASCII file names alone, which do not hold {!r}: set PYTHONUTF8=1 or LC_ALL=C.UTF-8"


class RunError(Exception):
    """A run that went wrong after it had begun as asked for; its text is all that the user is shown."""


@contextmanager
def in_one_line(checkpoint: Any = None) -> Iterator[None]:
    """Turn into a UsageError what the callbacks refuse and what stops the loading of ``checkpoint``; into a RunError a loss
    that is not finite and what the system refuses (a full disk). Other errors, such as a user's own, keep their traceback.
    """
    try:
        yield
    except Exception as error:
        told = _told(error, checkpoint)
        if told is None:
            raise
        raise told from error


def is_refusal(error: Exception) -> bool:
    """This package refuses something, by an error that it raised itself, or that jsonargparse made of such a one."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, Exception) and _places(error)[-1].startswith("jsonargparse."):
        return is_refusal(cause)
    return isinstance(error, (ValueError, TypeError, RuntimeError)) and _places(error)[-1].startswith("lightning_sparse.")


def _told(error: Exception, checkpoint: Any) -> Exception | None:
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
    """The modules that an error came through, the one that raised it last."""
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)] or [""]


def in_words(error: Exception) -> str:
    """An error in one line; its kind where its text alone says little."""
    text = " ".join(str(error).split())
    clear = isinstance(error, (ValueError, TypeError, RuntimeError, FloatingPointError)) and " " in text
    return text[:500] if clear else f"{type(error).__name__}: {text[:500]}"
