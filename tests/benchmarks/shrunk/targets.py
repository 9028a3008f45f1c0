"""Which share of the multiply-adds a target share of zeros under Channels() leaves, pruned at once: widths of ResNet-20, no errors."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator

import torch
from groups import fit
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader

from lightning_sparse import shrink
from lightning_sparse.callbacks import Sparsify
from lightning_sparse.examples.resnet import ResNet
from lightning_sparse.shrinking.report import count_multiply_adds
from lightning_sparse.structure import Channels


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", help="a state_dict of ResNet-20; without it the weights are random")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield one row for each target."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    images = torch.randn(2, 16, 3, 32, 32)  # they have next to no influence: the weights are ranked after two steps at a tiny rate
    batches = [(x, torch.arange(16) % 10) for x in images]
    x = images[0]
    yield "| target_sparsity | multiply-adds | parameters | channels inside of the blocks |"
    yield "|--:|--:|--:|---|"
    for target in args.targets:
        seed_everything(0, verbose=False)
        model = ResNet(depth=20, weights=args.weights, lr=1e-8, optimizer="sgd", momentum=0.0, weight_decay=0.0)
        whole = [count_multiply_adds(model, x[:1]), sum(p.numel() for p in model.parameters())]
        fit(model, DataLoader(batches, batch_size=None, shuffle=False), 1, [Sparsify(target, structure=Channels(), finish="prune")])
        small = shrink(model, x[:2], round_to=1)
        now = [count_multiply_adds(small, x[:1]), sum(p.numel() for p in small.parameters())]
        shares = " | ".join(f"{after / before:.2f}" for after, before in zip(now, whole, strict=True))
        widths = [part.out_channels for name, part in small.named_modules() if isinstance(part, torch.nn.Conv2d)][1::2]
        yield f"| {target:g} | {shares} | {' '.join(map(str, widths))} |"
