"""Write the page that compares penalty and mask, from the recorded runs:

    python tests/benchmarks/exchange page [--write docs/exchange.md]

Prints the page, or writes it and draws its pictures into docs/exchange/, from runs.csv and trajectories.csv in results/ here
(mnist.py writes both) and the runs of docs/records/ (`lightning-sparse reproduce` writes those). Without them, and
for what they lack, it says "not run yet".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from string import Template

from exchange import pictures, record_table, study_table, tables, verdict
from exchange.frontier import Runs
from exchange.records import FOLDER, Gaps, recorded
from lightning_sparse import plots

DOCS = Path(__file__).resolve().parents[3] / "docs"
_GAP = """E_s L(s * w) - L(w) - (lam / 2) sum w^2 / eta_hat(w): the extra cost of the masked loss compared with the penalty,
estimated with 16 Gaussian masks on the weights and the last training batch of the epoch, with the callback's alpha (at least 1e-3)."""


def page(folder: Path = FOLDER, records: Path = DOCS / "records") -> str:
    """Format the page from the CSVs in ``folder``, if they exist."""
    runs, epochs = recorded(folder)
    made = pictured(runs, epochs)
    parts = {
        "settings": settings(runs),
        "verdict": verdict.markdown(runs),
        "frontier": _picture("frontier", "Test error against the share of non-zero weights", made),
        "equal_lambda": tables.equal_lambda(runs),
        "levels": tables.levels(runs),
        "gap": f"{_GAP}\n\n{_picture('gap', 'Duality gap by epoch', made)}",
        "studies": study_table.markdown(runs),
        "networks": tables.networks(runs),
        "target": target(folder / "target.md"),
        "tried": record_table.tried(records),
        "unmoved": record_table.unmoved(records),
        "records": record_table.markdown(record_table.recorded(records)),
    }
    return Template(Path(__file__).with_name("page.md").read_text(encoding="utf-8")).substitute(parts)


def settings(runs: Runs) -> str:
    """Format the number of runs, their versions and the commands."""
    if not runs:
        return "No run yet."
    versions, seeds = "; ".join(sorted({run["versions"] for run in runs})), sorted({run["seed"] for run in runs})
    names = sorted({run["study"] for run in runs if run["study"]})
    command = "python tests/benchmarks/exchange mnist --root data"
    commands = [command, *([f"{command} --study {' '.join(names)}"] if names else [])]
    return f"{len(runs)} runs, seeds {', '.join(map(str, seeds))}; {versions}.\n\n```sh\n" + "\n".join(commands) + "\n```"


def target(file: Path) -> str:
    """Read the output of target_sparsity.py."""
    return file.read_text(encoding="utf-8").strip() if file.is_file() else f"{tables.MISSING.capitalize()}."


def pictured(runs: Runs, epochs: Gaps) -> list[str]:
    """Return the names of pictures that have runs."""
    drawn = {"frontier": any(run["net"] == "lenet_300_100" and not run["study"] for run in runs)}
    return [name for name, there in (drawn | {"gap": bool(pictures.gap_lines(runs, epochs))}).items() if there]


def _picture(name: str, text: str, made: list[str]) -> str:
    return f"![{text}](exchange/{name}.png)" if name in made else f"{text}: {tables.MISSING}."


def draw(folder: Path, into: Path) -> list[Path]:
    """Draw the pictures of the runs in ``folder`` as PNG and PDF; return their paths."""
    runs, epochs = recorded(folder)
    makers = {"frontier": lambda: pictures.frontiers(runs), "gap": lambda: pictures.gaps(runs, epochs)}
    figures = {name: makers[name]() for name in pictured(runs, epochs)}
    return [plots.save(figure, into / f"{name}{suffix}") for name, figure in figures.items() for suffix in (".png", ".pdf")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page's file; its pictures go into exchange/ beside it")
    given = parser.parse_args()
    if not given.write:
        print(page())
    else:
        given.write.write_text(page(), encoding="utf-8")
        print(given.write, *draw(FOLDER, given.write.parent / "exchange"), sep="\n")


if __name__ == "__main__":
    main()
