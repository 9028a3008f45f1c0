"""A BERT encoder of sentences, pruned by distillation to its own dense embeddings."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from lightning_sparse import _checks
from lightning_sparse.examples.files import fetched


class MiniLM(LightningModule):
    """A sentence encoder: BERT, the mean over tokens, length 1. With the defaults it has the sizes of all-MiniLM-L6-v2.

    x has shape (batch, length), token ids with 0 for padding; the embeddings have shape (batch, width). Training minimises 1 - cos to
    the embeddings of the dense encoder, which has the ``weights`` (without them: as it was when the fit started), plus ``tokens`` times
    the mean of 1 - cos over the features of each token after each layer; labels are not needed. Logs ``train/loss``, ``val/loss``,
    ``{val,test}/cosine``, its mean over sentences, and ``{val,test}/agreement``: the share of sentences whose nearest other sentence of
    the batch is the same for both encoders. Trained by AdamW; the learning rate decays to 0 as half a cosine.

    Args:
        weights: a folder with ``model.safetensors`` of such an encoder, that file, or a Hugging Face name such as
            "sentence-transformers/all-MiniLM-L6-v2" (extra ``text``); None starts from torch's initialisation.
        vocabulary: number of tokens.
        positions: most tokens in a sentence.
        width: features per token, a multiple of ``heads``.
        depth: number of layers.
        heads: attention heads per layer.
        inner: hidden width of the perceptrons.
        tokens: weight of the features of single tokens in the loss; 0 compares embeddings only.
        dropout: share of features dropped after the embeddings, the attention and the perceptron in training. With 0 the first
            gradients of the distillation are 0, up to the first zeros: Adam's first steps then have no direction. The recipes train so,
            because it ended nearer to the dense encoder (docs/results/minilm.md).
        lr: the initial learning rate.
        weight_decay: of AdamW.

    Raises FileNotFoundError for missing weights and ValueError for weights and sizes that do not fit.
    """

    def __init__(
        self,
        weights: str | None = None,
        vocabulary: int = 30522,
        positions: int = 512,
        width: int = 384,
        depth: int = 6,
        heads: int = 12,
        inner: int = 1536,
        tokens: float = 1.0,
        dropout: float = 0.1,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights"])  # because a checkpoint brings its own weights
        sizes = {"vocabulary": vocabulary, "positions": positions, "width": width, "depth": depth, "heads": heads, "inner": inner}
        for name, size in sizes.items():
            _checks.whole(name, size, 1)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width} and heads={heads}")
        self.lr, self.weight_decay = _checks.positive("lr", lr), _checks.between("weight_decay", weight_decay, 0, float("inf"), closed="l")
        self.tokens = _checks.between("tokens", tokens, 0, float("inf"), closed="l")
        _checks.between("dropout", dropout, 0, 1, closed="l")
        self.bert = Bert(vocabulary, positions, width, depth, heads, inner, dropout)
        if weights is not None:
            load_bert(self.bert, fetched(weights, "model.safetensors"))
        self._dense: list[Bert] = []  # a list, because its weights are no part of this module
        if weights is not None:
            self._keep_dense()  # now, because a checkpoint that is loaded later has zeros

    def forward(self, x: Tensor) -> Tensor:
        return pooled(self.bert(x), x)

    def on_fit_start(self) -> None:
        if not self._dense:
            self._keep_dense()

    def _keep_dense(self) -> None:
        self._dense = [copy.deepcopy(self.bert).eval().requires_grad_(False)]

    @torch.no_grad()
    def _targets(self, x: Tensor) -> list[Tensor]:
        """Return the dense encoder's features of the tokens after each layer."""
        if not self._dense:
            raise ValueError("there is no dense encoder to compare with: give --model.weights")
        return self._dense[0].to(x.device).states(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x = batch[0]
        own, dense = self.bert.states(x), self._targets(x)
        loss: Tensor = 1 - (pooled(own[-1], x) * pooled(dense[-1], x)).sum(-1).mean()
        if self.tokens:
            loss = loss + self.tokens * (1 - agreement_of_tokens(own, dense, x != 0))
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate("val", batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate("test", batch[0])

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        embeddings: Tensor = self(batch[0])
        return embeddings

    def _evaluate(self, stage: str, x: Tensor) -> None:
        own, dense = self(x), pooled(self._targets(x)[-1], x)
        cosine = (own * dense).sum(-1).mean()
        values = {"loss": 1 - cosine, "cosine": cosine, "agreement": (nearest(own) == nearest(dense)).float().mean()}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, batch_size=len(x))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pooled(states: Tensor, x: Tensor) -> Tensor:
    """Return the mean of the features (batch, length, width) over the tokens of each sentence that are no padding, scaled to length 1."""
    real = (x != 0).unsqueeze(-1)
    return functional.normalize((states * real).sum(1) / real.sum(1).clamp(min=1), dim=-1)


def agreement_of_tokens(own: list[Tensor], dense: list[Tensor], real: Tensor) -> Tensor:
    """Return the mean cosine, over layers and the tokens that are ``real`` (batch, length), of the features of two encoders."""
    cosines = [functional.cosine_similarity(one.float(), other.float(), dim=-1)[real].mean() for one, other in zip(own, dense, strict=True)]
    return torch.stack(cosines).mean()


def nearest(embeddings: Tensor) -> Tensor:
    """Return for each row of unit length the index of the other row with the largest cosine."""
    return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(1)


class Bert(nn.Module):
    """BERT's encoder, (batch, length) to (batch, length, width); id 0 is padding. Source: arXiv 1810.04805."""

    def __init__(self, vocabulary: int, positions: int, width: int, depth: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.norm, self.drop = nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout)
        self.layers = nn.ModuleList([Layer(width, heads, inner, dropout) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.states(x)[-1]

    def states(self, x: Tensor) -> list[Tensor]:
        """Return the features of the tokens (batch, length, width) after each layer."""
        seen = (x != 0)[:, None, None, :]
        tokens: Tensor = self.drop(self.norm(self.words(x) + self.positions.weight[: x.shape[1]]))
        found = []
        for layer in self.layers:
            tokens = layer(tokens, seen)
            found.append(tokens)
        return found


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + perceptron(x)); ``seen`` (batch, 1, 1, length) is False at padding."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm, self.norm = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.drop(self.output(mixed)))
        y: Tensor = self.norm(x + self.drop(self.down(functional.gelu(self.up(x)))))
        return y


_NAMES = {  # of Hugging Face's BERT, in a layer
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}


def load_bert(bert: Bert, file: Path) -> None:
    """Load Hugging Face's BERT weights (safetensors) into ``bert``; the embedding of segment 0 is added to the positions.

    Raises ImportError, naming the extra, without safetensors, and ValueError, naming the first keys, for weights that do not fit.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("reading model.safetensors needs safetensors: pip install 'lightning-sparse[text]'") from error
    found = {name.removeprefix("bert."): tensor for name, tensor in load_file(file).items()}
    state = {}
    for name in bert.state_dict():
        first, _, rest = name.partition(".")
        if first == "layers":
            number, place, kind = rest.split(".")
            place = next(theirs for theirs, ours in _NAMES.items() if ours == place)
            key = f"encoder.layer.{number}.{place}.{kind}"
        else:
            key = f"embeddings.{ {'words': 'word_embeddings', 'positions': 'position_embeddings', 'norm': 'LayerNorm'}[first] }.{rest}"
        if key in found:
            state[name] = found[key]
    segments = found.get("embeddings.token_type_embeddings.weight")
    if segments is not None and "positions.weight" in state:
        state["positions.weight"] = state["positions.weight"] + segments[0]
    layers = sum(name.endswith("intermediate.dense.weight") for name in found)
    own = bert.state_dict()
    wrong = [name for name in own if name not in state or own[name].shape != state[name].shape]
    if wrong or layers != len(bert.layers):
        raise ValueError(
            f"{file} does not fit: it has {layers} layers for {len(bert.layers)}, and {len(wrong)} entries are missing or of another "
            f"shape, first {wrong[:3]}; give the sizes of its config.json"
        )
    bert.load_state_dict(state)
