"""BestAfterTarget: scores of other callbacks count after the target is reached; the warning without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from toys import Toy, data, several, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import BestAfterTarget, MagnitudePruning, ReweightedPenalty, SparseCheckpoint
from lightning_sparse.conformance.ranks import DDP, on_ranks

LOG_SUM = penalties.LogSum(eps=2.0)


class Rising(Toy):
    """A toy whose validation score gets worse in every epoch, so the first epoch is the best."""

    def validation_step(self, batch, index):
        self.log("score", float(self.current_epoch))


def share(path):
    matrices = [w for w in torch.load(path, weights_only=True)["state_dict"].values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


def fit(*callbacks, epochs=8, **options):
    run = trainer(*callbacks, epochs=epochs, enable_checkpointing=True, **options)
    run.fit(Rising(), data(), data(seed=1))
    return run


def pruning():
    return MagnitudePruning(0.5, end=0.5, every=2)


@pytest.mark.parametrize("last", [True, False], ids=["listed last", "listed first"])
@pytest.mark.parametrize("top", several({"1": 1, "2": 2, "all": -1}, "2"))
def test_the_best_file_is_the_best_of_those_that_meet_the_target(last, top, tmp_path):
    keeper, waiting = ModelCheckpoint(tmp_path, filename="{epoch}-{score:.0f}", monitor="score", save_top_k=top), BestAfterTarget()
    fit(*([pruning(), keeper, waiting] if last else [waiting, keeper, pruning()]))
    assert waiting.held
    assert share(keeper.best_model_path) == pytest.approx(0.5, abs=0.01)
    first = int(keeper.best_model_score)
    assert Path(keeper.best_model_path).name == f"epoch={first}-score={first}.ckpt"
    assert 2 <= first <= 5
    assert len([*tmp_path.iterdir()]) == (8 if top == -1 else top)


def test_without_it_the_first_epoch_is_best_with_a_warning_before_training(tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score")
    with pytest.warns(UserWarning, match=r"ModelCheckpoint\(monitor='score'\) compares all epochs(.|\n)*BestAfterTarget\(\)") as said:
        fit(pruning(), keeper)
    assert sum("compares all epochs" in str(one.message) for one in said) == 1
    assert Path(keeper.best_model_path).name == "epoch=0.ckpt"
    assert share(keeper.best_model_path) < 0.5


@pytest.mark.parametrize("others", [[], [ModelCheckpoint()], [SparseCheckpoint(0.4, monitor="score")], [BestAfterTarget()]])
def test_no_warning_without_a_score_or_with_best_after_target(others, tmp_path):
    run = fit(pruning(), *others, default_root_dir=tmp_path, epochs=4)
    assert run.current_epoch == 4


def test_no_warning_about_a_strength_without_a_target(tmp_path):
    run = fit(ReweightedPenalty(LOG_SUM, 0.5), ModelCheckpoint(tmp_path, monitor="score"), epochs=2)
    assert run.current_epoch == 2


def test_patience_runs_from_the_target_on(tmp_path):
    stopping = EarlyStopping("score", patience=2)
    run = fit(stopping, pruning(), BestAfterTarget(), default_root_dir=tmp_path, epochs=20)
    assert 10 <= run.current_epoch <= 14
    assert stopping.stopped_epoch == run.current_epoch - 1


def test_a_custom_share_can_be_the_target(tmp_path):
    keeper, waiting = ModelCheckpoint(tmp_path, monitor="score"), BestAfterTarget(target_sparsity=0.3)
    fit(ReweightedPenalty(LOG_SUM, 0.3), keeper, waiting)
    assert waiting.held
    assert share(keeper.best_model_path) >= 0.3 - 0.01


def test_without_the_target_the_latest_file_is_kept_with_a_warning(tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score")
    with pytest.warns(UserWarning, match="the target sparsity was never met"):
        fit(ReweightedPenalty(LOG_SUM, 0.3), keeper, BestAfterTarget(0.999), epochs=3)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=2.ckpt"]
    assert float(keeper.best_model_score) == 2


def test_steps_between_validations_keep_the_latest_file_too(tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="{step}", monitor="score", every_n_train_steps=3)
    fit(MagnitudePruning(0.5, end=0.75, every=2), keeper, BestAfterTarget(), epochs=8)
    assert share(keeper.best_model_path) == pytest.approx(0.5, abs=0.02)


def test_unsupported_targets_are_refused():
    with pytest.raises(ValueError, match="the Trainer has none"):
        fit(BestAfterTarget())
    with pytest.raises(ValueError, match=r"ReweightedPenalty has no target sparsity to wait for.*BestAfterTarget\(target_sparsity=0.9\)"):
        fit(ReweightedPenalty(LOG_SUM, 0.5), BestAfterTarget())
    with pytest.raises(ValueError, match="target_sparsity must"):
        BestAfterTarget(1.5)


def test_it_goes_on_waiting_or_not_where_a_run_is_resumed():
    waiting, again = BestAfterTarget(), BestAfterTarget()
    waiting.held = True
    again.load_state_dict(waiting.state_dict())
    assert again.held
    assert repr(BestAfterTarget(0.9)) == "BestAfterTarget(target_sparsity=0.9)"


def _two_ranks(rank, folder):
    keeper, waiting = ModelCheckpoint(folder, filename="{epoch}", monitor="score"), BestAfterTarget()
    run = trainer(pruning(), keeper, waiting, epochs=6, enable_checkpointing=True, **DDP)
    run.fit(Rising(), data(seed=2 * rank), data(seed=1))
    return waiting.held, Path(keeper.best_model_path).name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log")
def test_two_ranks_wait_for_the_same_epoch(tmp_path):
    one, two = on_ranks(_two_ranks, tmp_path)
    assert one == two
    assert one[0]
    assert share(tmp_path / one[1]) == pytest.approx(0.5, abs=0.01)


def test_early_stopping_that_may_come_before_the_target_has_a_warning_with_its_cure():
    stopping = r"EarlyStopping\(monitor='score', patience=2\) may stop the run before MagnitudePruning reaches its target of 0.5"
    with pytest.warns(UserWarning, match=stopping + r"(.|\n)*BestAfterTarget\(\)(.|\n)*patience; finish='prune' cuts to the target"):
        trainer(MagnitudePruning(0.5), EarlyStopping("score", patience=2), epochs=3).fit(Rising(), data(), data(seed=1))
