"""DDP on two processes: gradients under masks, batch size, agreement of ranks, and errors that no rank waits for forever.

All runs share one pair of processes. The conformance suite checks equal zeros on all ranks and exact resumes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Spy, Toy, data, weights

from lightning_sparse import duality, noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.conformance.ranks import DDP, on_ranks
from lightning_sparse.conformance.toys import trainer
from lightning_sparse.curvature import EmpiricalFisher

slow = pytest.mark.slow
LOG_SUM, LAM, SEED, RATE = penalties.LogSum(eps=2.0), 0.5, 7, 0.1
NOISES = {"Bernoulli": noise.ScaledBernoulli(), "local": noise.Gaussian(local=True)}
FORMS = {"penalty": ReweightedPenalty, "prox": AdaptiveProx}


def sgd(parameters):
    return torch.optim.SGD(parameters, RATE)


# -- in each of the two processes -----------------------------------------------------------------------------------------------


def masked(rank, kind):
    """Return the live weights after three steps with masks, with a different seed and different data on each rank."""
    module, seen = Toy(optimizer=sgd), {}
    torch.manual_seed(SEED + rank)
    look = lambda moment, module: seen.update(weights(module)) if moment == "batch end" else None  # noqa: E731
    mask = AdaptiveMask(LOG_SUM, LAM, noise=NOISES[kind], curvature=None)
    trainer(mask, Spy(look), epochs=1, **DDP).fit(module, data(48, seed=rank))
    return seen


def halved(rank, kind):
    """Give each rank half of every batch."""
    module, (x, y) = Toy(), data().dataset.tensors
    run = trainer(FORMS[kind](LOG_SUM, LAM, freeze=0.2), epochs=3, **DDP)
    run.fit(module, DataLoader(TensorDataset(x[rank::2], y[rank::2]), batch_size=8))
    return weights(module), {name: float(value) for name, value in run.callback_metrics.items()}


def failed(rank, callback, *others, batches=(4, 4), bad=False):
    """Return the error message of a run with that many batches on this rank, or an empty one."""
    module = Toy()
    module.allow_zero_length_dataloader_with_multiple_devices = True
    loader = data(16 * batches[rank])
    loader.dataset.tensors[0][20:21] *= float("nan") if bad else 1.0  # in the second batch
    try:
        trainer(callback, *others, **DDP).fit(module, loader)
    except (RuntimeError, FloatingPointError) as error:
        return str(error)
    return ""


class Tamper(Callback):
    """Apply a change on rank 1 only, after the first batch of the first epoch."""

    def __init__(self, change):
        self.change = change

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_rank == 1 and trainer.global_step == 1:
            self.change(pl_module, trainer.callbacks[0])


def change_weight(module, callback):
    module.network[2].weight.data[0, 0] += 1e-6


def change_threshold(module, callback):
    callback.tol = 0.9


def disagreements(rank):
    penalty = lambda tol=0.05: ReweightedPenalty(LOG_SUM, 1e-3, tol=tol)  # noqa: E731
    rules = [duality.CallableRule(lambda w: w / (1 + w)), duality.CallableRule(lambda w: w / (1 + w))]
    return {
        "nothing": failed(rank, penalty()),
        "address": failed(rank, AdaptiveMask(rules[rank], curvature=None)),
        "weight": failed(rank, penalty(), Tamper(change_weight)),
        "zeros": failed(rank, penalty(), Tamper(change_threshold)),
        "argument": failed(rank, penalty(0.05 + rank / 100)),
        "batches": failed(rank, penalty(), batches=(4, 3)),
        "no batches": failed(rank, penalty(), batches=(4, 0)),
        "NaN": failed(rank, AdaptiveMask(LOG_SUM, LAM, noise=noise.Gaussian()), bad=rank == 1),
        "one rank's file": damaged(rank),
    }


def damaged(rank):
    """Return the error message if the file to resume from is damaged only on rank 0."""
    module = Toy()
    run = trainer(ReweightedPenalty(LOG_SUM, 1e-3), epochs=1)
    run.fit(module, data())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.ckpt"
        run.save_checkpoint(path)
        raw = bytearray(path.read_bytes())
        raw[raw.find(module.network[0].weight.detach().numpy().tobytes()) + 2] ^= 1 - rank
        path.write_bytes(raw)
        try:
            trainer(ReweightedPenalty(LOG_SUM, 1e-3), epochs=2, **DDP).fit(Toy(), data(), ckpt_path=path)
        except ValueError as error:
            return str(error)
    return ""


class Branching(Toy):
    """A network of which rank 1 skips a layer; its last batch is smaller than rank 0's."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.network[:2](x)
        return self.network[2](hidden) + (self.extra(hidden) if self.global_rank == 0 else 0)


def branching(rank):
    """Return the weights of a run with a layer unused on one rank and uneven last batches."""
    module = Branching()
    torch.manual_seed(rank)
    mask = AdaptiveMask(LOG_SUM, 0.05, curvature=EmpiricalFisher(every=1), gap_samples=2)
    run = trainer(mask, **(DDP | {"strategy": "ddp_find_unused_parameters_true"}))
    run.fit(module, data(64 - 11 * rank, seed=rank))
    figures = {name: float(value) for name, value in run.callback_metrics.items()}
    return weights(module), {name: value.clone() for name, value in mask.curvature.mean.items()}, figures


def everything(rank):
    runs = {f"masked {kind}": masked(rank, kind) for kind in NOISES} | {f"halved {kind}": halved(rank, kind) for kind in FORMS}
    return runs | {"branching": branching(rank)} | disagreements(rank)


# -- in this process ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(everything)


def enumerated(kind):
    """Simulate both ranks in one process: draw both masks and average the gradients."""
    module = Toy()
    matrices = {name: p for name, p in module.named_parameters() if p.dim() == 2}
    streams = lambda rank, draw, *place: noise.generator_for(torch.device("cpu"), SEED, rank, draw, *place)  # noqa: E731
    for draw, batches in enumerate(zip(data(48, seed=0), data(48, seed=1), strict=True), start=1):
        alpha = {name: duality.keep_probability(LOG_SUM.eta_hat(w.detach()), LAM).clamp(min=1e-3) for name, w in matrices.items()}
        whole = torch.cat([value.flatten() for value in alpha.values()])  # because one stream draws the masks of all weights
        losses = []
        for rank, (x, y) in enumerate(batches):
            drawn = NOISES["Bernoulli"].sample(whole, streams(rank, draw, -1, -1)).split([w.numel() for w in matrices.values()])
            for index, (name, layer) in enumerate(zip(matrices, (module.network[0], module.network[2]), strict=True)):
                if kind == "Bernoulli":
                    x = nn.functional.linear(x, layer.weight * drawn[index].view_as(layer.weight), layer.bias)
                else:
                    spread = (x**2 @ (layer.weight**2 * (1 - alpha[name]) / alpha[name]).T).sqrt()
                    x = layer(x) + spread * torch.randn(spread.shape, generator=streams(rank, draw, index, 0))
                x = x if index else x.relu()
            losses.append(nn.functional.cross_entropy(x, y))
        grads = torch.autograd.grad(sum(losses) / 2, list(module.parameters()))
        for parameter, grad in zip(module.parameters(), grads, strict=True):
            parameter.data -= RATE * grad
    return weights(module)


@slow
@pytest.mark.parametrize("kind", NOISES)
def test_masks_of_two_ranks_give_the_mean_of_their_gradients(ranks, kind):
    expected = enumerated(kind)
    for answer in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(answer[f"masked {kind}"][name], value, rtol=1e-4, atol=1e-6)
            assert not torch.equal(value, weights(Toy())[name])


@slow
@pytest.mark.parametrize("kind", FORMS)
def test_two_ranks_equal_one_with_the_double_batch(ranks, kind):
    module = Toy()
    run = trainer(FORMS[kind](LOG_SUM, LAM, freeze=0.2), epochs=3)
    run.fit(module, data(batch_size=16))
    for held, figures in (answer[f"halved {kind}"] for answer in ranks):
        for name, value in weights(module).items():
            assert torch.equal(held[name] == 0, value == 0)
            torch.testing.assert_close(held[name], value, rtol=1e-4, atol=1e-6)
        assert figures == pytest.approx({name: float(value) for name, value in run.callback_metrics.items()}, rel=1e-5)
    assert (module.network[0].weight == 0).any()


MESSAGES = {
    "nothing": "",
    "address": "",
    "weight": "'network.2.weight' differs on rank 1 from rank 0 at the end of epoch 0: the ranks no longer train one model",
    "zeros": "'network.0.weight' differs on rank 1 from rank 0",
    "argument": "ReweightedPenalty differs on rank 1 from rank 0: its arguments",
    "batches": "different numbers of training batches (rank 0: 4, rank 1: 3)",
    "no batches": "different numbers of training batches (rank 0: 4, rank 1: 0)",
    "NaN": "at optimiser step 1, from the loss of this rank or of another; the weights are those before this batch",
    "one rank's file": "is damaged: its entry",
}


@slow
@pytest.mark.parametrize("what", MESSAGES)
def test_ranks_that_disagree_raise_together(ranks, what):
    for answer in ranks:
        assert MESSAGES[what] in answer[what]
        assert bool(MESSAGES[what]) == bool(answer[what])


@slow
def test_a_layer_unused_on_one_rank_and_uneven_last_batches(ranks):
    (first, curvature, figures), (second, other, others) = (answer["branching"] for answer in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert figures == others
    assert (first["network.0.weight"] == 0).any()
    assert curvature.keys() == other.keys() == {"network.0.weight", "network.2.weight", "extra.weight"}
    assert all(torch.equal(curvature[name], other[name]) for name in curvature)
    assert curvature["extra.weight"].any()


def on_gpus(rank):
    module = Toy(seed=rank)
    torch.manual_seed(rank)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(max_epochs=3, accelerator="gpu", devices=2, strategy="ddp", callbacks=[AdaptiveMask(LOG_SUM, LAM)], **quiet)
    run.fit(module, data(batch_size=8))
    return {name: value.cpu() for name, value in weights(module).items()}


@slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_hold_the_same_zeros():
    first, second = on_ranks(on_gpus)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["network.0.weight"] == 0).any()
