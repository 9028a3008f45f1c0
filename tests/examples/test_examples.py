"""The example networks: sizes, torch's attention as reference, and a tiny fit of two callbacks that ends with zeros."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_sparse.callbacks import AdaptiveMask, ReweightedPenalty, Sparsifier
from lightning_sparse.curvature import EmpiricalFisher
from lightning_sparse.examples.batches import ShuffledBatches
from lightning_sparse.examples.classifier import Classifier, cosines
from lightning_sparse.examples.lenet5 import LeNet5
from lightning_sparse.examples.mlp import MLP
from lightning_sparse.examples.vit import Attention, ViT
from lightning_sparse.penalties import LogSum


def layers(module: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def matrices(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in layers(module))


def test_the_networks_have_the_weights_that_they_are_known_by() -> None:
    assert matrices(LeNet5()) == 500 + 25_000 + 400_000 + 5_000 == 430_500
    block = 4 * 64 * 64 + 2 * 64 * 128
    assert matrices(ViT()) == 49 * 64 + 4 * block + 64 * 10 == 134_848
    biases, norms, positions = 64 + 4 * (4 * 64 + 128 + 64) + 10, 9 * 2 * 64, 16 * 64
    assert sum(parameter.numel() for parameter in ViT().parameters()) == 134_848 + biases + norms + positions


@pytest.mark.parametrize("network", [LeNet5(), ViT(), ViT(image=12, patch=3, classes=7)], ids=["LeNet-5", "ViT", "another size"])
def test_scores_are_one_row_an_image_and_depend_on_that_image_alone(network: Classifier) -> None:
    side, classes = (12, 7) if network.hparams.get("image") == 12 else (28, 10)
    x = torch.randn(3, 1, side, side)
    scores = network(x)
    assert scores.shape == (3, classes)
    assert torch.allclose(network(x[1:2]), scores[1:2], atol=1e-5)


def test_the_tokens_are_the_patches_row_by_row() -> None:
    tokens = ViT(image=4, patch=2, width=4, heads=1, depth=1).layers[0]
    with torch.no_grad():
        tokens.embed.weight.copy_(torch.eye(4))
        tokens.embed.bias.zero_()
        tokens.positions.zero_()
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert tokens(image)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_the_attention_is_torchs_multi_head_attention() -> None:
    own, known = Attention(8, heads=2), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        known.in_proj_weight.copy_(torch.cat([layer.weight for layer in (own.q, own.k, own.v)]))
        known.in_proj_bias.copy_(torch.cat([layer.bias for layer in (own.q, own.k, own.v)]))
        known.out_proj.load_state_dict(own.o.state_dict())
    x = torch.randn(3, 5, 8)
    assert torch.allclose(own(x), known(x, x, x)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"patch": 5}, "image must be a multiple of patch, got image=28 and patch=5"),
        ({"heads": 3}, "width must be a multiple of heads"),
        ({"depth": 0}, "depth"),
        ({"decay": "cos"}, "decay must be one of"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ViT(**sizes)  # type: ignore[arg-type]


def images() -> ShuffledBatches:
    """Draw images from ten noisy templates."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(160) % 10
    templates = torch.randn(10, 1, 28, 28, generator=generator)
    return ShuffledBatches(templates[y] + 0.3 * torch.randn(160, 1, 28, 28, generator=generator), y, 16, seed=0)


@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveMask])
@pytest.mark.parametrize(
    "network",
    [
        pytest.param(partial(LeNet5, lr=3e-3), id="LeNet-5", marks=pytest.mark.slow),
        pytest.param(partial(ViT, lr=1e-2, width=16, depth=1, heads=2), id="ViT"),
    ],
)
def test_both_callbacks_train_them_to_exact_zeros(network: Callable[[], Classifier], form: type[Sparsifier]) -> None:
    torch.manual_seed(0)
    module, callback = network(), form(LogSum(eps=2.0), lam=3e-3, freeze=0.2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=6, accelerator="cpu", log_every_n_steps=1, callbacks=[callback], **quiet)  # type: ignore[arg-type]
    trainer.fit(module, images())
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers(module))
    assert zeros / matrices(module) == pytest.approx(float(trainer.callback_metrics["sparsity/total"]), abs=1e-6)
    assert 0.03 < zeros / matrices(module) < 0.999
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))


def test_calibration_sees_every_matrix_at_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    monkeypatch.setattr(EmpiricalFisher, "_on_output_gradient", lambda self, name, layer, x, grad: seen.add(name))
    for module in (LeNet5(), ViT()):
        callback = AdaptiveMask(LogSum(eps=2.0), lam=1e-3)
        Trainer(max_steps=1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False).fit(module, images())
        assert len(layers(module)) == len(seen & {f"{name}.weight" for name, _ in module.named_modules()})
        seen.clear()


def test_lenet5_computes_what_its_layers_compute_in_the_usual_memory_order() -> None:
    module, x = LeNet5(), torch.rand(5, 1, 28, 28)
    scores = module(x)
    assert module.layers[2].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    plain = module.layers.to(memory_format=torch.contiguous_format)
    assert not plain[2].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(plain(x), scores)


def test_a_restarted_rate_falls_twice_and_ends_at_zero() -> None:
    rates = [cosines(step, total=100, restart=0.75) for step in range(101)]
    assert rates[0] == rates[75] == 1.0
    assert rates[74] < 1e-3
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(later < earlier for part in (rates[:75], rates[75:]) for earlier, later in itertools.pairwise(part))


def test_the_restart_is_in_the_optimiser_and_needs_a_cosine() -> None:
    data = ShuffledBatches(torch.rand(32, 4), torch.randint(3, (32,)), 8, 0)
    model = MLP([4, 3], lr=0.1, restart=0.5)
    rates: list[float] = []
    model.on_train_batch_start = lambda *_: rates.append(model.trainer.optimizers[0].param_groups[0]["lr"])  # type: ignore[method-assign, assignment]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=2, accelerator="cpu", **quiet).fit(model, data)
    assert rates == pytest.approx([0.1 * cosines(step, 8, 0.5) for step in range(8)])
    assert rates[4] == 0.1
    with pytest.raises(ValueError, match=r"restart=0.5 is for decay='cosine'"):
        MLP([4, 3], decay="linear", restart=0.5)
    with pytest.raises(ValueError, match="restart"):
        MLP([4, 3], restart=1.5)
