"""A language model of transformers: windows of tokens, and the recipe of 1B weights with a small network on two processes under FSDP2.

Where transformers is installed, the network is also a small Llama. It is in no extra of the tests, because torchmetrics, and with it
Lightning, imports it wherever it is found, which takes seconds in each process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from lightning_sparse.conformance.ranks import obstacle, on_ranks
from lightning_sparse.examples import causal_lm
from lightning_sparse.examples.causal_lm import CausalLM
from lightning_sparse.examples.tokens import Tokens

WORDS = 30
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a tokenizer of 30 words and a text of 2,000, in which each word follows from the one before."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = [3]
    for _ in range(1999):
        words.append((7 * words[-1] + 5) % WORDS)
    lines = [" ".join(f"w{i}" for i in words[at : at + 40]) for at in range(0, len(words), 40)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def llama(folder: Path) -> Path:
    """Write the configuration of a small Llama."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'language' (transformers)")
    transformers.LlamaConfig(vocab_size=WORDS, max_position_embeddings=64, tie_word_embeddings=False, **SIZES).save_pretrained(folder)
    return folder


def ready(folder: Path, **arguments: Any) -> Tokens:
    data = Tokens(str(folder / "text.txt"), str(folder), **{"block": 16, "batch_size": 4, "validation": 0.1, "test": 0.1, **arguments})
    data.setup("fit")
    return data


def test_the_targets_are_the_next_tokens_and_no_token_is_in_two_parts(folder: Path) -> None:
    parts = ready(folder).parts
    for part in parts.values():
        x, y = part.tensors
        assert torch.equal(y, (7 * x + 5) % WORDS)
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
    assert [len(part) for part in parts.values()] == [1599 // 16, 199 // 16, 199 // 16]


def test_what_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"give --data\.file and --data\.tokenizer"):
        Tokens().setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no text in .*absent"):
        Tokens(str(folder / "absent"), str(folder)).setup("fit")
    with pytest.raises(ValueError, match=r"the validation part has 20 tokens, needs more than block = 64"):
        ready(folder, block=64, validation=0.01)
    with pytest.raises(ValueError, match=r"give --model\.name"):
        CausalLM().configure_model()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"lightning-sparse\[language\]"):
        CausalLM(str(folder)).configure_model()


@pytest.mark.slow
def test_weights_come_from_a_folder(llama: Path) -> None:
    first = CausalLM(str(llama), pretrained=False)
    first.configure_model()
    first.network.save_pretrained(llama)
    second = CausalLM(str(llama))
    second.configure_model()
    x, y = ready(llama).parts["test"].tensors
    assert torch.allclose(first.eval()(x), second.eval()(x), atol=1e-6)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    (found,) = trainer.test(second, ready(llama, batch_size=100), verbose=False)
    expected = -torch.log_softmax(second(x), 1).gather(1, y[:, None]).mean()
    assert found["test/loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


class Block(nn.Module):
    """Two matrices under the names of a Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down_proj(self.up_proj(x).relu())
        return out


class Small(nn.Module):
    """A network that is called as those of transformers are, and sees the last token only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Embedding(WORDS, 16), nn.ModuleList([Block(), Block()]), nn.Linear(16, WORDS, bias=False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def small(name: str | None, pretrained: bool) -> nn.Module:
    torch.manual_seed(0)
    return Small()


def fit(rank: int, folder: Path, is_llama: bool) -> Any:
    """Train the recipe with a small network on one of two processes; return the share of zeros, the losses and how it is sharded."""
    if why := obstacle():
        return why
    from lightning_sparse.cli import training

    if not is_llama:
        causal_lm._built = small

    words = ["--config", "text/llama_1b_50", "--model.name", str(folder), "--model.pretrained", "false", "--model.lr", "2e-2"]
    words += ["--data.file", str(folder / "text.txt"), "--data.tokenizer", str(folder), "--data.block", "16", "--data.validation", "0.1"]
    words += ["--data.test", "0.1", "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy.data_parallel_size", "2"]
    words += ["--trainer.max_epochs", "4", "--trainer.accumulate_grad_batches", "2", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.logger", "false", "--trainer.default_root_dir", str(folder / "runs"), "--trainer.log_every_n_steps", "1"]
    seen: dict[str, Any] = {}

    class Shortened(training.RecipeCLI):
        def after_fit(self) -> None:
            metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            layers = self.model.network.model.layers if is_llama else self.model.network.layers
            layer = layers[0].mlp.up_proj if is_llama else layers[0].up_proj
            seen.update(metrics=metrics, steps=self.trainer.global_step, local=tuple(layer.weight.to_local().shape))
            seen["dtype"], seen["zeros"] = layer.weight.dtype, float((layer.weight.full_tensor() == 0).float().mean())
            seen["classes"] = [type(part).__name__ for part in (self.model.network, layers[1])]

    training.launch(Shortened, ["fit", *words])
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("network", ["folder", "llama"])
def test_the_recipe_trains_a_small_network_under_fsdp2(
    network: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, is_llama = request.getfixturevalue(network), network == "llama"
    first, second = on_ranks(fit, folder, is_llama)
    if isinstance(first, str):
        pytest.skip(first)
    assert first["local"] == second["local"] == (16, 16)  # half of (32, 16)
    assert first["dtype"] == torch.float32
    assert all(name.startswith("FSDP") for name in first["classes"])
    for answer in (first, second):
        assert answer["metrics"]["sparsity/total"] == pytest.approx(0.5, abs=0.01)
        assert 0.1 < answer["zeros"] < 0.9
        assert answer["metrics"]["val/loss"] < 3.0  # log(30) = 3.4 for a constant answer
    assert first["metrics"]["val/loss"] == pytest.approx(second["metrics"]["val/loss"])
    assert first["steps"] == 4 * (99 // 2 // 4 // 2)
    (file,) = folder.rglob("*.ckpt")  # one file, which a plain process reads
    state = torch.load(file, weights_only=True)["state_dict"]
    chosen = [tensor for name, tensor in state.items() if name.endswith("_proj.weight")]
    assert len(chosen) == (14 if is_llama else 4)
    assert sum(int((w == 0).sum()) for w in chosen) / sum(w.numel() for w in chosen) == pytest.approx(0.5, abs=0.01)
    if not is_llama:
        monkeypatch.setattr(causal_lm, "_built", small)
    plain = CausalLM(str(folder), pretrained=False)
    plain.configure_model()
    plain.load_state_dict(state)
