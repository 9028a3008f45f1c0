"""Profile each callback's part of a step: python tests/benchmarks/performance profiles

LeNet-300-100 at batch 128 in a Trainer, by torch's profiler: time in each operator itself, beyond the plain run's; what is left
of the step ("between operators": Python, dispatch, the profiler's own work); and, from a shorter run that records the Python
stack, the operators' time by the function of this package that called them. Writes results/profiles.json and draws a
panel a form into docs/performance/profiles.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from performance import arguments, operators, record, tables
from performance.cases import FORMS
from performance.jobs import JOBS, be_quiet

PLAIN, OTHERS, BETWEEN, ALL = "plain", "other operators", "between operators", "everything"
SHOWN = 10  # operators and functions of each form
JOB = JOBS["lenet"]
PICTURE = Path(__file__).resolve().parents[3] / "docs" / "performance" / "profiles.png"


def measured(names: list[str], steps: int, traced: int) -> list[dict[str, Any]]:
    """Measure the plain run, then each callback."""
    plain = operators.profiled(JOB, (), steps)
    found = [{"form": PLAIN, "step_us": us(plain), "operators": table(plain, None), "functions": []}]
    for name in names:
        run = operators.profiled(JOB, [FORMS[name]()], steps)
        stacks = operators.profiled(JOB, [FORMS[name]()], traced, stack=True)
        found.append({"form": name, "step_us": us(run), "operators": table(run, plain), "functions": callers(stacks)})
        print(f"\n{name}\n{tables.aligned(found[-1]['operators'])}\n\n{tables.aligned(found[-1]['functions'])}", flush=True)
    return found


def us(run: operators.Profiled) -> float:
    """Format microseconds per step."""
    return run.seconds / run.steps * 1e6


def table(run: operators.Profiled, plain: operators.Profiled | None) -> list[dict[str, Any]]:
    """Return extra time of the largest operators, of the others, between operators, and in total."""
    own = operators.by_operator(run)
    if plain is None:
        return [{"operator": name, "us": cost.us, "calls": cost.calls} for name, cost in [*own.items()][:SHOWN]]
    extra, whole = operators.beyond(own, operators.by_operator(plain)), us(run) - us(plain)
    rows = [{"operator": name, "us": own[name].us, "beyond_plain": extra[name], "calls": own[name].calls} for name in [*extra][:SHOWN]]
    rest = {OTHERS: sum([*extra.values()][SHOWN:]), BETWEEN: whole - sum(extra.values()), ALL: whole}
    return [*rows, *({"operator": name, "beyond_plain": value} for name, value in rest.items())]


def callers(run: operators.Profiled) -> list[dict[str, Any]]:
    """Return the functions of this package with the largest operator times."""
    found = [*operators.by_function(run).items()][:SHOWN]
    return [{"function": name, "us": cost.us, "operators": cost.calls} for name, cost in found]


def draw(found: list[dict[str, Any]], file: Path) -> Path:
    """Draw one panel per callback: extra microseconds per step."""
    from matplotlib.figure import Figure

    forms = [one for one in found if one["form"] != PLAIN]
    figure = Figure(figsize=(11, 2.6 * -(-len(forms) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(forms) // 2), 2, squeeze=False).flatten()
    for panel in axes[len(forms) :]:
        panel.set_axis_off()
    for panel, one in zip(axes, forms, strict=False):
        _panel(panel, one)
    figure.savefig(file, dpi=110)
    return file


def _panel(panel: Any, one: dict[str, Any]) -> None:
    rows = [row for row in one["operators"] if row["operator"] != ALL][::-1]
    panel.barh([row["operator"] for row in rows], [row["beyond_plain"] for row in rows], color="#3b6ea5")
    whole = sum(row["beyond_plain"] for row in one["operators"] if row["operator"] == ALL)
    panel.set_title(f"{one['form']}: +{whole:.0f} µs on {one['step_us'] - whole:.0f}", fontsize=8, loc="left")
    panel.tick_params(labelsize=7)
    panel.set_xlabel("µs a step beyond the plain run", fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), metavar="FORM", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--steps", type=arguments.whole(), default=200, help="that are profiled")
    parser.add_argument("--traced", type=arguments.whole(), default=20, help="that are profiled with the Python stack")
    parser.add_argument("--threads", type=arguments.whole(), default=1, help="torch's threads")
    parser.add_argument("--out", type=Path, default=record.FOLDER / "profiles.json", help="the JSON file to write")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the PNG file to write")
    given = parser.parse_args()
    be_quiet(given.threads)
    found = measured(given.forms, given.steps, given.traced)
    settings = {"network": JOB.name, "batch": JOB.batch, "steps": given.steps, "traced": given.traced}
    print(record.write(given.out, arguments.command(), settings, found))
    print(draw(found, given.picture))


if __name__ == "__main__":
    main()
