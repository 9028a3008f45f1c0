"""Callbacks with a structure: whole groups become zero, masks have one draw a group, a resumed run is exact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from toys import Spy, Toy, data, several, trainer, weights

from lightning_sparse import curvature, mask_rules, noise, penalties, testing
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    PenaltyLoss,
    ReweightedPenalty,
    VariationalDropout,
)
from lightning_sparse.structure import NM, Blocks, Columns, Element, Rows, Structure

LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 0.03, threshold=0.1),
    "loss": partial(PenaltyLoss, LOG_SUM, 0.03, threshold=0.1),
    "prox": partial(AdaptiveProx, LOG_SUM, 0.05),
    "exact prox": partial(AdaptiveProx, LOG_SUM, 0.05, exact=True),
    "mask": partial(AdaptiveMask, LOG_SUM, 0.05),
    "mask, Bernoulli": partial(AdaptiveMask, LOG_SUM, 0.05, noise=noise.ScaledBernoulli()),
    "mask, sampled": partial(AdaptiveMask, LOG_SUM, 0.05, curvature=curvature.SampledFisher(output="network", every=1)),
    "eta-trick": partial(EtaTrick, LOG_SUM, 0.1, tol=0.3, learned_lr=0.4, keep_start=0.303),
    "VarDrop": partial(VariationalDropout, 0.1, noise="weight", log_start=2.93, learned_lr=0.3),
    "VarDrop, additive": partial(VariationalDropout, 0.02, "empirical_bayes", log_start=-1.0, learned_lr=0.05),
    "hard concrete": partial(HardConcrete, 0.003, tol=0.5, log_start=-0.578, learned_lr=0.3),
    "pruning": partial(MagnitudePruning, 0.5, every=2),
    "to a target": partial(ReweightedPenalty, LOG_SUM, target_sparsity=0.5),
}


@dataclass(frozen=True, repr=False)
class HalfRows(Structure):
    """The two halves of each row of a matrix with an even number of columns: a user's own structure."""

    def pool(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), 2, -1).sum(-1)

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        return value.repeat_interleave(like.shape[1] // 2, dim=1)


STRUCTURES = {"rows": Rows(), "columns": Columns(), "blocks": Blocks((2, 3)), "own": HalfRows()}
every_form = pytest.mark.parametrize("form", several(FORMS, "penalty", "mask", "VarDrop, additive", "pruning"))
every_structure = pytest.mark.parametrize("structure", several(STRUCTURES, "rows", "blocks"))


def whole(w: Tensor, structure: Structure) -> bool:
    """Return True if each group is all zero or has no zero."""
    zeros = structure.pool((w == 0).float())
    return bool(((zeros == 0) | (zeros == structure.pool(torch.ones_like(w)))).all())


@every_structure
@every_form
def test_whole_groups_are_zero_in_files_and_after_the_fit(form: Any, structure: Structure) -> None:
    filed: list[dict[str, Tensor]] = []

    def look(moment: str, module: Toy) -> None:
        if moment == "batch end":
            filed.append({name: w.clone() for name, w in module.state_dict().items() if w.dim() > 1})

    module, callback = Toy(), form(structure=structure)
    trainer(callback, Spy(look), epochs=10).fit(module, data())
    final = {name: w for name, w in weights(module).items() if w.dim() > 1}
    assert all(whole(w, structure) for state in [*filed, final] for w in state.values())
    zeros = sum(int((w == 0).sum()) for w in final.values())
    assert 0 < zeros < sum(w.numel() for w in final.values())


@every_form
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using .ckpt_path.")
def test_a_resumed_run_is_exact(form: Any, tmp_path: Any) -> None:
    files = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    straight, resumed = Toy(), Toy(seed=1)
    trainer(form(structure=Rows()), files, epochs=4, enable_checkpointing=True).fit(straight, data())
    trainer(form(structure=Rows()), epochs=4).fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    for (name, wanted), found in zip(weights(straight).items(), weights(resumed).values(), strict=True):
        assert torch.equal(wanted, found), name


@pytest.mark.parametrize("kind", [noise.ScaledBernoulli(), noise.Gaussian(local=True)], ids=repr)
def test_a_mask_has_one_draw_for_each_group(kind: noise.Noise) -> None:
    ratios: list[Tensor] = []
    callback = AdaptiveMask(LOG_SUM, 0.3, noise=kind, curvature=None, alpha_min=1e-3, structure=Rows())

    def look(moment: str, module: Toy) -> None:
        if moment == "before backward":
            name = "network.0.weight"
            ratios.append(dict(module.named_parameters())[name].detach() / callback.weights.live(name))

    trainer(callback, Spy(look), epochs=24).fit(Toy(optimizer=lambda p: torch.optim.SGD(p, 0.0)), data())
    drawn = torch.stack(ratios)  # (steps, rows, columns)
    torch.testing.assert_close(drawn, drawn[:, :, :1].expand_as(drawn), rtol=1e-4, atol=1e-5)
    alpha = callback.keep_probability("network.0.weight")[:, 0]
    masks = drawn[:, :, 0]
    deviation = ((1 - alpha) / alpha / len(masks)).sqrt()
    assert bool(((masks.mean(0) - 1).abs() < 4.5 * deviation).all())
    torch.testing.assert_close(masks.var(0).mean(), ((1 - alpha) / alpha).mean(), rtol=0.25, atol=0)


def test_element_is_the_default_and_changes_nothing() -> None:
    plain, named = Toy(), Toy()
    for module, options in ((plain, {}), (named, {"structure": Element()})):
        trainer(ReweightedPenalty(LOG_SUM, 0.03, **options)).fit(module, data())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), named.parameters(), strict=True))
    assert repr(ReweightedPenalty(LOG_SUM, 0.03, structure=Element())) == repr(ReweightedPenalty(LOG_SUM, 0.03))


def test_two_of_four_are_zero_and_trained_as_such() -> None:
    module = Toy(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    trainer(ReweightedPenalty(LOG_SUM, 1e-3, freeze=0.25, structure=NM(2, 4)), epochs=4).fit(module, data())
    for w in (w for w in module.parameters() if w.dim() > 1):
        assert (w != 0).reshape(len(w), -1, 4).sum(2).unique().tolist() == [2]


def test_conversion_keeps_the_structure() -> None:
    mask = ReweightedPenalty(LOG_SUM, 0.03, structure=Blocks((4, 4))).to_mask()
    assert mask.structure == Blocks((4, 4)) == mask.to_penalty().structure == mask.to_prox().structure
    assert mask.recipe()["init_args"]["structure"] == {"class_path": "Blocks", "init_args": {"shape": [4, 4]}}


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ReweightedPenalty(LOG_SUM, 0.1, structure="rows"), TypeError, r"got 'rows'; closest: 'Rows\(\)'$"),
        (lambda: AdaptiveMask(mask_rules.TopK(0.5), structure=Rows()), ValueError, "needs a separable penalty"),
        (lambda: ReweightedPenalty(LOG_SUM, 0.1, structure=Rows(), compile=True), ValueError, "compile=True is for single"),
        (lambda: ReweightedPenalty(LOG_SUM, 0.1, structure=Rows(), gap_samples=2), ValueError, "gap_samples draws masks of single"),
        (lambda: ReweightedPenalty(LOG_SUM, target_sparsity=0.5, structure=NM(2, 4)), ValueError, "fixes the share of zeros"),
        (
            lambda: MagnitudePruning(0.3, structure=NM(2, 4)),
            ValueError,
            r"makes 50% of the weights zero by itself: .* at least 0\.5, got 0\.3",
        ),
    ],
)
def test_refusals(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_input_moment_is_refused() -> None:
    with pytest.raises(ValueError, match="InputMoment knows the curvature of single weights"):
        trainer(AdaptiveMask(LOG_SUM, 0.1, curvature=curvature.InputMoment(), structure=Rows())).fit(Toy(), data())


def rows() -> list[Callback]:
    return [MagnitudePruning(0.5, every=2, structure=Rows())]


def mask_of_rows() -> list[Callback]:
    return [AdaptiveMask(LOG_SUM, target_sparsity=0.6, structure=Rows())]


@pytest.mark.slow
@pytest.mark.parametrize("make", [rows, mask_of_rows])
def test_conformance(make: Any) -> None:
    # whole groups meet a target from above: of 176 weights in 19 rows by more than those checks allow
    by_share = ("a_run_without_zeros_says_so", "a_target_is_met_in_a_few_steps", "a_longer_run_keeps_its_target")
    testing.check_callback(make, slow=False, skip=by_share)
