"""A module with layers, batches and loader of torch_geometric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from torch import Tensor, nn

from programs.measure import Program, Trained
from programs.modules import fit

FEATURES, WIDTH = 8, 64


def _graphs(count: int, seed: int) -> list[Any]:
    """Graphs of 6 to 14 nodes in two classes, by the mean over their nodes of a product of a node's and its neighbours' features."""
    from torch_geometric.data import Data
    from torch_geometric.utils import scatter

    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        nodes = int(torch.randint(6, 15, (1,), generator=generator))
        x = torch.randn(nodes, FEATURES, generator=generator) + 0.5 * torch.randn(1, FEATURES, generator=generator)
        edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
        around = scatter(x[edges[0], 1], edges[1], dim_size=nodes, reduce="mean")
        found.append(Data(x=x, edge_index=edges, y=((x[:, 0] + around).mean() > 0).long().view(1)))
    return found


def _gin(callbacks: list[Any], folder: Path) -> Trained:
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import MLP, GCNConv, GINConv, Linear, global_mean_pool

    class Classifier(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = GINConv(nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)))
            self.second = GINConv(MLP([WIDTH, WIDTH, WIDTH], norm=None))
            self.third, self.head = GCNConv(WIDTH, WIDTH), Linear(WIDTH, 2)

        def forward(self, graphs: Any) -> Tensor:
            x, edges = graphs.x, graphs.edge_index
            for layer in (self.first, self.second, self.third):
                x = layer(x, edges).relu()
            out: Tensor = self.head(global_mean_pool(x, graphs.batch))
            return out

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch), batch.y)
            self.log("train/loss", loss, batch_size=batch.num_graphs)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 2e-3)

    (test,) = DataLoader(_graphs(500, seed=1), batch_size=500)

    @torch.no_grad()
    def error(module: Any) -> float:
        return float((module.eval()(test).argmax(1) != test.y).float().mean())

    loader = DataLoader(_graphs(1000, seed=0), batch_size=32, shuffle=True)
    return fit(lightning.pytorch, Classifier(), loader, callbacks, folder, error, epochs=12)


PROGRAMS = [Program("torch_geometric (GIN, GCN)", "torch_geometric", "lightning.pytorch", "error", 0.5, _gin, select=("*",))]
