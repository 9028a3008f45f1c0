"""torchvision's classifiers by name, and folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from lightning_sparse.callbacks import Sparsify
from lightning_sparse.examples.vision import ImageFolders, Vision


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write 4 training and 2 validation images of two classes; those of class "a" are dark, of "b" bright."""
    for part, count in (("train", 4), ("val", 2)):
        for name, value in (("a", 40), ("b", 210)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((50 + number, 40, 3), value, np.uint8)).save(folder / f"{number}.png")
    return tmp_path


def ready(root: Path, **arguments: Any) -> ImageFolders:
    data = ImageFolders(str(root), **{"batch_size": 4, "image": 32, "workers": 0, **arguments})
    data.setup("fit")
    return data


@pytest.mark.slow
def test_folders_give_normalised_images_with_the_label_of_their_class(root: Path) -> None:
    data = ready(root)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for x, y in loader:
            assert x.shape == (len(y), 3, 32, 32)
            red = x[:, 0] * 0.229 + 0.485  # ImageNet's published mean and deviation
            expected = torch.where(y == 1, 210 / 255, 40 / 255).view(-1, 1, 1)
            assert torch.allclose(red, expected.expand_as(red), atol=0.01)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder train and val in .*--data\.root"):
        ready(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "resnet81"}, "name must be .*closest: 'resnet18'"),
        ({"name": "resnet18", "weights": "IMAGENET1K_V7"}, "weights must be a file or one of IMAGENET1K_V1, DEFAULT"),
        ({"name": "resnet18", "optimizer": "adam"}, "optimizer must be 'sgd' or 'adamw'"),
    ],
)
@pytest.mark.slow
def test_names_that_are_not_known_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Vision(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_stand_in_trains_from_a_file_to_its_target(root: Path, tmp_path: Path, optimizer: str) -> None:
    given = Vision("shufflenet_v2_x0_5", classes=2)
    torch.save(given.layers.state_dict(), tmp_path / "w.pt")
    net = Vision("shufflenet_v2_x0_5", weights=str(tmp_path / "w.pt"), classes=2, optimizer=optimizer, lr=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), given.state_dict().values(), strict=True))
    trainer = Trainer(
        max_epochs=1, callbacks=[Sparsify(0.5)], logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(net, datamodule=ready(root))
    assert trainer.global_step == 2
    assert float(trainer.callback_metrics["sparsity/total"]) == pytest.approx(0.5, abs=1e-2)
    assert "val/accuracy" in trainer.callback_metrics
