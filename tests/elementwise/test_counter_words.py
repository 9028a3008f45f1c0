"""Counter-based random words: equal to integer arithmetic, and random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sparse.elementwise import rng

WORD = 1 << 32


def mixed(x: int) -> int:
    """Compute the mixer with unsigned integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor % WORD
    return x ^ x >> 16


def drawn(count: int, first: int, second: int, start: int = 0) -> Tensor:
    return rng.counter_words(torch.empty(count), *map(rng.as_int32, (start, first, second)))


@pytest.mark.parametrize("start", [0, 7, 2**31 - 3, WORD - 2])
def test_words_are_the_hash_of_their_numbers(start: int) -> None:
    first, second = 0xDEADBEEF, 0x80000001
    wanted = [mixed((mixed((start + number) % WORD ^ first) + second) % WORD) % 65536 for number in range(9)]
    assert drawn(9, first, second, start).tolist() == wanted


def test_a_word_depends_on_its_number_alone() -> None:
    whole = drawn(1000, 5, 6)
    assert torch.equal(drawn(300, 5, 6, start=700), whole[700:])
    assert torch.equal(rng.counter_words(torch.empty(10, 100), 0, 5, 6).flatten(), whole)
    assert rng.counter_words(torch.empty(2, dtype=torch.bfloat16), 0, 5, 6).dtype == torch.float32
    assert rng.counter_words(torch.empty(2, dtype=torch.float64), 0, 5, 6).dtype == torch.float64


def test_words_are_uniform_and_those_of_neighbours_and_batches_are_independent() -> None:
    count = 1 << 18
    batches = [drawn(count, *rng.counter_keys(torch.Generator().manual_seed(seed))).double() for seed in range(4)]
    for words in batches:
        bins = torch.histc(words, 64, 0, 65536)
        assert float(((bins - count / 64) ** 2 / (count / 64)).sum()) < 63 + 5 * (2 * 63) ** 0.5
        for bit in range(16):
            assert float((words.long() >> bit & 1).double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / count**0.5)
    pairs = [(words[:-lag], words[lag:]) for words in batches for lag in (1, 2, 64, 784)]
    pairs += [(batches[0], other) for other in batches[1:]]
    for pair in pairs:
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 5 / count**0.5


def test_keys_are_both_halves_of_a_seed() -> None:
    assert rng.counter_keys(torch.Generator().manual_seed(0x0123456789ABCDEF)) == (0x89ABCDEF - WORD, 0x01234567)
    assert len({rng.counter_keys(torch.Generator().manual_seed(seed << 32)) for seed in range(9)}) == 9
