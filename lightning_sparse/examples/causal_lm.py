"""A causal language model of transformers, sharded by FSDP2 where the strategy is ModelParallelStrategy."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_sparse import _checks

_EXTRA = "CausalLM needs transformers: pip install 'lightning-sparse[language]'"


class CausalLM(LightningModule):
    """Trains a causal language model of transformers, such as a Llama, on windows of tokens.

    x and y have shape (batch, length): token ids, and those one place later. Under ``ModelParallelStrategy`` each block is sharded
    over the processes by FSDP2: weights and optimiser in float32, computation in ``compute``, gradients summed in float32. Every
    process reads the whole model into memory first. Logs ``train/loss`` and ``val/loss``, ``test/loss``, the cross-entropy in nats a
    token. Trained by AdamW; the learning rate decays to 0 as half a cosine.

    Args:
        name: a Hugging Face name, or a folder with ``config.json`` and weights. Required in a fit.
        pretrained: load the weights; False initialises them at random.
        lr: the initial learning rate.
        weight_decay: of AdamW.
        compute: precision of the computation in sharded blocks, "bfloat16" or "float32".

    Raises ImportError, naming the extra, without transformers.
    """

    def __init__(
        self, name: str | None = None, pretrained: bool = True, lr: float = 2e-5, weight_decay: float = 0.0, compute: str = "bfloat16"
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name, self.pretrained = name, _checks.truth("pretrained", pretrained)
        self.lr, self.weight_decay = _checks.positive("lr", lr), _checks.between("weight_decay", weight_decay, 0, float("inf"), closed="l")
        self.compute = getattr(torch, _checks.one_of("compute", compute, ("bfloat16", "float32")))
        self.network: Any = None

    def configure_model(self) -> None:
        """Build the network, once, and shard it if the strategy has a device mesh."""
        if self.network is None:
            self.network = _built(self.name, self.pretrained)
        if self.device_mesh is not None:
            _shard(self.network, self.device_mesh["data_parallel"], self.compute)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.network(input_ids=x, use_cache=False).logits
        return scores.transpose(1, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val/loss", self._loss(batch), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("test/loss", self._loss(batch), sync_dist=True)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _built(name: str | None, pretrained: bool) -> nn.Module:
    if name is None:
        raise ValueError("give --model.name, a Hugging Face name or a folder with config.json")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    if pretrained:
        network: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    else:
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32)
    return network.train()


def _shard(network: nn.Module, mesh: Any, compute: torch.dtype) -> None:
    """Shard each block of the longest list of blocks, then the rest. A network that is sharded already stays as it is."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if isinstance(network, FSDPModule):
        return
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    blocks = max((part for part in network.modules() if isinstance(part, nn.ModuleList)), key=len, default=())
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
