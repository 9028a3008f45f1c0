"""The Fisher score of groups: the rise in loss of a whole group, for each weight or multiply-add that goes with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_channels import images, network
from toys import Toy, trainer, weights

from lightning_sparse import coupling, scores, shrink
from lightning_sparse.callbacks import MagnitudePruning, ReweightedPenalty, Sparsify
from lightning_sparse.penalties import LogSum
from lightning_sparse.shrinking import GroupScores
from lightning_sparse.shrinking.report import count_multiply_adds
from lightning_sparse.structure import Channels, Rows

pytest.importorskip("torch_pruning")


class Columns(Callback):
    """Score the groups by their columns, from the gradients that the first step sees."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            self.found = GroupScores([group for group in coupling.groups(module, next(iter(images()))[0]) if group.kind == "channel"])
            self.found.update(module)


class Spread(Toy):
    """A convolutional network whose batch norms start with different scales."""

    def __init__(self) -> None:
        super().__init__(network())
        torch.manual_seed(0)
        for part in self.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(part.weight, 0.2, 2.0)
                torch.nn.init.normal_(part.bias, std=0.3)


def test_the_score_from_batch_norms_is_that_from_the_columns_that_read_the_channel() -> None:
    """Both are (d loss / d s_g)^2 for a factor on a channel, which passes through ReLU and pooling."""
    module, columns = Spread(), Columns()
    callback = MagnitudePruning(0.5, begin=0.9, end=1.0, structure=Channels(), score=scores.Fisher(decay=0.5))
    sizes: dict[str, torch.Tensor] = {}

    class Sizes(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            groups = callback.support.groups
            sizes.update({leader: groups.size(leader, callback.weights.live) for leader in groups.parts})

    trainer(callback, columns, Sizes(), epochs=1, max_steps=1).fit(module, images())
    found, compared = columns.found.values(), 0
    for leader, size in sizes.items():
        own = size**2 * callback.support.squares.means[leader] / 0.5  # the mean starts at 0 and has seen half of the first square
        other = [value for name, value in found.items() if name.rpartition("[")[0] == leader]
        if len(other) == len(own):
            torch.testing.assert_close(own, torch.tensor(other, dtype=own.dtype), rtol=1e-3, atol=1e-9)
            compared += len(other)
    assert compared >= 8, (list(found), {leader: len(size) for leader, size in sizes.items()})


def test_what_weights_cost_in_multiply_adds_is_what_torch_counts() -> None:
    module = Spread()
    callback = Sparsify(0.3, structure=Channels(cost="multiply_adds"), score=scores.Fisher())
    trainer(callback, epochs=1, max_steps=1).fit(module, images())
    costs = callback.support.groups.costs
    x = next(iter(images()))[0]
    assert sum(costs.get(name, 0.0) * w.numel() for name, w in module.named_parameters()) == count_multiply_adds(module, x)
    assert all(costs.get(name, 0.0) == 0 for name, w in module.named_parameters() if w.dim() == 1)


def test_the_same_share_of_weights_leaves_fewer_multiply_adds_if_they_are_the_cost() -> None:
    left = {}
    x = next(iter(images()))[0]
    for cost in ("weights", "multiply_adds"):
        module = Spread()
        callback = Sparsify(0.5, structure=Channels(cost=cost), score=scores.Fisher())
        trainer(callback, epochs=5).fit(module, images())
        assert callback.share_of_zeros() >= 0.5
        left[cost] = count_multiply_adds(shrink(module, x, round_to=1), x)
    assert left["multiply_adds"] < 0.9 * left["weights"], left


class Equal(scores.Score):
    """A score that says that each group costs the same rise in loss."""

    is_loss = True

    def of(self, given: scores.Ranked) -> torch.Tensor:
        return torch.ones_like(given.w)


def test_of_groups_with_one_rise_in_loss_those_with_the_most_weights_go_first() -> None:
    layers = (torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
    module = Toy(torch.nn.Sequential(*layers))
    callback = MagnitudePruning(96 / 312, structure=Rows(), score=Equal())  # two rows of 40 weights and two of 8
    trainer(callback, epochs=1, max_steps=4).fit(module, vectors())
    rows = {name: int((w != 0).any(1).sum()) for name, w in module.named_parameters() if w.dim() > 1}
    assert rows == {"network.0.weight": 2, "network.2.weight": 40, "network.4.weight": 1}


def vectors() -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), 16)


class Save(Callback):
    """Save in the second epoch."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def test_the_squares_of_groups_resume_exactly_and_a_file_of_single_weights_starts_them_anew(tmp_path: Any) -> None:
    path = str(tmp_path / "half.ckpt")
    make = lambda: ReweightedPenalty(LogSum(eps=2.0), target_sparsity=0.5, score=scores.Fisher(0.5), structure=Channels())  # noqa: E731
    whole, module, again, resumed = make(), Spread(), make(), Spread()
    trainer(whole, Save(path), epochs=4).fit(module, images())
    trainer(again, epochs=4).fit(resumed, images(), ckpt_path=path)
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(module).items())
    assert whole.support.squares.means.keys() == whole.support.groups.parts.keys() == again.support.squares.means.keys()

    file = torch.load(path, weights_only=False)
    (state,) = (state for state in file["callbacks"].values() if isinstance(state, dict) and "squares" in state)
    state["squares"] = {name: torch.ones_like(w) for name, w in module.named_parameters()}  # as written before groups had their own
    state["recipe"]["init_args"]["structure"]["init_args"] = {}
    torch.save(file, path)
    older = make()
    trainer(older, epochs=4).fit(Spread(), images(), ckpt_path=path)
    assert older.share_of_zeros() >= 0.5


def test_an_unknown_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="cost must be 'weights' or 'multiply_adds', got 'flops'"):
        Channels(cost="flops")
    assert repr(Channels()) == "Channels()"
    assert repr(Channels(cost="multiply_adds")) == "Channels(cost='multiply_adds')"
