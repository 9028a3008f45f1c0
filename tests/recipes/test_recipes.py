"""Packaged recipes with their data and models; overlays on a plain LightningCLI run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from shrunk import cifar10

from lightning_sparse import callbacks
from lightning_sparse.callbacks import AdaptiveMask, Sparsifier
from lightning_sparse.cli import main, recipes, seeds
from lightning_sparse.examples.digits import Digits, ShuffledBatches
from lightning_sparse.examples.mlp import MLP

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.*",  # Lightning with this torch
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # LightningCLI with this jsonargparse
    "ignore:LightningCLI's args parameter",
    "ignore:The number of training batches",
)
OVERLAYS = [name for name in recipes.names() if name.startswith("overlay/")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if "/" in name else ()) for name in recipes.names()])
def test_every_recipe_passes_its_check_and_says_what_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name]) == 0
    assert f"ok: {name}" in capsys.readouterr().out
    assert {"summary", "reaches", "command"} <= recipes.about(recipes.find(name)).keys()


@pytest.mark.slow
def test_the_check_says_where_weights_come_later(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "text/llama_1b_50"]) == 0
    assert "CausalLM builds its layers when training starts, so its weights were not checked" in capsys.readouterr().out


@pytest.mark.parametrize("gone", [50, 70])
def test_the_recipes_of_channels_are_what_the_study_trains(gone: int) -> None:
    """The study that counts the multiply-adds (docs/shrink.md) trains with the callback of the recipe."""
    written = yaml.safe_load(recipes.find(f"cifar10/resnet20_channels_{gone}").read_text())["sparsify"]["init_args"]
    trained = cifar10.recommended(cifar10.TARGETS[round(1 - gone / 100, 1)]).recipe()["init_args"]
    assert written["score"]["class_path"] == trained["score"]["class_path"]
    assert {name: written[name] for name in ("target_sparsity", "freeze", "structure")} == {
        name: trained[name] for name in ("target_sparsity", "freeze", "structure")
    }


def test_there_is_an_overlay_for_each_form() -> None:
    classes = (getattr(callbacks, name) for name in callbacks.__all__)
    forms = {cls.__name__.lower() for cls in classes if issubclass(cls, Sparsifier) and cls is not Sparsifier}
    assert {name.removeprefix("overlay/").replace("_", "") for name in OVERLAYS} == forms


def users_own_run(tmp_path: Path, overlay: str, *more: str, **kwargs: bool) -> LightningCLI:
    """Write a user's script with their own model, data and callbacks, to be run with one overlay."""
    own = {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 1,
            "logger": False,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}],
        },
        "model": {"class_path": "lightning_sparse.examples.mlp.MLP", "init_args": {"sizes": [64, 20, 10]}},
        "data": {"class_path": "lightning_sparse.examples.digits.Digits"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    words = ["--config", str(tmp_path / "own.yaml"), "--config", str(recipes.find(overlay)), *more]
    words += ["--trainer.default_root_dir", str(tmp_path)]
    return LightningCLI(args=(["fit", *words] if kwargs.get("run", True) else words), save_config_callback=None, **kwargs)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_adds_its_callback_and_keeps_the_users(name: str, tmp_path: Path) -> None:
    trainer = users_own_run(tmp_path, name, run=False).trainer
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    assert "EarlyStopping" in kinds
    assert "".join(kinds).lower().count(name.removeprefix("overlay/").replace("_", "")) == 1


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_takes_a_target_from_the_command_line(name: str, tmp_path: Path) -> None:
    callback = users_own_run(tmp_path, name, "--trainer.callbacks.target_sparsity", "0.55", run=False).trainer.callbacks
    assert [one.target_sparsity for one in callback if hasattr(one, "target_sparsity")] == [0.55]


def test_an_overlaid_run_trains_and_logs_its_sparsity(tmp_path: Path) -> None:
    trainer = users_own_run(tmp_path, "overlay/reweighted_penalty").trainer
    assert 0 <= trainer.callback_metrics["sparsity/total"] <= 1
    assert trainer.current_epoch == 1


def test_the_parts_of_the_digits_are_disjoint_and_stratified() -> None:
    data = Digits(validation=0.25, test=0.25)
    data.setup("fit")
    rows = {name: {tuple(image) for image in x.tolist()} for name, (x, _) in data.parts.items()}
    assert sum(len(x) for x, _ in data.parts.values()) == 1797
    assert not rows["training"] & rows["test"]
    assert not rows["training"] & rows["validation"]
    assert not rows["validation"] & rows["test"]
    for _, labels in data.parts.values():
        shares = torch.bincount(labels) / len(labels)
        assert (shares - 0.1).abs().max() < 0.01
    assert data.parts["training"][0].min() == -1
    assert data.parts["training"][0].max() == 1


def test_batches_hold_every_sample_once_in_an_order_of_seed_and_epoch() -> None:
    x = torch.arange(10.0)[:, None]
    loader = ShuffledBatches(x, torch.arange(10), batch_size=4, seed=3)
    first, again = [torch.cat([y for _, y in loader]) for _ in range(2)]
    loader.set_epoch(1)
    second = torch.cat([y for _, y in loader])
    assert len(loader) == len(list(loader)) == 3
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(second.sort().values, torch.arange(10))
    assert all(torch.equal(inputs[:, 0].long(), labels) for inputs, labels in loader)


def test_training_passes_the_epoch_to_the_loader(tmp_path: Path) -> None:
    data = Digits(batch_size=1000)
    trainer = Trainer(
        max_epochs=3, logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(MLP([64, 10]), datamodule=data)
    loader = trainer.train_dataloader
    assert isinstance(loader, ShuffledBatches)
    assert loader.epoch == 2


def test_the_learning_rate_ends_at_zero(tmp_path: Path) -> None:
    trainer = Trainer(
        max_epochs=2, logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(MLP([64, 10], lr=0.5), datamodule=Digits(batch_size=1000))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"), [({"test": 0.0}, "test must lie in"), ({"test": 0.6, "validation": 0.5}, r"validation \+ test must lie in")]
)
def test_a_split_that_leaves_nothing_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)  # type: ignore[arg-type]


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="inputs and the classes"):
        MLP([64])


def test_the_seeds_are_summed_up_by_mean_and_sample_deviation() -> None:
    lines = seeds.summary("digits", [{"a": 1.0}, {"a": 2.0}, {"a": 6.0}], ["--x", "1"]).splitlines()
    assert lines[0] == "recipe digits --x 1"
    assert lines[-2].split() == ["mean", "3.0000"]
    assert lines[-1].split() == ["sd", "2.6458"]


@pytest.mark.slow
def test_seeds_trains_once_for_each_and_tells_them_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--trainer.max_epochs", "1", "--report.dense_twin", "false"]
    for logger in ("", "lightning.pytorch"):  # which another test may have silenced
        caplog.set_level("INFO", logger)
    assert main(["seeds", "digits", "--seeds", "2", *words]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]
    assert [row[0] for row in table] == ["seed", "0", "1", "mean", "sd"]
    assert table[1][1:] != table[2][1:]
    ends = [text for record in caplog.records if "selected weights are zero" in (text := record.getMessage())]
    assert len(ends) == 2
    assert not any("checkpoint" in text or "next: " in text for text in ends)  # because the folder is deleted
    assert float(table[3][1]) == pytest.approx((float(table[1][1]) + float(table[2][1])) / 2, abs=1e-4)
    assert list(tmp_path.iterdir()) == []
    assert main(["seeds", "digits", "--seeds", "1"]) == 2


def test_a_recipe_is_found_by_name_file_name_and_path(tmp_path: Path) -> None:
    mine = tmp_path / "digits.yaml"
    mine.write_text("model: null")
    assert recipes.find("digits") == recipes.find("digits.yaml") == recipes.folder() / "digits.yaml"
    assert recipes.find(str(mine)) == mine
    assert recipes.with_paths(["--config=digits", "-c", "digits", "digits"]) == [
        f"--config={recipes.find('digits')}", "-c", str(recipes.find("digits")), "digits",
    ]  # fmt: skip


def test_the_comment_that_opens_a_recipe_is_text_and_not_yaml(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "# made by hand\n# summary: a form: LogSum(2), 'quoted\n#   and: more\n# reaches: 5 % # of all\n\n# model: x\nmodel: null\n"
    )
    assert recipes.about(mine) == {"summary": "a form: LogSum(2), 'quoted and: more", "reaches": "5 % # of all"}


def test_the_mask_form_is_one_of_the_overlays() -> None:
    text = yaml.safe_load(recipes.find("overlay/adaptive_mask").read_text())
    assert text["trainer"]["callbacks+"][0]["class_path"].endswith(AdaptiveMask.__name__)
