"""Verify the checksums of a checkpoint file, because ``torch.load`` does not and would load a flipped bit."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

_ZIP = b"PK\x03\x04"
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)


def check(path: Any) -> None:
    """Compare a file with the checksums that ``torch.save`` wrote into it; raise ValueError naming the file if they differ.

    Reads the file once: about one second per gigabyte, in little memory. Passes without a check: paths that are not local files,
    torch's old format, and files without checksums (``torch.serialization.set_crc32_options(False)``).
    """
    if not isinstance(path, (str, Path)) or not Path(path).is_file() or not _is_zip(Path(path)):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            has_checksums = any(entry.CRC for entry in archive.infolist())
            damaged = archive.testzip() if has_checksums else None
    except _BROKEN as error:
        raise ValueError(f"{path} is damaged: {error}; use another copy, or another file") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: its entry {damaged!r} differs from its checksum; use another copy, or another file")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP
