"""Arms of the benchmark: network, form, penalty and strengths."""

from __future__ import annotations

from dataclasses import dataclass

Words = tuple[str, ...]

LEVELS = (90.0, 95.0, 98.0, 98.5)  # zeros in %, at which the forms are compared
GAP_SAMPLES = 16  # masks drawn at each epoch's end to measure the duality gap


@dataclass(frozen=True)
class Net:
    """A network: packaged recipe, length of runs, strengths of LogSum(2), shares of zeros for pruning."""

    title: str
    recipe: str
    epochs: int
    lams: tuple[float, ...]
    sparsities: tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """A line of the grid or of a study; ``words`` are what ``lightning-sparse fit`` takes beside the recipe and the strength.

    ``first``: a run that begins with these words instead, for the share ``switch`` of its epochs.
    """

    name: str
    net: str
    penalty: str  # "" where the form has none
    form: str
    calibrated: str  # "yes", "no", or "" where there is nothing to calibrate
    words: Words
    strengths: tuple[float, ...]
    strength: str = "--sparsify.lam.lam"
    study: str = ""
    variant: str = ""
    first: Words = ()
    switch: float = 0.0


NETS = {
    "lenet_300_100": Net("LeNet-300-100", "exchange/lenet_300_100", 60, (1e-4, 3e-4, 1e-3, 2e-3, 4e-3), (0.9, 0.95, 0.98, 0.985, 0.99)),
    "lenet_5": Net("LeNet-5", "exchange/lenet_5", 12, (5e-4,), (0.9, 0.95, 0.98)),
    "vit": Net("ViT", "exchange/vit", 12, (1e-3,), (0.3, 0.6, 0.8)),
}
# omega'(0+) of LogSum(2) is 1/2 and of MCP(1) is 1: half the lam pulls small weights as hard
PENALTIES: dict[str, tuple[str, Words, float]] = {
    "logsum": ("LogSum(2)", (), 1.0),
    "mcp": ("MCP(1)", ("--sparsify.penalty", "MCP", "--sparsify.penalty.c", "1.0"), 0.5),
}
# the callback's defaults, which suit runs of a few thousand steps
WHOLE: Words = ("--sparsify.ceiling", "10", "--sparsify.alpha_min", "1e-3", "--sparsify.remainder", "false")  # noise for all of the penalty
PLAIN: Words = ("--sparsify", "AdaptiveMask", "--sparsify.gap_samples", str(GAP_SAMPLES), *WHOLE)
# H averaged over a thousand steps, and a weight gone only where its noise is ten times as large as it is (study "mask")
MASK: Words = (*PLAIN, "--sparsify.curvature", "EmpiricalFisher", "--sparsify.curvature.decay", "0.999", "--sparsify.tol", "0.01")
UNCALIBRATED: Words = (*PLAIN, "--sparsify.curvature", "null")
UNCALIBRATED_LAMS = (1e-3,)  # one is enough to see that next to nothing is removed
FORMS: dict[str, tuple[str, str, Words]] = {
    "penalty": ("ReweightedPenalty", "", ()),
    "mask": ("AdaptiveMask", "yes", MASK),
    "mask_uncalibrated": ("AdaptiveMask", "no", UNCALIBRATED),
}
_RAMP = ("--sparsify.begin", "0.1", "--sparsify.end", "0.6", "--sparsify.scope", "global")
PRUNING: Words = ("--sparsify", "MagnitudePruning", *_RAMP, "--sparsify.freeze", "0.25", "--model.restart", "0.75")


def grid() -> list[Arm]:
    """Return all arms of the grid; the smaller networks have only LogSum(2)."""
    arms: list[Arm] = []
    for net in NETS:
        for penalty in PENALTIES if net == "lenet_300_100" else ("logsum",):
            arms += [arm(net, penalty, form) for form in FORMS]
        arms.append(Arm(f"{net}/pruning", net, "", "MagnitudePruning", "", PRUNING, NETS[net].sparsities, "--sparsify.sparsity"))
    return arms


def arm(net: str, penalty: str, form: str) -> Arm:
    """Return the arm of one form of one penalty on one network."""
    title, words, factor = PENALTIES[penalty]
    shown, calibrated, own = FORMS[form]
    strengths = [lam for lam in NETS[net].lams if form != "mask_uncalibrated" or lam in UNCALIBRATED_LAMS]
    lams = tuple(float(f"{factor * lam:.12g}") for lam in strengths or NETS[net].lams)
    return Arm(f"{net}/{penalty}/{form}", net, title, shown, calibrated, (*own, *words), lams)
