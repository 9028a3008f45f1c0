"""Scores against hand-written rankings, the floors of layers, and scores in callbacks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from mutants import Scored
from torch import Tensor, nn
from toys import Toy, data, trainer, weights

from lightning_sparse import penalties, scores
from lightning_sparse.callbacks import MagnitudePruning, ReweightedPenalty, Sparsify
from lightning_sparse.callbacks.options import Options
from lightning_sparse.gradient_squares import GradientSquares
from lightning_sparse.scores import Ranked, keep_highest
from lightning_sparse.structure import Rows
from lightning_sparse.testing import ContractError, check_score

BUILT_IN = [
    scores.Magnitude(),
    scores.LayerMagnitude(),
    scores.LAMP(),
    scores.RelativeMagnitude(),
    scores.Fisher(),
    scores.KeepProbability(),
]
every_score = pytest.mark.parametrize("score", BUILT_IN, ids=repr)


def given(w: Tensor, alive: Tensor | None = None, alpha: Tensor | None = None, squares: Tensor | None = None) -> Ranked:
    return Ranked(
        "w", w, torch.ones_like(w, dtype=torch.bool) if alive is None else alive, torch.ones_like(w) if alpha is None else alpha, squares
    )


@every_score
def test_a_score_has_the_weights_shape_and_rises_with_their_size(score: scores.Score) -> None:
    w = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    alpha = 1 / (1 + 0.1 / w.abs())
    found = score.of(given(w, alpha=alpha, squares=torch.full_like(w, 0.3)))
    assert found.shape == w.shape
    assert torch.equal(found.reshape(-1).argsort(), w.abs().reshape(-1).argsort())


@every_score
def test_a_score_keeps_its_contract(score: scores.Score) -> None:
    check_score(score)


def test_scores_against_formulas_written_by_hand() -> None:
    w = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    alive, squares = w != 0, torch.tensor([[1.0, 9.0], [5.0, 0.25]])
    at = given(w, alive, squares=squares)
    assert scores.LayerMagnitude().of(at).flatten().tolist() == [0.75, 0.25, 0.0, 0.5]
    torch.testing.assert_close(scores.LAMP().of(at).flatten(), torch.tensor([9 / 9, 1 / 14, 0.0, 4 / 13]))
    torch.testing.assert_close(scores.RelativeMagnitude().of(at), w.abs() / math.sqrt(14 / 3))
    torch.testing.assert_close(scores.Fisher().of(at).flatten(), torch.tensor([9.0, 9.0, 0.0, 1.0]))


class Forgetful(scores.Score):
    """A score that uses squares without asking for them."""

    def of(self, given: Ranked) -> Tensor:
        return given.w.abs() * given.squares.sqrt()  # type: ignore[union-attr]


class Misspelt(scores.Score):
    """A score that asks for an attribute that does not exist."""

    def of(self, given: Ranked) -> Tensor:
        return given.weight.abs()  # type: ignore[attr-defined, no-any-return]


def test_a_score_without_needs_squares_is_told_so_and_another_error_is_left_alone() -> None:
    cure = "'NoneType' object has no attribute 'sqrt'; given.squares is None unless the class sets needs_squares = True"
    at = given(torch.ones(2, 2))
    with pytest.raises(ValueError, match=rf"Forgetful\(\): AttributeError: {cure}"):
        scores.checked(Forgetful(), at, set())
    with pytest.raises(AttributeError, match="'weight'"):
        scores.checked(Misspelt(), at, set())
    with pytest.raises(ContractError, match=cure):
        check_score(Forgetful())
    with pytest.raises(ContractError, match=r"has no attribute 'weight'$"):
        check_score(Misspelt())


def test_layers_of_unlike_scale_are_told_apart_by_the_relative_scores_only() -> None:
    small, large = torch.linspace(0.01, 0.1, 100), torch.linspace(1, 10, 100)
    everywhere = {"small": torch.ones(100, dtype=torch.bool), "large": torch.ones(100, dtype=torch.bool)}

    def kept(score: scores.Score) -> list[int]:
        found = {name: score.of(given(w)) for name, w in (("small", small), ("large", large))}
        return [int(mask.sum()) for mask in keep_highest(found, everywhere, 0.8).values()]

    assert kept(scores.Magnitude()) == [1, 39]  # one weight is always left
    assert kept(scores.RelativeMagnitude()) == kept(scores.LayerMagnitude()) == [20, 20]


@pytest.mark.parametrize("zeros", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("least", [0.0, 0.05])
def test_exactly_the_share_is_left_and_every_tensor_keeps_its_floor(zeros: float, least: float) -> None:
    generator = torch.Generator().manual_seed(1)
    ranked = {name: scale * torch.rand(200, generator=generator) for name, scale in (("a", 1.0), ("b", 1e-3), ("c", 1e3))}
    alive = {name: torch.rand(200, generator=generator) < 0.7 for name in ranked}
    kept = keep_highest(ranked, alive, zeros, least)
    assert sum(int(mask.sum()) for mask in kept.values()) == 600 - round(zeros * 600)
    for name, mask in kept.items():
        assert int(mask.sum()) >= max(1, round(least * 200))
        left = ranked[name][mask & alive[name]]
        gone = ranked[name][~mask & alive[name]]
        assert not len(left) or not len(gone) or left.min() >= gone.max()  # by score within each tensor


def test_a_floor_is_met_with_weights_at_rest_but_not_with_removed_ones() -> None:
    score = {"rests": torch.arange(10.0), "lives": torch.arange(10.0) + 100}
    alive = {"rests": torch.zeros(10, dtype=torch.bool), "lives": torch.ones(10, dtype=torch.bool)}
    alive["rests"][0] = True
    left = {"rests": torch.arange(10) < 4, "lives": alive["lives"]}
    kept = keep_highest(score, alive, 0.7, 0.21, left)  # three of ten, rounded up
    assert kept["rests"].nonzero().flatten().tolist() == [0, 2, 3]
    assert kept["lives"].nonzero().flatten().tolist() == [7, 8, 9]
    kept = keep_highest(score, alive, 0.7, 0.5, left)
    assert int(kept["rests"].sum()) == 4  # all that are left
    assert int(keep_highest(score, alive, 0.7, 0.21)["rests"].sum()) == 1


def test_weights_that_are_not_alive_go_first_and_return_only_where_the_share_needs_them() -> None:
    alive = {"w": torch.tensor([True, False, True, False])}
    kept = {share: keep_highest({"w": torch.tensor([1.0, 9.0, 2.0, 8.0])}, alive, share)["w"].tolist() for share in (0.75, 0.5, 0.25)}
    assert kept == {0.75: [False, False, True, False], 0.5: [True, False, True, False], 0.25: [True, True, True, False]}


@dataclass(frozen=True)
class First(scores.Score):
    """A user's own score: the first weights in memory are the last to go."""

    def of(self, given: Ranked) -> Tensor:
        return torch.arange(given.w.numel(), 0, -1, dtype=torch.float32).reshape(given.w.shape)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_users_own_score_decides_what_pruning_keeps(scope: str) -> None:
    module = Toy()
    trainer(MagnitudePruning(0.75, every=3, scope=scope, score=First()), epochs=3).fit(module, data())
    for w in weights(module).values():
        if w.dim() > 1:
            kept = (w != 0).flatten()
            assert kept[: int(kept.sum())].all()


@every_score
def test_a_target_is_met_to_the_weight_by_every_score(score: scores.Score) -> None:
    module = Toy()
    matrices = [w for w in module.parameters() if w.dim() > 1]
    size = sum(w.numel() for w in matrices)
    for callback in (
        MagnitudePruning(0.9, every=3, score=score),
        ReweightedPenalty(penalties.LogSum(eps=2.0), target_sparsity=0.9, score=score, least_kept=0.05),
    ):
        module = Toy()
        trainer(callback, epochs=3).fit(module, data())
        left = [int((w != 0).sum()) for w in module.parameters() if w.dim() > 1]
        assert sum(left) == size - round(0.9 * size)
        assert min(left) >= 1


def test_the_squares_are_those_of_the_loss_and_resume_exactly(tmp_path: str) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer, module):  # type: ignore[no-untyped-def]
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(f"{tmp_path}/half.ckpt")

    make = lambda: ReweightedPenalty(penalties.LogSum(eps=2.0), target_sparsity=0.8, score=scores.Fisher(decay=0.5))  # noqa: E731
    whole, module, again, resumed = make(), Toy(), make(), Toy(seed=1)
    trainer(whole, Save(), epochs=5).fit(module, data())
    trainer(again, epochs=5).fit(resumed, data(), ckpt_path=f"{tmp_path}/half.ckpt")
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(module).items())
    assert all(
        torch.equal(mean, again.support.squares.means[name]) and mean.max() > 0 for name, mean in whole.support.squares.means.items()
    )


def test_least_kept_holds_in_each_layer_and_an_impossible_one_is_refused() -> None:
    module = Toy()
    with torch.no_grad():
        next(w for w in module.parameters() if w.dim() > 1).mul_(1e-6)  # magnitude over all layers would empty it
    trainer(MagnitudePruning(0.8, every=3, least_kept=0.1), epochs=3).fit(module, data())
    assert all(float((w != 0).float().mean()) > 0.09 for w in module.parameters() if w.dim() > 1)
    with pytest.raises(ValueError, match=r"least_kept=0.3 keeps that share.*target_sparsity=0.8 leaves 20.00%"):
        MagnitudePruning(0.8, least_kept=0.3)
    with pytest.raises(TypeError, match=r"score must be a Score .*, got 'LAMP'; closest: 'LAMP\(\)'$"):
        MagnitudePruning(0.8, score="LAMP")  # type: ignore[arg-type]


def test_least_kept_holds_where_the_penalty_has_the_layer_at_rest() -> None:
    module = Toy()
    module.make = lambda p: torch.optim.SGD(p, 1e-6)
    first = next(w for w in module.parameters() if w.dim() > 1)
    with torch.no_grad():
        first.mul_(1e-6)  # within the zero region of the penalty below
    form = ReweightedPenalty(penalties.LogSum(eps=2.0), 1e3, target_sparsity=0.8, least_kept=0.1)
    trainer(form, epochs=3).fit(module, data())
    assert int((first != 0).sum()) == math.ceil(0.1 * first.numel())
    assert form.share_of_zeros() == pytest.approx(0.8, abs=0.004)


WRONG = {
    "negative": (lambda given: given.w, r"the score Scored\(\) of 'network.0.weight' is negative at \d+ of 128 weights, down to -0"),
    "not finite": (lambda given: given.w / 0, r"of 'network.0.weight' is NaN or infinite at 128 of 128 weights"),
    "of rows": (lambda given: given.w.abs().mean(1), r"of 'network.0.weight' has the shape \(16,\): .* given.w's shape \(16, 8\)"),
}


@pytest.mark.parametrize("make", [MagnitudePruning, Sparsify])
@pytest.mark.parametrize(("of", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_score_is_refused_before_the_first_step(of: Any, said: str, make: Any) -> None:
    loop = trainer(make(0.5, score=Scored(of)), epochs=2)
    with pytest.raises(ValueError, match=said):
        loop.fit(Toy(), data())
    assert loop.global_step == 0


def test_a_wrong_score_of_groups_is_refused_before_the_first_step() -> None:
    loop = trainer(Sparsify(0.5, score=Scored(lambda given: given.w / 0), structure=Rows()), epochs=2)
    with pytest.raises(ValueError, match=r"of 'network.0.weight' is NaN or infinite at 16 of 16 weights"):
        loop.fit(Toy(), data())
    assert loop.global_step == 0


@dataclass(frozen=True)
class Slopes(scores.Score):
    """A user's own score that needs the squares of gradients."""

    needs_squares = True

    def of(self, given: Ranked) -> Tensor:
        assert given.squares is not None
        return given.squares.sqrt() * given.w.abs()


def test_a_resumed_run_keeps_the_zeros_that_pruning_made_beyond_its_target(tmp_path: str) -> None:
    make = lambda: MagnitudePruning(0.33, every=2, keep_zeros=True, structure=Rows())  # noqa: E731
    loop = trainer(make(), epochs=3)
    loop.fit(Toy(), data())
    loop.save_checkpoint(f"{tmp_path}/last.ckpt")
    again = make()
    trainer(again, epochs=4).fit(Toy(seed=1), data(), ckpt_path=f"{tmp_path}/last.ckpt")
    assert again.share_of_zeros() > 0.335  # a whole row more than asked for


@pytest.mark.parametrize("make", [MagnitudePruning, Sparsify])
def test_a_score_of_ones_own_is_given_the_squares_of_gradients(make: Any) -> None:
    module = Toy()
    callback = make(0.75, score=Slopes())
    trainer(callback, epochs=3).fit(module, data())
    assert callback.share_of_zeros() == 0.75
    assert all(mean.max() > 0 for mean in callback.support.squares.means.values())


def test_a_score_is_checked_once_for_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(scores, "check", lambda score, given, found: seen.append(given.name))
    trainer(Sparsify(0.5), epochs=4).fit(Toy(), data())
    assert seen == ["network.0.weight", "network.2.weight"]


def test_a_layer_that_is_left_with_one_weight_is_named() -> None:
    module = Toy(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)))
    with torch.no_grad():
        module.network[0].weight.mul_(1e-9)
    with pytest.warns(UserWarning, match=r"has left at most one weight of \['network.0.weight'\]"):
        trainer(MagnitudePruning(0.8, every=1, end=0.3), epochs=3).fit(module, data())


def deep() -> Toy:
    return Toy(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)))


def test_a_layer_that_lam_has_emptied_is_named() -> None:
    module = deep()
    module.make = lambda p: torch.optim.SGD(p, 1e-12)  # nothing moves
    with torch.no_grad():
        module.network[0].weight.mul_(1e-9)
    # the other layer keeps its weights, so that the share of those left is large
    wanted = r"has left at most one weight of \['network.0.weight'\].* Give a smaller lam \(now 0.0001\), or target_sparsity in its place"
    with pytest.warns(UserWarning, match=wanted):
        trainer(ReweightedPenalty(penalties.LogSum(eps=2.0), 1e-4, threshold=1e-3), epochs=25).fit(module, data())


def test_a_network_without_any_weight_left_is_reported_with_a_smaller_lam() -> None:
    wanted = r"ReweightedPenalty has left 0 of 704 selected weights: the network passes on .* Give a smaller lam \(now 100\), or"
    with pytest.warns(UserWarning, match=wanted):
        trainer(ReweightedPenalty(penalties.LogSum(eps=2.0), 100.0), epochs=25).fit(deep(), data())


def test_a_network_without_any_weight_left_is_reported_with_a_smaller_target() -> None:
    module = Toy(nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 3)))
    with pytest.warns(UserWarning, match=r"Sparsify has left 1 of 5632 selected weights: .* Give a smaller target_sparsity"):
        trainer(Sparsify(0.9999), epochs=3).fit(module, data())


def test_without_a_score_lamp_ranks() -> None:
    make = lambda target, **more: ReweightedPenalty(penalties.LogSum(eps=2.0), target_sparsity=target, **more)  # noqa: E731
    assert [make(target).support.score for target in (0.5, 0.9, 0.95)] == [scores.LAMP()] * 3
    assert make(0.95, score=scores.Magnitude()).support.score == scores.Magnitude()
    assert make(0.5).score is None
    assert MagnitudePruning(0.98).score == scores.Magnitude()


def test_a_score_is_part_of_the_settings_and_conversions_keep_it() -> None:
    callback = ReweightedPenalty(penalties.LogSum(eps=2.0), target_sparsity=0.9, score=scores.Fisher(decay=0.9))
    assert callback.to_mask().score == scores.Fisher(decay=0.9)
    assert callback.recipe()["init_args"]["score"] == {"class_path": "Fisher", "init_args": {"decay": 0.9}}
    assert "score=Fisher(decay=0.9)" in repr(callback)
    callback.tol = 0.1  # a changed option leaves the others as they are
    assert callback.options.score == scores.Fisher(decay=0.9)
    assert isinstance(callback.options, Options)


def test_squares_are_those_of_the_losss_gradients_whatever_their_scale() -> None:
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.tensor([2.0, 4.0])  # of a loss that was multiplied by 2

    class Store:
        def members(self, optimizer: Any) -> list[Any]:
            return [("w", w, {})]

        def live(self, name: str) -> Tensor:
            return w.detach()

    squares = GradientSquares(scores.Fisher(decay=0.5), Store())  # type: ignore[arg-type]
    squares.update(torch.optim.SGD([w], 0.1), None, scale=2.0)
    assert squares.means["w"].tolist() == [0.5, 2.0]
