"""Write the page of all methods, from callbacks, recipes and recorded runs:

    python tests/benchmarks/methods [--write docs/methods.md]

Prints the page, or writes it and draws its pictures into docs/reproduction/, from docs/reproduction/runs.csv and
trajectories.csv (`lightning-sparse reproduce` writes both), and from those of the runs with a slip and of the mnist/* recipes
in its folders slips/ and mnist/, and from those of docs/records/. Without them it says "not run yet".
"""

from __future__ import annotations

import argparse
import inspect
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from exchange import record_table

from lightning_sparse import callbacks, duality
from lightning_sparse.cli import recipes
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.reproduction import table, written
from methods import pairs, slip_table
from methods.method_list import FORMULAS, METHODS, Method

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "reproduction"
_FIGURE_2 = "Non-zero weights and validation error by epoch: lines are our means, open markers the published runs."
HEAD = ("method", "callback", "form", "what is trained", "penalty or rule", "at zero", "recipes", "reached")


def page(folder: Path = FOLDER) -> str:
    """Format the page from the CSVs in ``folder``, if they exist."""
    runs, trajectories = recorded(folder)
    figure = "![Share of non-zero weights and validation error by epoch](reproduction/figure2.png)\n\nFigure 2. " + _FIGURE_2
    parts = {kind: meaning(kind) for kind in ("zero", "finite", "infinite")}
    slips, ours = recorded(folder / "slips"), recorded(folder / "mnist")
    records = record_table.recorded(folder.parent / "records")
    parts |= {"methods": methods([*runs, *ours[0], *records]), "slips": slip_table.markdown([*runs, *slips[0]], trajectories | slips[1])}
    parts |= {
        "reproduction": table.markdown(runs).rstrip(),
        "pairs": pairs.markdown(table.rows_of(runs), trajectories),
        "trajectories": figure if trajectories else "Figure 2: not run yet.",
    }
    return Template(Path(__file__).with_name("page.md").read_text(encoding="utf-8")).substitute(parts)


def meaning(kind: str) -> str:
    """Return the package's text on a class of penalties, without the part on large weights."""
    text = str(duality.FinePrint(0.0, kind, unbiased=True)).rpartition("; large weights")[0]
    return text[0].upper() + text[1:]


def recorded(folder: Path) -> tuple[list[dict[str, Any]], Any]:
    """Read runs and trajectories; empty if the files are missing."""
    files = folder / written.RUNS, folder / written.TRAJECTORIES
    if not all(file.is_file() for file in files):
        return [], {}
    return written.read_runs(files[0]), written.read_trajectories(files[1])


def methods(runs: table.Runs) -> str:
    """Format one line per method."""
    lines = [_line(HEAD), "|---" * len(HEAD) + "|"]
    for method in METHODS:
        names = recipes_of(method)
        listed, reached = ", ".join(f"`{name}`" for name in names), "; ".join(_reached(name, runs) for name in names)
        told = (method.title, f"`{method.callback}`", method.form, method.update, _formula(method.penalty), at_zero(method))
        lines.append(_line((*told, listed or "none yet", reached or "not run yet")))
    return "\n".join(lines)


def _formula(penalty: Penalty | MaskRule) -> str:
    return f"`{type(penalty).__name__}`: {FORMULAS[type(penalty).__name__]}"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def at_zero(method: Method) -> str:
    """Format the class of the slope at 0."""
    if method.at_zero:
        return method.at_zero
    found = duality.fine_print(duality.to_penalty(method.penalty))
    return {"zero": "slope 0", "finite": f"finite slope, {found.slope_at_zero:.3g}", "infinite": "infinite slope"}[found.kind]


def recipes_of(method: Method) -> list[str]:
    """Return the recipes under paper/ and mnist/ that match this method and no earlier one."""
    packaged = [name for name in recipes.names() if name.startswith(("paper/", "mnist/"))]
    return [name for name in packaged if next((known for known in METHODS if fits(known, name)), None) is method]


def fits(method: Method, recipe: str) -> bool:
    """Return True if a recipe's ``sparsify`` matches the method."""
    callback, given = _sparsify(recipe)
    if callback != method.callback:
        return False
    known = inspect.signature(getattr(callbacks, callback)).parameters
    return all(_named(given.get(key, known[key].default)) == value for key, value in method.where)


@cache
def _sparsify(recipe: str) -> tuple[str, dict[str, Any]]:
    tree = recipes.content(recipes.find(recipe)).get("sparsify") or {}
    return _named(tree), tree.get("init_args") or {}


def _named(value: Any) -> str:
    """The class's own name in a recipe or of an object; text as it is."""
    if isinstance(value, dict):
        return str(value.get("class_path", "")).rpartition(".")[2]
    return value if isinstance(value, str) else type(value).__name__


def _reached(recipe: str, runs: table.Runs) -> str:
    found = [run for run in runs if run["recipe"] == recipe]
    if not found:
        return f"{recipe}: not run yet"
    error, share = (table.spread([run[name] for run in found]) for name in ("test_error", "nonzero_file"))
    return f"{recipe}: {error} %, {share} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page's file; its pictures go into reproduction/ beside it")
    given = parser.parse_args()
    folder = given.write.parent / "reproduction" if given.write else FOLDER
    if not given.write:
        print(page(folder))
    else:
        given.write.write_text(page(folder), encoding="utf-8")
        print(given.write, *written.draw(*recorded(folder), folder), sep="\n")


if __name__ == "__main__":
    main()
