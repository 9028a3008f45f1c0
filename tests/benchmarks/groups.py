"""Compare penalty and mask on channels at one lam, and group penalties with torch-pruning at an equal share of multiply-adds.

    python tests/benchmarks/groups.py --problem lenet5 --arms dense penalty mask --lam 1e-3 --seeds 0 1 --data data
    python tests/benchmarks/groups.py --problem digits --arms "torch-pruning, magnitude" "torch-pruning, group norm" --budget 0.25
    python tests/benchmarks/groups.py --table

Each run adds a line to ``--results``; a command that was interrupted goes on where it stopped. lam is chosen on the validation part
(``--part validation``); the table is of the test part.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, MagnitudePruning, ReweightedPenalty
from lightning_sparse.structure import Channels

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "groups" / "results.jsonl"
PENALTY = penalties.LogSum(eps=2.0)
FREEZE = 0.2  # share of a run at a given lam in which the support is frozen, without noise and penalty
VERSIONS = ("torch", "lightning", "torch-pruning")
Data = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions with batch norm, added to their input."""

    def __init__(self, here: int, there: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(here, there, 3, stride, 1, bias=False), nn.BatchNorm2d(there)
        self.second, self.norm2 = nn.Conv2d(there, there, 3, 1, 1, bias=False), nn.BatchNorm2d(there)
        self.short = nn.Sequential(nn.Conv2d(here, there, 1, stride, bias=False), nn.BatchNorm2d(there)) if here != there else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        out: Tensor = (y + self.short(x)).relu()
        return out


def lenet5() -> nn.Module:
    """Build LeNet-5 in Caffe's variant: 20 and 50 channels, 500 neurons."""
    features = (nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def resnet8() -> nn.Module:
    """Build a ResNet-8: three blocks of 16, 32 and 64 channels."""
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mnist(root: Path) -> tuple[Data, Data, Data]:
    """Return training, validation (12,000 images) and test parts."""
    from lightning_sparse.examples.mnist import MNIST

    made = MNIST(str(root), download=False)
    made.setup("fit")
    return made.parts["training"], made.parts["validation"], made.parts["test"]


def cifar10(root: Path) -> tuple[Data, Data, Data]:
    """Return training, validation (5,000 images) and test parts, from torchvision's files or from npz files of JPEG bytes."""
    x, y = _cifar(root, train=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[5000:]], y[order[5000:]]), (x[order[:5000]], y[order[:5000]]), _cifar(root, train=False)


def _cifar(root: Path, train: bool) -> Data:
    file = root / "CIFAR10" / ("train.npz" if train else "test.npz")
    if file.exists():  # JPEG files one after the other, their offsets, and labels
        import io

        from PIL import Image

        with np.load(file) as held:
            jpeg, offsets, y = held["jpeg"], held["offsets"], torch.from_numpy(held["labels"])
        cuts = itertools.pairwise(offsets)
        x = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(jpeg[i:j].tobytes())).convert("RGB")) for i, j in cuts]))
    else:
        from torchvision import datasets

        found = datasets.CIFAR10(str(root), train=train, download=False)
        x, y = torch.from_numpy(found.data), torch.tensor(found.targets)
    x = x.permute(0, 3, 1, 2).float().div_(255)
    shift, scale = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
    return (x - shift[:, None, None]) / scale[:, None, None], y.long()


def digits(root: Path) -> tuple[Data, Data, Data]:
    """Return scikit-learn's digits, images of 8 x 8: 1,000 to train on, 400 to validate on, 397 to test on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    parts = [(x[part], y[part]) for part in (order[:1000], order[1000:1400], order[1400:])]
    return parts[0], parts[1], parts[2]


def convolutions() -> nn.Module:
    """Build three convolutions with batch norm (16, 32 and 32 channels) and one residual block."""
    layers: list[nn.Module] = []
    for here, there, stride in ((1, 16, 1), (16, 32, 2)):
        layers += [nn.Conv2d(here, there, 3, stride, 1, bias=False), nn.BatchNorm2d(there), nn.ReLU()]
    return nn.Sequential(*layers, Block(32, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


PROBLEMS = {"lenet5": (lenet5, mnist), "resnet8": (resnet8, cifar10), "digits": (convolutions, digits)}
IMAGES = {"lenet5": 48_000, "resnet8": 45_000, "digits": 1_000}  # to train on
PEERS = {"torch-pruning, magnitude": False, "torch-pruning, group norm": True}


class Module(LightningModule):
    """A network under Adam with half a cosine."""

    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network, self.rate = network, rate

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def training_step(self, batch: Any, index: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def callbacks(arm: str, lam: float, target: float, freeze: float) -> list[Callback]:
    """Make the callbacks of an arm; "..., target" arms reach the share ``target`` of zeros."""
    made: dict[str, Any] = {
        "dense": lambda: [],
        "penalty": lambda: [ReweightedPenalty(PENALTY, lam, freeze=freeze, structure=Channels())],
        "mask": lambda: [AdaptiveMask(PENALTY, lam, freeze=freeze, structure=Channels())],
        "mask, weak noise": lambda: [AdaptiveMask(PENALTY, lam, freeze=freeze, alpha_min=0.999, structure=Channels())],
        "prox": lambda: [AdaptiveProx(PENALTY, lam, freeze=freeze, structure=Channels())],
        "penalty, target": lambda: [ReweightedPenalty(PENALTY, target_sparsity=target, structure=Channels())],
        "mask, target": lambda: [AdaptiveMask(PENALTY, target_sparsity=target, structure=Channels())],
        "pruning, target": lambda: [MagnitudePruning(target, every=20, structure=Channels())],
    }
    return made[arm]()  # type: ignore[no-any-return]


def multiply_adds(network: nn.Module, x: Tensor) -> tuple[int, dict[str, int]]:
    """Return the multiply-adds of one sample, and the channels or neurons of each layer, counting those that are not zero."""
    live: dict[str, int] = {}
    total = 0
    sizes: dict[str, tuple[int, ...]] = {}
    handles = [
        part.register_forward_hook(lambda part, _, out, name=name: sizes.__setitem__(name, out.shape))
        for name, part in network.named_modules()
        if isinstance(part, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        network.eval()(x[:1])
    for handle in handles:
        handle.remove()
    for name, part in network.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            w = part.weight.detach()
            rows = int(w.flatten(1).any(1).sum())
            columns = int(w.transpose(0, 1).flatten(1).any(1).sum())
            places = sizes[name][2] * sizes[name][3] if isinstance(part, nn.Conv2d) else 1
            total += rows * columns * places * (w[0, 0].numel() if w.dim() > 2 else 1)
            live[name] = rows
    return total, live


def run(given: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm, and return its figures on a part of the data."""
    network, parts = PROBLEMS[given.problem]
    training, validation, test = parts(given.data)
    training = training[0][: given.samples], training[1][: given.samples]
    seed_everything(seed, verbose=False)
    module, started = Module(network(), given.rate), time.perf_counter()
    module.example_input_array = training[0][:2]
    made = [] if arm in PEERS else callbacks(arm, given.lam, given.target, given.freeze)
    loader = DataLoader(TensorDataset(*training), 64, shuffle=True, drop_last=True)
    if arm in PEERS:  # the same number of epochs: three quarters before the cut, one after
        first = max(1, round(0.75 * given.epochs))
        peer = Peer(module.network, training[0][:1], regularises=PEERS[arm])
        fit(module, loader, first, [peer])
        peer.prune_to(given.budget)
        fit(module, loader, given.epochs - first, [])
    else:
        fit(module, loader, given.epochs, made)
    x, y = validation if given.part == "validation" else test
    module.eval()
    with torch.no_grad():
        wrong = sum(int((module(part).argmax(1) != label).sum()) for part, label in zip(x.split(500), y.split(500), strict=True))
    dense, _ = multiply_adds(network(), x)
    left, live = multiply_adds(module.network, x)
    groups = {axis: (int((~zero).sum()), zero.numel()) for axis, zero in zero_groups(made).items()}
    return {
        "error": 100 * wrong / len(x),
        "multiply_adds": left,
        "of": dense,
        "channels": live,
        "groups": groups,
        "weights": sum(int((p != 0).sum()) for p in module.parameters()),
        "seconds": time.perf_counter() - started,
    }


def fit(module: Module, loader: Any, epochs: int, made: list[Callback]) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(max_epochs=epochs, accelerator="cpu", callbacks=made, **quiet).fit(module, loader)


class Peer(Callback):
    """torch-pruning: magnitude pruning of groups over all layers, or its group norm pruner, which regularises before the cut."""

    def __init__(self, network: nn.Module, x: Tensor, regularises: bool) -> None:
        import torch_pruning

        self.network, self.x, self.regularises = network, x, regularises
        kind = torch_pruning.pruner.GroupNormPruner if regularises else torch_pruning.pruner.MagnitudePruner
        *_, last = [part for part in network.modules() if isinstance(part, nn.Linear)]
        how = {"global_pruning": True, "pruning_ratio": 0.99, "iterative_steps": 200, "ignored_layers": [last]}
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        self.pruner = kind(network, x, importance=importance, **how)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.regularises:
            self.pruner.update_regularizer()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.regularises:
            self.pruner.regularize(self.network)

    def prune_to(self, budget: float) -> None:
        """Prune step by step until this share of the multiply-adds is left."""
        dense, _ = multiply_adds(self.network, self.x)
        for _ in range(200):
            if multiply_adds(self.network, self.x)[0] <= budget * dense:
                break
            self.pruner.step()


def zero_groups(made: list[Callback]) -> dict[str, Tensor]:
    """Return which groups of each axis are zero after a run."""
    for callback in made:
        groups = callback.support.groups  # type: ignore[attr-defined]
        return {axis: groups.size(axis, callback.weights.live) == 0 for axis in groups.parts}  # type: ignore[attr-defined]
    return {}


def read(path: Path) -> list[dict[str, Any]]:
    """Return the recorded runs; early ones do not name ``freeze``, which was 0.2."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [{"freeze": FREEZE if row["lam"] is not None else None} | row for row in rows]


def setting(given: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    by_lam, by_target = arm in ("penalty", "mask", "mask, weak noise", "prox"), arm.endswith("target")
    own = {"lam": given.lam if by_lam else None, "target": given.target if by_target else None}
    own |= {"budget": given.budget if arm in PEERS else None, "freeze": given.freeze if by_lam else None}
    how = {name: getattr(given, name) for name in ("problem", "epochs", "samples", "rate", "part")}
    return how | own | {"arm": arm, "seed": seed}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table of the test part: means over seeds."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["part"] == "test":
            found[tuple(row[key] for key in ("problem", "epochs", "samples", "arm", "lam", "target", "budget", "freeze"))].append(row)
    yield "| problem | arm | seeds | error % | multiply-adds % | weights left | groups left, mean by axis |"
    yield "|---|---|---|---|---|---|---|"
    for (problem, epochs, samples, arm, lam, target, budget, freeze), same in found.items():
        how = f"lam {lam:g}" if lam else f"target {target:g}" if target else f"budget {budget:g}" if budget else ""
        how += f", freeze {freeze:g}" if lam and freeze != FREEZE else ""
        left = {axis: mean(row["groups"][axis][0] for row in same) for axis in same[0]["groups"]}
        groups = ", ".join(f"{count:.3g}/{same[0]['groups'][axis][1]}" for axis, count in left.items())
        work = mean(100 * row["multiply_adds"] / row["of"] for row in same)
        errors = " ".join(f"{row['error']:.2f}" for row in same)
        name = f"{problem}, {min(samples, IMAGES[problem])} images, {epochs} epochs"
        yield f"| {name} | {arm} {how} | {len(same)} | {errors} | {work:.1f} | {mean(row['weights'] for row in same):.0f} | {groups} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=[*PROBLEMS], default="lenet5")
    parser.add_argument("--arms", nargs="+", default=["dense", "penalty", "mask"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--lam", type=float, default=1e-3)
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--freeze", type=float, default=FREEZE, help="share of the run at its end with a frozen support, for runs with lam")
    parser.add_argument("--budget", type=float, default=0.25, help="share of multiply-adds for torch-pruning")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--part", choices=["validation", "test"], default="test")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    for seed in [] if given.table else given.seeds:
        for arm in given.arms:
            how = setting(given, arm, seed)
            if any(all(row[key] == value for key, value in how.items()) for row in read(given.results)):
                continue
            row = how | run(given, arm, seed) | {"versions": versions}
            print({key: row[key] for key in ("arm", "seed", "lam", "error", "multiply_adds", "of", "groups", "seconds")}, flush=True)
            given.results.parent.mkdir(parents=True, exist_ok=True)
            with given.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print("\n".join(table(read(given.results))))


if __name__ == "__main__":
    main()
