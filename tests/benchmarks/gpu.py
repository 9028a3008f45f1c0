"""What only a CUDA device can show, in at most eight minutes: tests, step cost, host synchronisations, compilation, 2:4 layers.

    python tests/benchmarks/gpu.py --out gpu.json                    # all sections; prints a line for each figure
    python tests/benchmarks/gpu.py --only steps syncs --minutes 4
    python tests/benchmarks/gpu.py --smoke                           # small networks on the CPU: does the script itself work?

Each section starts only while --minutes are left, and the file holds what was measured until then. Sections:

- tests: the tests marked gpu (fp16 GradScaler, fused and capturable optimisers, NCCL where there are two devices, 2:4 layers).
- steps: milliseconds a training step and peak memory of each form, of torchao's PruneOptimizer and of Lightning's ModelPruning, in bf16
  on ResNet-50 (224 x 224) and a transformer of 12 layers, as ratios to the plain step of the same round; the plain step runs twice (A/A).
- syncs: host synchronisations a step that each form adds to the plain step. Goal: none.
- compiled: a step under torch.compile, and with CUDA graphs, against the eager step: equal, or refused with an error.
- structured: 2:4 layers against dense ones in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from performance import cases
from torch import Tensor, nn

from lightning_sparse.callbacks import AdaptiveProx, ReweightedPenalty
from lightning_sparse.export import latency, semi_structured

ROOT = Path(__file__).resolve().parents[2]
PLAIN = "plain"
TOLERANCE = 1e-3  # of a weight's change, between compiled and eager steps in float32


@dataclass(frozen=True)
class Size:
    """Sizes of the networks and where they run."""

    device: str
    precision: Any
    image: int
    images: int
    layers: int
    width: int
    length: int
    texts: int
    side: int
    rounds: int
    resnet: str
    warm: int
    counted: int  # of the steps of a run; the curvature is estimated every 10 steps, so that 20 hold it twice


REAL = Size("cuda", "bf16-mixed", 224, 64, 12, 768, 256, 32, side=4096, rounds=3, resnet="resnet50", warm=12, counted=20)
SMOKE = Size("cpu", "32-true", 32, 2, 1, 64, 4, 2, side=64, rounds=1, resnet="resnet18", warm=1, counted=2)


class Network(LightningModule):
    """A network on one batch in memory, by name: "resnet" or "transformer"; ``lasso`` wraps the optimiser in torchao's."""

    def __init__(self, name: str, size: Size, lasso: bool = False) -> None:
        super().__init__()
        self.steps = size.warm + size.counted + 1  # the last one ends the count
        if name == "resnet":
            self.net, shape = torchvision.models.get_model(size.resnet), (size.images, 3, size.image, size.image)
            labels: tuple[int, ...] = (size.images,)
        else:
            layer = nn.TransformerEncoderLayer(size.width, size.width // 64, 4 * size.width, dropout=0.0, batch_first=True)
            stack = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
            self.net, shape = nn.Sequential(stack, nn.Linear(size.width, 1000)), (size.texts, size.length, size.width)
            labels = shape[:2]
        self.lasso = lasso
        self.batch = (torch.randn(shape, device=size.device), torch.randint(1000, labels, device=size.device))

    def training_step(self, batch: Any, index: int) -> Tensor:
        scores = self.net(self.batch[0])
        return nn.functional.cross_entropy(scores.flatten(0, -2), self.batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return cases.lasso(self) if self.lasso else torch.optim.Adam(self.parameters(), 1e-4, fused=self.batch[0].is_cuda)

    def train_dataloader(self) -> list[int]:
        return list(range(self.steps))


class Watch(Callback):
    """Measure the counted steps: milliseconds each, host synchronisations in all. Give it first among the callbacks."""

    def __init__(self, size: Size, syncs: bool = False) -> None:
        self.first, self.last, self.syncs, self.seen, self.marks = size.warm, size.warm + size.counted, syncs, 0, []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if not self.syncs:
            self.marks += [_mark(module.device)] if index >= self.first else []
        elif index == self.first:
            self.catcher = warnings.catch_warnings(record=True)
            self.caught = self.catcher.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif index == self.last:
            torch.cuda.set_sync_debug_mode("default")
            self.catcher.__exit__(None, None, None)
            self.seen = sum("synchroniz" in str(one.message) for one in self.caught)

    def milliseconds(self) -> float:
        """Return the median of the counted steps."""
        if isinstance(self.marks[0], float):
            return statistics.median(1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False))
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False))


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def arms() -> dict[str, Callable[[], list[Callback]] | None]:
    """Return {name: callbacks}; None stands for torchao's optimiser."""
    forms: dict[str, Any] = {name: lambda make=make: [make()] for name, make in cases.FORMS.items()}
    pruning = {"Lightning's ModelPruning": lambda: [ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False)]}
    return {PLAIN: lambda: [], latency.AGAIN: lambda: [], **forms, **pruning, "torchao's PruneOptimizer": None}


def fit(name: str, size: Size, make: Callable[[], list[Callback]] | None, watch: Watch) -> LightningModule:
    """Train for the warm and the counted steps."""
    seed_everything(0, verbose=False)
    module = Network(name, size, lasso=make is None).to(size.device)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    where = "gpu" if size.device == "cuda" else "cpu"
    callbacks = [watch, *(make() if make else [])]
    Trainer(accelerator=where, devices=1, max_epochs=1, precision=size.precision, callbacks=callbacks, **quiet).fit(module)
    return module


def steps(size: Size, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Measure each arm once a round; yield one row for each network and arm."""
    for network in ("resnet", "transformer"):
        taken: dict[str, list[float]] = {}
        memory: dict[str, float] = {}
        failed: dict[str, str] = {}
        fit(network, size, lambda: [], Watch(size))  # not counted, because the first run loads kernels
        for _ in range(size.rounds):
            for name, make in arms().items():
                if name in failed or left() < 20:
                    continue
                watch = Watch(size)
                if size.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                try:
                    fit(network, size, make, watch)
                except Exception as error:  # a row of the table, and not the end of the run
                    failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    continue
                taken.setdefault(name, []).append(watch.milliseconds())
                memory[name] = torch.cuda.max_memory_allocated() / 2**30 if size.device == "cuda" else 0.0
        for name, values in taken.items():
            ratios = [mine / plain for mine, plain in zip(values, taken[PLAIN], strict=False)]
            row = {"network": network, "arm": name, "ms": statistics.median(values), "ratio": statistics.median(ratios)}
            yield row | {"ratios": ratios, "peak_gib": memory[name]}
        yield from ({"network": network, "arm": name, "error": text} for name, text in failed.items())


def syncs(size: Size, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Count host synchronisations a step above the plain step's."""
    if size.device != "cuda":
        yield {"skipped": "host synchronisations are counted on CUDA only"}
        return
    plain = 0.0
    for name, make in arms().items():
        if left() < 20:
            return
        watch = Watch(size, syncs=True)
        try:
            fit("transformer", size, make, watch)
        except Exception as error:
            yield {"arm": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            continue
        found = watch.seen / size.counted
        plain = found if name == PLAIN else plain
        yield {"arm": name, "a_step": found, "above_plain": found - plain}


def compiled(size: Size, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Compare the weights after compiled steps with those after eager ones; an error that is raised counts as refused."""
    for mode in ("default", "reduce-overhead"):
        for form in (ReweightedPenalty, AdaptiveProx):
            if left() < 40:
                return
            row: dict[str, Any] = {"mode": mode, "form": form.__name__}
            try:
                found = [_weights(form, mode if compile_ else None, size) for compile_ in (False, True)]
            except Exception as error:
                yield row | {"outcome": "refused", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
                continue
            (start, eager), (_, other) = found
            change = max(float((eager[key] - start[key]).abs().max()) for key in eager)
            apart = max(float((eager[key] - other[key]).abs().max()) for key in eager) / change
            yield row | {"outcome": "equal" if apart < TOLERANCE else "WRONG", "largest_difference_of_the_change": apart}


def _weights(form: Any, mode: str | None, size: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train a small network; return its weights before and after."""
    seed_everything(0, verbose=False)
    module = _Small(size.device)
    before = {name: p.detach().cpu().clone() for name, p in module.named_parameters()}
    if mode is not None:
        module.net.compile(mode=mode)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    where = "gpu" if size.device == "cuda" else "cpu"
    Trainer(accelerator=where, devices=1, max_epochs=1, callbacks=[form(cases.LOG_SUM, 1e-3)], **quiet).fit(module)
    return before, {name: p.detach().cpu() for name, p in module.named_parameters()}


class _Small(LightningModule):
    """Two Linear layers in float32, twenty steps."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.batch = (torch.randn(64, 64, device=device), torch.randint(10, (64,), device=device))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.batch[0]), self.batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> list[int]:
        return list(range(20))


def structured(size: Size, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Time a 2:4 layer against the dense one at three batch sizes."""
    if size.device != "cuda":
        yield {"skipped": "2:4 layers are on CUDA only"}
        return
    torch.manual_seed(0)
    layer = nn.Linear(size.side, size.side, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        smallest = layer.weight.abs().unflatten(1, (-1, 4)).argsort(2)[..., :2]
        layer.weight.copy_(layer.weight.unflatten(1, (-1, 4)).scatter(2, smallest, 0.0).flatten(1))
    packed = semi_structured(layer)
    for batch in (1, 256, 4096):
        x = torch.randn(batch, size.side, device="cuda", dtype=torch.bfloat16)

        def waiting(net: nn.Module, x: Tensor = x) -> Callable[[], None]:
            def call() -> None:
                net(x)
                torch.cuda.synchronize()

            return call

        with torch.inference_mode():
            found = latency.measure({"dense": waiting(layer), "2:4": waiting(packed)}, "dense", 2.0, (11, 201), time.perf_counter)
            apart = float((packed(x) - layer(x)).abs().max() / layer(x).abs().max())
        again = found[latency.AGAIN]
        row = {"batch": batch, "dense_ms": 1e3 * found["dense"].seconds, "times_faster": found["2:4"].times_faster}
        yield row | {"again": [again.low, again.high], "difference": apart}


def tests(size: Size, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Run the tests marked gpu in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        try:
            subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=max(30, min(240, left() - 60)), check=False)
        except subprocess.TimeoutExpired:
            yield {"error": "the tests took too long"}
            return
        for case in ElementTree.parse(report).iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            outcome = "passed" if problem is None else problem.tag
            said = "" if problem is None else (problem.get("message") or "")[:300]
            yield {"test": f"{case.get('classname')}.{case.get('name')}", "outcome": outcome, "said": said}


SECTIONS = {"syncs": syncs, "structured": structured, "compiled": compiled, "tests": tests, "steps": steps}  # the longest last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--smoke", action="store_true", help="small networks on the CPU")
    given = parser.parse_args()
    size = SMOKE if given.smoke else REAL
    if size.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --smoke runs small networks on the CPU")
    warnings.filterwarnings("ignore")
    end = time.perf_counter() + 60 * given.minutes
    device = torch.cuda.get_device_name() if size.device == "cuda" else "cpu"
    record: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "device": device, "results": {}}
    for name in given.only:
        rows = record["results"].setdefault(name, [])
        if time.perf_counter() > end - 20:
            rows.append({"skipped": f"no time left of {given.minutes:g} minutes"})
            continue
        began = time.perf_counter()
        for row in SECTIONS[name](size, lambda: end - time.perf_counter()):
            rows.append(row)
            print(name, json.dumps(row), flush=True)
            given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        rows.append({"seconds": time.perf_counter() - began})
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
