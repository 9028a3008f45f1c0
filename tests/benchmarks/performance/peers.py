"""Each peer, with the form of this package that does the same job, and where one can be had that is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning, ReweightedPenalty, VariationalDropout
from lightning_sparse.penalties import L1
from performance import jobs, peers_masks, peers_penalties
from performance.arms import KL_WEIGHT, LAM, PENALTY, only


@dataclass(frozen=True)
class Peer:
    """``ours`` names one of OURS; ``package`` is what must be importable, ``nets`` where the pair does the same job."""

    name: str
    ours: str
    prepare: jobs.Prepare
    package: str = "torch"
    install: str = ""
    nets: tuple[str, ...] = tuple(jobs.JOBS)


_EACH_EPOCH = jobs.JOBS["lenet"].epoch
_L1_LAM = 1e-5  # a lasso in Adam's metric: at LAM next to nothing would be left after a hundred steps
OURS: dict[str, jobs.Prepare] = {
    # of three epochs the first holds the ramp and the second is timed
    "MagnitudePruning after its ramp": only(lambda: MagnitudePruning(peers_masks.SHARE, begin=0.0, end=0.3)),
    "MagnitudePruning, pruning once an epoch": only(lambda: MagnitudePruning(peers_masks.SHARE, begin=0.0, end=0.99, every=_EACH_EPOCH)),
    "ReweightedPenalty": only(lambda: ReweightedPenalty(PENALTY, LAM)),
    "AdaptiveProx, exact, L1": only(lambda: AdaptiveProx(L1(), _L1_LAM, exact=True)),
    "VariationalDropout, weight": only(lambda: VariationalDropout(KL_WEIGHT, noise="weight")),
    "VariationalDropout, additive": only(lambda: VariationalDropout(KL_WEIGHT)),
}
TORCHAO, BAYESIAN = 'pip install "torchao>=0.18"', 'pip install "bayesian-torch>=0.5"'
PEERS = (
    Peer("ModelPruning, masks attached", "MagnitudePruning after its ramp", peers_masks.model_pruning),
    Peer(
        "ModelPruning, pruning once an epoch",
        "MagnitudePruning, pruning once an epoch",
        peers_masks.model_pruning_each_epoch,
        nets=("lenet",),  # where a window holds an epoch
    ),
    Peer("torch.nn.utils.prune", "MagnitudePruning after its ramp", peers_masks.by_hand),
    Peer("parametrize, a multiplying mask", "MagnitudePruning after its ramp", peers_masks.parametrized),
    Peer("torchao PruneOptimizer, lasso", "AdaptiveProx, exact, L1", peers_penalties.prune_optimizer, "torchao", TORCHAO),
    Peer("log-sum penalty in the loss", "ReweightedPenalty", peers_penalties.loss_term),
    Peer("bayesian-torch, one draw", "VariationalDropout, weight", peers_penalties.reparametrised, "bayesian_torch", BAYESIAN),
    Peer("bayesian-torch, Flipout", "VariationalDropout, additive", peers_penalties.flipout, "bayesian_torch", BAYESIAN),
)


def obstacle(peer: Peer, job: jobs.Job) -> str:
    """Why a peer cannot be timed here: not installed, or not to be had with this torch; "" where it can."""
    if find_spec(peer.package) is None:
        return f"not installed: {peer.install}"
    try:
        peer.prepare(job.build())
    except (ImportError, AttributeError) as error:  # installed, but made for another torch
        return f"does not run with this torch: {type(error).__name__}: {error}"
    return ""


def installed() -> list[str]:
    """The distributions of the peers that are installed, whose versions a record names."""
    return sorted({peer.package.replace("_", "-") for peer in PEERS if peer.install and find_spec(peer.package)})
