"""Sentences as token ids in memory: WordNet's glosses, or a text file with one sentence a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule

from lightning_sparse import _checks
from lightning_sparse.examples.batches import Batch, Batches, ShuffledBatches
from lightning_sparse.examples.files import fetched


class Sentences(LightningDataModule):
    """Token ids x of shape (batch, length), 0 for padding, and y, the number of each sentence. Split by a seed into three parts.

    A training batch holds sentences of similar length and is as long as its longest one, so that little time goes into padding.

    Args:
        file: a text file with one sentence a line; a file ``data.noun``, ``data.verb``, ``data.adj`` or ``data.adv`` of WordNet, or a
            folder with these, gives their glosses (the text after "|"). Required in a fit.
        tokenizer: a folder with ``tokenizer.json``, that file, or a Hugging Face name (extra ``text``). Required in a fit.
        length: most tokens in a sentence; longer ones are cut.
        batch_size: sentences per batch.
        validation: number of sentences used for validation.
        test: number of sentences used for testing.
        sentences: number of the other sentences to train on; None trains on all of them.
        split_seed: seed of the split.

    Raises FileNotFoundError for missing files, ImportError, naming the extra, without tokenizers, and ValueError where nothing is left
    to train on.
    """

    def __init__(
        self,
        file: str | None = None,
        tokenizer: str | None = None,
        length: int = 32,
        batch_size: int = 64,
        validation: int = 1000,
        test: int = 1000,
        sentences: int | None = None,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.file, self.tokenizer, self.split_seed = file, tokenizer, split_seed
        self.length, self.batch_size = _checks.whole("length", length, 3), _checks.whole("batch_size", batch_size, 1)
        self.held_out = (_checks.whole("validation", validation, 1), _checks.whole("test", test, 1))
        self.sentences = None if sentences is None else _checks.whole("sentences", sentences, 1)
        self.parts: dict[str, Batch] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        if self.file is None or self.tokenizer is None:
            missing = [name for name in ("file", "tokenizer") if getattr(self, name) is None]
            raise ValueError(f"give {' and '.join(f'--data.{name}' for name in missing)}: no text and no tokenizer come with this package")
        lines = read(self.file)
        validation, test = self.held_out
        left = len(lines) - validation - test
        if left < (self.sentences or 1):
            raise ValueError(f"validation={validation} and test={test} of {len(lines)} sentences leave {max(left, 0)} to train on, too few")
        count = validation + test + (left if self.sentences is None else self.sentences)
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(self.split_seed))[:count]
        ids = encoded([lines[index] for index in order.tolist()], self.tokenizer, self.length)
        sizes = [validation, test, count - validation - test]
        parts = zip(ids.split(sizes), order.split(sizes), strict=True)
        self.parts = dict(zip(("validation", "test", "training"), parts, strict=True))

    def train_dataloader(self) -> SimilarLengths:
        return SimilarLengths(*self.parts["training"], self.batch_size, torch.initial_seed() % 2**31)

    def val_dataloader(self) -> Batches:
        return Batches(*self.parts["validation"], 500)

    def test_dataloader(self) -> Batches:
        return Batches(*self.parts["test"], 500)

    def predict_dataloader(self) -> Batches:
        return Batches(*self.parts["test"], 500)


class SimilarLengths(ShuffledBatches):
    """Shuffled batches of sentences of similar length, cut to the longest: those of POOL batches, drawn at random, are sorted by length."""

    POOL = 32

    def __iter__(self) -> Iterator[Batch]:
        lengths = (self.x != 0).sum(1)
        pools = self.order().split(self.batch_size * self.POOL)
        parts = [part for pool in pools for part in pool[lengths[pool].argsort(stable=True)].split(self.batch_size)]
        for index in torch.randperm(len(parts), generator=self._generator(2**40)).tolist():
            part = parts[index]
            yield self.x[part, : int(lengths[part].max())], self.y[part]


def encoded(lines: list[str], tokenizer: str, length: int) -> torch.Tensor:
    """Return the token ids (count, length) of sentences, cut to ``length`` and padded with 0."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("reading tokenizer.json needs tokenizers: pip install 'lightning-sparse[text]'") from error
    reader = Tokenizer.from_file(str(fetched(tokenizer, "tokenizer.json")))
    reader.enable_truncation(length)
    reader.enable_padding(length=length, pad_id=0)
    return torch.tensor([one.ids for one in reader.encode_batch(lines)])


def read(file: str) -> list[str]:
    """Return the sentences of a file, or the glosses of WordNet's files, without empty lines and repetitions.

    Raises FileNotFoundError, naming the place.
    """
    path = Path(file).expanduser()
    paths = sorted(path.glob("data.*")) if path.is_dir() else [path]
    if not paths or not all(one.is_file() for one in paths):
        raise FileNotFoundError(f"no text in {path.resolve()}; give --data.file a text file, or WordNet's folder of data.noun and others")
    lines: list[str] = []
    for one in paths:
        text = one.read_text(encoding="utf-8", errors="replace").splitlines()
        glosses = one.name in ("data.noun", "data.verb", "data.adj", "data.adv")
        lines += [line.partition("| ")[2] for line in text if not line.startswith("  ")] if glosses else text
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))
