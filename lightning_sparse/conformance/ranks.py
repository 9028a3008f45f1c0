"""Two ranks on the CPU (gloo): they have the same zeros, log the same figures and resume exactly."""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import NAME, Callback, ModelCheckpoint, ModelParallelStrategy
from lightning_sparse.conformance._processes import call
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require
from lightning_sparse.conformance.resume import first_difference

GROUP = "ranks"
DDP = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}


def on_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(rank, *arguments)`` in two processes, the ranks of one Lightning run, and return both results.

    Raises RuntimeError with the tracebacks of all ranks that raised.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()  # because only Linux lets rank 0 listen on a port that is bound here; kept, no other process is given it
        answers = call(_rank, *[(rank, port, function, arguments) for rank in range(2)])
    errors = [f"rank {rank}: {error.splitlines()[-1]}\n{error}" for rank, (_, error) in enumerate(answers) if error]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [value for value, _ in answers]


def _rank(rank: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str]:
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ.update(addresses | {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    for name in (NAME, "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return function(rank, *arguments), ""
    except Exception:
        return None, traceback.format_exc()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _EpochRecorder(Callback):
    """Record the module's state_dict at the end of each epoch and the Trainer's metrics at the start of each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.figures: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.figures.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def _ddp(rank: int, subject: Subject) -> dict[str, Any]:
    """Fit under DDP with a different model, seed and data on each rank."""
    module, recorder = subject.model(seed=rank), _EpochRecorder()
    torch.manual_seed(1000 + rank)
    trainer = subject.fit(module, recorder, loader=toys.data(seed=2 * rank), epochs=3, **DDP)
    figures = [*recorder.figures, {name: float(value) for name, value in trainer.callback_metrics.items()}]
    return {"states": [*recorder.states, dict(module.state_dict())], "figures": figures}


@check("two DDP processes with different seeds and data have the same weights and zeros after every epoch", GROUP, slow=True)
def ranks_hold_the_same_zeros(subject: Subject, folder: Path) -> None:
    first, second = (answer["states"] for answer in on_ranks(_ddp, subject))
    difference = first_difference([_zeros(state) for state in first], [_zeros(state) for state in second])
    require(not difference, f"the ranks' zeros differ at {difference}")
    difference = first_difference(first, second)
    require(not difference, f"the ranks' weights differ at {difference}")
    require(any(mask.any() for mask in _zeros(first[-1]).values()), "no weight was zero on either rank")


def _zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value == 0 for name, value in state.items()}


@check("a callback logs the same figures on two DDP processes", GROUP, slow=True)
def ranks_log_the_same_figures(subject: Subject, folder: Path) -> None:
    first, second = (answer["figures"] for answer in on_ranks(_ddp, subject))
    # without the toy's val/loss, because each rank has its own data
    own = [name for name in sorted(first[-1].keys() | second[-1].keys()) if not name.startswith("val")]
    if not own:
        raise NotApplicable("the callback logs no figures")
    for epoch, (a, b) in enumerate(zip(first, second, strict=True)):
        for name in own:
            require(a.get(name) == b.get(name), f"before epoch {epoch} {name!r} is {a.get(name)} on rank 0 and {b.get(name)} on rank 1")


def _resumable(rank: int, subject: Subject, folder: Path, path: Path | None) -> dict[str, Tensor]:
    module = subject.model(seed=rank, decay=12)
    torch.manual_seed(1000 + rank + (0 if path is None else 10))
    keeper = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    resume = {} if path is None else {"ckpt_path": path}
    subject.fit(module, keeper, loader=toys.data(seed=2 * rank), epochs=3, enable_checkpointing=True, **(DDP | resume))
    return dict(module.state_dict())


@check("a run of two DDP processes, resumed with other seeds, equals the uninterrupted one bit for bit", GROUP, slow=True)
def ranks_resume_exactly(subject: Subject, folder: Path) -> None:
    difference = _difference(subject, folder / "own")
    if difference and _difference(Subject("nothing", tuple, subject.optimizer), folder / "control"):
        raise NotApplicable("Lightning's own run of two processes is not resumed exactly either")
    require(not difference, f"resumed after the first epoch, rank and weights {difference} differ")


def _difference(subject: Subject, folder: Path) -> str:
    uninterrupted = on_ranks(_resumable, subject, folder / "uninterrupted", None)
    resumed = on_ranks(_resumable, subject, folder / "resumed", folder / "uninterrupted" / "epoch=0.ckpt")
    return first_difference(uninterrupted, resumed)


class ShardedToy(toys.Toy):
    """A :class:`toys.Toy` sharded by FSDP2 in two groups: the first layer, and the rest of the network."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.network, FSDPModule):
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            fully_shard(next(self.network.children()), mesh=mesh)
            fully_shard(self.network, mesh=mesh)


def split(**options: Any) -> dict[str, Any]:
    """Return Trainer options for FSDP2 on two processes."""
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **options)
    return {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}


def obstacle() -> str:
    """Return why FSDP2 does not run on this CPU without any callback (as in torch 2.6), or an empty string. Call it on both ranks."""
    try:
        toys.trainer(epochs=1, **split()).fit(ShardedToy(), toys.data())
    except Exception as error:
        return f"FSDP2 on the CPU ends with {type(error).__name__}: {error}, also without a callback"
    return ""


def _both(rank: int, subject: Subject, folder: Path) -> dict[str, Any]:
    """Fit under DDP and under FSDP2, saving a full checkpoint of the latter; or return why the callback refuses FSDP2."""
    plain = subject.model()
    subject.fit(plain, loader=toys.data(seed=2 * rank), epochs=3, **DDP)
    options: dict[str, Any] = {"optimizer": subject.optimizer} if subject.optimizer else {}
    module = ShardedToy(**options)
    trainer = subject.trainer(epochs=3, **split(save_distributed_checkpoint=False))
    try:
        trainer.fit(module, toys.data(seed=2 * rank), toys.data(seed=1))
    except Exception as error:
        reasoned = "ModelParallelStrategy" in str(error) and trainer.global_step == 0
        why = "" if reasoned else obstacle()
        return {"refusal" if reasoned or why else "error": why or f"{type(error).__name__}: {error}"}
    trainer.save_checkpoint(folder / "split.ckpt")
    return {"ddp": dict(plain.state_dict())}


@check("FSDP2 on two processes ends like DDP and writes a plain file, or is refused with a reason before training", GROUP, slow=True)
def fsdp2_equals_ddp(subject: Subject, folder: Path) -> None:
    first, second = on_ranks(_both, subject, folder)
    require("error" not in first, f"under FSDP2 the run raises {first.get('error')}")
    if "refusal" in first or "refusal" in second:
        require("refusal" in first and "refusal" in second, "one rank alone refuses ModelParallelStrategy")
        raise NotApplicable(first["refusal"])
    saved = torch.load(folder / "split.ckpt", weights_only=True)["state_dict"]
    for name, value in first["ddp"].items():
        require(torch.equal(saved[name] == 0, value == 0), f"{name!r} has other zeros under FSDP2 than under DDP")
        require(torch.allclose(saved[name], value, rtol=1e-4, atol=1e-6), f"{name!r} differs between FSDP2 and DDP")
