"""Channels and heads: whole coupled groups become zero, and removing them changes nothing."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Spy, Toy, several, trainer, weights

from lightning_sparse import coupling, noise, penalties, surgery
from lightning_sparse._coupled import Found
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    ReweightedPenalty,
    Sparsify,
    VariationalDropout,
    wandb_run,
)
from lightning_sparse.structure import Blocks, Channels, Heads, Structure

pytest.importorskip("torch_pruning")
LOG_SUM = penalties.LogSum(eps=2.0)


class Block(nn.Module):
    """Two convolutions with batch norm, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.second(self.norm1(self.first(x)).relu()))).relu()


def network() -> nn.Sequential:
    stem = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8))
    head = (nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3))
    return nn.Sequential(*stem, nn.Conv2d(8, 6, 3), nn.ReLU(), nn.MaxPool2d(3), *head)


class Attention(nn.Module):
    """Four heads whose queries, keys and values are Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(mixed)
        return out


class Encoder(nn.Module):
    """Attention over four parts of the input, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.attention, self.head = nn.Linear(4, 16), Attention(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inputs(x.unflatten(-1, (-1, 4)))
        out: Tensor = self.head((y + self.attention(y)).mean(1))
        return out


def images() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0].sum((1, 2)) > 0).long() + (x[:, 1].sum((1, 2)) > 8).long()), 16)


def vectors() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 16)


FORMS = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 0.1, threshold=0.05),
    "prox": partial(AdaptiveProx, LOG_SUM, 0.03, exact=True),
    "mask": partial(AdaptiveMask, LOG_SUM, 0.1, threshold=0.05),
    "mask, Bernoulli": partial(AdaptiveMask, LOG_SUM, 0.1, noise=noise.ScaledBernoulli(), threshold=0.05),
    "eta-trick": partial(EtaTrick, LOG_SUM, 0.3, tol=0.3, learned_lr=0.4, keep_start=0.303),
    "VarDrop": partial(VariationalDropout, 0.02, "empirical_bayes", log_start=-1.0, learned_lr=0.05),
    "hard concrete": partial(HardConcrete, 0.03, tol=0.5, log_start=-0.578, learned_lr=0.3),
    "pruning": partial(MagnitudePruning, 0.6, every=2),
    "to a target": partial(ReweightedPenalty, LOG_SUM, target_sparsity=0.6),
}
every_form = pytest.mark.parametrize("form", several(FORMS, "mask", "pruning"))


def trained(form: Any, structure: Structure, epochs: int = 5) -> tuple[Toy, Any]:
    module, callback = Toy(network() if structure == Channels() else Encoder()), form(structure=structure)
    trainer(callback, epochs=epochs).fit(module, images() if structure == Channels() else vectors())
    return module, callback


@every_form
def test_removing_the_zero_groups_changes_nothing(form: Any) -> None:
    module, callback = trained(form, Channels())
    left = callback.groups_left()
    assert set(left) == {"network.0", "network.3.first", "network.4", "network.8"}
    assert all(live >= 1 for live, _ in left.values())  # no layer is emptied
    assert sum(live for live, _ in left.values()) < sum(count for _, count in left.values())
    x = torch.randn(5, 3, 8, 8)
    zero = {axis: callback.support.groups.size(axis, callback.weights.live) == 0 for axis in left}
    numbers: dict[str, int] = {}
    gone = []
    for group in coupling.groups(module, x):
        number = numbers[group.axis] = numbers.get(group.axis, -1) + 1
        if group.axis in zero and bool(zero[group.axis][number]):
            gone.append(group)
            held = dict(module.named_parameters())
            assert all(not held[e.name].index_select(e.dim, torch.tensor(e.indices)).any() for e in group.parameters())
    smaller = surgery.duplicate(module)
    surgery.cut_(smaller, *coupling.kept(module, gone))
    module.eval(), smaller.eval()
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in module.parameters())
    torch.testing.assert_close(smaller(x), module(x), rtol=1e-4, atol=1e-5)


def test_batch_norm_carries_the_scale_where_there_is_one() -> None:
    _, callback = trained(FORMS["pruning"], Channels(), epochs=1)
    parts = {axis: {part.name for part in found} for axis, found in callback.support.groups.parts.items()}
    norms = {f"network.{layer}.{kind}" for layer in ("1", "3.norm2") for kind in ("weight", "bias")}
    assert parts["network.0"] == norms  # all that is added together
    assert parts["network.4"] == {"network.4.weight", "network.4.bias"}


def test_the_mask_multiplies_what_carries_the_scale_with_one_draw_a_channel() -> None:
    callback = AdaptiveMask(LOG_SUM, 0.3, noise=noise.ScaledBernoulli(), curvature=None, alpha_min=1e-3, structure=Channels())
    ratios: dict[str, list[Tensor]] = {}

    def look(moment: str, module: Toy) -> None:
        if moment == "before backward":
            for name, w in module.named_parameters():
                if name in callback.parameters:
                    ratios.setdefault(name, []).append((w.detach() / callback.weights.live(name)).nan_to_num(1.0))

    trainer(callback, Spy(look), epochs=2).fit(Toy(network()), images())
    drawn = {name: torch.stack(found) for name, found in ratios.items()}
    first, second = drawn["network.1.weight"], drawn["network.3.norm2.weight"]
    assert torch.equal((first == 0), (second == 0))  # one draw for all producers of a channel
    assert bool((first == 0).any())
    assert bool((first != 0).any())
    assert bool((drawn["network.0.weight"] == 1).all())  # the row in front of batch norm is scale-free
    row = drawn["network.4.weight"].flatten(2)
    torch.testing.assert_close(row, row[..., :1].expand_as(row), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using .ckpt_path.")
@pytest.mark.parametrize("name", [*FORMS])
def test_a_resumed_run_is_exact(name: str, tmp_path: Any) -> None:
    form = FORMS[name]
    files = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    straight, resumed = Toy(network()), Toy(network(), seed=1)
    trainer(form(structure=Channels()), files, epochs=4, enable_checkpointing=True).fit(straight, images())
    trainer(form(structure=Channels()), epochs=4).fit(resumed, images(), ckpt_path=tmp_path / "epoch=1.ckpt")
    for (key, wanted), found in zip(weights(straight).items(), weights(resumed).values(), strict=True):
        assert torch.equal(wanted, found), key


class Uneven(nn.Sequential):
    """Groups of unequal size, so that the cut of the ramp removes more than the target asks for at its end."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        wide = [nn.Conv1d(2, 24, 5, padding=2), nn.BatchNorm1d(24), nn.GELU(), nn.Conv1d(24, 24, 5, padding=4, dilation=2)]
        rest = [nn.BatchNorm1d(24), nn.GELU(), nn.Conv1d(24, 24, 3, padding=1, groups=24), nn.Conv1d(24, 24, 1), nn.GELU()]
        super().__init__(*wide, *rest, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using .ckpt_path.")
def test_a_run_resumed_where_its_support_froze_is_exact_if_a_zero_channel_may_still_grow(tmp_path: Any) -> None:
    x = torch.randn(256, 2, 32, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(x, x.mean(-1).repeat(1, 2)), 32)

    def module(seed: int) -> Toy:
        return Toy(Uneven(), loss=nn.functional.mse_loss, optimizer=lambda p: torch.optim.AdamW(p, 2e-3), seed=seed)

    straight, resumed, form = module(0), module(1), Sparsify(0.5, structure=Channels())
    files = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer(form, files, epochs=4, enable_checkpointing=True).fit(straight, loader)
    state = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["callbacks"][form.state_key]
    assert state["frozen"]
    assert any(bool(where.any()) for where in state["open"].values())
    trainer(Sparsify(0.5, structure=Channels()), epochs=4).fit(resumed, loader, ckpt_path=tmp_path / "epoch=2.ckpt")
    for (key, wanted), found in zip(weights(straight).items(), weights(resumed).values(), strict=True):
        assert torch.equal(wanted, found), key


def test_heads_are_zero_as_a_whole() -> None:
    module, callback = trained(partial(MagnitudePruning, 0.4, every=2), Heads())
    ((_axis, (live, count)),) = callback.groups_left().items()
    assert count == 4
    assert 1 <= live < 4
    attention = module.network.attention
    dead = [i for i in range(4) if not attention.out.weight[:, 4 * i : 4 * i + 4].any()]
    assert len(dead) == 4 - live
    for i in dead:
        rows = slice(4 * i, 4 * i + 4)
        assert not any(part.weight[rows].any() or part.bias[rows].any() for part in (attention.q, attention.k, attention.v))


def test_group_figures_are_logged() -> None:
    module, callback = Toy(network()), FORMS["pruning"](structure=Channels())
    run = trainer(callback, epochs=4)
    run.fit(module, images())
    left = callback.groups_left()
    for axis, (live, count) in left.items():
        assert float(run.callback_metrics[f"sparsity/groups/{axis}"]) == pytest.approx(1 - live / count)
    share = 1 - sum(live for live, _ in left.values()) / sum(count for _, count in left.values())
    assert float(run.callback_metrics["sparsity/groups"]) == pytest.approx(share)
    rows = wandb_run.group_rows(9, left, {axis: callback.support.group_members(axis) for axis in left})
    assert [(row[1], row[4], row[3]) for row in rows] == [(axis, *pair) for axis, pair in left.items()]
    for _, axis, members, *_ in rows:  # the parameters that are zero with a group of this axis: more than those that lead it
        names = members.split(", ")
        assert f"{axis}.weight" in names
        assert 1 < len(names) == len(set(names))


class Narrow(Attention):
    """Attention that computes the size of a head from the width of its input."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (part(x).view(b, t, self.num_heads, d // self.num_heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        out: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return out


def test_heads_whose_size_follows_the_input_are_refused_with_the_cure() -> None:
    network = Encoder()
    network.attention = Narrow()
    with pytest.raises(ValueError, match=r"network.attention: the network without it fails.*compute it once in __init__ .*") as caught:
        trainer(MagnitudePruning(0.3, structure=Heads())).fit(Toy(network), vectors())
    assert "Rows()" not in str(caught.value)


class Keyed(Toy):
    """A module whose forward takes more than a batch's first part."""

    def forward(self, x: Tensor, *, scale: float) -> Tensor:  # type: ignore[override]
        out: Tensor = self.network(x) * scale
        return out

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(self(batch[0], scale=2.0), batch[1])


def test_inputs_that_the_batch_does_not_tell_are_asked_for() -> None:
    callback = MagnitudePruning(0.3, structure=Heads(), select=["*.attention.*"])
    wanted = r"Keyed.forward fails on the first training batch's inputs \(TypeError: .*'scale'\); set self.example_input_array = \(x, ...\)"
    with pytest.raises(ValueError, match=wanted):
        trainer(callback).fit(Keyed(Encoder()), vectors())
    module = Keyed(Encoder())
    module.example_input_array = {"x": torch.randn(2, 16), "scale": 1.0}
    trainer(callback, epochs=4).fit(module, vectors())
    assert callback.groups_left()
    module.example_input_array = torch.randn(2, 16)
    with pytest.raises(ValueError, match="Keyed fails on the example inputs: TypeError"):
        trainer(callback).fit(module, vectors())


class FromDict(Toy):
    """A module that is trained on batches with more entries than its forward takes."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(self(x=batch["x"]), batch["labels"])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


def test_of_a_dict_the_entries_that_forward_takes_are_its_inputs() -> None:
    batches = [{"x": x, "labels": y} for x, y in vectors()]
    callback = MagnitudePruning(0.3, structure=Heads(), select=["*.attention.*"])
    trainer(callback, epochs=4).fit(FromDict(Encoder()), DataLoader(batches, batch_size=None))
    assert callback.groups_left()


class Attended(nn.Module):
    """An nn.MultiheadAttention on four parts of the input, between Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inputs(x.unflatten(-1, (4, 4)))
        out: Tensor = self.head(self.attention(y, y, y, need_weights=False)[0].mean(1))
        return out


NONE: dict[str, tuple[Any, Any, list[str] | None, str]] = {
    "no attention": (lambda: network(), Heads(), None, r"it has no attention whose queries, .* Use Channels\(\), Rows\(\) or Columns\(\)"),
    "of torch": (
        Attended,
        Heads(),
        None,
        r"attention: nn.MultiheadAttention keeps its width: to remove heads, write it with nn.Linear .*"
        r"For heads that are zero .*structure=Blocks\(\(8, 4\)\), .* with select=\['network.attention.out_proj.weight'\]$",
    ),
    "not selected": (
        lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        Channels(),
        ["network.3.weight"],
        r"network.3: it is part of the output. None of the selected weights produces groups; these would: \['network.0.weight'\]. Add them",
    ),
}


@pytest.mark.parametrize(("make", "structure", "select", "said"), NONE.values(), ids=NONE.keys())
def test_a_structure_without_groups_says_why(make: Any, structure: Structure, select: list[str] | None, said: str) -> None:
    batches = images() if said.startswith("it has no attention") else vectors()
    with pytest.raises(ValueError, match=said):
        trainer(MagnitudePruning(0.3, structure=structure, select=select)).fit(Toy(make()), batches)


def test_heads_of_torch_become_zero_as_the_refusal_says() -> None:
    module = Toy(Attended())
    blocks = MagnitudePruning(0.5, structure=Blocks((8, 4)), select=["network.attention.out_proj.weight"])
    trainer(blocks, epochs=2).fit(module, vectors())
    weight = module.network.attention.out_proj.weight
    assert sorted(bool(part.any()) for part in weight.split(4, dim=1)) == [False, True]  # one head of two is left


def test_a_network_without_removable_groups_is_refused_with_the_reason() -> None:
    module = Toy(nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match=r"finds no groups that can be removed exactly.*: LayerNorm averages over its channels"):
        trainer(ReweightedPenalty(LOG_SUM, 0.1, structure=Channels())).fit(module, vectors())


def test_one_axis_is_counted_in_the_singular() -> None:
    for parts, said in ((("a",), "on 1 axis and leaves out 1"), (("a", "b"), "on 2 axes and leaves out 1")):
        found = Found(SimpleNamespace(parts=parts), {}, {"output": "an output"})  # type: ignore[arg-type]
        assert said in found.message(Channels())
