"""``lightning-sparse shrink CKPT``: the files give back the smaller network; wrong checkpoints are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PLAIN, QUIET, refused

from lightning_sparse import load_shrunk
from lightning_sparse.cli import main
from lightning_sparse.examples.mlp import MLP
from lightning_sparse.export import latency
from lightning_sparse.export.latency import Timing

pytestmark = [*QUIET, pytest.mark.slow]
SIZES = [64, 300, 100, 10]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run whose first 200 hidden neurons were then set to zero, but for their biases."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["fit", "--config", "digits", *PLAIN, "--trainer.default_root_dir", str(folder)]) == 0
    (file,) = folder.rglob("*.ckpt")
    content = torch.load(file, weights_only=True)
    content["state_dict"] = dict(network().state_dict())
    torch.save(content, file)
    return file


def network() -> MLP:
    torch.manual_seed(0)
    model = MLP(SIZES)
    model.layers[1].weight.data[:200] = 0.0
    return model.eval()


def test_the_files_give_back_the_smaller_network(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shrink", str(trained), "--out", "small"]) == 0
    shown = capsys.readouterr().out
    assert "4 zero neurons of 1 axis stay, because widths are rounded up to multiples of 8: --round_to 1 removes them" in shown
    parameters = 104 * 65 + 100 * 105 + 1010
    for part in ("neurons of layers.1", f"{parameters:,}", "multiply-adds of one sample", "latency at batch 256", "test/accuracy", "A/A"):
        assert part in shown
    assert "A/A: the given network against itself" in shown
    loaded, x = load_shrunk("small", MLP), torch.randn(5, 64)
    assert loaded.layers[1].out_features == 104  # 100 live ones, rounded up to a multiple of 8
    torch.testing.assert_close(loaded(x), network()(x), rtol=1e-5, atol=1e-6)
    program = torch.export.load("small/model.pt2").module()
    torch.testing.assert_close(program(x[:3]), loaded.eval()(x[:3]))
    assert sorted(path.name for path in Path("small").iterdir()) == ["model.pt", "model.pt2", "shape.json"]


@pytest.mark.parametrize("faster", [0.9, 3.0])
def test_without_rounding_beside_the_checkpoint(
    trained: Path, faster: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(arms: Any, base: str, *_: Any, **__: Any) -> dict[str, Timing]:
        return {name: Timing(1.0, *[faster if name == "shrunk" else 1.0] * 3) for name in [*arms, latency.AGAIN]}

    monkeypatch.setattr(latency, "measure", measured)
    assert main(["shrink", str(trained), "--round_to", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("no gain in speed here at batch 1, 32, 256: keep the given network") == (faster < 1)
    assert load_shrunk(trained.with_suffix(".shrunk"), MLP).layers[1].out_features == 100


def test_wrong_checkpoints_are_refused_and_nothing_is_written(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = torch.load(trained, weights_only=True)
    (tmp_path / "config.yaml").write_text((trained.parent.parent / "config.yaml").read_text())
    torch.save(content | {"state_dict": dict(MLP(SIZES).state_dict())}, tmp_path / "dense.ckpt")
    assert "nothing to remove from MLP" in refused(capsys, "shrink", "dense.ckpt")
    torch.save(content | {"state_dict": dict(MLP([64, 10]).state_dict())}, tmp_path / "other.ckpt")
    assert "a checkpoint of another model" in refused(capsys, "shrink", "other.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(trained.read_bytes()[:5000])
    assert "cut.ckpt" in refused(capsys, "shrink", "cut.ckpt")
    assert "round_to must be a whole number >= 1" in refused(capsys, "shrink", str(trained), "--round_to", "0")
    message = refused(capsys, "shrink", str(trained), "--round_to", "512")
    assert "none can go with --round_to 512, " in message
    assert "give --round_to 1, which removes all of them, or --round_to fastest, which measures several multiples" in message
