"""MNIST as tensors: files, split, normalisation, and the error without files."""

from __future__ import annotations

import struct
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from lightning.pytorch import Trainer
from torchvision import datasets

from lightning_sparse.examples.batches import moved
from lightning_sparse.examples.mlp import MLP
from lightning_sparse.examples.mnist import MNIST


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write MNIST's four files: 50 and 20 images, each filled with its own number, with label number % 10."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 50), ("t10k", 20)):
        images = struct.pack(">IIII", 0x803, count, 28, 28) + b"".join(bytes([i]) * 784 for i in range(count))
        labels = struct.pack(">II", 0x801, count) + bytes(i % 10 for i in range(count))
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def ready(root: Path, **arguments: int) -> MNIST:
    data = MNIST(str(root), download=False, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def number(x: torch.Tensor) -> torch.Tensor:
    """Return the number in an image's pixels by undoing the published normalisation."""
    return ((x[:, 0, 0, 0] * 0.3081 + 0.1307) * 255).round().long()


def test_the_parts_hold_every_image_once_with_its_own_label(root: Path) -> None:
    data = ready(root, validation=12)
    parts = {name: number(x) for name, (x, _) in data.parts.items()}
    assert sorted([*parts["training"].tolist(), *parts["validation"].tolist()]) == list(range(50))
    assert parts["test"].tolist() == list(range(20))
    assert {name: len(part) for name, part in parts.items()} == {"training": 38, "validation": 12, "test": 20}
    assert all((y == parts[name] % 10).all() for name, (_, y) in data.parts.items())
    assert data.parts["training"][0].shape[1:] == (1, 28, 28)


def test_the_split_is_of_its_own_seed(root: Path) -> None:
    torch.manual_seed(1)
    first = ready(root, validation=12).parts["validation"][1]
    torch.manual_seed(2)
    again, other = ready(root, validation=12).parts["validation"][1], ready(root, validation=12, split_seed=1).parts["validation"][1]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_without_validation_all_images_are_trained_on(root: Path) -> None:
    data = ready(root, validation=0, batch_size=10)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", log_every_n_steps=1, **quiet)
    trainer.fit(MLP([784, 4, 10], fused=True), datamodule=data)
    assert trainer.global_step == 5
    assert not [name for name in trainer.callback_metrics if name.startswith("val")]


def test_training_images_alone_are_moved_anew_each_epoch_and_black_comes_in(root: Path) -> None:
    data, still = ready(root, validation=12, shift=2, batch_size=50), ready(root, validation=12, batch_size=50)
    found = []
    for seed, epoch in ((3, 0), (3, 0), (3, 1), (4, 0)):
        torch.manual_seed(seed)
        loader, plain = data.train_dataloader(), still.train_dataloader()
        loader.set_epoch(epoch)
        plain.set_epoch(epoch)
        (x, y), (original, labels) = next(iter(loader)), next(iter(plain))
        assert torch.equal(y, labels)
        found.append(moves(x, original))
    first, again, later, other = found
    assert first == again
    assert first not in (later, other)
    both = {*first.values(), *later.values()}
    assert {down for down, _ in both} == {right for _, right in both} == {-2, -1, 0, 1, 2}
    assert any(down != right for down, right in both)
    for name, batches in {"validation": data.val_dataloader(), "test": data.test_dataloader()}.items():
        assert torch.equal(next(iter(batches))[0], still.parts[name][0])  # type: ignore[call-overload]


def moves(x: torch.Tensor, originals: torch.Tensor) -> dict[int, tuple[int, int]]:
    """Return each image's shift down and right, by its number; black pixels fill the rest."""
    found = {}
    for image, original in zip(x[:, 0], originals[:, 0], strict=True):
        inside = (image - (0 - 0.1307) / 0.3081).abs() > 1e-4
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        if len(rows):  # the image of number 0 is black itself
            assert torch.equal(image[inside].unique(), original.unique())
            assert int(inside.sum()) == len(rows) * len(columns)
            found[int(number(original[None, None]))] = int(rows[0] - (27 - rows[-1])), int(columns[0] - (27 - columns[-1]))
    return found


def test_a_shift_moves_the_content_of_an_image() -> None:
    x = torch.zeros(3, 1, 5, 4)
    x[:, 0, 2, 1] = torch.tensor([1.0, 2.0, 3.0])
    found = moved(x, torch.tensor([[0, 2], [1, 1], [2, 1]]), most=1, fill=9.0)
    assert [(found[i, 0] == i + 1).nonzero().tolist() for i in range(3)] == [[[3, 0]], [[2, 1]], [[1, 1]]]
    assert [(found[i] == 9).sum().item() for i in range(3)] == [8, 0, 4]
    with pytest.raises(ValueError, match="shift must be a whole number >= 0, got -1"):
        MNIST(shift=-1)


def test_a_split_that_leaves_no_training_image_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="validation=50 of 50 images"):
        ready(root, validation=50)
    with pytest.raises(ValueError, match="validation"):
        MNIST(str(root), validation=60_001)


def test_missing_files_are_named_with_the_folder_and_what_to_put_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="download is off") as caught:
        MNIST(str(tmp_path), download=False).prepare_data()
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)
    assert "train-images-idx3-ubyte" in str(caught.value)


def test_a_missing_network_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", refuse)
    with pytest.raises(FileNotFoundError, match=r"downloading failed .*no route") as caught:
        MNIST(str(tmp_path)).prepare_data()
    assert "\n" not in str(caught.value)


def test_the_linear_decay_falls_once_an_epoch_to_nothing(root: Path) -> None:
    model, rates = MLP([784, 4, 10], lr=0.1, decay="linear", init_std=0.02), []
    model.on_train_batch_start = lambda *_: rates.append(model.optimizers().param_groups[0]["lr"])  # type: ignore[assignment, union-attr, return-value]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=4, accelerator="cpu", log_every_n_steps=1, **quiet).fit(model, datamodule=ready(root, validation=10, batch_size=20))
    assert rates == pytest.approx([0.1, 0.1, 0.075, 0.075, 0.05, 0.05, 0.025, 0.025])


def test_initial_weights_have_the_spread_that_was_asked_for() -> None:
    torch.manual_seed(0)
    wide = MLP([784, 300, 10], init_std=0.02).layers[1].weight
    assert abs(float(wide.detach().std()) - 0.02) < 2e-4
    assert MLP([784, 300, 10]).layers[1].weight.abs().max() <= 784**-0.5 + 1e-6
