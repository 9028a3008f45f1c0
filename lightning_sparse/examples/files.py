"""Files of pretrained models: in a folder, by their path, or by a Hugging Face name."""

from __future__ import annotations

from pathlib import Path


def fetched(place: str, name: str) -> Path:
    """Return the file ``name`` of a folder or of a Hugging Face repository ``place``, or ``place`` itself if it is a file.

    Raises FileNotFoundError for a folder without it and for what is neither, and ImportError, naming the extra, where a Hugging Face
    name needs huggingface_hub.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if path.is_dir() or place.startswith((".", "/", "~")) or place.count("/") != 1:
        if (path / name).is_file():
            return path / name
        raise FileNotFoundError(f"no {name} in {path.resolve()}; give a folder that holds it, its path, or a Hugging Face name OWNER/MODEL")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(f"{place!r} is no file or folder, and a Hugging Face name needs: pip install 'lightning-sparse[text]'") from error
    try:
        return Path(hf_hub_download(place, name))
    except Exception as error:  # no network, no such repository, no such file: many classes of errors
        raise FileNotFoundError(f"{place!r} is no file or folder here, and fetching {name} of that name failed: {error}") from error
