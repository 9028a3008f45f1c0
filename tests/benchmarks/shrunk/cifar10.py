"""A pretrained ResNet-20, or another ResNet, on CIFAR-10 with fewer multiply-adds: our ways to choose channels, and torch-pruning's.

Every arm trains for ``--epochs`` in all, by the recipe's SGD with a cosine to 0 in each fit, and removes whole channels inside of the
blocks. ``dense`` is the same training without a cut. ``scores`` cuts once, by F_g, and trains the rest. ``Sparsify`` is the recipe
``cifar10/resnet20_channels_*``: a ramp over the first 30 % of the run that removes the lowest F_g for each multiply-add, then shrink; its
target is the recipe's, or for other networks and shares the weights of the groups that ``scores`` would cut.
``groups`` trains with Sparsify for half of the epochs, cuts and trains the smaller network for the other half. ``tp magnitude`` cuts once
by torch-pruning's norm of a group; ``tp group norm`` runs its GroupNormPruner: its regulariser for half of the epochs, then the cut, then
the other half. The validation split has 5,000 images; the 10,000 test images are used once at the end of a run. A run that ``--record``
holds is not repeated, unless epochs or precision differ. Weights of another network than ResNet-20 come from a run of its own:

    python tests/benchmarks/shrunk cifar10 --arms dense --depth 8 --width 64 --rate 0.1 --record runs/wide
    python tests/benchmarks/shrunk cifar10 --depth 8 --width 64 --weights runs/wide/dense-1-0-10-32-true/weights.pt --record runs/cut
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn

from lightning_sparse import coupling, export, shrink
from lightning_sparse.callbacks import Sparsify
from lightning_sparse.examples.cifar10 import CIFAR10
from lightning_sparse.examples.resnet import Block, ResNet
from lightning_sparse.export import latency, onnx_file
from lightning_sparse.scores import Fisher
from lightning_sparse.shrinking import GroupScores, choose, remove, share_of
from lightning_sparse.shrinking.report import count_multiply_adds
from lightning_sparse.structure import Channels

REGULARISER = 1e-4  # torch-pruning's default
TARGETS = {0.5: 0.32, 0.3: 0.56}  # target_sparsity of the recipes for ResNet-20 by the share of the multiply-adds that it leaves
BATCHES = 20  # whose gradients score the groups


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5], help="of the multiply-adds (default: 0.5)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=10, help="of a whole arm (default: %(default)s)")
    parser.add_argument("--images", type=int, help="training images; without it 45,000")
    parser.add_argument("--round_to", type=int, default=8, help="of widths; Sparsify on ResNet-20: 1 (default: %(default)s)")
    parser.add_argument("--precision", default="32-true", help="of the Trainer (default: %(default)s)")
    parser.add_argument("--root", default="data")
    parser.add_argument("--depth", type=int, default=20, help="of the network (default: %(default)s)")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="of SGD, at the start of each fit (default: %(default)s)")
    parser.add_argument("--weights", help="a state_dict of the network; without it the weights are random")
    parser.add_argument("--record", type=Path, default=Path("runs/channels"), help="folder of what has been run (default: %(default)s)")


@dataclass
class Study:
    """What all arms of one seed share: the data, the training and the groups."""

    args: argparse.Namespace
    seed: int

    def __post_init__(self) -> None:
        self.data = CIFAR10(self.args.root, validation=5000, images=self.args.images)
        self.data.setup("fit")
        self.inputs: Tensor = next(iter(self.data.val_dataloader()))[0][:16]

    def given(self) -> ResNet:
        seed_everything(self.seed, verbose=False)
        shape = {"depth": self.args.depth, "width": self.args.width, "weights": self.args.weights}
        return ResNet(**shape, lr=self.args.rate, optimizer="sgd", momentum=0.9, weight_decay=1e-4)

    def trainer(self, epochs: int, *callbacks: Callback) -> Trainer:
        return Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), precision=self.args.precision, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        )  # fmt: skip

    def train(self, model: ResNet, epochs: int, *callbacks: Callback) -> None:
        seed_everything(self.seed, verbose=False)
        self.trainer(epochs, *callbacks).fit(model.train(), datamodule=self.data)  # fit keeps the mode that a network has

    def cut(self, model: ResNet, share: float) -> ResNet:
        """Return the network without the groups of the lowest F_g; zero groups have the score 0 and go first."""
        groups, chosen = self.chosen(model, share, self.args.round_to)
        return remove(model, self.inputs, groups, chosen, self.args.round_to)

    def chosen(self, model: ResNet, share: float, round_to: int) -> tuple[list[coupling.Group], list[coupling.Group]]:
        """Return all groups, and those of the lowest F_g without which this share of the multiply-adds is left."""
        groups = coupling.groups(model, self.inputs)
        return groups, choose(model, self.inputs[:1], groups, self.scores(model, groups), self.most(share), round_to)

    def scores(self, model: ResNet, groups: list[coupling.Group]) -> dict[str, float]:
        scores = GroupScores(groups)
        model.eval()  # because batch norms keep their statistics
        for _, (x, y) in zip(range(BATCHES), self.data.train_dataloader(), strict=False):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            scores.update(model)
        return scores.values()

    def most(self, share: float) -> int:
        return int(share * count_multiply_adds(self.given(), self.inputs[:1]))


def _dense(study: Study, model: ResNet, share: float) -> ResNet:
    study.train(model, study.args.epochs)
    return model


def _scores(study: Study, model: ResNet, share: float) -> ResNet:
    small = study.cut(model, share)
    study.train(small, study.args.epochs)
    return small


def _sparsify(study: Study, model: ResNet, share: float) -> ResNet:
    is_recipe = study.args.depth == 20 and study.args.width == 16 and share in TARGETS
    target = TARGETS[share] if is_recipe else share_of(model, *study.chosen(model, share, round_to=1))
    study.train(model, study.args.epochs, recommended(target))
    return shrink(model, study.inputs, round_to=1 if is_recipe else study.args.round_to)


def recommended(target: float) -> Sparsify:
    """Return the callback of the recipes ``cifar10/resnet20_channels_*`` with this share of zeros."""
    return Sparsify(target, structure=Channels(cost="multiply_adds"), score=Fisher(), freeze=0.7)


def _groups(study: Study, model: ResNet, share: float) -> ResNet:
    groups, chosen = study.chosen(model, share, study.args.round_to)
    study.train(model, study.args.epochs // 2, Sparsify(share_of(model, groups, chosen), structure=Channels()))
    small = study.cut(model, share)
    study.train(small, study.args.epochs - study.args.epochs // 2)
    return small


class _Regulariser(Callback):
    """The penalty of torch-pruning's GroupNormPruner, added to the gradients."""

    def __init__(self, pruner: Any) -> None:
        self.pruner = pruner

    def on_train_epoch_start(self, trainer: Trainer, model: Any) -> None:
        self.pruner.update_regularizer()

    def on_before_optimizer_step(self, trainer: Trainer, model: Any, optimizer: Any) -> None:
        self.pruner.regularize(model)


def _torch_pruning(study: Study, model: ResNet, share: float, by_norm: bool) -> ResNet:
    import torch_pruning as tp

    exact = {entry.name for group in coupling.groups(model, study.inputs) if group.exact for entry in group.parameters("producer")}
    others = [part for name, part in model.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear)) and f"{name}.weight" not in exact]
    model.eval()
    kind = tp.pruner.GroupNormPruner if by_norm else tp.pruner.MagnitudePruner
    settings: dict[str, Any] = {"reg": REGULARISER} if by_norm else {}
    pruner = kind(
        model, study.inputs[:1], importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True, iterative_steps=200,
        pruning_ratio=0.99, max_pruning_ratio=0.9, ignored_layers=others, round_to=study.args.round_to, **settings,
    )  # fmt: skip
    if by_norm:
        study.train(model, study.args.epochs // 2, _Regulariser(pruner))
    goal = study.most(share)
    model.eval()
    while count_multiply_adds(model, study.inputs[:1]) > goal and pruner.current_step < 200:
        pruner.step()
    for part in model.modules():  # torch-pruning replaces parameters
        part.zero_grad()
    study.train(model, study.args.epochs - (study.args.epochs // 2 if by_norm else 0))
    return model


RUNS: dict[str, Callable[[Study, ResNet, float], ResNet]] = {
    "dense": _dense,
    "scores": _scores,
    "Sparsify": _sparsify,
    "groups": _groups,
    "tp magnitude": partial(_torch_pruning, by_norm=False),
    "tp group norm": partial(_torch_pruning, by_norm=True),
}


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Run what is missing, then measure the latency of every network beside the dense one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for seed in args.seeds:
        study = Study(args, seed)
        for share in args.shares:
            for arm in args.arms:
                _run(study, arm, share if arm != "dense" else 1.0)
    yield "| arm | share asked | seed | multiply-adds | parameters | channels inside of the blocks | validation | test | minutes |"
    yield "|---|--:|--:|--:|--:|---|--:|--:|--:|"
    found = sorted(args.record.glob(f"*-{args.epochs}-{args.precision}/figures.json"))
    figures = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    for one in figures:
        shown = f"{one['multiply_adds']:.3f} | {one['parameters']:,} | {' '.join(map(str, one['widths']))}"
        errors = f"{100 * one['validation']:.2f} % | {100 * one['test']:.2f} % | {one['minutes']:.0f}"
        yield f"| {one['arm']} | {one['share'] if one['share'] < 1 else ''} | {one['seed']} | {shown} | {errors} |"
    yield ""
    yield "| arm | share asked | batch 1 | A/A | batch 16 | A/A | ONNX Runtime, batch 1 | A/A | ONNX Runtime, batch 16 | A/A |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    x = Study(args, args.seeds[0]).inputs
    given = ResNet(depth=args.depth, width=args.width).eval()
    for path, one in zip(found, figures, strict=True):
        if one["arm"] != "dense" and one["seed"] == args.seeds[0]:
            small = _rebuilt(ResNet(depth=args.depth, width=args.width), one["widths"], path.parent / "weights.pt").eval()
            yield f"| {one['arm']} | {one['share']} | {' | '.join(_latencies(given, small, x))} |"


def _run(study: Study, arm: str, share: float) -> None:
    folder = study.args.record / f"{arm}-{share:g}-{study.seed}-{study.args.epochs}-{study.args.precision}".replace(" ", "-")
    if (folder / "figures.json").is_file():
        return
    began, model = time.perf_counter(), study.given()
    whole = count_multiply_adds(model, study.inputs[:1])
    small = RUNS[arm](study, model, share)
    minutes = (time.perf_counter() - began) / 60
    trainer = study.trainer(1)
    trainer.limit_val_batches = 1.0
    figures = {
        "arm": arm, "share": share, "seed": study.seed, "epochs": study.args.epochs, "precision": study.args.precision,
        "multiply_adds": count_multiply_adds(small, study.inputs[:1]) / whole, "parameters": sum(p.numel() for p in small.parameters()),
        "widths": [part.out_channels for part in small.modules() if isinstance(part, nn.Conv2d)][1::2],
        "validation": trainer.validate(small, datamodule=study.data, verbose=False)[0]["val/accuracy"],
        "test": trainer.test(small, datamodule=study.data, verbose=False)[0]["test/accuracy"], "minutes": minutes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(small.state_dict(), folder / "weights.pt")
    (folder / "figures.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    print(json.dumps(figures), flush=True)


def _rebuilt(model: ResNet, widths: list[int], weights: Path) -> ResNet:
    """Return the network with these channels inside of its blocks: torch-pruning's have no file that says what they lost."""
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    for block, width in zip(blocks, widths, strict=True):
        one, two = block.conv1, block.conv2
        block.conv1 = nn.Conv2d(one.in_channels, width, 3, one.stride, 1, bias=False)
        block.bn1 = nn.BatchNorm2d(width)
        block.conv2 = nn.Conv2d(width, two.out_channels, 3, 1, 1, bias=False)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.to(memory_format=torch.channels_last)


def _latencies(given: nn.Module, small: nn.Module, x: Tensor) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name, torch.inference_mode(False):
        paths = [Path(name) / f"{index}.onnx" for index in range(2)]
        for path, model in zip(paths, (given, small), strict=True):
            export.to_onnx(model, path, x[:2])
        sessions = [onnx_file.session(path) for path in paths]
        for before, after in ((given, small), sessions):
            for batch in (1, 16):
                with torch.inference_mode():
                    arms: dict[str, Callable[[], object]] = {"before": partial(before, x[:batch]), "after": partial(after, x[:batch])}
                    found = latency.measure(arms, "before", 5.0, (21, 201))
                one, again = found["after"], found[latency.AGAIN]
                yield f"{one.times_faster:.2f}x ({one.low:.2f} to {one.high:.2f})"
                yield f"{again.low:.2f} to {again.high:.2f}"
