"""Golden runs equal the record, and a different run is detected."""

from __future__ import annotations

import copy

import pytest
from golden_record import PATH, compared, differences, digest, found, read


@pytest.mark.slow
def test_every_golden_run_is_as_recorded():
    problems, count, _ = compared(read(PATH))
    assert count == len(read(PATH)["runs"])
    assert not problems, "\n".join(problems)


def test_two_runs_are_alike_and_one_changed_bit_is_noticed():
    first, second = found("penalty", "automatic"), found("penalty", "automatic")
    assert differences(first, second, exact=True) == []
    for part in ("weights", "optimizer", "logged", "file", "step"):
        changed = copy.deepcopy(second)
        changed[part] = digest(changed[part])
        assert differences(first, changed, exact=True)


def test_another_machine_is_compared_by_its_figures():
    first = found("prox", "automatic")
    assert differences(first, first | {"weights": "another", "squares": first["squares"] * 1.01}, exact=False) == []
    assert differences(first, first | {"zeros": first["zeros"] - 0.1}, exact=False)
    assert differences(first, first | {"step": first["step"] + 1}, exact=False)
