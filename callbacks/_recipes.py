"""What changed between a checkpoint's recipe and the one that resumes it, and what applies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form

_MISSING = "nothing"


def say_changes(callback: Form, state: Mapping[str, Any]) -> None:
    """Warn, once on rank 0, of every argument that differs from the checkpoint's; the new ones apply from its step on."""
    old, new = state.get("recipe"), callback.recipe()
    if not isinstance(old, dict) or old == new:
        return
    changes = differences(old, new)
    held = "; the support that the checkpoint froze stays frozen" if state.get("frozen") else ""
    rank_zero_warn(
        f"resuming at step {state['step']} of the checkpoint's {old.get('class_path')} with another recipe: {', '.join(changes)}. "
        f"The new one applies from here on{held}; shares (warm-up, freeze) are of the new run's length"
    )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """``path: old -> new`` of each leaf that differs, ``class_path`` and ``init_args`` left out of the paths."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("class_path") == new.get("class_path"):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key, _MISSING), new.get(key, _MISSING), _below(path, key))]
    if isinstance(old, dict) and isinstance(new, dict) and not path:  # another form: its own arguments are no change
        shared = [key for key in old["init_args"] if key in new["init_args"]]
        arguments = [line for key in shared for line in differences(old["init_args"][key], new["init_args"][key], key)]
        return [f"form: {old['class_path']} -> {new['class_path']}", *arguments]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _below(path: str, key: str) -> str:
    return path if key in ("class_path", "init_args") else f"{path}.{key}" if path else key


def _short(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={_short(part)}" for name, part in value.get("init_args", {}).items())
        return f"{value['class_path']}({arguments})"
    return str(value)
