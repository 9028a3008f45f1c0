"""Two runs of ``fit`` that would write into one folder: the second, with other settings, gets a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import PLAIN, QUIET
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_sparse.cli import folders
from lightning_sparse.cli.training import fit

pytestmark = QUIET
FIRST: dict[str, Any] = {"model": {"width": 8}, "data": {"seed": 0}, "seed_everything": 0, "trainer": {"max_epochs": 3}, "ckpt_path": None}
OTHER = FIRST | {"data": {"seed": 3}}
LONGER = FIRST | {"trainer": {"max_epochs": 9}}


def _chosen(folder: Path, settings: Any, *keepers: ModelCheckpoint, resumed: Path | None = None, **options: Any) -> list[str | None]:
    """Return the folders of the ModelCheckpoints of a Trainer whose root is ``folder``, below it."""
    given = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False} | options
    trainer = Trainer(default_root_dir=folder, callbacks=list(keepers), **given)
    folders.choose(trainer, yaml.safe_dump(settings), resumed)
    places = [Path(folders._checkpoints(keeper, trainer) or "/none") for keeper in trainer.checkpoint_callbacks]  # type: ignore[arg-type]
    return [str(place.relative_to(folder)) if place.is_relative_to(folder) else None for place in places]


def test_other_settings_get_the_next_free_folder_and_the_same_ones_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _chosen(tmp_path, FIRST) == ["checkpoints"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FIRST))
    assert _chosen(tmp_path, FIRST | {"threads": 2, "report": {"table": False}}) == ["checkpoints"]
    assert "config.yaml" not in capsys.readouterr().out
    assert _chosen(tmp_path, OTHER) == ["version_1/checkpoints"]
    said = f"{tmp_path / 'config.yaml'} is of a run with other settings, so this run is written to {tmp_path / 'version_1'}\n"
    assert capsys.readouterr().out.endswith(said)
    (tmp_path / "version_1").mkdir()
    (tmp_path / "version_1/config.yaml").write_text(yaml.safe_dump(OTHER))
    assert _chosen(tmp_path, OTHER) == ["version_1/checkpoints"]
    assert _chosen(tmp_path, LONGER) == ["version_2/checkpoints"]


def test_a_run_that_goes_on_from_a_checkpoint_of_the_folder_stays_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FIRST))
    inside, outside = tmp_path / "checkpoints/a.ckpt", tmp_path.parent / "a.ckpt"
    assert _chosen(tmp_path, LONGER, resumed=inside) == ["checkpoints"]
    assert _chosen(tmp_path, LONGER, resumed=outside) == ["version_1/checkpoints"]
    assert _chosen(tmp_path, OTHER, resumed=inside) == ["version_1/checkpoints"]


def test_a_file_that_no_run_wrote_is_kept(tmp_path: Path) -> None:
    for content in (b"trainer: {max_epochs: 3}\n", b"- 1\n", b"[", b"\xff"):
        (tmp_path / "config.yaml").write_bytes(content)
        assert _chosen(tmp_path, FIRST) == ["version_1/checkpoints"]


def test_given_folders_are_numbered_and_those_of_a_logger_are_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FIRST))
    (tmp_path / "a/config.yaml").write_text(yaml.safe_dump(FIRST))
    two = ModelCheckpoint(tmp_path / "a"), ModelCheckpoint(tmp_path / "b", every_n_epochs=2)
    assert _chosen(tmp_path, OTHER, *two) == ["a/version_1", "b"]
    keeper = ModelCheckpoint()
    assert _chosen(tmp_path, OTHER, keeper, logger=CSVLogger(tmp_path)) == [None]
    assert keeper.dirpath is None


@pytest.mark.slow
def test_the_second_of_two_fits_leaves_the_files_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", "digits", *PLAIN, "--report.pictures", "true"]
    first = fit(words).result
    assert first is not None
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {file.name for file in before} >= {"config.yaml", "masks.png", "sparsity.png"}
    second = fit([*words, "--seed_everything", "3"]).result
    assert second is not None
    assert {file: file.read_bytes() for file in before} == before
    assert {file.parent for file in (second.files["masks"], second.files["sparsity curve"])} == {tmp_path / "version_1"}
    assert yaml.safe_load((tmp_path / "version_1/config.yaml").read_text())["seed_everything"] == 3
