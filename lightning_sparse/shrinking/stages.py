"""Shrink in stages: cut, fine-tune and validate in turn while the metric stays in a budget. An interrupted run is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_sparse import _checks, surgery
from lightning_sparse.export import latency
from lightning_sparse.shrinking.files import load_shrunk, save_shrunk
from lightning_sparse.shrinking.report import count_multiply_adds, measure

_FILE = "state.json"
_SECONDS = 1.0  # of a measurement of latency
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Budget:
    """What a smaller network may lose and has to reach.

    Shrinking ends once all given goals are reached; without a goal it goes on while the drop allows it. Raises ValueError for values
    out of range, and where neither a drop nor a goal is given.

    Args:
        max_drop: how much worse than the dense network's the metric may be: in points of 0.01 if both lie in [0, 1] and larger is
            better, else in the metric's own units. None: any.
        max_params: goal: at most so many parameters.
        max_multiply_adds: goal: at most this share of the dense network's multiply-adds.
        max_latency: goal: at most so many milliseconds a call, median of the measurement.
        speed_up: goal: so many times faster than the dense network, measured in interleaved rounds with it.
        device: where latency is measured, "cpu" or "cuda".
    """

    max_drop: float | None = None
    max_params: int | None = None
    max_multiply_adds: float | None = None
    max_latency: float | None = None
    speed_up: float | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ValueError(f"max_drop must be at least 0, got {self.max_drop}")
        if self.max_params is not None:
            _checks.whole("max_params", self.max_params, 1)
        if self.max_multiply_adds is not None:
            _checks.share("max_multiply_adds", self.max_multiply_adds)
        if self.max_latency is not None:
            _checks.positive("max_latency", self.max_latency)
        if self.speed_up is not None and not self.speed_up > 1:
            raise ValueError(f"speed_up must be larger than 1, got {self.speed_up}")
        if self.max_drop is None and not self.goals():
            raise ValueError("give max_drop, or at least one of max_params, max_multiply_adds, max_latency and speed_up")
        if self.device not in DEVICES:
            raise ValueError(f"latency is measured on {' or '.join(map(repr, DEVICES))}, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("latency is to be measured on 'cuda', but torch finds no CUDA device: measure where there is one, or on 'cpu'")

    @property
    def is_timed(self) -> bool:
        """True if a goal needs a measurement of latency."""
        return self.max_latency is not None or self.speed_up is not None

    def goals(self) -> dict[str, float]:
        """Return the goals that are given, by name."""
        names = ("max_params", "max_multiply_adds", "max_latency", "speed_up")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def missed(self, figures: Mapping[str, Any], dense: Mapping[str, Any]) -> list[str]:
        """Return the names of the goals that these figures of a network do not reach."""
        reached = {
            "max_params": figures["parameters"] <= (self.max_params or 0),
            "max_multiply_adds": figures["multiply_adds"] <= (self.max_multiply_adds or 0) * dense["multiply_adds"],
            "max_latency": figures.get("milliseconds", math.inf) <= (self.max_latency or 0),
            "speed_up": figures.get("times_faster", 0) >= (self.speed_up or 0),
        }
        return [name for name in self.goals() if not reached[name]]


@dataclass
class State:
    """What ``state.json`` holds: the settings of the run, the dense network's figures, and the stages so far.

    A stage is {"number", "counts", "drop", "metric", "parameters", "multiply_adds"}, with "milliseconds" and "times_faster" where the
    budget needs them, and {"smallest": True} where no group was left to remove.
    """

    settings: dict[str, Any]
    dense: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def last(self) -> dict[str, Any]:
        """Return the last stage that counts, or the dense network's figures."""
        return next((stage for stage in reversed(self.stages) if stage["counts"]), {"number": 0, **self.dense})


class OtherSettings(ValueError):
    """The folder holds a run with other settings."""


def resumed(folder: Path, settings: dict[str, Any]) -> State:
    """Return the state of a folder, or a new one. Raises ValueError if it is damaged, OtherSettings if it is of another run."""
    path = folder / _FILE
    if not path.is_file():
        return State(settings)
    try:
        state = State(**json.loads(path.read_text(encoding="utf-8")))
        state.last()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}; give another folder") from error
    if state.settings != settings:
        other = sorted(name for name in settings.keys() | state.settings.keys() if state.settings.get(name) != settings.get(name))
        raise OtherSettings(f"{folder} holds a run with other settings of {', '.join(other)}: give another folder, or the same settings")
    return state


class Stages:
    """A run of stages in one folder. :meth:`run` goes on from where the folder stands.

    A stage cuts the last network that counts to 1 - ``step`` of its multiply-adds, fine-tunes and validates it. It counts if the
    metric stayed in the budget. After one that drops more, the cut is half as large; after two in a row the run ends. Each network that
    counts is saved (``stage-1`` and so on, as by :func:`save_shrunk`), and ``state.json`` keeps the figures.

    Args:
        folder: where all files go.
        dense: the dense, trained network. It is not changed.
        inputs: example inputs; multiply-adds are those of one call on them.
        budget: what may be lost and has to be reached.
        cut: (module, multiply_adds) to a smaller copy that takes at most about so many, or None if nothing can go. It gets a copy, which
            it may train.
        tune: trains a network in place.
        validate: returns a network's metric.
        mode: whether a larger ("max") or a smaller ("min") metric is better.
        step: share of the multiply-adds that a stage cuts.
        most: number of stages at most.
        timed_inputs: example inputs at the batch size at which latency is measured; None takes ``inputs``.
        settings: what else the run depends on, as plain values; a folder of a run with other settings is refused.
    """

    def __init__(
        self,
        folder: str | Path,
        dense: nn.Module,
        inputs: Any,
        budget: Budget,
        *,
        cut: Callable[[Any, int], Any],
        tune: Callable[[Any], object],
        validate: Callable[[Any], float],
        mode: str = "max",
        step: float = 0.25,
        most: int = 12,
        timed_inputs: Any = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        self.folder, self.dense, self.inputs, self.budget, self.mode = Path(folder), dense, inputs, budget, mode
        self.cut, self.tune, self.validate = cut, tune, validate
        self.timed_inputs = inputs if timed_inputs is None else timed_inputs
        self.step, self.most = _checks.share("step", step), _checks.whole("most", most, 1)
        self.state = resumed(self.folder, {**asdict(budget), "mode": mode, "step": step, "most": most, **(settings or {})})

    def run(self) -> Any:
        """Run all stages that are missing, and return the last network that counts, or the dense one."""
        for _ in self:
            pass
        return self.network()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Run the stages that are missing, and yield the figures of each."""
        if not self.state.dense:
            self.state.dense = self.figures(self.dense)
            self.write()
        while not self.is_done():
            yield self._stage()

    def is_done(self) -> bool:
        """Return True if the goals are reached, two stages in a row dropped too much, or nothing is left to do."""
        stages = self.state.stages
        reached = bool(self.budget.goals()) and not self.budget.missed(self.state.last(), self.state.dense)
        failed = len(stages) >= 2 and not any(stage["counts"] for stage in stages[-2:])
        return reached or failed or len(stages) >= self.most or (bool(stages) and stages[-1].get("smallest", False))

    def network(self) -> Any:
        """Return the last network that counts, or the dense one."""
        number = self.state.last()["number"]
        return load_shrunk(self.folder / f"stage-{number}", self.dense) if number else self.dense

    def write(self) -> None:
        """Write ``state.json``, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f"{_FILE}.part"
        beside.write_text(json.dumps(vars(self.state), indent=1) + "\n", encoding="utf-8")
        beside.replace(self.folder / _FILE)

    def figures(self, module: nn.Module) -> dict[str, Any]:
        """Return the metric, parameters and multiply-adds of a network, and its latency where the budget needs it."""
        found: dict[str, Any] = {"metric": float(self.validate(module)), "parameters": sum(p.numel() for p in module.parameters())}
        found["multiply_adds"] = count_multiply_adds(module, self.inputs)
        if self.budget.is_timed:
            timing = self.timing(module)
            found |= {"milliseconds": 1e3 * timing.seconds, "times_faster": timing.times_faster}
        return found

    def timing(self, module: nn.Module) -> latency.Timing:
        """Measure a network in interleaved rounds with the dense one."""
        return measure(self.dense, module, self.timed_inputs, _SECONDS, self.budget.device)["after"]

    def drop(self, metric: float) -> float:
        """Return how much worse a metric is than the dense network's: in points, else in its own units (see :meth:`is_in_points`)."""
        scale = 100.0 if self.is_in_points(metric) else 1.0
        return float(scale * (self.state.dense["metric"] - metric) * (1 if self.mode == "max" else -1))

    def is_in_points(self, metric: float) -> bool:
        """Return True if the drop is in points of 0.01: larger is better, and the metric and the dense network's lie in [0, 1]."""
        return self.mode == "max" and 0 <= metric <= 1 and 0 <= self.state.dense["metric"] <= 1

    def _stage(self) -> dict[str, Any]:
        """Cut, fine-tune and validate; keep the smaller network if it counts."""
        last, number = self.state.last(), len(self.state.stages) + 1
        failed = bool(self.state.stages) and not self.state.stages[-1]["counts"]
        smaller = self.cut(surgery.duplicate(self.network()), int(last["multiply_adds"] * (1 - self.step / (2 if failed else 1))))
        if smaller is None:
            stage = {**last, "number": number, "counts": False, "smallest": True}
        else:
            self.tune(smaller)
            figures = self.figures(smaller)
            drop = self.drop(figures["metric"])
            most = math.inf if self.budget.max_drop is None else self.budget.max_drop
            stage = {"number": number, "counts": drop <= most, "drop": drop, **figures}  # a metric that is NaN does not count
            if stage["counts"]:
                save_shrunk(smaller, self.folder / f"stage-{number}")
        self.state.stages.append(stage)
        self.write()
        return stage
