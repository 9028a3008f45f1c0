"""The page on the exchange of the two forms, from the recorded runs:

    python tests/benchmarks/exchange_page.py [--write docs/exchange.md]

Prints the page, or writes it and draws its pictures into docs/exchange/, from that folder's runs.csv and trajectories.csv
(exchange_mnist.py writes both) and the runs of docs/records/ (`lightning-sparse reproduce` writes those). Without them, and
for what they lack, it says "not run yet".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from string import Template

from lightning_sparse import plots

sys.path.insert(0, str(Path(__file__).resolve().parent))

from exchange import pictures, record_table, study_table, tables, verdict
from exchange.frontier import Runs
from exchange.records import Gaps, recorded

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs" / "exchange"
_GAP = """E_s L(s * w) - L(w) - (lam / 2) sum w^2 / eta_hat(w): what the masked loss costs beyond the penalty that it stands for, from
16 Gaussian masks on the weights and the epoch's last training batch, with the form's own alpha (at least 1e-3)."""


def page(folder: Path = FOLDER) -> str:
    """The whole page, from the CSVs in ``folder`` where they are."""
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
        "tried": record_table.tried(folder.parent / "records"),
        "unmoved": record_table.unmoved(folder.parent / "records"),
        "records": record_table.markdown(record_table.recorded(folder.parent / "records")),
    }
    return Template(Path(__file__).with_name("exchange_page.md").read_text(encoding="utf-8")).substitute(parts)


def settings(runs: Runs) -> str:
    """How many runs of which versions, and the commands that make them."""
    if not runs:
        return "No run yet."
    versions, seeds = "; ".join(sorted({run["versions"] for run in runs})), sorted({run["seed"] for run in runs})
    names = sorted({run["study"] for run in runs if run["study"]})
    command = "python tests/benchmarks/exchange_mnist.py --root data"
    commands = [command, *([f"{command} --study {' '.join(names)}"] if names else [])]
    return f"{len(runs)} runs, seeds {', '.join(map(str, seeds))}; {versions}.\n\n```sh\n" + "\n".join(commands) + "\n```"


def target(file: Path) -> str:
    """What target_sparsity.py printed."""
    return file.read_text(encoding="utf-8").strip() if file.is_file() else f"{tables.MISSING.capitalize()}."


def pictured(runs: Runs, epochs: Gaps) -> list[str]:
    """The pictures that there are runs for."""
    drawn = {"frontier": any(run["net"] == "lenet_300_100" and not run["study"] for run in runs)}
    return [name for name, there in (drawn | {"gap": bool(pictures.gap_lines(runs, epochs))}).items() if there]


def _picture(name: str, text: str, made: list[str]) -> str:
    return f"![{text}](exchange/{name}.png)" if name in made else f"{text}: {tables.MISSING}."


def draw(folder: Path) -> list[Path]:
    """The pictures as PNG and PDF; their paths."""
    runs, epochs = recorded(folder)
    makers = {"frontier": lambda: pictures.frontiers(runs), "gap": lambda: pictures.gaps(runs, epochs)}
    figures = {name: makers[name]() for name in pictured(runs, epochs)}
    return [plots.save(figure, folder / f"{name}{suffix}") for name, figure in figures.items() for suffix in (".png", ".pdf")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page's file; its pictures go into exchange/ beside it")
    given = parser.parse_args()
    folder = given.write.parent / "exchange" if given.write else FOLDER
    if not given.write:
        print(page(folder))
    else:
        given.write.write_text(page(folder), encoding="utf-8")
        print(given.write, *draw(folder), sep="\n")


if __name__ == "__main__":
    main()
