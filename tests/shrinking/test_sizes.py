"""The sizes that the benchmarks compare with published ones are counted as the published ones are."""

from __future__ import annotations

import torch
from shrunk import sizes


def test_bytes_are_counted_as_in_the_table_that_they_are_compared_with() -> None:
    """RigL's network on MNIST, arXiv 1911.11134, table 2: 408-100-69, 12.6 KFLOPs, 31,914 bytes."""
    places = 408 * 100 + 100 * 69 + 69 * 10
    low, high = (sizes.bytes_of(weights, 100 + 69 + 10, places) for weights in (6275, 6325))  # 12.55 and 12.65 KFLOPs
    assert low <= 31_914 <= high


def test_inputs_and_neurons_without_weights_on_both_sides_do_not_count() -> None:
    first, second = torch.ones(4, 3), torch.ones(2, 4)
    first[0], second[:, 1], first[:, 2] = 0, 0, 0  # neuron 0 reads nothing, nothing reads neuron 1, nor input 2
    first[2, 0] = second[0, 2] = 0
    assert [part.tolist() for part in sizes.live([first, second])] == [[True, True, False], [False, False, True, True], [True, True]]
