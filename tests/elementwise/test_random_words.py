"""Random words from a generator: every part is uniform."""

from __future__ import annotations

import torch

from lightning_sparse import noise


def test_words_are_uniform_in_every_place_and_follow_their_generator():
    drawn = noise.random_words(400_002, torch.device("cpu"), torch.Generator().manual_seed(3))
    assert drawn.shape == (400_002,)
    for place in range(4):  # the four quarters of a 64-bit draw
        counts = torch.bincount(drawn[place::4].long() // 4096, minlength=16)
        assert (counts - 6250).abs().max() < 6 * 6250**0.5
    generator = torch.Generator().manual_seed(3)
    first, second = (noise.random_words(400_002, torch.device("cpu"), generator) for _ in range(2))
    assert torch.equal(first, drawn)
    assert not torch.equal(first, second)
