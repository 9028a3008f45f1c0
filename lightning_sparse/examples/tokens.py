"""A text as windows of tokens in memory, for a language model. Every process of a run reads its own share of the windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import _checks
from lightning_sparse.examples.files import fetched


class Tokens(LightningDataModule):
    """Windows x of shape (batch, block) of token ids, and y of the same shape, the token after each.

    The text is cut in order into training, validation and test part, and each part into windows that do not overlap.

    Args:
        file: a text file. Required in a fit.
        tokenizer: a folder with ``tokenizer.json``, that file, or a Hugging Face name (extra ``text``). Required in a fit.
        block: tokens in a window.
        batch_size: windows per batch and process.
        validation: share of the text used for validation.
        test: share of the text used for testing.

    Raises FileNotFoundError for missing files, ImportError, naming the extra, without tokenizers, and ValueError where a part is shorter
    than one window.
    """

    def __init__(
        self,
        file: str | None = None,
        tokenizer: str | None = None,
        block: int = 1024,
        batch_size: int = 4,
        validation: float = 0.01,
        test: float = 0.01,
    ) -> None:
        super().__init__()
        self.file, self.tokenizer = file, tokenizer
        self.block, self.batch_size = _checks.whole("block", block, 1), _checks.whole("batch_size", batch_size, 1)
        _checks.between("validation + test", validation + test, 0, 1)
        self.shares = (_checks.between("validation", validation, 0, 1), _checks.between("test", test, 0, 1))
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        ids = self._ids()
        validation, test = (int(share * len(ids)) for share in self.shares)
        for name, part in zip(("training", "validation", "test"), ids.split([len(ids) - validation - test, validation, test]), strict=True):
            count = (len(part) - 1) // self.block
            if count < 1:
                raise ValueError(f"the {name} part has {len(part)} tokens, needs more than block = {self.block}; give a longer text")
            end = count * self.block
            self.parts[name] = TensorDataset(part[:end].view(-1, self.block), part[1 : end + 1].view(-1, self.block))

    def _ids(self) -> Tensor:
        if self.file is None or self.tokenizer is None:
            missing = [name for name in ("file", "tokenizer") if getattr(self, name) is None]
            raise ValueError(f"give {' and '.join(f'--data.{name}' for name in missing)}: no text and no tokenizer come with this package")
        path = Path(self.file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no text in {path.resolve()}; give --data.file a text file")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError("reading tokenizer.json needs tokenizers: pip install 'lightning-sparse[text]'") from error
        reader = Tokenizer.from_file(str(fetched(self.tokenizer, "tokenizer.json")))
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        return torch.tensor([i for one in reader.encode_batch(lines, add_special_tokens=False) for i in one.ids])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts["training"], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts["validation"], self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts["test"], self.batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()
