"""Text as windows of bytes, and the causal transformer on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_sparse.callbacks import Sparsify
from lightning_sparse.examples.char_gpt import CharGPT
from lightning_sparse.examples.text import Text, Windows, read

ALPHABET = bytes(range(200))


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "t.txt").write_bytes(ALPHABET * 5)
    return str(tmp_path / "t.txt")


def ready(file: str | None, **arguments: Any) -> Text:
    data = Text(file, **{"block": 10, "batch_size": 4, **arguments})
    data.setup("fit")
    return data


def test_the_parts_are_the_text_in_order(file: str) -> None:
    parts = ready(file, validation=0.2, test=0.1).parts
    assert bytes(torch.cat([parts["training"], parts["validation"], parts["test"]]).tolist()) == ALPHABET * 5
    assert [len(part) for part in parts.values()] == [700, 200, 100]


def test_the_label_of_each_byte_is_the_next(file: str) -> None:
    data = ready(file)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for x, y in loader:
            assert torch.equal(y, (x + 1) % 200)
            assert x.shape[1] == 10


def test_a_part_in_order_reads_every_byte_that_fills_a_window(file: str) -> None:
    data = ready(file, batch_size=3)
    x = torch.cat([x for x, _ in data.val_dataloader()]).flatten()
    assert torch.equal(x, data.parts["validation"][: len(x)].long())
    assert len(x) == 90  # of 100, because the last window has no next byte


def test_an_epoch_reads_every_byte_at_most_once_and_its_start_is_of_seed_and_epoch() -> None:
    text = torch.arange(105, dtype=torch.uint8)
    first, again = Windows(text, 10, 4, seed=1), Windows(text, 10, 4, seed=1)
    starts = []
    for epoch in range(5):
        first.set_epoch(epoch)
        again.set_epoch(epoch)
        x = torch.cat([x for x, _ in first])
        assert torch.equal(x, torch.cat([x for x, _ in again]))
        assert len(set(x.flatten().tolist())) == x.numel() == 90
        starts.append(int(x.min()))
    assert len(set(starts)) > 1
    assert max(starts) < 10


def test_without_a_file_it_is_pythons_own_text() -> None:
    text = bytes(read(None).tolist()).decode()
    assert len(text) > 300_000
    assert "comprehension" in text


def test_a_missing_file_and_a_short_text_are_refused(tmp_path: Path, file: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text in .*none\.txt; give --data\.file"):
        ready(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match=r"the validation part has 100 bytes, needs at least 2 \* block = 120"):
        ready(file, block=60)
    with pytest.raises(ValueError, match=r"validation \+ test must lie in"):
        Text(validation=0.5, test=0.5)


def tiny(**arguments: Any) -> CharGPT:
    return CharGPT(**{"vocabulary": 200, "block": 10, "width": 16, "depth": 2, "heads": 2, "ratio": 2, **arguments})


def test_scores_see_no_later_byte() -> None:
    net = tiny().eval()
    x = torch.randint(200, (3, 10))
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 200
    a, b = net(x), net(changed)
    assert a.shape == (3, 200, 10)
    assert torch.allclose(a[..., :6], b[..., :6], atol=1e-6)
    assert not torch.allclose(a[..., 6], b[..., 6], atol=1e-3)
    assert torch.allclose(net(x[:, :4]), a[..., :4], atol=1e-5)


def test_it_has_the_weights_of_its_sizes() -> None:
    matrices = sum(layer.weight.numel() for layer in CharGPT().modules() if isinstance(layer, nn.Linear))
    assert matrices == 4 * (4 * 96**2 + 2 * 4 * 96**2) + 96 * 256


@pytest.mark.parametrize(
    ("arguments", "said"), [({"heads": 3}, "width must be a multiple of heads"), ({"depth": 0}, "depth must be a whole number >= 1")]
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny(**arguments)


def test_a_longer_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at most block=10 symbols, got 11"):
        tiny()(torch.zeros(1, 11, dtype=torch.long))


def fitted(file: str, *more: Any, epochs: int = 1) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs, callbacks=list(more), logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(tiny(lr=1e-2), datamodule=ready(file))
    return trainer


@pytest.mark.slow
def test_a_text_without_surprises_costs_few_bits_also_with_zeros(file: str) -> None:
    trainer = fitted(file, Sparsify(0.5), epochs=30)
    found = trainer.callback_metrics
    assert float(found["val/bits"]) == pytest.approx(float(found["val/loss"]) / math.log(2))
    assert float(found["val/bits"]) < 1.0 < math.log2(200)
    assert float(found["sparsity/total"]) == pytest.approx(0.5, abs=1e-2)
