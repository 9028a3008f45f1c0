"""Does the wheel hold every module, recipe and marker of the source, and nothing else?  check_dist.py DIST SOURCE"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

TREES = {"lightning_sparse": "lightning_sparse", "callbacks": "lightning_sparse/callbacks", "recipes": "lightning_sparse/recipes"}
KINDS = {".py", ".yaml", ".typed"}


def expected(source: Path) -> set[str]:
    """The wheel's names of all files that belong in it."""
    found = {(folder, path) for folder in TREES for path in (source / folder).rglob("*") if _belongs(path)}
    return {f"{TREES[folder]}/{path.relative_to(source / folder).as_posix()}" for folder, path in found}


def _belongs(path: Path) -> bool:
    return path.is_file() and (path.suffix in KINDS or path.name == "py.typed")


def main(dist: Path, source: Path) -> int:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    meta = {name.split("/", 1)[1] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {name for folder in TREES for name in (f"{folder}/__init__.py", f"{folder}/py.typed") if (source / name).exists()}
    problems = [f"missing from the wheel: {name}" for name in sorted(expected(source) - held)]
    problems += [f"should not be in the wheel: {name}" for name in sorted(held - expected(source))]
    problems += [f"missing from the wheel's metadata: {name}" for name in sorted({"licenses/LICENSE", "entry_points.txt"} - meta)]
    problems += [f"missing from the sdist: {name}" for name in sorted(({"pyproject.toml", "README.md", "LICENSE"} | sources) - packed)]
    print("\n".join(problems) or f"{wheel.name} holds {len(held)} files, {sdist.name} {len(packed)} entries")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
