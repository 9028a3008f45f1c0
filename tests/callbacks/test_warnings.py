"""Warnings point to the user's line of code."""

from __future__ import annotations

import ast
import inspect
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from toys import Toy, data, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import ReweightedPenalty
from lightning_sparse.conformance.step_sizes import GroupStep

CALLBACKS = Path(inspect.getfile(ReweightedPenalty)).parent
LINES = Path(__file__).read_text(encoding="utf-8").splitlines()


class Modes(GroupStep):
    """Make a callback warn during a run, called from torch's and Lightning's code."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def of_step_sizes():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(ReweightedPenalty(penalties.LogSum(eps=2.0), 0.1), epochs=1).fit(Toy(optimizer=Modes), data())
    return [one for one in said if "step size" in str(one.message)]


def test_a_warning_in_a_fit_names_the_line_that_calls_fit():
    said = of_step_sizes()
    assert [(one.filename, one.category) for one in said] == [(__file__, UserWarning)]
    assert ".fit(" in LINES[said[0].lineno - 1]


def test_a_users_class_is_not_changed():
    class Own(ReweightedPenalty):
        def on_train_end(self, trainer, module):
            super().on_train_end(trainer, module)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(Own(penalties.LogSum(eps=2.0), 1e-3), epochs=25).fit(Toy(optimizer=lambda p: torch.optim.SGD(p, 1e-7)), data())
    assert "super().on_train_end(trainer, module)" in [LINES[one.lineno - 1].strip() for one in said if one.filename == __file__]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_zero_warns(rank, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    assert len(of_step_sizes()) == (rank == 0)


def test_no_callback_warns_by_another_way():
    for file in CALLBACKS.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        taken = [name.name for node in imports if str(node.module).startswith("lightning.") for name in node.names]
        assert "rank_zero_warn" not in taken, file.name
        assert file.name == "user_warnings.py" or "warnings.warn" not in text, file.name
