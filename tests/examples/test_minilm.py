"""The sentence encoder: torch's encoder layer as reference, files, distillation; sentences and glosses as token ids."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from lightning_sparse import load_shrunk
from lightning_sparse.callbacks import Sparsify
from lightning_sparse.cli import main
from lightning_sparse.examples import sentences
from lightning_sparse.examples.files import fetched
from lightning_sparse.examples.minilm import Layer, MiniLM, nearest
from lightning_sparse.examples.sentences import Sentences

SIZES = {"vocabulary": 30, "positions": 12, "width": 8, "depth": 2, "heads": 2, "inner": 16}


def tiny(**arguments: Any) -> MiniLM:
    torch.manual_seed(0)
    return MiniLM(**{**SIZES, **arguments})


def test_a_layer_is_torchs_encoder_layer() -> None:
    own = Layer(8, 2, 16).eval()
    known = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True)
    with torch.no_grad():
        known.self_attn.in_proj_weight.copy_(torch.cat([layer.weight for layer in (own.query, own.key, own.value)]))
        known.self_attn.in_proj_bias.copy_(torch.cat([layer.bias for layer in (own.query, own.key, own.value)]))
        for theirs, ours in (
            (known.self_attn.out_proj, own.output), (known.linear1, own.up), (known.linear2, own.down),
            (known.norm1, own.attention_norm), (known.norm2, own.norm),
        ):  # fmt: skip
            nn.init.normal_(ours.bias)
            theirs.load_state_dict(ours.state_dict())
    x, seen = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([[5], [3], [1]])
    expected = known(x, src_key_padding_mask=~seen)  # in training mode, because its fast path zeroes padding
    assert torch.allclose(own(x, seen[:, None, None])[seen], expected[seen], atol=1e-5)


def test_embeddings_have_length_1_and_padding_does_not_matter() -> None:
    net, x = tiny().eval(), torch.randint(1, 30, (4, 6))
    found = net(x)
    assert torch.allclose(found.norm(dim=1), torch.ones(4))
    assert torch.allclose(net(nn.functional.pad(x, (0, 5))), found, atol=1e-5)


def test_the_nearest_is_another_sentence() -> None:
    embeddings = nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.2, 1.0]]), dim=-1)
    assert nearest(embeddings).tolist() == [1, 0, 3, 2]


def published(net: MiniLM, segment: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weights under Hugging Face's names, written out by hand; the positions less what segment 0 adds."""
    bert = net.bert
    state = {
        "embeddings.word_embeddings.weight": bert.words.weight, "embeddings.position_embeddings.weight": bert.positions.weight - segment,
        "embeddings.token_type_embeddings.weight": torch.stack([segment, torch.zeros(8)]),
        "embeddings.LayerNorm.weight": bert.norm.weight, "embeddings.LayerNorm.bias": bert.norm.bias,
        "pooler.dense.weight": torch.zeros(8, 8),
    }  # fmt: skip
    for number, layer in enumerate(bert.layers):
        start = f"encoder.layer.{number}."
        for name, part in {
            "attention.self.query": layer.query, "attention.self.key": layer.key, "attention.self.value": layer.value,
            "attention.output.dense": layer.output, "attention.output.LayerNorm": layer.attention_norm, "intermediate.dense": layer.up,
            "output.dense": layer.down, "output.LayerNorm": layer.norm,
        }.items():  # fmt: skip
            state |= {f"{start}{name}.weight": part.weight, f"{start}{name}.bias": part.bias}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def test_weights_come_from_a_folder_of_hugging_face(tmp_path: Path) -> None:
    given = tiny().eval()
    save_file(published(given, torch.randn(8)), tmp_path / "model.safetensors")
    x = torch.randint(1, 30, (4, 6))
    torch.manual_seed(1)
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert torch.allclose(MiniLM(weights=str(place), **SIZES).eval()(x), given(x), atol=1e-5)
    assert not torch.allclose(MiniLM(**SIZES).eval()(x), given(x), atol=1e-2)


@pytest.mark.parametrize("other", [{"depth": 1}, {"depth": 3}, {"width": 16}, {"vocabulary": 31}])
def test_weights_of_other_sizes_are_refused(tmp_path: Path, other: dict[str, int]) -> None:
    save_file(published(tiny(), torch.zeros(8)), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit: it has 2 layers.*config\.json"):
        tiny(weights=str(tmp_path), **other)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in .* Hugging Face name"):
        tiny(weights=str(tmp_path))
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        tiny(heads=3)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"'someone/model' is no file or folder.*lightning-sparse\[text\]"):
        fetched("someone/model", "model.safetensors")


WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(28))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a tokenizer of 30 words, 120 sentences and two files of WordNet."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lines = [f"w{i % 28} w{i // 28} w{i * 7 % 28}" for i in range(120)]
    (tmp_path / "lines.txt").write_text("\n".join([*lines, "", lines[0]]))
    wordnet = tmp_path / "wordnet"
    wordnet.mkdir()
    (wordnet / "data.noun").write_text('  1 a licence | not a gloss\n00001740 03 n 01 entity 0 001 ~ 0 n 0 | w1 w2; "w3"\n')
    (wordnet / "data.verb").write_text("00001740 29 v 01 breathe 0 000 | w4\n")
    return tmp_path


def ready(folder: Path, **arguments: Any) -> Sentences:
    sizes = {"validation": 10, "test": 20, "batch_size": 8, "length": 4}
    data = Sentences(str(folder / "lines.txt"), str(folder), **{**sizes, **arguments})
    data.setup("fit")
    return data


def test_the_parts_hold_every_sentence_once(folder: Path) -> None:
    parts = ready(folder).parts
    assert {name: len(x) for name, (x, _) in parts.items()} == {"training": 90, "validation": 10, "test": 20}
    lines = sentences.read(str(folder / "lines.txt"))
    words = {number: [WORDS[i] for i in row] for x, y in parts.values() for row, number in zip(x.tolist(), y.tolist(), strict=True)}
    assert words == {number: [*line.split(), "[PAD]"] for number, line in enumerate(lines)}
    assert len(ready(folder, sentences=15).parts["training"][0]) == 15
    assert ready(folder, length=3).parts["test"][0].shape == (20, 3)


def test_glosses_are_read_from_wordnets_files(folder: Path) -> None:
    assert sentences.read(str(folder / "wordnet")) == ['w1 w2; "w3"', "w4"]
    assert sentences.read(str(folder / "wordnet" / "data.verb")) == ["w4"]


def test_missing_texts_and_too_few_sentences_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"give --data\.file and --data\.tokenizer"):
        Sentences().setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no text in .*none"):
        sentences.read(str(folder / "none"))
    with pytest.raises(ValueError, match="leave 90 to train on, too few"):
        ready(folder, sentences=91)


def test_training_batches_hold_similar_lengths_and_no_more_padding_than_needed(folder: Path) -> None:
    lines = [" ".join(["w1"] * (1 + i % 5)) + f" w{i // 20} w{i % 20}" for i in range(400)]
    (folder / "lines.txt").write_text("\n".join(lines))
    loader = ready(folder, length=9).train_dataloader()
    batches = list(loader)
    numbers = torch.cat([y for _, y in batches])
    assert len(batches) == len(loader)
    assert sorted(numbers.tolist()) == sorted(loader.y.tolist())
    lengths = [(x != 0).sum(1) for x, _ in batches]
    assert [x.shape[1] for x, _ in batches] == [int(own.max()) for own in lengths]
    spread = sum(float(own.float().std()) for own in lengths) / len(lengths)
    assert spread < 0.4 < float((loader.x != 0).sum(1).float().std())
    again = torch.cat([y for _, y in loader])
    loader.set_epoch(1)
    assert torch.equal(again, numbers)
    assert not torch.equal(torch.cat([y for _, y in loader]), numbers)


def features(net: MiniLM, sentence: torch.Tensor) -> torch.Tensor:
    """Return what each layer puts out (layers, length, width) for one sentence without padding."""
    bert, found = net.bert, []
    h = bert.norm(bert.words(sentence) + bert.positions.weight[: sentence.shape[1]])
    for layer in bert.layers:
        h = layer(h, torch.ones(1, 1, 1, sentence.shape[1], dtype=torch.bool))
        found.append(h[0])
    return torch.stack(found)


def test_the_loss_compares_embeddings_and_the_tokens_of_every_layer() -> None:
    dense = tiny(dropout=0.0)
    net = copy.deepcopy(dense)
    net.on_fit_start()
    net.log = lambda *_: None  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.tensor([[1, 2, 3], [4, 5, 0]])
    with torch.no_grad():
        apart = float(1 - (net(x) * dense(x)).sum(-1).mean())
        one, other = (torch.cat([features(m, sentence) for sentence in (x[:1], x[1:, :2])], 1) for m in (net, dense))
        angles = 1 - nn.functional.cosine_similarity(one, other, dim=-1)  # 2 layers, 5 tokens
    for tokens in (0.0, 0.5):
        net.tokens = tokens
        expected = apart + tokens * float(angles.mean())
        assert net.training_step((x, torch.arange(2)), 0).item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, inf\)"):
        tiny(tokens=-1.0)


def test_a_loaded_checkpoint_is_compared_with_the_given_weights(folder: Path) -> None:
    save_file(published(tiny(), torch.zeros(8)), folder / "model.safetensors")
    net = tiny(weights=str(folder))
    state = {name: tensor * (torch.rand_like(tensor) > 0.5) if tensor.dim() > 1 else tensor for name, tensor in net.state_dict().items()}
    net.load_state_dict(state)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    data = ready(folder)
    (found,) = trainer.test(net, data, verbose=False)
    assert found["test/cosine"] == pytest.approx(agreement(net, tiny(), data.parts["test"][0]), abs=1e-4)
    assert found["test/cosine"] < 0.99
    with pytest.raises(ValueError, match="no dense encoder to compare with"):
        trainer.test(tiny(), data, verbose=False)


@torch.no_grad()
def agreement(net: MiniLM, dense: MiniLM, x: torch.Tensor) -> float:
    return float((net.eval()(x) * dense.eval()(x)).sum(-1).mean())


@pytest.mark.slow
def test_distillation_reaches_its_target_and_comes_near_the_dense_encoder(folder: Path) -> None:
    net = tiny(lr=1e-2)
    trainer = Trainer(
        max_epochs=20, callbacks=[Sparsify(0.6)], logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    dense = tiny().eval()
    x = ready(folder).parts["validation"][0]
    trainer.fit(net, datamodule=ready(folder))
    found = trainer.callback_metrics
    cosine = agreement(net, dense, x)
    assert float(found["val/cosine"]) == pytest.approx(cosine, abs=1e-4)
    cut = tiny().eval()
    for ours, theirs in zip(cut.parameters(), net.parameters(), strict=True):
        ours.data.mul_(theirs.data != 0)  # the same zeros without training
    assert cosine > agreement(cut, dense, x)
    assert float(found["sparsity/total"]) == pytest.approx(0.6, abs=1e-2)
    assert set(net.state_dict()) == set(dense.state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*", "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*ModelCheckpoint.*", "ignore:Checkpoint directory")
def test_the_recipe_of_heads_and_neurons_trains_a_tiny_encoder_that_shrinks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    save_file(published(tiny(heads=4), torch.zeros(8)), folder / "model.safetensors")
    sizes = [word for name, size in {**SIZES, "heads": 4}.items() for word in (f"--model.{name}", str(size))]
    words = ["--config", "text/minilm_heads", *sizes, "--model.weights", ".", "--model.lr", "1e-2", "--data.file", "lines.txt"]
    words += ["--data.tokenizer", ".", "--data.length", "4", "--data.batch_size", "8", "--data.validation", "10", "--data.test", "20"]
    words += ["--trainer.max_epochs", "4", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    assert main(["fit", *words]) == 0
    (file,) = folder.rglob("*.ckpt")
    assert main(["shrink", str(file), "--out", "small", "--round_to", "1", *words]) == 0
    dense, small = tiny(heads=4), load_shrunk("small", tiny(heads=4))
    dense.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    x = torch.randint(1, 30, (5, 4))
    torch.testing.assert_close(small.eval()(x), dense.eval()(x), rtol=1e-4, atol=1e-5)
    layers = list(small.bert.layers)
    assert sum(layer.up.out_features for layer in layers) == 16  # half of 2 * 16
    assert sum(layer.heads for layer in layers) in (5, 6)  # two thirds of 2 * 4
    assert [layer.query.out_features for layer in layers] == [2 * layer.heads for layer in layers]
