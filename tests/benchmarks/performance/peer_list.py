"""Other packages ("peers"): the callback of this package for the same task, and how to install the peer."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning, ReweightedPenalty, VariationalDropout
from lightning_sparse.penalties import L1
from performance import jobs, peers_masks, peers_penalties
from performance.arms import KL_WEIGHT, LAM, PENALTY, PLAIN, only


@dataclass(frozen=True)
class Peer:
    """``ours`` names one of OURS; ``package`` is what must be importable."""

    name: str
    ours: str
    prepare: jobs.Prepare
    package: str = "torch"
    install: str = ""


_L1_LAM = 1e-5  # a lasso in Adam's metric: at LAM next to nothing would be left after a hundred steps
OURS: dict[str, jobs.Prepare] = {
    # the ramp lies within the first turn, which warms up, of up to 48 rounds
    "MagnitudePruning after its ramp": only(lambda: MagnitudePruning(peers_masks.SHARE, begin=0.0, end=0.02)),
    "ReweightedPenalty": only(lambda: ReweightedPenalty(PENALTY, LAM)),
    "AdaptiveProx, exact, L1": only(lambda: AdaptiveProx(L1(), _L1_LAM, exact=True)),
    "VariationalDropout, weight": only(lambda: VariationalDropout(KL_WEIGHT, noise="weight")),
    "VariationalDropout, additive": only(lambda: VariationalDropout(KL_WEIGHT)),
}
TORCHAO, BAYESIAN = 'pip install "torchao>=0.18"', 'pip install "bayesian-torch>=0.5"'
PEERS = (
    Peer("ModelPruning, masks attached", "MagnitudePruning after its ramp", peers_masks.model_pruning),
    Peer("torch.nn.utils.prune", "MagnitudePruning after its ramp", peers_masks.by_hand),
    Peer("parametrize, a multiplying mask", "MagnitudePruning after its ramp", peers_masks.parametrized),
    Peer("torchao PruneOptimizer, lasso", "AdaptiveProx, exact, L1", peers_penalties.prune_optimizer, "torchao", TORCHAO),
    Peer("log-sum penalty in the loss", "ReweightedPenalty", peers_penalties.loss_term),
    Peer("bayesian-torch, one draw", "VariationalDropout, weight", peers_penalties.reparametrised, "bayesian_torch", BAYESIAN),
    Peer("bayesian-torch, Flipout", "VariationalDropout, additive", peers_penalties.flipout, "bayesian_torch", BAYESIAN),
)


def of(arm: str) -> jobs.Prepare:
    """Return a peer, a callback of ours or the plain run by name, for a child process."""
    theirs = {peer.name: peer.prepare for peer in PEERS}
    return jobs.plain if arm == PLAIN else (OURS | theirs)[arm]


def obstacle(peer: Peer, job: jobs.Job) -> str:
    """Return why a peer cannot be timed (not installed, or not compatible with this torch), or ""."""
    if find_spec(peer.package) is None:
        return f"not installed: {peer.install}"
    try:
        peer.prepare(job.build())
    except (ImportError, AttributeError) as error:  # installed, but made for another torch
        return f"does not run with this torch: {type(error).__name__}: {error}"
    return ""


def installed() -> list[str]:
    """Return the installed distributions of the peers, whose versions are recorded."""
    return sorted({peer.package.replace("_", "-") for peer in PEERS if peer.install and find_spec(peer.package)})
