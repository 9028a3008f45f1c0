"""H and its number of labels: losses over samples, tokens, pixels and boxes, against exact diagonals, for batches of any type."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional
from toys import several, trainer

from lightning_sparse import penalties
from lightning_sparse._labels import LabelCount, batch_size
from lightning_sparse.callbacks import AdaptiveMask
from lightning_sparse.curvature import EmpiricalFisher, InputMoment, SampledFisher
from lightning_sparse.sample_gradients import by_sample

LOG_SUM = penalties.LogSum(eps=2.0)
FEATURES, CLASSES = 4, 3


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Fields:
    x: torch.Tensor
    y: torch.Tensor


class Attributes:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return self


BATCHES = {
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"x": x, "y": y},
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "NamedTuple": Pair,
    "dataclass": Fields,
    "object": Attributes,
}


def read(batch):
    """Return x and y of a batch of any of these types."""
    if isinstance(batch, (dict, UserDict)):
        return batch["x"], batch["y"]
    return (batch.x, batch.y) if hasattr(batch, "x") else tuple(batch)


class Classifier(LightningModule):
    """A linear classifier with known H, of rows (B, D), tokens (B, T, D) or pixels (B, D, H, W)."""

    def __init__(self, w, way):
        super().__init__()
        self.way, pixels = way, way == "pixels"
        self.net: Any = nn.Conv2d(FEATURES, CLASSES, 1, bias=False) if pixels else nn.Linear(FEATURES, CLASSES, bias=False)
        self.net.weight.data.copy_(w.reshape(self.net.weight.shape))

    def forward(self, x):
        out = self.net(x)
        return out.movedim(-1, 1) if self.way == "tokens, classes second" else out

    def training_step(self, batch, index):
        x, y = read(batch)
        out = self(x)
        if self.way == "tokens, flattened":
            return functional.cross_entropy(out.view(-1, CLASSES), y.view(-1))
        if self.way == "tokens, masked by hand":
            each = functional.cross_entropy(out.flatten(0, 1), y.flatten().clamp(min=0), reduction="none") * (y.flatten() >= 0)
            return each.sum() / (y >= 0).sum()
        if self.way == "tokens, summed":
            return functional.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum") / (y >= 0).sum()
        if self.way == "tokens, gathered":
            logs = out.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            return -logs[y >= 0].mean()
        return functional.cross_entropy(out, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


WAYS = [
    "samples",
    "tokens, classes second",
    "tokens, flattened",
    "tokens, masked by hand",
    "tokens, summed",
    "tokens, gathered",
    "pixels",
]


def problem(way, ignored):
    """Make x, labels drawn from the model, its weight, and the exact diagonal of the mean loss over counted labels."""
    torch.manual_seed(0)
    w = torch.randn(CLASSES, FEATURES)
    shape = {"samples": (1600,), "pixels": (100, 4, 4)}.get(way, (100, 16))
    x = torch.randn(*shape, FEATURES)
    y = torch.distributions.Categorical(logits=x @ w.T).sample()
    if ignored:
        y[torch.rand(y.shape) < 0.4] = -100
    rows = x[y >= 0]
    chance = (rows @ w.T).softmax(-1)
    exact = (chance * (1 - chance)).T @ rows**2 / len(rows)
    return (x.movedim(-1, 1) if way == "pixels" else x), y, w, exact


class Loader:
    """A loader of ``batches``, each of its own type."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def estimated(curvature, way, ignored=False, kind="tuple", size=20, epochs=3):
    """Return the estimate divided by the exact diagonal, after ``epochs`` on a problem."""
    x, y, w, exact = problem(way, ignored)
    rows = size * (len(x) // 100)
    callback = AdaptiveMask(LOG_SUM, lam=1e-9, curvature=curvature, alpha_min=0.97)  # so that all batches are observed
    batches = [BATCHES[kind](*part) for part in zip(x.split(rows), y.split(rows), strict=True)]
    trainer(callback, epochs=epochs).fit(Classifier(w, way), Loader(batches))
    return callback.curvature.estimate("net.weight").reshape(exact.shape) / exact


FISHERS = {
    "empirical": lambda **given: EmpiricalFisher(decay=0.99, every=1, samples=100, **given),
    "sampled": lambda **given: SampledFisher(decay=0.99, every=1, samples=100, **given),
}


CASES = [(way, False) for way in ("samples", "tokens, classes second", "pixels")] + [(way, True) for way in WAYS[1:]]


@pytest.mark.parametrize(("way", "ignored"), CASES, ids=[f"{way}{', some ignored' if ignored else ''}" for way, ignored in CASES])
@pytest.mark.parametrize("fisher", several({name: name for name in FISHERS}, "empirical"))
def test_the_estimate_is_the_exact_diagonal(fisher, way, ignored):
    epochs = 3 if fisher == "empirical" else 6
    assert float(estimated(FISHERS[fisher](), way, ignored, epochs=epochs).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", BATCHES)
def test_the_type_of_the_batch_makes_no_difference(kind):
    plain = estimated(FISHERS["empirical"](), "tokens, flattened")
    assert torch.equal(estimated(FISHERS["empirical"](), "tokens, flattened", kind=kind), plain)


@pytest.mark.parametrize("labels", [16, lambda batch: read(batch)[1].numel()], ids=["a sample", "function"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_labels_can_be_given(fisher, labels):
    ratio = estimated(FISHERS[fisher](labels=labels), "tokens, classes second", kind="UserDict")
    assert float(ratio.mean()) == pytest.approx(1, abs=0.1)


class GraphBatch:
    """Like torch_geometric's Batch: nodes and edges of ``sizes`` graphs in one tensor each; ``batch`` is the graph of each node."""

    def __init__(self, sizes, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.num_graphs, self.batch = len(sizes), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        first = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
        edges = [start + torch.randint(size, (2, size + 2), generator=generator) for start, size in zip(first, sizes, strict=True)]
        self.edge_index = torch.cat(edges, 1)
        self.x = torch.randn(sum(sizes), FEATURES, generator=generator) + torch.randn(len(sizes), 1, generator=generator)[self.batch]
        self.y = torch.randint(CLASSES, (len(sizes),), generator=generator)

    def to(self, device):
        return self


class OfGraphs(LightningModule):
    """Linear layers on nodes and on edges, a mean over each graph's nodes, and a head."""

    def __init__(self, per_node=False):
        super().__init__()
        torch.manual_seed(0)
        self.nodes, self.edges, self.head = nn.Linear(FEATURES, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.per_node = per_node

    def training_step(self, batch, index):
        batch = batch[0] if isinstance(batch, tuple) else batch
        source, target = batch.edge_index
        h = self.nodes(batch.x).tanh()
        h = h.index_add(0, target, self.edges(h[source]).tanh())
        if self.per_node:
            return functional.cross_entropy(self.head(h), batch.y[batch.batch])
        total = h.new_zeros(batch.num_graphs, 6).index_add(0, batch.batch, h)
        return functional.cross_entropy(self.head(total / batch.batch.bincount()[:, None]), batch.y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: (batch, torch.zeros(3))], ids=["alone", "in a tuple"])
@pytest.mark.parametrize("per_node", [False, True], ids=["a label a graph", "a label a node"])
def test_each_graph_of_a_batch_is_a_sample_for_layers_of_nodes_and_edges(per_node, wrap):
    sizes = [3, 7, 4, 5, 9]
    batch, module = GraphBatch(sizes), OfGraphs(per_node)
    exact: dict[str, Any] = {}
    each = functional.cross_entropy
    for graph, size in enumerate(sizes):

        def of_one(prediction, labels, graph=graph, size=size):
            of = each(prediction, labels, reduction="none")
            return of[batch.batch == graph].sum() if per_node else of[graph]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "cross_entropy", of_one)
            module.zero_grad()
            module.training_step(batch, 0).backward()
        labels = sum(sizes) if per_node else len(sizes)
        for name, p in module.named_parameters():
            exact[name] = exact.get(name, 0) + p.grad**2 / labels
    callback = AdaptiveMask(LOG_SUM, 1e-9, curvature=EmpiricalFisher(decay=0.0, every=1, samples=100))
    trainer(callback, epochs=1).fit(module, Loader([wrap(batch)]))
    for name in ("nodes.weight", "edges.weight", "head.weight"):
        assert torch.allclose(callback.curvature.estimate(name), exact[name], rtol=1e-3, atol=1e-7), name


def test_rows_of_samples_of_different_lengths_are_told_apart_in_any_order():
    sample = torch.tensor([2, 0, 2, 1, 2])
    rows = torch.arange(10.0).view(5, 2)
    found = by_sample(rows, sample)
    assert found.shape == (3, 3, 2)
    assert torch.equal(found[2], rows[[0, 2, 4]])
    assert torch.equal(found[:2, 0], rows[[1, 3]])
    assert (found[:2, 1:] == 0).all()


# -- label counts from a loss ----------------------------------------------------------------------------------------------------


def counted(loss, scale=1.0, batch=None, labels=None):
    """Return N as read from the backward of ``loss``."""
    count = LabelCount(labels)
    count.begin(batch)
    count.listen(loss)
    loss.backward()
    return count.count(scale)


def masked_means(out, y):
    """Average samples' means over tokens; half of the first sample's tokens are masked."""
    each = functional.cross_entropy(out.movedim(-1, 1), y, reduction="none")
    mask = torch.ones_like(each)
    mask[0, 2:] = 0
    return ((each * mask).sum(1) / mask.sum(1)).mean()


B, T = 6, 4
LOSSES = {
    "cross-entropy of samples": (lambda out, y: functional.cross_entropy(out[:, 0], y[:, 0]), B),
    "of tokens": (lambda out, y: functional.cross_entropy(out.flatten(0, 1), y.flatten()), B * T),
    "shifted": (lambda out, y: functional.cross_entropy(out[:, :-1].reshape(-1, CLASSES), y[:, 1:].reshape(-1)), B * (T - 1)),
    "smoothed": (lambda out, y: functional.cross_entropy(out.flatten(0, 1), y.flatten(), label_smoothing=0.1), B * T),
    "soft labels": (lambda out, y: functional.cross_entropy(out[:, 0], functional.one_hot(y[:, 0], CLASSES) * 0.8 + 0.2 / 3), B),
    "summed": (lambda out, y: functional.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum"), 1),
    "half of it": (lambda out, y: functional.cross_entropy(out.flatten(0, 1), y.flatten()) / 2, 2 * B * T),
    "means of samples' own sums": (lambda out, y: functional.cross_entropy(out.movedim(-1, 1), y, reduction="none").sum(1).mean(), B),
    "means of samples' means": (lambda out, y: functional.cross_entropy(out.movedim(-1, 1), y, reduction="none").mean(1).mean(), B * T),
    "with masks": (masked_means, 1 / ((5 / 36 / 4) + 1 / 36 / 2)),
    "a loss a sample": (
        lambda out, y: sum(functional.cross_entropy(o, t) for o, t in zip(out, y, strict=True)) / len(out),
        B * T,
    ),
    "stacked": (lambda out, y: torch.stack([functional.cross_entropy(o, t) for o, t in zip(out, y, strict=True)]).mean(), B * T),
    "weight decay by hand": (lambda out, y: functional.cross_entropy(out[:, 0], y[:, 0]) + 1e-2 * (out.base**2).sum(), B),
    "two heads": (
        lambda out, y: functional.cross_entropy(out[:, 0], y[:, 0]) + functional.cross_entropy(out[:, 1], y[:, 1]),
        B,
    ),
    "divergence from a teacher": (
        lambda out, y: functional.kl_div(
            out.flatten(0, 1).log_softmax(-1), torch.full((B * T, CLASSES), 1 / CLASSES), reduction="batchmean"
        ),
        B * T,
    ),
    "binary": (
        lambda out, y: functional.binary_cross_entropy_with_logits(out[..., 0], (y > 0).float()),
        B * T,
    ),
    "focal": (
        lambda out, y: (
            (1 - out.sigmoid()) ** 2 * functional.binary_cross_entropy_with_logits(out, torch.ones_like(out), reduction="none")
        ).mean(),
        B * T * CLASSES,
    ),
    "squares": (lambda out, y: functional.mse_loss(out, torch.zeros_like(out)), B * T * CLASSES),
    "squares by hand": (lambda out, y: (out**2).flatten(1).sum(1).mean(), B),
    "root of the squares": (lambda out, y: functional.mse_loss(out, out.detach() + 0.5).sqrt(), B * T * CLASSES),
    "boxes": (lambda out, y: functional.smooth_l1_loss(out[y > 0], torch.zeros(0 + int((y > 0).sum()), CLASSES), reduction="sum") / 5, 5),
    "critic": (lambda out, y: out[:3].mean() - out[3:].mean(), B // 2 * T * CLASSES),
    "one sample": (lambda out, y: functional.cross_entropy(out[:1, 0], y[:1, 0]), 1),
}


@pytest.mark.parametrize(("loss", "expected"), LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("scale", [1.0, 512.0])
def test_labels_are_counted_by_the_loss_itself(loss, expected, scale):
    torch.manual_seed(0)
    layer, y = nn.Linear(FEATURES, CLASSES), torch.randint(0, CLASSES, (B, T))
    out = layer(torch.randn(B, T, FEATURES))
    out.base = layer.weight
    value = loss(out, y) * scale
    assert counted(value, scale) == pytest.approx(expected, rel=1e-3)


def test_unreadable_losses_count_samples():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.mean()

        @staticmethod
        def backward(ctx, grad):
            return grad.expand(ctx.shape)

    out = nn.Linear(FEATURES, CLASSES)(torch.randn(B, T, FEATURES))
    for batch, expected, doubt in (
        ((torch.zeros(B, T), torch.zeros(B, dtype=torch.long)), B, ""),
        ((torch.zeros(B, T, dtype=torch.long),), B, f"it is taken for {B}, the samples of the batch"),
        (object(), 1, "nor how many samples a batch of type object holds; it is taken for 1"),
    ):
        count = LabelCount()
        count.begin(batch)
        count.listen(Opaque.apply(out))
        assert count.count() == expected
        assert count.doubt.startswith(doubt)
        assert bool(count.doubt) == bool(doubt)


def test_an_uncertain_count_gives_one_warning_that_names_the_argument():
    class Bare(Classifier):
        automatic_optimization = False

        def training_step(self, batch, index):
            super().training_step(batch, index).backward()
            self.optimizers().step()

    _, y, w, _ = problem("tokens, flattened", False)
    x = torch.randn(*y.shape, FEATURES)
    with pytest.warns(UserWarning, match="how many labels") as said:
        trainer(AdaptiveMask(LOG_SUM, 1e-9), epochs=1).fit(Bare(w, "tokens, flattened"), Loader([(x[:20], y[:20])] * 12))
    (message,) = [str(one.message) for one in said if "labels" in str(one.message)]
    assert "EmpiricalFisher cannot read from the loss how many labels it averages over; it is taken for 20, the samples of the" in message
    assert "curvature=EmpiricalFisher(labels=128)" in message


def test_labels_a_sample_need_samples():
    with pytest.raises(ValueError, match="labels=7 counts labels a sample, but how many samples a batch of type object holds is not known"):
        counted(torch.ones(1, requires_grad=True).sum(), batch=object(), labels=7)


# -- number of samples in a batch ------------------------------------------------------------------------------------------------


class Graphs:
    """Like torch_geometric's Batch: nodes and edges of several graphs in one tensor each."""

    num_graphs = 5

    def __init__(self):
        self.x, self.edge_index = torch.zeros(40, 3), torch.zeros(2, 90, dtype=torch.long)


class Graph:
    """Like torch_geometric's Data: one graph, whose nodes are the samples."""

    def __init__(self):
        self._store = {"x": torch.zeros(40, 3), "edge_index": torch.zeros(2, 90, dtype=torch.long)}

    def to_dict(self):
        return self._store


def images(*heights):
    return [torch.zeros(3, height, 8) for height in heights]


SIZES = {
    "tensor": (torch.zeros(7, 3), 7),
    "a number": (torch.tensor(1.0), 1),
    "tuple": ((torch.zeros(7, 3), torch.zeros(7)), 7),
    "tuple with graphs": ((Graphs(), torch.zeros(7)), 5),
    "list, as a DataLoader makes it": ([torch.zeros(7, 3), torch.zeros(7)], 7),
    "dict": ({"x": torch.zeros(7, 3)}, 7),
    "UserDict": (UserDict(input_ids=torch.zeros(7, 3)), 7),
    "NamedTuple": (Pair(torch.zeros(7, 3), torch.zeros(7)), 7),
    "dataclass": (Fields(torch.zeros(7, 3), torch.zeros(7)), 7),
    "attributes": (Attributes(torch.zeros(7, 3), torch.zeros(7)), 7),
    "one in another": ({"data": Fields(UserDict(x=torch.zeros(7, 3)), torch.zeros(7))}, 7),
    "one for all, then rows": ((torch.zeros(1, 9), torch.zeros(7)), 7),
    "graphs": (Graphs(), 5),
    "a graph": (Graph(), 40),
    "images": (images(8, 9, 8, 7, 8), 5),
    "images of one size": (images(8, 8, 8, 8, 8), 5),
    "images and their boxes": ((images(8, 9), [{"boxes": torch.zeros(4, 4)}, {"boxes": torch.zeros(1, 4)}]), 2),
    "images and their boxes, zipped": ((tuple(images(8, 9)), ({"boxes": torch.zeros(4, 4)}, {"boxes": torch.zeros(1, 4)})), 2),
    "dicts": ([{"image": torch.zeros(3, 8, 8)}] * 6, 6),
    "views": (([torch.zeros(7, 3, 8, 8), torch.zeros(7, 3, 4, 4)], torch.zeros(7)), 7),
    "sentences of any length": (([torch.zeros(4), torch.zeros(9), torch.zeros(2)], torch.zeros(3)), 3),
    "texts": ((["a", "b", "c"], torch.zeros(3)), 3),
    "loaders together": (({"x": torch.zeros(7, 3)}, {"x": torch.zeros(5, 3)}), 7),
    "nothing": (None, None),
    "an object": (object(), None),
    "a number of python's": (3, None),
}


@pytest.mark.parametrize(("batch", "expected"), SIZES.values(), ids=SIZES.keys())
def test_the_samples_of_a_batch_are_found_or_known_to_be_unknown(batch, expected):
    assert batch_size(batch) == expected


# -- arguments ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0.5}, "every must be a whole number >= 1, got 0.5"),
        ({"every": 2.9}, "every must be a whole number >= 1, got 2.9"),
        ({"samples": 0.3}, "samples must be a whole number >= 1, got 0.3"),
        ({"labels": 0}, "labels must be a whole number >= 1, got 0"),
        ({"labels": 1.5}, "labels must be a whole number >= 1, got 1.5"),
    ],
)
@pytest.mark.parametrize("kind", [EmpiricalFisher, SampledFisher])
def test_numbers_that_are_not_whole_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
    with pytest.raises(ValueError, match=r"every must be a whole number >= 1, got 0\.5"):
        InputMoment(every=0.5)


def test_labels_are_a_setting_that_a_recipe_and_a_file_can_hold():
    assert EmpiricalFisher(labels=16).settings()["labels"] == 16
    callback = AdaptiveMask(LOG_SUM, 0.1, curvature=EmpiricalFisher(labels=batch_size))
    assert callback.to_mask().curvature.labels is batch_size
    assert callback.recipe()["init_args"]["curvature"]["init_args"]["labels"] == "lightning_sparse._labels.batch_size"
