"""Models that no one here wrote: each is trained, ends with true zeros under plain keys, and its file is the plain model's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_sparse.conformance import _networks, toys
from lightning_sparse.conformance._networks import CLASSES, batches
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import zeros
from lightning_sparse.conformance.steps import Gan, _own_steps, matrices

GROUP = "models"
Build = Callable[[], nn.Module]
LOOSE = partial(torch.optim.SGD, lr=0.05)  # keeps no state that a change of the weights' dtype would leave behind


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
    """True zeros, plain keys, and a file that the plain network loads strictly and that computes the same."""
    require(all(bool(torch.isfinite(p).all()) for p in module.parameters() if not p.is_complex()), "a weight is not finite after fit")
    size = sum(w.numel() for w in matrices(module).values())
    require(0 < zeros(module) < size, f"{zeros(module)} of {size} weights are zero after fit; some, not all, should be")
    trainer.save_checkpoint(folder / "end.ckpt")
    plain = nn.ModuleDict({"network": build()})
    own = torch.load(folder / "end.ckpt", weights_only=True)["state_dict"]
    odd = sorted(own.keys() ^ plain.state_dict().keys())
    require(not odd, f"the file's keys are not those of the plain model: {odd[:5]}")
    plain.load_state_dict(own, strict=True)
    require(zeros(plain) == zeros(module), f"the loaded model has {zeros(plain)} zeros, the trained one {zeros(module)}")
    _same_output(plain["network"], module.network, data[0][0])


@torch.no_grad()
def _same_output(plain: nn.Module, trained: nn.Module, x: Tensor) -> None:
    far = float((plain.eval()(x) - trained.eval()(x)).abs().max())
    require(far < 1e-4, f"the loaded model's output differs from the trained one's by {far:.2g}")


def _trains(subject: Subject, folder: Path, build: Build, kind: str) -> toys.Toy:
    module, data = _module(subject, build), batches(kind)
    _ends_well(_fit(subject, module, data), module, build, data, folder)
    return module


def _trains_or_refuses(subject: Subject, folder: Path, build: Build, kind: str, epochs: int = 2, **options: Any) -> toys.Toy | None:
    """As :func:`_trains`, or an error before a weight changed."""
    module, data = _module(subject, build, **options), batches(kind)
    before = toys.weights(module) if not _lazy(module) else {}
    started: list[int] = []
    try:
        spy = toys.Spy(lambda moment, _: started.append(1) if moment == "batch end" else None)
        trainer = _fit(subject, module, data, spy, epochs=epochs)
    except Exception as error:
        touched = [name for name, w in before.items() if not torch.equal(w, module.get_parameter(name).detach())]
        require(not started and not touched, f"it failed after {len(started)} batches, with {touched} changed: {error}")
        require(len(str(error)) > 30, f"the refusal does not say why: {error!r}")
        return None
    _ends_well(trainer, module, build, data, folder)
    return module


def _lazy(module: nn.Module) -> bool:
    return any(isinstance(p, nn.UninitializedParameter) for p in module.parameters())


# -- networks -------------------------------------------------------------------------------------------------------------


@check("torchvision's ResNet-18", GROUP, slow=True)
def resnet18_ends_sparse(subject: Subject, folder: Path) -> None:
    import torchvision

    _trains(subject, folder, partial(torchvision.models.resnet18, num_classes=CLASSES), "images")


@check("torchvision's MobileNetV3", GROUP, slow=True)
def mobilenet_v3_ends_sparse(subject: Subject, folder: Path) -> None:
    import torchvision

    _trains(subject, folder, partial(torchvision.models.mobilenet_v3_small, num_classes=CLASSES, width_mult=0.5), "images")


@check("torchvision's VisionTransformer", GROUP, slow=True)
def vision_transformer_ends_sparse(subject: Subject, folder: Path) -> None:
    import torchvision

    build = partial(torchvision.models.VisionTransformer, 32, 8, 2, 2, 32, 64, num_classes=CLASSES)
    _trains(subject, folder, build, "images")


@check("a DCGAN by manual optimisation with two optimisers", GROUP)
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
        found, size = zeros(getattr(plain, name)), sum(w.numel() for w in matrices(getattr(plain, name)).values())
        require(0 < found < size, f"{found} of {size} weights of the file's {name} are zero; some, not all, should be")


@check("nn.MultiheadAttention and nn.TransformerEncoderLayer, whose evaluation takes another path", GROUP)
def attention_ends_sparse(subject: Subject, folder: Path) -> None:
    _trains(subject, folder, _networks.Attention, "tokens")


@check("nn.LSTM and nn.GRU, whose weights have a second list of names", GROUP)
def recurrent_ends_sparse(subject: Subject, folder: Path) -> None:
    network: Any = _trains(subject, folder, _networks.Recurrent, "tokens").network
    for layer in (network.lstm, network.gru):
        for name, flat in zip(layer._flat_weights_names, layer._flat_weights, strict=True):
            require(flat is getattr(layer, name), f"{name} is another tensor in the layer's flat list than in its attributes")


@check("tied embeddings stay tied, see the same weights at both uses, and count once", GROUP)
def tied_weights_are_one(subject: Subject, folder: Path) -> None:
    module, data = _module(subject, _networks.Tied), batches("tokens")
    trainer = _fit(subject, module, data, epochs=3)
    network: Any = module.network
    require(network.head.weight is network.embedding.weight, "the two weights are no longer one")
    require(len(network.seen) == 6, f"{len(network.seen)} training forwards were seen")
    require(all(torch.equal(first, second) for first, second in network.seen), "a forward used different values of the tied weight")
    _ends_well(trainer, module, _networks.Tied, data, folder)
    said = trainer.callback_metrics.get("sparsity/total")
    if said is not None:
        shares = [_share(network.head.weight, network.body.weight), _share(network.head.weight), _share(network.body.weight)]
        require(any(abs(float(said) - share) < 1e-6 for share in shares), f"sparsity/total is {float(said):.6f}, the shares {shares}")


def _share(*weights: Tensor) -> float:
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@check("weights computed by weight_norm or spectral_norm: refused, left out, or truly zero where their sources are", GROUP)
def computed_weights_are_true(subject: Subject, folder: Path) -> None:
    for old in (False, True):
        module = _trains_or_refuses(subject, folder, partial(_networks.Computed, old), "vectors")
        network: Any = None if module is None else module.network
        for layer in () if network is None else (network.normed, network.spectral):
            layer.eval()(torch.zeros(1, layer.in_features))
            for name, source in layer.named_parameters():
                odd = int(((source == 0) & (layer.weight != 0)).sum()) if source.dim() > 1 else 0
                require(not odd, f"{odd} weights are not zero where {name} is")


@check("frozen weights stay as they are", GROUP)
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


@check("a lazy layer without a shape, complex, quantised and sparsely updated weights: trained or refused before training", GROUP)
def odd_weights_are_trained_or_refused(subject: Subject, folder: Path) -> None:
    lazy = lambda: nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, CLASSES))  # noqa: E731
    _trains_or_refuses(subject, folder, lazy, "vectors")
    _trains_or_refuses(subject, folder, _networks.Wave, "vectors")
    _trains_or_refuses(subject, folder, _networks.Quantised, "vectors")
    _trains_or_refuses(subject, folder, _networks.Looked, "tokens", epochs=8, **({} if subject.optimizer else {"optimizer": LOOSE}))


# -- copies, changes, compilation -----------------------------------------------------------------------------------------


class Portable(LightningModule):
    """A module that can be pickled whole: no function made on the spot hangs on it."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.make = _networks.plain(), optimizer or partial(torch.optim.Adam, lr=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def _pickled(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@check("a copy or a pickle of the module in mid-run is a plain module with the original's weights, and the run goes on", GROUP)
def copies_in_mid_run_are_plain(subject: Subject, folder: Path) -> None:
    copies: list[tuple[str, Any, dict[str, Tensor]]] = []

    def look(moment: str, module: Any) -> None:
        for kind, make in (("copy", copy.deepcopy), ("pickle", _pickled)):
            copies.append((f"{kind} at {moment}", make(module), toys.weights(module)))

    disturbed, alone = Portable(subject.optimizer), Portable(subject.optimizer)
    subject.trainer(toys.Spy(look)).fit(disturbed, toys.data())
    subject.trainer().fit(alone, toys.data())
    for name, w in toys.weights(alone).items():
        require(torch.equal(w, disturbed.get_parameter(name)), f"with copies made on the way, {name} ends elsewhere")
    keys = list(Portable().state_dict())
    for where, made, before in copies:
        require(list(made.state_dict()) == keys, f"the {where} has the keys {list(made.state_dict())}")
        _is_plain(where, made, before)


def _is_plain(where: str, made: Any, before: dict[str, Tensor]) -> None:
    """It computes what a plain network with its parameters does, forwards and backwards."""
    twin, x = _networks.plain(), torch.randn(4, _networks.FEATURES)
    twin.load_state_dict({name.removeprefix("network."): w for name, w in before.items()})
    made.train()
    require(torch.equal(made(x), twin(x)), f"the {where} computes something else than a plain network with its weights")
    made(x).square().sum().backward()
    twin(x).square().sum().backward()
    for copied, plain in zip(made.network.parameters(), twin.parameters(), strict=True):
        require(torch.equal(copied.grad, plain.grad), f"the {where} has other gradients than a plain network")


class Widening(toys.Toy):
    """Goes to float64 at the start of its second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.to(torch.float64)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return super().training_step((batch[0].to(self.dtype), batch[1]), index)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        super().validation_step((batch[0].to(next(self.parameters()).dtype), batch[1]), index)


@check("the module may go to another dtype in mid-run", GROUP)
def a_change_of_dtype_is_followed(subject: Subject, folder: Path) -> None:
    _own_steps(subject)
    module = Widening(optimizer=LOOSE)
    before = {name: id(p) for name, p in module.named_parameters()}
    subject.fit(module, epochs=3)
    require(all(p.dtype == torch.float64 for p in module.parameters()), "the weights are not all float64 after fit")
    require({name: id(p) for name, p in module.named_parameters()} == before, "a parameter was replaced")
    size = sum(w.numel() for w in matrices(module).values())
    require(0 < zeros(module) < size, f"{zeros(module)} of {size} weights are zero after fit; some, not all, should be")


def graphs() -> int:
    """Graphs that torch.compile has made so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@check("a compiled model ends with true zeros, and nothing is compiled anew from step to step", GROUP, slow=True)
def compiled_models_end_sparse(subject: Subject, folder: Path) -> None:
    for name, compile_ in COMPILED.items():
        torch._dynamo.reset()
        module = subject.model()
        given, made = compile_(module), []
        spy = toys.Spy(lambda moment, _, made=made: made.append(graphs()) if moment == "batch end" else None)  # type: ignore[misc]
        subject.trainer(spy, epochs=4).fit(given, toys.data(), toys.data(seed=1))
        require(0 < zeros(module) < 176, f"{name}: {zeros(module)} of 176 weights are zero; some, not all, should be")
        require(made[-1] == made[7] > 0, f"{name}: graphs made by the end of each batch: {made}")


def _inside(module: toys.Toy) -> Any:
    module.network = torch.compile(module.network)  # type: ignore[assignment]
    return module


def _in_place(module: toys.Toy) -> Any:
    module.compile()
    return module


COMPILED: dict[str, Callable[[toys.Toy], Any]] = {
    "torch.compile of the network": _inside,
    "torch.compile of the LightningModule": torch.compile,
    "module.compile()": _in_place,
}
