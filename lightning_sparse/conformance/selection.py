"""Selection of weights: a callback must warn about large matrices that it does not select."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from lightning_sparse.conformance import _networks, toys
from lightning_sparse.conformance._registry import Subject, check, require

GROUP = "selection"


@check("matrices of custom layers: some of their weights become zero, or a warning names them", GROUP)
def own_matrices_are_trained_or_named(subject: Subject, folder: Path) -> None:
    module = subject.model(_networks.own_layers())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        subject.fit(module)
    texts = " ".join(str(one.message) for one in caught)
    for name in ("network.0.weight", "network.2.gate_up"):
        trained = bool((module.get_parameter(name) == 0).any())
        require(trained or f"'{name}'" in texts, f"{name!r} has no zero weight, and no warning names it")


@check("a network of torch's layers only: no warning about the selection", GROUP)
def ordinary_networks_get_no_warning(subject: Subject, folder: Path) -> None:
    module = subject.model(_networks.Attention())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        subject.fit(module, loader=toys.Repeated(_networks.batches("tokens")[0], 4), limit_val_batches=0)
    spurious = [str(one.message) for one in caught if "select=" in str(one.message)]
    require(not spurious, f"an unexpected warning about the selection: {spurious[:1]}")


@check("a zero-initialised matrix (a head, LoRA's B) learns, or a warning names it", GROUP)
def matrices_that_start_at_zero_learn_or_are_named(subject: Subject, folder: Path) -> None:
    module = subject.model()
    with torch.no_grad():
        module.get_parameter("network.2.weight").zero_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        subject.fit(module, epochs=6)
    named = any("'network.2.weight'" in str(one.message) for one in caught)
    left = int((module.get_parameter("network.2.weight") != 0).sum())  # ranking may keep one of each matrix
    require(left > 1 or named, f"'network.2.weight' starts at zero and ends with {left} non-zero weights, and no warning names it")
