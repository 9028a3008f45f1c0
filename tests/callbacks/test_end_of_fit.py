"""One line at the end of fit says how many weights are zero, where the checkpoint is, and what to do next."""

from __future__ import annotations

import logging

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from toys import Toy, data, trainer

from lightning_sparse import penalties, structure
from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning, ReweightedPenalty

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
LOG_SUM = penalties.LogSum(eps=2.0)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "selected weights are zero" in record.getMessage()]


def test_the_line_has_the_share_of_the_module_and_the_checkpoint(tmp_path, caplog):
    module = Toy()
    keeper = ModelCheckpoint(dirpath=tmp_path)
    with caplog.at_level(logging.INFO):
        trainer(ReweightedPenalty(LOG_SUM, 0.5), keeper, epochs=3, enable_checkpointing=True).fit(module, data())
    (line,) = lines(caplog)
    weights = [w for w in module.parameters() if w.dim() == 2]
    size = sum(w.numel() for w in weights)
    assert f"ReweightedPenalty: {sum(int((w == 0).sum()) for w in weights) / size:.2%} of {size} selected weights" in line
    assert f"checkpoint {keeper.best_model_path};" in line
    assert line.endswith("; next: export.to_sparse(layout='csr') and export.save_compact of lightning_sparse")  # no configuration is there


def test_several_callbacks_have_one_line_and_a_run_with_a_configuration_names_the_command(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("model: {}")
    keeper = ModelCheckpoint(dirpath=tmp_path)
    first, second = [name for name, w in Toy().named_parameters() if w.dim() == 2][:2]
    both = (ReweightedPenalty(LOG_SUM, 0.5, select=[first]), AdaptiveProx(LOG_SUM, 0.5, select=[second]))
    with caplog.at_level(logging.INFO):
        trainer(*both, keeper, epochs=1, enable_checkpointing=True).fit(Toy(), data())
    (line,) = lines(caplog)
    assert "ReweightedPenalty and AdaptiveProx" in line
    assert f"next: lightning-sparse report {keeper.best_model_path}" in line


NEXT = {  # callbacks, and the uses that their zeros have
    "no zeros": (ReweightedPenalty(LOG_SUM, 1e-9), ""),
    "too few for a smaller file": (MagnitudePruning(0.03), ""),
    "single zeros": (MagnitudePruning(0.5, structure=structure.NM(2, 4)), "export.to_sparse(layout='csr') and export.save_compact"),
    "less than half": (MagnitudePruning(0.2), "export.save_compact"),
    "whole rows": (
        MagnitudePruning(0.6, structure=structure.Rows()),
        "shrink, export.to_sparse(layout='csr') and export.save_compact",
    ),
    "columns": (MagnitudePruning(0.3, structure=structure.Columns()), "shrink and export.save_compact"),
    "blocks": (MagnitudePruning(0.6, structure=structure.Blocks((2, 2))), "export.to_sparse(layout='bsr') and export.save_compact"),
}


@pytest.mark.filterwarnings("ignore:.* prunings? ")
@pytest.mark.parametrize("case", NEXT)
def test_the_line_names_what_makes_use_of_the_zeros_that_are_there(case, caplog):
    callback, uses = NEXT[case]
    with caplog.at_level(logging.INFO):
        trainer(callback, epochs=2).fit(Toy(), data())
    (line,) = lines(caplog)
    assert line.partition("; next: ")[2] == (f"{uses} of lightning_sparse" if uses else "")


def test_convolutions_have_no_sparse_layers_and_zero_channels_are_removed_by_shrink(caplog):
    network = Toy(nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 6, 2, bias=False), nn.Flatten(), nn.Linear(18, 3)))
    with caplog.at_level(logging.INFO):
        trainer(MagnitudePruning(0.7, structure=structure.Rows(), select=["network.1.weight"]), epochs=2).fit(network, data())
    (line,) = lines(caplog)
    assert line.endswith("; next: shrink and export.save_compact of lightning_sparse")


def test_a_fast_dev_run_has_no_line(caplog):
    with caplog.at_level(logging.INFO):
        trainer(ReweightedPenalty(LOG_SUM, 0.5), fast_dev_run=True).fit(Toy(), data())
    assert lines(caplog) == []
