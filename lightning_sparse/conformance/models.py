"""Common architectures: training ends with exact zeros under plain keys, and the plain model loads the file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.conformance import _networks, toys
from lightning_sparse.conformance._lightning import Callback, LightningModule, Trainer
from lightning_sparse.conformance._networks import CLASSES, batches
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import require_zeros, zeros
from lightning_sparse.conformance.loops import Gan
from lightning_sparse.conformance.steps import matrices

GROUP = "models"
Build = Callable[[], nn.Module]
LOOSE = partial(torch.optim.SGD, lr=0.05)  # without state, because a state would keep the old dtype of the weights


def _module(subject: Subject, build: Build, **options: Any) -> toys.Toy:
    torch.manual_seed(0)
    return subject.model(build(), **options)


def _fit(subject: Subject, module: LightningModule, data: Any, *neighbours: Callback, **options: Any) -> Trainer:
    trainer = subject.trainer(*neighbours, **options)
    trainer.fit(module, _Loader(data), _Loader(data[:1]))
    return trainer


class _Loader:
    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        return iter(self.data)


def _ends_well(trainer: Trainer, module: toys.Toy, build: Build, data: Any, folder: Path) -> None:
    """Check for exact zeros, plain keys, and a file that the plain network loads strictly, with the same output."""
    require(all(bool(torch.isfinite(p).all()) for p in module.parameters() if not p.is_complex()), "a weight is not finite after fit")
    require_zeros(module)  # all may be zero: that depends on the subject's strength
    trainer.save_checkpoint(folder / "end.ckpt")
    plain = nn.ModuleDict({"network": build()})
    own = torch.load(folder / "end.ckpt", weights_only=True)["state_dict"]
    different = sorted(own.keys() ^ plain.state_dict().keys())
    require(not different, f"the file's keys are not those of the plain model: {different[:5]}")
    plain.load_state_dict(own, strict=True)
    require(zeros(plain) == zeros(module), f"the loaded model has {zeros(plain)} zeros, the trained one {zeros(module)}")
    _same_output(plain["network"], module.network, data[0][0])


@torch.no_grad()
def _same_output(plain: nn.Module, trained: nn.Module, x: Tensor) -> None:
    deviation = float((plain.eval()(x) - trained.eval()(x)).abs().max())
    require(deviation < 1e-4, f"the loaded model's output differs from the trained one's by {deviation:.2g}")


def _trains(subject: Subject, folder: Path, build: Build, kind: str, **options: Any) -> toys.Toy:
    module, data = _module(subject, build), batches(kind)
    _ends_well(_fit(subject, module, data, **options), module, build, data, folder)
    return module


def _trains_or_refuses(subject: Subject, folder: Path, build: Build, kind: str, epochs: int = 2, **options: Any) -> toys.Toy | None:
    """Check like :func:`_trains`, or that fit raises before the first batch, without changing a weight."""
    module, data = _module(subject, build, **options), batches(kind)
    before = toys.weights(module) if not _lazy(module) else {}
    started: list[int] = []
    try:
        spy = toys.Spy(lambda moment, _: started.append(1) if moment == "batch end" else None)
        trainer = _fit(subject, module, data, spy, epochs=epochs)
    except Exception as error:
        changed = [name for name, w in before.items() if not torch.equal(w, module.get_parameter(name).detach())]
        require(not started and not changed, f"it failed after {len(started)} batches, with {changed} changed: {error}")
        require(len(str(error)) > 30, f"the refusal does not say why: {error!r}")
        return None
    _ends_well(trainer, module, build, data, folder)
    return module


def _lazy(module: nn.Module) -> bool:
    return any(isinstance(p, nn.UninitializedParameter) for p in module.parameters())


@check("torchvision's ResNet-18", GROUP, slow=True)
def resnet18_ends_sparse(subject: Subject, folder: Path) -> None:
    import torchvision

    _trains(subject, folder, partial(torchvision.models.resnet18, num_classes=CLASSES), "images", limit_val_batches=0)


@check("torchvision's MobileNetV3", GROUP, slow=True)
def mobilenet_v3_ends_sparse(subject: Subject, folder: Path) -> None:
    import torchvision

    _trains(subject, folder, partial(torchvision.models.mobilenet_v3_small, num_classes=CLASSES, width_mult=0.5), "images")


@check("torchvision's VisionTransformer", GROUP, slow=True)
def vision_transformer_ends_sparse(subject: Subject, folder: Path) -> None:
    import torchvision

    build = partial(torchvision.models.VisionTransformer, 32, 8, 2, 2, 32, 64, num_classes=CLASSES)
    _trains(subject, folder, build, "images")


@check("a DCGAN, manual optimisation with two optimisers", GROUP)
def dcgan_ends_sparse(subject: Subject, folder: Path) -> None:
    torch.manual_seed(0)
    build = partial(Gan, _networks.generator(), _networks.discriminator(), (4, 1, 1), subject.optimizer)
    module = build()
    trainer = subject.trainer()
    trainer.fit(module, _Loader([(torch.rand(8, 3, 16, 16),) for _ in range(2)]))
    trainer.save_checkpoint(folder / "end.ckpt")
    plain = Gan(_networks.generator(), _networks.discriminator(), (4, 1, 1))
    plain.load_state_dict(torch.load(folder / "end.ckpt", weights_only=True)["state_dict"], strict=True)
    for name in ("generator", "discriminator"):
        count, size = zeros(getattr(plain, name)), sum(w.numel() for w in matrices(getattr(plain, name)).values())
        require(0 < count < size, f"{count} of {size} weights of the file's {name} are zero; some but not all should be zero")


@check("nn.MultiheadAttention and nn.TransformerEncoderLayer, which have a fused path in evaluation", GROUP)
def attention_ends_sparse(subject: Subject, folder: Path) -> None:
    _trains(subject, folder, _networks.Attention, "tokens")


@check("nn.LSTM and nn.GRU, which keep a second list of their weights", GROUP)
def recurrent_ends_sparse(subject: Subject, folder: Path) -> None:
    network: Any = _trains(subject, folder, _networks.Recurrent, "tokens").network
    for layer in (network.lstm, network.gru):
        for name, flat in zip(layer._flat_weights_names, layer._flat_weights, strict=True):
            require(flat is getattr(layer, name), f"the layer's flat list and its attribute {name} hold different tensors")


@check("tied embeddings stay tied, have the same values at both uses and are counted once", GROUP)
def tied_weights_are_one(subject: Subject, folder: Path) -> None:
    module, data = _module(subject, _networks.Tied), batches("tokens")
    trainer = _fit(subject, module, data, epochs=3)
    network: Any = module.network
    require(network.head.weight is network.embedding.weight, "the weights are no longer tied")
    require(len(network.seen) == 6, f"{len(network.seen)} training forwards were seen")
    require(all(torch.equal(first, second) for first, second in network.seen), "a forward used different values of the tied weight")
    _ends_well(trainer, module, _networks.Tied, data, folder)
    logged = trainer.callback_metrics.get("sparsity/total")
    if logged is not None:
        shares = [_share(network.head.weight, network.body.weight), _share(network.head.weight), _share(network.body.weight)]
        same = any(abs(float(logged) - share) < 1e-6 for share in shares)
        require(same, f"sparsity/total is {float(logged):.6f}, the counted shares are {shares}")


def _share(*weights: Tensor) -> float:
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@check("weights computed by weight_norm or spectral_norm: refused, left out, or exactly zero where their source parameters are", GROUP)
def computed_weights_are_true(subject: Subject, folder: Path) -> None:
    for old in (False, True):
        module = _trains_or_refuses(subject, folder, partial(_networks.Computed, old), "vectors")
        network: Any = None if module is None else module.network
        for layer in () if network is None else (network.normed, network.spectral):
            layer.eval()(torch.zeros(1, layer.in_features))
            for name, source in layer.named_parameters():
                nonzero = int(((source == 0) & (layer.weight != 0)).sum()) if source.dim() > 1 else 0
                require(not nonzero, f"{nonzero} weights are not zero where {name} is")


@check("frozen weights do not change", GROUP)
def frozen_weights_stay(subject: Subject, folder: Path) -> None:
    def build() -> nn.Module:
        network = _networks.plain()
        network[0].requires_grad_(False)
        return network

    module, data = _module(subject, build), batches("vectors")
    before = toys.weights(module)["network.0.weight"]
    _fit(subject, module, data)
    require(torch.equal(module.get_parameter("network.0.weight"), before), "a frozen weight changed")
    require((module.get_parameter("network.2.weight") == 0).any(), "no weight of the other layer is zero")


@check("lazy layers without a shape, complex and quantised weights, sparse gradients: trained or refused before training", GROUP)
def odd_weights_are_trained_or_refused(subject: Subject, folder: Path) -> None:
    lazy = lambda: nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, CLASSES))  # noqa: E731
    _trains_or_refuses(subject, folder, lazy, "vectors")
    _trains_or_refuses(subject, folder, _networks.ComplexLayer, "vectors")
    _trains_or_refuses(subject, folder, _networks.Quantised, "vectors")
    _trains_or_refuses(
        subject, folder, _networks.SparseEmbedding, "tokens", epochs=8, **({} if subject.optimizer else {"optimizer": LOOSE})
    )
