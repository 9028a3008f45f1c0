"""Table of measured gains: how many times faster a sparse product is than the dense one, on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_sparse.export import latency
from lightning_sparse.export.layers import SparseLinear

_LEAST = 1.1  # a smaller gain is not worth a layer that cannot be trained


@dataclass(frozen=True)
class Gain:
    """One entry of the table.

    Args:
        times_faster: median of (time of the dense product) / (time of the sparse product) in one round.
        low: lower quartile of that ratio.
        noise: upper quartile of the ratio of two dense products (A/A).
    """

    times_faster: float
    low: float
    noise: float

    @property
    def pays(self) -> bool:
        """True if the lower quartile is above what two identical products differ by, and above 1.1."""
        return self.low > max(self.noise, _LEAST)


class Table:
    """Gains by layout, shape, number of non-zero weights, batch size, data type, device and threads.

    A gain is measured when it is first needed.

    Args:
        folder: where the table is kept between processes, one file for each machine and version of torch; None keeps it in memory.
        budget: seconds for one measurement.
    """

    def __init__(self, folder: Path | None = None, budget: float = 0.1) -> None:
        self.file = None if folder is None else folder / f"gains-{_machine()}.json"
        self.budget = budget
        self.entries: dict[str, Gain] = self._read()

    def gain(self, weight: Tensor, bias: Tensor | None, layout: str, block: int, batch_size: int) -> Gain:
        """Return the gain of ``layout`` for this matrix at this batch size; measure it with this matrix unless the table has it."""
        key = _key(weight, layout, block, batch_size)
        if key not in self.entries:
            self.entries[key] = self._measure(weight, bias, layout, block, batch_size)
            self._write()
        return self.entries[key]

    def _measure(self, weight: Tensor, bias: Tensor | None, layout: str, block: int, batch_size: int) -> Gain:
        x = torch.randn(batch_size, weight.shape[1], dtype=weight.dtype, device=weight.device, generator=_generator(weight.device))
        sparse = SparseLinear(weight, bias, layout, block)

        def wait(y: Tensor) -> Tensor:
            if y.is_cuda:
                torch.cuda.synchronize(y.device)
            return y

        with torch.inference_mode():
            arms = {"dense": lambda: wait(nn.functional.linear(x, weight, bias)), "sparse": lambda: wait(sparse(x))}
            clock = time.perf_counter if weight.is_cuda else None
            found = latency.measure(arms, "dense", self.budget, clock=clock)
        return Gain(found["sparse"].times_faster, found["sparse"].low, found[latency.AGAIN].high)

    def _read(self) -> dict[str, Gain]:
        if self.file is None or not self.file.is_file():
            return {}
        try:
            return {key: Gain(**values) for key, values in json.loads(self.file.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # a damaged table is measured again
            return {}

    def _write(self) -> None:
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False, encoding="utf-8") as fresh:
                json.dump({key: asdict(gain) for key, gain in self.entries.items()}, fresh, indent=1)
            os.replace(fresh.name, self.file)
        except OSError:  # a home without write access: the table stays in memory
            self.file = None


def cache_folder() -> Path:
    """Return the folder for the table: LIGHTNING_SPARSE_CACHE, else ``lightning-sparse`` in XDG_CACHE_HOME or ``~/.cache``."""
    if own := os.environ.get("LIGHTNING_SPARSE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-sparse"


def _key(weight: Tensor, layout: str, block: int, batch_size: int) -> str:
    """Return the key; the number of non-zero weights is rounded to two digits, so that similar layers share a measurement."""
    kept = float(f"{int(weight.count_nonzero()):.2g}")
    where = torch.cuda.get_device_name(weight.device) if weight.is_cuda else f"{weight.device.type} {torch.get_num_threads()} threads"
    kind = layout if layout == "csr" else f"{layout} {block} {float(f'{filled_blocks(weight, block):.2g}'):g}"
    return f"{kind}, {tuple(weight.shape)}, {kept:.0f} non-zero, batch {batch_size}, {str(weight.dtype).removeprefix('torch.')}, {where}"


def filled_blocks(weight: Tensor, block: int) -> float:
    """Return the share of ``block`` x ``block`` blocks with a non-zero weight; 1.0 if a side is not a multiple of ``block``."""
    rows, columns = weight.shape
    if rows % block or columns % block:
        return 1.0
    blocks = weight.detach().ne(0).reshape(rows // block, block, columns // block, block)
    return float(blocks.any(3).any(1).float().mean())


def _machine() -> str:
    """Return a short name of this machine's processor and version of torch."""
    processor = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        lines = cpus.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    name = f"{platform.node()} {processor} {os.cpu_count()} torch {torch.__version__}"
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
