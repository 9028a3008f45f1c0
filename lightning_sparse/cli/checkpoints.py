"""Check a checkpoint given on the command line, before a logger opens its run: undamaged, of this model, resumable."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_sparse import _checks, archive
from lightning_sparse.callbacks import Sparsifier, checks
from lightning_sparse.callbacks.checkpointing import callbacks_of
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.failures import in_words

_KEYWORDS = ("best", "last", "hpc")  # paths that the Trainer resolves
_RESUMED = ("optimizer_states", "lr_schedulers", "loops")  # keys that a weights-only file lacks

_USES = "lightning_sparse.shrink(module, example_inputs, verbose=True) and export.to_sparse(module) use its zeros"
_TRUSTED = (
    "If you trust the file, load it in Python, module = MyModule.load_from_checkpoint(FILE, weights_only=False), or a whole module by "
    f"torch.load(FILE, weights_only=False): then {_USES}"
)
_PLAIN = (
    "a plain state_dict, not a checkpoint of a LightningModule, which the commands take. Load it in Python, "
    f"module.load_state_dict(torch.load(FILE)): then {_USES}, and Trainer.save_checkpoint writes a checkpoint for the commands"
)


def read(path: Any, objects: bool = False) -> Any:
    """Load a checkpoint with its tensors memory-mapped; None for the Trainer's keywords, folders and URLs.

    With ``objects`` it may contain more than tensors and plain values, such as a dataclass among the hyper_parameters: each such object is
    replaced by an empty one, so that no code that the file names is run.

    Raises UsageError, naming the file, if it is missing or damaged, of another kind, or without ``objects`` contains such an object.
    """
    if path is not None and (way := _use_in_python(Path(path))):
        raise UsageError(f"{path}: {way}. The commands take the checkpoint of a LightningModule, as the one that it was made from")
    if path is None or str(path) in _KEYWORDS or str(path).startswith("registry") or "://" in str(path) or Path(path).is_dir():
        return None
    if not Path(path).is_file():
        same_folder = map(str, sorted(Path(path).parent.glob("*.ckpt")))
        raise UsageError(f"no checkpoint {str(path)!r}{_checks.closest(str(path), same_folder)}")
    with _naming(path):
        archive.check(path)
        content = _load(path, objects)
        if isinstance(content, _Unknown):
            raise ValueError(f"an object of {type(content).__name__}, not a checkpoint of a LightningModule. {_TRUSTED}")
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            if isinstance(content, dict) and content and all(isinstance(one, Tensor) for one in content.values()):
                raise ValueError(_PLAIN)
            keys = f"{sorted(map(str, content))[:5]}{_checks.more(content)}" if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"not a checkpoint of a LightningModule: it contains {keys}, not 'state_dict'")
        if "pytorch-lightning_version" not in content:
            raise ValueError("not a checkpoint written by a Trainer: it lacks 'pytorch-lightning_version'")
        if not isinstance(content.get("hyper_parameters", {}), dict):
            raise ValueError(f"a damaged checkpoint: its 'hyper_parameters' must be a dict, got {content['hyper_parameters']!r:.40}")
    return content


def hyper_parameters(path: Any) -> Mapping[str, Any]:
    """Return the hyper_parameters of a checkpoint file; empty without any, and if the file cannot be read."""
    try:
        content = _load(path, objects=True) if path is not None and Path(path).is_file() else {}
    except ValueError:
        return {}
    found = content.get("hyper_parameters") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def _use_in_python(path: Path) -> str:
    """Say what a file or folder that ``export`` or ``shrink`` has written is, and the call that loads it; empty for others."""
    for folder in (path, path.parent):
        if (folder / "shape.json").is_file() and (folder == path or path.name in ("model.pt", "model.safetensors")):
            shrunk = f"lightning_sparse.load_shrunk({str(folder)!r}, MyModule)"
            return f"a shrunk network, which {shrunk} loads; lightning_sparse.export.to_onnx and others take the module that this returns"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        is_compact = path.suffix == ".safetensors" and b'"manifest"' in file.read(2**16)
    if is_compact:
        return f"a compact file: module.load_state_dict(lightning_sparse.export.load_compact({str(path)!r}))"
    return f"a program: torch.export.load({str(path)!r}).module()" if path.suffix == ".pt2" else ""


@contextmanager
def _naming(path: Any) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise UsageError(text if text.startswith(str(path)) else f"{path}: {text}") from error


class _Unknown:
    """Stands for an object of a class or function that a file names; keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Unknown:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load(path: Any, objects: bool) -> Any:
    archived, foreign = zipfile.is_zipfile(path), list[str]()
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archived else []
        if not foreign or objects:
            with torch.serialization.safe_globals([(type(name, (_Unknown,), {}), name) for name in foreign]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=archived)
    except Exception as error:  # unpickling arbitrary bytes may raise any error
        if not foreign:
            raise ValueError(f"not a checkpoint, or a damaged one: {in_words(error)}") from error
    names = f"it contains {', '.join(foreign[:3])}{_checks.more(foreign, 3)}"
    if objects:  # such as a whole module, or a subclass of dict
        raise ValueError(f"{names}, which are not read here. {_TRUSTED}")
    raise ValueError(
        f"{names}, which may run code when loaded; if you trust the file, give --weights_only false, or in Python "
        "Trainer.fit(..., weights_only=False)"
    )


def check(path: Any, content: Any, model: LightningModule, callbacks: Iterable[Sparsifier] = (), resumed: bool = False) -> None:
    """Raise UsageError if ``content`` (from :func:`read`) does not fit this model or these callbacks, or cannot be ``resumed``."""
    with _naming(path):
        if missing := [key for key in _RESUMED if resumed and key not in content]:
            raise ValueError(f"it lacks {missing}, so a run cannot be resumed from it; was it saved with save_weights_only=True?")
        if model.strict_loading and not checks.is_built_later(model):
            _check_weights(content["state_dict"], model.state_dict(keep_vars=True), _other_arguments(content, model))
        states = callbacks_of(content)
        for callback in callbacks:
            if state := states.get(callback.state_key):
                callback.check_state(state)


def _check_weights(saved: Mapping[str, Any], own: Mapping[str, Tensor], note: str) -> None:
    """Raise ValueError naming the first weights that differ in name or shape between file and model, and a ``note``."""
    shapes = [f"{name} {tuple(saved[name].shape)} instead of {tuple(w.shape)}" for name, w in own.items() if _differs(saved.get(name), w)]
    lists = {"lacks": [*own.keys() - saved.keys()], "has extra weights": [*saved.keys() - own.keys()], "has other shapes": shapes}
    differences = [f"it {what} {', '.join(sorted(names)[:3])}{_checks.more(names, 3)}" for what, names in lists.items() if names]
    if differences:
        raise ValueError(f"a checkpoint of another model: {'; '.join(differences)}{note}")


def _other_arguments(content: Mapping[str, Any], model: LightningModule) -> str:
    """Return the saved arguments of a file that differ from the model's; empty if none do."""
    saved, own = content.get("hyper_parameters", {}), model.hparams
    plain = [name for name in saved if name in own and all(isinstance(one, (int, float, str, list)) for one in (saved[name], own[name]))]
    other = [f"{name} {saved[name]!r} instead of {own[name]!r}" for name in plain if saved[name] != own[name]]
    return f"; it was saved with {', '.join(other)}" if other else ""


def _differs(saved: Any, own: Any) -> bool:
    return isinstance(saved, Tensor) and isinstance(own, Tensor) and not is_lazy(own) and saved.shape != own.shape
