"""Whether a checkpoint file is whole: ``torch.load`` compares no checksum, so that a flipped bit would pass unseen."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

_ZIP = b"PK\x03\x04"
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)


def check(path: Any) -> None:
    """Raise ValueError, naming the file, where its bytes differ from the checksums that ``torch.save`` wrote into it.

    Reads the file once, about a second a gigabyte, in little memory. What is no local file, torch's old format, and files
    written without checksums (``torch.serialization.set_crc32_options(False)``) say nothing and pass.
    """
    if not isinstance(path, (str, Path)) or not Path(path).is_file() or not _is_zip(Path(path)):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            written = any(entry.CRC for entry in archive.infolist())
            odd = archive.testzip() if written else None
    except _BROKEN as error:
        raise ValueError(f"{path} is damaged: {error}; resume from another file") from error
    if odd is not None:
        raise ValueError(f"{path} is damaged: its entry {odd!r} differs from its checksum; resume from another file")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP
