"""Groups under FSDP2 on two processes: the same results as DDP where no group is cut, else a refusal with the reason; exact resumes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_fsdp2 import network, whole
from torch import Tensor
from toys import Toy, data

from lightning_sparse import elementwise, penalties, scores
from lightning_sparse._parts import check_whole, part_of
from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning, PenaltyLoss, ReweightedPenalty, SparsityMonitor
from lightning_sparse.conformance.ranks import DDP, ShardedToy, obstacle, on_ranks, split
from lightning_sparse.conformance.toys import trainer
from lightning_sparse.structure import NM, Blocks, Channels, Columns, Rows, Structure

pytestmark = pytest.mark.slow
LOG_SUM = penalties.LogSum(eps=2.0)


@dataclass(frozen=True, repr=False)
class HalfRows(Structure):
    """The two halves of each row; it says nothing of its height."""

    def pool(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), 2, -1).sum(-1)

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        return value.repeat_interleave(like.shape[1] // 2, dim=1)


FORMS = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 0.3, threshold=0.05, structure=Rows()),
    "loss of blocks": partial(PenaltyLoss, LOG_SUM, 0.3, threshold=0.05, structure=Blocks((2, 3))),
    "prox": partial(AdaptiveProx, LOG_SUM, 0.1, structure=Rows()),
    "exact prox of blocks": partial(AdaptiveProx, LOG_SUM, 0.1, exact=True, freeze=0.3, structure=Blocks((2, 3))),
    "to a target": partial(ReweightedPenalty, LOG_SUM, target_sparsity=0.5, structure=Rows()),
    "pruning": partial(MagnitudePruning, 0.5, every=2, structure=Rows()),
    "pruning by Fisher": partial(MagnitudePruning, 0.5, every=2, structure=Rows(), score=scores.Fisher(0.5)),
    "2 of 4": partial(ReweightedPenalty, LOG_SUM, 1e-3, freeze=0.25, structure=NM(2, 4)),
}
RESUMED = {  # in a split file?
    "penalty": True, "exact prox of blocks": False, "to a target": True, "pruning": True, "pruning by Fisher": True, "2 of 4": False
}  # fmt: skip
REFUSED = {
    "columns": (Columns(), r"may have weights in all rows of 'network.0.weight', and FSDP2 gives each of 2 processes some of the rows"),
    "own": (HalfRows(), r"HalfRows\(\) may have weights in all rows"),
    "high blocks": (Blocks((3, 3)), r"has 3 rows, and FSDP2 gives each of 2 processes 8 rows of 'network.0.weight', which cuts groups"),
    "channels": (Channels(), r"a group has rows of one weight and columns of others"),
}


def run(rank, form, kind):
    """Return the final weights and figures of a run, and the groups that are left."""
    callback, module = FORMS[form](), (Toy if kind is DDP else ShardedToy)(network())
    monitor = SparsityMonitor(structure=Rows())  # silent beside groups of a callback's own
    done = trainer(callback, monitor, epochs=4, **(kind if kind is DDP else split()))
    done.fit(module, data(seed=2 * rank), data(seed=1))
    figures = {name: float(value) for name, value in done.callback_metrics.items()}
    return {"weights": whole(module), "figures": figures, "left": callback.groups_left()}


def resumed(rank, folder, form, path=None):
    """Fit with a file after each epoch, or resume from such a file; return the final weights and the groups that are left."""
    callback, module = FORMS[form](), ShardedToy(network())
    keeper = ModelCheckpoint(folder / f"{form}-{path is None}", filename="{epoch}", save_top_k=-1)
    options = split(save_distributed_checkpoint=RESUMED[form]) | {"enable_checkpointing": True}
    trainer(callback, keeper, epochs=4, **options).fit(module, data(seed=2 * rank), data(seed=1), ckpt_path=path)
    return {"weights": whole(module), "left": callback.groups_left(), "step": callback.step}


def refusal(rank, structure):
    try:
        trainer(ReweightedPenalty(LOG_SUM, 0.3, structure=structure), **split()).fit(ShardedToy(network()), data(seed=2 * rank))
    except ValueError as error:
        return str(error)
    return ""


def parts():
    """Return pooled and spread values of split weights, and a refusal of weights that are split by columns."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    found = {}
    for rows in (1, 5, 8):
        w = torch.arange(6.0 * rows).reshape(rows, 6)
        for structure in (Rows(), Blocks((1, 4)), Blocks((2, 4))):
            if rows == 5 and structure.height == 2:  # cut
                continue
            divided, part = distribute_tensor(w, mesh, [Shard(0)]), part_of(structure, "w")
            check_whole(structure, "w", divided)
            pooled = part.pool(divided)
            spread = part.spread(pooled, divided, 0.0)
            exact = torch.equal(elementwise.full_tensor(pooled), structure.pool(w))
            wanted = structure.spread(structure.pool(w), w).expand_as(w)
            found[rows, repr(structure)] = exact and torch.equal(elementwise.full_tensor(spread), wanted)
    try:
        check_whole(Rows(), "w", distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    except ValueError as error:
        return found, str(error)


def everything(rank, folder):
    if why := obstacle():
        return why
    answers = {form: {"ddp": run(rank, form, DDP), "split": run(rank, form, "split")} for form in FORMS}
    answers |= {name: refusal(rank, structure) for name, (structure, _) in REFUSED.items()}
    for form in RESUMED:
        first = resumed(rank, folder, form)
        answers["resumed", form] = first, resumed(rank, folder, form, folder / f"{form}-True" / "epoch=1.ckpt")
    return answers | {"parts": parts()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    answers = on_ranks(everything, tmp_path_factory.mktemp("groups"))
    if isinstance(answers[0], str):
        pytest.skip(answers[0])
    return answers


@pytest.mark.parametrize("form", FORMS)
def test_groups_of_split_weights_end_as_under_ddp(ranks, form):
    for answer in ranks:
        plain, divided = answer[form]["ddp"], answer[form]["split"]
        for name, value in plain["weights"].items():
            assert torch.equal(divided["weights"][name] == 0, value == 0), name
            torch.testing.assert_close(divided["weights"][name], value, rtol=1e-4, atol=1e-6)
        assert divided["figures"] == pytest.approx(plain["figures"], rel=1e-4)
        assert 0 < plain["figures"]["sparsity/total"] < 1
        assert divided["left"] == plain["left"]
    if form != "2 of 4":
        assert 0 < ranks[0][form]["split"]["figures"]["sparsity/groups"] < 1
    assert ranks[0][form]["split"]["left"] == ranks[1][form]["split"]["left"]


@pytest.mark.parametrize("form", RESUMED)
def test_a_resumed_run_ends_as_the_uninterrupted_one(ranks, form):
    for answer in ranks:
        first, second = answer["resumed", form]
        assert second["step"] == first["step"] > 0
        assert second["left"] == first["left"]
        for name, value in first["weights"].items():
            assert torch.equal(second["weights"][name], value), name
    assert any((value == 0).any() for value in ranks[0]["resumed", form][0]["weights"].values())


@pytest.mark.parametrize("name", REFUSED)
def test_structures_whose_groups_would_be_cut_are_refused_on_both_ranks_with_the_reason(ranks, name):
    for answer in ranks:
        with pytest.raises(ValueError, match=REFUSED[name][1]):
            raise ValueError(answer[name])


def test_each_process_pools_its_own_rows(ranks):
    for answer in ranks:
        found, refused = answer["parts"]
        assert len(found) == 8
        assert all(found.values()), found
        assert "split by rows alone, but 'w' is split as (Shard(dim=1),)" in refused
