"""Write the performance page from the records in results/:

    python tests/benchmarks/performance page [--write docs/performance.md]

Prints the page, or writes it. Where a benchmark has not been run it says so, with the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from performance import per_weight, record, sections, tables
from performance.jobs import JOBS
from performance.per_weight import ITEMS

NAMES = ("step_cost", "before_after", "peers", "time_to_quality", "time_to_quality_moved", "scaling", "start_end", "memory", "ways")
# one network, measured by itself
APART = {"step_cost_lenet": ("step_cost", "lenet"), "peers_lenet": ("peers", "lenet"), "peers_resnet18": ("peers", "resnet18")}
FURTHER = {
    "step_cost_noise": "step_cost --nets resnet18 transformer --arms mask 'mask, compiled' 'mask local, a quarter'",
    "step_cost_lenet_default": "step_cost --nets lenet --threads 1 --tries 1 --arms penalty prox mask 'mask local' 'mask local, a quarter' "
    "'mask, default' monitor",
    "before_after_resnet18": "before_after --before ../old --nets resnet18 --arms penalty prox mask pruning --rounds 4 --threads 1",
    "step_cost_default": "step_cost --nets resnet18 transformer --rounds 5 --threads 1 --tries 1 --arms penalty "
    "'mask local, a quarter' 'mask, default'",
}
REQUIRED = {"before_after": " --before ../old"}
TITLES = {name: job.name for name, job in JOBS.items()} | {
    "sizes": "By the number of weights",
    "slopes": "Nanoseconds per weight, from a million weights on",
    "tensors": "By the number of tensors, at constant total size",
    "imports": "Imports",
    "set_up": "Set-up and tear-down",
    "end": "The end of a fit",
}
TEMPLATE = Path(__file__).with_name("page.md")
LARGEST = 3  # operators and functions that the page names for each form


def command(name: str) -> str:
    if name in FURTHER:
        return f"python tests/benchmarks/performance {FURTHER[name]} --out tests/benchmarks/performance/results/{name}.json"
    if name in APART:
        script, net = APART[name]
        return f"python tests/benchmarks/performance {script} --nets {net} --out tests/benchmarks/performance/results/{name}.json"
    script, moved, _ = name.partition("_moved")
    return f"python tests/benchmarks/performance {script}{' --shift 1' if moved else REQUIRED.get(name, '')}"


def page(folder: Path = record.FOLDER) -> str:
    """Format the page from the JSON files in ``folder``, if they exist."""
    found = {name: record.read(name, folder) for name in (*NAMES, *APART, *FURTHER)}
    for name, (together, net) in APART.items():
        if found[name] and found[together]:  # then that counts
            found[together]["results"].pop(net, None)
    parts = {name: sections.section(one, command(name), TITLES) for name, one in found.items()}
    parts |= {"floors": floors(), "profiles": profiles(record.read("profiles", folder))}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts)


def floors() -> str:
    """Format each callback's items and their sum."""
    listed = {form: ", ".join(f"{what} {size:g}" for what, size in items) for form, items in ITEMS.items()}
    return "\n".join(f"- {form}: {text}; together {per_weight.bytes_of(form):g}" for form, text in listed.items())


def profiles(found: Mapping[str, Any] | None) -> str:
    """Format the picture, and one line per callback."""
    if found is None:
        return sections.section(None, command("profiles"))
    picture = "![Microseconds a step beyond the plain run, by operator](performance/profiles.png)"
    return "\n\n".join((picture, tables.markdown([*map(_profile, found["results"])]), sections.made_by(found)))


def _profile(one: Mapping[str, Any]) -> dict[str, Any]:
    rows = one["operators"]
    said = ", ".join(f"{row['operator']} {tables.cell(row.get('beyond_plain', row.get('us')))}" for row in rows[:LARGEST])
    functions = ", ".join(f"`{row['function']}` {tables.cell(row['us'])}" for row in one["functions"][:LARGEST])
    beyond = {row["operator"]: row.get("beyond_plain") for row in rows}
    whole = {"form": one["form"], "us_a_step": one["step_us"], "beyond_plain": beyond.get("everything")}
    return whole | {"between_operators": beyond.get("between operators"), "largest_operators": said, "operators_by_our_function": functions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page's file")
    given = parser.parse_args()
    if not given.write:
        return print(page())
    if not given.write.parent.is_dir():
        parser.error(f"--write: there is no folder {given.write.parent}")
    given.write.write_text(page(), encoding="utf-8")
    return print(given.write)


if __name__ == "__main__":
    main()
