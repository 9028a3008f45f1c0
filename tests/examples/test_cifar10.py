"""CIFAR-10 as tensors: both forms of files, split, subset, augmentation, normalisation, and the errors."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_sparse.examples import cifar10
from lightning_sparse.examples.cifar10 import CIFAR10, Augmented

COUNTS = {"train": 60, "test": 20}


def flat(number: int) -> np.ndarray:
    """Return an image whose red is ``4 * number``, green 100 and blue 200, everywhere; JPEG keeps flat colours within 2."""
    return np.stack([np.full((32, 32), value, np.uint8) for value in (4 * number, 100, 200)], axis=-1)


def jpegs(count: int) -> dict[str, np.ndarray]:
    files = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(flat(number)).save(buffer, "jpeg", quality=100, subsampling=0)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    return {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets, "labels": np.arange(count) % 10}


def arrays(count: int) -> dict[str, np.ndarray]:
    return {"images": np.stack([flat(number) for number in range(count)]), "labels": np.arange(count) % 10}


@pytest.fixture(params=[jpegs, arrays], ids=["jpeg", "arrays"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for name, count in COUNTS.items():
        np.savez(tmp_path / f"{name}.npz", **request.param(count))
    return tmp_path


def ready(root: Path, **arguments: Any) -> CIFAR10:
    data = CIFAR10(str(root), download=False, **{"validation": 12, **arguments})
    data.prepare_data()
    data.setup("fit")
    return data


def numbers(x: torch.Tensor) -> list[int]:
    """Return the numbers in the red of the images' centres, given bytes."""
    return (x[:, 0, 16, 16].float() / 4).round().long().tolist()


def undone(x: torch.Tensor) -> torch.Tensor:
    """Return bytes again by the published normalisation of ImageNet."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255).round()


def test_the_parts_hold_every_image_once_with_its_own_label(root: Path) -> None:
    data = ready(root)
    found = {name: numbers(x) for name, (x, _) in data.parts.items()}
    assert sorted([*found["training"], *found["validation"]]) == list(range(60))
    assert len(found["validation"]) == 12
    assert found["test"] == list(range(20))
    assert all(y.tolist() == [number % 10 for number in found[name]] for name, (_, y) in data.parts.items())


def test_a_subset_is_of_the_training_part_and_the_split_of_its_own_seed(root: Path) -> None:
    whole, some, other = ready(root), ready(root, images=20), ready(root, split_seed=1)
    assert set(numbers(some.parts["training"][0])) < set(numbers(whole.parts["training"][0]))
    assert len(some.parts["training"][0]) == 20
    assert torch.equal(some.parts["validation"][1], whole.parts["validation"][1])
    assert numbers(other.parts["validation"][0]) != numbers(whole.parts["validation"][0])


def test_batches_are_normalised_by_channel(root: Path) -> None:
    data = ready(root)
    (x, y), *_ = data.test_dataloader()
    assert x.shape == (20, 3, 32, 32)
    assert (undone(x)[:, 1] - 100).abs().max() <= 2
    assert (undone(x)[:, 2] - 200).abs().max() <= 2
    other = ready(root, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 0.5])
    (z, _), *_ = other.test_dataloader()
    assert float(z[0, 2, 0, 0]) == pytest.approx(2 * 200 / 255, abs=0.02)
    assert torch.equal(y, torch.arange(20) % 10)


def test_every_training_image_comes_once_an_epoch(root: Path) -> None:
    loader = ready(root, batch_size=7).train_dataloader()
    seen = [number for x, _ in loader for number in numbers(undone(x))]
    assert sorted(seen) == sorted(numbers(loader.x))
    assert len(list(loader)) == len(loader) == 7


def loader(flip: bool, shift: int) -> Augmented:
    """Return a loader of 200 copies of an image whose pixel (row, column) is 32 * row % 256 // 8 and 8 * column: every shift differs."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack([rows * 7 + 10, columns * 7 + 10, rows + columns]).to(torch.uint8)
    none = torch.zeros(3, 1, 1), torch.full((3, 1, 1), 1 / 255)
    return Augmented(image.repeat(200, 1, 1, 1), torch.zeros(200).long(), 50, 0, *none, flip, shift)


def test_images_are_flipped_half_of_the_time_and_only_left_to_right() -> None:
    one = loader(flip=True, shift=0)
    x = torch.cat([x for x, _ in one]).round().to(torch.uint8)
    same, mirrored = (x == one.x).flatten(1).all(1), (x == one.x.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 70 < int(mirrored.sum()) < 130


def test_a_shift_moves_the_image_in_black_by_at_most_its_pixels() -> None:
    one = loader(flip=False, shift=2)
    x = torch.cat([x for x, _ in one]).round()
    padded = torch.nn.functional.pad(one.x[0].float(), (2, 2, 2, 2))
    windows = [padded[:, i : i + 32, j : j + 32] for i in range(5) for j in range(5)]
    found = torch.stack([(x == window).flatten(1).all(1) for window in windows])
    assert bool((found.sum(0) == 1).all())
    assert int(found.any(1).sum()) == 25


def test_augmentation_is_of_seed_and_epoch() -> None:
    one, again = loader(True, 2), loader(True, 2)
    first, second = torch.cat([x for x, _ in one]), torch.cat([x for x, _ in again])
    again.set_epoch(1)
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.cat([x for x, _ in again]))


def test_torchvisions_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for lists, count in ((datasets.CIFAR10.train_list, 4), (datasets.CIFAR10.test_list, 6)):
        for name, _ in lists:
            rows = np.stack([flat(number).transpose(2, 0, 1).ravel() for number in range(count)])
            (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(count))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)  # because these are not the published files
    data = ready(tmp_path, validation=5)
    assert sorted(numbers(torch.cat([data.parts["training"][0], data.parts["validation"][0]]))) == sorted([*range(4)] * 5)
    assert numbers(data.parts["test"][0]) == list(range(6))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no CIFAR-10 in .* download is off. Give root .* cifar-10-batches-py, or one with train.npz"
    ):
        ready(tmp_path)


def test_an_archive_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", labels=np.arange(3), pixels=np.arange(3))
    with pytest.raises(ValueError, match="must hold labels, and images or jpeg and offsets; it holds labels, pixels"):
        cifar10.read(tmp_path, train=True, download=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"validation": 60}, "leaves 0 to train on, too few"),
        ({"images": 49}, "leaves 48 to train on, too few"),
        ({"images": 0}, "images must be a whole number >= 1"),
        ({"shift": -1}, "shift must be"),
        ({"mean": [0.5]}, "mean must have one number for each of 3 channels"),
        ({"std": [0.0, 1.0, 1.0]}, "each of std must be"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    for name, count in COUNTS.items():
        np.savez(tmp_path / f"{name}.npz", **arrays(count))
    with pytest.raises(ValueError, match=said):
        ready(tmp_path, **arguments)


def test_the_last_part_may_be_empty(root: Path) -> None:
    assert ready(root, validation=0).val_dataloader() == []
