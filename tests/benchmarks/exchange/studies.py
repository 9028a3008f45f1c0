"""Studies: changes of one setting of the mask form, for LeNet-300-100 and LogSum(2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exchange.grid import GAP_SAMPLES, MASK, PLAIN, Arm, Words, arm

LAMS = (3e-4, 1e-3)
SWITCHES = (1 / 6, 1 / 3)  # shares of the run after which the mask form gives way to the penalty form


def _curvature(kind: str, **settings: float) -> Words:
    return (
        "--sparsify.curvature",
        kind,
        *(word for name, value in settings.items() for word in (f"--sparsify.curvature.{name}", str(value))),
    )


def _frozen(share: float) -> Words:
    return "--sparsify.freeze", str(share), "--model.restart", str(1 - share)


# study: (variant, words); what is as in the grid is not run again
_VARIANTS: dict[str, dict[str, Words]] = {
    "mask": {
        "decay 0.9, tol 0.05": _curvature("EmpiricalFisher", decay=0.9),
        "decay 0.99, tol 0.05": _curvature("EmpiricalFisher", decay=0.99),
        "decay 0.999, tol 0.05": _curvature("EmpiricalFisher", decay=0.999),
        "SampledFisher, decay 0.999, tol 0.05": _curvature("SampledFisher", decay=0.999),
        "decay 0.999, tol 0.05, ceiling 1": (*_curvature("EmpiricalFisher", decay=0.999), "--sparsify.ceiling", "1"),
        "decay 0.999, tol 0.05, alpha_min 0.1": (*_curvature("EmpiricalFisher", decay=0.999), "--sparsify.alpha_min", "0.1"),
    },
    "curvature": {
        "EmpiricalFisher, every step": _curvature("EmpiricalFisher", decay=0.999, every=1),
        "EmpiricalFisher, every 50 steps": _curvature("EmpiricalFisher", decay=0.999, every=50),
        "SampledFisher, every 10 steps": _curvature("SampledFisher", decay=0.999),
    },
    "ceiling": {f"ceiling {value}": ("--sparsify.ceiling", str(value)) for value in (3, 100)},
    "alpha_min": {f"alpha_min {value}": ("--sparsify.alpha_min", value) for value in ("1e-1", "1e-2")},
    "tol": {f"tol {value}": ("--sparsify.tol", str(value)) for value in (0.02, 0.05)},
    "freeze": {f"freeze {value}": _frozen(value) for value in (0.1, 0.25)},
    "rate": {"one cosine over the whole run": ("--model.restart", "null")},
    "warm-up": {"lam warmed up over 10 %": ("--sparsify.lam.share", "0.1")},
    "noise": {
        "Bernoulli, on the weights": ("--sparsify.noise", "ScaledBernoulli"),
        "Gaussian, on the weights": ("--sparsify.noise", "Gaussian", "--sparsify.noise.local", "false"),
        "on the outputs of half the samples": ("--sparsify.noise.share", "0.5"),
        "on the outputs of a quarter of them": ("--sparsify.noise.share", "0.25"),
    },
    "samples": {f"EmpiricalFisher of {value} samples": _curvature("EmpiricalFisher", decay=0.999, samples=value) for value in (4, 64)},
    "switch": {},
}
_OF_BOTH = ("freeze", "rate", "warm-up")
STUDIES = tuple(_VARIANTS)
ABOUT = {
    "mask": "how long H is averaged (decay, the weight of the past in its mean, a step; elsewhere 0.999) and where a weight counts as "
    "zero (alpha < tol; elsewhere 0.01), all with freeze 0.25",
    "curvature": "the estimate of H (elsewhere: EmpiricalFisher, every 10 steps)",
    "ceiling": "the largest lam / H (10 elsewhere)",
    "alpha_min": "the smallest keep probability that noise is drawn with (1e-3 elsewhere)",
    "tol": "the keep probability below which a weight counts as zero (0.01 elsewhere), in the mask form",
    "freeze": "the last share of training, without noise and with the support frozen (0.5 elsewhere), in both forms",
    "rate": "the learning rate (elsewhere it falls to 0 before the support is frozen, and again after), in both forms",
    "warm-up": "the share of training over which lam rises (30 % elsewhere), in both forms",
    "noise": "the noise (default: Gaussian, on the outputs)",
    "samples": "samples of a batch that an estimate looks at (default 16), on LeNet-5: a Linear layer takes the whole batch anyway",
    "switch": "the mask form first, then the penalty form, resumed from its checkpoint",
}


def study(name: str) -> list[Arm]:
    """Return the arms of a study."""
    if name == "switch":
        return [_switched(share) for share in SWITCHES]
    net = "lenet_5" if name == "samples" else "lenet_300_100"
    base = arm(net, "logsum", "mask")
    base = replace(base, words=(*PLAIN, *_frozen(0.25))) if name == "mask" else base
    arms = [_varied(base, name, variant, words) for variant, words in _VARIANTS[name].items()]
    if name in _OF_BOTH:
        arms += [_varied(arm(net, "logsum", "penalty"), name, variant, words) for variant, words in _VARIANTS[name].items()]
    return arms


def references(made: Sequence[Arm]) -> tuple[str, str, str]:
    """Return a study's references: a label, and the arms of the penalty form and the mask form."""
    if made[0].study == "mask":
        return "freeze 0.25, tol 0.01", "study/freeze/penalty/freeze_0.25", "study/freeze/mask/freeze_0.25"
    return "as elsewhere", f"{made[0].net}/logsum/penalty", f"{made[0].net}/logsum/mask"


def same_schedule(made: Arm, penalty: str) -> str:
    """Return the penalty form's arm with the schedule of this arm; ``penalty`` is the study's reference."""
    return made.name.replace("/mask/", "/penalty/") if made.study in _OF_BOTH else penalty


def _varied(base: Arm, name: str, variant: str, words: Words) -> Arm:
    kept = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in variant.replace(", ", "_"))
    lams = base.strengths if base.net != "lenet_300_100" else LAMS
    changed = (*base.words, *words)
    return replace(
        base, name=f"study/{name}/{base.name.rpartition('/')[2]}/{kept}", study=name, variant=variant, words=changed, strengths=lams
    )


def _switched(share: float) -> Arm:
    base = arm("lenet_300_100", "logsum", "penalty")
    variant, words = f"mask for {share:.0%} of the epochs, then penalty", ("--sparsify.gap_samples", str(GAP_SAMPLES))
    made = _varied(base, "switch", variant, words)
    return replace(
        made, name=f"study/switch/{share:.2f}", form="AdaptiveMask, then ReweightedPenalty", calibrated="yes", first=MASK, switch=share
    )
