"""Which groups are found and proved in networks of torchvision, timm and transformers (those that are installed)."""

from __future__ import annotations

import argparse
import importlib
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from lightning_sparse.coupling import groups, left_out

Case = tuple[str, Callable[[], nn.Module], Any]
PICTURES = torch.randn(2, 3, 64, 64)
CONVOLUTIONS = ("resnet18", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "convnext_tiny")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="*", help="parts of names")


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield one row for each network."""
    yield "| network | seconds | axes that can shrink | axes left out, with the reason |"
    yield "|---|--:|---|---|"
    for title, make, inputs in cases():
        if args.only and not any(part in title for part in args.only):
            continue
        torch.manual_seed(0)
        began = time.perf_counter()
        try:
            found = groups(make(), inputs, source="names" if "by name" in title else "trace")
        except ValueError as error:
            yield f"| {title} | {time.perf_counter() - began:.1f} | none | {' '.join(str(error).split())[:160]} |"
            continue
        axes = Counter({group.axis: group.kind for group in found if group.exact}.values())
        exact = ", ".join(f"{count} of {kind}s" for kind, count in axes.items())
        reasons = Counter(short(why) for _, _, why in left_out(found) if why != "it is part of the output")
        rest = "; ".join(f"{count}: {why}" for why, count in reasons.items())
        yield f"| {title} | {time.perf_counter() - began:.1f} | {exact} | {rest} |"


def _decoders(hf: Any, sizes: dict[str, int], words: Any) -> Iterator[Case]:
    for name in ("Llama", "Qwen2", "Mistral"):
        config = getattr(hf, f"{name}Config")(vocab_size=100, num_key_value_heads=2, **sizes)
        yield f"transformers {name}, by name", partial(getattr(hf, f"{name}ForCausalLM"), config), words


def short(reason: str) -> str:
    """Return a reason without names and figures."""
    norm = re.search(r"(\w+) averages over its channels", reason)
    return f"{norm[1]} averages over the channels" if norm else " ".join(reason.split())[:110]


def cases() -> Iterator[Case]:
    """Yield (title, network, example inputs), small ones where a configuration allows it."""
    for name in CONVOLUTIONS:
        yield f"torchvision {name}", getattr(torchvision.models, name), PICTURES
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    yield "nn.TransformerEncoder", lambda: nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 32)
    yield "nn.LSTM and a head", Recurrent, torch.randn(2, 5, 8)
    if timm := _installed("timm"):
        yield (
            "timm vit_tiny_patch16_224",
            lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32),
            torch.randn(2, 3, 32, 32),
        )
        yield "timm convnext_atto", lambda: timm.create_model("convnext_atto"), PICTURES
    if hf := _installed("transformers"):
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        words = {"input_ids": torch.randint(0, 100, (2, 7))}
        yield "transformers BERT", lambda: hf.BertForSequenceClassification(hf.BertConfig(vocab_size=100, **sizes)), words
        distil = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100}
        yield "transformers DistilBERT", lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**distil)), words
        vit = {"image_size": 32, "patch_size": 8, **sizes}
        pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
        yield "transformers ViT", lambda: hf.ViTForImageClassification(hf.ViTConfig(**vit)), pixels
        yield from _decoders(hf, sizes, words)
        yield "transformers GPT-2", lambda: hf.GPT2Model(hf.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=100)), words


class Recurrent(nn.Module):
    """An LSTM and a Linear head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
        return scores


def _installed(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None
