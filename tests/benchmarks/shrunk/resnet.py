"""ResNet-20 without half of its multiply-adds: latency of the widths alone, before any fine-tuning, so no error is given."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from lightning_sparse import coupling
from lightning_sparse.examples.resnet import ResNet
from lightning_sparse.export import latency
from lightning_sparse.shrinking import choose, remove
from lightning_sparse.shrinking.report import count_multiply_adds


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", help="a state_dict of ResNet-20; without it the weights are random")
    parser.add_argument("--share", type=float, default=0.5, help="of the multiply-adds that stays (default: %(default)s)")


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield what was found, then one row for each multiple that widths are rounded to."""
    torch.manual_seed(0)
    model, x = ResNet(depth=20, weights=args.weights).eval(), torch.randn(16, 3, 32, 32)
    groups = coupling.groups(model, x[:4])
    yield "; ".join(f"left out: {count} groups of {axis}: {why}" for axis, count, why in coupling.left_out(groups))
    yield ""
    yield "| round_to | multiply-adds | parameters | batch 1 | A/A | batch 16 | A/A |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    scores, whole = norms(model, groups), count_multiply_adds(model, x[:1])
    for unit in (1, 8, 16):
        chosen = choose(model, x[:1], groups, scores, int(args.share * whole), unit)
        smaller = remove(model, x[:4], groups, chosen, unit).eval()
        cells = []
        for batch in (1, 16):
            with torch.inference_mode():
                arms = {"before": partial(model, x[:batch]), "after": partial(smaller, x[:batch])}
                found = latency.measure(arms, "before", 5.0, (11, 61))
            after, again = found["after"], found[latency.AGAIN]
            cells += [f"{after.times_faster:.2f}x ({after.low:.2f} to {after.high:.2f})", f"{again.times_faster:.2f}"]
        count = sum(p.numel() for p in smaller.parameters())
        yield f"| {unit} | {count_multiply_adds(smaller, x[:1]) / whole:.2f} | {count:,} | {' | '.join(cells)} |"


def norms(model: torch.nn.Module, groups: list[coupling.Group]) -> dict[str, float]:
    """Return the squared norm of batch norm's weight and bias of each exact group."""
    parameters = dict(model.named_parameters())
    return {
        group.name: sum(
            float(parameters[e.name].detach().index_select(e.dim, torch.tensor(e.indices)).square().sum())
            for e in group.parameters("normaliser")
        )
        for group in groups
        if group.exact
    }
