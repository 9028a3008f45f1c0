"""FSDP2 (ModelParallelStrategy) on two processes: the same results as DDP, and exact resumes.

All runs share one pair of processes.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from toys import Toy, data

from lightning_sparse import elementwise, penalties
from lightning_sparse.callbacks import AdaptiveProx, ReweightedPenalty, SparsityMonitor
from lightning_sparse.conformance.ranks import DDP, ShardedToy, obstacle, on_ranks, split
from lightning_sparse.conformance.toys import trainer
from lightning_sparse.elementwise import kernels

pytestmark = pytest.mark.slow
LOG_SUM, MATRICES = penalties.LogSum(eps=2.0), ("network.0.weight", "network.2.weight", "network.3.weight")
FORMS = {
    "penalty": lambda: ReweightedPenalty(LOG_SUM, 0.5),
    "tabulated penalty": lambda: ReweightedPenalty(penalties.VariationalDropout(), 0.5),
    "frozen, kept zeros": lambda: ReweightedPenalty(LOG_SUM, 0.3, freeze=0.3, keep_zeros=True),
    "kernel": lambda: ReweightedPenalty(LOG_SUM, 0.5, compile=True),
    "prox": lambda: AdaptiveProx(LOG_SUM, 0.05),
    "prox, kernel": lambda: AdaptiveProx(LOG_SUM, 0.05, compile=True),
    "exact prox": lambda: AdaptiveProx(LOG_SUM, 0.05, exact=True, freeze=0.3),
    "numeric prox": lambda: AdaptiveProx(penalties.VariationalDropout(), 0.02, exact=True),
}
OPTIMIZERS = {"Adam": lambda p: torch.optim.Adam(p, 1e-2), "SGD": lambda p: torch.optim.SGD(p, 0.05)}
FILES = [(True, "Adam"), (True, "SGD"), (False, "Adam")]  # because Lightning 2.6 cannot resume a full checkpoint of plain SGD


def network():
    """Build layers of 3 rows and of 1 row, which two processes cannot share evenly; one process has none of the latter."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), nn.Linear(1, 3))
    layers[0].weight.data[:3] = 0.0
    return layers


# -- in each of the two processes -----------------------------------------------------------------------------------------------


def whole(module):
    return {name: elementwise.full_tensor(value).detach().clone() for name, value in module.state_dict().items()}


class Looks(Callback):
    """Record the callback's state of a weight during training."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            form = trainer.callbacks[0]
            said = {name: (form.zeros(name), form.thresholded(name), form.keep_probability(name)) for name in form.parameters}
            shapes = {name: [(type(x).__name__, tuple(x.shape)) for x in said[name]] for name in said}
            held = {name: [tuple(elementwise.local_part(x).shape) for x in said[name]] for name in said}
            zeros = {name: elementwise.full_tensor(said[name][0]) for name in said}
            self.seen = {"shapes": shapes, "held": held, "zeros": zeros, "figures": form.figures()}


def run(rank, form, kind, **options):
    """Return the final weights and figures of a run, and the records made during it."""
    module, looks = (Toy if kind is DDP else ShardedToy)(network(), **options), Looks()
    done = trainer(FORMS[form](), looks, SparsityMonitor(select=["*", "!network.0.*"]), epochs=4, **(kind if kind is DDP else split()))
    done.fit(module, data(seed=2 * rank), data(seed=1))
    figures = {name: float(value) for name, value in done.callback_metrics.items()}
    return {"weights": whole(module), "figures": figures, "seen": looks.seen}


def resumed(rank, folder, sharded, optimizer, path=None):
    """Fit with a file after each epoch, or resume from such a file."""
    module = ShardedToy(network(), OPTIMIZERS[optimizer], decay=16)
    keeper = ModelCheckpoint(folder / f"{sharded}-{optimizer}-{path is None}", filename="{epoch}", save_top_k=-1)
    options = split(save_distributed_checkpoint=sharded) | {"enable_checkpointing": True}
    done = trainer(ReweightedPenalty(LOG_SUM, 0.3, freeze=0.3), keeper, epochs=4, **options)
    done.fit(module, data(seed=2 * rank), data(seed=1), ckpt_path=path)
    return {"weights": whole(module), "step": done.callbacks[0].step}


def bad_data(rank):
    """Return the error message of a run in which one process has NaN in its batch."""
    loader = data(seed=2 * rank)
    if rank == 1:
        loader.dataset.tensors[0][20] = float("nan")
    try:
        trainer(ReweightedPenalty(LOG_SUM, 0.5), **split()).fit(ShardedToy(network()), loader)
    except FloatingPointError as error:
        return str(error)


def unfit_on_one(rank):
    """Return both processes' messages about a weight with a non-finite value in the shard of one process."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    w = torch.distributed.tensor.distribute_tensor(torch.zeros(4, 2), mesh, [torch.distributed.tensor.Shard(0)])
    if rank == 1:
        elementwise.local_part(w)[0, 0] = float("nan")
    return elementwise.count_nonfinite({"w": w})


def everything(rank, folder):
    if why := obstacle():
        return why
    answers = {}
    kernels._compile = lambda function, *_: lambda given: function(*given)  # replace the compiler by the function itself
    for form in FORMS:
        answers[form] = {"ddp": run(rank, form, DDP), "split": run(rank, form, "split")}
    for sharded, optimizer in FILES:
        first = resumed(rank, folder, sharded, optimizer)
        path = folder / f"{sharded}-{optimizer}-True" / "epoch=1.ckpt"
        answers[sharded, optimizer] = first, resumed(rank, folder, sharded, optimizer, path)
    return answers | {"NaN": bad_data(rank), "one part": unfit_on_one(rank)}


# -- in this process ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def ranks(folder):
    answers = on_ranks(everything, folder)
    if isinstance(answers[0], str):
        pytest.skip(answers[0])
    return answers


@pytest.mark.parametrize("form", FORMS)
def test_a_run_on_split_weights_ends_as_under_ddp(ranks, form):
    for answer in ranks:
        plain, divided = answer[form]["ddp"], answer[form]["split"]
        for name, value in plain["weights"].items():
            assert torch.equal(divided["weights"][name] == 0, value == 0)
            torch.testing.assert_close(divided["weights"][name], value, rtol=1e-4, atol=1e-6)
        assert divided["figures"] == pytest.approx(plain["figures"], rel=1e-4)
        assert 0 < plain["figures"]["sparsity/total"] < 1
    assert {k: v for k, v in ranks[0][form]["split"]["figures"].items() if not k.startswith("val")} == {
        k: v for k, v in ranks[1][form]["split"]["figures"].items() if not k.startswith("val")
    }


def test_messages_about_sharded_weights_are_complete_and_equal_on_all_ranks(ranks):
    first, second = (answer["penalty"]["split"]["seen"] for answer in ranks)
    sizes = dict(zip(MATRICES, [(16, 8), (1, 16), (3, 1)], strict=True))
    assert first["shapes"] == second["shapes"] == {name: [("DTensor", size)] * 3 for name, size in sizes.items()}
    assert second["held"]["network.2.weight"] == [(0, 16)] * 3
    assert first["figures"] == second["figures"]
    for name in sizes:
        assert torch.equal(first["zeros"][name], second["zeros"][name])
        assert first["figures"][f"sparsity/{name}"] == pytest.approx(float(first["zeros"][name].float().mean()))


@pytest.mark.parametrize(("sharded", "optimizer"), FILES)
def test_a_run_resumed_from_a_file_of_split_weights_ends_as_the_uninterrupted_one(ranks, sharded, optimizer):
    for answer in ranks:
        first, again = answer[sharded, optimizer]
        assert first["step"] == again["step"] == 16
        assert all(torch.equal(first["weights"][name], again["weights"][name]) for name in first["weights"])
        assert (first["weights"]["network.0.weight"] == 0).any()


def test_a_whole_file_has_zeros_and_loads_into_the_plain_module(ranks, folder):
    saved = torch.load(folder / "False-Adam-True" / "epoch=1.ckpt", weights_only=True)["state_dict"]
    plain = Toy(network())
    plain.load_state_dict(saved)
    assert {type(value) for value in saved.values()} == {torch.Tensor}
    assert (plain.network[0].weight == 0).any()
    assert not (plain.network[0].bias == 0).any()


def test_nonfinite_values_stop_both_processes(ranks):
    for answer in ranks:
        assert answer["one part"] == {"w": (1, 0)}
        assert "at optimiser step 1, from the loss of this rank or of another" in answer["NaN"]
