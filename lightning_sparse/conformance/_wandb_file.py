"""Reader for the file of an offline W&B run."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Run(NamedTuple):
    """The content of a run's file: history rows, config, summary, and tables by name."""

    history: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    tables: dict[str, Any]


def _records(path: Path) -> Iterator[Any]:
    """Yield the protobuf records of a .wandb file: a LevelDB log of 32 KiB blocks after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + size > len(data):
            return  # still being written
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a full record, or the last fragment of one
            record: Any = vars(wandb_internal_pb2)["Record"]()
            record.ParseFromString(parts)
            parts = b""
            yield record


def _finished(path: Path) -> list[Any]:
    """Return all records, after waiting for the exit record."""
    # because wandb's service may still be writing when finish() returns; the exit record comes last
    for _ in range(400):
        records = list(_records(path))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.05)
    raise TimeoutError(f"{path} has no exit record after 20 s")


def _put(target: dict[str, Any], item: Any) -> None:
    *path, last = list(item.nested_key) or [item.key]
    for key in path:
        target = target.setdefault(key, {})
    target[last] = json.loads(item.value_json)


def read_run(folder: Path) -> Run:
    """Read the only W&B run below ``folder``, once its file is complete."""
    (path,) = folder.rglob("*.wandb")
    run = Run([], {}, {}, {})
    for record in _finished(path):
        if record.HasField("history"):
            run.history.append({})
        for items, target in (
            (record.history.item, run.history[-1] if run.history else {}),
            (record.config.update, run.config),
            (record.run.config.update, run.config),
            (record.summary.update, run.summary),
        ):
            for item in items:
                _put(target, item)
    for row in run.history:
        tables = {name: value["path"] for name, value in row.items() if isinstance(value, dict) and value.get("_type") == "table-file"}
        run.tables.update({name: json.loads((path.parent / "files" / file).read_text(encoding="utf-8")) for name, file in tables.items()})
    return run


def history(folder: Path) -> dict[int, dict[str, float]]:
    """Return the logged numbers by Lightning's step."""
    rows: dict[int, dict[str, float]] = {}
    for row in read_run(folder).history:
        step = row.get("trainer/global_step")
        if step is not None:
            rows.setdefault(int(step), {}).update({key: float(value) for key, value in row.items() if isinstance(value, (int, float))})
    return rows
