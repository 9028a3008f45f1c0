"""A small causal transformer with a mean loss over tokens: AdaptiveMask trains as well as the penalty with the same lam."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from toys import trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask, ReweightedPenalty

LOG_SUM = penalties.LogSum(eps=2.0)
WORDS, LENGTH, WIDTH = 32, 32, 16


class Causal(LightningModule):
    """A GPT with one layer that predicts each next word."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(WIDTH, WORDS)

    def training_step(self, x, index):
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        out = self.head(self.body(self.words(x) + self.places.weight, mask=mask, is_causal=True))
        return functional.cross_entropy(out[:, :-1].flatten(0, 1), x[:, 1:].flatten())

    def validation_step(self, x, index):
        self.loss = float(self.training_step(x, index))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def texts(count, seed):
    """Draw texts from a Markov chain with few successors per word."""
    generator = torch.Generator().manual_seed(0)
    chances = (4 * torch.randn(WORDS, WORDS, generator=generator)).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (count, 1), generator=generator)
    for _ in range(LENGTH - 1):
        words = torch.cat([words, torch.multinomial(chances[words[:, -1]], 1, generator=generator)], 1)
    return words


@pytest.mark.slow
def test_a_causal_transformer_trains_under_masks_as_under_the_penalty():
    found = []
    for form in (ReweightedPenalty, AdaptiveMask):
        module = Causal()
        run = trainer(form(LOG_SUM, 1e-3), epochs=8, num_sanity_val_steps=0)
        run.fit(module, DataLoader(texts(512, 1), 32), DataLoader(texts(128, 2), 128))
        found.append((module.loss, float(run.callback_metrics["sparsity/total"])))
    (penalty, _), (mask, zeros) = found
    assert penalty < 0.6 * math.log(WORDS)
    assert mask < penalty + 0.2
    assert 0.1 < zeros < 0.9
