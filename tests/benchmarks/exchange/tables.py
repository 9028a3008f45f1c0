"""Tables of docs/exchange.md from the recorded runs; missing runs are marked."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from exchange.frontier import Point, Runs, error_at, frontier, points
from exchange.grid import LEVELS, NETS, PENALTIES, arm
from lightning_sparse.reproduction.table import spread

MISSING = "not run yet"
WITHIN_FACTOR, WITHIN_POINTS = 1.3, 0.3


def of_arm(runs: Runs, name: str) -> Runs:
    """Return the runs of one arm."""
    return [run for run in runs if run["arm"] == name]


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Format a Markdown table."""
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)])


def equal_lambda(runs: Runs) -> str:
    """Format the non-zero shares of both forms at each lam, and their ratio."""
    head = ["penalty", "lam", "penalty form: non-zero %", "test error %", "mask form: non-zero %", "test error %", "mask / penalty"]
    head += [f"within {WITHIN_FACTOR:g}", "mask, uncalibrated: non-zero %", "test error %"]
    return table([*head, "pruning at the penalty form's share: test error %"], equal_lambda_rows(runs))


def equal_lambda_rows(runs: Runs) -> Iterator[Sequence[str]]:
    """The table's rows."""
    pruned = points(of_arm(runs, "lenet_300_100/pruning"))
    for penalty, (title, _, _) in PENALTIES.items():
        for lam in arm("lenet_300_100", penalty, "penalty").strengths:
            forms = [[run for run in of_arm(runs, f"lenet_300_100/{penalty}/{form}") if run["lam"] == lam] for form in _FORMS]
            ours, masked, plain = (figures(form) for form in forms)
            plain = plain if lam in arm("lenet_300_100", penalty, "mask_uncalibrated").strengths else ("", "")
            yield title, f"{lam:g}", *ours, *masked, *ratio(forms[1], forms[0]), *plain, _read(pruned, forms[0])


_FORMS = ("penalty", "mask", "mask_uncalibrated")


def figures(runs: Runs) -> tuple[str, str]:
    """Format share of non-zero weights in the file and test error as mean (standard deviation), in %."""
    share, error = (spread([run[name] for run in runs]) for name in ("nonzero_file", "test_error"))
    return share or MISSING, error or MISSING


def mean_share(runs: Runs) -> float:
    """Return the mean share of non-zero weights in the file, in %."""
    return float(statistics.mean(run["nonzero_file"] for run in runs))


def ratio(runs: Runs, reference: Runs) -> tuple[str, str]:
    """Format the ratio of mean shares, and whether it is within the factor; empty without runs."""
    if not runs or not reference or not mean_share(reference):
        return "", ""
    found = round(mean_share(runs) / mean_share(reference), 2)
    return f"{found:.2f}", "yes" if round(1 / WITHIN_FACTOR, 2) <= found <= WITHIN_FACTOR else "no"


def _read(found: Sequence[Point], at: Runs) -> str:
    """Return a frontier's test error at the share of some runs."""
    if not found or not at:
        return MISSING
    error = error_at(found, mean_share(at))
    return f"{error:.2f}" if error is not None else _outside(found)


def _outside(found: Sequence[Point]) -> str:
    sparsest, densest = (f"{100 - share:.1f}" for share in (frontier(found)[0].share, max(point.share for point in found)))
    return f"only at {sparsest} % zeros" if sparsest == densest else f"spans {densest} to {sparsest} % zeros"


def levels(runs: Runs) -> str:
    """Format test errors at given shares of zeros, from the frontiers."""
    head = ["penalty", "zeros %", "penalty form: test error %", "mask form: test error %", "mask - penalty, points"]
    head += [f"at most {WITHIN_POINTS:g} above", "mask, uncalibrated", "pruning"]
    return table(head, level_rows(runs))


def level_rows(runs: Runs) -> Iterator[Sequence[str]]:
    """The table's rows."""
    for penalty, (title, _, _) in PENALTIES.items():
        names = [f"lenet_300_100/{penalty}/{form}" for form in _FORMS]
        found = [points(of_arm(runs, name)) for name in (*names, "lenet_300_100/pruning")]
        for zeros in LEVELS:
            ours, masked, *others = (_level(line, zeros) for line in found)
            yield title, f"{zeros:g}", ours, masked, *_difference(found[1], found[0], zeros), *others


def _level(found: Sequence[Point], zeros: float) -> str:
    error = error_at(found, 100 - zeros)
    return f"{error:.2f}" if error is not None else _outside(found) if found else MISSING


def _difference(found: Sequence[Point], reference: Sequence[Point], zeros: float) -> tuple[str, str]:
    mask, penalty = (error_at(line, 100 - zeros) for line in (found, reference))
    if mask is None or penalty is None:
        return "", ""
    apart = round(mask - penalty, 2)
    return f"{apart:+.2f}", "yes" if apart <= WITHIN_POINTS else "no"


def networks(runs: Runs) -> str:
    """Format the other networks: every form at one lam, pruning at some shares, and minutes per run."""
    head = ["network", "form", "penalty", "lam, or pruning's zeros", "non-zero %", "val error %", "test error %", "mask / penalty"]
    head += [f"within {WITHIN_FACTOR:g}", "minutes a run", "seeds"]
    return table(head, _networks(runs))


def _networks(runs: Runs) -> Iterator[Sequence[str]]:
    for net in list(NETS)[1:]:
        for name in (*(f"{net}/logsum/{form}" for form in _FORMS), f"{net}/pruning"):
            found = of_arm(runs, name)
            for strength in sorted({run["lam"] for run in found}) or [None]:
                own = [run for run in found if run["lam"] == strength]
                base = [run for run in of_arm(runs, f"{net}/logsum/penalty") if run["lam"] == strength]
                yield NETS[net].title, _form(name), *_network(own, strength), *ratio(own, [] if own == base else base), *_cost(own)


def _form(name: str) -> str:
    return {"penalty": "penalty", "mask": "mask, calibrated", "mask_uncalibrated": "mask, uncalibrated"}.get(name.split("/")[-1], "pruning")


def _network(runs: Runs, strength: float | None) -> tuple[str, str, str, str, str]:
    share, error = figures(runs)
    return runs[0]["penalty"] if runs else "", "" if strength is None else f"{strength:g}", share, _val(runs), error


def _val(runs: Runs) -> str:
    return spread([run["val_error"] for run in runs]) or MISSING


def _cost(runs: Runs) -> tuple[str, str]:
    minutes = spread([run["seconds"] / 60 for run in runs], 1)
    return minutes, ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
