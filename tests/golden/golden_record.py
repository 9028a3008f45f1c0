"""Record of golden runs, and comparison of runs."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import numpy
import torch
from golden_cases import names, run
from torch import Tensor

PATH = Path(__file__).parent / "record.json"
_PARTS = ("weights", "optimizer", "logged", "file")
_LEFT_OUT = ("pytorch-lightning_version", "hparams_name", "hyper_parameters")
Found = dict[str, Any]


def digest(value: Any) -> str:
    """Hash numbers, tensors and containers of them; equal bits give equal hashes."""
    found = hashlib.blake2b(digest_size=8)
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        dense = value.detach().cpu().contiguous()
        found.update(f"tensor {dense.dtype} {tuple(dense.shape)}".encode())
        found.update(dense.flatten().view(torch.uint8).numpy().tobytes() if dense.numel() else b"")
    elif isinstance(value, dict):
        found.update(b"dict")
        for key in sorted(value, key=repr):
            found.update(repr(key).encode())
            _feed(found, value[key])
    elif isinstance(value, (list, tuple)):
        found.update(b"list")
        for item in value:
            _feed(found, item)
    else:
        found.update((value.hex() if isinstance(value, float) else repr(value)).encode())


def fingerprint() -> dict[str, str]:
    """Return machine and versions, on which the last bits of results depend."""
    cpu = torch.backends.cpu.get_cpu_capability()
    lines = dict(map(str.strip, line.split(":", 1)) for line in _cpu_lines() if ":" in line)
    model = [lines.get(key, "") for key in ("cpu family", "model", "stepping")]  # because one name is given to processors of several kinds
    return {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": numpy.__version__,
        "cpu": f"{cpu} {lines.get('model name', platform.processor())} {'/'.join(model)}",
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Use one thread and no messages inside the context."""
    logger, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)


def found(name: str, setting: str) -> Found:
    """Run one case; return hashes, and three figures that do not depend on the last bits."""
    try:
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            network, trainer, logger, file = run(name, setting, Path(folder))
    except (ValueError, FloatingPointError) as error:  # a refusal is also a result
        return {"refused": f"{type(error).__name__}: {error}"}
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    kept = {key: value for key, value in file.items() if key not in _LEFT_OUT}
    kept["callbacks"] = {key: state for key, state in kept["callbacks"].items() if not key.startswith("ModelCheckpoint")}
    values = (weights, [optimizer.state_dict() for optimizer in trainer.optimizers], logger.figures, kept)
    matrices = [w for w in weights.values() if w.dim() > 1]
    zeros = sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)
    squares = float(sum(w.double().square().sum() for w in weights.values()))
    hashes = {part: digest(value) for part, value in zip(_PARTS, values, strict=True)}
    return hashes | {"step": trainer.global_step, "zeros": round(zeros, 4), "squares": float(f"{squares:.5g}")}


def written(path: Path, only: str) -> int:
    """Run the cases in ``only`` and write the record; keep the other runs of an existing record."""
    runs = read(path)["runs"] if only and path.exists() else {}
    new = {f"{name} / {setting}": found(name, setting) for name, setting in names(only)}
    record = {"made by": "python tests/golden record", "on": fingerprint(), "runs": runs | new}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return len(new)


def read(path: Path) -> dict[str, Any]:
    """Read the record."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def compared(record: dict[str, Any], only: str = "") -> tuple[list[str], int, bool]:
    """Return lines about runs that differ from ``record``, the number of runs, and whether hashes were compared."""
    exact, problems, count = record["on"] == fingerprint(), [], 0
    for name, setting in names(only):
        count += 1
        key = f"{name} / {setting}"
        old, new = record["runs"].get(key), found(name, setting)
        odd = ["no record"] if old is None else differences(old, new, exact)
        if odd:
            problems.append(f"{key}: {', '.join(odd)}")
    return problems, count, exact


def differences(old: Found, new: Found, exact: bool) -> list[str]:
    """Return the differences of two runs: of hashes if comparable, otherwise of figures beyond rounding."""
    if "refused" in old or "refused" in new:
        return [] if old == new else [f"{old} -> {new}"]
    if exact:
        return [f"{part} {old[part]} -> {new[part]}" for part in (*_PARTS, "step", "zeros") if old[part] != new[part]]
    near = abs(old["zeros"] - new["zeros"]) <= 0.05 and abs(old["squares"] - new["squares"]) <= 0.05 * abs(old["squares"])
    return [] if near and old["step"] == new["step"] else [f"{old} -> {new}"]
