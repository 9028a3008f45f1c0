"""Plain text as bytes in memory, cut into windows for a model of the next byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse.examples.batches import Batch, Batches, ShuffledBatches


class Text(LightningDataModule):
    """Windows x of shape (batch, block), and y of the same shape, the byte after each; both in 0 to 255.

    The text is cut in order into training, validation and test part. Each epoch reads the training part once, in windows that
    start at a random place of the first ``block`` bytes; the run's seed (``seed_everything``) determines it and the order.

    Args:
        file: a text file of any encoding; None reads Python's language reference (``pydoc_data.topics``, about 700 kB, depending on
            the version), which comes with Python.
        block: bytes in a window.
        batch_size: windows per batch.
        validation: share of the text used for validation.
        test: share of the text used for testing.

    Raises FileNotFoundError for a missing file, and ValueError for shares that leave nothing and for a text in which a part is
    shorter than one window.
    """

    def __init__(self, file: str | None = None, block: int = 128, batch_size: int = 32, validation: float = 0.1, test: float = 0.1) -> None:
        super().__init__()
        _checks.between("validation", validation, 0, 1)
        _checks.between("test", test, 0, 1)
        _checks.between("validation + test", validation + test, 0, 1)
        self.file, self.block, self.batch_size = file, _checks.whole("block", block, 1), _checks.whole("batch_size", batch_size, 1)
        self.shares = (validation, test)
        self.parts: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        text = read(self.file)
        validation, test = (int(share * len(text)) for share in self.shares)
        sizes = [len(text) - validation - test, validation, test]
        self.parts = dict(zip(("training", "validation", "test"), text.split(sizes), strict=True))
        for name, part in self.parts.items():
            if len(part) < 2 * self.block:
                raise ValueError(f"the {name} part has {len(part)} bytes, needs at least 2 * block = {2 * self.block}; give a longer text")

    def train_dataloader(self) -> Windows:
        return Windows(self.parts["training"], self.block, self.batch_size, torch.initial_seed() % 2**31)

    def val_dataloader(self) -> Batches:
        return self._in_order("validation")

    def test_dataloader(self) -> Batches:
        return self._in_order("test")

    def predict_dataloader(self) -> Batches:
        return self._in_order("test")

    def _in_order(self, part: str) -> Batches:
        text = self.parts[part].long()
        end = (len(text) - 1) // self.block * self.block
        return Batches(text[:end].view(-1, self.block), text[1 : end + 1].view(-1, self.block), self.batch_size)


class Windows(ShuffledBatches):
    """Shuffled windows of a text of bytes; where the first starts depends only on seed and epoch, like the order."""

    def __init__(self, text: Tensor, block: int, batch_size: int, seed: int) -> None:
        starts = torch.arange((len(text) - block) // block) * block
        super().__init__(starts, starts, batch_size, seed)
        self.text, self.block = text, block

    def __iter__(self) -> Iterator[Batch]:
        first = int(torch.randint(self.block, (1,), generator=self._generator(2**40)))
        for part in self.order().split(self.batch_size):
            window = self.text[first + self.x[part][:, None] + torch.arange(self.block + 1)].long()
            yield window[:, :-1], window[:, 1:]


def read(file: str | None) -> Tensor:
    """Return the bytes of a file, or of Python's language reference. Raises FileNotFoundError, naming the file."""
    if file is None:
        from pydoc_data.topics import topics

        content = "\n".join(topics[name] for name in sorted(topics)).encode()
    else:
        path = Path(file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no text in {path.resolve()}; give --data.file a text file, or null for Python's language reference")
        content = path.read_bytes()
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
